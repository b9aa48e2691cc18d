"""The gate that heals: which nodes must stay in FP32 for a converted graph to pass parity.

The graph is cut into groups, each a weighted node (convolution, matrix product) and what follows
it. If the whole conversion fails, every group is converted alone and judged, which orders the
groups by the damage they do; bisection then finds how many of the worst to keep in FP32. An
overflow is found because the groups at its two ends fail alone; noise that is spread over the
graph is cut where the most of it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import onnx

from histostream.export.parity import Limits, ParityReport

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class JudgeConversion(Protocol):
    """Judges the conversion that keeps some nodes in FP32; ``quick`` on fewer tiles."""

    def __call__(self, fp32_nodes: Collection[str], *, quick: bool) -> ParityReport:
        """Judge it."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """How a graph may be converted.

    Attributes
    ----------
    report
        Its parity.
    passed
        Whether it may be deployed; a conversion that leaves every node in FP32 may not.
    fp32_nodes
        Names of the nodes that stay in FP32, in the order of the graph.
    healed
        Those among them that the search added.
    steps
        What was tried, and what came of it.
    """

    report: ParityReport
    passed: bool
    fp32_nodes: tuple[str, ...]
    healed: tuple[str, ...]
    steps: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for the card."""
        return {
            "fp32_nodes": list(self.fp32_nodes),
            "healed": list(self.healed),
            "steps": list(self.steps),
        }


def heal(
    model: onnx.ModelProto,
    judge: JudgeConversion,
    limits: Limits,
    islands: Collection[str],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Conversion:
    """Find the nodes to keep in FP32 so that a conversion meets the limits.

    Parameters
    ----------
    model
        The graph in FP32, its nodes named.
    judge
        Judges a conversion.
    limits
        What it has to reach.
    islands
        Nodes that stay in FP32 from the start.
    say
        Told what is being tried.
    """
    steps: list[dict[str, Any]] = []
    groups = node_groups(model, islands)

    def judged(kept: list[list[str]], what: str, *, quick: bool = False) -> ParityReport:
        report = judge({*islands, *(name for group in kept for name in group)}, quick=quick)
        steps.append(
            {
                "tried": what,
                "label_agreement": report.label_agreement,
                "dice_change": report.dice_change,
                "not_finite": report.not_finite,
                "passed": report.meets(limits),
            }
        )
        return report

    report = judged([], "all groups converted")
    kept: list[list[str]] = []
    if not report.meets(limits):
        say(f"{report}; looking for what must stay in FP32")
        worst = sorted(
            groups,
            key=lambda group: (
                judged([g for g in groups if g is not group], f"only {group[0]} converted", quick=True).damage
            ),
            reverse=True,
        )
        low, high = 0, len(worst)  # keeping the `low` worst groups is too few
        while high - low > 1:
            middle = (low + high) // 2
            found = judged(worst[:middle], f"the {middle} worst groups in FP32")
            if found.meets(limits):
                high, report = middle, found
            else:
                low = middle
        kept = worst[:high]
    healed = {name for group in kept for name in group}
    order = [node.name for node in model.graph.node]
    return Conversion(
        report=report,
        passed=report.meets(limits) and len(kept) < len(groups),
        fp32_nodes=tuple(name for name in order if name in healed or name in islands),
        healed=tuple(name for name in order if name in healed),
        steps=tuple(steps),
    )


def node_groups(model: onnx.ModelProto, islands: Collection[str]) -> list[list[str]]:
    """Cut the nodes outside the islands into groups, each led by a weighted node."""
    groups: list[list[str]] = []
    for node in model.graph.node:
        if node.name in islands:
            continue
        if not groups or node.op_type in WEIGHTED:
            groups.append([])
        groups[-1].append(node.name)
    return groups

"""Find the nodes that must stay in FP32 for a converted graph to pass the parity check.

The graph is cut into groups, each a weighted node (convolution, matrix product) and the nodes that follow it. If the
whole conversion fails, every group is converted alone and compared with the reference, which orders the groups by
their error; bisection then finds how many of the worst must stay in FP32. An overflow is found because the groups at
its two ends fail alone; noise that is spread over the graph is removed where most of it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import onnx

from histostream.export.parity import Limits, ParityReport

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class JudgeConversion(Protocol):
    """Compares the conversion that keeps some nodes in FP32 with the reference."""

    def __call__(self, fp32_nodes: Collection[str], *, quick: bool) -> ParityReport:
        """Convert and compare; ``quick`` uses fewer tiles."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """Which nodes of a graph stay in FP32, and the parity that follows.

    Attributes
    ----------
    report
        Parity of the conversion.
    passed
        Whether it may be deployed. A conversion that leaves every node in FP32 may not.
    fp32_nodes
        Names of the nodes that stay in FP32, in the order of the graph.
    added
        The nodes among them that the search added.
    steps
        Every conversion that was tried, with its figures.
    """

    report: ParityReport
    passed: bool
    fp32_nodes: tuple[str, ...]
    added: tuple[str, ...]
    steps: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the record for the card."""
        return {"fp32_nodes": list(self.fp32_nodes), "healed": list(self.added), "steps": list(self.steps)}


def find_mixed_precision(
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
        Compares a conversion with the reference.
    limits
        The parity that is required.
    islands
        Names of the nodes that always stay in FP32.
    say
        Called with a line of progress when the search begins.
    """
    steps: list[dict[str, Any]] = []
    groups = node_groups(model, islands)

    def tried(fp32_groups: list[list[str]], description: str, *, quick: bool = False) -> ParityReport:
        report = judge({*islands, *(name for group in fp32_groups for name in group)}, quick=quick)
        steps.append(
            {
                "tried": description,
                "label_agreement": report.label_agreement,
                "dice_change": report.dice_change,
                "not_finite": report.not_finite,
                "passed": report.meets(limits),
            }
        )
        return report

    report = tried([], "all groups converted")
    kept: list[list[str]] = []
    if not report.meets(limits):
        say(f"{report}; looking for the nodes that must stay in FP32")
        errors = [
            tried([g for g in groups if g is not group], f"only {group[0]} converted", quick=True).error
            for group in groups
        ]
        order = sorted(range(len(groups)), key=errors.__getitem__, reverse=True)
        worst = [groups[i] for i in order]
        low, high = 0, len(worst)  # with the `low` worst groups in FP32 the conversion fails
        while high - low > 1:
            middle = (low + high) // 2
            candidate = tried(worst[:middle], f"the {middle} worst groups in FP32")
            if candidate.meets(limits):
                high, report = middle, candidate
            else:
                low = middle
        kept = worst[:high]
    added = {name for group in kept for name in group}
    names = [node.name for node in model.graph.node]
    return Conversion(
        report=report,
        passed=report.meets(limits) and len(kept) < len(groups),
        fp32_nodes=tuple(name for name in names if name in added or name in islands),
        added=tuple(name for name in names if name in added),
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

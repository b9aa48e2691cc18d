"""Decide what makes probabilities of a network's output, from how its graph ends and from what it gives on tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from histostream.export.external.description import DescriptionError
from histostream.export.graph.model import GraphError
from histostream.export.graph.operators import MOVING

LABELS = "labels"  # the "activation" of an output of integers
PROBABILITIES = ("Softmax", "Sigmoid", "HardSigmoid")  # what graphs of probabilities end in
TOLERANCE = 1e-3  # by which rounding, half precision included, may move probabilities out of 0..1
MIN_SPREAD = 0.5  # between the least and the largest value; logits hardly stay in 0..1 over more than that


@dataclass(frozen=True, slots=True)
class Activation:
    """What makes probabilities of a network's output.

    Attributes
    ----------
    name
        "softmax", "sigmoid", "none" or "labels".
    why
        The reason, for people.
    independent
        Whether the probabilities of the classes need not sum to 1.
    """

    name: str
    why: str
    independent: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the output of a network looks like on the tiles that it was tried on.

    Attributes
    ----------
    low, high
        The least and the largest value.
    sums_to_one
        Whether the values of all channels sum to 1 in every pixel; False for one channel.
    ending
        The operator that the graph ends in, apart from nodes that only move values; "" if there is none.
    tiles
        What it was tried on, for people.
    """

    low: float
    high: float
    sums_to_one: bool
    ending: str
    tiles: str

    @classmethod
    def gather(cls, model: onnx.ModelProto, output_name: str, output: NDArray[Any], tiles: str) -> Evidence:
        """Look at an output (N, C, H, W) of floating-point numbers.

        Raises
        ------
        GraphError
            If it is not finite.
        """
        if not np.isfinite(output).all():
            raise GraphError(
                "the network's output is not finite on the tiles tried; check --mean, --std and --scale, or train it "
                "again"
            )
        total = output.astype(np.float32).sum(axis=1)
        one = output.shape[1] > 1 and bool(np.all(np.abs(total - 1) <= TOLERANCE * 4))
        return cls(float(output.min()), float(output.max()), one, last_operator(model, output_name), tiles)

    @property
    def within(self) -> bool:
        """Whether all values lie in 0..1."""
        return self.low >= -TOLERANCE and self.high <= 1 + TOLERANCE

    @property
    def range_text(self) -> str:
        """The range of the values."""
        return f"the output goes from {self.low:.3g} to {self.high:.3g} on {self.tiles}"


def last_operator(model: onnx.ModelProto, output_name: str, passed: frozenset[str] = MOVING) -> str:
    """Return the operator that makes an output, apart from nodes that only move values; "" if there is none."""
    makers = {name: node for node in model.graph.node for name in node.output}
    node = makers.get(output_name)
    while node is not None and node.op_type in passed:
        node = makers.get(node.input[0])
    return "" if node is None else node.op_type


def choose_activation(asked: str, evidence: Evidence, channels: int, *, background_is_added: bool) -> Activation:
    """Return the activation of an output, or refuse a choice that cannot be, or ask.

    Parameters
    ----------
    asked
        "softmax", "sigmoid", "none", or "auto". With "auto", an output that stays within 0..1 on all tiles is
        probabilities, and one that leaves it is logits. Where it stays within 0..1 but hardly varies, tiles cannot
        tell, and the user is asked.
    evidence
        The output on tiles.
    channels
        Number of its channels.
    background_is_added
        Whether a background class is to be added to several channels, so that they are independent.

    Raises
    ------
    DescriptionError
        If tiles cannot tell, or the activation that was asked for cannot be.
    """
    logits = "sigmoid" if channels == 1 or background_is_added else "softmax"
    independent = channels > 1 and not evidence.sums_to_one
    if asked == "auto":
        if evidence.sums_to_one and evidence.within:
            return Activation("none", "the output sums to 1 over the classes")
        if evidence.ending in PROBABILITIES and evidence.within:
            return Activation("none", f"the graph ends in {evidence.ending}", independent)
        if not evidence.within:
            hint = "" if channels == 1 else "; pass --activation sigmoid if its classes are independent"
            hint = "" if logits == "sigmoid" else hint
            return Activation(
                logits, f"{evidence.range_text}, so it is logits{hint}", channels > 1 and logits == "sigmoid"
            )
        if evidence.high - evidence.low >= MIN_SPREAD:
            return Activation("none", f"{evidence.range_text}, so it is probabilities", independent)
        raise DescriptionError(
            f"{evidence.range_text}, which may be probabilities or logits: pass --activation none if it is "
            f"probabilities, --activation {logits} if it is logits, or --calibrate with a slide on which it finds "
            "something"
        )
    if asked == "softmax" and channels == 1:
        raise DescriptionError("softmax over one channel is 1 everywhere: pass --activation sigmoid")
    if asked == "softmax" and evidence.sums_to_one and evidence.within:
        raise DescriptionError("the output is probabilities already: pass --activation none")
    if asked == "none" and not evidence.within:
        raise DescriptionError(
            f"{evidence.range_text}, so it is not probabilities: pass --activation "
            + ("sigmoid" if channels == 1 else "softmax or --activation sigmoid")
        )
    independent = independent if asked == "none" else asked == "sigmoid"
    return Activation(asked, "as was asked for", independent and channels > 1)

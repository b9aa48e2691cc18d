"""How the output of a network becomes the scores of classes: in NumPy for the reference, and as nodes of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from histostream.export.external.activation import LABELS, Activation
from histostream.export.external.description import DescriptionError, ExternalModel
from histostream.export.external.output import OutputFormat
from histostream.export.graph.nodes import Nodes
from histostream.wsi.outputs.label_rows import BACKGROUND, is_background_name

# The class that loses at a threshold is lowered by this, more than FP32 rounds: a score equal to the threshold reaches
# it, and the arg-max says what the comparison says.
MARGIN = 2.0**-20
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Scoring:
    """What is computed from the network's output (N, C, H, W), after its layout and size are those of the tile.

    Attributes
    ----------
    activation
        "softmax", "sigmoid", "none", or "labels" for an output of integers.
    classes
        Names, in label order; with the background that is added.
    background
        Which class is the background; None if none is.
    threshold
        Of two classes, `foreground` is the label where its probability is at least this number; None: the arg-max.
        The scores are the two probabilities, weighted such that they are equal at the threshold: the weights
        are 1 and threshold / (1 - threshold), or its inverse if that is more than 1. They are linear in the
        probability, so blending tiles and then comparing is the same as comparing the blended probability.
    foreground
        The class of the threshold, 0 or 1.
    background_below
        Class 0 is added: its score is this number, so it is the label where every other score is lower.
    """

    activation: str
    classes: tuple[str, ...]
    background: int | None = None
    threshold: float | None = None
    foreground: int = 1
    background_below: float | None = None

    @property
    def weights(self) -> tuple[float, float]:
        """The weights of the probabilities of `foreground` and of the other class."""
        threshold = self.threshold or DEFAULT_THRESHOLD
        return min(1.0, (1 - threshold) / threshold), min(1.0, threshold / (1 - threshold))

    def scores(self, y: NDArray[Any]) -> NDArray[np.float32]:
        """Return the scores (N, K, H, W) of an output (N, C, H, W), not rounded."""
        if self.activation == LABELS:
            one_hot: NDArray[np.bool_] = y == np.arange(len(self.classes)).reshape(1, -1, 1, 1)
            return one_hot.astype(np.float32)
        y = y.astype(np.float64)
        if self.activation == "softmax":
            y = np.exp(y - y.max(axis=1, keepdims=True))
            y /= y.sum(axis=1, keepdims=True)
        elif self.activation == "sigmoid":
            y = 0.5 * (1 + np.tanh(0.5 * y))  # the logistic function, without overflow
        y = y.astype(np.float32)  # as in the graph, where it is compared with the threshold
        if self.threshold is not None:
            p = y[:, -1:] if self.foreground else y[:, :1]
            least = np.float32(self.threshold)
            for_it, against = (np.float32(weight) for weight in self.weights)
            other = against * (1 - p) - MARGIN * (p >= least)
            p = for_it * p - MARGIN * (p < least)
            y = np.concatenate([other, p] if self.foreground else [p, other], axis=1)
        elif self.background_below is not None:
            least = np.float32(self.background_below)
            best = y.max(axis=1, keepdims=True)
            y = np.concatenate([least - MARGIN * (best >= least), y], axis=1)
        return y.astype(np.float32)

    def add_nodes(self, nodes: Nodes, y: str, channels: int) -> str:
        """Add the same to a graph, and return the name of the scores."""
        if self.activation == LABELS:
            labels = np.arange(len(self.classes), dtype=np.float32).reshape(1, -1, 1, 1)
            return nodes.add("Cast", nodes.add("Equal", y, nodes.constant("labels", labels)), to=TensorProto.FLOAT)
        if self.activation == "softmax":
            y = nodes.add("Softmax", y, axis=1)
        elif self.activation == "sigmoid":
            y = nodes.add("Sigmoid", y)
        if self.threshold is not None:
            if channels > 1:
                index = nodes.constant("foreground", np.array([self.foreground], np.int64))
                y = nodes.add("Gather", y, index, axis=1)
            above = self._reaches(nodes, y, self.threshold)
            below = nodes.add("Sub", nodes.constant("all", np.float32(MARGIN)), above)
            without = nodes.add("Sub", nodes.constant("one", np.float32(1)), y)
            for_it, against = (nodes.constant("weight", np.float32(weight)) for weight in self.weights)
            p = nodes.add("Sub", nodes.add("Mul", y, for_it), below)
            other = nodes.add("Sub", nodes.add("Mul", without, against), above)
            return nodes.add("Concat", *((other, p) if self.foreground else (p, other)), axis=1)
        if self.background_below is not None:
            best = nodes.add("ReduceMax", y, nodes.constant("classes", np.array([1])), keepdims=1)
            above = self._reaches(nodes, best, self.background_below)
            least = nodes.constant("least", np.float32(self.background_below))
            return nodes.add("Concat", nodes.add("Sub", least, above), y, axis=1)
        return y

    @staticmethod
    def _reaches(nodes: Nodes, y: str, threshold: float) -> str:
        """Return `MARGIN` where a probability is at least the threshold, else 0."""
        is_above = nodes.add("GreaterOrEqual", y, nodes.constant("threshold", np.float32(threshold)))
        above = nodes.add("Cast", is_above, to=TensorProto.FLOAT)
        return nodes.add("Mul", above, nodes.constant("margin", np.float32(MARGIN)))


def choose_scoring(options: ExternalModel, output: OutputFormat, activation: Activation) -> tuple[Scoring, list[str]]:
    """Return how scores are made of the output, and a line for each decision that was made for the user.

    Raises
    ------
    DescriptionError
        If an option does not fit the output.
    """
    classes, background = options.classes, options.background_index()
    if activation.name == LABELS:
        line = "the output is labels (an arg-max inside the network): they are taken as they are, without blending"
        return _labels(options), [line]
    if output.channels == 1:
        return _one_channel(options, activation)
    if options.threshold is not None:
        if len(classes) != 2 or output.channels != 2 or activation.independent:
            raise DescriptionError(
                "--threshold is for two classes of which one is the background: leave it out, or pass "
                "--background-below for independent sigmoids"
            )
        foreground = 0 if background == 1 else 1
        return Scoring(activation.name, classes, background, options.threshold, foreground), []
    if output.channels == len(classes) - 1:
        if options.background_below == 0:
            raise DescriptionError(
                f"--background-below 0 adds no background, and {classes[0]!r} has no output channel: leave the option "
                "out, or the class"
            )
        below = options.background_below or DEFAULT_THRESHOLD
        return Scoring(activation.name, classes, 0, background_below=below), [_added(classes[0], below)]
    if options.background_below and background is not None:
        raise DescriptionError(
            f"--background-below adds a background class, and {classes[background]!r} is one: leave the option out"
        )
    wanted = options.background_below
    if wanted is None and activation.independent and background is None:
        wanted = DEFAULT_THRESHOLD
    if not wanted:
        return Scoring(activation.name, classes, background), []
    return Scoring(activation.name, (BACKGROUND, *classes), 0, background_below=wanted), [_added(BACKGROUND, wanted)]


def _labels(options: ExternalModel) -> Scoring:
    if options.threshold is not None or options.background_below is not None:
        raise DescriptionError(
            "the output is labels, which have no threshold: leave --threshold and --background-below out, or export "
            "the model without its arg-max"
        )
    if len(options.classes) < 2:
        raise DescriptionError("the output is labels: name all of them with --classes, from label 0 on")
    return Scoring(LABELS, options.classes, options.background_index())


def _one_channel(options: ExternalModel, activation: Activation) -> tuple[Scoring, list[str]]:
    classes = options.classes
    if options.background_below is not None:
        raise DescriptionError("the network has one output channel: pass --threshold instead of --background-below")
    if is_background_name(classes[-1]) or options.background == classes[-1]:
        raise DescriptionError(
            f"the only output channel would be of the class {classes[-1]!r}: name the background first, as in "
            f"--classes background,{'tumour' if len(classes) == 1 else classes[0]}"
        )
    threshold = options.threshold or DEFAULT_THRESHOLD
    lines = []
    if len(classes) == 1:
        classes = (BACKGROUND, *classes)
    lines.append(f"one output channel: {classes[1]!r} where it is at least {threshold:g}, else {classes[0]!r}")
    return Scoring(activation.name, classes, 0, threshold), lines


def _added(name: str, below: float) -> str:
    return f"class 0, {name!r}, is the label where every score is below {below:g} (--background-below)"

"""Check parity: whether an exported graph computes what the trained network does.

A graph runs in ONNX Runtime on a CPU. The labels that its scores give in the stream are compared with the arg-max of
the unrounded scores of the reference (torch in single precision) on the same tiles.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from histostream.export.graph.model import GraphError, first_line, open_session
from histostream.export.graph.scores import with_unrounded_scores
from histostream.export.tiles import Tiles
from histostream.runtime.stream.fixed_point import to_integers
from histostream.wsi.errors import HistoError

MAX_LEVELS = 1  # grey levels by which rounding may change a painted pixel
MIN_SHARE = 0.01  # of the tiles; the Dice of a smaller class is noise: it is recorded but not limited


class ParityError(HistoError, ValueError):
    """An exported file does not compute what the trained network does."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The parity that a graph must have to be written (docs/methods.md).

    Attributes
    ----------
    agreement
        Smallest share of labels that equal the reference's.
    dice_change
        Largest change of any class's Dice; see `ParityReport.dice_change`.
    """

    agreement: float
    dice_change: float


LIMITS = {
    "fp32": Limits(0.9999, 0.002),
    "fp16": Limits(0.999, 0.002),
    "int8": Limits(0.99, 0.005),
}


@dataclass(frozen=True, slots=True)
class ParityReport:
    """How the scores of an exported graph differ from those of the reference on the same tiles.

    Attributes
    ----------
    engine
        Name and version of the library that ran the graph.
    source
        Where the tiles come from.
    tiles, pixels
        Number of tiles and of pixels that were compared.
    max_difference, mean_difference
        Of the scores, which lie in [0, 1].
    label_agreement
        Share of the pixels whose label is the arg-max of the reference's unrounded scores.
    moved_by_rounding
        Share of the pixels whose label is not the arg-max of the graph's own scores before they are rounded.
    dark_label_agreement
        The same among the darkest tenth of the pixels, where iMEMS's margin is smallest.
    dice
        Dice of each class between the two label maps; None where neither has it.
    dice_change
        Largest change of a class's Dice, over the classes that cover at least `MIN_SHARE`. It is measured against the
        true labels where the tiles have them; else against the reference's own labels, where it is 1 - Dice, which
        is stricter.
    truth
        Whether ``dice_change`` is against true labels.
    not_finite
        Number of scores that were NaN or infinite before they were clipped to 0..1.
    """

    engine: str
    source: str
    tiles: int
    pixels: int
    max_difference: float
    mean_difference: float
    label_agreement: float
    moved_by_rounding: float
    dark_label_agreement: float
    dice: tuple[float | None, ...]
    dice_change: float
    truth: bool
    not_finite: int

    def meets(self, limits: Limits) -> bool:
        """Whether the graph may be deployed."""
        return (
            self.not_finite == 0 and self.label_agreement >= limits.agreement and self.dice_change <= limits.dice_change
        )

    @property
    def error(self) -> tuple[bool, float, float]:
        """Key to sort by: scores that are not finite, then wrong labels, then the difference of scores."""
        return self.not_finite > 0, 1 - self.label_agreement, self.mean_difference

    def as_dict(self) -> dict[str, Any]:
        """Return the record for the card."""
        return asdict(self)

    def __str__(self) -> str:
        finite = f", {self.not_finite} scores not finite" if self.not_finite else ""
        return (
            f"{self.label_agreement:.4%} of the labels agree (darkest tenth "
            f"{self.dark_label_agreement:.4%}), Dice changes by {self.dice_change:.4f}{finite}"
        )


@dataclass(frozen=True, slots=True)
class Judge:
    """Compares graphs with one reference.

    Attributes
    ----------
    tiles
        Tiles to compare on.
    reference
        Scores of the reference on ``tiles.gate``, (N, K, H, W) float32, not rounded.
    """

    tiles: Tiles
    reference: NDArray[np.float32]

    def first(self, count: int) -> Judge:
        """Return a judge that compares on the first ``count`` tiles only."""
        truth = None if self.tiles.truth is None else self.tiles.truth[:count]
        tiles = replace(self.tiles, gate=self.tiles.gate[:count], truth=truth)
        return Judge(tiles, self.reference[:count])

    def judge(self, model: onnx.ModelProto) -> ParityReport:
        """Run a graph on every tile and compare.

        Raises
        ------
        GraphError
            If ONNX Runtime cannot run the graph.
        """
        return self.report(run_graph(model, self.tiles.gate), f"onnxruntime {onnxruntime.__version__} cpu")

    def report(self, output: GraphOutput, engine: str) -> ParityReport:
        """Compare the output of a graph with the reference's."""
        difference = np.abs(np.clip(self.reference, 0, 1) - output.scores)
        labels, other = self.reference.argmax(axis=1), output.labels
        same = labels == other
        grey = self.tiles.gate.mean(axis=-1)
        classes = range(self.reference.shape[1])
        dice = tuple(dice_of(labels == k, other == k) for k in classes)
        truth = self.tiles.truth
        return ParityReport(
            engine=engine,
            source=self.tiles.source,
            tiles=len(other),
            pixels=same.size,
            max_difference=float(difference.max()),
            mean_difference=float(difference.mean()),
            label_agreement=float(same.mean()),
            moved_by_rounding=float((output.unrounded_labels != other).mean()),
            dark_label_agreement=float(same[grey <= np.quantile(grey, 0.1)].mean()),
            dice=dice,
            dice_change=max((_dice_change(labels, other, truth, k) for k in classes), default=0.0),
            truth=truth is not None,
            not_finite=output.not_finite,
        )


@dataclass(frozen=True, slots=True)
class GraphOutput:
    """What a graph gives on some tiles.

    Attributes
    ----------
    scores
        (N, K, H, W) float16.
    unrounded
        (N, K, H, W) float32, the scores before they were rounded; as ``scores`` where the graph does not end in
        `add_rounding`.
    labels, unrounded_labels
        (N, H, W), the arg-max of the integers that the stream makes of the scores, and of ``unrounded``.
    not_finite
        Number of unrounded scores that are NaN or infinite.
    """

    scores: NDArray[np.float16]
    unrounded: NDArray[np.float32]
    labels: NDArray[np.intp]
    unrounded_labels: NDArray[np.intp]
    not_finite: int


def run_graph(model: onnx.ModelProto, tiles: NDArray[np.uint8]) -> GraphOutput:
    """Run a graph that keeps the tile contract on tiles (N, H, W, C), one by one.

    Raises
    ------
    GraphError
        If ONNX Runtime cannot load or run it.
    """
    scores, unrounded = [], []
    try:
        session = open_session(with_unrounded_scores(model))
        for tile in tiles:
            outputs = session.run(None, {"tiles": tile[None]})
            scores.append(outputs[0])
            unrounded.append(outputs[-1].astype(np.float32))
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        raise GraphError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from error
    rounded, exact = np.concatenate(scores), np.concatenate(unrounded)
    return GraphOutput(
        scores=rounded,
        unrounded=exact,
        labels=to_integers(rounded).argmax(axis=1),
        unrounded_labels=exact.argmax(axis=1),
        not_finite=int((~np.isfinite(exact)).sum()),
    )


def dice_of(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float | None:
    """Dice of two masks; None where both are empty."""
    total = int(a.sum()) + int(b.sum())
    return float(2 * (a & b).sum() / total) if total else None


def _dice_change(labels: NDArray[Any], other: NDArray[Any], truth: NDArray[np.uint8] | None, k: int) -> float:
    target = labels if truth is None else truth
    if (target == k).mean() < MIN_SHARE:
        return 0.0
    before, after = dice_of(labels == k, target == k), dice_of(other == k, target == k)
    return abs((before or 0.0) - (after or 0.0))


def check_images(
    model: onnx.ModelProto, inputs: dict[str, NDArray[Any]], expected: NDArray[np.uint8], name: str
) -> None:
    """Refuse a graph that does not paint the same images as torch.

    Parameters
    ----------
    model
        A graph with one output.
    inputs
        Its inputs, by name.
    expected
        The images that torch paints, uint8.
    name
        Name of the graph, for the error.

    Raises
    ------
    ParityError
        If a pixel differs by more than `MAX_LEVELS`.
    """
    (images,) = open_session(model).run(None, inputs)
    levels = int(np.abs(images.astype(int) - expected.astype(int)).max())
    if levels > MAX_LEVELS:
        raise ParityError(
            f"{name}: {levels} grey levels from torch's images; nothing was written: report it, with the model"
        )

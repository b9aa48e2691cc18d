"""Check parity: whether an exported graph computes what the trained network does.

A graph runs in ONNX Runtime on a CPU; its uint8 scores are compared with those of the reference (torch in single
precision) on the same tiles.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from histostream.export.graph.model import GraphError, first_line, open_session
from histostream.export.tiles import Tiles
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
        Of the uint8 scores.
    label_agreement
        Share of the pixels with the same label.
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
        Number of scores that were NaN or infinite before they were clipped to 0..255.
    """

    engine: str
    source: str
    tiles: int
    pixels: int
    max_difference: int
    mean_difference: float
    label_agreement: float
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
        Scores of the reference on ``tiles.gate``, (N, K, H, W) uint8.
    """

    tiles: Tiles
    reference: NDArray[np.uint8]

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
        scores, not_finite = run_graph(model, self.tiles.gate)
        return self.report(scores, not_finite, f"onnxruntime {onnxruntime.__version__} cpu")

    def report(self, scores: NDArray[np.uint8], not_finite: int, engine: str) -> ParityReport:
        """Compare scores (N, K, H, W) with the reference's."""
        difference = np.abs(self.reference.astype(np.int16) - scores)
        labels, other = self.reference.argmax(axis=1), scores.argmax(axis=1)
        same = labels == other
        grey = self.tiles.gate.mean(axis=-1)
        classes = range(self.reference.shape[1])
        dice = tuple(dice_of(labels == k, other == k) for k in classes)
        truth = self.tiles.truth
        return ParityReport(
            engine=engine,
            source=self.tiles.source,
            tiles=len(scores),
            pixels=same.size,
            max_difference=int(difference.max()),
            mean_difference=float(difference.mean()),
            label_agreement=float(same.mean()),
            dark_label_agreement=float(same[grey <= np.quantile(grey, 0.1)].mean()),
            dice=dice,
            dice_change=max((_dice_change(labels, other, truth, k) for k in classes), default=0.0),
            truth=truth is not None,
            not_finite=not_finite,
        )


def run_graph(model: onnx.ModelProto, tiles: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """Run a graph that keeps the tile contract on tiles (N, H, W, C), one by one.

    Returns
    -------
    scores
        (N, K, H, W) uint8.
    not_finite
        Number of scores that were NaN or infinite before they became uint8.

    Raises
    ------
    GraphError
        If ONNX Runtime cannot load or run it.
    """
    scores, not_finite = [], 0
    try:
        session = open_session(_with_raw_scores(model))
        for tile in tiles:
            outputs = session.run(None, {"tiles": tile[None]})
            scores.append(outputs[0])
            not_finite += sum(int((~np.isfinite(raw)).sum()) for raw in outputs[1:])
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        raise GraphError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from error
    return np.concatenate(scores), not_finite


def _with_raw_scores(model: onnx.ModelProto) -> onnx.ModelProto:
    """Add an output: the scores before Clip and Cast hide values that are not finite."""
    producer = {name: node for node in model.graph.node for name in node.output}
    name = model.graph.output[0].name
    while name in producer and producer[name].op_type in ("Cast", "Clip", "Round", "Floor"):
        name = producer[name].input[0]
    if name not in producer:
        return model
    watched = copy.deepcopy(model)
    watched.graph.node.append(helper.make_node("Cast", [name], ["raw_scores"], "raw_scores_cast", to=TensorProto.FLOAT))
    raw = helper.make_tensor_value_info("raw_scores", TensorProto.FLOAT, None)
    watched.graph.output.append(raw)
    return watched


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

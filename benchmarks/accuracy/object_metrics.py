"""Scores of instance maps by the rules of the GlaS gland contest: object F1, Dice, Hausdorff.

Sirinukunwattana et al. 2017, Medical Image Analysis 35, and where the paper is silent the contest's
own evaluation code, version 6. S is the prediction, G the truth; S_i and G_j are their objects. The
partner of an object is the object of the other map that shares the most pixels with it, the one of
smallest label if two share as many; background is nobody's partner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MIN_GLAND_PX = 100  # ours; at 0.62 um per pixel a disc of 7 um in diameter, less than one cell
OVERLAP = 0.5  # GlaS: more than this share of a true object must be found
EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """Scores of one image.

    Attributes
    ----------
    true_positives, false_positives, false_negatives
        Objects found, predicted for nothing, and missed.
    dice
        Object Dice, 0..1.
    hausdorff_px
        Object Hausdorff distance, in pixels of the image.
    capped
        Whether only one of the maps is empty: the distance is infinite, and ``hausdorff_px``
        is the diagonal of the image instead.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    dice: float
    hausdorff_px: float
    capped: bool

    @property
    def f1(self) -> float:
        """Object F1; 1 if both maps are empty, 0 if one is."""
        return _f1(self.true_positives, self.false_positives, self.false_negatives)


def score_objects(predicted: NDArray[np.integer], truth: NDArray[np.integer]) -> ObjectScore:
    """Score one image.

    *F1*: S_i is a true positive if its partner G_j shares more than half of G_j's area with it,
    else a false positive; the false negatives are the other true objects.

    *Dice*: 1/2 (sum_i w_i Dice(S_i, partner) + sum_j v_j Dice(G_j, partner)), where w_i is the
    share of S_i in the area of S, and v_j of G_j in the area of G; 0 without a partner.

    *Hausdorff*: the same sums over max(max_a d(a, B), max_b d(b, A)) of the two objects, Euclidean
    and over all their pixels; an object without a partner takes the nearest by this distance.

    Two empty maps agree: F1 1, Dice 1, Hausdorff 0. One empty map: F1 0, Dice 0, capped Hausdorff.

    Parameters
    ----------
    predicted, truth
        (H, W) integer, 0 is background, each other value one object, connected or not; the values
        need not be consecutive.

    Raises
    ------
    ValueError
        If the shapes differ or are not (H, W), or a map is not of integers or has negative ones.
    """
    if predicted.shape != truth.shape or predicted.ndim != 2:
        raise ValueError(f"predicted is {predicted.shape}, truth {truth.shape}: give (H, W) both")
    predicted_objects, true = _Objects.of("predicted", predicted), _Objects.of("truth", truth)
    if not len(predicted_objects.areas_px) or not len(true.areas_px):
        alike = len(predicted_objects.areas_px) == len(true.areas_px)
        return ObjectScore(
            true_positives=0,
            false_positives=len(predicted_objects.areas_px),
            false_negatives=len(true.areas_px),
            dice=float(alike),
            hausdorff_px=0.0 if alike else math.hypot(*truth.shape),
            capped=not alike,
        )
    to_true, to_found = _partners(predicted_objects, true), _partners(true, predicted_objects)
    matched = to_true.index >= 0
    share = to_true.overlap_px[matched] / true.areas_px[to_true.index[matched]]
    hits = int((share > OVERLAP).sum())
    return ObjectScore(
        true_positives=hits,
        false_positives=len(predicted_objects.areas_px) - hits,
        false_negatives=len(true.areas_px) - hits,
        dice=(_object_dice(predicted_objects, true, to_true) + _object_dice(true, predicted_objects, to_found)) / 2,
        hausdorff_px=(
            _object_hausdorff(predicted_objects, true, to_true) + _object_hausdorff(true, predicted_objects, to_found)
        )
        / 2,
        capped=False,
    )


class ObjectScores:
    """Scores of the images of a set. With no image every score is nan.

    Attributes
    ----------
    images
        Score of each image, in the order of `add`.
    """

    def __init__(self) -> None:
        self.images: list[ObjectScore] = []

    def add(self, predicted: NDArray[np.integer], truth: NDArray[np.integer]) -> None:
        """Score one image; as `score_objects`."""
        self.images.append(score_objects(predicted, truth))

    def __iadd__(self, other: ObjectScores) -> Self:
        """Join the images of two sets: GlaS's total is test A and B as one set."""
        self.images += other.images
        return self

    def f1_pooled(self) -> float:
        """F1 of the objects of all images together."""
        if not self.images:
            return math.nan
        return _f1(
            sum(one.true_positives for one in self.images),
            sum(one.false_positives for one in self.images),
            sum(one.false_negatives for one in self.images),
        )

    def f1_per_image_mean(self) -> float:
        """Mean of the images' F1."""
        return _mean([one.f1 for one in self.images])

    def dice_per_image_mean(self) -> float:
        """Mean of the images' object Dice."""
        return _mean([one.dice for one in self.images])

    def hausdorff_px_per_image_mean(self) -> float:
        """Mean of the images' object Hausdorff distance, in pixels; see `capped`."""
        return _mean([one.hausdorff_px for one in self.images])

    def capped(self) -> int:
        """Count the images whose infinite Hausdorff distance became the image diagonal."""
        return sum(one.capped for one in self.images)


def instances_from_labels(
    labels: NDArray[np.integer],
    class_index: int,
    *,
    min_px: int = MIN_GLAND_PX,
    fill_holes: bool = True,
) -> NDArray[np.int32]:
    """Objects of one class: its 8-connected components.

    Holes are filled first, so what lies inside an object is a part of it; the background of a hole
    is 4-connected, as it must be where objects are 8-connected. A gap open to the image border is
    no hole.

    Parameters
    ----------
    labels
        (H, W) label map.
    class_index
        Label of the class.
    min_px
        Smaller objects are dropped; their area counts the filled holes.
    fill_holes
        Whether to fill them.

    Returns
    -------
    (H, W) int32, 0 is background, 1..N the objects.

    Raises
    ------
    ValueError
        If ``labels`` is not (H, W).
    """
    if labels.ndim != 2:
        raise ValueError(f"labels are {labels.shape}: give (H, W)")
    mask = labels == class_index
    if fill_holes:
        mask = ndimage.binary_fill_holes(mask)
    components, count = ndimage.label(mask, EIGHT_NEIGHBOURS)
    kept = np.bincount(components.ravel(), minlength=count + 1) >= min_px
    kept[0] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    objects: NDArray[np.int32] = numbers[components]
    return objects


@dataclass(frozen=True, slots=True)
class _Objects:
    """A map whose N objects are numbered 1..N in the order of their labels.

    ``boxes`` are the pixels' (row, column) extents, (N, 4): top, left, bottom, right, inclusive.
    """

    numbers: NDArray[np.int64]  # (H, W)
    areas_px: NDArray[np.int64]  # (N,)
    boxes: NDArray[np.int64]  # (N, 4)

    @classmethod
    def of(cls, name: str, labels: NDArray[np.integer]) -> _Objects:
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{name} is {labels.dtype}: give integer instance numbers")
        values, inverse = np.unique(labels, return_inverse=True)
        if values.size and values[0] < 0:
            raise ValueError(f"{name} has the negative instance number {values[0]}")
        numbers = inverse.reshape(labels.shape) + (0 if 0 in values else 1)
        areas_px = np.bincount(numbers.ravel())[1:]
        slices = ndimage.find_objects(numbers)
        boxes = [(y.start, x.start, y.stop - 1, x.stop - 1) for y, x in slices]
        return cls(numbers, areas_px, np.asarray(boxes, np.int64).reshape(-1, 4))


@dataclass(frozen=True, slots=True)
class _Partners:
    """Of each object, the index of its partner in the other map (-1: none) and what they share."""

    index: NDArray[np.int64]
    overlap_px: NDArray[np.int64]


def _partners(own: _Objects, other: _Objects) -> _Partners:
    shared = (own.numbers > 0) & (other.numbers > 0)
    width = len(other.areas_px) + 1
    pairs = own.numbers[shared] * width + other.numbers[shared]
    keys, counts = np.unique(pairs, return_counts=True)
    a, b = np.divmod(keys, width)
    order = np.lexsort((b, -counts, a))  # by object, then most pixels first, then smallest label
    objects, first = np.unique(a[order], return_index=True)
    index = np.full(len(own.areas_px), -1)
    overlap_px = np.zeros(len(own.areas_px), np.int64)
    index[objects - 1] = b[order][first] - 1
    overlap_px[objects - 1] = counts[order][first]
    return _Partners(index, overlap_px)


def _object_dice(own: _Objects, other: _Objects, partners: _Partners) -> float:
    """One of the two sums: weighted Dice of the objects of ``own``."""
    # Index -1 reads some other object's area, and does no harm: the overlap is 0.
    both = own.areas_px + other.areas_px[partners.index]
    dice = 2 * partners.overlap_px / both
    return float(np.average(dice, weights=own.areas_px))


def _object_hausdorff(own: _Objects, other: _Objects, partners: _Partners) -> float:
    """One of the two sums: weighted Hausdorff distance of the objects of ``own``."""
    distances = [
        _hausdorff(own, i, other, partner) if partner >= 0 else _nearest(own, i, other)
        for i, partner in enumerate(partners.index)
    ]
    return float(np.average(distances, weights=own.areas_px))


def _nearest(own: _Objects, i: int, other: _Objects) -> float:
    """Smallest Hausdorff distance from an object to any object of the other map."""
    # Where one object reaches d further left (right, up, down) than another, its outermost pixel
    # is at least d from the other. So the boxes give a lower bound, and most pairs need no look.
    at_least = np.abs(other.boxes - own.boxes[i]).max(axis=1)
    best = math.inf
    for j in np.argsort(at_least):
        if at_least[j] >= best:
            break
        best = min(best, _hausdorff(own, i, other, int(j)))
    return best


def _hausdorff(own: _Objects, i: int, other: _Objects, j: int) -> float:
    """Hausdorff distance of two objects over all their pixels, by exact distance transforms."""
    top, left = np.minimum(own.boxes[i], other.boxes[j])[:2]
    bottom, right = np.maximum(own.boxes[i], other.boxes[j])[2:]
    around = np.s_[top : bottom + 1, left : right + 1]  # holds both, so every nearest pixel too
    a, b = own.numbers[around] == i + 1, other.numbers[around] == j + 1
    to_a, to_b = ndimage.distance_transform_edt(~a), ndimage.distance_transform_edt(~b)
    return float(max(to_b[a].max(), to_a[b].max()))


def _f1(true_positives: int, false_positives: int, false_negatives: int) -> float:
    """2TP / (2TP + FP + FN), the harmonic mean of precision and recall; 1 without any object."""
    objects = 2 * true_positives + false_positives + false_negatives
    return 2 * true_positives / objects if objects else 1.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan

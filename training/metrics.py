"""Scores of label maps, from confusion counts of their pixels.

A score over several images is either ``"pooled"`` (the pixels of all images are counted together)
or the ``"per_image_mean"`` (a score per image, then their mean). Papers mean one or the other, and
the numbers differ: `Confusion` pools, and `PerImage` keeps the images apart and takes the name of
the reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from histostream.wsi.outputs.label_rows import NOT_ANALYSED

Reduction = Literal["pooled", "per_image_mean"]
Score = TypeVar("Score", float, NDArray[np.float64])


class Confusion:
    """Pixel counts ``counts[truth, predicted]``, pooled over everything that is added.

    The score of a class that does not occur is nan, and a mean over classes leaves it out. With no
    pixels counted every score is nan.

    Parameters
    ----------
    classes
        Number of classes K, 1 to 255.

    Raises
    ------
    ValueError
        If the number of classes is another.
    """

    def __init__(self, classes: int) -> None:
        _check_classes(classes)
        self.counts = np.zeros((classes, classes), np.int64)

    def add(self, predicted: NDArray[np.integer], truth: NDArray[np.integer]) -> None:
        """Count the pixels of two label maps of one shape.

        Pixels whose truth is 255 (not annotated) are left out, whatever was predicted there.
        A prediction of 255 (not analysed) on an annotated pixel is refused: leaving such pixels out
        would favour a model that abstains.

        Raises
        ------
        ValueError
            If the shapes differ, or a label that counts is outside 0..K-1.
        """
        classes = len(self.counts)
        predicted, truth = _annotated(predicted, truth)
        _check_labels("predicted", predicted, classes)
        _check_labels("truth", truth, classes)
        pairs = truth.astype(np.int64) * classes + predicted.astype(np.int64)
        self.counts += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def __iadd__(self, other: Confusion) -> Self:
        """Pool with the counts of another; ValueError if it has another number of classes."""
        if other.counts.shape != self.counts.shape:
            raise ValueError(f"counts of {len(other.counts)} classes, here {len(self.counts)}")
        self.counts += other.counts
        return self

    def accuracy(self) -> float:
        """Share of the pixels that are right: overall pixel accuracy, OPA."""
        return float(_ratio(np.trace(self.counts), self.counts.sum()))

    def class_accuracies(self) -> NDArray[np.float64]:
        """Share of each class's pixels that are right, TP / (TP + FN), (K,).

        nan for a class that is not in the truth, though it may have been predicted.
        """
        return _ratio(np.diag(self.counts), self.counts.sum(axis=1))

    def mean_class_accuracy(self) -> float:
        """Mean of `class_accuracies` over the classes of the truth: SMA."""
        return _mean_of_present(self.class_accuracies())

    def dice(self) -> NDArray[np.float64]:
        """Dice (= F-score, 2TP / (2TP + FP + FN)) of each class against the rest, (K,).

        nan for a class that is neither in the truth nor predicted; 0 where it is in one of them.
        """
        true, predicted = self.counts.sum(axis=1), self.counts.sum(axis=0)
        return _ratio(2 * np.diag(self.counts), true + predicted)

    def mean_dice(self) -> float:
        """Plain mean of `dice` over the classes that have one, whatever their areas."""
        return _mean_of_present(self.dice())

    def jaccard(self) -> NDArray[np.float64]:
        """Jaccard index (= IoU, TP / (TP + FP + FN)) of each class, (K,); nan as in `dice`."""
        true, predicted = self.counts.sum(axis=1), self.counts.sum(axis=0)
        both = np.diag(self.counts)
        return _ratio(both, true + predicted - both)

    def mean_jaccard(self) -> float:
        """Mean of `jaccard` over the classes that have one: mIoU."""
        return _mean_of_present(self.jaccard())


class PerImage:
    """Confusion counts of each image, so that a score can be pooled or averaged over images.

    Parameters
    ----------
    classes
        Number of classes K, 1 to 255.

    Attributes
    ----------
    images
        Counts of each image, in the order of `add`.
    """

    def __init__(self, classes: int) -> None:
        _check_classes(classes)
        self.classes = classes
        self.images: list[Confusion] = []

    def add(self, predicted: NDArray[np.integer], truth: NDArray[np.integer]) -> None:
        """Count one image; as `Confusion.add`."""
        one = Confusion(self.classes)
        one.add(predicted, truth)
        self.images.append(one)

    def pooled(self) -> Confusion:
        """Return the counts of all images together."""
        total = Confusion(self.classes)
        for one in self.images:
            total += one
        return total

    def reduce(self, score: Callable[[Confusion], Score], reduction: Reduction) -> Score:
        """Score all images under the named reduction.

        Parameters
        ----------
        score
            A method of `Confusion`, such as ``Confusion.dice``, or a function of one.
        reduction
            ``"pooled"``: the score of the pooled counts. ``"per_image_mean"``: the mean of the
            images' scores, each image alike; per class where the score is, over the images
            where the class has a score.

        Raises
        ------
        ValueError
            If the reduction is neither.
        """
        if reduction == "pooled":
            return score(self.pooled())
        if reduction != "per_image_mean":
            raise ValueError(f"reduction={reduction!r}: use 'pooled' or 'per_image_mean'")
        # Without an image the empty counts give the nan of the right shape.
        scores = [score(one) for one in self.images or [Confusion(self.classes)]]
        values = np.asarray(scores, np.float64)
        known = ~np.isnan(values)
        mean = _ratio(np.where(known, values, 0).sum(axis=0), known.sum(axis=0))
        return mean if isinstance(scores[0], np.ndarray) else float(mean)


def _check_classes(classes: int) -> None:
    if not 1 <= classes <= NOT_ANALYSED:
        raise ValueError(f"{classes} classes: use 1 to {NOT_ANALYSED}, for {NOT_ANALYSED} is no class")


def _annotated(
    predicted: NDArray[np.integer], truth: NDArray[np.integer]
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Return both maps, flat, without the pixels that are not annotated."""
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted is {predicted.shape}, truth {truth.shape}")
    counted = truth != NOT_ANALYSED
    return predicted[counted], truth[counted]


def _check_labels(name: str, labels: NDArray[np.integer], classes: int) -> None:
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        wrong = labels[(labels < 0) | (labels >= classes)]
        raise ValueError(f"{name} has label {wrong[0]} on {wrong.size} pixels: {classes} classes are 0..{classes - 1}")


def _ratio(part: ArrayLike, total: ArrayLike) -> NDArray[np.float64]:
    """Return part / total, nan where the total is 0."""
    divisor = np.asarray(total, np.float64)
    ratio = np.full(divisor.shape, np.nan)
    np.divide(part, divisor, out=ratio, where=divisor > 0)
    return ratio


def _mean_of_present(values: NDArray[np.float64]) -> float:
    """Mean of the values that are not nan; nan if all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")

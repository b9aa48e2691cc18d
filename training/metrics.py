"""Scores of label maps: confusion counts of pixels and soft Dice, and what follows from them.

A score over several images is either ``"pooled"`` (the pixels of all images are counted together)
or the ``"per_image_mean"`` (a score per image, then their mean). Papers mean one or the other and
the numbers differ, so nothing here chooses: `Confusion` and `SoftDice` pool, and `PerImage` keeps
the images apart and takes the name of the reduction.
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

    The scores of a class that nothing says anything about are nan, and a mean over classes leaves
    them out; each method says when. With no pixels counted every score is nan.

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
        A prediction of 255 (not analysed) on an annotated pixel is refused: a model that may
        abstain would be scored only where it likes.

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


class SoftDice:
    """Dice of probabilities that are not thresholded, pooled over everything that is added.

    Of class k, (2 sum(p_k y_k) + s) / (sum(p_k) + sum(y_k) + s) over the pixels of all images,
    where p is the probability and y is 1 where the truth is k, else 0.

    Parameters
    ----------
    classes
        Number of classes K, 1 to 255.
    smooth
        The term s; 1 in the code of the image-to-image translation paper (veugene/genseg), which
        no test set of more than a few images can tell from 0.

    Raises
    ------
    ValueError
        If the number of classes is another, or ``smooth`` is negative.
    """

    def __init__(self, classes: int, *, smooth: float = 0.0) -> None:
        _check_classes(classes)
        if not smooth >= 0:
            raise ValueError(f"smooth={smooth} is negative")
        self.smooth = smooth
        self._both = np.zeros(classes)
        self._either = np.zeros(classes)

    def add(self, probabilities: NDArray[np.floating], truth: NDArray[np.integer]) -> None:
        """Count a batch; pixels whose truth is 255 are left out.

        Parameters
        ----------
        probabilities
            (N, K, H, W) floating, in [0, 1]. A single sigmoid output p is given as the pair
            (1 - p, p).
        truth
            (N, H, W) labels, 0..K-1 or 255.

        Raises
        ------
        ValueError
            If the shapes do not fit, a label is outside 0..K-1, or the values are no
            probabilities (integers, logits, nan).
        """
        classes = len(self._both)
        shape = (*truth.shape[:1], classes, *truth.shape[1:])
        if truth.ndim != 3 or probabilities.shape != shape:
            raise ValueError(
                f"probabilities are {probabilities.shape}, truth {truth.shape}: give (N, {classes}, H, W) and (N, H, W)"
            )
        if not np.issubdtype(probabilities.dtype, np.floating):
            raise ValueError(f"probabilities are {probabilities.dtype}: give floats in [0, 1]")
        counted = truth != NOT_ANALYSED
        _check_labels("truth", truth[counted], classes)
        for label in range(classes):
            p, own = probabilities[:, label][counted], truth[counted] == label
            if p.size and not (p.min() >= 0 and p.max() <= 1):  # false for nan also
                raise ValueError(
                    f"probabilities of class {label} lie in {p.min()}..{p.max()}, not in [0, 1]: "
                    "apply the softmax or sigmoid first"
                )
            # float64, for a float16 or float32 sum over a test set stops growing
            self._both[label] += p[own].sum(dtype=np.float64)
            self._either[label] += p.sum(dtype=np.float64) + own.sum()

    def __iadd__(self, other: SoftDice) -> Self:
        """Pool with the sums of another of the same classes and ``smooth``, else ValueError."""
        if (len(other._both), other.smooth) != (len(self._both), self.smooth):
            raise ValueError(
                f"soft Dice of {len(other._both)} classes with smooth={other.smooth}, "
                f"here {len(self._both)} with smooth={self.smooth}"
            )
        self._both += other._both
        self._either += other._either
        return self

    def dice(self) -> NDArray[np.float64]:
        """Soft Dice of each class, (K,); nan where both sums and ``smooth`` are 0."""
        return _ratio(2 * self._both + self.smooth, self._either + self.smooth)

    def mean_dice(self) -> float:
        """Plain mean of `dice` over the classes that have one."""
        return _mean_of_present(self.dice())


def _check_classes(classes: int) -> None:
    if not 1 <= classes <= NOT_ANALYSED:
        raise ValueError(f"{classes} classes: use 1 to {NOT_ANALYSED}, for {NOT_ANALYSED} is no class")


def _annotated(
    predicted: NDArray[np.integer], truth: NDArray[np.integer]
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Both maps, flat, without the pixels that nobody annotated."""
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted is {predicted.shape}, truth {truth.shape}")
    counted = truth != NOT_ANALYSED
    return predicted[counted], truth[counted]


def _check_labels(name: str, labels: NDArray[np.integer], classes: int) -> None:
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        wrong = labels[(labels < 0) | (labels >= classes)]
        raise ValueError(f"{name} has label {wrong[0]} on {wrong.size} pixels: {classes} classes are 0..{classes - 1}")


def _ratio(part: ArrayLike, whole: ArrayLike) -> NDArray[np.float64]:
    """Part / whole, nan where the whole is 0."""
    total = np.asarray(whole, np.float64)
    ratio = np.full(total.shape, np.nan)
    np.divide(part, total, out=ratio, where=total > 0)
    return ratio


def _mean_of_present(values: NDArray[np.float64]) -> float:
    """Mean of the values that are not nan; nan if all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")

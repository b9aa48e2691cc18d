"""Scores of label maps: confusion counts pooled over pixels, and what follows from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Confusion:
    """Pixel counts ``counts[truth, predicted]``, pooled over everything that is added.

    Parameters
    ----------
    classes
        Number of classes K.
    """

    def __init__(self, classes: int) -> None:
        self.counts = np.zeros((classes, classes), np.int64)

    def add(self, predicted: NDArray[np.integer], truth: NDArray[np.integer]) -> None:
        """Count the pixels of two label maps of one shape.

        Raises
        ------
        ValueError
            If the shapes differ.
        """
        if predicted.shape != truth.shape:
            raise ValueError(f"predicted is {predicted.shape}, truth {truth.shape}")
        classes = len(self.counts)
        pairs = truth.ravel().astype(np.int64) * classes + predicted.ravel()
        self.counts += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def accuracy(self) -> float:
        """Share of the pixels that are right."""
        return float(np.trace(self.counts) / self.counts.sum())

    def dice(self) -> NDArray[np.float64]:
        """Dice (= F-score, 2TP / (2TP + FP + FN)) of each class, (K,); nan where it is absent."""
        true, predicted = self.counts.sum(axis=1), self.counts.sum(axis=0)
        with np.errstate(invalid="ignore"):
            score: NDArray[np.float64] = 2 * np.diag(self.counts) / (true + predicted)
        return score

"""Judging of the networks by whole images: validation with a sheet of samples, and the final scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from histostream.training import batches, preview
from histostream.training.augment import Augmentation
from histostream.training.batches import Parts
from histostream.training.data import Classes
from histostream.training.methods import hook
from histostream.training.metrics import Confusion, PerImage
from histostream.training.state import State

SHEET_ROWS = 4


@dataclass(frozen=True, slots=True)
class Validated:
    """Scores of the validation images; nan without any.

    Attributes
    ----------
    loss
        Mean over the images.
    dice, jaccard
        Means over the classes; Jaccard is of all but the first (the ground).
    class_dice
        Dice of each class, nan for one that is neither there nor predicted.
    """

    loss: float
    dice: float
    jaccard: float
    class_dice: tuple[float, ...] = ()


class Judge:
    """Judges the networks of a run by whole images.

    Parameters
    ----------
    method, state, parts, augmentation, classes
        Of the run.
    align_px
        Images are mirrored up to multiples of this.
    device
        Where the networks are.
    """

    def __init__(
        self,
        method: ModuleType,
        state: State,
        parts: Parts,
        augmentation: Augmentation,
        classes: Classes,
        *,
        align_px: int,
        device: torch.device,
    ) -> None:
        self._method, self._state, self._parts, self._augmentation = method, state, parts, augmentation
        self._classes, self._align_px, self._device = classes, align_px, device

    def validate(self, sheet: Path | None) -> Validated:
        """Judge the networks by the validation images; write samples of them to ``sheet``."""
        if not self._parts.split.validation:
            return Validated(math.nan, math.nan, math.nan)  # the last checkpoint counts
        losses, confusion = [], Confusion(len(self._classes))
        rows: list[preview.Row] = []
        for images, labels, truth in self._whole_images(self._parts.split.validation):
            loss, batch_labels = self._method.validate(self._state, images, labels)
            losses.append(loss)
            predicted = _cut(batch_labels, truth)
            confusion.add(predicted, truth)
            if sheet is not None and len(rows) < SHEET_ROWS:
                rows.append(self._sheet_row(images, truth, predicted))
        if sheet is not None and rows:
            preview.write(sheet, rows)
        dice, jaccard = confusion.dice(), confusion.jaccard()[1:]
        if not np.isfinite(jaccard).any():
            jaccard = np.zeros(1)
        return Validated(
            float(np.mean(losses)), float(np.nanmean(dice)), float(np.nanmean(jaccard)), tuple(dice.tolist())
        )

    def scores(self) -> dict[str, Any]:
        """Return the scores of the validation and the test images, for the training record."""
        scores = {}
        split = self._parts.split
        for name, indices in (("validation", split.validation), ("test", split.test)):
            counts = PerImage(len(self._classes))
            for images, labels, truth in self._whole_images(indices):
                counts.add(_cut(self._method.validate(self._state, images, labels)[1], truth), truth)
            if indices:
                scores[name] = {
                    "images": len(indices),
                    "pixel_accuracy": counts.reduce(Confusion.accuracy, "pooled"),
                    "f_score": counts.reduce(Confusion.dice, "pooled").tolist(),
                    "dice_per_image": counts.reduce(Confusion.dice, "per_image_mean").tolist(),
                }
        return scores

    def _sheet_row(self, images: Tensor, truth: np.ndarray, predicted: np.ndarray) -> preview.Row:
        colors = [color for _, color in self._classes]

        def first(maps: Tensor) -> np.ndarray:
            return np.moveaxis(_cut(maps, truth), 0, -1)

        own = {
            "image": first(images),
            "true": preview.colored(truth, colors),
            "predicted": preview.colored(predicted, colors),
        }
        painted = hook(self._method, "paint")(self._state, images)
        assert not own.keys() & painted.keys(), "a method paints over the sheet's own columns"
        return {**own, **{name: first(maps) for name, maps in painted.items()}}

    def _whole_images(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        for images, labels, truth in batches.whole_images(self._parts, indices, self._augmentation, self._align_px):
            yield images.to(self._device), labels.to(self._device), truth


def _cut(maps: Tensor, truth: np.ndarray) -> np.ndarray:
    """Return the first map (..., H, W) of a batch, without what was mirrored beyond the labels."""
    height, width = truth.shape
    return maps[0, ..., :height, :width].cpu().numpy()

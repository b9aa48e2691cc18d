"""Weights of the classes in a per-pixel loss, and the shares of the pixels that they may balance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.training.data import Classes, Sample, listed
from histostream.training.steps import evenly_chosen
from histostream.wsi.errors import HistoError

MAX_COUNTED = 2000  # images whose pixels are counted; tiles of slides are read at each access
BALANCED = "balanced"
MOST = 1e6  # largest weight
FORM = "write class_weights=balanced, or class_weights.NAME=WEIGHT for each class that does not have the weight 1"

ClassWeights = str | tuple[tuple[str, float], ...]  # "" for none, `BALANCED`, or (name or number, weight)


class ClassWeightsError(HistoError, ValueError):
    """The weights are of no known form, do not fit the classes, or the method cannot take them."""

    exit_status = 2


@dataclass(frozen=True, slots=True)
class PixelCounts:
    """Pixels of each class, (K,), in ``images`` images; pixels that are not annotated are left out."""

    pixels: NDArray[np.int64]
    images: int

    @property
    def shares(self) -> NDArray[np.float64]:
        """Share of each class, (K,)."""
        return self.pixels / max(1, int(self.pixels.sum()))


def read_class_weights(value: Any) -> ClassWeights:
    """Return the weights that a recipe gives: "balanced", or a table of weights by name or number of a class.

    Raises
    ------
    ClassWeightsError
        If it is neither, or a weight is no number from 0 to `MOST`.
    """
    if value in ("", BALANCED):
        return str(value)
    if not isinstance(value, dict) or not value:
        raise ClassWeightsError(f"class_weights={value!r}: {FORM}")
    for name, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MOST:
            raise ClassWeightsError(f"class_weights.{name}={weight!r}: a weight is a number from 0 to {MOST:.0f}")
    return tuple((name, float(weight)) for name, weight in value.items())


def count_pixels(samples: Sequence[Sample], classes: int) -> PixelCounts:
    """Count the pixels of each class, in up to `MAX_COUNTED` images, evenly chosen."""
    counted = evenly_chosen(samples, MAX_COUNTED)
    pixels = np.zeros(classes, np.int64)
    for sample in counted:
        pixels += np.bincount(sample.labels.ravel(), minlength=classes)[:classes]
    return PixelCounts(pixels, len(counted))


def weights_of(setting: ClassWeights, classes: Classes, counted: PixelCounts) -> tuple[float, ...]:
    """Return the weight of each class; () where the recipe sets none.

    "balanced" gives each class the same part in the loss: its weight is pixels / (K * its pixels), where K
    is the number of the classes that have pixels. A class without pixels has the weight 0.

    Raises
    ------
    ClassWeightsError
        If a name or number is of no class, or all weights are 0.
    """
    if not setting:
        return ()
    if isinstance(setting, str):
        present = counted.pixels > 0
        even = counted.pixels.sum() / (present.sum() * np.maximum(counted.pixels, 1))
        return tuple(float(weight) for weight in np.where(present, even, 0.0))
    names = [name for name, _ in classes]
    weights = [1.0] * len(names)
    for key, weight in setting:
        number = names.index(key) if key in names else int(key) if key.isdigit() else -1
        if not 0 <= number < len(names):
            raise ClassWeightsError(
                f"class_weights: {key!r} is no class of the data; name one of {listed(names)}, "
                f"or its number, 0 to {len(names) - 1}"
            )
        weights[number] = weight
    if not math.fsum(weights):
        raise ClassWeightsError("class_weights: all are 0, so that nothing would be learnt; set one higher")
    return tuple(weights)

"""The smoothness kernel: a separable Gaussian with symmetric normalisation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

CUTOFF = 4.0  # in standard deviations; 6e-5 of the Gaussian's sum lie beyond


class Smoothness:
    """The filter D^-1/2 K D^-1/2 of the smoothness kernel, on an image with zeros outside.

    The row sums D of a separable filter are separable, so each axis is normalised on its own.

    Attributes
    ----------
    taps
        (r + 1,) float32: the Gaussian along an axis at 0, 1, ... r px, 1 at 0.
    scale_y, scale_x
        (H,) and (W,) float32: D^-1/2 is their outer product.
    ones
        (H, W) float32: the filtered image of ones.
    """

    def __init__(self, theta: float, shape: tuple[int, int]) -> None:
        radius = min(math.floor(CUTOFF * theta), max(shape) - 1)
        taps = np.exp(-0.5 * (np.arange(radius + 1) / theta) ** 2)
        scales = [1 / np.sqrt(_along(np.ones(size), taps)) for size in shape]
        ones = [scale * _along(scale, taps) for scale in scales]
        self.taps = taps.astype(np.float32)
        self.scale_y, self.scale_x = (scale.astype(np.float32) for scale in scales)
        self.ones = np.outer(*ones).astype(np.float32)

    def filter(self, planes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Filter planes (K, H, W)."""
        scale = np.outer(self.scale_y, self.scale_x)
        across = _along(planes * scale, self.taps)
        return _along(across.swapaxes(1, 2), self.taps).swapaxes(1, 2) * scale


def _along(values: NDArray[Any], taps: NDArray[Any]) -> NDArray[Any]:
    """Filter along the last axis, with zeros outside."""
    out: NDArray[Any] = taps[0] * values
    for k in range(1, min(len(taps), values.shape[-1])):
        out[..., k:] += taps[k] * values[..., :-k]
        out[..., :-k] += taps[k] * values[..., k:]
    return out

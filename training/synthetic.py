"""Synthetic training sets, deterministic by seed: what a method must be able to learn.

They serve tests; results are reported on real data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histostream.training.data import DataSet, StoredSample

TEXTURE_COLORS = ((230, 75, 53), (77, 187, 213), (0, 160, 135))
REGIONS = 3  # of an image, one of each texture


def textures(count: int, test: int, *, side_px: int = 128, seed: int = 0) -> DataSet:
    """Tissue of three textures: stripes at two angles, and blobs, in regions of random brightness.

    Brightness says nothing of the class, so that a network has to see the texture (methods.md
    1.10.2).

    Parameters
    ----------
    count, test
        Images to train on, and to test on.
    side_px
        Height and width of each.
    seed
        Source of all randomness.
    """
    rng = np.random.default_rng(seed)
    samples = [_textured(f"texture {i}", side_px, rng) for i in range(count + test)]
    classes = tuple(zip(("rising", "falling", "blobs"), TEXTURE_COLORS, strict=True))
    train, held = tuple(samples[:count]), tuple(samples[count:])
    return DataSet("textures", classes, None, train, test=held)


def _textured(name: str, side: int, rng: np.random.Generator) -> StoredSample:
    y, x = np.mgrid[:side, :side].astype(np.float32)
    seeds = rng.uniform(0, side, (REGIONS, 2))
    region = np.argmin([(y - sy) ** 2 + (x - sx) ** 2 for sy, sx in seeds], axis=0)
    kinds = rng.permutation(REGIONS)
    labels = kinds[region].astype(np.uint8)
    phase = rng.uniform(0, 2 * np.pi, 3)
    wave = 2 * np.pi / 6
    maps = np.stack(
        [
            np.sin(wave * (x + y) / np.sqrt(2) + phase[0]),
            np.sin(wave * (x - y) / np.sqrt(2) + phase[1]),
            np.sin(wave * x + phase[2]) * np.sin(wave * y + phase[2]) * 1.4,
        ]
    )
    pattern = np.take_along_axis(maps, labels[None].astype(np.int64), axis=0)[0]
    brightness = rng.uniform(45, 210, REGIONS)[region]
    grey = brightness + 40 * pattern + rng.normal(0, 6, (side, side))
    tint = np.array((1.0, 0.85, 0.95), np.float32)
    image: NDArray[np.uint8] = np.clip(grey[..., None] * tint, 0, 255).astype(np.uint8)
    return StoredSample(name, name, image, labels, None, float("nan"))

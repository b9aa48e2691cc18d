"""A synthetic data set for generators: two tissues, each of its own colour and grain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histostream.training import synthetic
from histostream.training.data import DataSet, StoredSample

REGION_COLORS = ((225.0, 170.0, 200.0), (110.0, 80.0, 150.0))  # RGB of "stroma" and "gland"
REGION_SHARE = (0.35, 0.65)  # of the image that is gland


def colored_regions(count: int, test: int, *, side_px: int = 64, seed: int = 0) -> DataSet:
    """Make two tissues in smooth regions: pale stroma with fine grain, dark gland with coarse grain.

    They are what a generator has to paint from the labels.

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
    samples = [_regions(f"regions {i}", side_px, rng) for i in range(count + test)]
    colors = [(round(r), round(g), round(b)) for r, g, b in REGION_COLORS]
    classes = tuple(zip(("stroma", "gland"), colors, strict=True))
    return DataSet("colored regions", classes, None, tuple(samples[:count]), test=tuple(samples[count:]))


def _regions(name: str, side: int, rng: np.random.Generator) -> StoredSample:
    field = synthetic.grain(side, side / 8, rng)
    labels = (field > np.quantile(field, 1 - rng.uniform(*REGION_SHARE))).astype(np.uint8)
    grain = np.stack([12 * synthetic.grain(side, 0.7, rng), 18 * synthetic.grain(side, 2.0, rng)])
    shade = np.take_along_axis(grain, labels[None].astype(np.int64), axis=0)[0]
    pixels = np.array(REGION_COLORS)[labels] + shade[..., None]
    image: NDArray[np.uint8] = np.clip(pixels, 0, 255).astype(np.uint8)
    return StoredSample(name, name, image, labels)

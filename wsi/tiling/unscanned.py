"""Find the areas of a slide that were not scanned: the scanner filled them with one neutral colour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from histostream.wsi.runs import Runs
from histostream.wsi.tiling.cells import dilated

MIN_FILLING_UM2 = 62_500.0  # 250 um x 250 um: scanners leave out whole fields or strips
NEUTRAL = 2  # most by which the channels of a filling differ, of 255
NEAR_BLACK = 16  # brightness of black, of 255, with what JPEG makes of it
# Black areas of a slide with a dark ground may be constant too. But they turn bright gradually, where an
# unscanned area ends with a step from one pixel to the next.
STEP = 64
EDGE_PX = 2  # pixels of the overview in which a step is mixed
MAX_COLORS = 4


@dataclass(frozen=True, slots=True)
class Filling:
    """An area of one colour.

    Attributes
    ----------
    mask
        (H, W) bool.
    absorption
        255 minus its darkest channel.
    """

    mask: NDArray[np.bool_]
    absorption: int


def find_fillings(overview: NDArray[np.uint8], um2: float, damaged: NDArray[np.bool_]) -> list[Filling]:
    """Find large areas of exactly one neutral colour on an overview.

    Tissue and real glass have noise; a filling has none. Black areas that turn bright gradually are the
    ground of a fluorescence image, and no filling.

    Parameters
    ----------
    overview
        (H, W, C) uint8, the whole slide.
    um2
        Area of its pixels.
    damaged
        (H, W) bool, pixels that belong to no filling.
    """
    least, most = overview.min(axis=2), overview.max(axis=2)
    neutral = ~damaged & (most - least <= NEUTRAL)
    constant = neutral & (_spread(overview) == 0)
    min_px = max(1.0, MIN_FILLING_UM2 / um2)
    fillings = []
    black = _areas(neutral & (most <= NEAR_BLACK), constant, min_px)
    if black.any():
        edge = dilated(black, EDGE_PX + 1) & ~dilated(black, EDGE_PX)
        # Where all is black there is nothing beside it to judge by.
        if edge.any() and np.median(most[edge]) >= STEP:
            fillings.append(Filling(black, 255))
    count = np.bincount(least[constant & (most > NEAR_BLACK)], minlength=256)
    for value in np.argsort(count)[: -MAX_COLORS - 1 : -1].tolist():
        if count[value] >= min_px and value < 255:  # white is what glass is, too
            area = _areas(neutral & (least == value), constant, min_px)
            if area.any():
                fillings.append(Filling(area, 255 - value))
    return fillings


def _areas(color: NDArray[np.bool_], flat: NDArray[np.bool_], min_px: float) -> NDArray[np.bool_]:
    """Return the pieces of a colour that are flat, with their borders, and have at least ``min_px`` pixels."""
    runs = Runs((color & flat).view(np.uint8))
    area = np.bincount(runs.component, weights=runs.end - runs.start, minlength=runs.components)
    return dilated(runs.painted(area >= min_px), 1) & color


def _spread(overview: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return (H, W): the largest difference of a channel among a pixel and its eight neighbours."""
    spread = np.zeros(overview.shape[:2], np.uint8)
    for channel in range(overview.shape[2]):
        image = Image.fromarray(np.ascontiguousarray(overview[..., channel]))
        low, high = (np.asarray(image.filter(f(3))) for f in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
        np.maximum(spread, high - low, out=spread)
    return spread

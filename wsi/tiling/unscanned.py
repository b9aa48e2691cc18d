"""Find the areas of a slide that were not scanned: the scanner filled them with one neutral colour."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

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
CHUNK_PX = 1 << 20  # counted at a time
JPEG_PX = 16  # side of a block of colour: in those at an edge, a constant colour is not constant
RINGING = 24


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


def channel_range(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return (H, W) each: the darkest and the brightest channel of pixels (H, W, C)."""
    channels = np.moveaxis(pixels, 2, 0)  # one after the other: numpy's min over a short axis takes ten times as long
    return reduce(np.minimum, channels), reduce(np.maximum, channels)


def counts(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return how often each value occurs, (256,)."""
    parts = (values[i : i + CHUNK_PX] for i in range(0, len(values), CHUNK_PX))  # bincount makes 8 bytes of each
    return sum((np.bincount(part, minlength=256) for part in parts), np.zeros(256, np.int64))


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
    least, most = channel_range(overview)
    neutral = ~damaged & (most - least <= NEUTRAL)
    constant = neutral & _is_constant(overview)
    min_px = max(1.0, MIN_FILLING_UM2 / um2)
    fillings = []
    black = _areas(overview, constant & (most <= NEAR_BLACK), 0, min_px)
    if black.any():
        edge = dilated(black, EDGE_PX + 1) & ~dilated(black, EDGE_PX)
        # Where all is black there is nothing beside it to judge by.
        if edge.any() and np.median(most[edge]) >= STEP:
            fillings.append(Filling(black, 255))
    count = counts(least[constant & (most > NEAR_BLACK)])
    for value in np.argsort(count)[: -MAX_COLORS - 1 : -1].tolist():
        if count[value] >= min_px and value < 255:  # white is what glass is, too
            area = _areas(overview, constant & (least == value), value, min_px)
            if area.any():
                fillings.append(Filling(area, 255 - value))
    return fillings


def _areas(overview: NDArray[np.uint8], flat: NDArray[np.bool_], value: int, min_px: float) -> NDArray[np.bool_]:
    """Return the flat pieces of at least ``min_px`` pixels, with what JPEG made of their borders."""
    runs = Runs(flat.view(np.uint8))
    area = np.bincount(runs.component, weights=runs.end - runs.start, minlength=runs.components)
    large = runs.painted(area >= min_px)
    if not large.any():
        return large
    least, most = channel_range(overview)
    similar = (least >= max(value - RINGING, 0)) & (most <= min(value + RINGING, 255))
    for _ in range(JPEG_PX):  # outwards from the piece, so that nothing behind its edge is taken
        wider = dilated(large, 1) & similar
        if (wider == large).all():
            break
        large = wider
    return large


def _is_constant(overview: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return (H, W) bool: the pixels that are equal to their eight neighbours."""
    differs = np.zeros(overview.shape[:2], np.bool_)
    for channel in np.moveaxis(overview, 2, 0):
        across, down = channel[:, 1:] != channel[:, :-1], channel[1:] != channel[:-1]
        differs[:, 1:] |= across
        differs[:, :-1] |= across
        differs[1:] |= down
        differs[:-1] |= down
    return ~dilated(differs, 1)

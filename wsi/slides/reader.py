"""A slide as a few levels of pixels, whatever its format."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.optional import install_command

Pixels = NDArray[np.uint8]
AUTO_ORDER = ("tiff", "large_image")  # fastest first; the last one opens everything
SQUARE_TOLERANCE = 0.10  # relative difference of x and y that still counts as a square pixel


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution that is stored in the file.

    Attributes
    ----------
    width, height
        Size in pixels of this level.
    downsample
        Pixels of level 0 per pixel of this level, along one side; 1.0 for level 0.
    """

    width: int
    height: int
    downsample: float


class SlideReader(Protocol):
    """An open slide. Reads may run in several threads at once.

    Attributes
    ----------
    path
        The file, or the folder of a DICOM series.
    name
        Which reader this is: the name of its file in ``wsi/readers``.
    levels
        The levels that the file stores, finest first; none is made up by resampling.
    block_px
        Per level, (width, height) of the unit that is decoded as a whole. Reads that start and
        end at multiples of it decode nothing twice.
    mpp
        Micrometres per pixel of level 0, the mean of x and y; None if the file does not say.
    channels
        3 (RGB) or 1 (grey).
    decoded_blocks
        How many blocks have been decoded since the slide was opened.
    """

    path: Path
    name: str
    levels: tuple[Level, ...]
    block_px: tuple[tuple[int, int], ...]
    mpp: float | None
    channels: int
    decoded_blocks: int

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a box of one level.

        Parameters
        ----------
        level
            Index into ``levels``.
        x, y, width, height
            The box, in pixels of that level; it must lie inside the level.

        Returns
        -------
        (height, width, channels) uint8, contiguous.

        Raises
        ------
        SlideError
            If a block cannot be decoded.
        ValueError
            If the box does not lie inside the level.
        """
        ...

    def close(self) -> None:
        """Close the file; reads are no longer possible."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class DeclinedError(Exception):
    """A reader does not take this file, for the reason given; another one may."""


def open_slide(path: str | Path, *, reader: str = "auto") -> SlideReader:
    """Open a slide: SVS, NDPI, DICOM, OME-TIFF, TIFF, PNG, JPEG and whatever OpenSlide reads.

    Parameters
    ----------
    path
        A file; for DICOM one of the ``.dcm`` files or the folder that holds them.
    reader
        ``auto`` takes the fast reader if it fits the file; a name (``tiff``, ``large_image``)
        takes that one.

    Raises
    ------
    SlideError
        If there is no such file, or it is empty, cut off, damaged or of an unknown format.

    Examples
    --------
    >>> with open_slide("slide.svs") as slide:
    ...     print(slide.levels[0].width, slide.levels[0].height, slide.mpp)
    ...     print(slide.read(0, x=100, y=50, width=4, height=2).shape)
    700 600 0.5
    (2, 4, 3)
    """
    path = Path(path)
    _refuse_missing(path)
    if reader != "auto":
        try:
            return _open_with(reader, path)
        except DeclinedError as declined:
            raise SlideError(
                f"{path}: the {reader} reader does not take this file ({declined}); leave the choice to reader='auto'"
            ) from None
    reasons = []
    for name in AUTO_ORDER:
        try:
            return _open_with(name, path)
        except DeclinedError as declined:
            reasons.append(f"{name}: {declined}")
    more = ""
    if importlib.util.find_spec("large_image_source_tifffile") is None:
        more = f", or add a reader of further TIFFs: {install_command('formats')}"
    raise SlideError(
        f"{path}: no reader opens this file ({'; '.join(reasons)}); "
        f"check that it is a whole slide file of a known format{more}"
    )


def read_from_blocks(box: Box, block_px: tuple[int, int], channels: int, block: Callable[[int, int], Pixels]) -> Pixels:
    """Put a box of a level together from the blocks that it lies on, each asked for once.

    Parameters
    ----------
    box
        In pixels of the level.
    block_px
        (width, height) of a block; those at the right and bottom border may be smaller.
    channels
        Channels of the result.
    block
        Gives the block at (row, column), (H, W, channels).

    Returns
    -------
    (height, width, channels) uint8, contiguous.
    """
    block_w, block_h = block_px
    out = np.empty((box.height, box.width, channels), np.uint8)
    for row in range(box.y // block_h, (box.bottom - 1) // block_h + 1):
        for column in range(box.x // block_w, (box.right - 1) // block_w + 1):
            pixels = block(row, column)
            left, top = column * block_w, row * block_h
            x0, x1 = max(box.x, left), min(box.right, left + pixels.shape[1])
            y0, y1 = max(box.y, top), min(box.bottom, top + pixels.shape[0])
            out[y0 - box.y : y1 - box.y, x0 - box.x : x1 - box.x] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
    return out


def downsample_between(base: tuple[int, int], level: tuple[int, int]) -> float:
    """Pixels of ``base`` per pixel of ``level``; sizes are (width, height).

    Scanners cut off what does not fill a pixel of the coarser level, so 10249 rows become 2562
    and the ratio of the sizes is 4.0004 where 4 was meant: whole numbers that fit are taken.
    """
    ratios = [whole / part for whole, part in zip(base, level, strict=True)]
    mean = sum(ratios) / 2
    nearest = round(mean)
    sizes = zip(base, level, strict=True)
    if all(abs(whole / nearest - part) < 1 for whole, part in sizes):
        return float(nearest)
    return mean


def square_mpp(path: Path, mpp_x: float | None, mpp_y: float | None) -> float | None:
    """Return the mean of both sides of a pixel in micrometres, None if one is not known.

    Raises
    ------
    SlideError
        If the pixels are not square.
    """
    if not mpp_x or not mpp_y or not (0 < mpp_x < math.inf and 0 < mpp_y < math.inf):
        return None
    if abs(mpp_x - mpp_y) > SQUARE_TOLERANCE * max(mpp_x, mpp_y):
        raise SlideError(
            f"{path}: its pixels are {mpp_x:.4g} x {mpp_y:.4g} um, not square; "
            "resample the slide to square pixels first"
        )
    return (mpp_x + mpp_y) / 2


def check_box(level: Level, x: int, y: int, width: int, height: int) -> None:
    """Raise ValueError unless the box lies inside the level and has pixels."""
    inside = 0 <= x < x + width <= level.width and 0 <= y < y + height <= level.height
    if not inside:
        raise ValueError(
            f"box x={x} y={y} {width}x{height} does not lie inside a level of {level.width}x{level.height} px"
        )


def check_block(pixels: Pixels, level: Level, block_px: tuple[int, int], channels: int, row: int, column: int) -> None:
    """Raise ValueError unless a decoded block covers its part of the level, in (H, W, channels)."""
    width = min(block_px[0], level.width - column * block_px[0])
    height = min(block_px[1], level.height - row * block_px[1])
    found = pixels.shape
    if len(found) != 3 or found[0] < height or found[1] < width or found[2] != channels:
        raise ValueError(f"it is {found} {pixels.dtype}, not {(height, width, channels)}")
    if pixels.dtype != np.uint8:
        raise ValueError(f"its pixels are {pixels.dtype}")


def _refuse_missing(path: Path) -> None:
    if not path.exists():
        raise SlideError(f"{path}: there is no such file; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise SlideError(f"{path}: the file is empty; copy it again")


def _open_with(name: str, path: Path) -> SlideReader:
    module = f"histostream.wsi.slides.readers.{name}"
    try:
        opener = importlib.import_module(module).open_reader
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise SlideError(f"there is no slide reader {name!r}; use 'auto' or one of {', '.join(AUTO_ORDER)}") from None
    slide: SlideReader = opener(path)
    return slide

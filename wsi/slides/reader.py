"""Open a slide of any format: its levels and their pixels."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol, Self, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from histostream.wsi.errors import DamagedError, SlideError, no_longer_readable, reason, unreadable
from histostream.wsi.geometry import Box
from histostream.wsi.optional import install_command
from histostream.wsi.registry import Registry
from histostream.wsi.slides.pixel_size import PixelSize

Pixels = NDArray[np.uint8]
log = logging.getLogger(__name__)
WHITE = 255  # of blocks that a file does not hold
# What a system reports of a drive or of permissions; libraries use other numbers for contents that they do not know.
UNREADABLE = {errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT}
# A reader is a module of this folder, or of an entry point. It declares ORDER (of the readers that
# reader="auto" tries, the lowest first), SUFFIXES (of its files, by which folders are searched) and
# open_reader(path), which returns a SlideReader or raises DeclinedError or SlideError.
READERS = Registry("histostream.wsi.slides.readers", "histostream.readers", "slide reader", SlideError)


@dataclass(frozen=True, slots=True)
class Level:
    """One of the resolutions that a slide file stores.

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
        Name of the reader, which is that of its module.
    levels
        The levels that the file stores, finest first.
    block_px
        Per level, (width, height) of the blocks that are decoded as a whole. Reads that start and
        end at multiples of it decode no block twice.
    mpp
        Micrometres per pixel of level 0, the mean of x and y; None if the file does not store it.
    mpp_source
        Where the file says it, as "OME-XML"; empty if it does not.
    channels
        3 (RGB), 1 (grey), or the number that a model takes.
    decoded_blocks
        Number of blocks decoded since the slide was opened.
    bounds
        The box that was scanned, in pixels of OpenSlide's level 0, where OpenSlide shows more than that; level 0 of
        the reader is this box. None where both show the same.
    notes
        What a user should know of the file, as that it holds further images; each without the path.
    missing
        Per level, (rows, columns) bool: the blocks that the file does not hold because nothing was scanned there. They
        are read as white and are not damage. None where the file holds all blocks of the level.
    """

    path: Path
    name: str
    levels: tuple[Level, ...]
    block_px: tuple[tuple[int, int], ...]
    mpp: float | None
    mpp_source: str
    channels: int
    decoded_blocks: int
    bounds: Box | None
    notes: tuple[str, ...]
    missing: tuple[NDArray[np.bool_] | None, ...]

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
    """A reader does not take this file; the message is the reason. Another reader may take it."""


def open_slide(path: str | Path, *, reader: str = "auto") -> SlideReader:
    """Open a slide: SVS, NDPI, DICOM, OME-TIFF, TIFF, PNG, JPEG and whatever OpenSlide reads.

    Parameters
    ----------
    path
        A file; for DICOM one of the ``.dcm`` files or the folder that holds them.
    reader
        ``auto`` takes the first reader that fits the file; a name (``tiff``, ``large_image``)
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
    _check_file(path)
    slide = _opened(path, reader)
    for note in getattr(slide, "notes", ()):  # a reader of another package may not have any
        log.warning("%s: %s", path, note)
    return slide


def _opened(path: Path, reader: str) -> SlideReader:
    if reader != "auto":
        try:
            return cast(SlideReader, READERS.load(reader).open_reader(path))
        except DeclinedError as declined:
            raise SlideError(
                f"{path}: the {reader} reader does not take this file ({declined}); leave the choice to reader='auto'"
            ) from None
    reasons = []
    for name, module in sorted(READERS.load_all().items(), key=lambda item: int(item[1].ORDER)):
        try:
            return cast(SlideReader, module.open_reader(path))
        except DeclinedError as declined:
            if isinstance(declined.__cause__, OSError) and declined.__cause__.errno in UNREADABLE:
                raise unreadable(path, declined.__cause__) from declined
            reasons.append(f"{name}: {declined}")
    more = ""
    if importlib.util.find_spec("large_image_source_tifffile") is None:
        more = f", or add a reader of further TIFFs: {install_command('formats')}"
    raise SlideError(
        f"{path}: no reader opens this file ({'; '.join(reasons)}); "
        f"check that it is a whole slide file of a known format{more}"
    )


def _check_file(path: Path) -> None:
    """Raise SlideError unless a path is a folder, or a file with content that the system gives out."""
    try:
        info = path.stat()
        if stat.S_ISREG(info.st_mode) and info.st_size:
            with path.open("rb", buffering=0) as file:
                file.read(1)
    except (FileNotFoundError, NotADirectoryError):
        raise SlideError(f"{path}: there is no such file; check the path") from None
    except OSError as error:
        raise unreadable(path, error) from error
    if not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
        raise SlideError(f"{path}: a pipe or device, not a file; name a slide file")
    if stat.S_ISREG(info.st_mode) and not info.st_size:
        raise SlideError(f"{path}: the file is empty; copy it again")


@cache
def slide_suffixes() -> frozenset[str]:
    """Return the suffixes of slide files, in lower case, of all readers."""
    return frozenset(suffix for module in READERS.load_all().values() for suffix in module.SUFFIXES)


def read_from_blocks(
    box: Box,
    block_px: tuple[int, int],
    channels: int,
    block: Callable[[int, int], Pixels],
    out: Pixels | None = None,
    dtype: DTypeLike = np.uint8,
) -> Pixels:
    """Assemble a box of a level from the blocks that it lies on; each is requested once.

    Parameters
    ----------
    box
        In pixels of the level.
    block_px
        (width, height) of a block; those at the right and bottom border may be smaller.
    channels
        Channels of the result.
    block
        Returns the block at (row, column), (H, W, channels) uint8.
    out
        Array for the result; None makes a contiguous one.
    dtype
        Type of that array.

    Returns
    -------
    (height, width, channels) uint8, or of another ``dtype``.
    """
    block_w, block_h = block_px
    out = np.empty((box.height, box.width, channels), dtype) if out is None else out
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

    Scanners drop the rows that do not fill a pixel of the coarser level: 10249 rows become 2562,
    whose ratio is 4.0004 where 4 was meant. A whole number that explains both sizes is taken.
    """
    mean = (base[0] / level[0] + base[1] / level[1]) / 2
    nearest = round(mean)
    if all(abs(fine / nearest - coarse) < 1 for fine, coarse in zip(base, level, strict=True)):
        return float(nearest)
    return mean


def mpp_source(slide: SlideReader) -> str:
    """Return where the resolution of a slide comes from; readers of other packages may not say it."""
    return getattr(slide, "mpp_source", "")


def check_box(level: Level, x: int, y: int, width: int, height: int) -> None:
    """Raise ValueError unless the box lies inside the level and has pixels."""
    if not (0 <= x < x + width <= level.width and 0 <= y < y + height <= level.height):
        raise ValueError(
            f"box x={x} y={y} {width}x{height} does not lie inside a level of {level.width}x{level.height} px"
        )


class PositionedFile:
    """An open file that several threads read from at once."""

    def __init__(self, path: Path) -> None:
        self._path, self._handle, self._lock = path, path.open("rb", buffering=0), threading.Lock()

    def read(self, offset: int, count: int) -> bytes:
        """Read some bytes.

        Raises
        ------
        SlideError
            If the file can no longer be read.
        """
        try:
            if hasattr(os, "pread"):
                return os.pread(self._handle.fileno(), count, offset)
            with self._lock:  # Windows has no positioned read
                self._handle.seek(offset)
                return self._handle.read(count)
        except OSError as error:
            raise no_longer_readable(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


class BlockReader:
    """Base of readers that decode one block at a time; a subclass adds ``name``, ``_decode`` and ``close``.

    See `SlideReader` for the parameters.
    """

    dtype: DTypeLike = np.uint8  # of the pixels; files of scores have 16 bits

    def __init__(
        self,
        path: Path,
        levels: tuple[Level, ...],
        block_px: tuple[tuple[int, int], ...],
        pixel_size: PixelSize | None,
        channels: int,
    ) -> None:
        self.path, self.levels, self.block_px, self.channels = path, levels, block_px, channels
        self.mpp = pixel_size.um if pixel_size else None
        self.mpp_source = pixel_size.source if pixel_size else ""
        self.bounds: Box | None = None
        self.notes: tuple[str, ...] = ()
        self.missing: tuple[NDArray[np.bool_] | None, ...] = (None,) * len(levels)
        self.decoded_blocks = 0
        self._lock = threading.Lock()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a box of one level, (height, width, channels); see `SlideReader.read`."""
        check_box(self.levels[level], x, y, width, height)
        box = Box(x, y, width, height)
        return read_from_blocks(box, self.block_px[level], self.channels, partial(self._block, level), dtype=self.dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        raise NotImplementedError

    def _decode(self, level: int, row: int, column: int) -> Pixels:
        """Return a block (H, W, channels); raise SlideError if the file cannot be read, or any error of a codec."""
        raise NotImplementedError

    def _block(self, level: int, row: int, column: int) -> Pixels:
        try:
            pixels = self._decode(level, row, column)
        except (SlideError, MemoryError):  # not a fault of the block
            raise
        except Exception as error:  # the codecs' errors have no common base class
            raise DamagedError(
                f"{self.path}: block {column}, {row} of level {level} cannot be decoded "
                f"({reason(error)}); the file is damaged there: copy or scan it again"
            ) from error
        with self._lock:
            self.decoded_blocks += 1
        return pixels

    def _check(self, pixels: Pixels, level: int, row: int, column: int) -> Pixels:
        """Return a decoded block if it covers its part of the level, else raise ValueError."""
        (block_w, block_h), size = self.block_px[level], self.levels[level]
        width, height = min(block_w, size.width - column * block_w), min(block_h, size.height - row * block_h)
        shape = pixels.shape
        if len(shape) != 3 or shape[0] < height or shape[1] < width or shape[2] != self.channels:
            raise ValueError(f"it is {shape} {pixels.dtype}, not {(height, width, self.channels)}")
        if pixels.dtype != self.dtype:
            raise ValueError(f"its pixels are {pixels.dtype}")
        return pixels

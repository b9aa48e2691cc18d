"""Tiles of a slide as JPEG."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from histostream.runtime.result import ResultError
from histostream.wsi.geometry import Box
from histostream.wsi.slides.reader import open_slide, read_from_blocks
from histostream.wsi.slides.resolution import SlideView

TILE_PX = 510
# Without an overlap OpenSeadragon stretches each tile by a pixel of the screen to hide the seams.
OVERLAP_PX = 1
CACHED_BYTES = 32 << 20  # of decoded blocks that are kept of each slide: neighbouring tiles share some
PART_BYTES = 32 << 20  # of the slide that are reduced at once, where it stores no level that is coarse enough
JPEG_QUALITY = 90


class SlideTiles:
    """A slide as a pyramid of tiles, of which neighbours overlap by two pixels.

    Level 0 is the coarsest, as in OpenSeadragon; each level has twice the side of the one before,
    rounded up. Pixels are those that the model sees, without the ICC profile.

    Parameters
    ----------
    path
        The slide.

    Raises
    ------
    SlideError
        If it cannot be opened.

    Attributes
    ----------
    width, height
        Size of the slide's finest level, in pixels.
    levels
        Number of levels.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._slide = open_slide(path)
        weakref.finalize(self, self._slide.close)  # not before: a thread may still read from it
        self.width, self.height = self._slide.levels[0].width, self._slide.levels[0].height
        self.levels = 1 + max(0, math.ceil(math.log2(max(self.width, self.height) / TILE_PX)))
        self._blocks: OrderedDict[tuple[int, int, int], NDArray[np.uint8]] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def jpeg(self, level: int, column: int, row: int) -> bytes:
        """Return a tile with its overlap as JPEG.

        Raises
        ------
        ResultError
            If there is no such tile.
        SlideError
            If it cannot be decoded.
        """
        if 0 <= level < self.levels:
            down = 1 << (self.levels - 1 - level)
            width, height = -(-self.width // down), -(-self.height // down)
            if 0 <= column * TILE_PX < width and 0 <= row * TILE_PX < height:
                x, y = (max(0, i * TILE_PX - OVERLAP_PX) for i in (column, row))
                right = min(width, (column + 1) * TILE_PX + OVERLAP_PX)
                bottom = min(height, (row + 1) * TILE_PX + OVERLAP_PX)
                pixels = self._read(down, x, y, right, bottom)
                pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
                return bytes(imagecodecs.jpeg8_encode(pixels, level=JPEG_QUALITY, subsampling="444"))
        raise ResultError(f"there is no tile {column}, {row} of level {level}; load the page again")

    def _read(self, down: int, x: int, y: int, right: int, bottom: int) -> NDArray[np.uint8]:
        """Return a box of the slide reduced ``down`` times, (H, W, C)."""
        fine = [i for i, level in enumerate(self._slide.levels) if level.downsample <= down]
        stored = max(fine, key=lambda i: self._slide.levels[i].downsample)
        view = SlideView(self._slide, stored, down / self._slide.levels[stored].downsample, None)
        # Where the size was rounded up, only a part of the last pixel is on the slide: it is replaced.
        width, height = min(right, view.width) - x, min(bottom, view.height) - y
        row_bytes = width * view.scale**2 * view.channels
        step = max(1, min(height, int(PART_BYTES / row_bytes)))
        parts = [self._part(view, x, top, width, min(step, y + height - top)) for top in range(y, y + height, step)]
        return np.pad(np.concatenate(parts), ((0, bottom - y - height), (0, right - x - width), (0, 0)), "edge")

    def _part(self, view: SlideView, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        left, end = view.source_columns(x, x + width)
        top, bottom = view.source_rows(y, y + height)
        source = read_from_blocks(
            Box(left, top, end - left, bottom - top),
            self._slide.block_px[view.level],
            self._slide.channels,
            partial(self._block, view.level),
        )
        return view.resample(source, x, y, width, height)

    def _block(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """Return a block of a stored level, from the cache if it is there."""
        key = level, row, column
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        width, height = self._slide.block_px[level]
        size = self._slide.levels[level]
        x, y = column * width, row * height
        block = self._slide.read(level, x, y, min(width, size.width - x), min(height, size.height - y))
        with self._lock:
            if key not in self._blocks:
                self._blocks[key] = block
                self._cached_bytes += block.nbytes
            while self._cached_bytes > CACHED_BYTES and len(self._blocks) > 1:
                self._cached_bytes -= self._blocks.popitem(last=False)[1].nbytes
        return block

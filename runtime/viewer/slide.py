"""Tiles of a slide, from large-image, as JPEG."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from histostream.runtime.result import ResultError
from histostream.wsi.errors import SlideError, reason
from histostream.wsi.geometry import Box
from histostream.wsi.slides.reader import open_slide, read_from_blocks
from histostream.wsi.slides.readers.large_image import open_source, without_alpha

TILE_PX = 510
# Without it OpenSeadragon stretches each tile by a pixel of the screen, so that no seams are seen.
OVERLAP_PX = 1
CACHED_BLOCKS = 128  # decoded blocks that large-image keeps of each slide
JPEG_QUALITY = 90


class SlideTiles:
    """A slide as a pyramid of tiles, of which neighbours overlap by two pixels.

    Level 0 is the coarsest, as OpenSeadragon and large-image count; each has twice the side of the
    one before, rounded up.

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
        Of the slide's full size, in pixels.
    levels
        Number of levels.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_slide(path) as slide:  # refuses what is damaged or made to do harm
            first, self._channels = slide.levels[0], slide.channels
        self.width, self.height = first.width, first.height
        try:
            source = open_source(path, CACHED_BLOCKS)
            self._block_px = int(source.tileWidth), int(source.tileHeight)
            self.levels, size = int(source.levels), (int(source.sizeX), int(source.sizeY))
        except Exception as error:  # its sources have no common base for what may go wrong
            raise SlideError(f"{path}: large-image cannot open it ({reason(error)}); try it there") from error
        if size != (self.width, self.height):
            raise SlideError(f"{path}: large-image sees {size} px, not {self.width, self.height}; report it")
        self._source = source

    def tile(self, level: int, column: int, row: int) -> NDArray[np.uint8]:
        """Return a tile's pixels, (H, W, C) uint8, with those that it shares with its neighbours.

        Raises
        ------
        ResultError
            If there is no such tile.
        SlideError
            If it cannot be decoded.
        """
        if 0 <= level < self.levels:
            down = self.levels - 1 - level
            width, height = -(-self.width >> down), -(-self.height >> down)
            if 0 <= column * TILE_PX < width and 0 <= row * TILE_PX < height:
                x, y = (max(0, i * TILE_PX - OVERLAP_PX) for i in (column, row))
                right = min(width, (column + 1) * TILE_PX + OVERLAP_PX)
                bottom = min(height, (row + 1) * TILE_PX + OVERLAP_PX)
                return self._read(level, x, y, right, bottom)
        raise ResultError(f"there is no tile {column}, {row} of level {level}; load the page again")

    def jpeg(self, level: int, column: int, row: int) -> bytes:
        """Return a tile as a JPEG; see `tile`."""
        pixels = self.tile(level, column, row)
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        return bytes(imagecodecs.jpeg8_encode(pixels, level=JPEG_QUALITY, subsampling="444"))

    def _read(self, level: int, x: int, y: int, right: int, bottom: int) -> NDArray[np.uint8]:
        down = self.levels - 1 - level
        # Where a side is rounded up, its last pixel is partly made up, or black.
        width = min(right, max(1, self.width >> down)) - x
        height = min(bottom, max(1, self.height >> down)) - y
        pixels = read_from_blocks(
            Box(x, y, width, height),
            self._block_px,
            self._channels,
            lambda row, column: self._block(level, column, row),
        )
        return np.pad(pixels, ((0, bottom - y - height), (0, right - x - width), (0, 0)), "edge")

    def _block(self, level: int, column: int, row: int) -> NDArray[np.uint8]:
        try:
            # Raw pixels, as the model saw them: without the ICC profile that styles apply.
            found = self._source.getTile(
                column, row, level, numpyAllowed="always", applyStyle=False, sparseFallback=True
            )
            return without_alpha(np.asarray(found))
        except Exception as error:  # its sources have no common base for what may go wrong
            raise SlideError(
                f"{self.path}: block {column}, {row} of level {level} cannot be decoded "
                f"({reason(error)}); the file is damaged there: copy it again"
            ) from error

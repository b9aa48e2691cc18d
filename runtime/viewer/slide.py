"""Tiles of a slide, from large-image, as JPEG."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from histostream.runtime.viewer.results import ResultError
from histostream.wsi.errors import SlideError, reason
from histostream.wsi.reader import open_slide
from histostream.wsi.readers.large_image import open_source, without_alpha

CACHED_TILES = 64  # decoded tiles that large-image keeps of each slide; levels in between need them
JPEG_QUALITY = 90


class SlideTiles:
    """The pyramid of a slide, as large-image cuts it: level 0 is the coarsest, one tile.

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
    tile_width, tile_height
        Of a tile, in pixels.
    levels
        Number of levels; each has twice the side of the one before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_slide(path) as slide:  # refuses what is damaged or made to do harm
            first = slide.levels[0]
            self.width, self.height = first.width, first.height
        try:
            source = open_source(path, CACHED_TILES)
            self.tile_width, self.tile_height = int(source.tileWidth), int(source.tileHeight)
            self.levels, size = int(source.levels), (int(source.sizeX), int(source.sizeY))
        except Exception as error:  # its sources have no common base for what may go wrong
            raise SlideError(f"{path}: large-image cannot open it ({reason(error)})") from error
        if size != (self.width, self.height):
            raise SlideError(f"{path}: large-image sees {size} px, not {self.width, self.height}")
        self._source = source

    def tile(self, level: int, column: int, row: int) -> NDArray[np.uint8]:
        """Return a tile's pixels, (H, W, C) uint8; those at the right and bottom are cut off.

        Raises
        ------
        ResultError
            If there is no such tile.
        SlideError
            If it cannot be decoded.
        """
        down = self.levels - 1 - level
        if 0 <= level < self.levels:
            width, height = -(-self.width >> down), -(-self.height >> down)
            x, y = column * self.tile_width, row * self.tile_height
            if 0 <= x < width and 0 <= y < height:
                pixels = self._decoded(level, column, row)
                return pixels[: height - y, : width - x]
        raise ResultError(f"there is no tile {column}, {row} of level {level}")

    def jpeg(self, level: int, column: int, row: int) -> bytes:
        """Return a tile as a JPEG; see `tile`."""
        pixels = self.tile(level, column, row)
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        data = imagecodecs.jpeg8_encode(np.ascontiguousarray(pixels), level=JPEG_QUALITY)
        return bytes(data)

    def _decoded(self, level: int, column: int, row: int) -> NDArray[np.uint8]:
        try:
            # Raw pixels, as the model saw them: without the ICC profile that styles apply.
            found = self._source.getTile(
                column, row, level, numpyAllowed="always", applyStyle=False, sparseFallback=True
            )
            return without_alpha(np.asarray(found))
        except Exception as error:  # its sources have no common base for what may go wrong
            raise SlideError(
                f"{self.path}: tile {column}, {row} of level {level} cannot be decoded "
                f"({reason(error)})"
            ) from error

"""Tiles of a slide, read by large-image, as JPEG."""

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
# Without an overlap OpenSeadragon stretches each tile by a pixel of the screen to hide the seams.
OVERLAP_PX = 1
CACHED_BLOCKS = 128  # decoded blocks that large-image keeps of each slide
JPEG_QUALITY = 90


class SlideTiles:
    """A slide as a pyramid of tiles, of which neighbours overlap by two pixels.

    Level 0 is the coarsest, as in OpenSeadragon and large-image; each level has twice the side of the
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
        Size of the slide's finest level, in pixels.
    levels
        Number of levels.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_slide(path) as slide:  # refuses damaged and malicious files
            finest, self._channels = slide.levels[0], slide.channels
        self.width, self.height = finest.width, finest.height
        try:
            source = open_source(path, CACHED_BLOCKS)
            self._block_px = int(source.tileWidth), int(source.tileHeight)
            self.levels, size = int(source.levels), (int(source.sizeX), int(source.sizeY))
        except Exception as error:  # the sources of large-image have no common base class of errors
            raise SlideError(
                f"{path}: large-image cannot open it ({reason(error)}); open it with large-image directly to check"
            ) from error
        if size != (self.width, self.height):
            raise SlideError(
                f"{path}: large-image reads a size of {size} px instead of {self.width, self.height}; report this"
            )
        self._source = source

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
            down = self.levels - 1 - level
            width, height = -(-self.width >> down), -(-self.height >> down)
            if 0 <= column * TILE_PX < width and 0 <= row * TILE_PX < height:
                x, y = (max(0, i * TILE_PX - OVERLAP_PX) for i in (column, row))
                right = min(width, (column + 1) * TILE_PX + OVERLAP_PX)
                bottom = min(height, (row + 1) * TILE_PX + OVERLAP_PX)
                pixels = self._read(level, x, y, right, bottom)
                pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
                return bytes(imagecodecs.jpeg8_encode(pixels, level=JPEG_QUALITY, subsampling="444"))
        raise ResultError(f"there is no tile {column}, {row} of level {level}; load the page again")

    def _read(self, level: int, x: int, y: int, right: int, bottom: int) -> NDArray[np.uint8]:
        down = self.levels - 1 - level
        # Where the size was rounded up, only a part of the last pixel is on the slide: it is replaced.
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
            # Raw pixels, as the model reads them: without the ICC profile that styles apply.
            block = self._source.getTile(
                column, row, level, numpyAllowed="always", applyStyle=False, sparseFallback=True
            )
            return without_alpha(np.asarray(block))
        except Exception as error:  # the sources of large-image have no common base class of errors
            raise SlideError(
                f"{self.path}: block {column}, {row} of level {level} cannot be decoded "
                f"({reason(error)}); the file is damaged there: copy it again"
            ) from error

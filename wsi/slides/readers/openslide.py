"""Reader for files in scanners' own layouts, through OpenSlide."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import SlideError, no_longer_readable, reason
from histostream.wsi.geometry import Box
from histostream.wsi.slides.bands import Bands
from histostream.wsi.slides.pixel_size import PixelSize, openslide_pixel_size, tiff_pixel_size
from histostream.wsi.slides.reader import BlockReader, DeclinedError, Level, downsample_between
from histostream.wsi.slides.tiff_check import check_tiff, is_tiff
from histostream.wsi.slides.vendor import scanner_format

ORDER = 20  # after the fast reader of TIFF, which declines such files
SUFFIXES = (".ndpi", ".scn", ".mrxs", ".bif", ".svslide", ".vms", ".vmu", ".czi")

BLOCK_PX = 256  # where the file has no tiles, or tiles that are long and thin
MAX_ASPECT = 4
RGBA = Bands(3, 4, alpha=3)  # as OpenSlide returns pixels; what was not scanned is transparent


class OpenSlideReader(BlockReader):
    """A slide that OpenSlide reads; see `SlideReader`.

    Where the file says which part of its area was scanned, that part is the slide, as in QuPath: `bounds` is its box in
    OpenSlide's level 0. Pixels are always read in the same blocks: if a level's downsample is not a whole number,
    OpenSlide shifts a region by a fraction of a pixel that depends on where the region begins.
    """

    name = "openslide"

    def __init__(self, path: Path, slide: Any) -> None:
        properties = slide.properties
        bounds = _bounds(properties, slide.dimensions)
        area = bounds or Box(0, 0, *slide.dimensions)
        self._origin = area.x, area.y
        self._downsamples = tuple(slide.level_downsamples)
        levels = []
        for size in slide.level_dimensions:
            downsample = downsample_between(slide.dimensions, size)
            # Rounded down: some formats round up, but then the last pixel is partly padding.
            width, height = (
                max(1, min(int(side / downsample), stored))
                for side, stored in zip((area.width, area.height), size, strict=True)
            )
            levels.append(Level(width, height, downsample))
        block_px = _block_px(properties, levels[0])
        super().__init__(path, tuple(levels), (block_px,) * len(levels), _pixel_size(path, properties), 3)
        self.bounds = bounds
        regions = _regions(properties, self._origin)
        self.missing = tuple(_outside(regions, level, block_px) for level in levels)
        self._slide = slide
        self._reopening = threading.Lock()

    def _decode(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        import openslide

        try:
            return self._region(self._slide, level, row, column)
        except openslide.OpenSlideError:
            # After a damaged block OpenSlide refuses all other blocks too, until the file is opened again.
            with self._reopening:
                try:
                    self._slide = openslide.OpenSlide(self.path)
                except (OSError, openslide.OpenSlideError) as error:
                    raise no_longer_readable(self.path, error) from error
                return self._region(self._slide, level, row, column)

    def _region(self, slide: Any, level: int, row: int, column: int) -> NDArray[np.uint8]:
        (width, height), size = self.block_px[level], self.levels[level]
        x, y = column * width, row * height
        # OpenSlide's own downsample, 4.0004 where 4 is meant, leads to the pixel that is asked for.
        place = tuple(
            start + round(at * self._downsamples[level]) for start, at in zip(self._origin, (x, y), strict=True)
        )
        part = min(width, size.width - x), min(height, size.height - y)
        pixels = np.asarray(slide.read_region(place, level, part))
        return self._check(RGBA.color_of(pixels), level, row, column)

    def close(self) -> None:
        """Close the file."""
        self._slide.close()


def open_reader(path: Path) -> OpenSlideReader:
    """Open a file in a scanner's own layout.

    Raises
    ------
    DeclinedError
        If it is another kind of file.
    SlideError
        If OpenSlide knows the scanner but does not open the file, or a TIFF was cut off or claims what cannot be true.
    """
    check_tiff(path)  # OpenSlide opens such files and fails in the middle
    vendor = "" if path.is_dir() else scanner_format(path)
    if not vendor:
        raise DeclinedError("in no scanner's own layout")
    import openslide

    try:
        return OpenSlideReader(path, openslide.OpenSlide(path))
    except openslide.OpenSlideError as error:
        raise SlideError(
            f"{path}: OpenSlide does not open this file of {vendor} ({reason(error)}); copy it again, with all files "
            "that belong to it, or export the slide as plain TIFF"
        ) from error


def _pixel_size(path: Path, properties: Mapping[str, str]) -> PixelSize | None:
    """Return the size of pixels by OpenSlide's properties, or by other text in the file, as in XML of Philips."""
    found = openslide_pixel_size(path, properties)
    if found is not None or not is_tiff(path):
        return found
    import tifffile

    with tifffile.TiffFile(path, _multifile=False) as file:
        return tiff_pixel_size(path, file, file.pages.first)


def _bounds(properties: Mapping[str, str], size: tuple[int, int]) -> Box | None:
    """Return the box that was scanned, in pixels of level 0; None if that is all, or is not known."""
    try:
        box = Box(*(int(properties[f"openslide.bounds-{name}"]) for name in ("x", "y", "width", "height")))
    except (KeyError, ValueError):
        return None
    inside = 0 <= box.x < box.right <= size[0] and 0 <= box.y < box.bottom <= size[1]
    return box if inside and (box.width, box.height) != tuple(size) else None


def _regions(properties: Mapping[str, str], origin: tuple[int, int]) -> list[Box]:
    """Return the areas that were scanned, in pixels of level 0 of the reader; empty where they are not listed."""
    regions: list[Box] = []
    while f"openslide.region[{len(regions)}].x" in properties:
        prefix = f"openslide.region[{len(regions)}]"
        try:
            x, y, width, height = (int(properties[f"{prefix}.{name}"]) for name in ("x", "y", "width", "height"))
        except (KeyError, ValueError):
            return []
        regions.append(Box(x - origin[0], y - origin[1], width, height))
    return regions


def _outside(regions: list[Box], level: Level, block_px: tuple[int, int]) -> NDArray[np.bool_] | None:
    """Return which blocks of a level touch none of the areas that were scanned, as `SlideReader.missing`."""
    if not regions:
        return None
    width, height = block_px
    outside = np.ones((-(-level.height // height), -(-level.width // width)), np.bool_)
    for box in regions:
        first_row, first_column = int(box.y / level.downsample) // height, int(box.x / level.downsample) // width
        end_row, end_column = (
            math.ceil(side / level.downsample / px) for side, px in ((box.bottom, height), (box.right, width))
        )
        outside[max(first_row, 0) : max(end_row, 0), max(first_column, 0) : max(end_column, 0)] = False
    return outside if outside.any() else None


def _block_px(properties: Mapping[str, str], level: Level) -> tuple[int, int]:
    """Return (width, height) of the blocks: the file's tiles, if they are nearly square."""
    try:
        width, height = (int(properties[f"openslide.level[0].tile-{name}"]) for name in ("width", "height"))
    except (KeyError, ValueError):
        width = height = BLOCK_PX
    if min(width, height) < MAX_ASPECT or max(width, height) >= MAX_ASPECT * min(width, height):
        width = height = BLOCK_PX
    return min(width, level.width), min(height, level.height)

"""Find the images of a TIFF file, and the levels of each.

A file may hold several images, each with reduced copies, and further ones of the label and of the whole
glass. A page is a level of the image that precedes it only if it shows the same.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import printable
from histostream.wsi.geometry import Box
from histostream.wsi.slides.image_header import check_claim
from histostream.wsi.slides.pixel_size import UM_PER_TIFF_UNIT

# Names of images that are not the slide.
BESIDE = ("label", "macro", "thumbnail", "overview", "map")

SAMPLED_TILES = 3  # of each of two pages that are compared: those of the most bytes, which show the most
SPREAD_TILES = 100  # where all have as many
CELLS = 4  # along a side of a sample: so many means are compared
SAME_MEANS = 6.0  # of 255: mean difference of two copies of one image, scaled down in different ways
CHANCE = 2.0  # standard errors of the means of a copy that took every n-th pixel, which are allowed too
SAME_CORRELATION = 0.8  # of the means; copies have .95 and more, other parts of one slide hardly any
BLANK = 3.0  # of 255: standard deviation of an image without content
MAX_KNOWN = 1 << 14  # pairs of pages whose comparison is remembered
MACRO = 4.0  # an image with pixels so many times larger than another one's shows the whole glass

_known: dict[tuple[int, ...], bool] = {}  # results of `PageComparison.same`, the oldest first
_known_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class TiffImage:
    """One image of a TIFF file.

    Attributes
    ----------
    pages
        Its levels, ``tifffile.TiffPage``, finest first.
    name
        Name in the file, mostly empty.
    """

    pages: list[Any] = field(default_factory=list)
    name: str = ""

    @property
    def base(self) -> Any:
        """The page of level 0."""
        return self.pages[0]

    def finer_than(self, page: Any) -> Any:
        """Return the coarsest level that is finer than a page."""
        return min((p for p in self.pages if p.imagewidth > page.imagewidth), key=lambda p: int(p.imagewidth))

    def __str__(self) -> str:
        size = f"{self.base.imagewidth} x {self.base.imagelength}"
        return f"{printable(self.name)} ({size})" if self.name else size


def find_images(file: Any, *, compare: bool = True) -> list[TiffImage]:
    """Find the images that are made of tiles, in the order of the file, with their levels.

    Parameters
    ----------
    file
        The open ``tifffile.TiffFile``.
    compare
        Whether a level must show the same as its image; else its size decides alone.
    """
    series_of_ome = series_of(file) if file.is_ome else []
    if series_of_ome:
        return [
            TiffImage([level.keyframe for level in series.levels if level.keyframe.is_tiled], series.name)
            for series in series_of_ome
            if series.keyframe.is_tiled and not is_beside(series.name)
        ]
    images: list[TiffImage] = []
    same = PageComparison().same if compare else _any_same
    for page in file.pages:
        page = page.aspage()
        if not page.is_tiled:
            continue
        _add_page(images, page, same)
        for below in page.pages or ():
            last = images[-1] if images else None
            if last and below.is_tiled and _is_copy(last.base, below) and same(last.finer_than(below), below):
                last.pages.append(below)
    for image in images:
        image.pages.sort(key=lambda page: -int(page.imagewidth))
    return images


def series_of(file: Any) -> list[Any]:
    """Return tifffile's series of a file; none if its descriptions contradict its pages."""
    try:
        return list(file.series)
    except MemoryError:
        raise
    except Exception:  # tifffile raises errors of any kind
        return []


def is_beside(name: str) -> bool:
    """Whether an image of this name is the label or an overview, not the slide."""
    return any(word in name.lower() for word in BESIDE)


def choose_image(images: list[TiffImage]) -> tuple[TiffImage, tuple[str, ...]]:
    """Choose the image that is the slide: the first one that shows anything and is no overview of the whole glass.

    Returns
    -------
    The image, and what a user should know: the other images of the file.
    """
    if len(images) == 1:
        return images[0], ()
    compare = PageComparison()
    um = [_tag_um(image.base) for image in images]
    finest = min((side for side in um if side), default=None)
    slides = (
        image
        for image, side in zip(images, um, strict=True)
        if not (finest and side and side > MACRO * finest) and not compare.is_blank(image.base)
    )
    chosen = next(slides, images[0])
    others = ", ".join(str(image) for image in images if image is not chosen)
    note = f"the file holds {len(images)} images; {chosen} px is analysed, not {others}"
    return chosen, (f"{note}: export those to files of their own",)


def piece_px(page: Any) -> tuple[int, int]:
    """Return (width, height) of the tiles of a page, or of its strips."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


def missing_tiles(pages: Sequence[Any]) -> NDArray[np.bool_] | None:
    """Return which tiles or strips the file holds of none of some pages of one size, as `SlideReader.missing`."""
    (width, height), page = piece_px(pages[0]), pages[0]
    wide, high = -(-page.imagewidth // width), -(-page.imagelength // height)
    missing = np.all([np.asarray(page.databytecounts)[: wide * high] == 0 for page in pages], axis=0)
    return missing.reshape(high, wide) if missing.any() else None


class PageComparison:
    """Compares what pages of one file show, by a few of their tiles."""

    def __init__(self) -> None:
        self._tiles: dict[tuple[int, int], NDArray[Any] | None] = {}

    def same(self, fine: Any, coarse: Any) -> bool:
        """Whether a coarse page is a reduced copy of a fine one; a file that is opened again is not compared again."""
        info = Path(fine.parent.filehandle.path).stat()
        key = info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, fine.offset, coarse.offset
        with _known_lock:
            if key in _known:
                return _known[key]
        is_same = self._looks_same(fine, coarse)
        with _known_lock:
            _known[key] = is_same
            while len(_known) > MAX_KNOWN:
                del _known[next(iter(_known))]
        return is_same

    def _looks_same(self, fine: Any, coarse: Any) -> bool:
        means = [pair for page in (coarse, fine) for pair in self._pairs(fine, coarse, page)]
        if not means:
            return True  # nothing can be compared
        a, b, error = (np.concatenate([pair[i] for pair in means]) for i in (0, 1, 2))
        if float(np.abs(a - b).mean()) <= SAME_MEANS + CHANCE * float(error.mean()):
            return True
        with np.errstate(invalid="ignore", divide="ignore"):
            return bool(np.corrcoef(a, b)[0, 1] >= SAME_CORRELATION)

    def is_blank(self, page: Any) -> bool:
        """Whether the tiles of a page that show the most show nothing."""
        return all(float(tile.std(axis=(0, 1)).max()) < BLANK for tile in self.samples(page))

    def samples(self, page: Any) -> list[NDArray[Any]]:
        """Return some tiles of a page, (H, W, C), those of the most bytes."""
        tiles = [self._tile(page, index) for index in _richest(page)]
        return [tile for tile in tiles if tile is not None]

    def _pairs(self, fine: Any, coarse: Any, sampled: Any) -> list[tuple[NDArray[np.float64], ...]]:
        """Return means of cells of both pages, and the standard error of the second, at some tiles of one of them."""
        scale_x, scale_y = fine.imagewidth / coarse.imagewidth, fine.imagelength / coarse.imagelength
        pairs: list[tuple[NDArray[np.float64], ...]] = []
        for index in _richest(sampled):
            box = _tile_box(sampled, index)
            if sampled is coarse:  # one tile of the fine page, in the middle of it
                x, y = int((box.x + box.width / 2) * scale_x), int((box.y + box.height / 2) * scale_y)
                box = _tile_box(fine, _index_at(fine, x, y))
            small = Box(
                math.ceil(box.x / scale_x),
                math.ceil(box.y / scale_y),
                min(int(box.right / scale_x), coarse.imagewidth) - math.ceil(box.x / scale_x),
                min(int(box.bottom / scale_y), coarse.imagelength) - math.ceil(box.y / scale_y),
            )
            if min(small.width, small.height) < CELLS:
                continue
            pixels = self._pixels(fine, box), self._pixels(coarse, small)
            if pixels[0] is not None and pixels[1] is not None:
                pairs.append((_cell_means(pixels[0])[0], *_cell_means(pixels[1])))
        return pairs

    def _pixels(self, page: Any, box: Box) -> NDArray[Any] | None:
        """Return a box of a page, (H, W, C); None if one of its tiles is missing or cannot be decoded."""
        width, height = piece_px(page)
        columns = range(box.x // width, (box.right - 1) // width + 1)
        rows = range(box.y // height, (box.bottom - 1) // height + 1)
        wide = -(-page.imagewidth // width)
        tiles = [[self._tile(page, row * wide + column) for column in columns] for row in rows]
        if any(tile is None for line in tiles for tile in line):
            return None
        joined = np.concatenate([np.concatenate(line, axis=1) for line in tiles], axis=0)  # type: ignore[arg-type]
        x, y = box.x - columns[0] * width, box.y - rows[0] * height
        return joined[y : y + box.height, x : x + box.width]

    def _tile(self, page: Any, index: int) -> NDArray[Any] | None:
        """Return a tile, (H, W, C); None if it is missing or cannot be decoded."""
        key = (page.offset, index)
        if key not in self._tiles:
            self._tiles[key] = self._decoded(page, index)
        return self._tiles[key]

    def _decoded(self, page: Any, index: int) -> NDArray[Any] | None:
        count = page.databytecounts[index]
        if not count:
            return None
        file = page.parent.filehandle
        file.seek(page.dataoffsets[index])
        data = file.read(count)
        try:
            check_claim(data, math.prod(piece_px(page)))
            tile = page.decode(data, index, jpegtables=page.jpegtables)[0]
        except MemoryError:
            raise
        except Exception:  # the codecs' errors have no common base class; a damaged tile is found when it is read
            return None
        box = _tile_box(page, index)  # beyond the border of the image a tile may hold anything
        return None if tile is None else np.asarray(tile[0])[: box.height, : box.width]


def _any_same(fine: Any, coarse: Any) -> bool:
    return True


def _add_page(images: list[TiffImage], page: Any, same: Callable[[Any, Any], bool]) -> None:
    """Add a page to the image before it, if it is a copy of that one at another size, else as another image."""
    last = images[-1] if images else None
    if last is not None and _is_copy(last.base, page) and same(last.finer_than(page), page):
        last.pages.append(page)
    elif last is not None and not last.base.is_reduced and _is_copy(page, last.base) and same(page, last.base):
        last.pages.insert(0, page)  # written smallest first
    elif not page.is_reduced or last is None:
        images.append(TiffImage([page], str(page.tags.valueof(285, "") or "")))  # PageName


def _is_copy(first: Any, page: Any) -> bool:
    """Whether a page can be a smaller copy of the first: both sides shrink by the same factor."""
    ratio = first.imagewidth / page.imagewidth
    # Scanners round down, and some pad to whole tiles: by 1.5 pixels, or 2 % of a long side.
    slack = max(1.5, 0.02 * page.imagelength)
    return bool(ratio > 1 and abs(first.imagelength / ratio - page.imagelength) < slack)


def _richest(page: Any) -> list[int]:
    """Return the indices of the stored tiles of the most bytes."""
    counts = np.asarray(page.databytecounts)
    stored = np.flatnonzero(counts)
    if len(stored) and counts[stored].min() == counts[stored].max():  # not compressed
        chosen = stored[np.linspace(0, len(stored) - 1, SPREAD_TILES).astype(int)]
    else:
        chosen = stored[np.argsort(counts[stored], kind="stable")[::-1][:SAMPLED_TILES]]
    return [int(index) for index in chosen]


def _index_at(page: Any, x: int, y: int) -> int:
    width, height = piece_px(page)
    wide = -(-page.imagewidth // width)
    return int(min(y, page.imagelength - 1) // height * wide + min(x, page.imagewidth - 1) // width)


def _tile_box(page: Any, index: int) -> Box:
    """Return the part of a page that a tile or strip covers."""
    width, height = piece_px(page)
    row, column = divmod(index, -(-page.imagewidth // width))
    x, y = column * width, row * height
    return Box(x, y, min(width, page.imagewidth - x), min(height, page.imagelength - y))


def _cell_means(pixels: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return means and their standard errors of CELLS x CELLS parts of (H, W, C), of all bands."""
    rows, columns = (np.linspace(0, side, CELLS + 1).astype(int) for side in pixels.shape[:2])
    number = (np.diff(rows)[:, None] * np.diff(columns))[..., None]

    def means(values: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.add.reduceat(np.add.reduceat(values, rows[:-1], axis=0), columns[:-1], axis=1)
        return np.asarray(sums / number)

    values = pixels.astype(np.float64)
    mean = means(values)
    variance = np.maximum(means(values**2) - mean**2, 0)
    return mean.ravel(), np.sqrt(variance / number).ravel()


def _tag_um(page: Any) -> float | None:
    """Return the size of a page's pixels by its resolution tags, whatever program wrote them."""
    um, x = UM_PER_TIFF_UNIT.get(int(page.resolutionunit)), page.resolution[0]
    return um / x if um and x > 0 else None

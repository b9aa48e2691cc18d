"""Training from slides: their tiles, read at each access.

Tiles are placed and read as in inference. Labels are polygons; a pixel has the class of the
smallest polygon that its centre lies in.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histostream.training.data import MIN_PX, DataError, Picture
from histostream.training.datasets._files import collect, label_files, refuse_same_stems
from histostream.training.datasets._layout import Layout
from histostream.wsi.geometry import Box
from histostream.wsi.slides.reader import SlideReader, open_slide, slide_suffixes
from histostream.wsi.slides.resolution import MAX_MPP, MAX_UPSAMPLING, MIN_MPP, SlideView, at_mpp
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.polygons import Polygon, read_polygons
from histostream.wsi.tiling.tissue import find_tissue

ROI = "roi"  # name, in any case, of polygons around what was annotated
OPEN_SLIDES = 32  # files held open at once
CACHED_TILES = 64  # 50 MiB of tiles of 512 px
IDENTITY_BYTES = 1 << 20  # at either end of a slide's file, for its identity
TILE_WIDTH = 322  # TIFF tag; only tiled files have it


def is_slide(path: Path) -> bool:
    """Whether a file is a slide and no image: by its suffix; a TIFF, if it is tiled."""
    suffix = path.suffix.lower()
    if suffix not in (".tif", ".tiff"):
        return suffix in slide_suffixes()
    try:
        with Image.open(path) as image:
            return TILE_WIDTH in getattr(image, "tag_v2", {})
    except (OSError, ValueError, SyntaxError):
        return False


def slide_files(folder: Path) -> list[Path]:
    """Return the slides of a folder of slides, sorted; DICOM slides are folders.

    Raises
    ------
    DataError
        If two have the same stem.
    """
    files = [
        p
        for p in sorted(folder.iterdir())
        if not p.name.startswith(".")
        and ((p.is_file() and p.suffix.lower() in slide_suffixes()) or (p.is_dir() and any(p.glob("*.dcm"))))
    ]
    refuse_same_stems(files)
    return files


def read_annotated(paths: Sequence[Path], folder: Path, layout: Layout) -> list[list[SlideSample]]:
    """Cut slides with annotations into samples.

    Parameters
    ----------
    paths
        The slides.
    folder
        Where the annotations are: GeoJSON files of the slides' names.
    layout
        Classes, resolution, and side of a tile.

    Returns
    -------
    The samples of each slide.

    Raises
    ------
    DataError
        If an annotation is missing or names an unknown class, or a slide cannot be read or has
        nothing to train on.
    """
    if not layout.classes:
        raise DataError(f"{layout.file}: slides need the names of the classes, as [[classes]]: add them")
    store = OpenSlides()
    pairs = zip(paths, label_files(paths, folder, (".geojson",)), strict=True)
    slides = collect(lambda pair: _samples(_Slide.open(pair[0], layout, store), *pair, layout), pairs)
    if not any(samples[0].has_objects for samples in slides):
        raise DataError(
            f"{folder}: no polygon of any class but {layout.classes[0][0]!r}: "
            "there is nothing to learn; check the classes of the annotations"
        )
    return slides


def read_pictures(paths: Sequence[Path], layout: Layout) -> list[Picture]:
    """Cut slides without annotations into pictures.

    Raises
    ------
    DataError
        If a slide cannot be read or has no tissue.
    """
    store = OpenSlides()

    def cut(path: Path) -> list[SlidePicture]:
        slide = _Slide.open(path, layout, store)
        return [SlidePicture(slide, box) for box in slide.tiles(layout.tile_px)]

    return [picture for pictures in collect(cut, paths) for picture in pictures]


class OpenSlides:
    """Open slides and recently read tiles; may be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, tuple[SlideReader, list[int]]] = OrderedDict()
        self._tiles: OrderedDict[tuple[Path, Box], NDArray[np.uint8]] = OrderedDict()
        weakref.finalize(self, _close_all, self._open)

    @contextmanager
    def reader(self, path: Path) -> Iterator[SlideReader]:
        """Lend an open slide; it stays open while it is lent."""
        with self._lock:
            if path not in self._open:
                self._open[path] = open_slide(path), [0]
            slide, users = self._open[path]
            self._open.move_to_end(path)
            users[0] += 1
        try:
            yield slide
        finally:
            with self._lock:
                users[0] -= 1
                self._close_surplus()

    def tile(self, slide: _Slide, box: Box) -> NDArray[np.uint8]:
        """Return a tile, from the cache or the slide."""
        with self._lock:
            if (slide.path, box) in self._tiles:
                self._tiles.move_to_end((slide.path, box))
                return self._tiles[slide.path, box]
        with self.reader(slide.path) as reader:
            view = at_mpp(reader, slide.mpp, slide_mpp=slide.slide_mpp)
            pixels = view.read(box.x, box.y, box.width, box.height)
        with self._lock:
            self._tiles[slide.path, box] = pixels
            while len(self._tiles) > CACHED_TILES:
                self._tiles.popitem(last=False)
        return pixels

    def _close_surplus(self) -> None:
        idle = [path for path, (_, users) in self._open.items() if not users[0]]
        for path in idle[: max(0, len(self._open) - OPEN_SLIDES)]:
            self._open.pop(path)[0].close()


@dataclass(frozen=True, slots=True, eq=False)
class SlidePicture:
    """A tile of a slide; its pixels are read at each access."""

    _slide: _Slide
    _box: Box

    @property
    def name(self) -> str:
        """Slide and position, in pixels at the resolution of the data set."""
        return f"{self._slide.path.stem}_x{self._box.x}_y{self._box.y}"

    @property
    def group(self) -> str:
        """The slide's name, or its part that ``group`` of ``dataset.toml`` matches."""
        return self._slide.group

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self._box.height, self._box.width

    @property
    def image(self) -> NDArray[np.uint8]:
        """(H, W, C) uint8."""
        return self._slide.store.tile(self._slide, self._box)

    def digest(self) -> bytes:
        """SHA-256 of the slide's identity, the resolution and the position."""
        return hashlib.sha256(self._slide.identity + self._position()).digest()

    def _position(self) -> bytes:
        box = self._box
        return f"{self._slide.mpp:.9g} {box.x} {box.y} {box.width} {box.height}".encode()


@dataclass(frozen=True, slots=True, eq=False)
class SlideSample(SlidePicture):
    """A tile of a slide with annotations."""

    _annotations: _Annotations

    @property
    def labels(self) -> NDArray[np.uint8]:
        """(H, W) uint8, class of each pixel."""
        return self._annotations.labels(self._box)

    @property
    def instances(self) -> NDArray[np.int32] | None:
        """None: regions are not objects."""
        return None

    @property
    def object_px(self) -> float:
        """Nan: regions are not objects."""
        return math.nan

    @property
    def has_objects(self) -> bool:
        """Whether any polygon of the slide is of another class than the first."""
        return any(self._annotations.shapes.values)

    def digest(self) -> bytes:
        """SHA-256 of the slide's and the annotations' identity, the resolution and the position."""
        parts = self._slide.identity + self._annotations.identity + self._position()
        return hashlib.sha256(parts).digest()


@dataclass(frozen=True, slots=True, eq=False)
class _Slide:
    """One slide at the resolution of the data set."""

    path: Path
    group: str
    mpp: float
    slide_mpp: float | None
    identity: bytes
    store: OpenSlides

    @classmethod
    def open(cls, path: Path, layout: Layout, store: OpenSlides) -> _Slide:
        if layout.mpp is None:
            raise DataError(f"{layout.file}: slides need the resolution to train at: add e.g. mpp = 0.5")
        with store.reader(path) as reader:
            own = layout.slide_mpp or reader.mpp
            if own is None or not MIN_MPP <= own <= MAX_MPP:
                problem = "no resolution in the file" if own is None else f"{own:.4g} um per pixel"
                raise DataError(f"{path}: {problem}; add slide_mpp to {layout.file} (20x is usually 0.5, 40x 0.25)")
            if own / layout.mpp > MAX_UPSAMPLING:
                raise DataError(
                    f"{path}: it has {own:.4g} um per pixel, too coarse for mpp={layout.mpp:g} "
                    f"in {layout.file}; "
                    "set a coarser mpp"
                )
        return cls(path, layout.group_of(path.stem), layout.mpp, layout.slide_mpp, _identity(path), store)

    @contextmanager
    def view(self) -> Iterator[SlideView]:
        with self.store.reader(self.path) as reader:
            yield at_mpp(reader, self.mpp, slide_mpp=self.slide_mpp)

    def tiles(self, tile_px: int) -> list[Box]:
        """Boxes of the tiles with tissue, cut off where the slide is smaller than a tile."""
        with self.view() as view:
            grid = TileGrid.cover(view.width, view.height, tile_px=tile_px, overlap_px=0)
            reads = [tile.read for tile in grid.where(find_tissue(view).tiles(grid))]
            width, height = min(tile_px, view.width), min(tile_px, view.height)
            tiles = [Box(box.x, box.y, width, height) for box in reads]
        if not tiles:
            raise DataError(f"{self.path}: no tissue found on it; take it out of the set")
        return tiles


@dataclass(frozen=True, slots=True, eq=False)
class _Annotations:
    """The polygons of one slide, in pixels at the resolution of the data set."""

    shapes: _Shapes
    regions: _Shapes  # of interest
    identity: bytes

    def labels(self, box: Box) -> NDArray[np.uint8]:
        """(H, W) uint8, class of each pixel of a box; later polygons lie on earlier ones."""
        labels = np.zeros((box.height, box.width), np.uint8)
        for inside, window, label in self.shapes.within(box):
            labels[window][inside] = label
        return labels

    def annotated(self, box: Box) -> Box | None:
        """Return the annotated part of a box; None if it is no rectangle, or too small."""
        if not self.regions.polygons:
            return box
        known = np.zeros((box.height, box.width), bool)
        for inside, window, _ in self.regions.within(box):
            known[window] |= inside
        rows, columns = (np.flatnonzero(known.any(axis=axis)) for axis in (1, 0))
        if not len(rows) or not known[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all():
            return None
        width, height = int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1
        if min(width, height) < MIN_PX:
            return None
        return Box(box.x + int(columns[0]), box.y + int(rows[0]), width, height)


@dataclass(frozen=True, slots=True, eq=False)
class _Shapes:
    """Polygons with labels, and where each lies."""

    polygons: tuple[tuple[NDArray[np.float64], ...], ...]
    values: tuple[int, ...]
    bounds: NDArray[np.float64] = field(init=False)  # (N, 4) left, top, right, bottom

    def __post_init__(self) -> None:
        bounds = [(*r[0].min(axis=0), *r[0].max(axis=0)) for r in self.polygons]
        object.__setattr__(self, "bounds", np.asarray(bounds, float).reshape(-1, 4))

    def within(self, box: Box) -> Iterator[tuple[NDArray[np.bool_], tuple[slice, slice], int]]:
        """Yield, for each polygon that touches a box: its pixels in a window of the box, the window, its label."""
        left, top, right, bottom = self.bounds.T
        touching = (left < box.right) & (right > box.x) & (top < box.bottom) & (bottom > box.y)
        for i in np.flatnonzero(touching):
            x0, y0 = (max(int(v), low) for v, low in ((left[i], box.x), (top[i], box.y)))
            x1, y1 = min(math.ceil(right[i]), box.right), min(math.ceil(bottom[i]), box.bottom)
            window = slice(y0 - box.y, y1 - box.y), slice(x0 - box.x, x1 - box.x)
            yield filled(self.polygons[i], Box(x0, y0, x1 - x0, y1 - y0)), window, self.values[i]


def filled(rings: Sequence[NDArray[np.float64]], box: Box) -> NDArray[np.bool_]:
    """Mark the pixels of a box whose centre lies inside a polygon.

    By the even-odd rule, so that rings within the first one are holes. Pillow's polygons are not
    used: they round corners to whole pixels and include the outline, a pixel too much for nuclei.

    Parameters
    ----------
    rings
        (N, 2) x, y of each ring; the last corner is joined with the first one.
    box
        The pixels; pixel (i, j) covers i to i + 1 and j to j + 1.

    Returns
    -------
    (H, W) bool.
    """
    origin = (box.x + 0.5, box.y + 0.5)
    start = np.concatenate(rings) - origin
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings]) - origin
    # Each edge crosses the centre lines of rows first:last, the upper end counted.
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first, last = (np.clip(np.ceil(y), 0, box.height).astype(np.int64) for y in (low, high))
    count = last - first
    edge = np.repeat(np.arange(len(start)), count)
    row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    crossing = x0 + (row - y0) * (x1 - x0) / (y1 - y0)
    column = np.clip(np.ceil(crossing), 0, box.width).astype(np.int64)
    toggles = np.zeros((box.height, box.width + 1), np.int64)
    np.add.at(toggles, (row, column), 1)
    inside: NDArray[np.bool_] = toggles.cumsum(axis=1)[:, :-1] % 2 == 1
    return inside


def _samples(slide: _Slide, path: Path, annotation_file: Path, layout: Layout) -> list[SlideSample]:
    with slide.view() as view:
        downsample = view.downsample
    annotations = _read_annotations(annotation_file, downsample, layout)
    boxes = [box for tile in slide.tiles(layout.tile_px) if (box := annotations.annotated(tile)) is not None]
    if not boxes:
        raise DataError(
            f"{annotation_file}: no tile of {path.name} has tissue and lies in a region named ROI; "
            "draw rectangles, or make tile_px smaller"
        )
    return [SlideSample(slide, box, annotations) for box in boxes]


def _read_annotations(path: Path, downsample: float, layout: Layout) -> _Annotations:
    polygons = read_polygons(path, downsample)
    known = {name: label for label, (name, _) in enumerate(layout.classes)}
    for name in sorted({p.name for p in polygons if p.name.lower() != ROI} - set(known)):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}, ROI"
        polygon = f"a polygon of class {name!r}" if name else "a polygon without a class"
        raise DataError(f"{path}: {polygon}, which {layout.file.name} does not have: {hint}")
    polygons.sort(key=_area, reverse=True)
    classes = [p for p in polygons if p.name.lower() != ROI]
    regions = [p for p in polygons if p.name.lower() == ROI]
    return _Annotations(
        _Shapes(tuple(p.rings for p in classes), tuple(known[p.name] for p in classes)),
        _Shapes(tuple(p.rings for p in regions), (1,) * len(regions)),
        hashlib.sha256(path.read_bytes() + repr(layout.classes).encode()).digest(),
    )


def _area(polygon: Polygon) -> float:
    x, y = polygon.rings[0].T
    return abs(float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))) / 2


def _identity(path: Path) -> bytes:
    """Hash the name, size and both ends of a slide's file, or of each file of its folder."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as data:
            digest.update(data.read(IDENTITY_BYTES))
            data.seek(max(0, size - IDENTITY_BYTES))
            digest.update(data.read())
    return digest.digest()


def _close_all(slides: OrderedDict[Path, tuple[SlideReader, list[int]]]) -> None:
    for slide, _ in slides.values():
        slide.close()

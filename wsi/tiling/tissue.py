"""Choose the tiles to analyse: tissue found on an overview, or regions that a user drew."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from histostream.wsi.errors import SlideError, reason
from histostream.wsi.geometry import Box
from histostream.wsi.runs import Runs
from histostream.wsi.slides.resolution import LIGHT_MPP, SlideView, thumbnail
from histostream.wsi.tiling.grid import TileGrid

OVERVIEW_PX = 2048  # longest side; 25 um per pixel on the largest slides
OVERVIEW_MPP = 8.0  # um, at least: single cells are not resolved on the overview
GUESSED_MPP = 0.5  # um of level 0, for the sizes here only, if a slide has no resolution: 20x
MIN_AREA_UM2 = 10_000.0  # 100 um x 100 um: smaller than a biopsy's fragments, larger than dust
MAX_DISTANCE_PX = 1 << 26  # of a vertex from the slide's corner, at level 0: no slide is as large
DRAWN_ROWS = 256  # of a polygon at a time
MAX_LEFT_PX = 4096  # a canvas begins at most this far left of the slide
BLUR_PX = 1  # radius; suppresses JPEG noise
MARGIN_PX = 2  # tissue is dilated by it, so that faint borders are kept
# Of 255, in the colour channel that a pixel absorbs most. On the slides tried glass varied by +-5, and
# pale grey-blue tissue, which a threshold on saturation misses, began at +40.
ABSORBED = 20  # more than glass
MAX_GLASS = 48  # glass is never darker; if even the lightest pixels are, there is no glass
GLASS_PERCENTILE = 5
FILLED = 2  # absorption of the pure white with which scanners fill areas that they skip
DARK_GROUND = 64  # a median brightness below it means fluorescence, not a stained slide
# Limits of Otsu's threshold on slides with a dark ground: it may fall between dim and bright cells, and
# the dim ones count too.
MIN_BRIGHTNESS, MAX_BRIGHTNESS = 8, 20


@dataclass(frozen=True, slots=True)
class TissueMask:
    """The tissue on an overview of the whole slide, (H, W) bool."""

    mask: NDArray[np.bool_]

    def tiles(self, grid: TileGrid) -> NDArray[np.bool_]:
        """Return (rows, columns) bool: the tiles whose write box touches tissue."""
        return _touching(self.mask, grid)


@dataclass(frozen=True, slots=True)
class Polygon:
    """One polygon that a user drew.

    Attributes
    ----------
    name
        Name of its class in QuPath, else its own name; empty if it has neither.
    rings
        (N, 2) float64 each, x and y: the outline, then its holes.
    """

    name: str
    rings: tuple[NDArray[np.float64], ...]


@dataclass(frozen=True, slots=True)
class RegionOfInterest:
    """Polygons that a user drew, in pixels of the view.

    Attributes
    ----------
    polygons
        The rings of each, as in `Polygon`.
    mask
        (H, W) bool, the polygons on an overview of the whole slide.
    """

    polygons: tuple[tuple[NDArray[np.float64], ...], ...]
    mask: NDArray[np.bool_]

    def tiles(self, grid: TileGrid) -> NDArray[np.bool_]:
        """Return (rows, columns) bool: the tiles whose write box touches a polygon."""
        return _touching(self.mask, grid)

    def inside(self, box: Box) -> NDArray[np.bool_]:
        """Return (H, W) bool: the pixels of a box of the view that lie in a polygon."""
        return _rasterised(self.polygons, box)


def find_tissue(
    view: SlideView,
    *,
    min_area_um2: float = MIN_AREA_UM2,
    max_px: int = OVERVIEW_PX,
    preview: NDArray[np.uint8] | None = None,
) -> TissueMask:
    """Find the tissue on an overview of a slide.

    Tissue, stained or not, absorbs more than glass in some colour channel. On a dark ground
    (fluorescence) it is brighter than Otsu's threshold. Doubtful pixels are kept: a tile too many
    costs milliseconds, a tile too few is lost. Pen marks count as tissue. An electron micrograph
    (level 0 finer than 0.05 um per pixel) is tissue everywhere: it shows a few cells and no glass.

    Parameters
    ----------
    view
        The slide.
    min_area_um2
        Smaller pieces of tissue are dropped.
    max_px
        Longest side of the overview.
    preview
        (H, W, C) uint8, an overview that was read before; used if it is fine enough.

    Examples
    --------
    >>> from histostream.wsi import TileGrid, at_mpp, open_slide
    >>> with open_slide("slide.svs") as slide:
    ...     view = at_mpp(slide, 0.5)
    ...     tissue = find_tissue(view)
    >>> grid = TileGrid.cover(view.width, view.height, tile_px=128, overlap_px=0)
    >>> kept = grid.where(tissue.tiles(grid))
    >>> len(grid), len(kept)
    (30, 17)
    """
    mpp = view.mpp or GUESSED_MPP * view.downsample
    longest_um = max(view.width, view.height) * mpp
    overview = _overview(view, max(1, min(max_px, round(longest_um / OVERVIEW_MPP))), preview)
    height, width = overview.shape[:2]
    um2 = mpp**2 * (view.width / width) * (view.height / height)
    if mpp / view.downsample < LIGHT_MPP:
        mask = np.ones((height, width), np.bool_)
    else:
        mask = _without_small(_is_tissue(overview), min_area_um2 / um2)
    dilated = Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * MARGIN_PX + 1))
    return TissueMask(np.asarray(dilated) > 0)


def read_roi(path: str | Path, view: SlideView, origin: tuple[int, int] = (0, 0)) -> RegionOfInterest:
    """Read regions from a GeoJSON file, in pixels of level 0, as QuPath writes it.

    Parameters
    ----------
    path
        The file.
    view
        The slide.
    origin
        Where the slide begins in the file's coordinates, see `origin_px`.

    Raises
    ------
    SlideError
        If the file cannot be read, is not GeoJSON, or has no polygon on the slide.
    """
    polygons = [polygon.rings for polygon in read_polygons(path, view.downsample, origin)]
    scale = max(1.0, max(view.width, view.height) / OVERVIEW_PX)
    width, height = int(np.ceil(view.width / scale)), int(np.ceil(view.height / scale))
    scale_x, scale_y = view.width / width, view.height / height
    small = ([ring / (scale_x, scale_y) for ring in rings] for rings in polygons)
    mask = _rasterised(small, Box(0, 0, width, height))
    if not mask.any():
        raise SlideError(
            f"{path}: no polygon lies on the slide {view.slide.path}; coordinates are pixels of level 0, "
            f"check that the two belong together{_other_origin(view, origin)}"
        )
    return RegionOfInterest(tuple(polygons), mask)


def _other_origin(view: SlideView, origin: tuple[int, int]) -> str:
    """Return what else may be wrong with regions of a slide that OpenSlide places in a larger area."""
    if view.bounds is None:
        return ""
    program = "QuPath" if origin == (view.bounds.x, view.bounds.y) else "OpenSlide"
    return f", or pass --coordinates {program.lower()} if they were drawn in the coordinates of {program}"


def read_polygons(path: str | Path, downsample: float = 1.0, origin: tuple[int, int] = (0, 0)) -> list[Polygon]:
    """Read the polygons of a GeoJSON file, in pixels of level 0, as QuPath writes it.

    Parameters
    ----------
    path
        The file.
    downsample
        Pixels of level 0 per pixel of the result's coordinates.
    origin
        Where the slide begins in the file's coordinates, see `origin_px`.

    Raises
    ------
    SlideError
        If the file cannot be read, is not GeoJSON, or has no polygon.
    """
    try:
        geojson = json.loads(Path(path).read_text(encoding="utf-8"))
        polygons = [Polygon(name, _rings(rings, downsample, origin)) for name, rings in _polygons(geojson)]
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except RecursionError as error:
        raise SlideError(f"{path}: nested too deeply; export the regions again") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise SlideError(f"{path}: not valid GeoJSON ({reason(error)}); export the regions again") from error
    if not polygons:
        raise SlideError(f"{path}: holds no polygon; draw a region and export it as GeoJSON")
    return polygons


def _overview(view: SlideView, longest_px: int, preview: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """Return the whole slide at ``longest_px`` on its longest side, from ``preview`` if it is fine enough."""
    if preview is None or max(preview.shape[:2]) < longest_px:
        return thumbnail(view, longest_px)
    scale = longest_px / max(preview.shape[:2])
    height, width = (max(1, round(side * scale)) for side in preview.shape[:2])
    image = Image.fromarray(preview[..., 0] if preview.shape[2] == 1 else preview)
    smaller = np.asarray(image.resize((width, height), Image.Resampling.BOX))
    return smaller.reshape(height, width, preview.shape[2])


def _is_tissue(overview: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return (H, W) bool: the tissue on an overview (H, W, C)."""
    image = Image.fromarray(overview[..., 0] if overview.shape[2] == 1 else overview)
    blurred = np.asarray(image.filter(ImageFilter.BoxBlur(BLUR_PX))).reshape(overview.shape)
    brightness = blurred.max(axis=2)
    if np.median(brightness) < DARK_GROUND:
        bright: NDArray[np.bool_] = brightness > _otsu(brightness)
        return bright
    absorption = 255 - blurred.min(axis=2)
    scanned = absorption[absorption > FILLED]
    glass = min(np.percentile(scanned, GLASS_PERCENTILE), MAX_GLASS) if len(scanned) else 0
    absorbing: NDArray[np.bool_] = absorption > glass + ABSORBED
    return absorbing


def _otsu(signal: NDArray[np.uint8]) -> int:
    """Return the t for which the variance between <= t and > t is largest (Otsu 1979), within limits."""
    count = np.bincount(signal.ravel(), minlength=256).astype(float)
    below = np.cumsum(count)
    above = below[-1] - below
    total = np.cumsum(count * np.arange(256))
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = total / below - (total[-1] - total) / above
        between = below * above * gap**2
    best = int(np.nan_to_num(between).argmax())
    return min(max(best, MIN_BRIGHTNESS), MAX_BRIGHTNESS)


def _without_small(mask: NDArray[np.bool_], min_px: float) -> NDArray[np.bool_]:
    """Drop the 8-connected pieces of fewer than ``min_px`` pixels."""
    runs = Runs(mask.view(np.uint8), corners=True)
    area = np.bincount(runs.component, weights=runs.end - runs.start, minlength=runs.components)
    return runs.painted(area >= min_px)


def _touching(mask: NDArray[np.bool_], grid: TileGrid) -> NDArray[np.bool_]:
    """Return (rows, columns) bool: the tiles whose write box contains a marked pixel of an overview."""
    height, width = mask.shape
    counts = np.zeros((height + 1, width + 1), np.int64)
    counts[1:, 1:] = mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    columns = [grid.tile(0, column).write for column in range(len(grid.xs))]
    rows = [grid.tile(row, 0).write for row in range(len(grid.ys))]
    left, right = _covering([(box.x, box.right) for box in columns], width / grid.width, width)
    top, bottom = _covering([(box.y, box.bottom) for box in rows], height / grid.height, height)
    below, above = counts[bottom], counts[top]
    marked = below[:, right] - below[:, left] - above[:, right] + above[:, left]
    return marked > 0


def _covering(spans: list[tuple[int, int]], scale: float, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the overview pixels [first, last) that each span of the view touches."""
    edges = np.asarray(spans) * scale
    first = np.clip(np.floor(edges[:, 0]).astype(np.int64), 0, size - 1)
    last = np.clip(np.ceil(edges[:, 1]).astype(np.int64), first + 1, size)
    return first, last


def _polygons(geojson: Any, name: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Yield name and rings of all polygons in a GeoJSON object."""
    if isinstance(geojson, list):  # old versions of QuPath wrote a bare list of features
        for part in geojson:
            yield from _polygons(part)
        return
    match geojson["type"]:
        case "FeatureCollection":
            yield from _polygons(geojson["features"])
        case "Feature":
            if geojson["geometry"] is not None:
                yield from _polygons(geojson["geometry"], _name(geojson.get("properties")))
        case "GeometryCollection":
            for part in geojson["geometries"]:
                yield from _polygons(part, name)
        case "MultiPolygon":
            yield from ((name, rings) for rings in geojson["coordinates"])
        case "Polygon":
            yield name, geojson["coordinates"]


def _name(properties: Any) -> str:
    if not isinstance(properties, dict):
        return ""
    kind = properties.get("classification")
    name = kind.get("name") if isinstance(kind, dict) else kind
    return str(name or properties.get("name") or "")


def _rings(coordinates: list[Any], downsample: float, origin: tuple[int, int]) -> tuple[NDArray[np.float64], ...]:
    """Return a polygon's coordinates at level 0 as (N, 2) arrays in pixels of the view."""
    rings = tuple(np.asarray(ring, float)[:, :2] for ring in coordinates)
    if not rings or min(len(ring) for ring in rings) < 3:
        raise ValueError("a polygon has less than three corners")
    for ring in rings:
        if ring.shape[1] != 2:
            raise ValueError("a corner is no pair of numbers")
        if not (np.abs(ring) <= MAX_DISTANCE_PX).all():  # false for nan too
            raise ValueError(f"a corner lies more than {MAX_DISTANCE_PX} px away, or is not a number")
    return tuple((ring - origin) / downsample for ring in rings)


def _rasterised(polygons: Iterable[Sequence[NDArray[np.float64]]], box: Box) -> NDArray[np.bool_]:
    """Return (H, W) bool: pixels of a box inside or on the outline of a polygon, not in a hole.

    The result for a pixel does not depend on the box: vertices are rounded down to whole pixels of
    the slide, and a polygon is drawn from its own left edge, since Pillow rounds differently for
    another origin of the canvas.
    """
    inside = np.zeros((box.height, box.width), bool)
    for rings in polygons:
        outline, *holes = (np.floor(ring) for ring in rings)
        left, top = np.maximum(outline.min(axis=0), -MAX_LEFT_PX)
        right, bottom = outline.max(axis=0) + 1
        first, last = int(max(top, box.y)), int(min(bottom, box.bottom))
        x0, x1 = int(max(left, box.x)), int(min(right, box.right))
        if x0 >= x1:
            continue
        for y in range(first, last, DRAWN_ROWS):  # a canvas may be as wide as the slide
            height = min(DRAWN_ROWS, last - y)
            canvas = Image.new("1", (x1 - int(left), height))
            draw = ImageDraw.Draw(canvas)
            for ring, fill in ((outline, 1), *((hole, 0) for hole in holes)):
                draw.polygon((ring - (left, y)).ravel().tolist(), fill=fill, outline=fill)
            drawn = np.asarray(canvas)[:, x0 - int(left) :]
            inside[y - box.y : y - box.y + height, x0 - box.x : x1 - box.x] |= drawn
    return inside

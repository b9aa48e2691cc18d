"""Read polygons that a user drew, and the pixels that lie inside of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from histostream.wsi.errors import SlideError, reason
from histostream.wsi.geometry import Box
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.tiling.cells import Cells, eroded, tile_spans
from histostream.wsi.tiling.grid import TileGrid

OVERVIEW_PX = 2048  # longest side of the overview on which polygons are drawn to choose tiles
MAX_DISTANCE_PX = 1 << 26  # of a vertex from the slide's corner, at level 0: no slide is as large
DRAWN_ROWS = 256  # of a polygon at a time
MAX_LEFT_PX = 4096  # a canvas begins at most this far left of the slide


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
    """Polygons that a user drew, in pixels of the view: what is analysed, or what is not.

    Attributes
    ----------
    polygons
        The rings of each, as in `Polygon`.
    mask
        (H, W) bool, the polygons on an overview of the whole slide.
    excluded
        Whether the inside of the polygons is left out, and not the outside.
    """

    polygons: tuple[tuple[NDArray[np.float64], ...], ...]
    mask: NDArray[np.bool_]
    excluded: bool = False

    @classmethod
    def of(cls, polygons: Sequence[Polygon], view: SlideView, *, excluded: bool = False) -> RegionOfInterest:
        """Draw polygons on an overview of a view."""
        rings = tuple(polygon.rings for polygon in polygons)
        scale = max(1.0, max(view.width, view.height) / OVERVIEW_PX)
        width, height = int(np.ceil(view.width / scale)), int(np.ceil(view.height / scale))
        factors = view.width / width, view.height / height
        small = ([ring / factors for ring in polygon] for polygon in rings)
        return cls(rings, _rasterised(small, Box(0, 0, width, height)), excluded)

    def tiles(self, grid: TileGrid) -> NDArray[np.bool_]:
        """Return (rows, columns) bool: the tiles whose write box may have pixels to analyse."""
        return self.cells(grid.width, grid.height).touches(*tile_spans(grid))

    def cells(self, width: int, height: int) -> Cells:
        """Return which pixels of the overview may have pixels to analyse; the view has ``width`` x ``height`` px."""
        # A pixel of the overview that an excluded polygon only touches has others beside it.
        keep = ~eroded(self.mask) if self.excluded else self.mask
        return Cells.of_picture(keep, width, height)

    def inside(self, box: Box) -> NDArray[np.bool_]:
        """Return (H, W) bool: the pixels of a box of the view that are to be analysed."""
        return _rasterised(self.polygons, box) ^ self.excluded


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
    roi = RegionOfInterest.of(read_polygons(path, view.downsample, origin), view)
    if not roi.mask.any():
        raise SlideError(
            f"{path}: no polygon lies on the slide {view.slide.path}; coordinates are pixels of level 0, "
            f"check that the two belong together{_other_origin(view, origin)}"
        )
    return roi


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

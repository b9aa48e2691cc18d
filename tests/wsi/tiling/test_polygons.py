"""Regions of interest are as drawn, whatever box they are asked with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from histostream.wsi.errors import SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.polygons import RegionOfInterest, read_roi
from tests.wsi.tiling.test_tissue import GLASS, PINK, PIXELS, drawn


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def polygon(*rings: list[list[float]]) -> dict[str, object]:
    return {"type": "Polygon", "coordinates": list(rings)}


def saved(folder: Path, geometry: object) -> Path:
    path = folder / "regions.geojson"
    path.write_text(json.dumps(geometry))
    return path


SQUARE = polygon(square(400, 800, 320))


@pytest.mark.parametrize(
    "geometry",
    [
        SQUARE,
        {"type": "Feature", "geometry": SQUARE, "properties": {}},
        {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": SQUARE}]},
        [{"type": "Feature", "geometry": SQUARE}, {"type": "Feature", "geometry": None}],
        {"type": "MultiPolygon", "coordinates": [SQUARE["coordinates"]]},
        {
            "type": "GeometryCollection",
            "geometries": [SQUARE, {"type": "Point", "coordinates": [1, 2]}],
        },
    ],
    ids=["polygon", "feature", "collection", "list", "multipolygon", "geometries"],
)
def test_regions_are_read_from_every_kind_of_geojson(tmp_path: Path, geometry: object) -> None:
    view = at_mpp(drawn(GLASS, PINK, None).slide, 4.0)  # half of level 0's pixels a side
    region = read_roi(saved(tmp_path, geometry), view)
    expected = np.zeros((800, 800), bool)
    expected[400:560, 200:360] = True
    inside = region.inside(Box(0, 0, 800, 800))
    assert (inside != expected).sum() <= 2 * 160 + 1  # the outline's far sides count as inside
    np.testing.assert_array_equal(region.inside(Box(190, 390, 50, 60)), inside[390:450, 190:240])
    kept = region.tiles(TileGrid.cover(800, 800, tile_px=100, overlap_px=0))
    assert np.argwhere(kept).tolist() == [[y, x] for y in (4, 5) for x in (2, 3)]


def test_holes_stay_out_but_not_of_other_polygons(tmp_path: Path) -> None:
    with_hole = polygon(square(100, 100, 600), square(200, 200, 400))
    polygons = [polygon(square(300, 300, 100)), with_hole]
    collection = {"type": "GeometryCollection", "geometries": polygons}
    view = drawn(GLASS, PINK, None)
    inside = read_roi(saved(tmp_path, collection), view).inside(Box(0, 0, PIXELS, PIXELS))
    assert inside[150, 150]
    assert not inside[250, 250]
    assert inside[350, 350]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid GeoJSON"),
        ("3", "not valid GeoJSON"),
        ("{}", "not valid GeoJSON"),
        ('{"type": "Polygon", "coordinates": [[1, 2]]}', "not valid GeoJSON"),
        ('{"type": "Polygon", "coordinates": []}', "not valid GeoJSON"),
        ('{"type": "FeatureCollection", "features": []}', "holds no polygon"),
        ('{"type": "Point", "coordinates": [1, 2]}', "holds no polygon"),
        (json.dumps(polygon(square(-900, -900, 300))), "no polygon lies on the slide"),
        (json.dumps(polygon(square(90000, 90000, 300))), "no polygon lies on the slide"),
    ],
)
def test_files_without_regions_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "regions.geojson"
    path.write_text(text)
    with pytest.raises(SlideError, match=rf"regions\.geojson: {reason}"):
        read_roi(path, drawn(GLASS, PINK, None))


def test_a_missing_region_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"none\.geojson: cannot be read"):
        read_roi(tmp_path / "none.geojson", drawn(GLASS, PINK, None))


def test_a_pixel_lies_inside_or_not_whatever_box_it_is_asked_with() -> None:
    """Column bands and strips must meet without a seam, also at slanted edges and fractions."""
    rng = np.random.default_rng(0)
    for i in range(60):
        rings = [rng.uniform(-20, 620, (int(rng.integers(3, 9)), 2))]
        if i % 2:
            rings.append(rng.uniform(100, 400, (4, 2)))
        roi = RegionOfInterest((tuple(rings),), np.ones((1, 1), bool))
        whole = roi.inside(Box(0, 0, 600, 600))
        for x0, x1 in ((0, 200), (200, 451), (451, 600)):
            for y0, y1 in ((0, 37), (37, 301), (301, 600)):
                part = roi.inside(Box(x0, y0, x1 - x0, y1 - y0))
                np.testing.assert_array_equal(part, whole[y0:y1, x0:x1])

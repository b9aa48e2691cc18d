"""Tissue is found on stained, unstained and dark slides; regions of interest are as drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from histostream.wsi.errors import SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import SlideView, at_mpp
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.tissue import RegionOfInterest, TissueMask, _without_small, find_tissue, read_roi
from tests.wsi.slides.test_resolution import ArraySlide

GLASS, PINK, GREY_BLUE = (243, 242, 240), (220, 150, 190), (185, 190, 200)
PIXELS = 1600  # at 2 um: 3.2 mm


def drawn(ground: tuple[int, ...], colour: tuple[int, ...], box: Box | None) -> SlideView:
    """Return a view of a slide of noise around one colour, with a box of another."""
    pixels = np.empty((PIXELS, PIXELS, len(ground)), np.int16)
    pixels[...] = ground
    if box:
        pixels[box.y : box.bottom, box.x : box.right] = colour
    pixels += np.random.default_rng(2).integers(-4, 5, pixels.shape, dtype=np.int16)
    slide = ArraySlide(np.clip(pixels, 0, 255).astype(np.uint8), mpp=2.0)
    return at_mpp(slide, None)


@pytest.mark.parametrize(
    ("ground", "colour"),
    [(GLASS, PINK), (GLASS, GREY_BLUE), ((5, 5, 5), (5, 5, 60)), ((240,), (180,)), ((4,), (90,))],
    ids=["stained", "pale", "fluorescence", "grey", "grey and dark"],
)
def test_tissue_is_found_and_no_more(ground: tuple[int, ...], colour: tuple[int, ...]) -> None:
    box = Box(400, 800, 320, 160)
    tissue = find_tissue(drawn(ground, colour, box))
    grid = TileGrid.cover(PIXELS, PIXELS, tile_px=80, overlap_px=0)
    expected = np.zeros((20, 20), bool)
    expected[9:13, 4:10] = True  # the box is 10:12, 5:9; its widened border touches one more
    np.testing.assert_array_equal(tissue.tiles(grid), expected)


def test_all_tissue_is_kept() -> None:
    assert find_tissue(drawn(PINK, PINK, None)).mask.all()


@pytest.mark.parametrize("ground", [GLASS, (255, 255, 255), (215, 212, 214)])
def test_all_glass_is_dropped(ground: tuple[int, ...]) -> None:
    tissue = find_tissue(drawn(ground, ground, None))
    assert not tissue.mask.any()


@pytest.mark.parametrize("scale", [1, 20])
def test_an_electron_micrograph_is_tissue_everywhere(scale: int) -> None:
    slide = ArraySlide(drawn((240,), (180,), Box(0, 0, 9, 9)).slide.read(0, 0, 0, 640, 320), 0.005)
    view = at_mpp(slide, 0.005 * scale)
    assert view.width == 640 // scale
    tissue = find_tissue(view)
    assert tissue.mask.all()


def test_specks_are_dropped_by_their_area() -> None:
    view = drawn(GLASS, PINK, Box(800, 800, 40, 40))  # 80 um x 80 um
    assert not find_tissue(view).mask.any()
    assert find_tissue(view, min_area_um2=3000).mask.any()


def test_pieces_are_measured_whole_whatever_their_shape() -> None:
    mask = np.zeros((9, 12), bool)
    mask[0, 0:3] = mask[1, 3] = mask[2, 4:6] = True  # joined at corners: 6
    mask[4:9, 0] = mask[8, 0:5] = mask[4:9, 4] = True  # a U: 13
    mask[0, 10:12] = mask[5, 11] = mask[6, 0] = True  # 2, 1; the last belongs to the U
    for least, pixels in [(1, 22), (2, 21), (3, 19), (7, 13), (14, 0)]:
        kept = _without_small(mask, least)
        assert kept.sum() == pixels
        assert not (kept & ~mask).any()


def test_every_mask_pixel_keeps_the_tiles_that_it_lies_on() -> None:
    grid = TileGrid.cover(1000, 700, tile_px=128, overlap_px=32)
    for row, column in [(0, 0), (6, 9), (3, 4)]:
        mask = np.zeros((7, 10), bool)
        mask[row, column] = True
        kept = TissueMask(mask).tiles(grid)
        for tile in grid:
            box = tile.write
            touches = box.x < 100 * (column + 1) and box.right > 100 * column
            touches &= box.y < 100 * (row + 1) and box.bottom > 100 * row
            assert kept[tile.row, tile.column] == touches


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("CMU-1-Small-Region.svs", 0.35, 0.60),
        ("luna-1065626.svs", 0.005, 0.03),  # nearly all glass
        ("test3-DAPI-2-387.ndpi", 0.3, 0.95),  # dark ground
        ("OS-1-detail.ome.tif", 0.99, 1.0),  # nothing but tissue
        ("OS-2-ndpi.ome.tif", 0.7, 1.0),  # immunohistochemistry: blue and brown, pale
        ("camelyon_jpeg.dcm", 0.2, 0.4),  # 29 um per pixel
        ("dicom-cmu-1-small-region-ybr", 0.35, 0.60),
    ],
)
def test_real_slides(wsi_slides: Path, name: str, low: float, high: float) -> None:
    with open_slide(wsi_slides / name) as slide:
        assert low <= find_tissue(at_mpp(slide, None)).mask.mean() <= high


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

"""What is analysed, pixel by pixel: a pixel is or is not, whatever rows and columns it comes with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from histostream.wsi.geometry import Box
from histostream.wsi.outputs.label_rows import NOT_ANALYSED
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.tiling.area import AnalysedArea
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.polygons import RegionOfInterest, read_roi
from tests.wsi.slides.test_resolution import ArraySlide

RNG = np.random.default_rng(5)


def view_of(width: int, height: int, scale: float = 1.0) -> SlideView:
    slide = ArraySlide(np.zeros((round(height * scale), round(width * scale), 3), np.uint8))
    return SlideView(slide, 0, scale, 0.5)


def outside(area: AnalysedArea, box: Box) -> NDArray[np.bool_]:
    labels, scores = np.zeros((box.height, box.width), np.uint8), np.ones((box.height, box.width, 2), np.uint16)
    area.leave_out(box, labels, scores)
    np.testing.assert_array_equal(labels == NOT_ANALYSED, (scores == 0).all(axis=2))
    np.testing.assert_array_equal(labels == NOT_ANALYSED, (scores == 0).any(axis=2))
    left_out: NDArray[np.bool_] = labels == NOT_ANALYSED
    return left_out


def by_centres(mask: NDArray[np.bool_], width: int, height: int) -> NDArray[np.bool_]:
    """Look up the pixel of the mask under the centre of each pixel, one by one."""
    rows = [int((y + 0.5) * mask.shape[0] / height) for y in range(height)]
    columns = [int((x + 0.5) * mask.shape[1] / width) for x in range(width)]
    return mask[np.ix_(rows, columns)]


@pytest.mark.parametrize("shape", [(7, 10), (21, 30), (23, 31), (70, 100), (211, 300), (400, 555), (1, 1), (3, 1)])
def test_a_pixel_is_analysed_if_the_mask_is_set_under_its_centre(shape: tuple[int, int]) -> None:
    mask = RNG.random(shape) < 0.6
    area = AnalysedArea.of(view_of(300, 211), [mask])
    np.testing.assert_array_equal(outside(area, Box(0, 0, 300, 211)), ~by_centres(mask, 300, 211))


def test_no_division_into_rows_and_columns_changes_a_pixel(tmp_path: Path) -> None:
    view = view_of(300, 211, 1.7)
    view.slide.missing = (RNG.random((23, 32)) < 0.2,)
    path = tmp_path / "roi.geojson"
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [[[20, 10], [480, 40], [90, 350], [20, 10]]]}))
    masks = [RNG.random((40, 50)) < 0.8, RNG.random((500, 700)) < 0.9]
    area = AnalysedArea.of(view, masks, [read_roi(path, view)])
    whole = outside(area, Box(0, 0, 300, 211))
    assert 0.1 < whole.mean() < 0.99
    for x0, x1 in ((0, 64), (64, 65), (65, 300)):
        for y0, y1 in ((0, 1), (1, 48), (48, 211)):
            part = outside(area, Box(x0, y0, x1 - x0, y1 - y0))
            np.testing.assert_array_equal(part, whole[y0:y1, x0:x1])


def test_every_part_has_to_keep_a_pixel(tmp_path: Path) -> None:
    view = view_of(160, 96)
    absent = np.zeros((6, 10), bool)
    absent[2, 3] = True
    view.slide.missing = (absent,)
    path = tmp_path / "roi.geojson"
    square = [[16, 16], [111, 16], [111, 79], [16, 79], [16, 16]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [square]}))
    mask = np.ones((6, 10), bool)
    mask[:, 5:] = False
    area = AnalysedArea.of(view, [mask], [read_roi(path, view)])
    expected = np.zeros((96, 160), bool)
    expected[16:80, 16:80] = True  # the polygon, as far as the mask goes
    expected[32:48, 48:64] = False  # the block
    np.testing.assert_array_equal(~outside(area, Box(0, 0, 160, 96)), expected)


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.3, 4.0])
def test_pixels_that_touch_an_absent_block_are_left_out_and_no_others(scale: float) -> None:
    view = view_of(120, 80, scale)
    width, height = (-(-int(side) // 16) for side in (view.slide.levels[0].width, view.slide.levels[0].height))
    absent = RNG.random((height, width)) < 0.15
    view.slide.missing = (absent,)
    expected = np.zeros((view.height, view.width), bool)
    for y in range(view.height):
        for x in range(view.width):
            rows = range(int(y * scale) // 16, min(int(np.ceil((y + 1) * scale - 1e-9) - 1) // 16, height - 1) + 1)
            columns = range(int(x * scale) // 16, min(int(np.ceil((x + 1) * scale - 1e-9) - 1) // 16, width - 1) + 1)
            expected[y, x] = any(absent[i, j] for i in rows for j in columns)
    area = AnalysedArea.of(view)
    np.testing.assert_array_equal(outside(area, Box(0, 0, view.width, view.height)), expected)


@pytest.mark.parametrize("shape", [(9, 14), (47, 66), (300, 400)])
def test_tiles_are_those_whose_write_box_has_a_pixel_to_analyse(shape: tuple[int, int]) -> None:
    mask = RNG.random(shape) < 3 / np.prod(shape) * 10
    area = AnalysedArea.of(view_of(333, 222), [mask])
    grid = TileGrid.cover(333, 222, tile_px=64, overlap_px=16)
    analysed = ~outside(area, Box(0, 0, 333, 222))
    kept = area.tiles(grid)
    for tile in grid:
        box = tile.write
        assert kept[tile.row, tile.column] == analysed[box.y : box.bottom, box.x : box.right].any()


def test_no_tile_with_a_pixel_to_analyse_is_lost_whatever_limits_the_area(tmp_path: Path) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        view = view_of(333, 222, 1.3)
        view.slide.missing = (rng.random((19, 28)) < 0.5,)
        rings = (rng.uniform(-20, 330, (5, 2)),)
        excluded = (rng.uniform(-20, 330, (4, 2)),)
        regions = [
            RegionOfInterest((rings,), RegionOfInterest.of([], view).mask | True),
            RegionOfInterest((excluded,), np.zeros((10, 15), bool), excluded=True),
        ]
        area = AnalysedArea.of(view, [rng.random((30, 40)) < 0.2], regions)
        analysed = ~outside(area, Box(0, 0, 333, 222))
        grid = TileGrid.cover(333, 222, tile_px=32, overlap_px=0)
        kept = area.tiles(grid)
        for tile in grid:
            box = tile.write
            assert kept[tile.row, tile.column] or not analysed[box.y : box.bottom, box.x : box.right].any()


def test_without_limits_all_is_analysed() -> None:
    area = AnalysedArea.of(view_of(300, 200))
    assert area.is_whole
    assert not outside(area, Box(5, 6, 70, 80)).any()
    assert area.tiles(TileGrid.cover(300, 200, tile_px=64, overlap_px=0)).all()

"""Tissue is found on stained, unstained and dark slides; what was not scanned is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from histostream.wsi.geometry import Box
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import SlideView, at_mpp
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.tissue import TissueMask, _pieces, find_tissue
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


def with_box(view: SlideView, box: Box, colour: tuple[int, ...]) -> SlideView:
    """Return the view with a box of one colour, with the same noise."""
    pixels = view.slide.read(0, 0, 0, view.width, view.height)
    rows, columns = slice(box.y, box.bottom), slice(box.x, box.right)
    noise = pixels[rows, columns].astype(np.int16) - np.median(pixels, axis=(0, 1)).astype(np.int16)
    pixels[rows, columns] = np.clip(colour + noise, 0, 255)
    return at_mpp(ArraySlide(pixels, mpp=view.mpp), None)


def test_specks_are_dropped_by_their_area_where_there_are_larger_pieces() -> None:
    speck = drawn(GLASS, PINK, Box(800, 800, 40, 40))  # 80 um x 80 um
    both = with_box(speck, Box(100, 100, 60, 60), PINK)  # 120 um x 120 um
    assert find_tissue(both).mask[20:50, 20:50].any()
    assert not find_tissue(both).mask[190:220, 190:220].any()
    assert find_tissue(both, min_area_um2=3000).mask[190:220, 190:220].any()


@pytest.mark.parametrize("side", [16, 20, 40])  # 32 um and more
def test_where_all_pieces_are_small_the_largest_are_kept(side: int) -> None:
    cells = drawn(GLASS, PINK, Box(800, 800, side, side))
    cells = with_box(cells, Box(400, 400, side // 2, side), PINK)  # half as large
    mask = find_tissue(cells).mask
    assert mask[200 : 200 + side // 4, 200 : 200 + side // 4].all()
    assert mask[100 : 100 + side // 4, 100].all()
    assert mask.sum() <= 2 * (side // 4 + 8) ** 2  # and no glass but the margin


def test_gaps_within_tissue_are_tissue_up_to_the_least_area() -> None:
    lumen = drawn(PINK, GLASS, Box(800, 800, 44, 44))  # 88 um x 88 um; narrower by the margin
    assert find_tissue(lumen).mask.all()
    assert not find_tissue(drawn(PINK, GLASS, Box(800, 800, 160, 160))).mask.all()


def test_pieces_are_measured_whole_whatever_their_shape() -> None:
    mask = np.zeros((9, 12), bool)
    mask[0, 0:3] = mask[1, 3] = mask[2, 4:6] = True  # joined at corners: 6
    mask[4:9, 0] = mask[8, 0:5] = mask[4:9, 4] = True  # a U: 13
    mask[0, 10:12] = mask[5, 11] = mask[6, 0] = True  # 2, 1; the last belongs to the U
    cases = [(1, 1, 22), (2, 1, 21), (3, 1, 19), (7, 1, 13)]
    cases += [(14, 1, 21), (200, 7, 13), (200, 14, 0)]  # none is so large: a tenth of the largest, if it is a cell
    for least, cell, pixels in cases:
        kept = _pieces(mask, least, cell)
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

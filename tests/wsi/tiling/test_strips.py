"""Laws of strips: tiles equal the padded whole image, and no block is decoded twice or in vain."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from histostream.wsi.errors import SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.slides.reader import SlideReader, open_slide
from histostream.wsi.slides.resolution import SlideView, at_mpp
from histostream.wsi.tiling.grid import Strip, Tile, TileGrid
from histostream.wsi.tiling.strips import cut, read_strips

BLOCK_W, BLOCK_H = 48, 32


def make_slide(folder: Path, width: int, height: int) -> SlideReader:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tifffile.imwrite(folder / "slide.tif", pixels, photometric="rgb", tile=(BLOCK_H, BLOCK_W))
    return open_slide(folder / "slide.tif", reader="tiff")


def assert_tiles_are_the_padded_image(view: SlideView, grid: TileGrid, **options: Any) -> None:
    whole = view.read(0, 0, view.width, view.height)
    bottom = max(grid.ys) + grid.tile_px - view.height
    right = max(grid.xs) + grid.tile_px - view.width
    padding = ((0, max(bottom, 0)), (0, max(right, 0)), (0, 0))
    padded = np.pad(whole, padding, mode="reflect")
    seen = []
    for tiles, strip in read_strips(view, grid, **options):
        for tile in tiles:
            seen.append(tile)
            box = tile.read
            got = cut(strip, tile, width=view.width, height=view.height)
            np.testing.assert_array_equal(got, padded[box.y : box.bottom, box.x : box.right])
    assert seen == list(grid)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 70), (33, 2), (65, 64), (200, 150), (129, 257)])
@pytest.mark.parametrize(("tile_px", "overlap_px", "align_px"), [(64, 0, 1), (64, 16, 1), (64, 32, 32), (64, 0, 64)])
def test_tiles_equal_the_padded_whole_image(
    tmp_path: Path, width: int, height: int, tile_px: int, overlap_px: int, align_px: int
) -> None:
    grid = TileGrid.cover(width, height, tile_px=tile_px, overlap_px=overlap_px, align_px=align_px)
    with make_slide(tmp_path, width, height) as slide:
        assert_tiles_are_the_padded_image(SlideView(slide, 0, 1.0, None), grid)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("scale", [1.0, 2.0, 1.37, 0.6])
def test_threads_and_resampling_change_nothing(tmp_path: Path, scale: float, threads: int, prefetch: int) -> None:
    with make_slide(tmp_path, 301, 230) as slide:
        view = SlideView(slide, 0, scale, None)
        grid = TileGrid.cover(view.width, view.height, tile_px=64, overlap_px=24, align_px=8)
        assert_tiles_are_the_padded_image(view, grid, threads=threads, prefetch=prefetch)


@pytest.mark.parametrize("scale", [1.0, 1.37, 2.0])
@pytest.mark.parametrize("overlap_px", [0, 40])
def test_each_block_is_decoded_once(tmp_path: Path, scale: float, overlap_px: int) -> None:
    with make_slide(tmp_path, 301, 230) as slide:
        view = SlideView(slide, 0, scale, None)
        grid = TileGrid.cover(view.width, view.height, tile_px=64, overlap_px=overlap_px)
        list(read_strips(view, grid))
        assert slide.decoded_blocks == -(-301 // BLOCK_W) * -(-230 // BLOCK_H)


def test_blocks_that_no_tile_needs_are_not_decoded_and_stay_white(tmp_path: Path) -> None:
    with make_slide(tmp_path, 600, 600) as slide:
        view = SlideView(slide, 0, 1.0, None)
        grid = TileGrid.cover(600, 600, tile_px=64, overlap_px=0)
        keep = np.zeros((len(grid.ys), len(grid.xs)), bool)
        keep[0, 0] = keep[0, 5] = keep[3, 2] = True
        strips = list(read_strips(view, grid.where(keep)))
        assert [len(tiles) for tiles, _ in strips] == [2, 1]
        first = strips[0][1]
        assert (first.x, first.y, first.pixels.shape) == (0, 0, (64, 6 * 64, 3))
        assert (first.pixels[:, 64:320] == 255).all()
        # A tile of 64 x 64 lies on 2 rows of 32, and from column 0, 320, 128 on 2, 2, 2 of 48.
        assert slide.decoded_blocks == 2 * (2 + 2 + 2)


def test_kept_tiles_equal_those_of_the_full_grid(tmp_path: Path) -> None:
    with make_slide(tmp_path, 301, 400) as slide:
        view = SlideView(slide, 0, 1.37, None)
        grid = TileGrid.cover(view.width, view.height, tile_px=64, overlap_px=24)
        keep = np.random.default_rng(5).random((len(grid.ys), len(grid.xs))) < 0.4
        assert_tiles_are_the_padded_image(view, grid.where(keep))


def test_a_band_reads_only_its_columns(tmp_path: Path) -> None:
    with make_slide(tmp_path, 600, 200) as slide:
        view = SlideView(slide, 0, 1.0, None)
        grid = TileGrid.cover(600, 200, tile_px=64, overlap_px=0).band(0, 100)
        assert {strip.pixels.shape[1] for _, strip in read_strips(view, grid)} == {128}
        assert slide.decoded_blocks == 3 * -(-200 // BLOCK_H)


def break_block(folder: Path, number: int) -> None:
    """Make one block of the slide unreadable, by a compression that checks its data."""
    path = folder / "slide.tif"
    pixels = tifffile.imread(path)
    options: dict[str, Any] = {
        "photometric": "rgb",
        "tile": (BLOCK_H, BLOCK_W),
        "compression": "zlib",
    }
    tifffile.imwrite(path, pixels, **options)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[number]
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * 32)


def test_a_damaged_block_is_an_error_for_the_consumer(tmp_path: Path) -> None:
    make_slide(tmp_path, 300, 300).close()
    break_block(tmp_path, 30)
    with open_slide(tmp_path / "slide.tif") as slide:
        view = SlideView(slide, 0, 1.0, None)
        grid = TileGrid.cover(300, 300, tile_px=64, overlap_px=0)
        with pytest.raises(SlideError, match=r"slide\.tif: block 2, 4 of level 0"):
            list(read_strips(view, grid))


def test_a_damaged_block_can_be_left_white(tmp_path: Path) -> None:
    make_slide(tmp_path, 300, 300).close()
    break_block(tmp_path, 30)
    bad: list[Box] = []
    with open_slide(tmp_path / "slide.tif") as slide:
        view = SlideView(slide, 0, 1.0, None)
        grid = TileGrid.cover(300, 300, tile_px=64, overlap_px=0)
        strips = list(read_strips(view, grid, on_bad_block=lambda box, error: bad.append(box)))
    assert bad == [Box(96, 128, 48, 32)]
    strip = strips[2][1]
    assert (strip.pixels[: 160 - strip.y, 96:144] == 255).all()


def test_closing_early_stops_the_threads(tmp_path: Path) -> None:
    with make_slide(tmp_path, 300, 600) as slide:
        view = SlideView(slide, 0, 1.0, None)
        strips = read_strips(view, TileGrid.cover(300, 600, tile_px=64, overlap_px=0))
        next(strips)
        strips.close()
        names = {thread.name for thread in threading.enumerate()}
        assert not any(name.startswith(("decode", "strips")) for name in names)
        assert slide.decoded_blocks < 7 * 19


def test_a_grid_of_another_size_is_refused(tmp_path: Path) -> None:
    with make_slide(tmp_path, 300, 300) as slide:
        grid = TileGrid.cover(299, 300, tile_px=64, overlap_px=0)
        with pytest.raises(ValueError, match="the grid covers 299x300 px, the view has 300x300"):
            next(read_strips(SlideView(slide, 0, 1.0, None), grid))


def test_a_cut_tile_is_mirrored_at_the_border() -> None:
    pixels = np.arange(3, dtype=np.uint8).reshape(1, 3, 1)
    tile = Tile(0, 0, Box(0, 0, 8, 2), Box(0, 0, 3, 1))
    got = cut(Strip(0, 0, pixels), tile, width=3, height=1)
    assert got[..., 0].tolist() == [[0, 1, 2, 1, 0, 1, 2, 1]] * 2


@pytest.mark.parametrize("mpp", [None, 0.8])
@pytest.mark.parametrize("reader", ["tiff", "large_image"])
def test_a_real_slide_is_cut_as_if_read_whole(wsi_slides: Path, mpp: float | None, reader: str) -> None:
    with open_slide(wsi_slides / "CMU-1-Small-Region.svs", reader=reader) as slide:
        view = at_mpp(slide, mpp)
        grid = TileGrid.cover(view.width, view.height, tile_px=512, overlap_px=64, align_px=32)
        assert_tiles_are_the_padded_image(view, grid)
        # 10 x 13 tiles in the file, once for the whole image and once for all strips.
        assert slide.decoded_blocks == 2 * 10 * 13

"""Laws of the grid: write boxes cover each pixel once, and each tile answers for what it reads."""

from __future__ import annotations

import numpy as np
import pytest

from histostream.wsi.tiling.grid import TileGrid

SIZES = [(1, 1), (16, 16), (17, 33), (64, 20), (100, 63), (129, 200)]
TILES = [
    (16, 0, 1),
    (16, 4, 1),
    (16, 15, 1),
    (32, 16, 16),
    (32, 0, 32),
    (48, 16, 8),
    (33, 17, 16),
    (33, 1, 16),
    (20, 8, 6),
]


@pytest.fixture(params=SIZES, ids=str)
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    width, height = request.param
    return width, height


@pytest.fixture(params=TILES, ids=str)
def grid(size: tuple[int, int], request: pytest.FixtureRequest) -> TileGrid:
    tile_px, overlap_px, align_px = request.param
    width, height = size
    return TileGrid.cover(width, height, tile_px=tile_px, overlap_px=overlap_px, align_px=align_px)


def covered(grid: TileGrid) -> np.ndarray:
    count = np.zeros((grid.height, grid.width), int)
    for tile in grid:
        box = tile.write
        count[box.y : box.bottom, box.x : box.right] += 1
    return count


def test_write_boxes_cover_each_pixel_once(grid: TileGrid) -> None:
    assert (covered(grid) == 1).all()


def test_each_write_box_lies_in_its_read_box_and_on_the_slide(grid: TileGrid) -> None:
    for tile in grid:
        read, write = tile.read, tile.write
        assert read.x <= write.x < write.right <= min(read.right, grid.width)
        assert read.y <= write.y < write.bottom <= min(read.bottom, grid.height)


def test_tiles_start_at_multiples_of_the_alignment(grid: TileGrid) -> None:
    assert all(start % grid.align_px == 0 for start in (*grid.xs, *grid.ys))


def test_neighbours_share_at_least_the_overlap(grid: TileGrid) -> None:
    for starts in (grid.xs, grid.ys):
        steps = np.diff(starts)
        assert (steps > 0).all()
        assert (steps <= grid.tile_px - grid.overlap_px).all()


def test_bands_together_cover_what_the_whole_grid_covers(grid: TileGrid) -> None:
    middle = grid.width // 2
    if middle == 0:
        pytest.skip("one column of pixels has no two bands")
    left, right = grid.band(0, middle), grid.band(middle, grid.width)
    assert (covered(left)[:, :middle] == 1).all()
    assert (covered(right)[:, middle:] == 1).all()


def test_only_kept_tiles_are_visited() -> None:
    grid = TileGrid.cover(100, 60, tile_px=32, overlap_px=8)
    keep = np.zeros((len(grid.ys), len(grid.xs)), bool)
    keep[1, 2] = keep[0, 0] = True
    kept = grid.where(keep)
    assert [(tile.row, tile.column) for tile in kept] == [(0, 0), (1, 2)]
    assert len(kept) == 2


@pytest.mark.parametrize(
    ("width", "tile_px", "overlap_px", "align_px"),
    [(0, 16, 0, 1), (9, 0, 0, 1), (9, 16, 16, 1), (9, 16, -1, 1), (9, 20, 0, 16), (9, 32, 8, 16), (9, 16, 0, 17)],
)
def test_grids_that_make_no_sense_are_refused(width: int, tile_px: int, overlap_px: int, align_px: int) -> None:
    with pytest.raises(ValueError, match="px"):
        TileGrid.cover(width, 9, tile_px=tile_px, overlap_px=overlap_px, align_px=align_px)

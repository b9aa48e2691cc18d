from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from histostream.runtime.choices import WINDOWS
from histostream.runtime.stream.blend import (
    FULL,
    Blender,
    BlendError,
    axis_profile,
    check_blend,
    exact_overlap_px,
    profile,
)
from histostream.wsi.outputs.label_rows import NOT_ANALYSED
from histostream.wsi.tiling.grid import TileGrid
from tests.runtime.conftest import CARD, as_scores, as_shares

SIZES = [(1, 1), (5, 300), (64, 64), (65, 63), (211, 157), (300, 130)]
GRIDS = [(64, 0), (64, 16), (64, 31), (64, 32), (48, 7)]


def pad(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, max(0, size - height)), (0, max(0, size - width)), (0, 0)), mode="reflect")


def blended(
    grid: TileGrid,
    pixels: NDArray[np.uint8],
    mode: str,
    scores_of: NDArray[np.uint8] | None = None,
    order: int = 1,
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Blend with scores that are the pixels (see `as_scores`) plus a pattern fixed to the tile."""
    source = pad(pixels, grid.tile_px)
    blender = Blender(grid, 3, mode, probabilities=True)
    labels, probabilities = [], []
    for row in range(len(grid.ys)):
        for tile in grid.row(row)[::order]:
            box = tile.read
            scores = source[box.y : box.bottom, box.x : box.right].transpose(2, 0, 1)
            blender.add(tile, as_scores(scores if scores_of is None else scores // 2 + scores_of))
        part = blender.finish_row(row)
        assert part.probabilities is not None
        labels.append(part.labels)
        probabilities.append(part.probabilities)
    return np.concatenate(labels), np.concatenate(probabilities)


@pytest.mark.parametrize("mode", WINDOWS)
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize(("tile_px", "overlap_px"), GRIDS)
def test_scores_that_are_the_pixels_give_the_slide_back(
    mode: str, width: int, height: int, tile_px: int, overlap_px: int
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    grid = TileGrid.cover(width, height, tile_px=tile_px, overlap_px=overlap_px)
    labels, probabilities = blended(grid, pixels, mode)
    np.testing.assert_array_equal(probabilities, as_shares(pixels))
    np.testing.assert_array_equal(labels, pixels.argmax(axis=-1))


@pytest.mark.parametrize("mode", WINDOWS)
def test_column_bands_and_tile_order_change_nothing(mode: str) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (150, 310, 3), dtype=np.uint8)
    grid = TileGrid.cover(310, 150, tile_px=64, overlap_px=24)
    pattern = np.random.default_rng(3).integers(0, 120, (3, 64, 64), dtype=np.uint8)
    labels, probabilities = blended(grid, pixels, mode, pattern)
    for order, edges in itertools.product((1, -1), ([0, 310], [0, 128, 310], [0, 7, 90, 309, 310])):
        parts = [blended(grid.band(x0, x1), pixels, mode, pattern, order) for x0, x1 in itertools.pairwise(edges)]
        np.testing.assert_array_equal(np.hstack([p[0] for p in parts]), labels)
        np.testing.assert_array_equal(np.hstack([p[1] for p in parts]), probabilities)


@pytest.mark.parametrize("mode", ["hann", "linear"])
@pytest.mark.parametrize(("tile_px", "overlap_px"), [(8, 2), (9, 4), (512, 64), (16, 8), (7, 1)])
def test_profiles_of_neighbours_sum_to_full_weight(mode: str, tile_px: int, overlap_px: int) -> None:
    weight = profile(mode, tile_px, overlap_px)
    shared = weight[tile_px - overlap_px :] + weight[:overlap_px]
    np.testing.assert_array_equal(shared, FULL)
    assert weight.min() >= 1


@pytest.mark.parametrize("mode", WINDOWS)
@pytest.mark.parametrize(("tile_px", "overlap_px"), [(64, 32), (64, 24), (33, 16), (16, 1), (512, 256)])
def test_sums_fit_the_accumulator_wherever_tiles_meet(mode: str, tile_px: int, overlap_px: int) -> None:
    """The last tile is shifted in by any amount, so three tiles can meet along an axis."""
    base = profile(mode, tile_px, overlap_px).astype(np.int64)
    for length in (tile_px, *range(2 * tile_px, 4 * tile_px, max(tile_px // 16, 1))):
        starts = TileGrid.cover(length, 1, tile_px=tile_px, overlap_px=overlap_px).xs
        total = np.zeros(starts[-1] + tile_px, np.int64)
        for i, start in enumerate(starts):
            total[start : start + tile_px] += axis_profile(mode, base.astype(np.uint32), starts, i)
        assert int(total.max()) ** 2 * 2**14 < 2**32


@pytest.mark.parametrize("mode", WINDOWS)
def test_left_out_tiles_are_outside_and_do_not_dim_their_neighbours(mode: str) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    grid = TileGrid.cover(200, 200, tile_px=64, overlap_px=16)
    keep = np.random.default_rng(5).random((len(grid.ys), len(grid.xs))) < 0.5
    assert keep.any()
    assert not keep.all()
    grid = grid.where(keep)
    labels, probabilities = blended(grid, pixels, mode)
    reached = np.zeros((200, 200), bool)
    for tile in grid:
        box = tile.write if mode in ("crop", "exact") else tile.read
        reached[box.y : box.bottom, box.x : box.right] = True
    np.testing.assert_array_equal(labels != NOT_ANALYSED, reached)
    np.testing.assert_array_equal(probabilities[reached], as_shares(pixels[reached]))


def summed_at_once(
    grid: TileGrid, pixels: NDArray[np.uint8], mode: str, pattern: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Blend as the definition says: sums over the whole slide, no ring, no shortcut."""
    source, base = pad(pixels, grid.tile_px), profile(mode, grid.tile_px, grid.overlap_px)
    sums, weight = np.zeros((*source.shape[:2], 3), np.int64), np.zeros(source.shape[:2], np.int64)
    for tile in grid:
        place = np.s_[tile.read.y : tile.read.bottom, tile.read.x : tile.read.right]
        wy = axis_profile(mode, base, grid.ys, tile.row).astype(np.int64)
        window = np.outer(wy, axis_profile(mode, base, grid.xs, tile.column))
        # v / 256 is 64 v of 2**14
        sums[place] += window[..., None] * 64 * (source[place] // 2 + pattern.transpose(1, 2, 0)).astype(np.int64)
        weight[place] += window
    sums, weight = sums[: grid.height, : grid.width], weight[: grid.height, : grid.width]
    divisor = np.maximum(weight, 1)[..., None] * 2**14
    labels = np.where(weight == 0, NOT_ANALYSED, sums.argmax(axis=-1))
    return labels.astype(np.uint8), ((65535 * sums + divisor // 2) // divisor).astype(np.uint16)


@pytest.mark.parametrize("mode", WINDOWS)
@pytest.mark.parametrize("share", [0.03, 0.2, 0.8])
def test_left_out_tiles_change_nothing_of_the_sums(mode: str, share: float) -> None:
    """Whole rows and columns without a tile are not computed at all; nobody may see it."""
    random = np.random.default_rng(6)
    pixels = random.integers(0, 256, (400, 510, 3), dtype=np.uint8)
    pattern = random.integers(0, 120, (3, 64, 64), dtype=np.uint8)
    grid = TileGrid.cover(510, 400, tile_px=64, overlap_px=24)
    grid = grid.where(random.random((len(grid.ys), len(grid.xs))) < share)
    wanted = summed_at_once(grid, pixels, mode, pattern)
    for edges in ([0, 510], [0, 100, 101, 300, 510]):
        parts = [blended(grid.band(x0, x1), pixels, mode, pattern) for x0, x1 in itertools.pairwise(edges)]
        for found, expected in zip(zip(*parts, strict=True), wanted, strict=True):
            np.testing.assert_array_equal(np.hstack(found), expected)


def test_rows_without_tiles_take_no_memory_until_tiles_come_again() -> None:
    grid = TileGrid.cover(300, 400, tile_px=64, overlap_px=16)
    keep = np.zeros((len(grid.ys), len(grid.xs)), np.bool_)
    keep[3, 2] = True
    blender = Blender(grid.where(keep), 3, "hann", probabilities=True)
    nothing = []
    for row in range(len(grid.ys)):
        if keep[row].any():
            blender.add(grid.tile(3, 2), np.full((3, 64, 64), 0.1, np.float16))
        part = blender.finish_row(row)
        assert part.probabilities is not None
        assert (part.probabilities.max() > 0) == ((part.labels != NOT_ANALYSED).any())
        nothing.append(part.all_outside)
    assert nothing == [row not in (3, 4) for row in range(len(grid.ys))]


def test_equal_scores_go_to_the_lower_class() -> None:
    grid = TileGrid.cover(8, 8, tile_px=8, overlap_px=0)
    for classes in (2, 4):
        blender = Blender(grid, classes, "hann")
        blender.add(grid.tile(0, 0), np.full((classes, 8, 8), 0.4, np.float16))
        assert (blender.finish_row(0).labels == 0).all()


def test_exact_blending_is_refused_where_it_cannot_be_exact() -> None:
    with pytest.raises(BlendError, match="depends on the whole tile"):
        check_blend("exact", replace(CARD, tile_statistics=True), 32)
    with pytest.raises(BlendError, match="at least 40"):
        check_blend("exact", replace(CARD, halo_px=20), 32)
    with pytest.raises(BlendError, match="leaves nothing"):
        exact_overlap_px(replace(CARD, halo_px=32))


def test_unknown_blending_and_too_much_overlap_are_refused() -> None:
    with pytest.raises(BlendError, match="'hahn'"):
        check_blend("hahn", CARD, 16)
    with pytest.raises(BlendError, match="0 to 32"):
        check_blend("hann", CARD, 33)

"""Which overlap tiles get."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from histostream.runtime.layout import lay_tiles
from histostream.runtime.options import Options
from histostream.runtime.pixels import segment_pixels
from histostream.runtime.stream.blend import BlendError
from tests.runtime.conftest import CARD, IdentityEngine

SHAPES = [
    (tile_px, align_px)
    for tile_px, align_px in product(
        (1, 2, 16, 33, 48, 63, 64, 100, 256, 500, 513, 512), (1, 2, 3, 16, 31, 32, 64, 256)
    )
    if align_px <= tile_px
]


@pytest.mark.parametrize(("tile_px", "align_px"), SHAPES)
def test_the_default_overlap_fits_every_tile_and_alignment(tile_px: int, align_px: int) -> None:
    card = replace(CARD, tile_px=tile_px, align_px=align_px, halo_px=0)
    grid = lay_tiles(3 * tile_px + 7, 2 * tile_px, card, Options())
    assert 0 <= grid.overlap_px <= tile_px // 2
    assert all(start % align_px == 0 for start in (*grid.xs, *grid.ys))
    # No other overlap that fits lies between it and the usual one.
    usual = min(64, tile_px // 4)
    fitting = [o for o in range(tile_px // 2 + 1) if (tile_px - o) % align_px == 0]
    larger = [o for o in fitting if o >= usual]
    assert grid.overlap_px == (min(larger) if larger else max(fitting))


@pytest.mark.parametrize(
    ("tile_px", "align_px", "wanted", "given"),
    [
        (512, 32, 100, 128),
        (513, 16, 100, 113),
        (256, 256, 100, 0),
        (64, 32, 1, 32),
        (96, 64, 40, 32),
        (512, 1, 256, 256),
    ],
)
def test_an_overlap_is_rounded_as_the_tile_allows(tile_px: int, align_px: int, wanted: int, given: int) -> None:
    card = replace(CARD, tile_px=tile_px, align_px=align_px)
    assert lay_tiles(1000, 1000, card, Options(overlap_px=wanted)).overlap_px == given


def test_too_much_overlap_is_refused_with_the_number_that_was_given() -> None:
    card = replace(CARD, tile_px=256, align_px=48)
    with pytest.raises(BlendError, match="--overlap 150 is more than half a tile; use 0 to 128"):
        lay_tiles(1000, 1000, card, Options(overlap_px=150))
    with pytest.raises(BlendError, match="--overlap 256 leaves nothing"):
        lay_tiles(1000, 1000, card, Options(overlap_px=256, blend="exact"))


def test_exact_tiles_share_at_least_twice_the_halo_where_the_alignment_does_not_divide_the_tile() -> None:
    card = replace(CARD, tile_px=513, align_px=16, halo_px=100)
    assert lay_tiles(2000, 900, card, Options(blend="exact")).overlap_px == 209  # 513 - 19 * 16


@pytest.mark.parametrize(("tile_px", "align_px"), [(33, 16), (20, 6), (64, 64), (48, 48)])
def test_an_image_comes_back_as_it_is_from_tiles_of_any_size(tile_px: int, align_px: int) -> None:
    engine = IdentityEngine(replace(CARD, tile_px=tile_px, align_px=align_px))
    pixels = np.random.default_rng(0).integers(0, 256, (2 * tile_px + 5, 3 * tile_px + 1, 3), dtype=np.uint8)
    whole = IdentityEngine(replace(CARD, tile_px=256, align_px=1))
    assert (segment_pixels(pixels, engine) == segment_pixels(pixels, whole)).all()

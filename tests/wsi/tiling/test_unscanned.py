"""What a scanner filled with one colour is neither tissue nor analysed; dark slides and dark tissue are not filled."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from histostream.wsi.geometry import Box
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import SlideView, at_mpp
from histostream.wsi.tiling.cells import dilated
from histostream.wsi.tiling.tissue import find_tissue
from tests.wsi.slides.test_resolution import ArraySlide

SIDE = 400  # at 8 um, that of the overview: 3.2 mm
Pixels = NDArray[np.uint8]


def scanned(seed: int = 1) -> Pixels:
    """Return glass with a piece of tissue, both with noise."""
    pixels = np.full((SIDE, SIDE, 3), (243, 242, 240), np.int16)
    pixels[150:250, 125:225] = (205, 140, 180)
    noisy: NDArray[np.int64] = pixels + np.random.default_rng(seed).integers(-5, 6, pixels.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def jpeg(pixels: Pixels) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return np.asarray(Image.open(file))


def view(pixels: Pixels) -> SlideView:
    return at_mpp(ArraySlide(pixels, mpp=8.0), None)


def half(pixels: Pixels, value: int) -> None:
    pixels[:, 250:] = value


def frame(pixels: Pixels, value: int) -> None:
    for part in (pixels[:75], pixels[-75:], pixels[:, :75], pixels[:, -75:]):
        part[...] = value


def strip(pixels: Pixels, value: int) -> None:
    pixels[:, 160:190] = value  # through the tissue


def corner(pixels: Pixels, value: int) -> None:
    pixels[:325, :325] = value  # most of the slide
    pixels[140:260, 115:235] = scanned()[140:260, 115:235]


@pytest.mark.parametrize(
    ("fill", "value"),
    [
        (half, 0),
        (half, 238),
        (frame, 0),
        (frame, 90),
        (strip, 3),
        (strip, 128),
        (corner, 0),
        (corner, 200),
        (corner, 255),
    ],
)
def test_fillings_of_any_shape_and_grey_are_left_out(value: int, fill: Callable[[Pixels, int], None]) -> None:
    compress = jpeg if value != 128 else np.asarray
    truth = dilated(find_tissue(view(compress(scanned()))).mask, 2)
    pixels = scanned()
    fill(pixels, value)
    filled = (pixels == value).all(axis=2)
    found = find_tissue(view(compress(pixels)))
    inner = filled & ~(
        np.roll(~filled, 2, 0) | np.roll(~filled, -2, 0) | np.roll(~filled, 2, 1) | np.roll(~filled, -2, 1)
    )
    if value < 230:  # lighter ones cannot be told from glass, whose margin beside tissue is analysed
        assert not (found.mask & inner).any()
    else:
        assert not (found.mask & filled & ~truth).any()
    kept = np.zeros_like(truth)
    kept[155:245, 130:220] = True  # the tissue without its border
    kept &= ~filled
    near = np.zeros_like(filled)
    for shift in range(-4, 5):
        near |= np.roll(filled, shift, 1) | np.roll(filled, shift, 0)
    assert found.mask[kept & ~near].all()
    assert not (found.mask & ~truth).any()  # no rim of the filling is taken for tissue


def test_dark_tissue_is_tissue() -> None:
    pixels = scanned()
    pixels[155:245, 130:220] = np.random.default_rng(3).integers(4, 24, (90, 90, 3))  # melanin, nearly black
    assert find_tissue(view(pixels)).mask[160:240, 135:215].all()


def test_a_dark_ground_without_noise_is_no_filling() -> None:
    """Cells fade into a ground that is exactly 0."""
    yy, xx = np.mgrid[:SIDE, :SIDE]
    glow = 200 * np.exp(-((xx - 175) ** 2 + (yy - 200) ** 2) / (2 * 23.0**2))
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[..., 2] = glow
    found = find_tissue(view(pixels))
    assert found.dark_ground
    assert found.mask[200, 175]
    assert 0.005 < found.mask.mean() < 0.2


def test_damaged_blocks_are_no_filling() -> None:
    """They are grey on the overview, so that they are analysed."""
    pixels = scanned()
    pixels[50:125, 250:350] = 128
    assert not find_tissue(view(pixels)).mask[55:115, 260:340].any()
    assert find_tissue(view(pixels), damaged=[Box(250, 50, 100, 75)]).mask[55:115, 260:340].all()


@pytest.mark.parametrize(
    "name", ["CMU-1-Small-Region.svs", "luna-1065626.svs", "test3-DAPI-2-387.ndpi", "camelyon_jpeg.dcm"]
)
def test_nothing_of_scanned_slides_is_taken_for_a_filling(wsi_slides: Path, name: str) -> None:
    with open_slide(wsi_slides / name) as slide:
        unscanned = find_tissue(at_mpp(slide, None)).unscanned
        assert unscanned is not None
        assert not unscanned.any()

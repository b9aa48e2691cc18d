"""Pen ink and blur are found on real slides that ink and blur were painted on, and little else is."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import SlideView, at_mpp
from histostream.wsi.tiling.artefacts import BLURRED, Artefacts, blur_effect, find_artefacts
from histostream.wsi.tiling.cells import dilated
from histostream.wsi.tiling.tissue import TissueMask, find_tissue
from tests.wsi.slides.test_resolution import ArraySlide

# Share of light that ink lets through, in red, green and blue.
INKS = {"blue": (0.15, 0.25, 0.7), "green": (0.15, 0.5, 0.3), "red": (0.8, 0.12, 0.18), "black": (0.15, 0.15, 0.17)}
SLIDES = ("CMU-1-Small-Region.svs", "OS-2-ndpi.ome.tif")  # H&E; haematoxylin and DAB


def looked_at(view: SlideView) -> tuple[TissueMask, Artefacts]:
    tissue = find_tissue(view)
    return tissue, find_artefacts(view, None, tissue)


def pixels_of(path: Path) -> tuple[NDArray[np.uint8], float]:
    with open_slide(path) as slide:
        assert slide.mpp is not None
        return slide.read(0, 0, 0, slide.levels[0].width, slide.levels[0].height), slide.mpp


@pytest.mark.parametrize("name", [*SLIDES, "OS-1-detail.ome.tif", "OS-2-vsi.ome.tif"])
def test_clean_slides_lose_little(wsi_slides: Path, name: str) -> None:
    with open_slide(wsi_slides / name) as slide:
        tissue, found = looked_at(at_mpp(slide, None))
    assert not found.pen.any()
    assert found.blurred is not None
    assert found.blurred.mean() <= 0.01 * tissue.mask.mean()


@pytest.mark.parametrize(("name", "ink"), [*((SLIDES[0], ink) for ink in INKS), (SLIDES[1], "blue")])
def test_a_stroke_of_ink_is_found_over_tissue_and_glass(wsi_slides: Path, name: str, ink: str) -> None:
    pixels, mpp = pixels_of(wsi_slides / name)
    height, width = pixels.shape[:2]
    stroke = Image.new("L", (width, height))
    line = [(0, 0.6 * height), (0.4 * width, 0.75 * height), (width, 0.85 * height)]
    ImageDraw.Draw(stroke).line(line, fill=255, width=int(100 / mpp))
    opacity = np.asarray(stroke.filter(ImageFilter.GaussianBlur(8)))[..., None] / np.float32(255)
    inked = pixels * (1 - opacity + opacity * np.array(INKS[ink], np.float32))
    _, found = looked_at(at_mpp(ArraySlide(inked.astype(np.uint8), mpp=mpp), None))
    truth = np.asarray(stroke.resize(found.pen.shape[::-1], Image.Resampling.BOX)) > 127
    assert (found.pen & truth).sum() >= 0.97 * truth.sum()
    assert not (found.pen & ~dilated(truth, 6)).any()  # no farther than 48 um from it


@pytest.mark.parametrize(("name", "sigma_um"), [(SLIDES[0], 2), (SLIDES[0], 8), (SLIDES[1], 4)])
def test_blurred_tissue_is_found_and_the_sharp_half_is_not(wsi_slides: Path, name: str, sigma_um: int) -> None:
    pixels, mpp = pixels_of(wsi_slides / name)
    smooth = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma_um / mpp)))
    seed = zlib.crc32(name.encode())
    noisy = smooth + np.random.default_rng(seed).normal(0, 1, smooth.shape)  # that of a camera
    half = len(pixels) // 2
    pixels[half:] = np.clip(noisy[half:], 0, 255)
    tissue, found = looked_at(at_mpp(ArraySlide(pixels, mpp=mpp), None))
    assert found.blurred is not None
    rows, columns = found.blurred.shape
    share = Image.fromarray(tissue.mask.view(np.uint8) * np.uint8(255)).resize((columns, rows), Image.Resampling.BOX)
    judged = np.asarray(share) > 0.9 * 255
    middle = rows // 2
    assert found.blurred[middle + 1 :][judged[middle + 1 :]].mean() >= 0.9
    assert found.blurred[: middle - 1][judged[: middle - 1]].mean() <= 0.02


def test_the_blur_effect_is_that_of_the_paper() -> None:
    """Crete et al. 2007, equations 1 to 8, one pixel at a time."""
    grey = np.random.default_rng(0).uniform(0, 255, (30, 40)).astype(np.float32)
    expected = []
    for picture in (grey, grey.T):
        lost = total = 0.0
        for row in picture.astype(float):
            padded = np.pad(row, (5, 4), mode="edge")
            mean = [padded[i + 1 : i + 10].mean() for i in range(len(row))]
            for i in range(1, len(row)):
                change, smooth = abs(row[i] - row[i - 1]), abs(mean[i] - mean[i - 1])
                total, lost = total + change, lost + max(0, change - smooth)
        expected.append((total - lost) / total)
    assert blur_effect(grey, np.array([0]), np.array([0]))[0, 0] == pytest.approx(max(expected), abs=1e-4)


def test_the_blur_effect_does_not_depend_on_contrast() -> None:
    grey = np.random.default_rng(1).uniform(0, 200, (64, 64)).astype(np.float32)
    at = np.array([0, 32])
    paler = (grey / 8 + 40).astype(np.float32)
    assert np.abs(blur_effect(paler, at, at) - blur_effect(grey, at, at)).max() < 1e-3
    assert (blur_effect(np.full((64, 64), 7, np.float32), at, at) > BLURRED).all()  # nothing there is sharp


def test_a_coarse_slide_is_not_judged_by_its_sharpness(wsi_slides: Path) -> None:
    with open_slide(wsi_slides / "camelyon_jpeg.dcm") as slide:
        assert looked_at(at_mpp(slide, None))[1].blurred is None

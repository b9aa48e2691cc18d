"""Laws of views: no region changes a pixel, averages are exact, and the right level is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from numpy.typing import NDArray

from histostream.wsi.errors import SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.slides.reader import Level, check_box, open_slide
from histostream.wsi.slides.resolution import SlideView, at_mpp, thumbnail


@dataclass
class ArraySlide:
    """A slide in memory; level n is level 0 without all but each ``downsamples[n]``-th pixel."""

    pixels: np.ndarray
    mpp: float | None = 0.25
    mpp_source: str = "test"
    bounds: Box | None = None
    notes: tuple[str, ...] = ()
    downsamples: tuple[int, ...] = (1,)
    path: Path = Path("slide.svs")
    name: str = "array"
    decoded_blocks: int = 0
    levels: tuple[Level, ...] = field(init=False)
    block_px: tuple[tuple[int, int], ...] = field(init=False)
    channels: int = field(init=False)
    missing: tuple[NDArray[np.bool_] | None, ...] = field(init=False)

    def __post_init__(self) -> None:
        height, width, self.channels = self.pixels.shape
        self.levels = tuple(Level(width // d, height // d, float(d)) for d in self.downsamples)
        self.block_px = ((16, 16),) * len(self.levels)
        self.missing = (None,) * len(self.levels)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        check_box(self.levels[level], x, y, width, height)
        step = self.downsamples[level]
        return self.pixels[::step, ::step][y : y + height, x : x + width].copy()

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, channels), dtype=np.uint8)


def averaged(pixels: np.ndarray, scale: float) -> np.ndarray:
    """Average by the definition, in float64: overlap of each output pixel with each input pixel."""

    def weights(size: int) -> np.ndarray:
        out = np.arange(max(1, int(size / scale + 0.5)))[:, None]
        source = np.arange(size)[None, :]
        shared = np.minimum((out + 1) * scale, source + 1) - np.maximum(out * scale, source)
        shared = np.clip(shared, 0, None)
        return np.asarray(shared / shared.sum(axis=1, keepdims=True))

    height, width = pixels.shape[:2]
    rows = np.einsum("yh,hwc->ywc", weights(height), pixels.astype(float))
    return np.asarray(np.einsum("ywc,xw->yxc", rows, weights(width)))


@pytest.mark.parametrize("scale", [1.03, 1.5, 2.0, 2.004, 3.7, 4.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_coarser_pixels_are_exact_averages(scale: float, channels: int) -> None:
    slide = ArraySlide(noise(61, 83, channels))
    view = SlideView(slide, 0, scale, None)
    got = view.read(0, 0, view.width, view.height)
    # Half a grey level for the rounding, and what float32 adds to it.
    np.testing.assert_allclose(got, averaged(slide.pixels, scale), atol=0.5 + 1e-3)


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.5, 2.0, 2.004, 3.7])
def test_no_region_changes_a_pixel(scale: float) -> None:
    view = SlideView(ArraySlide(noise(200, 300)), 0, scale, None)
    whole = view.read(0, 0, view.width, view.height)
    random = np.random.default_rng(1)
    for _ in range(50):
        x, y = int(random.integers(view.width)), int(random.integers(view.height))
        width = int(random.integers(1, view.width - x + 1))
        height = int(random.integers(1, view.height - y + 1))
        got = view.read(x, y, width, height)
        np.testing.assert_array_equal(got, whole[y : y + height, x : x + width])


@pytest.mark.parametrize("scale", [0.5, 0.61, 1.9, 3.3])
def test_plain_colour_stays_plain(scale: float) -> None:
    view = SlideView(ArraySlide(np.full((50, 70, 3), 255, np.uint8)), 0, scale, None)
    assert (view.read(0, 0, view.width, view.height) == 255).all()


def test_finer_pixels_lie_between_the_centres_of_the_stored_ones() -> None:
    ramp = np.arange(0, 200, 20, dtype=np.uint8).reshape(1, 10, 1).repeat(4, axis=0)
    view = SlideView(ArraySlide(ramp), 0, 0.5, None)
    row = view.read(0, 0, 20, 8)[0, :, 0]
    assert row.tolist() == [0, *range(5, 180, 10), 180]


@pytest.mark.parametrize(
    ("mpp", "level", "scale", "view_mpp"),
    [
        (None, 0, 1.0, 0.25),
        (0.25, 0, 1.0, 0.25),
        (0.254, 0, 1.0, 0.25),  # within 2 %: as stored, and the view says so
        (0.246, 0, 1.0, 0.25),
        (0.26, 0, 1.04, 0.26),
        (0.5, 0, 2.0, 0.5),
        (0.9, 0, 3.6, 0.9),
        (1.0, 1, 1.0, 1.0),
        (0.985, 1, 1.0, 1.0),
        (3.0, 1, 3.0, 3.0),
        (8.0, 2, 2.0, 8.0),
        (0.125, 0, 0.5, 0.125),
    ],
)
def test_the_coarsest_level_that_is_fine_enough_is_read(
    mpp: float | None, level: int, scale: float, view_mpp: float
) -> None:
    view = at_mpp(ArraySlide(noise(320, 320), downsamples=(1, 4, 16)), mpp)
    assert view.level == level
    assert view.scale == pytest.approx(scale)
    assert view.mpp == pytest.approx(view_mpp)
    assert view.downsample == pytest.approx(view_mpp / 0.25)
    assert view.width == view.height == int(320 / view.downsample + 0.5)


def test_a_slide_without_resolution_needs_one() -> None:
    slide = ArraySlide(noise(8, 8), mpp=None)
    with pytest.raises(SlideError, match=r"slide\.svs: no resolution in the file; pass --mpp"):
        at_mpp(slide, 0.5)
    assert at_mpp(slide, 0.5, slide_mpp=0.25).scale == 2
    assert at_mpp(slide, None).mpp is None


@pytest.mark.parametrize("absurd", [0.0005, 352.8])
def test_an_absurd_resolution_is_refused_unless_corrected(absurd: float) -> None:
    slide = ArraySlide(noise(8, 8), mpp=absurd)
    with pytest.raises(SlideError, match=rf"{absurd} um per pixel cannot be true; pass --mpp"):
        at_mpp(slide, 0.5)
    assert at_mpp(slide, 0.5, slide_mpp=0.5).scale == 1
    with pytest.raises(SlideError, match="pass --mpp"):
        at_mpp(ArraySlide(noise(8, 8)), 0.5, slide_mpp=absurd)


def test_strong_upsampling_must_be_requested() -> None:
    slide = ArraySlide(noise(8, 8), mpp=1.0)
    with pytest.raises(SlideError, match=r"invents 4\.0 pixels from one; pass --force-upsampling"):
        at_mpp(slide, 0.25)
    assert at_mpp(slide, 0.25, force=True).width == 32


def test_a_box_outside_of_the_view_is_refused() -> None:
    view = at_mpp(ArraySlide(noise(64, 64)), 0.5)
    with pytest.raises(ValueError, match="does not lie inside a view of 32x32 px"):
        view.read(0, 31, 1, 2)


@pytest.mark.parametrize("max_px", [1, 7, 100, 160, 5000])
def test_a_thumbnail_shows_the_whole_slide(max_px: int) -> None:
    slide = ArraySlide(noise(640, 400), downsamples=(1, 4))
    small = thumbnail(slide, max_px)
    longest = min(max_px, 640)
    assert small.shape == (longest, max(1, int(400 * longest / 640 + 0.5)), 3)
    level = 1 if longest <= 160 else 0
    stored = slide.pixels[:: slide.downsamples[level], :: slide.downsamples[level]]
    np.testing.assert_allclose(small, averaged(stored, stored.shape[0] / longest), atol=0.501)


def test_a_thumbnail_is_not_finer_than_its_view() -> None:
    view = at_mpp(ArraySlide(noise(640, 400)), 1.0)
    np.testing.assert_array_equal(thumbnail(view, 5000), view.read(0, 0, view.width, view.height))


def test_a_real_slide_keeps_its_mean_colour(wsi_slides: Path) -> None:
    with open_slide(wsi_slides / "CMU-1-Small-Region.svs") as slide:
        view = at_mpp(slide, 1.0)
        assert (view.width, view.height) == (1108, 1481)
        mean = view.read(0, 0, view.width, view.height).mean(axis=(0, 1))
        stored = slide.read(0, 0, 0, 2220, 2967).mean(axis=(0, 1))
        np.testing.assert_allclose(mean, stored, atol=0.3)

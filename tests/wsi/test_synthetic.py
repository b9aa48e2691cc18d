"""The synthetic slide: a function of place and seed, with nuclei where it says."""

from __future__ import annotations

from pathlib import Path

import large_image
import numpy as np
import openslide
import pytest
import tifffile
from click.testing import CliRunner

from histostream.wsi.synthetic import SyntheticSlide, main

SLIDE = SyntheticSlide(1500, 1100, seed=2)


def test_a_region_does_not_depend_on_the_cut() -> None:
    pixels, labels = SLIDE.region(0, 0, 1500, 1100)
    for x, y, w, h in [(0, 0, 1, 1), (511, 511, 3, 3), (300, 200, 700, 801), (1499, 1099, 1, 1)]:
        some_pixels, some_labels = SLIDE.region(x, y, w, h)
        np.testing.assert_array_equal(some_pixels, pixels[y : y + h, x : x + w])
        np.testing.assert_array_equal(some_labels, labels[y : y + h, x : x + w])


def test_nuclei_do_not_depend_on_the_box() -> None:
    everything = SLIDE.nuclei(0, 0, 1500, 1100)
    x, y = everything[:, 0], everything[:, 1]
    inside = (x >= 333) & (x < 1111) & (y >= 222) & (y < 999)
    np.testing.assert_array_equal(SLIDE.nuclei(333, 222, 778, 777), everything[inside])


def test_labels_are_where_the_nuclei_are() -> None:
    _, labels = SLIDE.region(0, 0, 1500, 1100)
    nuclei = SLIDE.nuclei(0, 0, 1500, 1100)
    centres = labels[nuclei[:, 1].astype(int), nuclei[:, 0].astype(int)]
    assert len(nuclei) > 300
    assert centres.mean() > 0.995  # a thin one may lose its middle to the rough outline
    far = np.ones(labels.shape, bool)
    for x, y, major, _, _ in nuclei:
        reach = int(major / 2 + 4)
        far[max(0, int(y) - reach) : int(y) + reach, max(0, int(x) - reach) : int(x) + reach] = 0
    far[:20], far[-20:], far[:, :20], far[:, -20:] = False, False, False, False
    assert not labels[far].any()
    area = np.pi / 4 * (nuclei[:, 2] * nuclei[:, 3]).sum()
    assert labels.sum() == pytest.approx(area, rel=0.15)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_nuclei_are_6_to_11_um_at_every_resolution(mpp: float) -> None:
    slide = SyntheticSlide(int(1000 / mpp), int(1000 / mpp), mpp=mpp, seed=3)
    nuclei = slide.nuclei(0, 0, slide.width, slide.height)
    long_um, short_um = nuclei[:, 2] * mpp, nuclei[:, 3] * mpp
    assert 6 <= long_um.min() <= long_um.max() <= 11
    assert (short_um < long_um).all()
    assert ((nuclei[:, 4] >= 0) & (nuclei[:, 4] <= np.pi)).all()


def test_it_has_glass_stroma_and_dark_nuclei() -> None:
    slide = SyntheticSlide(2048, 2048, seed=0)
    pixels, labels = slide.region(0, 0, 2048, 2048)
    tissue = pixels.min(axis=2) < 215
    assert 0.1 < tissue.mean() < 0.9
    assert pixels[~tissue].mean() > 225
    red, green, blue = pixels[tissue & (labels == 0)].mean(axis=0)
    assert red > blue > green
    nucleus = pixels[labels == 1].mean(axis=0)
    assert nucleus[2] > nucleus[0] > nucleus[1]
    assert nucleus.mean() < 130 < pixels[tissue & (labels == 0)].mean()


def test_another_seed_is_another_slide() -> None:
    other = SyntheticSlide(1500, 1100, seed=3)
    assert (other.region(0, 0, 600, 600)[0] != SLIDE.region(0, 0, 600, 600)[0]).any()


@pytest.mark.parametrize("tile_px", [256, 240])
def test_a_written_slide_opens_everywhere_and_looks_the_same(tmp_path: Path, tile_px: int) -> None:
    path, labels_path = tmp_path / "slide.tif", tmp_path / "labels.tif"
    SLIDE.write(path, tile_px=tile_px, labels=labels_path)
    assert sorted(tmp_path.iterdir()) == [labels_path, path]
    pixels, labels = SLIDE.region(0, 0, 1500, 1100)
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((1500, 1100), (750, 550), (375, 275), (188, 138))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        seen = np.asarray(slide.read_region((0, 0), 0, (1500, 1100)))[..., :3]
        small = np.asarray(slide.read_region((0, 0), 2, (375, 275)))[..., :3]
    assert np.abs(seen.astype(int) - pixels).mean() < 4
    blocks = pixels.reshape(275, 4, 375, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - blocks).mean() < 4
    source = large_image.open(str(path))
    assert (source.sizeX, source.sizeY, source.levels) == (1500, 1100, 4)
    assert source.getMetadata()["mm_x"] == pytest.approx(0.0005)
    np.testing.assert_array_equal(tifffile.imread(labels_path, key=0), labels)
    assert tifffile.imread(path, key=0).shape == (1100, 1500, 3)


def test_deflate_is_lossless_and_one_level_is_possible(tmp_path: Path) -> None:
    SLIDE.write(tmp_path / "slide.tif", compression="deflate", pyramid=False)
    with tifffile.TiffFile(tmp_path / "slide.tif") as file:
        assert len(file.pages) == 1
        np.testing.assert_array_equal(file.asarray(), SLIDE.region(0, 0, 1500, 1100)[0])


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    out, labels = tmp_path / "slide.tif", tmp_path / "labels.tif"
    arguments = [str(out), "--size", "300x200", "--seed", "4", "--labels", str(labels)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(
        tifffile.imread(labels, key=0), SyntheticSlide(300, 200, seed=4).region(0, 0, 300, 200)[1]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "300"], "4096x4096"),
        (["--mpp", "9"], "mpp=9.0"),
        (["--tile-px", "100"], "multiples of 16"),
    ],
)
def test_bad_options_are_one_clear_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "slide.tif"), *arguments])
    assert result.exit_code != 0
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_a_region_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="does not lie in"):
        SLIDE.region(1400, 0, 101, 10)

"""Slides as people report them, through the command: each gets its labels, or one line that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from histostream.runtime.cli import main
from tests.commands import call
from tests.wsi.slides.field import GLASS, TILED, UM, add_pyramid, drop_tiles, halved, tissue, write_leica, write_pyramid

PLAIN: dict[str, Any] = TILED | UM | {"compression": "deflate"}
OUTSIDE = 255
HALO_PX = 64  # of the tiny model, generously: labels farther from an absent tile do not depend on it


class Run:
    """What a command left of one slide."""

    def __init__(self, slide: Path, bundle: Path, out: Path, *more: str) -> None:
        done = call(main, str(slide), "--model", str(bundle), "--out", str(out), *more)
        self.status, self.text = done.returncode, done.stderr
        self.folder = out / slide.stem

    @property
    def labels(self) -> NDArray[np.uint8]:
        return np.asarray(tifffile.imread(self.folder / "labels.tif", key=0))

    @property
    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "run.json").read_text()))


@pytest.fixture(scope="module")
def dense(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    """Return the labels of tissue in an ordinary file."""
    folder = tmp_path_factory.mktemp("plain")
    tifffile.imwrite(folder / "plain.tif", tissue(), **PLAIN)
    run = Run(folder / "plain.tif", tiny_bundle, folder / "out")
    assert run.status == 0, run.text
    return run.labels


@pytest.mark.field("tiles that were never written")
@pytest.mark.parametrize("dropped", [(0,), (5, 6), (0, 3, 12, 15)], ids=str)
def test_an_absent_tile_is_empty_glass(
    tiny_bundle: Path, tmp_path: Path, dense: NDArray[np.uint8], dropped: tuple[int, ...]
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", tissue(), **PLAIN)
    run = Run(drop_tiles(tmp_path / "a.tif", dropped), tiny_bundle, tmp_path / "out")
    assert run.status == 0, run.text
    absent = np.zeros(dense.shape, bool)
    for row, column in (divmod(tile, 4) for tile in dropped):
        absent[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] = True
    assert (run.labels[absent] == OUTSIDE).all()
    far = ndimage.distance_transform_edt(~absent) > HALO_PX
    assert (run.labels[far] == OUTSIDE).mean() == pytest.approx((dense[far] == OUTSIDE).mean(), abs=0.01)
    far &= (run.labels != OUTSIDE) & (dense != OUTSIDE)  # the border of the tissue may move by a pixel of the mask
    np.testing.assert_array_equal(run.labels[far], dense[far])
    assert "damaged" not in run.record or not run.record["damaged"]


@pytest.mark.field("tiles that were never written")
def test_a_slide_of_which_hardly_anything_was_written_is_analysed(
    tiny_bundle: Path, tmp_path: Path, dense: NDArray[np.uint8]
) -> None:
    pixels = np.full((2048, 2048, 3), 255, np.uint8)
    pixels[768:1280, 768:1280] = tissue()
    tifffile.imwrite(tmp_path / "a.tif", pixels, **PLAIN)
    kept = {row * 16 + column for row in range(6, 10) for column in range(6, 10)}
    run = Run(drop_tiles(tmp_path / "a.tif", [i for i in range(256) if i not in kept]), tiny_bundle, tmp_path / "out")
    assert run.status == 0, run.text
    inside = run.labels[768:1280, 768:1280]
    assert (inside[100:-100, 100:-100] == dense[100:-100, 100:-100]).mean() > 0.98
    assert (run.labels != OUTSIDE).sum() == (inside != OUTSIDE).sum()


@pytest.mark.field("several scanned areas")
def test_both_areas_of_a_leica_scan_are_analysed(tiny_bundle: Path, tmp_path: Path) -> None:
    slide = write_leica(tmp_path / "two.scn", [(tissue(), 1000, 5000), (tissue(300, 300, 2000), 1900, 5100)])
    run = Run(slide, tiny_bundle, tmp_path / "out")
    assert run.status == 0, run.text
    assert (run.record["slide"]["mpp"], run.record["slide"]["mpp_source"]) == (0.5, "OpenSlide (leica)")
    labels = run.labels
    assert labels.shape == (512, 1200)
    analysed = labels != OUTSIDE
    assert analysed[100:400, 100:400].mean() > 0.5
    assert analysed[150:350, 950:1150].mean() > 0.5
    assert not analysed[:, 650:800].any()  # not scanned


@pytest.mark.field("several images in one file")
def test_the_second_image_of_a_file_is_named_and_not_mixed_in(tiny_bundle: Path, tmp_path: Path) -> None:
    first = np.full((1024, 1024, 3), GLASS, np.uint8)
    first[300:812, 300:812] = tissue()
    other = np.full((900, 900, 3), GLASS, np.uint8)
    with tifffile.TiffWriter(tmp_path / "two.tif") as file:
        for pixels in (first, other):
            add_pyramid(file, [pixels, halved(pixels)])
    alone = write_pyramid(tmp_path / "one.tif", [first, halved(first)])
    run, expected = (Run(path, tiny_bundle, tmp_path / "out") for path in (tmp_path / "two.tif", alone))
    assert run.status == 0, run.text
    (note,) = run.record["slide"]["notes"]
    assert "the file holds 2 images; 1024 x 1024 px is analysed, not 900 x 900" in note
    assert note in (run.folder / "report.html").read_text()
    np.testing.assert_array_equal(run.labels, expected.labels)
    assert (run.labels != OUTSIDE).any()


@pytest.mark.field("several DICOM series in one folder")
def test_each_dicom_series_of_a_folder_is_a_slide(wsi_slides: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    source = sorted((wsi_slides / "dicom-cmu-1-small-region-ybr").glob("*.dcm"), key=lambda file: file.stat().st_size)
    level = source[-3]  # 555 x 742 px
    shutil.copy(level, folder / "a.dcm")
    header = pydicom.dcmread(level)
    header.SeriesInstanceUID += ".7"
    header.SOPInstanceUID += ".7"
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.save_as(folder / "b")
    done = call(main, str(folder), "--model", str(tiny_bundle), "--out", str(tmp_path / "out"), "--mpp", "0.5")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"a", "b"}
    one, other = (tifffile.imread(tmp_path / "out" / name / "labels.tif", key=0) for name in "ab")
    np.testing.assert_array_equal(one, other)


@pytest.mark.field("a printer's resolution")
@pytest.mark.parametrize("dpi", [72, 300, 600])
def test_a_printer_s_resolution_asks_for_mpp_and_that_works(
    tiny_bundle: Path, tmp_path: Path, dense: NDArray[np.uint8], dpi: int
) -> None:
    slide = tmp_path / "a.tif"
    tifffile.imwrite(slide, tissue(), **TILED, compression="lzw", resolution=(dpi, dpi), resolutionunit=2)
    run = Run(slide, tiny_bundle, tmp_path / "out")
    assert run.status == 1
    assert "no resolution in the file; pass --mpp" in run.text
    again = Run(slide, tiny_bundle, tmp_path / "out", "--mpp", "0.5")
    assert again.status == 0, again.text
    np.testing.assert_array_equal(again.labels, dense)
    assert again.record["slide"]["mpp_source"] == "--mpp"


@pytest.mark.field("a resolution in metadata of a program")
def test_the_resolution_of_imagej_is_found(tiny_bundle: Path, tmp_path: Path, dense: NDArray[np.uint8]) -> None:
    slide = tmp_path / "a.tif"
    tifffile.imwrite(slide, tissue(), imagej=True, resolution=(2, 2), metadata={"unit": "micron"})
    run = Run(slide, tiny_bundle, tmp_path / "out")
    assert run.status == 0, run.text
    assert (run.record["slide"]["mpp"], run.record["slide"]["mpp_source"]) == (0.5, "ImageJ")
    np.testing.assert_array_equal(run.labels, dense)


@pytest.mark.field("channels that are no colours")
@pytest.mark.parametrize("channels", [2, 4])
def test_fluorescence_is_refused_and_can_be_picked(tiny_bundle: Path, tmp_path: Path, channels: int) -> None:
    slide, grey = tmp_path / "a.tif", 255 - tissue()
    pixels = np.dstack([np.roll(grey[..., i % 3], 40 * i, 1) for i in range(channels)])
    tifffile.imwrite(slide, pixels, **PLAIN | {"photometric": "minisblack"}, planarconfig="contig")
    run = Run(slide, tiny_bundle, tmp_path / "out")
    assert run.status == 1
    advice = run.text.strip().rpartition("--channels ")[2]
    assert f"it has {channels} channels, which are not colours" in run.text
    again = Run(slide, tiny_bundle, tmp_path / "out", "--channels", advice)  # what the message says works
    assert again.status == 0, again.text
    picked = [int(i) for i in advice.split(",")]
    tifffile.imwrite(tmp_path / "rgb.tif", np.ascontiguousarray(pixels[..., picked]), **PLAIN)
    np.testing.assert_array_equal(again.labels, Run(tmp_path / "rgb.tif", tiny_bundle, tmp_path / "out").labels)


def test_another_number_of_channels_than_the_model_has_is_refused_at_once(tiny_bundle: Path, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", tissue(), **PLAIN)
    run = Run(tmp_path / "a.tif", tiny_bundle, tmp_path / "out", "--channels", "0,1")
    assert run.status == 1
    assert "--channels picks 2, and the model takes 3: pick one for each" in run.text
    assert not (tmp_path / "out").exists()


@pytest.mark.field("a fourth band that is no transparency")
def test_a_band_of_zeros_beside_the_colours_changes_nothing(
    tiny_bundle: Path, tmp_path: Path, dense: NDArray[np.uint8]
) -> None:
    pixels = np.dstack([tissue(), np.zeros((512, 512), np.uint8)])
    tifffile.imwrite(tmp_path / "a.tif", pixels, **PLAIN, extrasamples=["unspecified"])
    run = Run(tmp_path / "a.tif", tiny_bundle, tmp_path / "out")
    assert run.status == 0, run.text
    np.testing.assert_array_equal(run.labels, dense)


@pytest.mark.field("a compression without a decoder")
def test_a_compression_without_a_decoder_is_named_and_nothing_is_published(tiny_bundle: Path, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", tissue(), **PLAIN | {"compression": "jpegxl"})
    run = Run(tmp_path / "a.tif", tiny_bundle, tmp_path / "out")
    assert run.status == 1
    assert "its compression, JPEGXL, cannot be decoded here" in run.text
    assert not list((tmp_path / "out").rglob("*.tif"))


@pytest.mark.field("areas that were not scanned")
@pytest.mark.parametrize("fill", [(0, 0, 0), (128, 128, 128), (3, 2, 3)], ids=["black", "grey", "nearly black"])
def test_an_area_that_was_not_scanned_is_not_analysed(
    tiny_bundle: Path, tmp_path: Path, fill: tuple[int, int, int]
) -> None:
    pixels = np.full((1536, 1536, 3), fill, np.uint8)
    pixels[200:1400, 300:1400] = GLASS
    pixels[500:1012, 600:1112] = tissue()
    tifffile.imwrite(tmp_path / "a.tif", pixels, **PLAIN)
    run = Run(tmp_path / "a.tif", tiny_bundle, tmp_path / "out")
    assert run.status == 0, run.text
    analysed = run.labels != OUTSIDE
    assert analysed[600:900, 700:1000].mean() > 0.5
    analysed[200:1400, 300:1400] = False
    assert not analysed.any()


@pytest.mark.field("an image smaller than the least piece of tissue")
@pytest.mark.parametrize("side", [256, 128, 90])
def test_a_patch_is_analysed(tiny_bundle: Path, tmp_path: Path, side: int) -> None:
    tifffile.imwrite(tmp_path / "patch.tif", tissue(side, side), **PLAIN)
    run = Run(tmp_path / "patch.tif", tiny_bundle, tmp_path / "out")
    assert run.status == 0, run.text
    assert (run.labels != OUTSIDE).mean() > 0.5


@pytest.mark.field("nothing to analyse")
def test_a_slide_of_glass_has_a_status_of_its_own(tiny_bundle: Path, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "glass.tif", np.full((512, 512, 3), GLASS, np.uint8), **PLAIN)
    tifffile.imwrite(tmp_path / "tissue.tif", tissue(), **PLAIN)
    done = call(
        main, str(tmp_path / "glass.tif"), str(tmp_path / "tissue.tif"), "--model", str(tiny_bundle), "--out",
        str(tmp_path / "out"),
    )  # fmt: skip
    table = (tmp_path / "out" / "cohort.csv").read_text().splitlines()
    glass = next(line for line in table if "glass.tif" in line)
    assert "no tissue" in glass
    assert "no tissue" in (tmp_path / "out" / "report.html").read_text()
    assert done.returncode not in (0, 1, 2)

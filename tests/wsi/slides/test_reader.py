"""Readers: they agree with each other pixel for pixel, and say clearly what they cannot open."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from histostream.wsi.errors import SlideError
from histostream.wsi.slides.reader import SlideReader, downsample_between, open_slide

PIXELS = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)


def write_tiff(path: Path, pixels: np.ndarray = PIXELS, **options: Any) -> Path:
    tifffile.imwrite(path, pixels, **{"photometric": "rgb", "tile": (64, 48)} | options)
    return path


def whole(slide: SlideReader, level: int = 0) -> np.ndarray:
    return slide.read(level, 0, 0, slide.levels[level].width, slide.levels[level].height)


def test_a_read_is_a_crop_of_the_whole(tmp_path: Path) -> None:
    with open_slide(write_tiff(tmp_path / "a.tif")) as slide:
        assert slide.name == "tiff"
        for x, y, width, height in [(0, 0, 200, 150), (47, 63, 2, 2), (199, 149, 1, 1)]:
            got = slide.read(0, x, y, width, height)
            np.testing.assert_array_equal(got, PIXELS[y : y + height, x : x + width])
            assert got.flags.c_contiguous


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True},
        {"compression": "lzw"},
        {"compression": "jpeg", "compressionargs": {"level": 85}},
        {"bigtiff": True, "byteorder": ">"},
    ],
    ids=str,
)
def test_both_readers_agree_on_every_compression(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write_tiff(tmp_path / "a.tif", **options)
    with open_slide(path, reader="tiff") as fast, open_slide(path, reader="large_image") as slow:
        np.testing.assert_array_equal(whole(fast), whole(slow))


@pytest.mark.parametrize("reader", ["tiff", "large_image"])
def test_grey_stays_grey(tmp_path: Path, reader: str) -> None:
    path = write_tiff(tmp_path / "grey.tif", PIXELS[..., 0], photometric="minisblack")
    with open_slide(path, reader=reader) as slide:
        assert slide.channels == 1
        np.testing.assert_array_equal(whole(slide)[..., 0], PIXELS[..., 0])


def test_levels_are_the_reduced_pages(tmp_path: Path) -> None:
    path = tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2, 4):
            reduced = PIXELS[: 150 // step * step : step, ::step]
            file.write(reduced, photometric="rgb", tile=(64, 48), subfiletype=1 if step > 1 else 0)
        file.write(PIXELS[:40, :90], photometric="rgb", tile=(16, 16))  # a label, of another shape
    with open_slide(path, reader="tiff") as slide:
        assert [(level.width, level.height) for level in slide.levels] == [
            (200, 150),
            (100, 75),
            (50, 37),
        ]
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        np.testing.assert_array_equal(whole(slide, 2), PIXELS[:148:4, ::4])


def test_downsample_is_the_factor_that_the_scanner_meant() -> None:
    assert downsample_between((11952, 10249), (2988, 2562)) == 4
    assert downsample_between((1000, 1000), (300, 300)) == pytest.approx(10 / 3)


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        ({"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}, 0.25),
        ({"resolution": (50800, 50800), "resolutionunit": "INCH"}, 0.5),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),  # of a printer, as 1200 dpi
        ({"resolution": (472.44, 472.44), "resolutionunit": "CENTIMETER"}, None),
        ({"resolution": (2400, 2400), "resolutionunit": "INCH"}, 10.58),
        ({"resolution": (1, 1), "resolutionunit": "INCH"}, None),
        ({}, None),
    ],
)
def test_resolution_comes_from_the_tags(tmp_path: Path, options: dict[str, Any], mpp: float | None) -> None:
    with open_slide(write_tiff(tmp_path / "a.tif", **options)) as slide:
        assert slide.mpp == (pytest.approx(mpp, abs=0.1) if mpp else None)


def test_pixels_that_are_not_square_are_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", resolution=(20000, 40000), resolutionunit="CENTIMETER")
    with pytest.raises(SlideError, match=r"a\.tif: its pixels are 0\.5 x 0\.25 um, not square"):
        open_slide(path)


def test_resolution_of_ome_tiff_comes_from_its_xml(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    size = {"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25}
    write_tiff(path, metadata={"axes": "YXS", **size})
    with open_slide(path, reader="tiff") as slide:
        assert slide.mpp == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tile": None, "rowsperstrip": 8}, "not made of interleaved tiles"),
        ({"planarconfig": "separate"}, "its axes are SYX"),
        ({"pixels": PIXELS.astype(np.uint16)}, "16 bits"),
    ],
    ids=["strips", "planar", "16 bit"],
)
def test_the_fast_reader_declines_what_it_was_not_compared_on(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    pixels = options.pop("pixels", PIXELS)
    if options.get("planarconfig"):
        pixels = np.ascontiguousarray(np.moveaxis(PIXELS, 2, 0))
    path = write_tiff(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(SlideError, match=reason):
        open_slide(path, reader="tiff")


# large-image looks into plain images several times and leaves a file object open each time.
leaks_files = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture
def leaked_files_closed() -> Iterator[None]:
    yield
    gc.collect()


@leaks_files
@pytest.mark.usefixtures("leaked_files_closed")
def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    rgba = np.dstack([PIXELS, np.zeros_like(PIXELS[..., 0])])
    rgba[:, :100, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        assert (slide.name, slide.channels) == ("large_image", 3)
        np.testing.assert_array_equal(whole(slide)[:, :100], PIXELS[:, :100])
        assert (whole(slide)[:, 100:] == 255).all()


@leaks_files
@pytest.mark.usefixtures("leaked_files_closed")
def test_large_plain_images_open(tmp_path: Path) -> None:
    Image.new("RGB", (5000, 40), (1, 2, 3)).save(tmp_path / "wide.png")
    with open_slide(tmp_path / "wide.png") as slide:
        assert (slide.levels[0].width, slide.levels[0].height) == (5000, 40)
        assert slide.read(0, 4990, 30, 10, 10)[-1, -1].tolist() == [1, 2, 3]


def test_names_may_be_in_any_script(tmp_path: Path) -> None:
    for reader in ("tiff", "large_image"):
        with open_slide(write_tiff(tmp_path / "größe 組織.tif"), reader=reader) as slide:
            np.testing.assert_array_equal(whole(slide), PIXELS)


def test_a_box_outside_of_the_level_is_refused(tmp_path: Path) -> None:
    with (
        open_slide(write_tiff(tmp_path / "a.tif")) as slide,
        pytest.raises(ValueError, match="does not lie inside a level of 200x150"),
    ):
        slide.read(0, 190, 0, 11, 10)


def test_a_damaged_tile_is_named(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[1]
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * 64)
    with (
        open_slide(path) as slide,
        pytest.raises(SlideError, match=r"a\.tif: block 1, 0 of level 0 cannot be decoded"),
    ):
        whole(slide)


@pytest.fixture(params=["auto", "tiff", "large_image"])
def reader(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_missing_and_empty_files_are_named(tmp_path: Path, reader: str) -> None:
    with pytest.raises(SlideError, match=r"none\.svs: there is no such file"):
        open_slide(tmp_path / "none.svs", reader=reader)
    (tmp_path / "empty.svs").touch()
    with pytest.raises(SlideError, match=r"empty\.svs: the file is empty"):
        open_slide(tmp_path / "empty.svs", reader=reader)


def test_other_files_and_folders_are_refused(tmp_path: Path, reader: str) -> None:
    (tmp_path / "text.svs").write_text("this is no slide")
    with pytest.raises(SlideError, match=r"text\.svs: "):
        open_slide(tmp_path / "text.svs", reader=reader)
    with pytest.raises(SlideError, match=str(tmp_path)):
        open_slide(tmp_path, reader=reader)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, reader: str) -> None:
    path = write_tiff(tmp_path / "cut.tif", compression="zlib")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(SlideError, match=r"cut\.tif: the file was cut off"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("size", [100, 1_000_000, 1_500_000, 1_900_000])
def test_a_cut_off_svs_is_refused(wsi_slides: Path, tmp_path: Path, reader: str, size: int) -> None:
    path = tmp_path / "cut.svs"
    path.write_bytes((wsi_slides / "CMU-1-Small-Region.svs").read_bytes()[:size])
    with pytest.raises(SlideError, match=r"cut\.svs: the file was cut off"):
        open_slide(path, reader=reader)


def test_an_unknown_reader_is_named(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="no slide reader is called 'mine'"):
        open_slide(write_tiff(tmp_path / "a.tif"), reader="mine")


REAL = [
    # file, reader, (width, height), mpp
    ("CMU-1-Small-Region.svs", "tiff", (2220, 2967), 0.499),
    ("TCGA-CR-7395-01A-01-TS1.svs", "tiff", (4443, 3567), None),
    ("luna-1065626.svs", "large_image", (11952, 10249), 0.5026),
    ("test3-DAPI-2-387.ndpi", "openslide", (3968, 4864), 0.2282),
    ("OS-1-detail.ome.tif", "tiff", (1101, 1101), 0.2271),
    ("OS-2-ndpi.ome.tif", "tiff", (2202, 2202), 0.2271),
    ("OS-2-vsi.ome.tif", "tiff", (1445, 1445), 0.3461),
    ("camelyon_jpeg.dcm", "large_image", (1152, 700), 28.97),
    ("dicom-cmu-1-small-region-ybr", "large_image", (2220, 2967), 0.499),
]


@pytest.mark.parametrize(("name", "reader", "size", "mpp"), REAL, ids=[row[0] for row in REAL])
def test_real_slides_open(wsi_slides: Path, name: str, reader: str, size: tuple[int, int], mpp: float | None) -> None:
    with open_slide(wsi_slides / name) as slide:
        assert (slide.name, slide.channels) == (reader, 3)
        assert (slide.levels[0].width, slide.levels[0].height) == size
        assert slide.mpp == (pytest.approx(mpp, rel=1e-3) if mpp else None)


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("CMU-1-Small-Region.svs", (0, 0, 2220, 2967)),
        ("OS-2-vsi.ome.tif", (0, 0, 1445, 1445)),
        ("TCGA-CR-7395-01A-01-TS1.svs", (3800, 3000, 643, 567)),
    ],
)
def test_the_fast_reader_equals_large_image(wsi_slides: Path, name: str, box: tuple[int, int, int, int]) -> None:
    path = wsi_slides / name
    with open_slide(path, reader="tiff") as fast, open_slide(path, reader="large_image") as slow:
        assert fast.levels == slow.levels
        np.testing.assert_array_equal(fast.read(0, *box), slow.read(0, *box))


def test_the_fast_reader_equals_openslide_on_lower_levels(wsi_slides: Path) -> None:
    # Read from the corner only: elsewhere OpenSlide shifts this level, which is 2.0005 times
    # smaller by its count, by a part of a pixel; the tiles of the file are not shifted.
    path = wsi_slides / "TCGA-CR-7395-01A-01-TS1.svs"
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        expected = reference.read_region((0, 0), 1, reference.level_dimensions[1])
        np.testing.assert_array_equal(whole(slide, 1), np.asarray(expected)[..., :3])


@pytest.mark.parametrize("reader", ["tiff", "large_image"])
def test_threads_read_the_same_pixels(wsi_slides: Path, reader: str) -> None:
    with open_slide(wsi_slides / "CMU-1-Small-Region.svs", reader=reader) as slide:
        expected = whole(slide)
        places = [(x, y) for y in range(0, 2900, 311) for x in range(0, 2100, 257)]
        with ThreadPoolExecutor(4) as pool:
            boxes = pool.map(lambda xy: slide.read(0, xy[0], xy[1], 60, 60), places)
        for (x, y), pixels in zip(places, boxes, strict=True):
            np.testing.assert_array_equal(pixels, expected[y : y + 60, x : x + 60])


def test_ndpi_has_the_levels_of_openslide(wsi_slides: Path) -> None:
    with open_slide(wsi_slides / "test3-DAPI-2-387.ndpi") as slide:
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 8, 16, 32, 64]
        blue = whole(slide, 3)
        assert blue[..., 2].mean() > 20 > 2 > blue[..., :2].mean()


def test_dicom_has_the_colours_of_the_slide_that_it_was_made_from(wsi_slides: Path) -> None:
    folder = wsi_slides / "dicom-cmu-1-small-region-ybr"
    with (
        open_slide(folder) as dicom,
        open_slide(sorted(folder.glob("*.dcm"))[3]) as same,
        open_slide(wsi_slides / "CMU-1-Small-Region.svs") as svs,
    ):
        assert dicom.levels == same.levels
        assert [level.downsample for level in dicom.levels] == [1, 2, 4]
        # They were compressed twice; false colours are off by 70.
        difference = np.abs(whole(dicom).astype(int) - whole(svs))
        assert difference.mean() < 6


def test_where_a_reader_is_not_installed_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SlideError, match=r"no reader opens .*a reader of further TIFFs: .*formats"):
        open_slide(tmp_path / "text.svs")

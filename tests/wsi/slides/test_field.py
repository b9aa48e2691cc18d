"""Slides as they come from the field: each is read as its file means it, or refused by name."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pydicom
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histostream.wsi.errors import SlideError
from histostream.wsi.slides.channels import open_for_channels
from histostream.wsi.slides.dicom_series import series_among
from histostream.wsi.slides.reader import SlideReader, open_slide
from histostream.wsi.slides.resolution import at_mpp
from tests.wsi.slides.field import (
    GLASS,
    SCANNERS,
    TILED,
    UM,
    add_pyramid,
    drop_tiles,
    halved,
    tissue,
    write_leica,
    write_pyramid,
)

# large-image looks into plain images several times and leaves a file object open each time.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
PLAIN: dict[str, Any] = TILED | UM | {"compression": "deflate"}


def whole(slide: SlideReader, level: int = 0) -> NDArray[np.uint8]:
    return slide.read(level, 0, 0, slide.levels[level].width, slide.levels[level].height)


def over_white(rgba: NDArray[np.uint8]) -> NDArray[np.float64]:
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


# ----------------------------------------------------------------------------- tiles that were never written


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "jpeg", "compressionargs": {"level": 95}},
        {"bigtiff": True, "compression": "lzw"},
        {"tile": (64, 256), "compression": None},
    ],
    ids=str,
)
def test_a_tile_that_was_never_written_is_white_and_listed(tmp_path: Path, options: dict[str, Any]) -> None:
    dense, sparse = tmp_path / "dense.tif", tmp_path / "sparse.tif"
    for path in (dense, sparse):
        tifffile.imwrite(path, tissue(500, 400), **PLAIN | options)
    drop_tiles(sparse, [0, 5])
    with open_slide(dense) as expected, open_slide(sparse) as slide:
        (width, height), pixels = slide.block_px[0], whole(expected).copy()
        columns = -(-500 // width)
        missing = np.zeros(slide.missing[0].shape, bool)  # type: ignore[union-attr]
        for index in (0, 5):
            row, column = divmod(index, columns)
            missing[row, column] = True
            pixels[row * height : (row + 1) * height, column * width : (column + 1) * width] = 255
        assert expected.missing == (None,)
        np.testing.assert_array_equal(slide.missing[0], missing)
        np.testing.assert_array_equal(whole(slide), pixels)


def test_each_level_has_its_own_missing_tiles(tmp_path: Path) -> None:
    pixels = tissue(512, 512)
    path = write_pyramid(tmp_path / "a.tif", [pixels, halved(pixels)])
    drop_tiles(path, [3], page=1)
    with open_slide(path) as slide:
        assert slide.missing[0] is None
        assert slide.missing[1] is not None
        assert slide.missing[1].tolist() == [[False, False], [False, True]]
        np.testing.assert_array_equal(whole(slide, 0), pixels)
        assert (whole(slide, 1)[128:, 128:] == 255).all()


def sparse_dicom(source: Path, out: Path, dropped: set[int]) -> Path:
    """Copy the finest level of a DICOM series without some frames, as a level of kind TILED_SPARSE."""
    out.mkdir()
    header = pydicom.dcmread(max(source.glob("*.dcm"), key=lambda file: file.stat().st_size))
    frames = list(pydicom.encaps.generate_frames(header.PixelData, number_of_frames=header.NumberOfFrames))
    columns = -(-header.TotalPixelMatrixColumns // header.Columns)
    groups = []
    for i in range(len(frames)):
        place, group = pydicom.Dataset(), pydicom.Dataset()
        row, column = divmod(i, columns)
        place.ColumnPositionInTotalImagePixelMatrix = column * header.Columns + 1
        place.RowPositionInTotalImagePixelMatrix = row * header.Rows + 1
        place.XOffsetInSlideCoordinateSystem = place.YOffsetInSlideCoordinateSystem = 0
        place.ZOffsetInSlideCoordinateSystem = 0
        group.PlanePositionSlideSequence = [place]
        groups.append(group)
    kept = [i for i in range(len(frames)) if i not in dropped]
    header.PerFrameFunctionalGroupsSequence = [groups[i] for i in kept]
    header.PixelData = pydicom.encaps.encapsulate([frames[i] for i in kept])
    header.NumberOfFrames = len(kept)
    header.DimensionOrganizationType = "TILED_SPARSE"
    header.save_as(out / "a.dcm")
    return out


def test_a_frame_that_dicom_does_not_hold_is_white_and_listed(wsi_slides: Path, tmp_path: Path) -> None:
    source = wsi_slides / "dicom-cmu-1-small-region-ybr"
    folder = sparse_dicom(source, tmp_path / "sparse", {1, 7})
    with open_slide(folder) as slide, open_slide(source) as dense:
        (width, height), pixels = slide.block_px[0], whole(dense).copy()
        missing = slide.missing[0]
        assert missing is not None
        assert np.flatnonzero(missing).tolist() == [1, 7]
        for row, column in np.argwhere(missing):
            pixels[row * height : (row + 1) * height, column * width : (column + 1) * width] = 255
        np.testing.assert_array_equal(whole(slide), pixels)


# ----------------------------------------------------------------------------- which reader, and several images


@pytest.mark.parametrize("vendor", SCANNERS)
def test_a_scanner_s_own_layout_is_read_as_openslide_shows_it(tmp_path: Path, vendor: str) -> None:
    path = SCANNERS[vendor](tmp_path / "slide.tif", tissue(520, 390))
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert (slide.name, slide.mpp) == ("openslide", 0.5)
        x, y = (slide.bounds.x, slide.bounds.y) if slide.bounds else (0, 0)
        for level, size in enumerate(slide.levels):
            expected = reference.read_region((x, y), level, (size.width, size.height))
            assert np.abs(whole(slide, level) - over_white(np.asarray(expected))).max() <= 0.5


def test_all_areas_of_a_scan_lie_where_openslide_places_them(tmp_path: Path) -> None:
    first, second = tissue(600, 500), tissue(300, 300, 2000)
    path = write_leica(tmp_path / "two.scn", [(first, 1000, 5000), (second, 2300, 5700)])
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert slide.mpp == 0.5
        assert slide.bounds is not None
        assert (slide.bounds.x, slide.bounds.y) == (1000, 5000)
        assert (slide.levels[0].width, slide.levels[0].height) == (1600, 1000)
        expected = over_white(np.asarray(reference.read_region((1000, 5000), 0, (1600, 1000))))
        pixels = whole(slide)
        assert np.abs(pixels - expected).max() <= 0.5
        assert np.abs(pixels[:500, :600].astype(int) - first).mean() < 4  # JPEG
        assert np.abs(pixels[700:, 1300:].astype(int) - second).mean() < 4
        assert slide.missing[0] is not None
        assert slide.missing[0][3, 0]  # rows 768 to 1000: below the first area, left of the second


@pytest.mark.parametrize("missing", ["a macro image", "a scan"])
def test_a_file_of_a_scanner_that_openslide_refuses_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "broken.scn"
    text = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="{missing}" uuid="x" sizeX="100" sizeY="100"/></scn>'
    )
    tifffile.imwrite(path, tissue(256, 256), description=text, software=None, **PLAIN)
    with pytest.raises(SlideError, match=r"broken\.scn: OpenSlide does not open this file of leica"):
        open_slide(path)


def test_the_marks_of_a_scanner_that_openslide_does_not_know_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, tissue(256, 256), extratags=[(65000, 2, 0, "<Argos.Scan/>", True)], **PLAIN)
    with pytest.raises(SlideError, match="marks of a file of Argos, but OpenSlide does not know it"):
        open_slide(path)


def on_glass(side: int, at: int, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    picture = np.full((side, side, 3), GLASS, np.uint8)
    picture[at : at + len(pixels), at : at + pixels.shape[1]] = pixels
    return picture


@pytest.mark.parametrize("flagged", [True, False], ids=["flagged", "not flagged"])
def test_levels_belong_to_the_image_before_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flagged: bool
) -> None:
    first, second = on_glass(2048, 700, tissue()), np.full((1800, 1800, 3), GLASS, np.uint8)
    path = tmp_path / "two.tif"
    with tifffile.TiffWriter(path) as file:
        add_pyramid(file, [first, halved(first)], flagged=flagged)
        second[100:612, 100:612] = tissue(512, 512, 2600)
        add_pyramid(file, [second, halved(second)], flagged=flagged)
    with open_slide(path) as slide:
        assert [level.width for level in slide.levels] == [2048, 1024]
        np.testing.assert_array_equal(whole(slide), first)
        np.testing.assert_array_equal(whole(slide, 1), halved(first))
    assert "the file holds 2 images; 2048 x 2048 px is analysed, not 1800 x 1800" in caplog.text


@pytest.mark.parametrize("compression", ["deflate", None], ids=str)
def test_a_smaller_image_of_the_same_shape_is_a_level_only_if_it_shows_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, compression: str | None
) -> None:
    first, other = on_glass(1024, 300, tissue()), on_glass(512, 20, tissue(400, 400, 2600))
    path = write_pyramid(tmp_path / "a.tif", [first, other], flagged=False, compression=compression)
    with open_slide(path) as slide:
        assert [level.width for level in slide.levels] == [1024]
    assert "not 512 x 512" in caplog.text
    caplog.clear()
    path = write_pyramid(tmp_path / "b.tif", [first, halved(first)], flagged=False, compression=compression)
    with open_slide(path) as slide:
        assert [level.width for level in slide.levels] == [1024, 512]
    assert not caplog.text


@pytest.mark.parametrize("change", ["nearest", "brighter", "jpeg"])
def test_a_level_may_be_made_in_any_way(tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str) -> None:
    pixels = tissue(1024, 1024)
    reduced = halved(pixels)
    if change == "nearest":
        reduced = np.ascontiguousarray(pixels[::2, ::2])
    elif change == "brighter":
        reduced = np.minimum(reduced.astype(int) + 12, 255).astype(np.uint8)
    more: dict[str, Any] = {"compression": "jpeg", "compressionargs": {"level": 40}} if change == "jpeg" else {}
    path = write_pyramid(tmp_path / "a.tif", [pixels, reduced], flagged=False, **more)
    with open_slide(path) as slide:
        assert len(slide.levels) == 2
    assert not caplog.text


def test_levels_in_sub_directories_and_from_the_smallest_on_are_found(tmp_path: Path) -> None:
    pixels = tissue(1024, 768)
    levels = [pixels, halved(pixels), halved(pixels, 4)]
    below = write_pyramid(tmp_path / "below.tif", levels, subifds=True)
    upwards = write_pyramid(tmp_path / "upwards.tif", levels[::-1], flagged=False)
    for path in (below, upwards):
        with open_slide(path) as slide:
            for level, expected in enumerate(levels):
                np.testing.assert_array_equal(whole(slide, level), expected)


@pytest.mark.parametrize("first", ["a blank label", "the whole glass"])
def test_the_first_image_is_the_slide_unless_it_is_blank_or_an_overview(tmp_path: Path, first: str) -> None:
    path, pixels = tmp_path / "a.tif", tissue(700, 600)
    blank = np.full((500, 300, 3), 255, np.uint8)
    with tifffile.TiffWriter(path) as file:
        if first == "a blank label":
            file.write(blank, **PLAIN)
        else:
            blank[100:200, 100:200] = (200, 120, 160)
            file.write(blank, **PLAIN | {"resolution": (100, 100)})
        file.write(pixels, **PLAIN)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(whole(slide), pixels)


def test_a_larger_image_after_the_first_is_not_taken_for_the_slide(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, first = tmp_path / "a.tif", tissue(400, 300)
    with tifffile.TiffWriter(path) as file:
        for pixels in (first, tissue(900, 800, 2500)):
            file.write(pixels, **PLAIN)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(whole(slide), first)
    assert "not 900 x 800" in caplog.text


# ----------------------------------------------------------------------------- size of pixels


def ini(section: str, **values: float) -> str:
    return "".join([f"[{section}]\r\n", *(f"{name}={value}\r\n" for name, value in values.items())])


@pytest.mark.parametrize(
    ("options", "mpp", "source"),
    [
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None, ""),
        ({"resolution": (600, 600), "resolutionunit": "INCH"}, None, ""),
        ({"resolution": (1200, 1200), "resolutionunit": "INCH"}, None, ""),
        ({"resolution": (118.11, 118.11), "resolutionunit": "CENTIMETER"}, None, ""),  # 300 dpi
        ({"resolution": (100_000, 100_000), "resolutionunit": "INCH"}, 0.254, "TIFF resolution"),
        ({"description": "Aperio Image|AppMag = 20|MPP = 0,2525"}, 0.2525, "Aperio"),
        ({"description": "Aperio Image|MPP = 2.5e-1|AppMag = 40"}, 0.25, "Aperio"),
        (
            {
                "description": "Aperio Image|AppMag = 20",
                "resolution": (40_000, 40_000),
                "resolutionunit": "CENTIMETER",
            },
            0.25,
            "TIFF resolution",
        ),
        ({"extratags": [(34682, 2, 0, ini("Scan", PixelWidth=5e-9, PixelHeight=5e-9), True)]}, 0.005, "FEI"),
        ({"extratags": [(51123, 2, 0, '{"PixelSizeUm": 0.325}', True)]}, 0.325, "Micro-Manager"),
    ],
    ids=str,
)
def test_the_size_of_pixels_is_found_wherever_programs_write_it(
    tmp_path: Path, options: dict[str, Any], mpp: float | None, source: str
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", tissue(200, 200), **TILED | {"compression": "lzw"} | options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp == (pytest.approx(mpp) if mpp else None)
        assert slide.mpp_source == source


@pytest.mark.parametrize(
    ("unit", "per_unit", "mpp"),
    [("micron", 2, 0.5), ("um", 4, 0.25), ("\\u00B5m", 4, 0.25), ("nm", 0.1, 0.01), ("mm", 1000, 1.0),
     ("pixel", 2, None), ("inch", 300, None)],
)  # fmt: skip
def test_the_unit_of_imagej_counts(tmp_path: Path, unit: str, per_unit: float, mpp: float | None) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, tissue(64, 64), imagej=True, resolution=(per_unit, per_unit), metadata={"unit": unit})
    with open_slide(path) as slide:
        assert slide.mpp == (pytest.approx(mpp) if mpp else None)
        assert slide.mpp_source == ("ImageJ" if mpp else "")


def test_dicom_says_the_size_of_pixels_in_one_of_its_attributes(wsi_slides: Path, tmp_path: Path) -> None:
    from histostream.wsi.slides.pixel_size import dicom_pixel_size

    source = max((wsi_slides / "dicom-cmu-1-small-region-ybr").glob("*.dcm"), key=lambda file: file.stat().st_size)
    header = pydicom.dcmread(source)
    found = dicom_pixel_size(source, header)
    assert found is not None
    assert (round(found.um, 6), found.source) == (0.499, "DICOM PixelSpacing")
    del header.SharedFunctionalGroupsSequence
    header.ImagedVolumeWidth, header.ImagedVolumeHeight = 2.22, 2.967  # mm
    header.save_as(tmp_path / "a.dcm")
    found = dicom_pixel_size(tmp_path / "a.dcm", pydicom.dcmread(tmp_path / "a.dcm"))
    assert found is not None
    assert (round(found.um, 6), found.source) == (1.0, "DICOM ImagedVolumeWidth")


def test_a_resolution_that_is_far_too_coarse_speaks_of_mpp_first(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", tissue(64, 64), **TILED, resolution=(1000, 1000), resolutionunit=3)
    with open_slide(tmp_path / "a.tif") as slide:
        with pytest.raises(SlideError, match=r"10 um per pixel by TIFF resolution.* pass --mpp .* --force-upsampling"):
            at_mpp(slide, 0.5)
        assert at_mpp(slide, 0.5, slide_mpp=0.5).width == 64


# ----------------------------------------------------------------------------- channels and transparency


def with_band(value: int | NDArray[np.uint8], bands: int = 3) -> NDArray[np.uint8]:
    pixels = tissue(256, 256)[..., :bands]
    band = np.broadcast_to(np.asarray(value, np.uint8), pixels.shape[:2])
    return np.dstack([pixels, band])


RAMP = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_alpha_is_what_the_file_calls_alpha(tmp_path: Path, kind: str) -> None:
    pixels = with_band(RAMP)
    stored = pixels.copy()
    if kind == "assocalpha":  # colours are multiplied with it already
        stored[..., :3] = np.round(pixels[..., :3] * (RAMP[..., None] / 255))
    tifffile.imwrite(tmp_path / "a.tif", stored, **PLAIN, extrasamples=[kind])
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.channels == 3
        assert np.abs(whole(slide) - over_white(pixels)).max() <= 1


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_alpha_that_hides_everything_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    pixels = with_band(0)
    if name == "a.png":
        Image.fromarray(pixels).save(tmp_path / name)
    else:
        tifffile.imwrite(tmp_path / name, pixels, **PLAIN, extrasamples=["unassalpha"])
    with open_slide(tmp_path / name) as slide:
        np.testing.assert_array_equal(whole(slide), pixels[..., :3])
    assert "by its alpha everything is transparent; alpha is ignored" in caplog.text


@pytest.mark.parametrize("value", [0, 255])
def test_a_band_without_a_meaning_that_is_empty_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: int
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", with_band(value), **PLAIN, extrasamples=["unspecified"])
    with open_slide(tmp_path / "a.tif") as slide:
        np.testing.assert_array_equal(whole(slide), tissue(256, 256))
    assert "band 4 without a meaning: the same everywhere" in caplog.text


@pytest.mark.parametrize("options", [{}, {"tile": None, "rowsperstrip": 16}, {"compression": "zstd"}], ids=str)
def test_grey_values_of_which_0_is_white_are_turned_round(tmp_path: Path, options: dict[str, Any]) -> None:
    grey = tissue(256, 256)[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", 255 - grey, **PLAIN | {"photometric": "miniswhite"} | options)
    with open_slide(tmp_path / "a.tif") as slide:
        pixels = whole(slide)
    np.testing.assert_array_equal(pixels, np.broadcast_to(grey[..., None], pixels.shape))


@pytest.mark.parametrize("options", [{"tile": None, "rowsperstrip": 16}, {"compression": "zstd"}], ids=str)
@pytest.mark.parametrize("kind", ["unassalpha", "unspecified"])
def test_an_empty_fourth_band_is_ignored_in_every_layout(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", with_band(0), **PLAIN | options, extrasamples=[kind])
    with open_slide(tmp_path / "a.tif") as slide:
        np.testing.assert_array_equal(whole(slide), tissue(256, 256))
        assert slide.notes


def fluorescence(path: Path, channels: int, form: str) -> NDArray[np.uint8]:
    """Write channels of grey values; return them, (H, W, C)."""
    pixels = 255 - np.dstack([tissue(256, 200, 100 * i)[..., i % 3] for i in range(channels)])
    grey: dict[str, Any] = {"tile": (128, 128), "photometric": "minisblack", "compression": "deflate"}
    if form == "interleaved":
        tifffile.imwrite(path, pixels, planarconfig="contig", metadata=None, **grey)
    else:
        names = {"Channel": {"Name": [f"marker {i}" for i in range(channels)]}}
        planes = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
        tifffile.imwrite(path, planes, ome=True, metadata={"axes": "CYX", **names}, **grey)
    return pixels


@pytest.mark.parametrize("form", ["interleaved", "planes"])
@pytest.mark.parametrize("channels", [2, 3, 4, 5])
def test_channels_that_are_no_colours_are_refused_by_name_and_can_be_picked(
    tmp_path: Path, form: str, channels: int
) -> None:
    path = tmp_path / ("a.ome.tif" if form == "planes" else "a.tif")
    pixels = fluorescence(path, channels, form)
    named = r" \(marker 0, marker 1.*\)" if form == "planes" else ""
    with pytest.raises(SlideError, match=rf"it has {channels} channels{named}, which are not colours.* --channels "):
        open_slide(path)
    for picked in ((0,), (1, 0, 1)):
        with open_for_channels(path, len(picked), picked=picked) as slide:
            np.testing.assert_array_equal(whole(slide), pixels[..., list(picked)])
    with pytest.raises(SlideError, match=f"picks channel {channels}, and it has {channels}"):
        open_for_channels(path, 1, picked=(channels,))


def test_colours_beside_a_band_of_unknown_content_can_be_picked(tmp_path: Path) -> None:
    pixels = with_band(RAMP)
    tifffile.imwrite(tmp_path / "a.tif", pixels, **PLAIN, extrasamples=["unspecified"])
    with pytest.raises(SlideError, match="band 4, of which it does not say what that is; pass --channels 0,1,2"):
        open_slide(tmp_path / "a.tif")
    with open_for_channels(tmp_path / "a.tif", 3, picked=(0, 1, 2)) as slide:
        np.testing.assert_array_equal(whole(slide), pixels[..., :3])


# ----------------------------------------------------------------------------- compressions


NOT_DECODED = ("jpegxl", "jpegxr")  # by OpenSlide, libtiff or Pillow


@pytest.mark.parametrize("compression", [*NOT_DECODED, "lzma", "webp", "zstd", "png", "lerc"])
def test_a_compression_is_read_or_named_when_the_slide_is_opened(tmp_path: Path, compression: str) -> None:
    pixels, path = tissue(300, 260), tmp_path / "a.tif"
    options: dict[str, Any] = {"compressionargs": {"lossless": True}} if compression in ("jpegxl", "webp") else {}
    tifffile.imwrite(path, pixels, **PLAIN | {"compression": compression} | options)
    if compression in NOT_DECODED:
        with pytest.raises(SlideError, match=rf"a\.tif: its compression, {compression.upper()}.*convert it") as error:
            open_slide(path)
        assert " at 0x" not in str(error.value)
        return
    with open_slide(path) as slide:
        np.testing.assert_array_equal(whole(slide), pixels)


# ----------------------------------------------------------------------------- DICOM


def two_series(source: Path, out: Path, suffix: str = ".dcm") -> list[Path]:
    """Copy two levels of a DICOM slide under two series, and return the first file of each."""
    out.mkdir()
    for i, file in enumerate(sorted(source.glob("*.dcm"), key=lambda file: -file.stat().st_size)[:2]):
        shutil.copy(file, out / f"a-{i}{suffix}")
        header = pydicom.dcmread(file)
        header.SeriesInstanceUID += ".7"
        header.SOPInstanceUID += ".7"
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
        header.save_as(out / f"b-{i}{suffix}")
    return [out / f"a-0{suffix}", out / f"b-0{suffix}"]


@pytest.mark.parametrize("suffix", [".dcm", "", ".1"])
def test_files_of_a_series_are_found_by_their_preamble(wsi_slides: Path, tmp_path: Path, suffix: str) -> None:
    first = two_series(wsi_slides / "dicom-cmu-1-small-region-ybr", tmp_path / "two", suffix)
    (tmp_path / "two" / "notes").write_text("not DICOM")
    series = series_among((tmp_path / "two").iterdir())
    assert [files[0] for files in series] == first
    assert [len(files) for files in series] == [2, 2]
    for path in first:
        with open_slide(path) as slide:
            assert [level.downsample for level in slide.levels] == [1, 2]
    with pytest.raises(SlideError, match=r"it holds 2 DICOM series; name one file of the series: .*a-0.*b-0"):
        open_slide(tmp_path / "two")


def test_a_folder_of_one_series_without_suffixes_is_a_slide(wsi_slides: Path, tmp_path: Path) -> None:
    for i, file in enumerate(sorted((wsi_slides / "dicom-cmu-1-small-region-ybr").glob("*.dcm"))):
        shutil.copy(file, tmp_path / f"IM{i}")
    with open_slide(tmp_path) as slide, open_slide(wsi_slides / "dicom-cmu-1-small-region-ybr") as expected:
        assert slide.levels == expected.levels
        np.testing.assert_array_equal(whole(slide, 2), whole(expected, 2))


def test_the_size_of_pixels_is_that_of_the_finest_level_whatever_the_names(wsi_slides: Path, tmp_path: Path) -> None:
    levels = sorted((wsi_slides / "dicom-cmu-1-small-region-ybr").glob("*.dcm"), key=lambda file: file.stat().st_size)
    for i, file in enumerate(levels[-3:]):  # the coarsest first
        shutil.copy(file, tmp_path / f"IM{i}")
    with open_slide(tmp_path) as slide:
        assert slide.levels[0].width == 2220
        assert slide.mpp == pytest.approx(0.499)


@pytest.fixture(autouse=True)
def warnings_are_seen_and_leaked_files_closed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.WARNING, logger="histostream")
    yield
    gc.collect()

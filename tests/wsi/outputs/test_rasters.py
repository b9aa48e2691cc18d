"""Rasters for other readers: the same pixels as labels.tif, whole or not there at all."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import highdicom
import imagecodecs
import large_image_source_openslide
import numpy as np
import ome_zarr_models.v04
import openslide
import pydicom
import pytest
import tifffile
import zarr
from numpy.typing import NDArray
from pydicom.encaps import generate_frames

from histostream.wsi.errors import OutputError, SlideError
from histostream.wsi.outputs.folder import OutputFolder
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, ClassInfo, LabelRows, Sink, SlideInfo
from histostream.wsi.outputs.objects.counting import with_rules
from histostream.wsi.outputs.sinks import find_sink, sink_names
from histostream.wsi.outputs.sinks.rasters import dicom_seg
from histostream.wsi.outputs.sinks.rasters.dicom_seg import DicomSeg
from histostream.wsi.outputs.sinks.rasters.ome_tiff import COLORS, NAMES, SCHEMA, OmeTiff
from histostream.wsi.outputs.sinks.rasters.ome_tiff_rgb import OmeTiffRgb
from histostream.wsi.outputs.sinks.rasters.ome_zarr import OmeZarr
from histostream.wsi.outputs.sinks.tiff import LabelTiff

pytestmark = pytest.mark.full

Array = NDArray[np.uint8]
Maker = Callable[[Path, SlideInfo], Sink]

CLASSES = (
    ClassInfo("background", (250, 240, 230)),
    ClassInfo("nucleus", (200, 10, 30)),
    ClassInfo('gland, "drüse" <\x07>', (10, 150, 60)),
)
MPP = 0.2527
SIZES = [(1, 1), (513, 1), (37, 1030), (2111, 1537)]


def slide_info(width: int, height: int) -> SlideInfo:
    return SlideInfo("slide é.svs", width, height, MPP, with_rules(CLASSES, count_all=True))


def label_map(width: int, height: int, seed: int = 0) -> Array:
    """Squares of 23 px of classes, and glass to the right of 1024 px."""
    values = np.array([0, 1, 2, NOT_ANALYSED], np.uint8)
    squares = np.random.default_rng(seed).integers(0, 4, (height // 23 + 1, width // 23 + 1))
    labels = np.kron(values[squares], np.ones((23, 23), np.uint8))[:height, :width]
    labels[:, 1024:] = NOT_ANALYSED
    return labels


def parts(labels: Array, seed: int, band_px: int = 1 << 20) -> Iterator[LabelRows]:
    """Cut a label map as the runtime does: bands, then rows of any height."""
    heights = np.random.default_rng(seed)
    for x in range(0, labels.shape[1], band_px):
        y = 0
        while y < len(labels):
            rows = labels[y : y + int(heights.integers(1, 900)), x : x + band_px]
            glass = LabelRows.outside(x, y, rows.shape[1], len(rows))
            yield glass if (rows == NOT_ANALYSED).all() else LabelRows(x, y, rows)
            y += len(rows)


def publish(out: Path, maker: Maker, name: str, labels: Array, seed: int = 0, **cut: int) -> Path:
    with OutputFolder(out, "slide") as folder:
        folder.add(maker(folder.path / name, slide_info(labels.shape[1], labels.shape[0])))
        for part in parts(labels, seed, **cut):
            folder.write(part)
    assert {p.name for p in folder.path.iterdir()} == {name, "run.json"}
    return folder.path / name


def content(path: Path) -> dict[str, bytes]:
    """Return the bytes of a file, or of all files of a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what stands for a slide that is not DICOM: nothing but its bytes is looked at."""
    path = tmp_path_factory.mktemp("slides") / "slide.svs"
    path.write_bytes(b"a slide")
    return path


@pytest.fixture(params=sink_names("rasters"))
def raster(request: pytest.FixtureRequest, slide_file: Path) -> tuple[str, Maker]:
    kind = find_sink("rasters", request.param)
    return kind.file, lambda path, info: kind.open(path, info, slide_file)


def test_bits_do_not_depend_on_how_rows_were_cut(tmp_path: Path, raster: tuple[str, Maker]) -> None:
    name, maker = raster
    labels = label_map(2111, 1537)
    found = [
        content(publish(tmp_path / str(seed), maker, name, labels, seed, band_px=band_px))
        for seed, band_px in [(0, 1 << 20), (1, 512)]
    ]
    assert found[0] == found[1]


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, raster: tuple[str, Maker]) -> None:
    name, maker = raster

    def fail() -> None:
        with OutputFolder(tmp_path, "slide") as folder:
            folder.add(maker(folder.path / name, slide_info(700, 600)))
            for part in parts(label_map(700, 600), seed=0):
                folder.write(part)
            folder.finish()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_an_older_result_is_replaced(tmp_path: Path, raster: tuple[str, Maker]) -> None:
    name, maker = raster
    wanted = content(publish(tmp_path / "new", maker, name, label_map(700, 600)))
    publish(tmp_path / "old", maker, name, label_map(2111, 1537, seed=1))
    assert content(publish(tmp_path / "old", maker, name, label_map(700, 600))) == wanted


# --------------------------------------------------------------------------- OME-TIFF


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_ome_tiff_has_the_levels_of_labels_tif(tmp_path: Path, width: int, height: int) -> None:
    labels = label_map(width, height)
    path = publish(tmp_path / "ome", OmeTiff, "labels.ome.tif", labels, band_px=1024)
    plain = publish(tmp_path / "plain", LabelTiff, "labels.tif", labels)
    with tifffile.TiffFile(path) as file, tifffile.TiffFile(plain) as other:
        assert file.is_bigtiff
        assert file.is_ome
        assert len(file.pages) == 1  # the rest are SubIFDs
        (series,) = file.series
        assert [level.shape for level in series.levels] == [page.shape for page in other.pages]
        for level, page in zip(series.levels, other.pages, strict=True):
            np.testing.assert_array_equal(level.asarray(), page.asarray())
            one = level.pages[0]
            assert one is not None
            assert one.aspage().is_tiled
            np.testing.assert_array_equal(one.aspage().colormap, other.pages[0].aspage().colormap)


def test_ome_xml_says_size_and_classes(tmp_path: Path) -> None:
    path = publish(tmp_path, OmeTiff, "labels.ome.tif", label_map(1100, 900))
    with tifffile.TiffFile(path) as file:
        assert file.ome_metadata is not None
        root = ET.fromstring(file.ome_metadata)
    space = {"ome": SCHEMA}
    image, pixels = root.find("ome:Image", space), root.find(".//ome:Pixels", space)
    assert image is not None
    assert image.get("Name") == "slide é.svs"
    assert pixels is not None
    assert [pixels.get(n) for n in ("SizeX", "SizeY", "SizeC", "Type")] == ["1100", "900", "1", "uint8"]
    assert [float(pixels.get(n, "")) for n in ("PhysicalSizeX", "PhysicalSizeY")] == [MPP, MPP]
    found = {
        entry.get("Namespace"): {m.get("K"): m.text for m in entry.iterfind(".//ome:M", space)}
        for entry in root.iterfind(".//ome:MapAnnotation", space)
    }
    gland = 'gland, "drüse" <\\x07>'  # XML has no control characters
    assert found[NAMES] == {"0": "background", "1": "nucleus", "2": gland, "255": "not analysed"}
    assert found[COLORS] == {"0": "#faf0e6", "1": "#c80a1e", "2": "#0a963c"}
    assert {ref.get("ID") for ref in root.iterfind(".//ome:AnnotationRef", space)} == {
        entry.get("ID") for entry in root.iterfind(".//ome:MapAnnotation", space)
    }


def test_ome_tiff_is_colored_and_scaled_in_other_readers(tmp_path: Path) -> None:
    labels = label_map(1100, 900)
    path = publish(tmp_path, OmeTiff, "labels.ome.tif", labels)
    # The source that large_image.open takes, which leaves the file open in one that it does not.
    found = large_image_source_openslide.open(str(path)).getMetadata()
    assert found["mm_x"] == pytest.approx(MPP / 1000, rel=1e-6)
    colors = np.full((256, 3), 255, np.uint8)
    colors[:3] = [entry.color for entry in CLASSES]
    with openslide.OpenSlide(path) as slide:
        seen = np.asarray(slide.read_region((0, 0), 0, (1100, 900)))[..., :3]
    np.testing.assert_array_equal(seen, colors[labels])


def test_the_picture_has_the_colors_of_the_labels_on_all_levels(tmp_path: Path) -> None:
    labels = label_map(2111, 1537)
    path = publish(tmp_path, OmeTiffRgb, "labels.rgb.ome.tif", labels, band_px=512)
    colors = np.full((256, 3), 255, np.uint8)
    colors[:3] = [entry.color for entry in CLASSES]
    with tifffile.TiffFile(path) as file:
        (series,) = file.series
        assert file.is_ome
        assert series.axes == "YXS"
        assert len(series.levels) == 4
        for level, found in enumerate(series.levels):
            wanted = colors[labels[:: 2**level, :: 2**level]]
            np.testing.assert_array_equal(found.asarray(), wanted)


# --------------------------------------------------------------------------- OME-Zarr


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_ome_zarr_has_the_levels_of_labels_tif(tmp_path: Path, width: int, height: int) -> None:
    labels = label_map(width, height)
    path = publish(tmp_path, OmeZarr, "labels.ome.zarr", labels, band_px=1024)
    root: Any = zarr.open_group(path, mode="r", zarr_format=2)
    said: Any = ome_zarr_models.v04.Image.from_zarr(root).attributes.multiscales[0]
    assert [axis.name for axis in said.axes] == ["y", "x"]
    assert {axis.unit for axis in said.axes} == {"micrometer"}
    assert max(root[said.datasets[-1].path].shape) <= 512
    for level, dataset in enumerate(said.datasets):
        np.testing.assert_array_equal(root[dataset.path][:], labels[:: 2**level, :: 2**level])
        (scale,) = dataset.coordinateTransformations
        assert scale.scale == [MPP * 2**level] * 2


def test_ome_zarr_is_a_label_image_as_the_specification_wants_it(tmp_path: Path) -> None:
    path = publish(tmp_path, OmeZarr, "labels.ome.zarr", label_map(1100, 900))
    root: Any = zarr.open_group(path, mode="r", zarr_format=2)
    assert ome_zarr_models.v04.Labels.from_zarr(root["labels"]).attributes.labels == ["classes"]
    found: Any = ome_zarr_models.v04.ImageLabel.from_zarr(root["labels/classes"]).attributes
    assert [dataset.path for dataset in found.multiscales[0].datasets] == ["0", "1", "2"]
    said = found.image_label
    assert said.version == "0.4"
    assert said.source is not None
    assert (path / "labels" / "classes" / said.source.image).resolve() == path
    assert {color.label_value: color.rgba for color in said.colors} == {
        0: (250, 240, 230, 0),
        1: (200, 10, 30, 255),
        2: (10, 150, 60, 255),
        255: (255, 255, 255, 0),
    }
    assert [(entry.label_value, entry.name) for entry in said.properties] == [
        (0, "background"),
        (1, "nucleus"),
        (2, 'gland, "drüse" <\\x07>'),
        (255, "not analysed"),
    ]


def test_glass_takes_no_chunks(tmp_path: Path) -> None:
    path = publish(tmp_path, OmeZarr, "labels.ome.zarr", label_map(2111, 1537))
    chunks = {p.relative_to(path).as_posix() for p in (path / "labels" / "classes" / "0").glob("*/*")}
    assert chunks == {f"labels/classes/0/{y}/{x}" for y in range(4) for x in range(2)}


def test_what_a_killed_run_left_of_a_folder_is_not_in_the_next(tmp_path: Path) -> None:
    for left in (".labels.ome.zarr.part", ".labels.ome.zarr.old"):
        stray = tmp_path / "slide" / left / "labels" / "classes" / "0" / "9"
        stray.mkdir(parents=True)
        (stray / "9").write_bytes(b"stray")
    labels = label_map(700, 600)
    found = content(publish(tmp_path, OmeZarr, "labels.ome.zarr", labels))
    assert found == content(publish(tmp_path / "other", OmeZarr, "labels.ome.zarr", labels))


def test_a_folder_that_cannot_take_its_place_leaves_no_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(tmp_path, OmeZarr, "labels.ome.zarr", label_map(700, 600))
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target == path:
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match=r"no permission to write .*labels\.ome\.zarr"):
        publish(tmp_path, OmeZarr, "labels.ome.zarr", label_map(700, 600, seed=1))
    assert not (path.parent / "run.json").exists()
    monkeypatch.undo()
    wanted = label_map(700, 600, seed=2)
    found = content(publish(tmp_path, OmeZarr, "labels.ome.zarr", wanted))
    assert found == content(publish(tmp_path / "new", OmeZarr, "labels.ome.zarr", wanted))


def test_a_link_to_a_folder_is_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "kept").write_text("mine")
    (tmp_path / "slide").mkdir()
    (tmp_path / "slide" / "labels.ome.zarr").symlink_to(mine, target_is_directory=True)
    with pytest.raises(OutputError, match="move the file that is in the way"):
        publish(tmp_path, OmeZarr, "labels.ome.zarr", label_map(70, 60))
    assert os.listdir(mine) == ["kept"]  # noqa: PTH208


@pytest.mark.parametrize(
    ("name", "needs"), [("ome-zarr", r"zarr: .*\[zarr\]"), ("dicom-seg", r"highdicom: .*\[dicom\]")]
)
def test_a_missing_library_is_one_clear_line(
    tmp_path: Path, slide_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, needs: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    find_sink("rasters", "ome-tiff").check_installed()
    with pytest.raises(OutputError, match=needs):
        find_sink("rasters", name).check_installed()
    with pytest.raises(OutputError, match=needs):
        find_sink("rasters", name).open(tmp_path / "labels", slide_info(70, 60), slide_file)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- DICOM


def segmentation(out: Path, slide: Path, labels: Array, info: SlideInfo | None = None, **cut: int) -> Any:
    info = info or slide_info(labels.shape[1], labels.shape[0])
    with OutputFolder(out, "slide") as folder:
        folder.add(DicomSeg(folder.path / "labels.dcm", info, slide))
        for part in parts(labels, seed=3, **cut):
            folder.write(part)
    return highdicom.seg.segread(folder.path / "labels.dcm")


def labels_of(found: Any) -> Array:
    """Return what highdicom's own reader makes of all frames, less the 1 that labels begin at."""
    matrix: Array = found.get_total_pixel_matrix(combine_segments=True, dtype=np.uint8)
    return matrix - np.uint8(1)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_highdicom_reads_the_labels(tmp_path: Path, slide_file: Path, width: int, height: int) -> None:
    labels = label_map(width, height)
    found = segmentation(tmp_path, slide_file, labels, band_px=1024)
    np.testing.assert_array_equal(labels_of(found), labels)
    volume = found.get_volume(combine_segments=True, dtype=np.uint8)
    np.testing.assert_array_equal(volume.array[0] - np.uint8(1), labels)
    assert volume.spacing[1:] == pytest.approx([MPP / 1000] * 2)
    assert list(found.segment_numbers) == [1, 2, 3]


def test_pydicom_finds_every_frame_by_either_offset_table(
    tmp_path: Path, slide_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = label_map(1100, 900)
    for folder in ("basic", "extended"):
        segmentation(tmp_path / folder, slide_file, labels)
        header = pydicom.dcmread(tmp_path / folder / "slide" / "labels.dcm")
        assert ("ExtendedOffsetTable" in header) == (folder == "extended")
        frames = list(
            generate_frames(
                header.PixelData,
                number_of_frames=header.NumberOfFrames,
                extended_offsets=(header.ExtendedOffsetTable, header.ExtendedOffsetTableLengths)
                if folder == "extended"
                else None,
            )
        )
        assert len(frames) == 3 * 2
        middle = imagecodecs.jpegls_decode(frames[1]) - np.uint8(1)
        np.testing.assert_array_equal(middle, labels[:512, 512:1024])
        monkeypatch.setattr(dicom_seg, "MAX_OFFSET", 0)


def test_segments_have_names_codes_and_colors(tmp_path: Path, slide_file: Path) -> None:
    classes = (*CLASSES[:2], ClassInfo("Tumour bed", (9, 9, 9)), ClassInfo("drüse \\ x", (1, 99, 250)))
    info = SlideInfo("slide.svs", 40, 30, MPP, classes)
    found = segmentation(tmp_path, slide_file, np.zeros((30, 40), np.uint8), info)
    segments = [found.get_segment_description(number) for number in range(5)]
    assert [segment.segment_label for segment in segments] == [
        "not analysed",
        "background",
        "nucleus",
        "Tumour bed",
        "drüse / x",
    ]
    kinds = [segment.segmented_property_type for segment in segments]
    assert [(kind.scheme_designator, kind.value) for kind in kinds[:4]] == [
        ("DCM", "125040"),
        ("DCM", "125040"),
        ("SCT", "84640000"),
        ("SCT", "108369006"),
    ]
    assert (kinds[4].scheme_designator, kinds[4].meaning) == ("99HISTOSTREAM", "drüse / x")
    for segment, entry in zip(segments[1:], classes, strict=True):
        color = highdicom.color.CIELabColor(0, 0, 0)
        color._value = tuple(segment.RecommendedDisplayCIELabValue)
        np.testing.assert_allclose(color.to_rgb(), entry.color, atol=1)


def test_the_same_slide_has_the_same_study_wherever_it_lies(tmp_path: Path, slide_file: Path) -> None:
    def identity(folder: str, slide: Path, labels: Array) -> tuple[list[str], list[str]]:
        found = segmentation(tmp_path / folder, slide, labels)
        source = found.SourceImageSequence[0].ReferencedSOPInstanceUID
        return (
            [found.StudyInstanceUID, found.FrameOfReferenceUID, source],
            [found.SeriesInstanceUID, found.SOPInstanceUID],
        )

    copied, other = tmp_path / "copy.svs", tmp_path / "other.svs"
    copied.write_bytes(slide_file.read_bytes())
    os.utime(copied, ns=(slide_file.stat().st_mtime_ns,) * 2)
    other.write_bytes(b"another slide")
    labels = label_map(70, 60)
    slide, result = identity("0", slide_file, labels)
    assert identity("1", copied, labels) == (slide, result)
    again, another = identity("2", slide_file, label_map(70, 60, seed=1))
    assert again == slide
    assert not set(another) & set(result)
    assert not set(identity("3", other, labels)[0]) & set(slide)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # in the headers of these slides
@pytest.mark.parametrize("width", [2220, 1200, 20])
def test_a_dicom_slide_is_referred_to_at_the_nearest_level(tmp_path: Path, wsi_slides: Path, width: int) -> None:
    folder = wsi_slides / "dicom-cmu-1-small-region-ybr"
    levels = [pydicom.dcmread(file, stop_before_pixels=True) for file in folder.glob("*.dcm")]
    columns = min((level.TotalPixelMatrixColumns for level in levels), key=lambda w: abs(np.log(w / width)))
    (level,) = (level for level in levels if level.TotalPixelMatrixColumns == columns)
    labels = label_map(width, width)
    for slide in (folder, next(folder.glob("*.dcm"))):
        found = segmentation(tmp_path / slide.name, slide, labels)
        (source,) = found.SourceImageSequence
        assert source.ReferencedSOPInstanceUID == level.SOPInstanceUID
        for name in ("StudyInstanceUID", "FrameOfReferenceUID", "ImageOrientationSlide"):
            assert found[name].value == level[name].value
        (series,) = found.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == level.SeriesInstanceUID
        assert found.get_volume_geometry().spacing[1:] == pytest.approx([MPP / 1000] * 2)
        np.testing.assert_array_equal(labels_of(found), labels)


def test_a_header_that_cannot_be_used_is_one_clear_line(tmp_path: Path, slide_file: Path) -> None:
    segmentation(tmp_path, slide_file, label_map(70, 60))
    broken = tmp_path / "broken.dcm"
    broken.write_bytes(b"\0" * 128 + b"DICM" + b"\x02\0\x10\0UI\xff\xff")
    for slide in (broken, tmp_path / "slide" / "labels.dcm"):
        with pytest.raises(SlideError, match="leave dicom-seg out"):
            DicomSeg(tmp_path / "labels.dcm", slide_info(70, 60), slide)

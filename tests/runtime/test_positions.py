"""Nuclei of known place are found again there, whatever format the slide has, in every file of the result.

The slides show discs on a pale ground; a network that labels by colour finds them. Expected places are those that were
drawn; a disc may be off by one pixel of the model's resolution.
"""

from __future__ import annotations

import gc
import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pydicom
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from histostream.runtime.options import Options
from histostream.runtime.result import SlideResult
from histostream.runtime.slide_run import segment_slide
from histostream.runtime.viewer.slide import OVERLAP_PX, TILE_PX, SlideTiles
from histostream.wsi.outputs.label_rows import ClassInfo
from tests.runtime.conftest import CARD, IdentityEngine
from tests.wsi.slides.field import TILED, halved, write_leica, write_philips, write_pyramid, write_trestle
from tests.wsi.slides.mirax import write_mirax

WIDTH, HEIGHT = 1024, 768
DISCS = ((100, 90, 14), (511, 260, 20), (700, 383, 9), (1000, 745, 12), (256, 512, 16))  # x, y of the centre, radius
GROUND, NUCLEUS = (225, 245, 225), (250, 20, 30)
CLASSES = (ClassInfo("nucleus", (255, 0, 0)), ClassInfo("ground", (0, 255, 0), "background"), ClassInfo("b", (0, 0, 9)))
# large-image looks into plain images several times and leaves a file object open each time.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def leaked_files_closed() -> Iterator[None]:
    yield
    gc.collect()


def picture() -> NDArray[np.uint8]:
    """Return the slide; pixel i covers i to i + 1, so a disc has its centre at a corner of four pixels."""
    pixels = np.full((HEIGHT, WIDTH, 3), GROUND, np.uint8)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    for left, top, radius in DISCS:
        pixels[(x - left) ** 2 + (y - top) ** 2 <= radius**2] = NUCLEUS
    return pixels


def write_ome(path: Path, pixels: NDArray[np.uint8]) -> Path:
    with tifffile.TiffWriter(path, ome=True) as file:
        options = TILED | {"compression": "deflate", "metadata": {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}}
        file.write(pixels, subifds=1, **options)
        file.write(halved(pixels), subfiletype=1, **TILED | {"compression": "deflate"})
    return path


def write_aperio(path: Path, pixels: NDArray[np.uint8]) -> Path:
    with tifffile.TiffWriter(path) as file:
        text = "Aperio Image Library v11\r\n1024x768 |AppMag = 20|MPP = 0.5"
        options = TILED | {"compression": "jpeg", "compressionargs": {"level": 95}}
        file.write(pixels, description=text, **options)
        file.write(halved(pixels, 4), photometric="rgb", rowsperstrip=16, metadata=None)  # the thumbnail
        file.write(halved(pixels), description=text, **options)
    return path


def write_png(path: Path, pixels: NDArray[np.uint8]) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def write_dicom(path: Path, pixels: NDArray[np.uint8], source: Path) -> Path:
    """Write a DICOM slide of two levels with the attributes of a real one, and frames in no order."""
    path.mkdir()
    header = pydicom.dcmread(source)
    side = 256
    header.Rows = header.Columns = side
    for number, (level, mm) in enumerate(((pixels, 0.0005), (halved(pixels), 0.001))):
        high, wide = (-(-extent // side) for extent in level.shape[:2])
        padded = np.full((high * side, wide * side, 3), 255, np.uint8)
        padded[: level.shape[0], : level.shape[1]] = level
        frames = []
        for row in range(high):
            for column in range(wide):
                frame, data = padded[row * side : (row + 1) * side, column * side : (column + 1) * side], io.BytesIO()
                Image.fromarray(frame).save(data, "JPEG", quality=95, subsampling=1)
                frames.append(data.getvalue())
        header.TotalPixelMatrixRows, header.TotalPixelMatrixColumns = level.shape[:2]
        header.NumberOfFrames, header.PixelData = len(frames), pydicom.encaps.encapsulate(frames)
        header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [mm, mm]
        header.ImagedVolumeWidth, header.ImagedVolumeHeight = WIDTH * 0.0005, HEIGHT * 0.0005
        header.SOPInstanceUID = f"{header.SeriesInstanceUID}.{number + 1}"
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
        header.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED" if number else "NONE"]
        header.save_as(path / f"IM{number}")
    return path


FORMATS: dict[str, Callable[..., Path]] = {
    "a.tif": lambda path, pixels: write_pyramid(path, [pixels, halved(pixels)]),
    "a.strips.tif": lambda path, pixels: write_pyramid(path, [pixels], tile=None, rowsperstrip=40),
    "a.ome.tif": write_ome,
    "a.svs": write_aperio,
    "a.scn": lambda path, pixels: write_leica(path, [(pixels, 1100, 3210)]),
    "a.mrxs": lambda path, pixels: write_mirax(path, pixels, grid=(9, 8), first=(3, 2), tile_px=256),
    "a.philips.tiff": write_philips,
    "a.trestle.tif": write_trestle,
    "a.png": write_png,
    "dicom": write_dicom,
}


def places_in(labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return x, y of the centre of each nucleus of a label map, in pixels, sorted."""
    found, count = ndimage.label(labels == 0)
    centres = np.asarray(ndimage.center_of_mass(labels == 0, found, np.arange(1, count + 1))) + 0.5
    return np.asarray(sorted((x, y) for y, x in centres))


def outlines_of(folder: Path) -> NDArray[np.float64]:
    with gzip.open(folder / "objects.geojson.gz", "rt") as file:
        rings = [np.asarray(feature["geometry"]["coordinates"][0]) for feature in json.load(file)["features"]]
    boxes = [(ring[:, :2].min(0), ring[:, :2].max(0)) for ring in rings]
    return np.asarray(sorted(tuple((low + high) / 2) for low, high in boxes))


EXPECTED = np.asarray(sorted((x, y) for x, y, _ in DISCS), float)


@pytest.mark.parametrize("mpp", [0.5, 1.0], ids=["as scanned", "half as fine"])
@pytest.mark.parametrize("name", FORMATS)
def test_nuclei_are_where_they_were_drawn(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, mpp: float
) -> None:
    more: list[Any] = []
    if name == "dicom":
        folder = request.getfixturevalue("wsi_slides") / "dicom-cmu-1-small-region-ybr"
        more = [max(folder.glob("*.dcm"), key=lambda file: file.stat().st_size)]
    slide = FORMATS[name](tmp_path / name, picture(), *more)
    engine = IdentityEngine(card=replace(CARD, classes=CLASSES, mpp=mpp))
    options = Options(annotations=("qupath",), mpp=0.5 if name == "a.png" else None, tissue=False)
    result = segment_slide(slide, engine, tmp_path / "out", options)
    down = mpp / 0.5
    labels = tifffile.imread(result.folder / "labels.tif", key=0)
    assert labels.shape == (HEIGHT // down, WIDTH // down)
    found = places_in(labels) * down
    assert found.shape == EXPECTED.shape
    assert np.abs(found - EXPECTED).max() <= down
    # OpenSlide reads the same label map; its outlines are in full-size pixels.
    with openslide.OpenSlide(result.folder / "labels.tif") as reference:
        shown = np.asarray(reference.read_region((0, 0), 0, reference.dimensions).convert("RGB"))
    assert np.abs(places_in((shown != (255, 0, 0)).any(-1).astype(np.uint8)) * down - EXPECTED).max() <= down
    assert np.abs(outlines_of(result.folder) - EXPECTED).max() <= down
    _check_viewer(slide, result)


def _check_viewer(slide: Path, result: SlideResult) -> None:
    """The viewer shows the nuclei of the slide at the same places, at full size and half as fine."""
    tiles = SlideTiles(slide)
    assert (tiles.width, tiles.height) == (WIDTH, HEIGHT)
    for down in (1, 2):
        level = tiles.levels - down
        shown = np.zeros((HEIGHT // down, WIDTH // down), np.uint8)
        for row in range(-(-shown.shape[0] // TILE_PX)):
            for column in range(-(-shown.shape[1] // TILE_PX)):
                tile = imagecodecs.jpeg8_decode(tiles.jpeg(level, column, row))
                x, y = (i * TILE_PX - (OVERLAP_PX if i else 0) for i in (column, row))
                shown[y : y + tile.shape[0], x : x + tile.shape[1]] = tile[..., 1] > 130  # green: the ground
        assert np.abs(places_in(shown) * down - EXPECTED).max() <= down
    assert result.labels.shape[0] in (HEIGHT, HEIGHT // 2)


@pytest.mark.full
@pytest.mark.parametrize("name", ["a.scn", "a.ome.tif"])
def test_a_dicom_segmentation_has_the_nuclei_where_they_were_drawn(tmp_path: Path, name: str) -> None:
    slide = FORMATS[name](tmp_path / name, picture())
    engine = IdentityEngine(card=replace(CARD, classes=CLASSES, mpp=0.5))
    result = segment_slide(slide, engine, tmp_path / "out", Options(tissue=False, rasters=("dicom-seg",)))
    header = pydicom.dcmread(result.folder / "labels.dcm")
    segmented = np.ones((header.TotalPixelMatrixRows, header.TotalPixelMatrixColumns), np.uint8)
    assert segmented.shape == (HEIGHT, WIDTH)
    assert header.DimensionOrganizationType == "TILED_FULL"  # rows of tiles, from the left
    columns = -(-WIDTH // header.Columns)
    for number, frame in enumerate(header.pixel_array):
        x, y = number % columns * header.Columns, number // columns * header.Rows
        part = segmented[y : y + frame.shape[0], x : x + frame.shape[1]]
        part[frame[: part.shape[0], : part.shape[1]] == 1] = 0  # segment 1 is the first class
    assert np.abs(places_in(segmented) - EXPECTED).max() <= 1

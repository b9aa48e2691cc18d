"""Slides that OpenSlide places in a larger area: every file has the pixels where its reader looks for them.

The slides are MIRAX files that OpenSlide opens, with one red square on white at a known place.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from numpy.typing import NDArray

from histostream.runtime.options import OptionError, Options
from histostream.runtime.record import SlideRecord, read_run
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.errors import SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.outputs.label_rows import ClassInfo
from histostream.wsi.records import from_json
from histostream.wsi.slides.reader import open_slide
from tests.runtime.conftest import CARD, IdentityEngine
from tests.wsi.slides.mirax import write_mirax

TILE = 256
GRID, FIRST = (12, 10), (5, 3)
ORIGIN = (FIRST[0] * TILE, FIRST[1] * TILE)
SIZE = (768, 512)
SQUARE = Box(310, 130, 40, 60)  # in the scanned area
OBJECTS = Options(tissue=False, annotations=("qupath", "dsa"), objects=("csv",))
# The second class is the background, so the objects are the red ones.
CLASSES = (ClassInfo("red", (255, 0, 0)), ClassInfo("green", (0, 255, 0), "background"), ClassInfo("blue", (0, 0, 255)))


def engine() -> IdentityEngine:
    return IdentityEngine(card=replace(CARD, classes=CLASSES))


def picture() -> NDArray[np.uint8]:
    """Return white that is a little greener than red, with a red square."""
    pixels = np.full((SIZE[1], SIZE[0], 3), (240, 250, 240), np.uint8)
    pixels[SQUARE.y : SQUARE.bottom, SQUARE.x : SQUARE.right] = (250, 20, 30)
    return pixels


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_mirax(tmp_path / "case.mrxs", picture(), grid=GRID, first=FIRST, tile_px=TILE)


def outlines(folder: Path) -> list[list[list[float]]]:
    with gzip.open(folder / "objects.geojson.gz", "rt") as file:
        return [feature["geometry"]["coordinates"][0] for feature in json.load(file)["features"]]


def box_of(points: Any) -> Box:
    xy = np.asarray(points, float)[:, :2]
    (left, top), (right, bottom) = xy.min(0), xy.max(0)
    return Box(int(left), int(top), int(right - left), int(bottom - top))


def moved(box: Box) -> Box:
    return replace(box, x=box.x + ORIGIN[0], y=box.y + ORIGIN[1])


def test_the_scanned_area_is_the_slide_and_openslide_has_it_at_its_bounds(slide: Path) -> None:
    whole = openslide.OpenSlide(slide)
    assert whole.dimensions == (GRID[0] * TILE, GRID[1] * TILE)
    with open_slide(slide) as reader:
        assert reader.bounds == Box(*ORIGIN, *SIZE)
        assert (reader.levels[0].width, reader.levels[0].height) == SIZE
        read = reader.read(0, 300, 100, 200, 120)
        at = (300 + ORIGIN[0], 100 + ORIGIN[1])
        assert np.array_equal(read, np.asarray(whole.read_region(at, 0, (200, 120)).convert("RGB")))
        coarse = reader.read(1, 128, 0, 96, 80)
        at = (2 * 128 + ORIGIN[0], ORIGIN[1])
        assert np.array_equal(coarse, np.asarray(whole.read_region(at, 1, (96, 80)).convert("RGB")))


@pytest.mark.parametrize(
    ("grid", "first", "absent", "expected"),
    [
        ((3, 2), (0, 0), (), None),
        ((3, 7), (0, 4), (), Box(0, 4 * TILE, *SIZE)),
        ((9, 2), (6, 0), (), Box(6 * TILE, 0, *SIZE)),
        ((8, 8), (5, 6), (), Box(5 * TILE, 6 * TILE, *SIZE)),
        ((8, 8), (1, 1), ((1, 1), (1, 2)), Box(2 * TILE, TILE, SIZE[0] - TILE, SIZE[1])),
    ],
    ids=["all", "full width", "full height", "last corner", "absent tiles"],
)
def test_the_pixels_are_those_of_openslide_wherever_the_scanned_area_lies(
    tmp_path: Path, grid: tuple[int, int], first: tuple[int, int], absent: Any, expected: Box | None
) -> None:
    path = write_mirax(tmp_path / "x.mrxs", picture(), grid=grid, first=first, absent=absent, zooms=3)
    whole = openslide.OpenSlide(path)
    with open_slide(path) as reader:
        assert reader.bounds == expected
        box = expected or Box(0, 0, *whole.dimensions)
        size = reader.levels[0].width, reader.levels[0].height
        assert size == (box.width, box.height)
        shown = np.asarray(whole.read_region((box.x, box.y), 0, size).convert("RGB"))
        assert np.array_equal(reader.read(0, 0, 0, *size), shown)


@pytest.mark.parametrize("coordinates", ["qupath", "openslide"])
def test_each_file_has_a_square_where_its_reader_looks_for_it(slide: Path, tmp_path: Path, coordinates: str) -> None:
    options = replace(OBJECTS, coordinates=coordinates)
    folder = segment_slide(slide, engine(), tmp_path / "out", options).folder
    expected = SQUARE if coordinates == "qupath" else moved(SQUARE)
    assert [box_of(points) for points in outlines(folder)] == [expected]
    area = json.loads((folder / "tissue.geojson").read_text())
    start = (0, 0) if coordinates == "qupath" else ORIGIN
    assert [box_of(f["geometry"]["coordinates"][0]) for f in area["features"]] == [Box(*start, *SIZE)]
    annotation = json.loads((folder / "annotations.json").read_text())
    assert [box_of(element["points"]) for element in annotation["elements"]] == [expected]
    header, line = (folder / "objects.csv").read_text().splitlines()
    row = dict(zip(header.split(","), line.split(","), strict=True))
    sides = [float(row[name]) for name in ("left_px", "top_px", "right_px", "bottom_px")]
    assert sides == [expected.x, expected.y, expected.right, expected.bottom]
    centre = expected.x + (expected.width - 1) / 2, expected.y + (expected.height - 1) / 2
    assert (float(row["x_px"]), float(row["y_px"])) == pytest.approx(centre, abs=0.51)
    # What OpenSlide shows in the box is the square, if the box is in its coordinates.
    box = expected if coordinates == "openslide" else moved(expected)
    shown = openslide.OpenSlide(slide).read_region((box.x, box.y), 0, (box.width, box.height)).convert("RGB")
    assert np.unique(np.asarray(shown).reshape(-1, 3), axis=0).tolist() == [[250, 20, 30]]
    labels = np.asarray(openslide.OpenSlide(folder / "labels.tif").read_region((0, 0), 0, SIZE).convert("RGB"))
    rows, columns = np.nonzero((labels == (255, 0, 0)).all(-1))
    edges = [int(side) for side in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
    assert edges == [SQUARE.x, SQUARE.y, SQUARE.right, SQUARE.bottom]


@pytest.mark.parametrize("coordinates", ["qupath", "openslide"])
def test_a_region_is_read_in_the_coordinates_of_the_program_that_drew_it(
    slide: Path, tmp_path: Path, coordinates: str
) -> None:
    drawn = Box(320, 100, 100, 100)  # cuts the square
    box = drawn if coordinates == "qupath" else moved(drawn)
    corners = [[box.x, box.y], [box.right, box.y], [box.right, box.bottom], [box.x, box.bottom], [box.x, box.y]]
    roi = tmp_path / "roi.geojson"
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [corners]}))
    options = replace(OBJECTS, roi=roi, coordinates=coordinates)
    folder = segment_slide(slide, engine(), tmp_path / "out", options).folder
    (found,) = (box_of(points) for points in outlines(folder))
    cut = Box(drawn.x, SQUARE.y, SQUARE.right - drawn.x, SQUARE.bottom - SQUARE.y)
    expected = cut if coordinates == "qupath" else moved(cut)
    assert (found.x, found.y, found.right, found.bottom) == (
        expected.x,
        expected.y,
        expected.right,
        expected.bottom,
    )


def test_a_region_in_other_coordinates_is_refused_with_the_option_that_helps(slide: Path, tmp_path: Path) -> None:
    box = moved(SQUARE)
    corners = [[box.x, box.y], [box.right, box.y], [box.right, box.bottom], [box.x, box.y]]
    roi = tmp_path / "roi.geojson"
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [corners]}))
    options = replace(OBJECTS, roi=roi)
    with pytest.raises(SlideError, match=r"no polygon lies on the slide .*or pass --coordinates openslide"):
        segment_slide(slide, engine(), tmp_path / "out", options)
    segment_slide(slide, engine(), tmp_path / "out", replace(options, coordinates="openslide"))


def test_the_scanned_area_is_recorded_and_older_records_are_read_without_it(slide: Path, tmp_path: Path) -> None:
    folder = segment_slide(slide, engine(), tmp_path / "out", Options(tissue=False)).folder
    record = json.loads((folder / "run.json").read_text())
    assert record["slide"]["bounds"] == {"x": 1280, "y": 768, "width": 768, "height": 512}
    assert record["options"]["coordinates"] == "qupath"
    run = read_run(folder)
    assert run is not None
    assert run.slide.bounds == Box(*ORIGIN, *SIZE)
    assert from_json(SlideRecord, {"path": "a"}).bounds is None
    assert from_json(SlideRecord, {"bounds": {"x": 1}}).bounds is None


def test_unknown_coordinates_are_refused() -> None:
    with pytest.raises(OptionError, match="coordinates='asap': use qupath or openslide"):
        Options(coordinates="asap")


@pytest.mark.full
def test_a_dicom_segmentation_has_the_pixels_of_the_scanned_area(slide: Path, tmp_path: Path) -> None:
    import pydicom
    from pydicom.pixels.utils import pixel_array

    options = Options(tissue=False, rasters=("dicom-seg",))
    folder = segment_slide(slide, engine(), tmp_path / "out", options).folder
    header = pydicom.dcmread(folder / "labels.dcm")
    assert (header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows) == SIZE
    (origin,) = header.TotalPixelMatrixOriginSequence
    assert (origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem) == (0, 0)
    first = pixel_array(header, index=0)  # of 512 px; the square lies in it
    rows, columns = np.nonzero(first == 1)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (
        SQUARE.x,
        SQUARE.y,
        SQUARE.right,
        SQUARE.bottom,
    )

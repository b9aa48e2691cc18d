"""Files of objects: they follow the published schemas, and give the label map back."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow.parquet
import pytest
import shapely
from numpy.typing import NDArray

from histostream.wsi.errors import OutputError
from histostream.wsi.outputs.folder import OutputFolder
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, ClassInfo, LabelRows, SlideInfo
from histostream.wsi.outputs.object_rule import ObjectRule
from histostream.wsi.outputs.objects import simplify
from histostream.wsi.outputs.objects.counting import with_rules
from histostream.wsi.outputs.sinks import SinkKind, find_sink, object_files, sink_names
from histostream.wsi.outputs.sinks.annotations.qupath import ANNOTATION_UM2
from histostream.wsi.outputs.sinks.object_files import Objects

pytestmark = pytest.mark.full

Labels = NDArray[np.uint8]

CLASSES = (
    ClassInfo("background", (250, 240, 230)),
    ClassInfo("nucleus", (200, 10, 30)),
    ClassInfo('gland, "drüse"', (10, 150, 60)),
)
MPP = 0.5
SLIDE = Path("slide.svs")


def kinds(*names: str) -> list[SinkKind]:
    annotations = sink_names("annotations")
    return [find_sink("annotations" if name in annotations else "objects", name) for name in names]


EVERY = (*sink_names("annotations"), *sink_names("objects"))

POSITION = {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "number"}}
# RFC 7946, sections 3.1.6 and 3.3, and what QuPath's PathObjectTypeAdapters reads (0.4 to 0.6).
GEOJSON: dict[str, Any] = {
    "type": "object",
    "required": ["type", "features"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "geometry", "properties"],
                "additionalProperties": False,
                "properties": {
                    "type": {"const": "Feature"},
                    "geometry": {
                        "type": "object",
                        "required": ["type", "coordinates"],
                        "properties": {
                            "type": {"const": "Polygon"},
                            "coordinates": {
                                "type": "array",
                                "minItems": 1,
                                "items": {"type": "array", "minItems": 4, "items": POSITION},
                            },
                        },
                    },
                    "properties": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["objectType", "classification", "measurements"],
                        "properties": {
                            "objectType": {"enum": ["detection", "annotation"]},
                            "classification": {
                                "type": "object",
                                "required": ["name", "color"],
                                "properties": {
                                    "name": {"type": "string"},
                                    "color": {
                                        "type": "array",
                                        "minItems": 3,
                                        "maxItems": 3,
                                        "items": {"type": "integer", "minimum": 0, "maximum": 255},
                                    },
                                },
                            },
                            "measurements": {"type": "object", "additionalProperties": {"type": "number"}},
                        },
                    },
                },
            },
        },
    },
}
# Of girder_large_image_annotation (models/annotation.py): what it demands of a polyline.
COORDINATE = {"type": "array", "minItems": 3, "maxItems": 3, "items": {"type": "number"}}
COLOR = {
    "type": "string",
    "pattern": r"^(#[0-9a-fA-F]{3,6}|rgb\(\d+,\s*\d+,\s*\d+\)|"
    r"rgba\(\d+,\s*\d+,\s*\d+,\s*(\d?\.|)\d+\))$",
}
LARGE_IMAGE: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "description": {"type": "string"},
        "attributes": {"type": "object"},
        "elements": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "points"],
                "additionalProperties": False,
                "properties": {
                    "id": {"type": "string", "pattern": "^[0-9a-f]{24}$"},
                    "type": {"const": "polyline"},
                    "user": {"type": "object"},
                    "label": {
                        "type": "object",
                        "required": ["value"],
                        "additionalProperties": False,
                        "properties": {"value": {"type": "string"}},
                    },
                    "group": {"type": "string"},
                    "lineColor": COLOR,
                    "lineWidth": {"type": "number", "minimum": 0},
                    "fillColor": COLOR,
                    "closed": {"const": True},
                    "points": {"type": "array", "minItems": 2, "items": COORDINATE},
                    "holes": {"type": "array", "items": {"type": "array", "minItems": 3, "items": COORDINATE}},
                },
            },
        },
    },
}


def tissue(width: int = 1200, height: int = 700) -> Labels:
    """A gland with nuclei in it (holes of it), nuclei outside, and glass."""
    y, x = np.mgrid[0:height, 0:width]
    labels = np.zeros((height, width), np.uint8)
    labels[np.hypot(x - 600, (y - 300) * 1.7) < 330] = 2
    rng = np.random.default_rng(0)
    for cx, cy in zip(rng.uniform(0, width, 150), rng.uniform(0, height, 150), strict=True):
        near = np.s_[max(0, int(cy) - 12) : int(cy) + 12, max(0, int(cx) - 12) : int(cx) + 12]
        labels[near][np.hypot(x[near] - cx, (y[near] - cy) * rng.uniform(1, 2)) < 9] = 1
    labels[640:] = NOT_ANALYSED
    return labels


def parts(labels: Labels, band_px: int, rows: int) -> Iterator[LabelRows]:
    height, width = labels.shape
    for x in range(0, width, band_px):
        for y in range(0, height, rows):
            part = labels[y : y + rows, x : x + band_px]
            if (part == NOT_ANALYSED).all():
                yield LabelRows.outside(x, y, part.shape[1], len(part))
            else:
                yield LabelRows(x, y, part)


def written(
    path: Path,
    labels: Labels,
    band_px: int = 1 << 20,
    rows: int = 1 << 20,
    files: tuple[str, ...] = EVERY,
    classes: tuple[ClassInfo, ...] = CLASSES,
    **options: Any,
) -> Path:
    info = SlideInfo("slide.svs", labels.shape[1], labels.shape[0], MPP, classes)
    with OutputFolder(path, "slide") as folder:
        folder.add(Objects(folder.path, info, SLIDE, kinds(*files), **options))
        for part in parts(labels, band_px, rows):
            folder.write(part)
    return folder.path


def features(folder: Path) -> list[dict[str, Any]]:
    text = gzip.decompress((folder / "objects.geojson.gz").read_bytes())
    found: list[dict[str, Any]] = json.loads(text)["features"]
    return found


def polygons(folder: Path) -> NDArray[Any]:
    return np.array([shapely.geometry.shape(f["geometry"]) for f in features(folder)])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "objects.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_are_the_same_bytes_however_the_rows_are_cut(tmp_path: Path) -> None:
    labels = tissue()
    whole = written(tmp_path / "whole", labels)
    for i, (band_px, rows) in enumerate([(512, 700), (512, 37), (1 << 20, 1), (1024, 300)]):
        cut = written(tmp_path / str(i), labels, band_px, rows)
        assert names(cut) == names(whole)
        for name in names(whole) - {"run.json"}:
            assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def test_geojson_follows_its_schema_and_gives_the_label_map_back(tmp_path: Path) -> None:
    labels = tissue()
    folder = written(tmp_path, labels, 512, 90)
    text = gzip.decompress((folder / "objects.geojson.gz").read_bytes())
    jsonschema.validate(json.loads(text), GEOJSON)
    shapes, again = polygons(folder), np.zeros_like(labels)
    assert shapely.is_valid(shapes).all()
    for shape, feature in zip(shapes, features(folder), strict=True):
        name = feature["properties"]["classification"]["name"]
        left, top, right, bottom = (int(side) for side in shape.bounds)
        ys, xs = np.mgrid[top:bottom, left:right]
        inside = shapely.contains_xy(shape, xs + 0.5, ys + 0.5)
        again[ys[inside], xs[inside]] = [c.name for c in CLASSES].index(name)
        measured = feature["properties"]["measurements"]["Area µm^2"]
        assert measured == pytest.approx(shape.area * MPP**2, abs=1e-3)
        kind = "annotation" if measured >= ANNOTATION_UM2 else "detection"
        assert feature["properties"]["objectType"] == kind
    np.testing.assert_array_equal(again, np.where(labels == NOT_ANALYSED, 0, labels))
    assert max(len(shape.interiors) for shape in shapes) > 10


def test_annotations_follow_the_schema_of_large_image(tmp_path: Path) -> None:
    folder = written(tmp_path, tissue(), downsample=1.37, simplify_um=0.5)
    said = json.loads((folder / "annotations.json").read_text())
    jsonschema.Draft6Validator(LARGE_IMAGE).validate(said)
    assert {e["group"] for e in said["elements"]} == {c.name for c in CLASSES[1:]}
    assert any("holes" in e for e in said["elements"])
    for element, shape in zip(said["elements"], polygons(folder), strict=True):
        flat = shapely.force_2d(shapely.Polygon(element["points"], element.get("holes")))
        assert flat.equals(shape)


def test_tables_agree_with_outlines_and_with_each_other(tmp_path: Path) -> None:
    folder = written(tmp_path, tissue(), downsample=2.0)
    lines = table(folder)
    for line, shape in zip(lines, polygons(folder), strict=True):
        assert float(line["area_um2"]) == pytest.approx(shape.area * (MPP / 2) ** 2, abs=1e-3)
        center = shape.centroid
        found = float(line["x_px"]), float(line["y_px"])
        assert found == pytest.approx((center.x, center.y), abs=1e-3)
        box = [float(line[f"{side}_px"]) for side in ("left", "top", "right", "bottom")]
        assert box == list(shape.bounds)
        assert int(line["holes"]) == len(shape.interiors)
        # Crofton's estimate is of a smooth border; that of the pixels is up to 4 / pi longer.
        assert 0.75 < float(line["perimeter_um"]) / (shape.length * MPP / 2) < 1.01
    columns = pyarrow.parquet.read_table(folder / "objects.parquet").to_pylist()
    assert [{k: str(v) for k, v in c.items()} for c in columns] == [dict(ln) for ln in lines]
    assert {line["class"] for line in lines} == {c.name for c in CLASSES[1:]}


@pytest.mark.parametrize("downsample", [0.5, 1.0, 1.9837, 4.0])
def test_outlines_are_pixels_of_the_full_size(tmp_path: Path, downsample: float) -> None:
    exact, scaled = (
        polygons(written(tmp_path / str(d), tissue(), files=("qupath",), downsample=d)) for d in (1.0, downsample)
    )
    assert shapely.is_valid(scaled).all()
    grown = shapely.transform(exact, lambda xy: xy * downsample)
    assert (shapely.hausdorff_distance(grown, scaled) < 0.01).all()


@pytest.mark.parametrize(("simplify_um", "fewer"), [(0.3, 0.7), (1.0, 0.3)])
def test_simplified_outlines_stay_valid_and_near(tmp_path: Path, simplify_um: float, fewer: float) -> None:
    downsample = 1.5
    exact, simple = (
        polygons(written(tmp_path / str(um), tissue(), files=("qupath",), downsample=downsample, simplify_um=um))
        for um in (0.0, simplify_um)
    )
    assert shapely.is_valid(simple).all()
    away_px = shapely.hausdorff_distance(exact, simple)
    assert (away_px <= simplify_um / MPP * downsample + 1e-9).all()
    points = [int(shapely.get_num_coordinates(shapes).sum()) for shapes in (exact, simple)]
    assert points[1] < fewer * points[0]


@pytest.mark.parametrize("simplify_um", [0.4, 2.0])
def test_tissue_with_many_holes_is_simplified_ring_by_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simplify_um: float
) -> None:
    monkeypatch.setattr(simplify, "MANY_RINGS", 2)
    exact, simple = (
        polygons(written(tmp_path / str(um), tissue(), files=("qupath",), simplify_um=um)) for um in (0.0, simplify_um)
    )
    assert shapely.is_valid(simple).all()
    assert (shapely.hausdorff_distance(exact, simple) <= 2 * simplify_um / MPP).all()
    gland = int(np.argmax([len(shape.interiors) for shape in exact]))
    assert len(simple[gland].interiors) == len(exact[gland].interiors)
    points = [shapely.get_num_coordinates(shapes[gland]) for shapes in (exact, simple)]
    assert points[1] < 0.8 * points[0]


def test_small_objects_are_left_out_of_all_files(tmp_path: Path) -> None:
    every = table(written(tmp_path / "every", tissue()))
    large = table(written(tmp_path / "large", tissue(), classes=with_rules(CLASSES, 40)))
    areas = [float(line["area_um2"]) for line in every]
    assert [float(line["area_um2"]) for line in large] == [a for a in areas if a >= 40]
    assert 0 < len(large) < len(every)


def test_a_rule_of_one_class_leaves_the_others_alone(tmp_path: Path) -> None:
    rules = (None, ObjectRule(min_area_um2=20, max_area_um2=60), ObjectRule(counted=False))
    classes = tuple(replace(entry, rule=rule) for entry, rule in zip(CLASSES, rules, strict=True))
    every = table(written(tmp_path / "every", tissue()))
    chosen = table(written(tmp_path / "chosen", tissue(), classes=classes))
    nuclei = [float(line["area_um2"]) for line in every if line["class"] == "nucleus"]
    assert [float(line["area_um2"]) for line in chosen if line["class"] == "nucleus"] == [
        area for area in nuclei if 20 <= area <= 60
    ]
    assert 0 < min(nuclei) < 20 < 60 < max(nuclei)
    other = [[line["area_um2"] for line in lines if line["class"] != "nucleus"] for lines in (every, chosen)]
    assert other[0] == other[1] != []  # a class that is not counted still has its outlines


@pytest.mark.parametrize("value", [0, NOT_ANALYSED])
def test_no_objects_are_whole_files_too(tmp_path: Path, value: int) -> None:
    folder = written(tmp_path, np.full((30, 50), value, np.uint8), simplify_um=1)
    assert features(folder) == table(folder) == []
    assert json.loads((folder / "annotations.json").read_text())["elements"] == []
    assert pyarrow.parquet.read_table(folder / "objects.parquet").num_rows == 0


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    labels = tissue()
    info = SlideInfo("slide", 1200, 700, MPP, CLASSES)

    def end_early() -> None:
        with OutputFolder(tmp_path, "slide") as folder:
            folder.add(Objects(folder.path, info, SLIDE, kinds(*EVERY)))
            for part in parts(labels[:600], 1200, 100):
                folder.write(part)

    with pytest.raises(ValueError, match="ended at column"):
        end_early()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("module", "extra"), [("pyarrow", "tables"), ("shapely", "simplify")], ids=str)
def test_a_library_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    info = SlideInfo("slide", 50, 50, MPP, CLASSES)
    with pytest.raises(OutputError, match=rf"pip install .*\[{extra}\]"):
        Objects(tmp_path, info, SLIDE, kinds("parquet"), simplify_um=1)
    Objects(tmp_path, info, SLIDE, kinds("qupath", "dsa", "csv")).abort()
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_opened_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / ".annotations.json.part").mkdir()
    info = SlideInfo("slide", 50, 50, MPP, CLASSES)
    with pytest.raises(OutputError, match=r"cannot write .*annotations\.json"):
        Objects(tmp_path, info, SLIDE, kinds(*EVERY))
    assert names(tmp_path) == {".annotations.json.part"}


def test_polygons_are_simplified_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = written(tmp_path / "at once", tissue(), simplify_um=0.5)
    monkeypatch.setattr(object_files, "GROUP_POINTS", 100)
    in_groups = written(tmp_path / "in groups", tissue(), simplify_um=0.5)
    for name in names(at_once) - {"run.json"}:
        assert (at_once / name).read_bytes() == (in_groups / name).read_bytes()

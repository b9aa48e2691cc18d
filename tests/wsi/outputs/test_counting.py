"""Counts of objects: the same as scipy finds, by the rules of the classes, however the rows are cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from histostream.wsi.errors import OutputError, SlideError
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, ClassInfo, LabelRows, SlideInfo
from histostream.wsi.outputs.object_rule import NUCLEI, ObjectRule, rule_by_name, rule_from_json, rule_to_json
from histostream.wsi.outputs.objects import components
from histostream.wsi.outputs.objects.counting import ObjectCount, ObjectCounter, with_rules
from histostream.wsi.outputs.sinks.object_counts import ObjectCounts
from histostream.wsi.outputs.sinks.rasters.density import Density, read_density
from histostream.wsi.outputs.sinks.summary import Summary

Labels = NDArray[np.uint8]
BACKGROUND, NUCLEUS, STROMA = (
    ClassInfo("background", (255, 255, 255)),
    ClassInfo("nucleus", (30, 100, 220), rule=NUCLEI),
    ClassInfo("stroma", (20, 200, 20), rule=ObjectRule(counted=False)),
)


def info_of(labels: Labels, classes: tuple[ClassInfo, ...], mpp: float = 0.5) -> SlideInfo:
    return SlideInfo("slide.svs", labels.shape[1], labels.shape[0], mpp, classes)


def write(sink: ObjectCounts | Density | Summary, labels: Labels, band_px: int = 1 << 20, rows: int = 1 << 20) -> None:
    for x in range(0, labels.shape[1], band_px):
        for y in range(0, len(labels), rows):
            sink.write(LabelRows(x, y, labels[y : y + rows, x : x + band_px]))


def counter_of(labels: Labels, classes: tuple[ClassInfo, ...], mpp: float = 0.5) -> ObjectCounter:
    sink = ObjectCounts(info_of(labels, classes, mpp))
    write(sink, labels)
    assert sink.finish() == []
    return sink.counter


def discs(*centers: tuple[float, float], radius: float = 9.0, size: int = 200) -> Labels:
    y, x = np.mgrid[:size, :size] + 0.5
    return np.any([np.hypot(x - cx, y - cy) < radius for cx, cy in centers], axis=0).astype(np.uint8)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few pixels, and components that are settled all the time."""
    monkeypatch.setattr(components, "BLOCK_PX", 50)
    monkeypatch.setattr(components, "SETTLE_COMPONENTS", 2)


@pytest.mark.usefixtures("small_steps")
@settings(max_examples=120, deadline=None)
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.sampled_from([0, 1, 1, 2, 255])),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 4),
    st.integers(5, 9),
)
def test_counts_and_areas_are_those_of_scipy(labels: Labels, band_px: int, rows: int, least: int, most: int) -> None:
    classes = (BACKGROUND, replace(NUCLEUS, rule=ObjectRule(min_area_um2=least, max_area_um2=most)), STROMA)
    sink = ObjectCounts(info_of(labels, classes, mpp=1.0))
    write(sink, labels, band_px, rows)
    sink.finish()
    numbered, count = ndimage.label(labels == 1)
    areas = ndimage.sum_labels(labels == 1, numbered, range(1, count + 1))
    areas = areas[(areas >= least) & (areas <= most)]
    expected = ObjectCount(len(areas), round(float(areas.mean()), 2) if len(areas) else None, None)
    assert sink.counter.count(1) == expected
    assert sink.counter.count(0) is None
    assert sink.counter.count(2) is None


def test_nuclei_below_8_um2_are_not_counted() -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[2:6, 2:10] = 1  # 32 pixels: 8 um2
    labels[20:24, 20:28] = 1
    labels[20, 20] = 0  # 31 pixels
    assert counter_of(labels, (BACKGROUND, NUCLEUS)).count(1) == ObjectCount(1, 8.0, 0.0)


def test_discs_that_touch_are_one_object_that_is_said_to_be_several() -> None:
    alone = [(20.0 + 40 * i, 20.0) for i in range(4)]
    labels = discs(*alone, (30, 100), (47, 100), (120, 100), (137, 100), (128, 114))
    count = counter_of(labels, (BACKGROUND, NUCLEUS)).count(1)
    assert count is not None
    assert (count.objects, count.touching_share) == (6, round(2 / 6, 4))


def test_large_objects_that_are_ellipses_are_not_taken_for_several() -> None:
    y, x = np.mgrid[:200, :200] + 0.5
    labels = discs(*[(20.0 + 40 * i, 20.0) for i in range(4)])
    labels |= (np.hypot((x - 100) / 40, (y - 120) / 12) < 1).astype(np.uint8)  # 6 times as large as a disc
    count = counter_of(labels, (BACKGROUND, NUCLEUS)).count(1)
    assert count == ObjectCount(5, count.mean_um2 if count else None, 0.0)


def test_the_share_of_touching_objects_does_not_depend_on_the_resolution() -> None:
    labels = discs(*[(20.0 + 40 * i, 20.0) for i in range(4)], (30, 100), (47, 100))
    fine = counter_of(np.kron(labels, np.ones((3, 3), np.uint8)), (BACKGROUND, NUCLEUS), mpp=0.5 / 3).count(1)
    assert fine == counter_of(labels, (BACKGROUND, NUCLEUS)).count(1)
    assert fine is not None
    assert fine.touching_share == 0.2


def test_classes_without_a_rule_are_counted_where_it_is_asked_for() -> None:
    classes = (BACKGROUND, NUCLEUS, STROMA, ClassInfo("gland", (1, 2, 3)))
    rules = [entry.rule for entry in with_rules(classes)]
    assert rules == [None, NUCLEI, ObjectRule(counted=False), None]
    assert with_rules(classes, count_all=True)[3].rule == ObjectRule()
    assert [entry.rule.min_area_um2 if entry.rule else None for entry in with_rules(classes, 20)] == [None, 20, 20, 20]
    assert with_rules(classes, 20)[2].rule == ObjectRule(counted=False, min_area_um2=20)
    with pytest.raises(ValueError, match="max_area_um2=400"):
        with_rules((BACKGROUND, replace(NUCLEUS, rule=ObjectRule(max_area_um2=400))), 500)


@pytest.mark.parametrize("name", ["nucleus", "NUCLEI", " cell  nuclei ", "Zellkern", "noyau"])
def test_a_class_that_is_called_nuclei_has_their_rule(name: str) -> None:
    assert rule_by_name(name) == NUCLEI


@pytest.mark.parametrize("name", ["tumour", "nuclear debris", "nuclei or cytoplasm", "cell", ""])
def test_a_class_of_another_name_has_no_rule(name: str) -> None:
    assert rule_by_name(name) is None


@pytest.mark.parametrize(
    "rule", [NUCLEI, ObjectRule(), ObjectRule(counted=False), ObjectRule(min_area_um2=2.5, max_area_um2=90)]
)
def test_a_rule_is_read_as_it_was_written(rule: ObjectRule) -> None:
    assert rule_from_json(json.loads(json.dumps(rule_to_json(rule)))) == rule


@pytest.mark.parametrize(
    "value",
    [
        True,
        None,
        8,
        [],
        {"min_area_um2": -1},
        {"min_area_um2": float("nan")},
        {"min_area_um2": float("inf")},
        {"min_area_um2": "8"},
        {"min_area_um2": True},
        {"min_area_um2": 8, "max_area_um2": 8},
        {"touching": 1},
        {"min_area": 8},
        {"counted": False},
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"um2|touching|use false"):
        rule_from_json(value)


def test_the_summary_has_counts_and_objects_per_analysed_area(tmp_path: Path) -> None:
    labels = discs((20, 20), (60, 20), (100, 60))
    labels[:, 150:] = NOT_ANALYSED
    info = info_of(labels, (BACKGROUND, NUCLEUS, STROMA))
    counts = ObjectCounts(info)
    summary = Summary(tmp_path, info, counts.counter)
    write(counts, labels)
    write(summary, labels)
    counts.finish()
    background, nucleus, stroma = summary.record().classes
    assert nucleus.objects == 3
    assert nucleus.objects_per_mm2 == pytest.approx(3 / (150 * 200 * 0.25e-6), abs=1e-3)
    assert nucleus.mean_object_um2 == pytest.approx((labels == 1).sum() * 0.25 / 3, abs=0.01)
    assert nucleus.touching_share == 0
    assert (background.objects, stroma.objects) == (None, None)
    header, *lines = summary.finish()[1][0].read_text().splitlines()
    column = header.split(",").index("objects")
    assert [line.split(",")[column] for line in lines] == ["", "3", ""]


def random_nuclei(height: int, width: int, mpp: float) -> Labels:
    """Return nuclei of two classes, glass of 0, and a part that was not analysed."""
    rng = np.random.default_rng(5)
    labels = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[-9:10, -9:10]
    disc = np.hypot(x, y) < 8
    for cy, cx in zip(rng.integers(9, height - 9, 90), rng.integers(9, width - 9, 90), strict=True):
        labels[cy - 9 : cy + 10, cx - 9 : cx + 10][disc] = 1 + (cx + cy) % 2
    labels[: height // 3, : width // 3] = NOT_ANALYSED
    labels[-5:, :] = NOT_ANALYSED
    return labels


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(("mpp", "band_px", "rows"), [(0.5, 512, 37), (0.499, 100, 64), (2.0, 1 << 20, 1 << 20)])
def test_density_is_that_of_the_centroids_and_the_analysed_area(
    tmp_path: Path, mpp: float, band_px: int, rows: int
) -> None:
    labels = random_nuclei(700, 900, mpp)
    classes = (BACKGROUND, NUCLEUS, replace(NUCLEUS, name="other", rule=ObjectRule()))
    sink = Density(tmp_path / "density.tif", info_of(labels, classes, mpp))
    write(sink, labels, band_px, rows)
    ((temporary, final),) = sink.finish()
    temporary.rename(final)
    found = read_density(final)
    assert (found.labels, found.cell_um) == ((1, 2), 64)
    height, width = (int(np.ceil(side * mpp / 64)) for side in labels.shape)
    edges = np.arange(height + 1) * 64 / mpp, np.arange(width + 1) * 64 / mpp
    ys, xs = np.nonzero(labels != NOT_ANALYSED)
    mm2 = np.histogram2d(ys + 0.5, xs + 0.5, edges)[0] * (mpp / 1000) ** 2
    for k, least_px in ((0, 8 / mpp**2), (1, 0)):
        numbered, count = ndimage.label(labels == k + 1)
        sizes = ndimage.sum_labels(numbered > 0, numbered, range(1, count + 1))
        centers = np.array(ndimage.center_of_mass(numbered > 0, numbered, range(1, count + 1))) + 0.5
        objects = np.histogram2d(*centers[sizes >= least_px].T, edges)[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = np.where(mm2 >= 0.25 * 0.064**2, objects / mm2, np.nan)
        assert np.isnan(expected).any()
        np.testing.assert_allclose(found.values[..., k], expected, rtol=1e-6)


def test_a_density_map_says_its_scale_and_classes(tmp_path: Path) -> None:
    labels = discs((20, 20))
    sink = Density(tmp_path / "density.tif", info_of(labels, (BACKGROUND, NUCLEUS)))
    write(sink, labels)
    ((temporary, _),) = sink.finish()
    with tifffile.TiffFile(temporary) as file:
        page = file.pages.first
        assert (page.dtype, page.shape) == (np.float32, (2, 2))
        assert page.resolution == (156.25, 156.25)  # per cm: 64 um
        assert page.resolutionunit == 3
        assert json.loads(page.description)["classes"] == [{"value": 1, "name": "nucleus"}]


def test_a_model_without_classes_to_count_has_no_density_map(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="leave --rasters density out"):
        Density(tmp_path / "density.tif", info_of(np.zeros((9, 9), np.uint8), (BACKGROUND, STROMA)))


@pytest.mark.parametrize("content", [b"", b"II*\0", b"no TIFF at all", None])
def test_another_file_is_no_density_map(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "density.tif"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SlideError, match="no density map"):
        read_density(path)
    for description in ("", "[]", "{}", json.dumps({"histostream": "density", "classes": [{"value": 300}]})):
        tifffile.imwrite(path, np.zeros((3, 3), np.float32), description=description, metadata=None)
        with pytest.raises(SlideError, match="no density map"):
            read_density(path)

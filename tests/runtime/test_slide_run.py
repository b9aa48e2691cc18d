"""Laws of the whole stream, on a slide whose right result is known."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from histostream.runtime import slide_run as infer
from histostream.runtime.bundle.card import Scores
from histostream.runtime.choices import WINDOWS
from histostream.runtime.engines.base import to_channels
from histostream.runtime.options import OptionError, Options
from histostream.runtime.process_memory import MIB, MemoryLimitError, peak_memory_mib
from histostream.runtime.record import fingerprint
from histostream.runtime.report.slide import slide_report
from histostream.runtime.result import SlideResult
from histostream.runtime.slide_run import segment_slide
from histostream.runtime.stream import memory
from histostream.runtime.stream.memory import bytes_per_column
from histostream.wsi.errors import SlideError
from histostream.wsi.outputs.label_rows import NOT_ANALYSED
from histostream.wsi.outputs.memory_needs import MemoryNeeds
from histostream.wsi.outputs.object_rule import ObjectRule
from histostream.wsi.records import to_json
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.slides.staging import version_of
from histostream.wsi.tiling.grid import TileGrid
from tests.runtime.conftest import (
    CARD,
    IdentityEngine,
    PlaceDependentEngine,
    as_shares,
    identity_engine,
    random_pixels,
    write_slide,
)

Noise = tuple[Path, NDArray[np.uint8]]
ALL = Options(tissue=False, overlap_px=16, probabilities=True)


def labels_of(folder: Path) -> NDArray[np.uint8]:
    return np.asarray(tifffile.imread(folder / "labels.tif", level=0))


def scores_of(folder: Path) -> NDArray[np.uint16]:
    return np.asarray(tifffile.imread(folder / "probabilities.tif", level=0))


@pytest.mark.parametrize("mode", WINDOWS)
def test_identity_gives_the_slide_back(noise_slide: Noise, tmp_path: Path, mode: str) -> None:
    path, pixels = noise_slide
    result = segment_slide(path, identity_engine(), tmp_path / "out", replace(ALL, blend=mode))
    np.testing.assert_array_equal(scores_of(result.folder), as_shares(pixels))
    np.testing.assert_array_equal(labels_of(result.folder), pixels.argmax(axis=-1))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (33, 700), (64, 64), (129, 65)])
@pytest.mark.parametrize("align_px", [1, 16])
def test_identity_holds_for_odd_sizes(tmp_path: Path, width: int, height: int, align_px: int) -> None:
    pixels = random_pixels(width, height)
    path = write_slide(tmp_path / "odd.tif", pixels)
    result = segment_slide(path, identity_engine(align_px=align_px), tmp_path / "out", ALL)
    np.testing.assert_array_equal(scores_of(result.folder), as_shares(pixels))


def test_labels_do_not_depend_on_batch_threads_or_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_slide(tmp_path / "wide.tif", random_pixels(1700, 150))
    plain = segment_slide(path, PlaceDependentEngine(), tmp_path / "plain", ALL)
    assert to_json(plain.run)["grid"]["column_bands"] == 1
    for batch, threads, banded in itertools.product((1, 7), (1, 3), (False, True)):
        if banded:
            bands = [(0, 512), (512, 1536), (1536, 1700)]
            monkeypatch.setattr(infer, "plan_bands", lambda *_, bands=bands, **__: bands)
        options = replace(ALL, batch=batch, threads=threads)
        out = tmp_path / f"{batch}-{threads}-{banded}"
        other = segment_slide(path, PlaceDependentEngine(), out, options)
        monkeypatch.undo()
        assert (to_json(other.run)["grid"]["column_bands"] > 1) == banded
        np.testing.assert_array_equal(labels_of(other.folder), labels_of(plain.folder))
        np.testing.assert_array_equal(scores_of(other.folder), scores_of(plain.folder))


def test_the_peak_of_memory_is_this_processs_own() -> None:
    """A process that was started by a large one is not charged for it."""
    ballast = np.ones(300 * MIB, np.uint8)
    code = "from histostream.runtime.process_memory import peak_memory_mib; print(peak_memory_mib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ballast.sum() > 0
    assert 5 < float(done.stdout) < 200
    before = peak_memory_mib()
    assert before is not None
    assert before > 300


@pytest.mark.parametrize("room_mib", [3, 5, 9, 1000])
def test_bands_fit_the_bound_on_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_mib: int) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: 200 * MIB)
    path = write_slide(tmp_path / "wide.tif", random_pixels(4000, 20))
    with open_slide(path) as slide:
        view = at_mpp(slide, 0.5)
        grid = TileGrid.cover(4000, 20, tile_px=64, overlap_px=16)
        needs = MemoryNeeds()
        engine = identity_engine()
        bands = memory.plan_bands(grid, view, engine, 200 + room_mib, batch=1, probabilities=False, needs=needs)
        per_column = memory.bytes_per_column(grid, view, 3, False)
    assert [x0 for x0, _ in bands] == [0, *(x1 for _, x1 in bands[:-1])]
    assert bands[-1][1] == 4000
    assert all(x % 512 == 0 for x, _ in bands)
    widest = max(x1 - x0 for x0, x1 in bands) + 2 * 64
    assert widest * per_column <= room_mib * MIB
    assert (len(bands) == 1) == (room_mib == 1000)


def test_a_bound_that_no_band_fits_names_one_that_would_do(noise_slide: Noise, tmp_path: Path) -> None:
    path, _ = noise_slide
    with pytest.raises(MemoryLimitError) as caught:
        segment_slide(path, identity_engine(), tmp_path / "out", replace(ALL, max_memory_mib=1))
    assert not (tmp_path / "out").exists()
    enough = int(str(caught.value).rsplit(" ", 1)[1])
    options = replace(ALL, max_memory_mib=enough)
    segment_slide(path, identity_engine(), tmp_path / "out", options)


def test_memory_of_buffers_depends_on_width_not_on_height(tmp_path: Path) -> None:
    counts = []
    for height in (200, 900):
        path = write_slide(tmp_path / f"h{height}.tif", random_pixels(300, height))
        with open_slide(path) as slide:
            grid = TileGrid.cover(300, height, tile_px=64, overlap_px=16)
            counts.append(bytes_per_column(grid, at_mpp(slide, 0.5), 3, True))
    assert counts[0] == counts[1]


def test_every_tile_is_inferred_once_and_every_block_decoded_once(noise_slide: Noise, tmp_path: Path) -> None:
    path, _ = noise_slide
    engine = identity_engine()
    done: list[tuple[int, int]] = []
    result = segment_slide(
        path, engine, tmp_path / "out", replace(ALL, batch=3), report=lambda *pair: done.append(pair)
    )
    grid = TileGrid.cover(301, 217, tile_px=64, overlap_px=16)
    assert engine.tiles == len(grid) == to_json(result.run)["grid"]["tiles_inferred"]
    assert max(engine.batches) == 3
    blocks = -(-301 // 64) * -(-217 // 64)
    # This slide has one level, so the overview reads all of it, before the stream.
    assert to_json(result.run)["source_blocks_decoded"] == {"overview": blocks, "stream": blocks}
    assert done[-1] == (301 * 217, 301 * 217)
    assert [d for d, _ in done] == sorted(d for d, _ in done)


def test_glass_is_left_out(tmp_path: Path) -> None:
    pixels = np.full((900, 1100, 3), 243, np.uint8)
    pixels[200:600, 300:700] = (random_pixels(400, 400) // 3) + np.array([120, 30, 110], np.uint8)
    path = write_slide(tmp_path / "island.tif", pixels)
    engine = identity_engine()
    result = segment_slide(path, engine, tmp_path / "out", Options(overlap_px=16))
    labels = labels_of(result.folder)
    assert (labels[200:600, 300:700] != NOT_ANALYSED).all()
    assert (labels[:60, :60] == NOT_ANALYSED).all()
    assert engine.tiles < to_json(result.run)["grid"]["tiles"] / 2
    analysed = (labels != NOT_ANALYSED).sum() * 0.25e-6
    assert to_json(result.summary)["analysed_mm2"] == pytest.approx(analysed, rel=1e-4)


def test_a_slide_of_glass_is_all_outside_and_run_json_has_the_remedy(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "glass.tif", np.full((300, 200, 3), 243, np.uint8))
    engine = identity_engine()
    result = segment_slide(path, engine, tmp_path / "out")
    assert engine.tiles == 0
    assert (labels_of(result.folder) == NOT_ANALYSED).all()
    assert to_json(result.summary)["analysed_mm2"] == 0
    assert "--no-tissue" in json.loads((result.folder / "run.json").read_text())["no_tissue"]


def test_only_the_region_of_interest_is_analysed(noise_slide: Noise, tmp_path: Path) -> None:
    path, pixels = noise_slide
    roi = tmp_path / "roi.geojson"
    triangle = [[20, 10], [220, 10], [20, 190], [20, 10]]
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [triangle]}))
    result = segment_slide(path, identity_engine(), tmp_path / "out", replace(ALL, roi=roi))
    labels = labels_of(result.folder)
    y, x = np.mgrid[:217, :301]
    edge = (x - 20) / 200 + (y - 10) / 180
    inside = (x > 21) & (y > 11) & (edge < 0.98)
    outside = (x < 19) | (y < 9) | (edge > 1.02)
    np.testing.assert_array_equal(labels[inside], pixels.argmax(axis=-1)[inside])
    assert (labels[outside] == NOT_ANALYSED).all()


def test_summary_and_run_record_agree_with_the_labels(noise_slide: Noise, tmp_path: Path) -> None:
    path, _ = noise_slide
    result = segment_slide(path, identity_engine(), tmp_path / "out", ALL)
    labels = labels_of(result.folder)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary == to_json(result.summary)
    assert SlideResult.read(result.folder) == result
    for k, entry in enumerate(summary["classes"]):
        assert entry["pixels"] == (labels == k).sum()
        assert entry["area_mm2"] == pytest.approx((labels == k).sum() * 0.25e-6, rel=1e-6)
    with (result.folder / "summary.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 1 + len(summary["classes"])
    run = json.loads((result.folder / "run.json").read_text())
    stages = {k: v for k, v in run["seconds"].items() if k != "total"}
    assert sum(stages.values()) <= run["seconds"]["total"] + 0.01
    assert run["bound_by"] in stages
    assert run["versions"]["histostream"]


def test_a_slide_without_resolution_names_the_option(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "unknown.tif", random_pixels(80, 80), mpp=None)
    with pytest.raises(SlideError, match=r"unknown\.tif.*--mpp"):
        segment_slide(path, identity_engine(), tmp_path / "out", ALL)
    assert not (tmp_path / "out").exists()
    result = segment_slide(path, identity_engine(), tmp_path / "out", replace(ALL, mpp=0.5))
    assert labels_of(result.folder).shape == (80, 80)


def test_a_finer_slide_is_averaged_down_to_the_models_resolution(tmp_path: Path) -> None:
    pixels = np.repeat(np.repeat(random_pixels(90, 70), 2, axis=0), 2, axis=1)
    path = write_slide(tmp_path / "fine.tif", pixels, mpp=0.25)
    result = segment_slide(path, identity_engine(), tmp_path / "out", ALL)
    np.testing.assert_array_equal(scores_of(result.folder), as_shares(pixels[::2, ::2]))


def test_a_failure_leaves_nothing_but_what_it_goes_on_with(noise_slide: Noise, tmp_path: Path) -> None:
    class Failing(PlaceDependentEngine):
        def infer(self, tiles: NDArray[np.uint8]) -> Scores:
            if self.tiles > 10:
                raise SlideError("planted")
            return super().infer(tiles)

    path, _ = noise_slide
    with pytest.raises(SlideError, match="planted"):
        segment_slide(path, Failing(), tmp_path / "out", ALL)
    assert [p.name for p in (tmp_path / "out" / "noise").iterdir()] == [".journal"]
    with pytest.raises(SlideError, match="planted"):
        segment_slide(path, Failing(tiles=11), tmp_path / "early", ALL)
    assert not (tmp_path / "early").exists()


def test_grey_and_colour_are_converted_to_what_the_model_takes() -> None:
    grey = np.arange(8, dtype=np.uint8).reshape(1, 2, 4, 1)
    np.testing.assert_array_equal(to_channels(grey, 3), np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(to_channels(to_channels(grey, 3), 1), grey)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"threads": -1},
        {"overlap_px": -4},
        {"annotations": ("csv",)},
        {"objects": ("dsa",)},
        {"min_area_um2": -1.0},
        {"min_area_um2": float("nan")},
        {"simplify_um": float("nan"), "objects": ("csv",)},
        {"simplify_um": 0.5},
        {"rasters": ("ome-tif",)},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Options(**wrong)


def test_objects_are_of_the_full_size_and_do_not_depend_on_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.kron(random_pixels(110, 30), np.ones((20, 20, 1), np.uint8))  # at half the mpp
    path = write_slide(tmp_path / "slide.tif", pixels, mpp=0.25)
    options = replace(ALL, annotations=("qupath", "dsa"), objects=("csv",), min_area_um2=20)
    whole = segment_slide(path, identity_engine(), tmp_path / "whole", options)
    bands = [(0, 512), (512, 1100)]
    monkeypatch.setattr(infer, "plan_bands", lambda *_, **__: bands)
    banded = segment_slide(path, identity_engine(), tmp_path / "banded", options)
    for name in ("objects.geojson.gz", "annotations.json", "objects.csv"):
        assert (whole.folder / name).read_bytes() == (banded.folder / name).read_bytes()
    with (whole.folder / "objects.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    areas = {c["name"]: c["area_mm2"] * 1e6 for c in to_json(whole.summary)["classes"]}
    for name, area in areas.items():  # squares of 5 um have 25 um2, so none is left out
        found = sum(float(line["area_um2"]) for line in lines if line["class"] == name)
        assert found == pytest.approx(area)
    assert max(float(line["right_px"]) for line in lines) == 2200
    assert {line["area_um2"] for line in lines} >= {"25.0", "50.0"}


def test_objects_are_counted_without_files_of_objects(tmp_path: Path) -> None:
    pixels = np.kron(random_pixels(60, 40), np.ones((7, 7, 1), np.uint8))
    path = write_slide(tmp_path / "slide.tif", pixels)
    rules = (ObjectRule(min_area_um2=20, touching=True), ObjectRule(counted=False), None)
    classes = tuple(replace(entry, rule=rule) for entry, rule in zip(CARD.classes, rules, strict=True))
    engine = IdentityEngine(replace(CARD, classes=classes))
    result = segment_slide(path, engine, tmp_path / "out", ALL)
    numbered, count = ndimage.label(labels_of(result.folder) == 0)
    um2 = np.bincount(numbered.ravel())[1 : count + 1] * 0.25
    red, green, blue = result.summary.classes
    assert red.objects == (um2 >= 20).sum() < count
    assert red.mean_object_um2 == pytest.approx(um2[um2 >= 20].mean(), abs=0.01)
    assert red.objects_per_mm2 == pytest.approx((um2 >= 20).sum() / (pixels[..., 0].size * 0.25e-6), rel=1e-5)
    assert (green.objects, blue.objects) == (None, None)
    assert list(result.objects) == ["red"]

    every = segment_slide(path, engine, tmp_path / "min", replace(ALL, min_area_um2=0, rasters=("density",)))
    assert [entry.objects for entry in every.summary.classes] == [count, None, every.objects["blue"].objects]
    density = every.density
    assert density is not None
    assert density.labels == (0, 2)
    assert density.values.shape == (3, 4, 2)  # 140 x 210 um
    area_mm2 = np.outer([64, 64, 12], [64, 64, 64, 18]) / 1e6
    known = np.isfinite(density.values[..., 0])
    np.testing.assert_array_equal(known, area_mm2 >= 0.25 * 0.064**2)
    in_known = density.values[known, 0] * area_mm2[known]
    np.testing.assert_allclose(in_known, np.rint(in_known), atol=1e-3)  # whole objects
    assert in_known.sum() <= count
    files = segment_slide(path, engine, tmp_path / "files", replace(ALL, objects=("csv",)))
    with (files.folder / "objects.csv").open(newline="") as file:
        listed = Counter(line["class"] for line in csv.DictReader(file))
    assert listed["red"] == files.objects["red"].objects == red.objects
    assert listed["green"] == ndimage.label(labels_of(result.folder) == 1)[1]  # an area: outlined, not counted
    assert list(files.objects) == ["red", "blue"]


def test_another_rule_is_another_result(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(90, 60))
    cards = [
        replace(CARD, classes=(replace(CARD.classes[0], rule=rule), *CARD.classes[1:]))
        for rule in (None, ObjectRule(min_area_um2=8), ObjectRule(min_area_um2=9))
    ]
    found = [fingerprint(version_of(str(path)), card, ALL, {}) for card in cards]
    assert len({card.digest() for card in cards}) == 1
    assert len({json.dumps(entry) for entry in found}) == 3


def test_a_smallest_area_beyond_the_largest_of_the_card_is_refused(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(90, 60))
    classes = (replace(CARD.classes[0], rule=ObjectRule(max_area_um2=400)), *CARD.classes[1:])
    with pytest.raises(OptionError, match="--min-area does not fit the model's card: max_area_um2=400"):
        segment_slide(path, IdentityEngine(replace(CARD, classes=classes)), tmp_path, replace(ALL, min_area_um2=500))
    assert not (tmp_path / "slide").exists()


def test_a_result_of_a_version_without_counts_is_read(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(90, 60))
    folder = segment_slide(path, identity_engine(), tmp_path / "out", replace(ALL, min_area_um2=0)).folder
    assert SlideResult.read(folder).objects.keys() == {"red", "green", "blue"}
    summary, run = (json.loads((folder / name).read_text()) for name in ("summary.json", "run.json"))
    for entry in summary["classes"]:
        for name in ("objects", "objects_per_mm2", "mean_object_um2", "touching_share"):
            del entry[name]
    run["objects"] = [{"name": "red", "count": 3, "mean_um2": 9.5}]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps(run))
    old = SlideResult.read(folder)
    assert (old.objects, old.density) == ({}, None)
    assert "objects" not in old._repr_html_()
    assert old.run.further["objects"] == run["objects"]
    slide_report(old.run, old.summary, folder / "overview.png")


def test_a_grey_slide_runs(tmp_path: Path) -> None:
    grey = random_pixels(150, 90)[..., 0]
    path = tmp_path / "grey.tif"
    tifffile.imwrite(path, grey, tile=(64, 64), photometric="minisblack")
    result = segment_slide(path, identity_engine(), tmp_path / "out", replace(ALL, mpp=0.5))
    np.testing.assert_array_equal(scores_of(result.folder), as_shares(np.repeat(grey[..., None], 3, axis=-1)))

"""Runs that are broken off go on, and their label maps are the bits of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from histostream.runtime import slide_run as infer
from histostream.runtime.bundle.card import Scores
from histostream.runtime.crf.options import CrfOptions
from histostream.runtime.crf.params import CrfParams
from histostream.runtime.options import Options
from histostream.runtime.result import SlideResult
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.errors import StoppedError
from histostream.wsi.outputs.journal import JournalError
from histostream.wsi.records import to_json
from histostream.wsi.tiling.grid import TileGrid
from tests.runtime.conftest import CARD, PlaceDependentEngine, random_pixels, write_slide

ALL = Options(tissue=False, overlap_px=16, probabilities=True)
Array = NDArray[np.uint8]


class Broken(BaseException):
    """Stands for a kill: nothing that handles errors sees it coming."""


@dataclass
class Breaking(PlaceDependentEngine):
    """Breaks off after a number of tiles."""

    after: int = 0

    def infer(self, tiles: Array) -> Scores:
        if self.tiles + len(tiles) > self.after:
            raise Broken
        return super().infer(tiles)


def images(result: SlideResult) -> list[Array]:
    names = ("labels.tif", "probabilities.tif")
    return [tifffile.imread(result.folder / name, level=0) for name in names]


def assert_same(one: SlideResult, other: SlideResult) -> None:
    for a, b in zip(images(one), images(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.summary == other.summary
    for name in ("labels.tif", "overview.png"):  # every byte of the files, not the pixels alone
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_slide(tmp_path / "slide.tif", random_pixels(1100, 500))


@pytest.mark.parametrize("banded", [False, True], ids=["whole", "bands"])
@pytest.mark.parametrize("overlap_px", [0, 16, 32])
def test_a_run_broken_off_many_times_gives_the_same_bits(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, banded: bool, overlap_px: int
) -> None:
    options = replace(ALL, overlap_px=overlap_px, batch=3)
    if banded:
        bands = [(0, 512), (512, 1100)]
        monkeypatch.setattr(infer, "plan_bands", lambda *_, **__: bands)
    unbroken = segment_slide(slide, PlaceDependentEngine(), tmp_path / "unbroken", options)
    rng = random.Random(overlap_px)
    grid = TileGrid.cover(1100, 500, tile_px=64, overlap_px=overlap_px)
    in_a_row = len(grid.xs)
    inferred = broken = 0
    result = None
    while result is None:
        engine = Breaking(after=rng.randint(in_a_row, 4 * in_a_row))
        try:
            result = segment_slide(slide, engine, tmp_path / "broken", options)
        except Broken:
            broken += 1
        inferred += engine.tiles
    assert broken >= 2
    assert_same(unbroken, result)
    assert to_json(result.run)["resumed"]["runs"] == broken + 1
    # Of what was finished a break repeats one row of tiles at most (two at the slide's end, where
    # the last is shifted in); what it loses is the row in hand.
    assert inferred <= to_json(unbroken.run)["grid"]["tiles_inferred"] + broken * 3 * in_a_row
    assert not list(result.folder.glob(".*"))


def test_objects_of_a_run_broken_off_are_those_of_an_unbroken_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.kron(random_pixels(55, 25), np.ones((20, 20, 1), np.uint8))
    slide = write_slide(tmp_path / "slide.tif", pixels)
    monkeypatch.setattr(infer, "plan_bands", lambda *_, **__: [(0, 512), (512, 1100)])
    options = replace(ALL, annotations=("qupath",), objects=("csv",), simplify_um=1.0)
    unbroken = segment_slide(slide, PlaceDependentEngine(), tmp_path / "unbroken", options)
    for after in (40, 130):
        with pytest.raises(Broken):
            segment_slide(slide, Breaking(after=after), tmp_path / "broken", options)
    result = segment_slide(slide, PlaceDependentEngine(), tmp_path / "broken", options)
    assert to_json(result.run)["resumed"]["runs"] == 3
    for name in ("objects.geojson.gz", "objects.csv"):
        assert (unbroken.folder / name).read_bytes() == (result.folder / name).read_bytes()
    assert not list(result.folder.glob(".*"))


@pytest.mark.full
def test_rasters_of_a_run_broken_off_are_those_of_an_unbroken_run(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(ALL, rasters=("ome-tiff", "ome-zarr", "dicom-seg"))
    unbroken = segment_slide(slide, PlaceDependentEngine(), tmp_path / "unbroken", options)
    monkeypatch.setattr(infer, "plan_bands", lambda *_, **__: [(0, 512), (512, 1100)])
    for after in (40, 130):
        with pytest.raises(Broken):
            segment_slide(slide, Breaking(after=after), tmp_path / "broken", options)
    result = segment_slide(slide, PlaceDependentEngine(), tmp_path / "broken", options)
    assert to_json(result.run)["resumed"]["runs"] == 3
    assert not list(result.folder.glob(".*"))

    def files(folder: Path) -> dict[str, bytes]:
        found = [p for p in folder.rglob("*") if p.is_file() and p.parent != folder]
        found += [folder / "labels.ome.tif", folder / "labels.dcm"]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}

    assert len(files(unbroken.folder)) > 10
    assert files(unbroken.folder) == files(result.folder)


def test_only_the_row_above_is_inferred_again(slide: Path, tmp_path: Path) -> None:
    grid = TileGrid.cover(1100, 500, tile_px=64, overlap_px=16)
    in_a_row, rows = len(grid.xs), len(grid.ys)
    with pytest.raises(Broken):
        segment_slide(slide, Breaking(after=5 * in_a_row), tmp_path, replace(ALL, batch=1))
    engine = PlaceDependentEngine()
    result = segment_slide(slide, engine, tmp_path, replace(ALL, batch=1))
    assert engine.tiles == (rows - 5 + 1) * in_a_row
    assert to_json(result.run)["resumed"]["mpx_before"] == pytest.approx(
        1100 * grid.tile(3, 0).write.bottom / 1e6, abs=1e-3
    )


def test_a_region_of_interest_and_glass_are_gone_on_with_too(tmp_path: Path) -> None:
    pixels = np.full((900, 700, 3), 243, np.uint8)
    pixels[100:800, 100:600] = random_pixels(500, 700) // 3 + np.array([120, 30, 110], np.uint8)
    path = write_slide(tmp_path / "island.tif", pixels)
    roi = tmp_path / "roi.geojson"
    ring = [[50, 50], [640, 200], [300, 850], [50, 50]]
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    options = Options(overlap_px=16, probabilities=True, roi=roi, batch=1)
    unbroken = segment_slide(path, PlaceDependentEngine(), tmp_path / "unbroken", options)
    for after in (20, 60):
        with pytest.raises(Broken):
            segment_slide(path, Breaking(after=after), tmp_path / "broken", options)
    result = segment_slide(path, PlaceDependentEngine(), tmp_path / "broken", options)
    assert to_json(result.run)["resumed"]["runs"] == 3
    assert_same(unbroken, result)


@pytest.mark.full
def test_the_crf_goes_on_at_a_row_of_cells(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    path = write_slide(tmp_path / "tall.tif", random_pixels(300, 2600))
    options = replace(ALL, crf=CrfOptions(CrfParams(theta_alpha=4, theta_gamma=2, n_iter=2)))
    unbroken = segment_slide(path, PlaceDependentEngine(), tmp_path / "unbroken", options)
    in_all = to_json(unbroken.run)["grid"]["tiles_inferred"]
    with pytest.raises(Broken):
        segment_slide(path, Breaking(after=2 * in_all // 3), tmp_path / "broken", options)
    engine = PlaceDependentEngine()
    result = segment_slide(path, engine, tmp_path / "broken", options)
    assert in_all / 2 < engine.tiles < 2 * in_all / 3 + in_all / 10  # from row 1024 on
    assert_same(unbroken, result)


def test_restart_starts_over(slide: Path, tmp_path: Path) -> None:
    with pytest.raises(Broken):
        segment_slide(slide, Breaking(after=200), tmp_path, replace(ALL, batch=1))
    engine = PlaceDependentEngine()
    result = segment_slide(slide, engine, tmp_path, ALL, restart=True)
    assert engine.tiles == to_json(result.run)["grid"]["tiles"]
    assert "resumed" not in to_json(result.run)


ENGINE = PlaceDependentEngine()


def change_time(slide: Path) -> None:
    os.utime(slide, (0, 0))


@pytest.mark.parametrize(
    ("options", "engine", "change", "words"),
    [
        (replace(ALL, blend="crop"), ENGINE, None, r"options\.blend \(hann, now crop\)"),
        (replace(ALL, probabilities=False), ENGINE, None, r"options\.probabilities"),
        (ALL, replace(ENGINE, name="other"), None, r"engine \(identity, now other\)"),
        (ALL, replace(ENGINE, card=replace(CARD, mpp=0.51)), None, "model"),
        (ALL, ENGINE, change_time, r"slide\.modified"),
    ],
)
def test_a_journal_of_another_run_is_refused_by_name(
    slide: Path,
    tmp_path: Path,
    options: Options,
    engine: PlaceDependentEngine,
    change: Callable[[Path], None] | None,
    words: str,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Broken):
        segment_slide(slide, Breaking(after=200), out, ALL)
    if change is not None:
        change(slide)
    with pytest.raises(JournalError, match=f"another {words}.*--restart"):
        segment_slide(slide, engine, out, options)
    # Refusing has changed nothing.
    assert (out / "slide" / ".journal" / "begun.json").exists()


def test_the_journal_of_a_run_killed_after_publishing_is_forgotten(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Broken):
        segment_slide(slide, Breaking(after=200), out, ALL)
    shutil.copytree(out / "slide" / ".journal", tmp_path / "kept")
    segment_slide(slide, PlaceDependentEngine(), out, ALL)
    shutil.copytree(tmp_path / "kept", out / "slide" / ".journal")
    other = segment_slide(slide, PlaceDependentEngine(), out, replace(ALL, blend="crop"))
    assert "resumed" not in to_json(other.run)
    assert not list(other.folder.glob(".*"))


def test_memory_and_batch_may_change_between_runs(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = [(0, 1024), (1024, 1100)], [(0, 512), (512, 1024), (1024, 1100)]
    unbroken = segment_slide(slide, PlaceDependentEngine(), tmp_path / "unbroken", ALL)
    monkeypatch.setattr(infer, "plan_bands", lambda *_, **__: narrow)
    with pytest.raises(Broken):
        segment_slide(slide, Breaking(after=150), tmp_path / "broken", ALL)
    monkeypatch.setattr(infer, "plan_bands", lambda *_, **__: wide)
    options = replace(ALL, batch=5, threads=1, max_memory_mib=4000)
    result = segment_slide(slide, PlaceDependentEngine(), tmp_path / "broken", options)
    assert to_json(result.run)["grid"]["column_bands"] == 3  # as they were begun
    assert_same(unbroken, result)


def test_bands_too_wide_for_the_memory_now_are_refused(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty, little = replace(ALL, max_memory_mib=4000), replace(ALL, max_memory_mib=3000)
    with pytest.raises(Broken):
        segment_slide(slide, Breaking(after=150), tmp_path, plenty)
    bands = [(0, 512), (512, 1100)]
    monkeypatch.setattr(infer, "plan_bands", lambda *_, **__: bands)
    with pytest.raises(JournalError, match="more than --max-memory leaves room for"):
        segment_slide(slide, PlaceDependentEngine(), tmp_path, little)
    # What is resident varies from run to run: that must not refuse the same command.
    result = segment_slide(slide, PlaceDependentEngine(), tmp_path, plenty)
    assert to_json(result.run)["grid"]["column_bands"] == 1


def test_a_stop_finishes_the_row_in_hand(slide: Path, tmp_path: Path) -> None:
    engine = PlaceDependentEngine()
    grid = TileGrid.cover(1100, 500, tile_px=64, overlap_px=16)
    in_a_row = len(grid.xs)
    with pytest.raises(StoppedError):
        segment_slide(slide, engine, tmp_path, replace(ALL, batch=1), stopping=lambda: engine.tiles > 2 * in_a_row + 3)
    assert engine.tiles == 3 * in_a_row
    again = PlaceDependentEngine()
    segment_slide(slide, again, tmp_path, ALL)
    assert again.tiles == len(grid) - 2 * in_a_row  # of the three, one is inferred again


# --------------------------------------------------------------------------- real processes


def command(slide: Path, bundle: Path, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "histostream.runtime.cli",
        str(slide),
        "--model",
        str(bundle),
        "--out",
        str(out),
        "--no-tissue",
        "--batch",
        "1",
        "--threads",
        "1",
    ]


def strips_in(out: Path) -> int:
    return sum(p.stat().st_size for p in out.glob("*/.journal/*.strips"))


def begun(arguments: list[str], out: Path, more_than: int) -> subprocess.Popen[str]:
    """Start a run and wait until it has finished some strips."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 60
    while strips_in(out) <= more_than and process.poll() is None:
        assert time.monotonic() < deadline, "no strip was finished"
        time.sleep(0.002)
    return process


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return write_slide(tmp_path / "large.tif", random_pixels(1500, 6000))


@pytest.mark.full
def test_a_killed_command_goes_on_and_gives_the_same_bits(large: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command(large, tiny_bundle, out)
    size = 0
    for _ in range(3):
        process = begun(arguments, out, size)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        assert not (out / "large" / "labels.tif").exists()
        size = strips_in(out)
    whole = command(large, tiny_bundle, tmp_path / "whole")
    for line in (arguments, whole):
        subprocess.run(line, capture_output=True, check=True)
    names = ("labels.tif", "summary.csv", "overview.png")
    for name in names:
        one, other = tmp_path / "out" / "large" / name, tmp_path / "whole" / "large" / name
        assert one.read_bytes() == other.read_bytes()
    assert json.loads((out / "large" / "run.json").read_text())["resumed"]["runs"] == 4
    assert not list((out / "large").glob(".*"))


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_how_to_go_on(large: Path, tiny_bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    arguments = command(large, tiny_bundle, tmp_path / "out")
    process = begun(arguments, tmp_path / "out", 0)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    assert "the same command continues from there" in said
    left = {p.name for p in (tmp_path / "out" / "large").iterdir()}
    assert left == {".journal"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.returncode == 0

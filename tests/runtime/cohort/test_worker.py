"""Cohorts: each slide done once or reported, whoever shares the folder, whatever fails."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard, Scores
from histostream.runtime.cohort.worker import LocalExecutor, Worker
from histostream.runtime.cuda.base import DeviceMemoryError
from histostream.runtime.options import Options
from histostream.runtime.slide_job import SlideInput, SlideJob
from histostream.wsi.outputs.lock import Lock
from histostream.wsi.slides.reader import open_slide
from tests.runtime.conftest import IdentityEngine, PlaceDependentEngine, random_pixels, run_cohort, write_slide

ALL = Options(tissue=False, overlap_px=16)


def tasks(slides: list[Path], out: Path, **more: Any) -> list[SlideJob]:
    return [SlideJob(SlideInput(str(p), p.stem), out, ALL, **more) for p in slides]


@pytest.fixture
def slides(tmp_path: Path) -> list[Path]:
    (tmp_path / "in").mkdir()
    return [
        write_slide(tmp_path / "in" / f"{name}.tif", random_pixels(300, 200, seed)) for seed, name in enumerate("abc")
    ]


@pytest.fixture
def crew() -> Iterator[LocalExecutor]:
    found = LocalExecutor(PlaceDependentEngine)
    yield found
    found.close()


def statuses(wanted: list[SlideJob], crew: LocalExecutor, record: Path | None = None) -> list[str]:
    found = run_cohort(wanted, crew, record=record)
    return [found[i].status if i in found else "none" for i in range(len(wanted))]


def table(out: Path) -> list[dict[str, str]]:
    with (out / "cohort.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_slide_that_fails_is_reported_and_the_others_go_on(
    slides: list[Path], crew: LocalExecutor, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    slides[1].write_bytes(b"no slide")
    wanted = tasks(slides, out)
    wanted[2] = replace(wanted[2], slide=replace(wanted[2].slide, further={"case": "7, left"}))
    assert statuses(wanted, crew, out) == ["done", "failed", "done"]
    lines = table(out)
    assert [line["status"] for line in lines] == ["done", "failed", "done"]
    assert "b.tif" in lines[1]["reason"]
    assert lines[2]["case"] == "7, left"
    summary = json.loads((out / "a" / "summary.json").read_text())
    for entry in summary["classes"]:
        assert float(lines[0][f"{entry['name']}_mm2"]) == entry["area_mm2"]
    said = json.loads((out / "cohort.json").read_text())
    assert said["counts"] == {"done": 2, "failed": 1}
    assert [line["name"] for line in said["slides"]] == ["a", "b", "c"]


def test_the_table_has_counts_of_objects_without_opening_a_folder(
    slides: list[Path], crew: LocalExecutor, tmp_path: Path
) -> None:
    wanted = [replace(job, options=replace(ALL, min_area_um2=2)) for job in tasks(slides, tmp_path / "out")]
    wanted[2] = replace(wanted[2], options=ALL)  # whose classes have no rule
    slides[1].write_bytes(b"no slide")
    assert statuses(wanted, crew, tmp_path / "out") == ["done", "failed", "done"]
    first, failed, uncounted = table(tmp_path / "out")
    for entry in json.loads((tmp_path / "out" / "a" / "summary.json").read_text())["classes"]:
        name = entry["name"]
        assert int(first[f"{name}_objects"]) == entry["objects"] > 0
        assert float(first[f"{name}_objects_per_mm2"]) == entry["objects_per_mm2"]
        assert float(first[f"{name}_mean_object_um2"]) == entry["mean_object_um2"]
        assert first[f"{name}_touching_share"] == ""  # no rule says that its objects are compact
        assert failed[f"{name}_objects"] == uncounted[f"{name}_objects"] == ""


def test_what_is_done_is_left_out_while_nothing_has_changed(slides: list[Path], tmp_path: Path) -> None:
    engine = PlaceDependentEngine()
    crew = LocalExecutor(lambda: engine)
    out = tmp_path / "out"
    assert statuses(tasks(slides, out), crew) == ["done"] * 3
    inferred = engine.tiles
    assert statuses(tasks(slides, out), crew, out) == ["unchanged"] * 3
    assert engine.tiles == inferred
    assert [float(line["red_mm2"]) > 0 for line in table(out)] == [True] * 3  # tables stay whole
    os.utime(slides[0], (0, 0))
    assert statuses(tasks(slides, out), crew) == ["done", "unchanged", "unchanged"]
    other = [replace(t, options=replace(ALL, blend="crop")) for t in tasks(slides, out)]
    assert statuses(other, crew) == ["done"] * 3
    asked = tasks(slides, out, requested={"precision": "fp32"})
    assert statuses(asked, crew) == ["done"] * 3
    free = [replace(t, options=replace(ALL, batch=2, threads=1)) for t in tasks(slides, out)]
    assert statuses([replace(t, requested={"precision": "fp32"}) for t in other], crew) == ["done"] * 3
    assert statuses(free, crew) == ["done"] * 3
    assert statuses(tasks(slides, out), crew) == ["unchanged"] * 3
    assert statuses(tasks(slides, out, restart=True), crew) == ["done"] * 3
    crew.close()


@pytest.mark.parametrize("option", ["roi", "mask"])
def test_a_region_and_a_mask_count_by_their_content(
    slides: list[Path], crew: LocalExecutor, tmp_path: Path, option: str
) -> None:
    roi = tmp_path / "roi.geojson"
    square = [[10, 10], [150, 10], [150, 150], [10, 10]]
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [square]}))
    (task,) = tasks(slides[:1], tmp_path / "out")
    task = replace(task, options=replace(ALL, roi=roi) if option == "roi" else replace(ALL, mask=roi))
    assert statuses([task], crew) == ["done"]
    os.utime(roi, (0, 0))
    assert statuses([task], crew) == ["unchanged"]
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [square[::-1]]}))
    assert statuses([task], crew) == ["done"]


def test_a_slide_in_other_hands_is_left_to_them(slides: list[Path], crew: LocalExecutor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "b").mkdir(parents=True)
    with Lock(out / "b" / ".lock"):
        assert statuses(tasks(slides, out), crew, out) == ["done", "elsewhere", "done"]
        assert f"process {os.getpid()} on" in table(out)[1]["reason"]
    assert statuses(tasks(slides, out), crew, out) == ["unchanged", "done", "unchanged"]


@dataclass
class Watched(PlaceDependentEngine):
    """Notes in which thread, and when, it is run."""

    pause_s: float = 0.01
    threads: set[int] = field(default_factory=set)
    spans: list[tuple[float, float]] = field(default_factory=list)

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        self.threads.add(threading.get_ident())
        start = time.monotonic()
        time.sleep(self.pause_s)
        scores = super().infer(tiles)
        self.spans.append((start, time.monotonic()))
        return scores


def test_the_next_slide_is_read_while_this_one_is_on_the_device(
    slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Watched(pause_s=0.2)
    reads: list[float] = []

    def opened(path: Path, card: ModelCard, options: Options) -> Any:
        reads.append(time.monotonic())
        return open_slide(path)

    monkeypatch.setattr("histostream.runtime.slide_run.open_for_model", opened)
    crew = LocalExecutor(lambda: engine)
    assert statuses(tasks(slides, tmp_path / "out"), crew) == ["done"] * 3
    crew.close()
    assert len(engine.threads) == 1  # that opened it
    each = len(engine.spans) // 3
    ends = [engine.spans[(i + 1) * each - 1][1] for i in range(3)]
    assert reads[1] < ends[0]  # while the first was on the device
    assert ends[0] < reads[2] < ends[1]  # two are in memory at once, no more


def test_a_stop_lets_the_strip_in_hand_be_finished_and_begins_nothing(slides: list[Path], tmp_path: Path) -> None:
    engine = Watched()
    crew = LocalExecutor(lambda: engine)
    out = tmp_path / "out"
    found = run_cohort(tasks(slides, out), crew, stopping=lambda: engine.tiles > 5, record=out)
    assert {o.status for o in found.values()} == {"stopped"}
    assert 2 not in found
    assert [line["status"] for line in table(tmp_path / "out")][2] == "not begun"
    assert statuses(tasks(slides, tmp_path / "out"), crew) == ["done"] * 3
    crew.close()


@dataclass
class Hungry(IdentityEngine):
    """Runs out of memory with more than some tiles at once."""

    most: int = 1
    error: Callable[[], Exception] = MemoryError

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        if len(tiles) > self.most:
            raise self.error()
        return super().infer(tiles)


@pytest.mark.full
@pytest.mark.parametrize("error", [MemoryError, lambda: DeviceMemoryError("full", 9)])
def test_out_of_memory_goes_on_with_smaller_batches(
    slides: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Any
) -> None:
    engine = Hungry(most=2, error=error)
    worker = Worker(lambda: engine)
    (task,) = tasks(slides[:1], tmp_path / "out")
    outcome = worker.segment(replace(task, options=replace(ALL, batch=9)))
    assert outcome.status == "done"
    assert max(engine.batches) == 2
    assert "continues with 4 tiles at once" in caplog.text
    assert "continues with 2 tiles at once" in caplog.text
    engine.most = 0
    lost = worker.segment(replace(task, restart=True))
    assert lost.status == "failed"
    assert "--max-memory" in lost.reason
    worker.close()


def test_a_fault_of_ours_does_not_take_the_others_along(slides: list[Path], tmp_path: Path) -> None:
    @dataclass
    class Faulty(PlaceDependentEngine):
        def infer(self, tiles: NDArray[np.uint8]) -> Scores:
            if not self.tiles:
                self.tiles = 1
                raise KeyError("planted")
            return super().infer(tiles)

    crew = LocalExecutor(Faulty, 1)
    found = run_cohort(tasks(slides, tmp_path / "out"), crew)
    crew.close()
    assert [found[i].status for i in range(3)] == ["failed", "done", "done"]
    assert "planted" in found[0].reason


# --------------------------------------------------------------------------- real processes


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "histostream.runtime.cli", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


@pytest.mark.full
def test_two_processes_share_a_folder_and_do_no_slide_twice(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(8):
        write_slide(tmp_path / "in" / f"s{seed}.tif", random_pixels(1200, 1200, seed))
    line = command(tmp_path / "in", "--model", tiny_bundle, "--out", tmp_path / "out", "--no-tissue", "--threads", "1")
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    done = [sum("Mpx/s" in ln for ln in out.splitlines()) for out, _ in said]
    assert sum(done) == 8
    assert min(done) >= 1, "one of them did nothing"
    names = {p.parent.name for p in (tmp_path / "out").glob("*/run.json")}
    assert names == {f"s{seed}" for seed in range(8)}
    assert not list((tmp_path / "out").glob("*/.*"))
    again = run(*line[3:])
    assert "8 slides: 8 unchanged" in again.stdout
    assert again.returncode == 0


def test_a_list_gives_each_slide_its_own_resolution_and_name(tiny_bundle: Path, tmp_path: Path) -> None:
    write_slide(tmp_path / "x.tif", random_pixels(200, 150), mpp=None)
    write_slide(tmp_path / "y.tif", random_pixels(200, 150))
    cohort = tmp_path / "cohort.csv"
    cohort.write_text("path,mpp,name,case\nx.tif,0.5,first,A\ny.tif,,second,B\nz.tif,,,C\n")
    done = run(cohort, "--model", tiny_bundle, "--out", tmp_path / "out", "--no-tissue", "--stage", tmp_path / "stage")
    assert done.returncode == 1
    assert "z.tif" in done.stderr
    assert "Traceback" not in done.stderr
    assert "1 of 3 slides failed" in done.stderr
    lines = table(tmp_path / "out")
    assert [(ln["name"], ln["status"], ln["case"]) for ln in lines] == [
        ("first", "done", "A"),
        ("second", "done", "B"),
        ("z", "failed", "C"),
    ]
    assert json.loads((tmp_path / "out" / "first" / "run.json").read_text())["slide"]["mpp"] is None
    assert not list((tmp_path / "stage").rglob("*.tif"))
    run_json = json.loads((tmp_path / "out" / "second" / "run.json").read_text())
    assert run_json["slide"]["source"] == str(tmp_path / "y.tif")


def test_run_json_holds_the_hash_that_sha256sum_prints(slides: list[Path], crew: LocalExecutor, tmp_path: Path) -> None:
    assert statuses(tasks(slides[:1], tmp_path / "out"), crew) == ["done"]
    said = json.loads((tmp_path / "out" / "a" / "run.json").read_text())["slide"]["sha256"]
    import hashlib

    assert said == hashlib.sha256(slides[0].read_bytes()).hexdigest()


def test_a_slide_in_a_bucket_is_segmented(slides: list[Path], bucket: str, tiny_bundle: Path, tmp_path: Path) -> None:
    import fsspec

    scheme, _, name = bucket.partition("://")
    for path in slides[:2]:
        fsspec.filesystem(scheme).pipe(f"{name}/study/{path.name}", path.read_bytes())
    out = tmp_path / "out"
    line = ["--model", tiny_bundle, "--no-tissue", "--out"]
    done = run(f"{bucket}/study/", f"{bucket}/study/none.tif", *line, out)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "1 of 3 slides failed" in done.stderr
    assert run(*slides[:2], *line, tmp_path / "local").returncode == 0
    for slide in ("a", "b"):
        one, other = (tmp_path / f / slide / "labels.tif" for f in ("out", "local"))
        assert one.read_bytes() == other.read_bytes()
    said = json.loads((out / "a" / "run.json").read_text())["slide"]
    assert said["source"] == f"{bucket}/study/a.tif"
    assert not list((out / ".stage").rglob("*.tif"))
    again = run(f"{bucket}/study/a.tif", *line, out)
    assert "done before" in again.stdout

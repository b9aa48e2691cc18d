"""Several devices: here processes on the CPU, which share jobs as GPUs do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from histostream.runtime.cohort.processes import ProcessPool, check_devices
from histostream.runtime.cohort.worker import Report
from histostream.runtime.engines.base import EngineError, open_engine
from histostream.runtime.options import Options
from histostream.runtime.outcome import Outcome
from histostream.runtime.slide_job import SlideInput, SlideJob
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.errors import HistoError
from histostream.wsi.records import to_json
from histostream.wsi.synthetic import SyntheticSlide
from histostream.wsi.tiling.grid import TileGrid

pytestmark = pytest.mark.xdist_group("fleet")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "wide.tif"
    SyntheticSlide(2100, 900, mpp=0.5, seed=2).write(path)
    return path


@pytest.fixture(scope="module")
def fleet(tiny_bundle: Path) -> Iterator[ProcessPool]:
    found = ProcessPool(tiny_bundle, ("cpu", "cpu"))
    yield found
    found.close()


def labels(folder: Path, name: str = "labels.tif") -> np.ndarray:
    return tifffile.imread(folder / name)


@pytest.mark.full
@pytest.mark.parametrize("blend", ["hann", "crop"])
def test_two_devices_give_the_same_bits_as_one(
    slide: Path, fleet: ProcessPool, tiny_bundle: Path, tmp_path: Path, blend: str
) -> None:
    options = Options(tissue=False, blend=blend, probabilities=True)
    one = segment_slide(slide, open_engine(tiny_bundle, backend="cpu"), tmp_path / "1", options)
    seen: list[tuple[int, int]] = []
    two = segment_slide(slide, fleet, tmp_path / "2", options, report=lambda done, all_: seen.append((done, all_)))
    for name in ("labels.tif", "probabilities.tif"):
        np.testing.assert_array_equal(labels(one.folder, name), labels(two.folder, name))
    assert two.summary == one.summary
    devices = to_json(two.run)["device"]["devices"]
    assert [d["device"] for d in devices] == ["cpu", "cpu"]
    assert devices[0]["columns"][1] == devices[1]["columns"][0]
    assert all(d["tiles"] > 0 for d in devices)
    assert to_json(two.run)["model"]["engine"].endswith("x 2 (cpu, cpu)")
    assert seen[-1][0] == seen[-1][1]
    assert not list(two.folder.glob(".*"))


def test_bands_have_as_many_tiles_each_wherever_the_tissue_is(fleet: ProcessPool) -> None:
    grid = TileGrid.cover(8192, 1024, tile_px=128, overlap_px=16, align_px=4)
    keep = np.zeros((len(grid.ys), len(grid.xs)), bool)
    keep[:, len(grid.xs) // 2 :] = True  # all of it on the right
    bands = fleet.plan_bands(grid.where(keep))
    assert bands[0][0] == 0
    assert bands[-1][1] == 8192
    assert all(a % 512 == 0 for a, _ in bands)
    counts = [sum(1 for _ in grid.where(keep).band(*band)) for band in bands]
    assert max(counts) < 1.3 * min(counts)
    assert fleet.plan_bands(TileGrid.cover(300, 300, tile_px=128, overlap_px=16)) == [(0, 300)]


def tasks(slides: list[Path], out: Path, options: Options) -> list[SlideJob]:
    return [SlideJob(SlideInput(str(path), path.stem), out, options) for path in slides]


def all_of(fleet: ProcessPool, wanted: list[SlideJob], stopping: bool = False) -> dict[int, Outcome]:
    return dict(fleet.segment_all(wanted, report=lambda i: lambda done, total: None, stopping=lambda: stopping))


@pytest.mark.full
def test_slides_are_shared_and_one_that_fails_does_not_stop_the_others(
    slide: Path, fleet: ProcessPool, tiny_bundle: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.tif"
    SyntheticSlide(600, 500, mpp=0.5, seed=3).write(other)
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"no slide")
    options = Options(tissue=False)
    found = all_of(fleet, tasks([slide, broken, other], tmp_path / "out", options))
    assert [found[i].status for i in range(3)] == ["done", "failed", "done"]
    assert "broken.tif" in found[1].reason
    engine = open_engine(tiny_bundle, backend="cpu")
    for path in (slide, other):
        alone = segment_slide(path, engine, tmp_path / "alone", options)
        np.testing.assert_array_equal(labels(tmp_path / "out" / path.stem), labels(alone.folder))


def test_a_fleet_that_is_stopped_begins_nothing_and_runs_again_later(
    slide: Path, fleet: ProcessPool, tmp_path: Path
) -> None:
    wanted = tasks([slide], tmp_path / "out", Options(tissue=False))
    assert all_of(fleet, wanted, stopping=True) == {}
    assert not (tmp_path / "out").exists()
    assert all_of(fleet, wanted)[0].status == "done"


def test_a_slide_that_fails_leaves_the_fleet_fit_for_the_next(slide: Path, fleet: ProcessPool, tmp_path: Path) -> None:
    broken = tmp_path / "truncated.tif"
    broken.write_bytes(slide.read_bytes()[: slide.stat().st_size // 2])
    with pytest.raises(HistoError):
        segment_slide(broken, fleet, tmp_path / "out", Options(tissue=False))
    assert to_json(segment_slide(slide, fleet, tmp_path / "out", Options(tissue=False)).run)["mpx"] > 0


@pytest.mark.full
def test_the_slide_of_a_device_that_dies_is_done_by_another(slide: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    fleet = ProcessPool(tiny_bundle, ("cpu", "cpu"))
    other = tmp_path / "other.tif"
    SyntheticSlide(2100, 900, mpp=0.5, seed=3).write(other)
    wanted = tasks([slide, other], tmp_path / "out", Options(tissue=False, batch=1))
    victim = fleet._processes[0].process

    def report(number: int) -> Report:
        def kill(done: int, total: int) -> None:
            if victim.is_alive() and victim.pid is not None:
                os.kill(victim.pid, signal.SIGKILL)

        return kill

    try:
        found = dict(fleet.segment_all(wanted, report=report, stopping=lambda: False))
        assert [found[i].status for i in (0, 1)] == ["done", "done"]
        assert not victim.is_alive()
        left = fleet._processes[0].process
        assert left.pid is not None
        os.kill(left.pid, signal.SIGKILL)
        lost = all_of(fleet, tasks([slide], tmp_path / "again", Options(tissue=False)))
    finally:
        fleet.close()
    assert lost[0].status == "failed"
    assert "exit code -9" in lost[0].reason
    engine = open_engine(tiny_bundle, backend="cpu")
    for path in (slide, other):
        alone = segment_slide(path, engine, tmp_path / "alone", Options(tissue=False))
        np.testing.assert_array_equal(labels(tmp_path / "out" / path.stem), labels(alone.folder))


def test_closing_leaves_no_process_behind(tiny_bundle: Path) -> None:
    fleet = ProcessPool(tiny_bundle, ("cpu",))
    (pid,) = [w.process.pid for w in fleet._processes]
    assert pid is not None
    fleet.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the process is still there")


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (("0", "0"), "device 0 is named twice"),
        (("gpu0",), "name GPUs by number"),
        (("-1",), "name GPUs by number"),
        ((), "no device is named"),
    ],
)
def test_devices_that_cannot_be_meant_are_refused(devices: tuple[str, ...], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        check_devices(devices)


def test_a_gpu_that_is_not_there_is_one_clear_line(tiny_bundle: Path) -> None:
    from histostream.runtime.engines.base import gpu_count

    if gpu_count():
        pytest.skip("a GPU is here")
    with pytest.raises(EngineError, match=r"device 0: .*cuda") as caught:
        ProcessPool(tiny_bundle, ("0",), backend="cuda")
    assert "\n" not in str(caught.value)

"""Several devices, a process each: they share slides, or the column bands of one slide.

Every process opens the network once and takes one job after the other. A band's finished rows go
to a file beside the results, from which this process writes the label map; integer blending makes
it the same bits as on one device.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from histostream.runtime.bundle.card import ModelCard, read_card
from histostream.runtime.cohort.worker import (
    CONCURRENCY,
    FAILED,
    STOPPED,
    Outcome,
    Report,
    Task,
    Worker,
    pick_worker,
)
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.errors import EngineError
from histostream.runtime.options import Options
from histostream.runtime.slide_run import Job
from histostream.runtime.stream.column_band import Band, Counts, StageSeconds
from histostream.runtime.stream.memory import BAND_ALIGN_PX, return_buffers_at_once
from histostream.wsi.errors import HistoError, StoppedError
from histostream.wsi.geometry import Box
from histostream.wsi.outputs.folder import OutputFolder
from histostream.wsi.outputs.journal import Journal
from histostream.wsi.outputs.label_rows import LabelRows
from histostream.wsi.slides.damage import Damage
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.slides.sources.base import redact_url
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.tissue import RegionOfInterest

CPU = "cpu"  # names a process on the CPU among the devices; a number names a GPU


PR_SET_PDEATHSIG = 1  # sys/prctl.h
ATTEMPTS = 2  # at a job whose device's process ended
ASKED_S = 0.2  # how often it is asked whether to stop
REPORTED_S = 0.5  # between two reports of how far a slide is


@dataclass(frozen=True, slots=True)
class BandJob:
    """One column band of a slide: its finished rows go to the journal in ``folder``."""

    slide: Path
    grid: TileGrid
    roi: RegionOfInterest | None
    options: Options
    folder: Path


@dataclass(slots=True)
class _Process:
    """A process on one device, and the jobs that it has."""

    device: str
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    jobs: list[int] = field(default_factory=list)


class ProcessPool:
    """The same network on several devices.

    Parameters
    ----------
    bundle
        Folder of the model.
    devices
        Numbers of GPUs, as "0"; "cpu" is a process on the CPU, and may be named more than once.
    backend, precision, threads
        As for `open_engine`; the CPU's threads are shared out among its processes.
    at_once
        Slides that a process has in memory together.

    Raises
    ------
    EngineError
        If a device is named twice or is not usable.

    Attributes
    ----------
    card
        The model's card.
    name, each
        What the engines say of themselves, with the devices, and what one of them says.
    devices
        How many there are.
    """

    def __init__(
        self,
        bundle: Path,
        devices: tuple[str, ...],
        *,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        at_once: int = CONCURRENCY,
    ) -> None:
        self._at_once = at_once
        self.card: ModelCard = read_card(bundle)
        self._processes: list[_Process] = []
        check_devices(devices)
        on_cpu = devices.count(CPU)
        if threads is None and on_cpu:
            threads = max(1, (os.cpu_count() or 1) // on_cpu)
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        try:
            for device in devices:
                ours, theirs = context.Pipe()
                how = {
                    "backend": CPU if device == CPU and backend == "auto" else backend,
                    "precision": precision,
                    "threads": threads,
                }
                process = context.Process(target=_work, args=(theirs, bundle, device, how, self._stop), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(_Process(device, process, ours))
            opened = [self._receive(process) for process in self._processes]
        except BaseException:
            self.close()
            raise
        self.each: str = opened[0]
        self.name = f"{self.each} x {len(devices)} ({', '.join(devices)})"
        self.devices = len(devices)

    def plan_bands(self, grid: TileGrid, align_px: int = BAND_ALIGN_PX) -> list[tuple[int, int]]:
        """Cut a slide into one column band for each device, with as many tiles in each.

        Bands begin at multiples of ``align_px``, itself a multiple of the sinks' tiles. A narrow
        slide gives fewer.
        """
        tiles = np.zeros(grid.width // align_px + 1)
        for tile in grid:
            tiles[tile.write.x // align_px] += 1
        share = np.cumsum(tiles) / max(tiles.sum(), 1)
        wanted = np.arange(1, len(self._processes)) / len(self._processes)
        cuts = {int(np.searchsorted(share, w) + 1) * align_px for w in wanted}
        edges = [0, *sorted(c for c in cuts if c < grid.width), grid.width]
        return list(pairwise(edges))

    def run_bands(
        self,
        job: Job,
        grid: TileGrid,
        roi: RegionOfInterest | None,
        bands: list[tuple[int, int]],
        folder: OutputFolder,
        journal: Journal,
        damage: Damage,
        seconds: StageSeconds,
        counts: Counts,
        stopping: Callable[[], bool],
    ) -> dict[str, Any]:
        """Run the bands of a slide, and write their rows to ``folder``, one band after the other.

        Returns
        -------
        What each device did, for ``run.json``.

        Raises
        ------
        HistoError
            If a band fails, or its device's process ends, twice.
        StoppedError
            If it was stopped.
        """
        jobs = [BandJob(job.path, grid.band(*band), roi, job.options, folder.path) for band in bands]
        done: dict[int, dict[str, Any]] = {}
        doing: dict[int, tuple[int, int, int]] = {}

        def progressed(band: int, content: tuple[int, int, int]) -> None:
            doing[band] = content
            columns = zip(*doing.values(), strict=True)
            counts.tiles, counts.pixels, counts.pixels_before = (sum(v) for v in columns)
            counts.report(counts.pixels, counts.total_pixels)

        results = self._run(jobs, progressed, stopping, at_once=1)
        try:
            for i, (x0, x1) in enumerate(bands):
                while i not in done:
                    with seconds.time("infer"):
                        band, kind, content = next(results)
                    if kind == "stopped":
                        raise StoppedError
                    if kind == "failed":
                        raise HistoError(content)
                    done[band] = content
                with seconds.time("write"), journal.band(x0, x1, grid.height) as rows:
                    for record in rows.finished():
                        folder.write(record.part)
                    if rows.y < grid.height:
                        raise HistoError(f"{rows.path}: cannot be read back; check the disk")
                for level, box in done[i].pop("damaged"):
                    damage.add(level, box)
        finally:
            self._stop.set()
            for _ in results:  # nobody may be left with a job of this slide
                pass
        return {"devices": [done[i] for i in range(len(jobs))]}

    def segment_all(
        self,
        tasks: Sequence[Task],
        *,
        report: Callable[[int], Report],
        stopping: Callable[[], bool],
    ) -> Iterator[tuple[int, Outcome]]:
        """Segment slides, a slide on each device; see `cohort.Executor`."""
        reports = [report(i) for i in range(len(tasks))]

        def progressed(i: int, content: tuple[int, int]) -> None:
            reports[i](*content)

        for i, kind, content in self._run(tasks, progressed, stopping, at_once=self._at_once):
            if isinstance(content, Outcome):
                yield i, content
            elif kind == "failed":
                yield i, Outcome(FAILED, f"{redact_url(tasks[i].slide.source)}: {content}")

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.pipe.send(None)
            process.pipe.close()
        for process in self._processes:
            process.process.join(5)
            if process.process.is_alive():
                process.process.terminate()
                process.process.join()
        self._processes = []

    def _run(
        self,
        jobs: Sequence[BandJob | Task],
        progressed: Callable[[int, Any], None],
        stopping: Callable[[], bool],
        *,
        at_once: int,
    ) -> Iterator[tuple[int, str, Any]]:
        """Give jobs to whoever is free; yields (job, "done", "failed" or "stopped", what)."""
        waiting = list(range(len(jobs)))
        attempts = [0] * len(jobs)
        self._stop.clear()
        while True:
            if stopping():
                self._stop.set()
            else:
                self._share_out(waiting, attempts, jobs, at_once)
            busy = [p.pipe for p in self._processes if p.jobs]
            if not busy:
                break
            ready = wait(busy, timeout=ASKED_S)
            for process in [p for p in self._processes if p.pipe in ready]:
                try:
                    job, kind, content = process.pipe.recv()
                except (EOFError, OSError):
                    yield from self._lost(process, waiting, attempts)
                    continue
                if kind == "progress":
                    progressed(job, content)
                    continue
                process.jobs.remove(job)
                yield job, kind, content
        for job in waiting:
            said = ("stopped", None) if stopping() else ("failed", "no device is left to run it on")
            yield job, *said

    def _share_out(
        self,
        waiting: list[int],
        attempts: list[int],
        jobs: Sequence[BandJob | Task],
        at_once: int,
    ) -> None:
        """Give each process a job, and one ahead while there is more than one for each."""
        while True:
            turn = pick_worker([len(p.jobs) for p in self._processes], len(waiting), at_once)
            if turn is None:
                return
            process, job = self._processes[turn], waiting.pop(0)
            attempts[job] += 1
            process.jobs.append(job)
            with contextlib.suppress(OSError):  # its end is seen when it is listened to
                process.pipe.send((job, jobs[job]))

    def _lost(self, process: _Process, waiting: list[int], attempts: list[int]) -> Iterator[tuple[int, str, Any]]:
        """Leave a process that ended; others go on with its jobs, from where it was."""
        process.process.join()
        self._processes.remove(process)
        process.pipe.close()
        for job in process.jobs:
            if attempts[job] < ATTEMPTS and self._processes:
                waiting.insert(0, job)
            else:
                yield job, "failed", _ended(process)

    def _receive(self, process: _Process) -> Any:
        try:
            kind, content = process.pipe.recv()
        except (EOFError, OSError) as error:
            process.process.join()
            raise EngineError(_ended(process)) from error
        if kind == "failed":
            raise EngineError(f"device {process.device}: {content}")
        return content


def check_devices(devices: tuple[str, ...]) -> None:
    """Refuse devices that cannot be meant.

    Raises
    ------
    EngineError
        If none is named, a name is no number, or a GPU is named twice.
    """
    for device in devices:
        if device != CPU and not (device.isascii() and device.isdigit()):
            raise EngineError(f"device {device!r}: name GPUs by number, as 0,1; or cpu")
        if device != CPU and devices.count(device) > 1:
            raise EngineError(f"device {device} is named twice: name each once")
    if not devices:
        raise EngineError("no device is named: write --devices 0,1")


def _ended(process: _Process) -> str:
    return (
        f"device {process.device}: its process ended with exit code {process.process.exitcode} "
        "(-9: killed, often for want of memory); repeat the command to go on"
    )


def _work(pipe: Connection, bundle: Path, device: str, how: dict[str, Any], stop: Event) -> None:
    """Open the network on one device, then do jobs until there are no more: a process's life."""
    if device != CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before anything of CUDA is loaded
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first decides
    return_buffers_at_once()
    try:
        worker = Worker(lambda: open_engine(bundle, **how))
    except HistoError as error:
        pipe.send(("failed", str(error)))
        return
    pipe.send(("opened", worker.engine.name))
    left = threading.Event()
    talking = threading.Lock()

    def send(*message: Any) -> None:
        with talking, contextlib.suppress(OSError):  # nobody listens any more
            pipe.send(message)

    def stopping() -> bool:
        return stop.is_set() or left.is_set()

    def do(number: int, job: BandJob | Task) -> None:
        def report(*progress: int) -> None:
            send(number, "progress", progress)

        try:
            if isinstance(job, Task):
                outcome = worker.segment(job, _seldom(report), stopping)
                send(number, "stopped" if outcome.status == STOPPED else "done", outcome)
            else:
                said = worker.on_device(lambda: _run_band(job, worker.engine, device, report, stopping))
                send(number, "done", said)
        except StoppedError:
            send(number, "stopped", None)
        except HistoError as error:
            send(number, "failed", str(error))
        except MemoryError:
            send(number, "failed", "out of memory; use a smaller --batch or fewer --devices")
        except Exception:  # what it is has to reach the user, whose process this is not
            send(number, "failed", traceback.format_exc(limit=-3))

    with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="slide") as pool:
        try:
            while (message := pipe.recv()) is not None:
                pool.submit(do, *message)
        except (EOFError, OSError):  # the parent is gone
            left.set()
    worker.close()


def _run_band(
    job: BandJob,
    engine: Any,
    device: str,
    report: Callable[[int, int, int], None],
    stopping: Callable[[], bool],
) -> dict[str, Any]:
    """Run one band into its journal; returns what ``run.json`` says, and the damaged blocks."""
    seconds = StageSeconds()
    counts = Counts()
    counts.report = lambda done, total: report(counts.tiles, done, counts.pixels_before)
    grid, options = job.grid, job.options
    with (
        open_slide(job.slide) as slide,
        Journal(job.folder).band(grid.x0, grid.x1, grid.height) as journal,
    ):
        view = at_mpp(slide, engine.card.mpp, slide_mpp=options.mpp, force=options.force_upsampling)
        damage = Damage(slide)
        band = Band(view, grid, job.roi, engine.card, options, journal, _Nowhere(), damage, seconds, counts, stopping)
        with closing(band):
            band.begin()
            record = band.run(engine)
        blocks = slide.decoded_blocks
        report(counts.tiles, counts.pixels, counts.pixels_before)
    found: list[tuple[int, Box]] = [(view.level, box) for box in damage.of_level(view.level)]
    return {
        "device": device,
        "columns": [grid.x0, grid.x1],
        "tiles": counts.tiles,
        "source_blocks_decoded": blocks,
        "seconds": {k: round(v, 3) for k, v in asdict(seconds).items()},
        "damaged": found,
        **record,
    }


def _end_with_parent() -> None:
    """Have the system kill this process when its parent is killed (Linux; else a strip later)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class _Nowhere:
    """Takes finished rows that the journal holds, for the process that writes them."""

    def write(self, part: LabelRows) -> None:
        """Do nothing."""


def _seldom(report: Report) -> Report:
    """Pass a report on twice a second, not for each batch."""
    last = 0.0

    def passed_on(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > REPORTED_S:
            last = now
            report(done, total)

    return passed_on

"""Several devices, a process each: they share slides, or the column bands of one slide.

Every process opens the network once and takes one job after the other. The finished rows of a band
go to the journal, from which the first process writes the label map. Blending in integers makes it
the same bits as on one device.
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
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from histostream.runtime.bundle.card import ModelCard, read_card
from histostream.runtime.cohort.worker import CONCURRENCY, Report, Worker, pick_worker
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.errors import EngineError
from histostream.runtime.layout import open_for_model
from histostream.runtime.outcome import FAILED, STOPPED, Outcome
from histostream.runtime.process_memory import return_buffers_at_once
from histostream.runtime.slide_job import SlideJob
from histostream.runtime.stream.column_band import open_band
from histostream.runtime.stream.context import BandRecord, BandResult, Counts, RunContext, RunPlan
from histostream.wsi.errors import HistoError, StoppedError
from histostream.wsi.outputs.memory_needs import BAND_ALIGN_PX
from histostream.wsi.records import to_json
from histostream.wsi.slides.damage import Damage
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.tiling.grid import TileGrid

CPU = "cpu"  # names a process on the CPU among the devices; a number names a GPU
PR_SET_PDEATHSIG = 1  # sys/prctl.h
ATTEMPTS = 2  # at a job whose device's process ended
POLL_S = 0.2  # how often ``stopping`` is called
REPORT_S = 0.5  # between two reports of a slide's progress


@dataclass(frozen=True, slots=True)
class BandJob:
    """One column band of a slide, for another process; finished rows go to the journal."""

    plan: RunPlan
    columns: tuple[int, int]


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
    concurrency
        Slides that a process has in memory at the same time.

    Raises
    ------
    EngineError
        If a device is named twice or is not usable.

    Attributes
    ----------
    card
        The model's card.
    name, engine_name
        Name of the engine, with the devices and without.
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
        concurrency: int = CONCURRENCY,
    ) -> None:
        self._concurrency = concurrency
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
                engine_options = {
                    "backend": CPU if device == CPU and backend == "auto" else backend,
                    "precision": precision,
                    "threads": threads,
                }
                arguments = theirs, bundle, device, engine_options, self._stop
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._processes.append(_Process(device, process, ours))
            opened = [self._receive(process) for process in self._processes]
        except BaseException:
            self.close()
            raise
        self.engine_name: str = opened[0]
        self.name = f"{self.engine_name} x {len(devices)} ({', '.join(devices)})"
        self.devices = len(devices)

    def plan_bands(self, grid: TileGrid, align_px: int = BAND_ALIGN_PX) -> list[tuple[int, int]]:
        """Divide a slide into one column band for each device, with the same number of tiles in each.

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

    def run_bands(self, context: RunContext, bands: Sequence[tuple[int, int]]) -> list[BandResult]:
        """Run the column bands of a slide, and write their rows one band after the other.

        Parameters
        ----------
        context
            The run of the slide.
        bands
            (x0, x1) of each band, in pixels.

        Raises
        ------
        HistoError
            If a band fails, or its device's process ends, twice.
        StoppedError
            If the run was stopped.
        """
        jobs = [BandJob(context.plan, columns) for columns in bands]
        counts, height = context.counts, context.plan.grid.height
        done: dict[int, BandResult] = {}
        progress: dict[int, tuple[int, int, int]] = {}

        def progressed(band: int, content: tuple[int, int, int]) -> None:
            progress[band] = content
            counts.tiles, counts.pixels, counts.pixels_before = (
                sum(values) for values in zip(*progress.values(), strict=True)
            )
            counts.report(counts.pixels, counts.total_pixels)

        results = self._run(jobs, progressed, context.stopping, concurrency=1)
        try:
            for i, columns in enumerate(bands):
                while i not in done:
                    with context.seconds.time("infer"):
                        band, kind, content = next(results)
                    if kind == "stopped":
                        raise StoppedError
                    if kind == "failed":
                        raise HistoError(content)
                    done[band] = content
                with context.seconds.time("write"), context.journal.band(*columns, height) as journal:
                    for record in journal.finished():
                        context.write(record.part)
                    if journal.y < height:
                        raise HistoError(f"{journal.path}: cannot be read back; check the disk")
                for level, box in done[i].damaged:
                    context.damage.add(level, box)
        finally:
            self._stop.set()
            for _ in results:  # until no process has a job of this slide
                pass
        return [done[i] for i in range(len(jobs))]

    def segment_all(
        self,
        jobs: Sequence[SlideJob],
        *,
        report: Callable[[int], Report],
        stopping: Callable[[], bool],
    ) -> Iterator[tuple[int, Outcome]]:
        """Segment slides, a slide on each device; see `Executor`."""
        reports = [report(i) for i in range(len(jobs))]

        def progressed(i: int, content: tuple[int, int]) -> None:
            reports[i](*content)

        for i, kind, content in self._run(jobs, progressed, stopping, concurrency=self._concurrency):
            if isinstance(content, Outcome):
                yield i, content
            elif kind == "failed":
                yield i, Outcome(FAILED, f"{jobs[i].source}: {content}")

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
        jobs: Sequence[BandJob | SlideJob],
        progressed: Callable[[int, Any], None],
        stopping: Callable[[], bool],
        *,
        concurrency: int,
    ) -> Iterator[tuple[int, str, Any]]:
        """Give jobs to free processes; yield (number of the job, "done", "failed" or "stopped", result or message)."""
        waiting = list(range(len(jobs)))
        attempts = [0] * len(jobs)
        self._stop.clear()
        while True:
            if stopping():
                self._stop.set()
            else:
                self._share_out(waiting, attempts, jobs, concurrency)
            busy = [p.pipe for p in self._processes if p.jobs]
            if not busy:
                break
            ready = wait(busy, timeout=POLL_S)
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
            yield (job, "stopped", None) if stopping() else (job, "failed", "no device is left to run it on")

    def _share_out(
        self,
        waiting: list[int],
        attempts: list[int],
        jobs: Sequence[BandJob | SlideJob],
        concurrency: int,
    ) -> None:
        """Give each process a job, and one ahead while there is more than one for each."""
        while True:
            index = pick_worker([len(p.jobs) for p in self._processes], len(waiting), concurrency)
            if index is None:
                return
            process, job = self._processes[index], waiting.pop(0)
            attempts[job] += 1
            process.jobs.append(job)
            with contextlib.suppress(OSError):  # `wait` will report that it ended
                process.pipe.send((job, jobs[job]))

    def _lost(self, process: _Process, waiting: list[int], attempts: list[int]) -> Iterator[tuple[int, str, Any]]:
        """Remove a process that ended; the others continue its jobs from their journals."""
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
    """Check the names of devices.

    Raises
    ------
    EngineError
        If there is none, a name is not a number, or a GPU is named twice.
    """
    for device in devices:
        if device != CPU and not (device.isascii() and device.isdigit()):
            raise EngineError(f"device {device!r}: name GPUs by number, as 0,1; or cpu")
        if device != CPU and devices.count(device) > 1:
            raise EngineError(f"device {device} is named twice: name each once")
    if not devices:
        raise EngineError("no device is named: write --device 0,1")


def _ended(process: _Process) -> str:
    return (
        f"device {process.device}: its process ended with exit code {process.process.exitcode} "
        "(-9: killed, often for want of memory); repeat the command to go on"
    )


def _work(pipe: Connection, bundle: Path, device: str, engine_options: dict[str, Any], stop: Event) -> None:
    """Open the network on one device, then run jobs until there are no more: the main function of a process."""
    if device != CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before anything of CUDA is loaded
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one stops the others
    return_buffers_at_once()
    try:
        worker = Worker(lambda: open_engine(bundle, **engine_options))
    except HistoError as error:
        pipe.send(("failed", str(error)))
        return
    pipe.send(("opened", worker.engine.name))
    abandoned = threading.Event()  # the parent has ended
    sending = threading.Lock()

    def send(*message: Any) -> None:
        with sending, contextlib.suppress(OSError):  # the parent has ended
            pipe.send(message)

    def stopping() -> bool:
        return stop.is_set() or abandoned.is_set()

    def run(number: int, job: BandJob | SlideJob) -> None:
        def report(*progress: int) -> None:
            send(number, "progress", progress)

        try:
            if isinstance(job, SlideJob):
                outcome = worker.segment(job, _throttled(report), stopping)
                send(number, "stopped" if outcome.status == STOPPED else "done", outcome)
            else:
                send(number, "done", worker.on_device(lambda: _run_band(job, worker.engine, device, report, stopping)))
        except StoppedError:
            send(number, "stopped", None)
        except HistoError as error:
            send(number, "failed", str(error))
        except MemoryError:
            send(number, "failed", "out of memory; use a smaller --batch or fewer --device")
        except Exception:  # the user sees only what the parent prints
            send(number, "failed", traceback.format_exc(limit=-3))

    with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="slide") as pool:
        try:
            while (message := pipe.recv()) is not None:
                pool.submit(run, *message)
        except (EOFError, OSError):  # the parent has ended
            abandoned.set()
    worker.close()


def _run_band(
    job: BandJob,
    engine: Any,
    device: str,
    report: Callable[[int, int, int], None],
    stopping: Callable[[], bool],
) -> BandResult:
    """Run one band into its journal."""
    plan, counts = job.plan, Counts()
    counts.report = lambda done, total: report(counts.tiles, done, counts.pixels_before)
    options = plan.options
    with open_for_model(plan.path, engine.card, options) as slide:
        damage = Damage(slide)
        view = at_mpp(slide, engine.card.mpp, slide_mpp=options.mpp, force=options.force_upsampling)
        context = RunContext(
            plan, view, engine.card, lambda part: None, damage, counts=counts, stopping=stopping
        )  # the rows are written by the first process
        with open_band(context, job.columns) as band:
            result = band.run(engine)
        blocks = slide.decoded_blocks
    report(counts.tiles, counts.pixels, counts.pixels_before)
    gpu = {} if result.device is None else to_json(result.device)
    record = BandRecord(device, job.columns, counts.tiles, blocks, context.seconds.rounded(), gpu)
    return replace(result, band=record, damaged=tuple((view.level, box) for box in damage.of_level(view.level)))


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent is killed; elsewhere it ends after the strip at work."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _throttled(report: Report) -> Report:
    """Return a function that passes a report on twice a second, not for each batch."""
    last = 0.0

    def throttled(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > REPORT_S:
            last = now
            report(done, total)

    return throttled

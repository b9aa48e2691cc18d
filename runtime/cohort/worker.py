"""Many slides: each is segmented or reported, none twice, and the device is kept busy in between.

::

    SlideJob -> Worker.segment -> Outcome        no error is raised for a slide

A `Worker` is one open engine. It takes two slides at a time: while one is on the device, the next is
opened and read, and the last is completed. An `Executor` gives jobs to workers: to one in this process
(`LocalExecutor`), to several processes (`ProcessPool`), or to a Ray cluster (`RayExecutor`).
"""

from __future__ import annotations

import csv
import gc
import io
import logging
import math
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.cuda.base import DeviceMemoryError
from histostream.runtime.engines.base import Engine
from histostream.runtime.outcome import DAMAGED, DONE, FAILED, LOCKED, NO_TISSUE, NOT_BEGUN, STOPPED, UNCHANGED, Outcome
from histostream.runtime.record import RunRecord, read_run, read_summary, why_nothing
from histostream.runtime.report import REPORT
from histostream.runtime.report.cohort import CohortReport
from histostream.runtime.result import SlideResult
from histostream.runtime.slide_job import SlideJob
from histostream.runtime.slide_run import DoneError, ManyDevices, SlideRun
from histostream.wsi.errors import HistoError, StoppedError, unreadable
from histostream.wsi.files import write_json, write_whole
from histostream.wsi.outputs.lock import LockedError
from histostream.wsi.outputs.sinks.summary import SummaryRecord
from histostream.wsi.slides.sources.base import is_remote
from histostream.wsi.slides.staging import staged

CONCURRENCY = 2  # slides in one worker: one on the device, one before or after it
SAVE_S = 5.0  # between two versions of cohort.csv, at least,
SAVE_TIMES = 20  # and as many times what writing the last one took
log = logging.getLogger(__name__)

Report = Callable[[int, int], None]  # pixels done, pixels in all
Result = TypeVar("Result")


class Executor(Protocol):
    """One or many workers."""

    card: ModelCard
    name: str

    def segment_all(
        self,
        jobs: Sequence[SlideJob],
        *,
        report: Callable[[int], Report],
        stopping: Callable[[], bool],
    ) -> Iterator[tuple[int, Outcome]]:
        """Segment slides; yield (number of the job, outcome) as they are done.

        Parameters
        ----------
        jobs
            The slides.
        report
            Called with the number of a job; returns the function that takes its progress.
        stopping
            If it returns True, no more slides are begun, and those at work stop and keep what is finished.
        """

    def close(self) -> None:
        """Free the devices."""


def pick_worker(held: Sequence[int], waiting: int, concurrency: int) -> int | None:
    """Return the number of the worker that gets the next job; None if none gets one now.

    Parameters
    ----------
    held
        Number of jobs that each worker has.
    waiting
        Number of jobs that no worker has.
    concurrency
        Largest number of jobs of a worker. It gets one ahead only while there is one for each worker.
    """
    if not held or not waiting:
        return None
    fewest = min(held)
    if fewest >= concurrency or (fewest and waiting < len(held)):
        return None
    return held.index(fewest)


class Worker:
    """One open engine, and the thread that it lives in.

    Parameters
    ----------
    open_engine
        Opens the engine, in that thread: a CUDA context belongs to one.

    Raises
    ------
    CardError, EngineError
        What ``open_engine`` raises.

    Attributes
    ----------
    engine
        The engine, for its card and name.
    """

    def __init__(self, open_engine: Callable[[], Engine | ManyDevices]) -> None:
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        try:
            self.engine = self.on_device(open_engine)
        except BaseException:
            self._device.shutdown()
            raise

    def on_device(self, call: Callable[[], Result]) -> Result:
        """Call a function in the engine's thread, when it is free."""
        return self._device.submit(call).result()

    def segment(
        self,
        job: SlideJob,
        report: Report = lambda done, total: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Segment a slide; if memory runs out, continue with smaller batches.

        May be called in several threads at once: they share the device.
        """
        if job.slide.problem:
            return Outcome(FAILED, job.slide.problem)
        clock = time.perf_counter()
        outcome: Outcome | None = None
        run: SlideRun | None = None
        while outcome is None:
            try:
                if job.is_done(self.engine.card):
                    raise DoneError
                stage = job.out / ".stage" if job.stage is None and is_remote(job.slide.source) else job.stage
                with (
                    staged(job.slide.source, stage, stopping=stopping) as path,
                    SlideRun.open(job, self.engine, path, report=report, stopping=stopping) as run,
                ):
                    self._device.submit(run.run).result()
                    outcome = outcome_of(run.finish())
            except Exception as error:  # a bug must not end the other slides either
                batch = (job.options.batch or self.engine_batch) // 2
                if batch < 1 or not isinstance(error, MemoryError | DeviceMemoryError):
                    outcome = _outcome_of_error(job, error)
            if outcome is None:
                run = None  # free its buffers before the next attempt
                gc.collect()
                tiles = f"{batch} tile{'s' if batch > 1 else ''}"
                log.warning("%s: out of memory; continues with %s at once", job.slide.name, tiles)
                job = replace(
                    job,
                    options=replace(job.options, batch=batch),
                    restart=False,
                    skip_done=job.skip_done and not job.restart,
                )
        return replace(outcome, seconds=round(time.perf_counter() - clock, 3))

    @property
    def engine_batch(self) -> int:
        """Tiles per inference where the options do not say."""
        return 1 if isinstance(self.engine, ManyDevices) else self.engine.batch

    def close(self) -> None:
        """Free the device."""
        self.on_device(self.engine.close)
        self._device.shutdown()


class LocalExecutor:
    """One worker in this process.

    Parameters
    ----------
    open_engine
        As for `Worker`.
    concurrency
        Slides that are in memory at the same time; 1 where memory is bounded.
    """

    def __init__(self, open_engine: Callable[[], Engine | ManyDevices], concurrency: int = CONCURRENCY) -> None:
        self._worker = Worker(open_engine)
        self._concurrency = concurrency
        self.card = self._worker.engine.card
        self.name = self._worker.engine.name

    def segment_all(
        self,
        jobs: Sequence[SlideJob],
        *,
        report: Callable[[int], Report],
        stopping: Callable[[], bool],
    ) -> Iterator[tuple[int, Outcome]]:
        """Segment slides; see `Executor`."""
        waiting = list(range(len(jobs)))
        running: dict[Future[Outcome], int] = {}
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="slide") as pool:
            while running or waiting:
                while waiting and len(running) < self._concurrency and not stopping():
                    i = waiting.pop(0)
                    running[pool.submit(self._worker.segment, jobs[i], report(i), stopping)] = i
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()

    def close(self) -> None:
        """Free the device."""
        self._worker.close()


class CohortRecord:
    """Writes ``cohort.csv``, ``cohort.json`` and ``report.html`` while slides are run.

    Leaving the ``with`` block writes them once more.

    Parameters
    ----------
    folder
        Folder of the files.
    jobs
        The slides.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """

    def __init__(self, folder: Path, jobs: Sequence[SlideJob]) -> None:
        self._folder, self._jobs = folder, jobs
        self._outcomes = [Outcome(NOT_BEGUN) for _ in jobs]
        self._started = datetime.now(UTC)
        self._page = CohortReport(folder)
        self._next_save = -math.inf

    def __enter__(self) -> Self:
        return self

    def add(self, number: int, outcome: Outcome) -> None:
        """Note the outcome of a job, and write the files unless they were written a moment ago."""
        self._outcomes[number] = outcome
        if (clock := time.monotonic()) > self._next_save:
            self._save()
            saved = time.monotonic()
            self._next_save = saved + max(SAVE_S, SAVE_TIMES * (saved - clock))

    def __exit__(self, *_: object) -> None:
        for i, (job, outcome) in enumerate(zip(self._jobs, self._outcomes, strict=True)):
            if outcome.status == LOCKED and read_run(job.folder) is not None:  # it may be done by now
                self._outcomes[i] = replace(former_outcome(job.folder), reason="done by another process")
        self._save()

    def _save(self) -> None:
        """Write the files, each completely or not at all."""
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        slides = list(zip(self._jobs, self._outcomes, strict=True))
        lines = [_line(job, outcome) for job, outcome in slides]
        times = {
            "host": socket.gethostname(),
            "started": self._started.isoformat(timespec="seconds"),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        counts = dict(Counter(outcome.status for outcome in self._outcomes))
        write_json(folder / "cohort.json", {**times, "counts": counts, "slides": lines})
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
        write_whole(folder / "cohort.csv", text.getvalue())
        outcomes = [(job.slide.name, outcome) for job, outcome in slides]
        write_whole(folder / REPORT, self._page.text(outcomes, **times))


def outcome_of(result: SlideResult) -> Outcome:
    """Return the outcome of a slide that was run to its end."""
    damaged, run, summary = _damaged_blocks(result.run), result.run, result.summary
    if summary.analysed_mm2 == 0:
        return Outcome(NO_TISSUE, why_nothing(run), run, summary)
    if not damaged:
        return Outcome(DONE, run=run, summary=summary)
    return Outcome(DAMAGED, f"{damaged}, left as background; run.json lists them", run, summary)


def former_outcome(folder: Path) -> Outcome:
    """Return the outcome of a slide whose result another run has left."""
    run, summary = read_run(folder), read_summary(folder)
    if run is not None and summary is not None and summary.analysed_mm2 == 0:
        return Outcome(NO_TISSUE, f"done before; {why_nothing(run)}", run, summary)
    damaged = _damaged_blocks(run)
    had = f", with {damaged}, left as background" if damaged else ""
    return Outcome(UNCHANGED, f"done before{had}; --restart does it again", run, summary)


def _outcome_of_error(job: SlideJob, error: Exception) -> Outcome:
    source = job.source
    match error:
        case DoneError():
            return former_outcome(job.folder)
        case StoppedError():
            return Outcome(STOPPED, "what is finished is kept")
        case LockedError():
            return Outcome(LOCKED, str(error))
        case MemoryError() | DeviceMemoryError():
            detail = f" ({error})" if str(error) else ""
            return Outcome(FAILED, f"{source}: out of memory{detail}; pass --max-memory, or use fewer --threads")
        case HistoError():
            named = source.rstrip("/").rpartition("/")[2] in str(error)
            return Outcome(FAILED, str(error) if named else f"{source}: {error}")
        case OSError():  # of any place where a drive may fail, as a stale handle does
            return Outcome(FAILED, str(unreadable(source, error)))
    return Outcome(FAILED, f"{source}: {''.join(traceback.format_exception(error, limit=-3))}")


def _damaged_blocks(run: RunRecord | None) -> str:
    """Return how many blocks were damaged, in words; nothing if none."""
    count = 0 if run is None else len(run.damaged or ())
    return f"{count} damaged block{'s' if count > 1 else ''}" if count else ""


def _line(job: SlideJob, outcome: Outcome) -> dict[str, Any]:
    """Return one slide's line of the table; areas in mm2."""
    run, summary = outcome.run or RunRecord(), outcome.summary or SummaryRecord()
    line: dict[str, Any] = {
        "path": job.source,
        "name": job.slide.name,
        "status": outcome.status,
        "reason": " ".join("; ".join(text for text in (outcome.reason, job.slide.note) if text).split()),
        "seconds": outcome.seconds,
        "mpx": run.mpx,
        "mpx_per_s": run.mpx_per_s,
        "bound_by": run.bound_by or None,
        "damaged_blocks": None if run.damaged is None else len(run.damaged),
        "sha256": run.slide.sha256 or None,
        "analysed_mm2": summary.analysed_mm2,
    }
    for entry in summary.classes:
        line[f"{entry.name}_mm2"] = entry.area_mm2
    for entry in summary.classes:
        if entry.objects is not None:
            line |= {
                f"{entry.name}_objects": entry.objects,
                f"{entry.name}_objects_per_mm2": entry.objects_per_mm2,
                f"{entry.name}_mean_object_um2": entry.mean_object_um2,
                f"{entry.name}_touching_share": entry.touching_share,
            }
    for name, value in job.slide.further.items():
        line[f"{name} (given)" if name in line else name] = value
    return line

"""Many slides: each segmented or reported, none twice, and the device kept busy in between.

::

    Task -> Worker.segment -> Outcome        a slide in, what became of it out; nothing is raised

A `Worker` is one warm engine. It takes two slides at a time, so that while one is on the device the
next is opened and read, and the last is completed. A `Executor` hands tasks to workers: one in
this process here, several processes in ``fleet``, a Ray cluster in ``ray_crew``.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.cohort.inputs import SlideInput
from histostream.runtime.cuda.base import DeviceMemoryError
from histostream.runtime.engines.base import Engine
from histostream.runtime.options import Options
from histostream.runtime.record import read_json, read_run
from histostream.runtime.report import REPORT
from histostream.runtime.report.cohort import CohortReport, cohort_slide
from histostream.runtime.result import SlideResult
from histostream.runtime.slide_run import DoneError, Job, ManyDevices, SlideRun
from histostream.wsi.errors import HistoError, StoppedError
from histostream.wsi.files import write_json, write_whole
from histostream.wsi.outputs.lock import LockedError, Process
from histostream.wsi.slides.sources.base import is_remote, redact_url
from histostream.wsi.slides.staging import staged

DONE = "done"
DAMAGED = "damaged"  # done, with damaged blocks left as background
UNCHANGED = "unchanged"  # done before, and slide, model and options are the same
LOCKED = "elsewhere"  # another process is at work on it
FAILED = "failed"
STOPPED = "stopped"
NOT_BEGUN = "not begun"
CONCURRENCY = 2  # slides in one worker: one on the device, one before or after it
SAVE_S = 5.0  # between two versions of cohort.csv, at least,
SAVE_TIMES = 20  # and as many times what writing the last one took
log = logging.getLogger(__name__)

Report = Callable[[int, int], None]  # pixels done, pixels in all
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Task:
    """One slide of a cohort, and how it is to be run.

    Attributes
    ----------
    slide
        Where it is, and what its results are called.
    out
        Folder for results.
    options
        How to run.
    asked
        What was asked for beside ``options``, as ``{"precision": "auto"}``.
    stage
        Folder that slides are copied to first; None: local slides are read where they are.
    restart
        Whether it is run though it is done, or was begun.
    gone
        Processes that are known to have ended, and may have been at work on it.
    """

    slide: SlideInput
    out: Path
    options: Options
    asked: Mapping[str, str] = field(default_factory=dict)
    stage: Path | None = None
    restart: bool = False
    gone: tuple[Process, ...] = ()

    @property
    def folder(self) -> Path:
        """Where its results will be."""
        return self.out / self.slide.name


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a slide.

    Attributes
    ----------
    status
        One of the words above.
    reason
        Why, where it is not simply done.
    run, summary
        What run.json and summary.json say; None where there are none.
    seconds
        That it took, all in all.
    """

    status: str
    reason: str = ""
    run: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    seconds: float = 0.0


class Executor(Protocol):
    """One or many workers."""

    card: ModelCard
    name: str

    def segment_all(
        self,
        tasks: Sequence[Task],
        *,
        report: Callable[[int], Report],
        stopping: Callable[[], bool],
    ) -> Iterator[tuple[int, Outcome]]:
        """Segment slides; yields (number of the task, outcome) as they are done.

        Parameters
        ----------
        tasks
            The slides.
        report
            Gives what is told how far a task is.
        stopping
            If it says so, no slide is begun any more, and those that are end with what they have.
        """

    def close(self) -> None:
        """Give the devices back."""


def pick_worker(held: Sequence[int], waiting: int, at_once: int) -> int | None:
    """Decide which worker gets the next job: the idlest.

    Parameters
    ----------
    held
        Jobs that each worker has.
    waiting
        Jobs that nobody has.
    at_once
        Most jobs of a worker; it gets one ahead only while there is one for each worker.

    Returns
    -------
    Its number; None if nobody gets one now.
    """
    if not held or not waiting:
        return None
    fewest = min(held)
    if fewest >= at_once or (fewest and waiting < len(held)):
        return None
    return held.index(fewest)


class Worker:
    """One warm engine, and the thread that it lives in.

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
        """Call something in the engine's thread, when it is free."""
        return self._device.submit(call).result()

    def segment(
        self,
        task: Task,
        report: Report = lambda done, total: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Segment a slide; where memory does not last, go on with smaller batches.

        May be called in several threads at once: they share the device.
        """
        clock = time.perf_counter()
        outcome = self._try(task, report, stopping, restart=task.restart)
        while outcome is None:
            batch = (task.options.batch or self.engine_batch) // 2
            gc.collect()
            log.warning(
                "%s: out of memory; goes on with %d tile%s at once", task.slide.name, batch, "s" if batch > 1 else ""
            )
            task = replace(task, options=replace(task.options, batch=batch))
            outcome = self._try(task, report, stopping, restart=False)
        return replace(outcome, seconds=round(time.perf_counter() - clock, 3))

    @property
    def engine_batch(self) -> int:
        """Tiles per inference where the options do not say."""
        return 1 if isinstance(self.engine, ManyDevices) else self.engine.batch

    def close(self) -> None:
        """Give the device back."""
        self.on_device(self.engine.close)
        self._device.shutdown()

    def _try(self, task: Task, report: Report, stopping: Callable[[], bool], *, restart: bool) -> Outcome | None:
        """Segment a slide; None if memory does not last and a smaller batch may help."""
        try:
            return self._segment(task, report, stopping, restart)
        except DoneError:
            return former_outcome(task.folder)
        except StoppedError:
            return Outcome(STOPPED, "what is finished is kept")
        except LockedError as error:
            return Outcome(LOCKED, str(error))
        except (MemoryError, DeviceMemoryError) as error:
            if (task.options.batch or self.engine_batch) > 1:
                return None
            said = f" ({error})" if str(error) else ""
            return Outcome(
                FAILED,
                f"{redact_url(task.slide.source)}: out of memory{said}; pass --max-memory, or use fewer --threads",
            )
        except HistoError as error:
            return Outcome(FAILED, _naming(redact_url(task.slide.source), str(error)))
        except Exception:  # a fault of ours must not take the other slides along
            return Outcome(FAILED, f"{redact_url(task.slide.source)}: {traceback.format_exc(limit=-3)}")

    def _segment(self, task: Task, report: Report, stopping: Callable[[], bool], restart: bool) -> Outcome:
        slide = task.slide
        job = Job(
            Path(slide.source),
            task.out,
            task.options,
            slide.name,
            slide.source,
            task.asked,
            restart=restart,
            unless_done=not task.restart,
            gone=task.gone,
        )
        if job.unless_done and job.is_done(self.engine.card):
            raise DoneError
        stage = task.stage
        if stage is None and is_remote(slide.source):
            stage = task.out / ".stage"
        with (
            staged(slide.source, stage, stopping=stopping) as path,
            SlideRun(replace(job, path=path), self.engine, report=report, stopping=stopping) as run,
        ):
            run.prepare()
            waiting = time.perf_counter()

            def on_device() -> None:
                run.seconds.wait += time.perf_counter() - waiting
                if stopping():
                    raise StoppedError
                run.run()

            self.on_device(on_device)
            result = run.finish()
        return outcome_of(result)


class LocalExecutor:
    """One worker in this process.

    Parameters
    ----------
    open_engine
        As for `Worker`.
    at_once
        Slides that are in memory together; 1 where memory is bounded.
    """

    def __init__(self, open_engine: Callable[[], Engine | ManyDevices], at_once: int = CONCURRENCY) -> None:
        self._worker = Worker(open_engine)
        self._at_once = at_once
        self.card = self._worker.engine.card
        self.name = self._worker.engine.name

    def segment_all(
        self,
        tasks: Sequence[Task],
        *,
        report: Callable[[int], Report],
        stopping: Callable[[], bool],
    ) -> Iterator[tuple[int, Outcome]]:
        """Segment slides; see `Executor`."""
        waiting = list(range(len(tasks)))
        doing: dict[Future[Outcome], int] = {}
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="slide") as pool:
            while doing or waiting:
                while waiting and len(doing) < self._at_once and not stopping():
                    i = waiting.pop(0)
                    doing[pool.submit(self._worker.segment, tasks[i], report(i), stopping)] = i
                if not doing:
                    return
                done, _ = wait(doing, return_when=FIRST_COMPLETED)
                for future in done:
                    yield doing.pop(future), future.result()

    def close(self) -> None:
        """Give the device back."""
        self._worker.close()


def run_cohort(
    tasks: Sequence[Task],
    crew: Executor,
    *,
    report: Callable[[int], Report] = lambda number: lambda done, total: None,
    stopping: Callable[[], bool] = lambda: False,
    record: Path | None = None,
) -> Iterator[tuple[int, Outcome]]:
    """Segment slides, and keep a record of what became of each.

    Parameters
    ----------
    tasks, crew
        The slides, and who does them.
    report, stopping
        As for `Executor.segment_all`.
    record
        Folder of ``cohort.csv``, ``cohort.json`` and ``report.html``; None: none are kept.

    Yields
    ------
    (number of the task, outcome), each task at most once.

    Raises
    ------
    OutputError
        If the record cannot be written.
    """
    outcomes = [Outcome(NOT_BEGUN) for _ in tasks]
    started = datetime.now(UTC)
    page = None if record is None else CohortReport(record)
    again = -math.inf  # when the record is written next
    try:
        for i, outcome in crew.segment_all(tasks, report=report, stopping=stopping):
            outcomes[i] = outcome
            yield i, outcome
            if record is not None and page is not None and (clock := time.monotonic()) > again:
                _save(record, page, tasks, outcomes, started)
                saved = time.monotonic()
                again = saved + max(SAVE_S, SAVE_TIMES * (saved - clock))
    finally:
        if record is not None and page is not None and tasks:
            _see_elsewhere(tasks, outcomes)
            _save(record, page, tasks, outcomes, started)


def outcome_of(result: SlideResult) -> Outcome:
    """Return what became of a slide that was run to its end."""
    damaged = _damaged_blocks(result.run)
    if not damaged:
        return Outcome(DONE, run=result.run, summary=result.summary)
    reason = f"{damaged}, left as background; run.json lists them"
    return Outcome(DAMAGED, reason, result.run, result.summary)


def former_outcome(folder: Path) -> Outcome:
    """Return what became of a slide that was done by another run."""
    run = read_run(folder)
    summary = read_json(folder / "summary.json")
    damaged = _damaged_blocks(run)
    had = f", with {damaged}, left as background" if damaged else ""
    return Outcome(UNCHANGED, f"done before{had}; --restart does it again", run, summary)


def _damaged_blocks(run: dict[str, Any] | None) -> str:
    """Say how many blocks were damaged; nothing if none."""
    count = len((run or {}).get("damaged", ()))
    return f"{count} damaged block{'s' if count > 1 else ''}" if count else ""


def _see_elsewhere(tasks: Sequence[Task], outcomes: list[Outcome]) -> None:
    """Look again at slides that were in other hands: they may be done by now."""
    for i, (task, outcome) in enumerate(zip(tasks, outcomes, strict=True)):
        if outcome.status == LOCKED and read_run(task.folder) is not None:
            outcomes[i] = replace(former_outcome(task.folder), reason="done by another process")


def _naming(source: str, text: str) -> str:
    """Return a message that names the slide."""
    return text if source.rstrip("/").rpartition("/")[2] in text else f"{source}: {text}"


def _save(
    folder: Path,
    page: CohortReport,
    tasks: Sequence[Task],
    outcomes: Sequence[Outcome],
    started: datetime,
) -> None:
    """Write cohort.json, cohort.csv and report.html, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [_line(task, outcome) for task, outcome in zip(tasks, outcomes, strict=True)]
    when = {
        "host": socket.gethostname(),
        "started": started.isoformat(timespec="seconds"),
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    counts = dict(Counter(outcome.status for outcome in outcomes))
    write_json(folder / "cohort.json", {**when, "counts": counts, "slides": lines})
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    write_whole(folder / "cohort.csv", text.getvalue())
    slides = [
        cohort_slide(task.slide.name, outcome.status, outcome.reason, outcome.run, outcome.summary)
        for task, outcome in zip(tasks, outcomes, strict=True)
    ]
    write_whole(folder / REPORT, page.text(slides, **when))


def _line(task: Task, outcome: Outcome) -> dict[str, Any]:
    """Return one slide's line of the table; areas in mm2."""
    run, summary = outcome.run or {}, outcome.summary or {}
    line: dict[str, Any] = {
        "path": redact_url(task.slide.source),
        "name": task.slide.name,
        "status": outcome.status,
        "reason": " ".join(outcome.reason.split()),
        "seconds": outcome.seconds,
        "mpx": run.get("mpx"),
        "mpx_per_s": run.get("mpx_per_s"),
        "bound_by": run.get("bound_by"),
        "damaged_blocks": len(run["damaged"]) if "damaged" in run else None,
        "sha256": run.get("slide", {}).get("sha256"),
        "analysed_mm2": summary.get("analysed_mm2"),
    }
    for entry in summary.get("classes", ()):
        line[f"{entry['name']}_mm2"] = entry["area_mm2"]
    for name, value in task.slide.further.items():
        line[f"{name} (given)" if name in line else name] = value
    return line

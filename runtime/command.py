"""The work of ``histo-infer``, once its options are parsed."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import click

from histostream.runtime.bundle.card import default_bundle, read_card
from histostream.runtime.choices import AUTO
from histostream.runtime.cohort.inputs import find_inputs
from histostream.runtime.cohort.processes import ProcessPool
from histostream.runtime.cohort.worker import CONCURRENCY, CohortRecord, Executor, LocalExecutor
from histostream.runtime.crf.options import CrfOptions, read_params
from histostream.runtime.crf.params import CrfError
from histostream.runtime.dry_run import not_enough_disk, plan_slides
from histostream.runtime.engines.base import Engine
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.messages import JsonFormatter, JsonMessages, Messages, TextMessages
from histostream.runtime.options import Options
from histostream.runtime.outcome import FAILED, NO_TISSUE, NOT_BEGUN
from histostream.runtime.process_memory import return_buffers_at_once
from histostream.runtime.slide_job import SlideInput, SlideJob
from histostream.wsi.console import show_only_our_warnings
from histostream.wsi.errors import HistoError
from histostream.wsi.option_types import CPU
from histostream.wsi.optional import require
from histostream.wsi.report.figures import rough_duration, size
from histostream.wsi.slides.sources.base import redact_url
from histostream.wsi.tiling.polygons import read_polygons

GPU_BACKENDS = ("cuda", "tensorrt")
MAX_NOTES = 3  # about names of slides; in some cohorts every slide has one


@dataclass(frozen=True, slots=True)
class Request:
    """The options of the command line beside `Options`; see ``histo-infer --help``."""

    slides: tuple[str, ...]
    out: Path
    bundle: Path | None = None
    backend: str = AUTO
    precision: str = AUTO
    devices: tuple[str, ...] = ()
    threads: int | None = None
    crf: bool = False
    crf_params: str | None = None
    crf_uncertain: float | None = None
    restart: bool = False
    stage: Path | None = None
    cluster: str | None = None
    workers: int | None = None
    dry_run: bool = False
    log_json: bool = False

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises
        ------
        HistoError
            Naming the two options.
        """
        if not self.crf and (self.crf_params is not None or self.crf_uncertain is not None):
            raise HistoError("--crf-params and --crf-uncertain have no effect without --crf: add --crf")
        if self.cluster is None and self.workers is not None:
            raise HistoError("--workers has no effect without --ray: add --ray")
        if self.cluster is not None and self.devices:
            raise HistoError(
                "--device and --ray exclude each other, because --ray takes all devices of the cluster: leave one out"
            )
        if CPU in self.devices and self.backend in GPU_BACKENDS:
            raise HistoError(f"--backend {self.backend} needs a GPU: leave --device cpu out, or use --backend cpu")

    def on_device(self) -> Request:
        """Return the request with the backend of its device; a single CPU needs no process of its own."""
        if set(self.devices) != {CPU}:
            return self
        backend = CPU if self.backend == "auto" else self.backend
        return replace(self, backend=backend, devices=self.devices if len(self.devices) > 1 else ())


def run(**options: Any) -> int:
    """Segment the slides; return the exit status.

    ``options`` are fields of `Request` and `Options`; those that are left out have their defaults.
    """
    request = Request(**{entry.name: options.pop(entry.name) for entry in fields(Request) if entry.name in options})
    show_only_our_warnings("histo-infer", JsonFormatter() if request.log_json else None)
    return_buffers_at_once()
    messages: Messages = JsonMessages() if request.log_json else TextMessages()
    try:
        request.check()
    except HistoError as error:
        messages.error(str(error))
        return 2
    try:
        request = request.on_device()
        bundle = request.bundle or default_bundle()
        run_options = Options(threads=request.threads, **options)
        slides = find_inputs(request.slides, request.out)
        _print_notes(slides, messages)
        run_options.check_installed()
        if run_options.roi is not None:
            read_polygons(run_options.roi)  # a file that cannot be used is an error of the call, not of each slide
        if request.crf:
            run_options = replace(run_options, crf=_crf_options(bundle, request))
        jobs = [_job(request, run_options, slide) for slide in slides]
        if request.dry_run:
            return _plan(request, bundle, jobs)
        engine_message: list[str] = []
        executor = _open_executor(request, bundle, run_options, len(jobs), engine_message.append)
        try:
            run_options.for_model(executor.card)
        except HistoError:
            executor.close()
            raise
    except HistoError as error:
        messages.error(str(error))
        return 1
    messages.model(executor.card, "".join(engine_message) or executor.name)
    counts: Counter[str] = Counter()
    damaged = False  # any slide, in this run or the one that made the result
    with _stopped_by_signals(messages) as stop:
        try:
            with messages, _record(request.out, jobs) as record:
                for i, outcome in executor.segment_all(
                    jobs, report=lambda i: messages.progress(jobs[i].slide.name), stopping=stop.requested
                ):
                    counts[outcome.status] += 1
                    damaged = damaged or bool(outcome.run and outcome.run.damaged)
                    messages.slide(jobs[i], outcome)
                    if record is not None:
                        record.add(i, outcome)
        except HistoError as error:
            messages.error(str(error))
            return 1
        finally:
            executor.close()
    counts[NOT_BEGUN] = len(jobs) - counts.total()
    if len(jobs) > 1:
        messages.cohort(counts, request.out / "cohort.csv")
    if stop.signal is not None:
        messages.error("stopped; what is finished is kept, and the same command continues from there")
        return 128 + stop.signal
    return 1 if counts[FAILED] else 3 if damaged else 4 if counts[NO_TISSUE] else 0


def _print_notes(slides: list[SlideInput], messages: Messages) -> None:
    """Print what a user should know about paths and names of slides; ``cohort.csv`` has all of it."""
    notes = [f"{redact_url(slide.source)}: {slide.note}" for slide in slides if slide.note and not slide.problem]
    for note in notes[:MAX_NOTES]:
        messages.error(note)
    if len(notes) > MAX_NOTES:
        messages.error(f"{len(notes) - MAX_NOTES} more slides have such a note; cohort.csv lists them")


def _record(out: Path, jobs: list[SlideJob]) -> AbstractContextManager[CohortRecord | None]:
    """Return the record of a cohort; a single slide has none."""
    return CohortRecord(out, jobs) if len(jobs) > 1 else nullcontext()


def _job(request: Request, options: Options, slide: SlideInput) -> SlideJob:
    """Return the job of one slide; columns of a .csv take precedence over the options."""
    mpp = options.mpp if slide.mpp is None else slide.mpp
    roi = options.roi if slide.roi is None else Path(slide.roi)
    mask = options.mask if slide.mask is None else Path(slide.mask)
    requested = {"backend": request.backend, "precision": request.precision}
    return SlideJob(
        slide, request.out, replace(options, mpp=mpp, roi=roi, mask=mask), requested, request.stage, request.restart
    )


def _crf_options(bundle: Path, request: Request) -> CrfOptions:
    """Read the parameters of the CRF.

    Raises
    ------
    CardError, CrfError
        If there is no card, a parameter is not valid, or numba is not installed.
    """
    require("numba", "--crf needs", "crf", CrfError)
    # numba reads both when it is imported, which is at the first cell.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow down busy machines
    if request.threads is not None:
        os.environ.setdefault("NUMBA_NUM_THREADS", str(request.threads))
    card = read_card(bundle)
    params = read_params(request.crf_params or "", card.crf, mpp=card.mpp)
    return CrfOptions(params, request.crf_uncertain)


def _open_executor(
    request: Request, bundle: Path, options: Options, slides: int, say: Callable[[str], None]
) -> Executor:
    """Open the engine, or several.

    Raises
    ------
    CardError, EngineError, OptionError
        If one cannot be opened, or options contradict each other.
    """
    engine: dict[str, Any] = {"backend": request.backend, "precision": request.precision, "threads": request.threads}
    # Two slides at the same time would take twice the memory that is allowed.
    concurrency = CONCURRENCY if options.max_memory_mib is None else 1
    if request.cluster is not None:
        from histostream.runtime.cohort.ray import RayExecutor

        return RayExecutor(bundle, request.cluster, workers=request.workers, concurrency=concurrency, **engine)
    if not request.devices:
        return LocalExecutor(lambda: open_engine(bundle, say=say, **engine), concurrency)
    if 1 < len(request.devices) <= slides:
        return ProcessPool(bundle, request.devices, concurrency=concurrency, **engine)
    return LocalExecutor(lambda: ProcessPool(bundle, request.devices, **engine), 1)


def _plan(request: Request, bundle: Path, jobs: list[SlideJob]) -> int:
    """Print what a run would do; return the exit status: 1 if a slide has a problem.

    Raises
    ------
    CardError, EngineError
        If the model cannot be run here.
    """
    engine: Engine = open_engine(bundle, backend=request.backend, precision=request.precision, threads=request.threads)
    plans = []
    try:
        for plan in plan_slides(jobs, engine, max(len(request.devices), 1)):
            plans.append(plan)
            click.echo(json.dumps(asdict(plan)) if request.log_json else str(plan))
    finally:
        engine.close()
    problems = sum(bool(plan.problem) for plan in plans)
    full = not_enough_disk(plans, request.out)
    if not request.log_json:
        count = f"{len(plans)} slides" if len(plans) > 1 else "1 slide"
        trouble = f", {problems} with a problem" if problems else ""
        time = rough_duration(sum(plan.seconds for plan in plans))
        click.echo(
            f"{count}{trouble}: about {time} on {engine.name}, "
            f"{size(sum(plan.disk_bytes for plan in plans))}; nothing was written"
        )
    if full:
        raise HistoError(full)
    return 1 if problems else 0


class _Stop:
    """Whether the user wants to stop, and by which signal."""

    def __init__(self, messages: Messages) -> None:
        self.signal: int | None = None
        self._messages = messages

    def requested(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    def take(self, number: int, *_: object) -> None:
        """Handle a signal: the first one requests to stop, the second one ends the process."""
        if self.signal is not None:
            os._exit(128 + number)  # the journal is valid at any time
        self.signal = number
        self._messages.error("finishing the current strip; repeat to stop immediately")


@contextmanager
def _stopped_by_signals(messages: Messages) -> Iterator[_Stop]:
    """Turn Ctrl-C, and the SIGTERM of a scheduler, into a request to stop."""
    stop = _Stop(messages)
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stop
        return
    before = {number: signal.signal(number, stop.take) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

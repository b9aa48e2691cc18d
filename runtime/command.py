"""What ``histo-infer`` does once its options are parsed."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from histostream.runtime.bundle.card import default_bundle, read_card
from histostream.runtime.cohort.inputs import SlideInput, find_inputs
from histostream.runtime.cohort.processes import ProcessPool
from histostream.runtime.cohort.worker import (
    CONCURRENCY,
    FAILED,
    NOT_BEGUN,
    Executor,
    LocalExecutor,
    Task,
    run_cohort,
)
from histostream.runtime.crf.options import CrfOptions, read_params
from histostream.runtime.crf.params import CrfError
from histostream.runtime.dry_run import not_enough_disk, plan_slides, size
from histostream.runtime.engines.base import Engine
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.messages import JsonMessages, Messages, TextMessages, duration
from histostream.runtime.options import Options
from histostream.runtime.stream.memory import return_buffers_at_once
from histostream.wsi.console import show_only_our_warnings
from histostream.wsi.errors import HistoError
from histostream.wsi.optional import require
from histostream.wsi.outputs.sinks import rasters as raster_files
from histostream.wsi.outputs.sinks.objects import check_installed


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line, beside `Options`; see ``histo-infer --help``."""

    slides: tuple[str, ...]
    bundle: Path | None
    out: Path
    backend: str
    precision: str
    devices: tuple[str, ...]
    threads: int | None
    crf: bool
    crf_params: str | None
    crf_uncertain: float | None
    restart: bool
    stage: Path | None
    cluster: str | None
    workers: int | None
    dry_run: bool
    log_json: bool

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises
        ------
        HistoError
            Naming the two options.
        """
        if not self.crf and (self.crf_params is not None or self.crf_uncertain is not None):
            raise HistoError("--crf-params and --crf-uncertain belong to --crf: add it")
        if self.cluster is None and self.workers is not None:
            raise HistoError("--workers belongs to --ray: add it")
        if self.cluster is not None and self.devices:
            raise HistoError("--devices and --ray exclude each other: --ray takes all that it has; leave one out")


def run(request: Request, **options: Any) -> int:
    """Segment the slides; returns the exit status.

    Parameters
    ----------
    request, options
        What was asked for, and arguments of `Options`.
    """
    show_only_our_warnings("histo-infer")
    return_buffers_at_once()
    messages: Messages = JsonMessages() if request.log_json else TextMessages()
    try:
        request.check()
        bundle = request.bundle or default_bundle()
        settings = Options(threads=request.threads, **options)
        inputs = find_inputs(request.slides)
        check_installed(settings.objects, settings.simplify_um)
        raster_files.check_installed(settings.rasters)
        if request.crf:
            settings = replace(settings, crf=_crf_options(bundle, request))
        tasks = [_task(request, settings, slide) for slide in inputs]
        if request.dry_run:
            return _plan(request, bundle, tasks)
        chosen: list[str] = []
        crew = _open_crew(request, bundle, settings, len(tasks), chosen.append)
    except HistoError as error:
        messages.error(str(error))
        return 1
    messages.model(crew.card, "".join(chosen) or crew.name)
    with _stopped_by_signals(messages) as stop:
        try:
            counts, damaged = _run(tasks, crew, request.out, messages, stop.requested)
        except HistoError as error:
            messages.error(str(error))
            return 1
        finally:
            crew.close()
    if len(tasks) > 1:
        messages.cohort(counts, request.out / "cohort.csv")
    if stop.signal is not None:
        messages.error("stopped; what is finished is kept, and the same command goes on from there")
        return 128 + stop.signal
    return 1 if counts[FAILED] else 3 if damaged else 0


def _task(request: Request, settings: Options, slide: SlideInput) -> Task:
    """Return one slide's task: what a .csv says of the slide counts more than the options."""
    mpp = settings.mpp if slide.mpp is None else slide.mpp
    roi = settings.roi if slide.roi is None else Path(slide.roi)
    asked = {"backend": request.backend, "precision": request.precision}
    of_slide = replace(settings, mpp=mpp, roi=roi)
    return Task(slide, request.out, of_slide, asked, request.stage, request.restart)


def _crf_options(bundle: Path, request: Request) -> CrfOptions:
    """Read how the CRF is to be run, before anything is opened.

    Raises
    ------
    CardError, CrfError
        If there is no card, a parameter cannot be, or numba is not installed.
    """
    require("numba", "--crf needs", "crf", CrfError)
    # Both are read when numba is imported, which is at the first cell.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning starves busy machines
    if request.threads is not None:
        os.environ.setdefault("NUMBA_NUM_THREADS", str(request.threads))
    card = read_card(bundle)
    params = read_params(request.crf_params or "", card.crf, mpp=card.mpp)
    return CrfOptions(params, request.crf_uncertain)


def _open_crew(request: Request, bundle: Path, settings: Options, slides: int, say: Callable[[str], None]) -> Executor:
    """Open what the slides are run on.

    Raises
    ------
    CardError, EngineError, OptionError
        If it cannot be opened, or options contradict each other.
    """
    engine: dict[str, Any] = {"backend": request.backend, "precision": request.precision, "threads": request.threads}
    # Two slides at once would take twice the memory that is allowed.
    at_once = CONCURRENCY if settings.max_memory_mib is None else 1
    if request.cluster is not None:
        from histostream.runtime.cohort.ray import RayExecutor

        return RayExecutor(bundle, request.cluster, workers=request.workers, at_once=at_once, **engine)
    if not request.devices:
        return LocalExecutor(lambda: open_engine(bundle, say=say, **engine), at_once)
    if 1 < len(request.devices) <= slides:
        return ProcessPool(bundle, request.devices, at_once=at_once, **engine)
    return LocalExecutor(lambda: ProcessPool(bundle, request.devices, **engine), 1)


def _run(
    tasks: list[Task], crew: Executor, out: Path, messages: Messages, stopping: Callable[[], bool]
) -> tuple[Counter[str], bool]:
    """Segment the slides and say how each went.

    Returns
    -------
    How often each status was, and whether any slide has damaged places.
    """
    counts: Counter[str] = Counter()
    damaged = False  # now or before
    with messages:
        for i, outcome in run_cohort(
            tasks,
            crew,
            report=lambda i: messages.progress(tasks[i].slide.name),
            stopping=stopping,
            record=out if len(tasks) > 1 else None,
        ):
            counts[outcome.status] += 1
            damaged = damaged or bool(outcome.run and outcome.run.get("damaged"))
            messages.slide(tasks[i], outcome)
    counts[NOT_BEGUN] = len(tasks) - counts.total()
    return counts, damaged


def _plan(request: Request, bundle: Path, tasks: list[Task]) -> int:
    """Say what a run would do; returns the exit status: 1 if something stands in its way.

    Raises
    ------
    CardError, EngineError
        If the model cannot be run here.
    """
    engine: Engine = open_engine(bundle, backend=request.backend, precision=request.precision, threads=request.threads)
    plans = []
    try:
        for plan in plan_slides(tasks, engine, max(len(request.devices), 1)):
            plans.append(plan)
            click.echo(json.dumps(asdict(plan)) if request.log_json else str(plan))
    finally:
        engine.close()
    problems = sum(bool(plan.problem) for plan in plans)
    full = not_enough_disk(plans, request.out)
    if not request.log_json:
        count = f"{len(plans)} slides" if len(plans) > 1 else "1 slide"
        trouble = f", {problems} with a problem" if problems else ""
        time = duration(sum(plan.seconds for plan in plans))
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
        """Take a signal: the first asks to stop, the second ends the process."""
        if self.signal is not None:
            os._exit(128 + number)  # the journal bears it
        self.signal = number
        self._messages.error("finishing the strip in hand; once more stops at once")


@contextmanager
def _stopped_by_signals(messages: Messages) -> Iterator[_Stop]:
    """Turn Ctrl-C, and the SIGTERM of a scheduler, into a wish to stop."""
    stop = _Stop(messages)
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # only that one may
        yield stop
        return
    before = {number: signal.signal(number, stop.take) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

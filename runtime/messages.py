"""What ``histo-infer`` says while it runs: lines for people, or JSON for programs.

Results of slides go to stdout; progress, warnings and errors to stderr. With ``--log-json`` each
line is a JSON object, and all of them go to stderr.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.cohort.worker import (
    DAMAGED,
    DONE,
    FAILED,
    LOCKED,
    NOT_BEGUN,
    STOPPED,
    UNCHANGED,
    Outcome,
    Report,
)
from histostream.runtime.slide_job import SlideJob
from histostream.wsi.console import fail
from histostream.wsi.errors import printable
from histostream.wsi.records import to_json

COMMAND = "histo-infer"
PROGRESS_S = 30.0  # between two lines of progress, where there is no terminal


class Messages(Protocol):
    """What is said of a run."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def model(self, card: ModelCard, engine: str) -> None:
        """Say which model runs, and on what."""

    def progress(self, slide: str) -> Report:
        """Return the function that takes a slide's progress: (pixels done, pixels in all)."""

    def slide(self, job: SlideJob, outcome: Outcome) -> None:
        """Say what became of a slide."""

    def cohort(self, counts: Counter[str], record: Path) -> None:
        """Say what became of all slides; ``record`` is the file that lists them."""

    def error(self, message: str) -> None:
        """Say what went wrong, or what happens now."""


class TextMessages:
    """Lines for people, and progress bars in a terminal or lines of progress in a log file."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def model(self, card: ModelCard, engine: str) -> None:
        """See `Messages.model`."""
        self._console.print(
            f"model: {card.method} ({', '.join(c.name for c in card.classes)}) at {card.mpp:g} um/px; {engine}",
            highlight=False,
            markup=False,  # names of classes may have brackets
            emoji=False,
            soft_wrap=True,  # one line, however narrow the terminal
        )

    def progress(self, slide: str) -> Report:
        """See `Messages.progress`; the bar appears with the first report."""
        if not self._console.is_terminal:
            return _every(PROGRESS_S, lambda progress: self.error(f"{printable(slide)}: {progress}"))

        def show(progress: _SlideProgress) -> None:
            if slide not in self._tasks:
                self._tasks[slide] = self._bar.add_task(slide, total=None, rate="")
            rate = f"{progress.mpx_per_s:.2f} Mpx/s" if progress.mpx_per_s else ""
            self._bar.update(self._tasks[slide], completed=progress.done, total=progress.total, rate=rate)

        return _every(0, show)

    def slide(self, job: SlideJob, outcome: Outcome) -> None:
        """See `Messages.slide`."""
        if job.slide.name in self._tasks:
            self._bar.remove_task(self._tasks.pop(job.slide.name))
        name, run, summary = _file_name(job), outcome.run, outcome.summary
        if outcome.status in (DONE, DAMAGED) and run is not None and summary is not None:
            areas = ", ".join(f"{c.name} {c.area_mm2:.3g} mm2 ({100 * (c.share or 0):.1f} %)" for c in summary.classes)
            click.echo(
                f"{name}: {areas}; {run.mpx:.1f} Mpx in {run.seconds.total:.1f} s "
                f"({run.mpx_per_s:.2f} Mpx/s) -> {job.folder}"
            )
        if outcome.status == UNCHANGED:
            click.echo(f"{name}: {outcome.reason} -> {job.folder}")
        elif outcome.status == FAILED:
            self.error(outcome.reason)
        elif outcome.reason:
            self.error(f"{name}: {outcome.reason}")

    def cohort(self, counts: Counter[str], record: Path) -> None:
        """See `Messages.cohort`."""
        total = counts.total()
        if counts[FAILED]:
            self.error(f"{counts[FAILED]} of {total} slides failed")
        listed = ", ".join(f"{n} {word}" for word, n in _by_word(counts).items() if n)
        click.echo(f"{total} slides: {listed} -> {record}")

    def error(self, message: str) -> None:
        """See `Messages.error`."""
        fail(COMMAND, message)


class JsonMessages:
    """One JSON object a line, on stderr: ``time``, ``level``, ``event``, and what belongs to it."""

    def __init__(self) -> None:
        handler = _JsonHandler(self._say)
        handler.addFilter(logging.Filter("histostream"))
        logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def model(self, card: ModelCard, engine: str) -> None:
        """See `Messages.model`."""
        classes = [c.name for c in card.classes]
        self._say("info", "model", method=card.method, classes=classes, mpp=card.mpp, engine=engine)

    def progress(self, slide: str) -> Report:
        """See `Messages.progress`."""

        def show(progress: _SlideProgress) -> None:
            self._say(
                "info",
                "progress",
                slide=slide,
                share=round(progress.share, 4),
                mpx_per_s=round(progress.mpx_per_s, 3),
                seconds_left=progress.seconds_left,
            )

        return _every(PROGRESS_S, show)

    def slide(self, job: SlideJob, outcome: Outcome) -> None:
        """See `Messages.slide`."""
        run, summary = outcome.run, outcome.summary
        self._say(
            "error" if outcome.status == FAILED else "info",
            "slide",
            slide=_file_name(job),
            status=outcome.status,
            message=outcome.reason,
            folder=str(job.folder),
            seconds=outcome.seconds,
            mpx=None if run is None else run.mpx,
            mpx_per_s=None if run is None else run.mpx_per_s,
            classes=None if summary is None else to_json(summary.classes),
        )

    def cohort(self, counts: Counter[str], record: Path) -> None:
        """See `Messages.cohort`."""
        level = "error" if counts[FAILED] else "info"
        self._say(level, "cohort", slides=counts.total(), **_by_word(counts), record=str(record))

    def error(self, message: str) -> None:
        """See `Messages.error`."""
        self._say("error", "message", message=message)

    def _say(self, level: str, event: str, **more: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": level, "event": event, **more}
        click.echo(json.dumps(line, ensure_ascii=True), err=True)


class _JsonHandler(logging.Handler):
    """Writes warnings of the library as JSON too."""

    def __init__(self, say: Callable[..., None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.levelname.lower(), "message", message=record.getMessage())


class _SlideProgress:
    """Progress of one slide; what a former run has done does not count for the rate."""

    def __init__(self, done: int, total: int, before: int, seconds: float) -> None:
        self.done, self.total = done, total
        self.share = done / total if total else 1.0
        self.mpx_per_s = (done - before) / 1e6 / seconds if seconds > 0 else 0.0
        left = (total - done) / 1e6 / self.mpx_per_s if self.mpx_per_s > 0 else None
        self.seconds_left = None if left is None else round(left)

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"{100 * self.share:.0f} %, {self.mpx_per_s:.2f} Mpx/s{left}"


def _every(seconds: float, show: Callable[[_SlideProgress], None]) -> Report:
    """Return a report that shows the progress at most once in so many seconds."""
    start = last = None
    before = 0

    def report(done: int, total: int) -> None:
        nonlocal start, last, before
        now = time.perf_counter()
        if start is None or last is None:
            start, last, before = now, now, done
            if seconds:
                return
        if now - last >= seconds:
            last = now
            show(_SlideProgress(done, total, before, now - start))

    return report


def duration(seconds: float) -> str:
    """Write a time as people read it.

    Examples
    --------
    >>> duration(42), duration(180), duration(7300)
    ('42 s', '3 min', '2.0 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _file_name(job: SlideJob) -> str:
    return printable(job.source.rstrip("/").rpartition("/")[2])


def _by_word(counts: Mapping[str, int]) -> dict[str, int]:
    return {
        "done": counts[DONE] + counts[DAMAGED],
        "unchanged": counts[UNCHANGED],
        "elsewhere": counts[LOCKED],
        "not finished": counts[STOPPED] + counts[NOT_BEGUN],
        "failed": counts[FAILED],
    }

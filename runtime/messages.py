"""Messages of ``histo-infer``: lines for people, or JSON for programs.

Results of slides go to stdout; progress, warnings and errors to stderr. With ``--log-json`` each
line is a JSON object, and all of them go to stderr.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.cohort.worker import Report
from histostream.runtime.outcome import DAMAGED, DONE, FAILED, LOCKED, NO_TISSUE, NOT_BEGUN, STOPPED, UNCHANGED, Outcome
from histostream.runtime.slide_job import SlideJob
from histostream.wsi.console import fail
from histostream.wsi.errors import printable
from histostream.wsi.records import to_json
from histostream.wsi.report.figures import rough_duration

COMMAND = "histo-infer"
_LEVELS = {FAILED: "error", NO_TISSUE: "warning"}  # of statuses, in JSON
PROGRESS_S = 30.0  # between two lines of progress, if stderr is not a terminal


class TextMessages:
    """Lines for people, with progress bars in a terminal, or lines of progress in a log file."""

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
        self._bar_tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def model(self, card: ModelCard, engine: str) -> None:
        """Print the model and the name of the engine that runs it."""
        self._console.print(
            f"model: {card.method} ({', '.join(c.name for c in card.classes)}) at {card.mpp:g} um/px; {engine}",
            highlight=False,
            markup=False,  # names of classes may have brackets
            emoji=False,
            soft_wrap=True,  # one line, also in a narrow terminal
        )
        if reason := card.unblendable:
            self._console.print(f"{reason}: tiles are cropped, not blended", highlight=False, soft_wrap=True)

    def progress(self, slide: str) -> Report:
        """Return the function that takes the progress of a slide: (pixels done, pixels in all)."""
        if not self._console.is_terminal:
            return _report_every(PROGRESS_S, lambda progress: self.error(f"{printable(slide)}: {progress}"))

        def show(progress: _SlideProgress) -> None:
            if slide not in self._bar_tasks:
                self._bar_tasks[slide] = self._bar.add_task(slide, total=None, rate="")
            rate = f"{progress.mpx_per_s:.2f} Mpx/s" if progress.mpx_per_s else ""
            self._bar.update(self._bar_tasks[slide], completed=progress.done, total=progress.total, rate=rate)

        return _report_every(0, show)

    def slide(self, job: SlideJob, outcome: Outcome) -> None:
        """Print the outcome of a slide."""
        if job.slide.name in self._bar_tasks:
            self._bar.remove_task(self._bar_tasks.pop(job.slide.name))
        name, run, summary = _file_name(job), outcome.run, outcome.summary
        if outcome.status in (DONE, DAMAGED) and run is not None and summary is not None:
            areas = ", ".join(
                f"{c.name} {c.area_mm2 or 0:.3g} mm2 ({100 * (c.share or 0):.1f} %)" for c in summary.classes
            )
            counts = "".join(
                f"; {c.objects} objects of {c.name} ({c.objects_per_mm2 or 0:.0f}/mm2)"
                for c in summary.classes
                if c.objects is not None
            )
            click.echo(
                f"{name}: {areas}{counts}; {run.mpx or 0:.1f} Mpx in {run.seconds.total or 0:.1f} s "
                f"({run.mpx_per_s or 0:.2f} Mpx/s) -> {job.folder}"
            )
        if outcome.status == UNCHANGED:
            click.echo(f"{name}: {outcome.reason} -> {job.folder}")
        elif outcome.status == FAILED:
            self.error(outcome.reason)
        elif outcome.reason:
            self.error(f"{name}: {outcome.reason}")

    def cohort(self, counts: Counter[str], record: Path) -> None:
        """Print how many slides have each status; ``record`` is the file that lists the slides."""
        if counts[FAILED]:
            self.error(f"{counts[FAILED]} of {counts.total()} slides failed")
        parts = ", ".join(f"{n} {word}" for word, n in _counts_in_words(counts).items() if n)
        click.echo(f"{counts.total()} slides: {parts} -> {record}")

    def error(self, message: str) -> None:
        """Print an error or a warning."""
        fail(COMMAND, message)


class JsonMessages:
    """The messages of `TextMessages` as JSON objects on stderr, one a line, with a time and a level."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def model(self, card: ModelCard, engine: str) -> None:
        """See `TextMessages.model`."""
        classes = [c.name for c in card.classes]
        self._write("info", "model", method=card.method, classes=classes, mpp=card.mpp, engine=engine)

    def progress(self, slide: str) -> Report:
        """See `TextMessages.progress`."""

        def show(progress: _SlideProgress) -> None:
            self._write(
                "info",
                "progress",
                slide=slide,
                share=round(progress.share, 4),
                mpx_per_s=round(progress.mpx_per_s, 3),
                seconds_left=progress.seconds_left,
            )

        return _report_every(PROGRESS_S, show)

    def slide(self, job: SlideJob, outcome: Outcome) -> None:
        """See `TextMessages.slide`."""
        run, summary = outcome.run, outcome.summary
        self._write(
            _LEVELS.get(outcome.status, "info"),
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
        """See `TextMessages.cohort`."""
        level = "error" if counts[FAILED] else "info"
        self._write(level, "cohort", slides=counts.total(), **_counts_in_words(counts), record=str(record))

    def error(self, message: str) -> None:
        """See `TextMessages.error`."""
        self._write("error", "message", message=message)

    def _write(self, level: str, event: str, **values: Any) -> None:
        click.echo(_json_line(level, event, **values), err=True)


Messages = TextMessages | JsonMessages


class JsonFormatter(logging.Formatter):
    """Formats warnings of the library like `JsonMessages`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a log record as a line of JSON."""
        return _json_line(record.levelname.lower(), "message", message=record.getMessage())


def _json_line(level: str, event: str, **values: Any) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": level, "event": event, **values}, ensure_ascii=True)


@dataclass(frozen=True, slots=True)
class _SlideProgress:
    """Progress of one slide: pixels done, pixels in all, and the rate of this run."""

    done: int
    total: int
    mpx_per_s: float

    @property
    def share(self) -> float:
        return self.done / self.total if self.total else 1.0

    @property
    def seconds_left(self) -> int | None:
        return round((self.total - self.done) / 1e6 / self.mpx_per_s) if self.mpx_per_s > 0 else None

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {rough_duration(self.seconds_left)} left"
        return f"{100 * self.share:.0f} %, {self.mpx_per_s:.2f} Mpx/s{left}"


def _report_every(interval_s: float, show: Callable[[_SlideProgress], None]) -> Report:
    """Return a report that shows the progress at most once in an interval; the first interval is silent."""
    start = last = None
    done_before = 0  # pixels of an earlier run, which do not count for the rate

    def report(done: int, total: int) -> None:
        nonlocal start, last, done_before
        now = time.perf_counter()
        if start is None or last is None:
            start, last, done_before = now, now, done
            if interval_s:
                return
        if now - last >= interval_s:
            last = now
            rate = (done - done_before) / 1e6 / (now - start) if now > start else 0.0
            show(_SlideProgress(done, total, rate))

    return report


def _file_name(job: SlideJob) -> str:
    return printable(job.source.rstrip("/").rpartition("/")[2])


def _counts_in_words(counts: Mapping[str, int]) -> dict[str, int]:
    return {
        "done": counts[DONE] + counts[DAMAGED],
        "without tissue": counts[NO_TISSUE],
        "unchanged": counts[UNCHANGED],
        "elsewhere": counts[LOCKED],
        "not finished": counts[STOPPED] + counts[NOT_BEGUN],
        "failed": counts[FAILED],
    }

"""A run as the terminal shows it: its plan, a progress bar, validations, and how long it will take."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from histostream.training import loop
from histostream.training.plan import Plan
from histostream.wsi.report.figures import rough_duration

MEASURED = (5, 2.0)  # steps, and seconds that they take at least, from which the time is told
MEASURED_S = 20.0  # after which it is told in any case
STOPPED = 130  # exit status, as of a shell


class Watch:
    """Shows a run; its methods are the callbacks of `loop.train`.

    Parameters
    ----------
    source
        The data, as the user named it.
    resume
        Command that continues the run.
    """

    def __init__(self, source: str, resume: str) -> None:
        self._source, self._resume = source, resume
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
        )
        self._bar = Progress(*columns, transient=not sys.stderr.isatty())
        self._pace: _Pace | None = None

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def announce(self, plan: Plan) -> None:
        """Print what the run is going to do."""
        for line in plan.lines(self._source):
            self._print(line)
        self._pace = _Pace(plan)
        self._task = self._bar.add_task("", total=plan.steps, completed=plan.start, losses="")

    def report(self, progress: loop.Progress) -> None:
        """Show a step, and print a validation."""
        pace = self._pace
        assert pace is not None
        pace.add(progress)
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in progress.losses.items())
        self._bar.update(self._task, completed=progress.step, total=progress.steps, losses=losses)
        if text := pace.first_text():
            self._print(text)
        if progress.validation_loss is not None:
            self._print(
                f"step {progress.step}: validation loss {progress.validation_loss:.4f}, "
                f"Dice {progress.validation_dice:.3f}, {progress.seconds:.0f} s{pace.left_text()}"
            )
            if pace.ends(progress):
                self._print(
                    f"ends early: {progress.waited} validations in a row were not better than an earlier one "
                    "(schedule.patience)"
                )

    def answer(self, count: int) -> None:
        """Say at once what a signal does; a second one ends the process, whatever it does."""
        pace = self._pace
        if count > 1:
            self._print(f"stopped at once; to go on from the last checkpoint: {self._resume}")
            self._bar.console.show_cursor(True)
            sys.stdout.flush()
            os._exit(STOPPED)
        after = f"step {pace.step + 1}" if pace and pace.step else "the first step"
        seconds = pace.seconds_of_step() if pace else None
        about = f" (a step takes {rough_duration(seconds)})" if seconds is not None and seconds >= 1 else ""
        since = f" of step {pace.saved}" if pace and pace.saved else ""
        self._print(
            f"stopping: saves {after} when it is done{about}; a second Ctrl-C stops at once and leaves the last "
            f"checkpoint{since}"
            if pace
            else "stopping"
        )

    def _print(self, text: str) -> None:
        self._bar.console.print(text, soft_wrap=True, markup=False, highlight=False)


class _Pace:
    """How long steps and validations take, measured in this process."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.step = self.saved = plan.start
        self._validations, self._validation_seconds = 0, 0.0
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)
        self._told = False

    def add(self, progress: loop.Progress) -> None:
        """Take note of a step; the first one is not measured, for it makes things ready."""
        self.step = progress.step
        spent = time.perf_counter() - self._validation_seconds
        if progress.validation_seconds is not None:
            self._validations += 1
            self._validation_seconds += progress.validation_seconds
            spent -= progress.validation_seconds
            self.saved = progress.step
        self._first = self._first or (progress.step, spent)
        self._last = (progress.step, spent)

    def ends(self, progress: loop.Progress) -> bool:
        """Whether the run ends with this step, before its last one."""
        return 0 < self._plan.patience <= progress.waited and progress.step < progress.steps

    def seconds_of_step(self) -> float | None:
        """Return the mean duration of a step; None before the second one is done."""
        if self._first is None or self._last[0] == self._first[0]:
            return None
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])

    def first_text(self) -> str:
        """Return how long the run will take, once, as soon as that is known; "" before and after."""
        each = self.seconds_of_step()
        if self._told or each is None or self._first is None:
            return ""
        steps, seconds = self._last[0] - self._first[0], self._last[1] - self._first[1]
        if not (seconds >= MEASURED_S or (steps >= MEASURED[0] and seconds >= MEASURED[1])):
            return ""
        self._told = True
        left = self._plan.steps - self.step
        return (
            f"time      {each:.2g} s a step: about {rough_duration(each * left)} for {left} steps, without validations"
        )

    def left_text(self) -> str:
        """Return the time that is left, validations included; "" where it is not known."""
        each, left = self.seconds_of_step(), self._plan.steps - self.step
        if each is None or not left:
            return ""
        mean = self._validation_seconds / max(1, self._validations)
        seconds = each * left + mean * max(0, self._plan.validations - self._validations)
        return f", about {rough_duration(seconds)} left"

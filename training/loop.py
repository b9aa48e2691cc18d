"""The training loop: batches in, checkpoints out; the same for every method.

Each step draws its crops and its dropout from ``(seed, step)``. A stopped run therefore continues
from its checkpoint as if it had not been stopped, bit for bit on the same machine.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from histostream.training import augment, batches, checkpoint, class_weights, preflight
from histostream.training import device as devices
from histostream.training.batches import Batches, Parts
from histostream.training.checkpoint import Checkpoint
from histostream.training.continuation import check_continuation
from histostream.training.data import Classes, DataSet, checksum, class_count
from histostream.training.device import Compute
from histostream.training.events import FOLDER, Events, check_events
from histostream.training.judging import Judge, Validated
from histostream.training.log import Log
from histostream.training.methods import hook
from histostream.training.plan import Plan, machine_text, make_plan
from histostream.training.recipe import Recipe
from histostream.training.report.run import Status, write_report
from histostream.training.schedule import set_rates
from histostream.training.state import Batch, State
from histostream.training.stopping import StopSignals, stop_signals
from histostream.wsi.errors import HistoError

MAX_SHEETS = 40  # of a run whose schedule is in epochs, about
COLORS = ((0, 0, 0), (230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127))


class TrainError(HistoError, RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of a run's log: ``step`` of ``steps`` is done.

    Attributes
    ----------
    losses
        By name, without their weights.
    validation_loss, validation_dice, class_dice
        Of a step with a validation: `Validated`; Dice by the name of each class.
    seconds
        Since the run began, in all processes that had a part in it.
    rates
        Learning rates by the name of the optimiser.
    validation_seconds
        Of a step with a validation: what that took.
    waited
        Number of validations since the best one.
    """

    step: int
    steps: int
    losses: dict[str, float]
    validation_loss: float | None
    validation_dice: float | None
    seconds: float
    rates: dict[str, float] = field(default_factory=dict)
    class_dice: dict[str, float | None] = field(default_factory=dict)
    validation_seconds: float | None = None
    waited: int = 0

    def row(self) -> dict[str, float | None]:
        """Return the values by the names of the log's columns."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            **self.losses,
            **{f"rate_{name}": rate for name, rate in self.rates.items()},
            "validation_loss": self.validation_loss,
            "validation_dice": self.validation_dice,
            **{f"dice_{name}": dice for name, dice in self.class_dice.items()},
        }

    def tags(self) -> dict[str, float | None]:
        """Return the values by the tags of TensorBoard."""
        return {
            **{f"loss/{name}": loss for name, loss in self.losses.items()},
            **{f"learning_rate/{name}": rate for name, rate in self.rates.items()},
            "validation/loss": self.validation_loss,
            "validation/dice": self.validation_dice,
            **{f"validation_dice/{name}": dice for name, dice in self.class_dice.items()},
        }


@dataclass(slots=True)
class _Position:
    """Where a run is.

    Attributes
    ----------
    done
        Steps taken.
    lowest, best, waited
        The lowest value of `_Trainer._rank` so far, its step, and the number of validations since.
    due
        Whether the validation after step ``done`` is still to come: the run was stopped during it.
    seconds
        That the run took before this process.
    """

    done: int = 0
    lowest: float = math.inf
    best: int = 0
    waited: int = 0
    due: bool = False
    seconds: float = 0.0


def train(
    recipe: Recipe,
    method: ModuleType,
    data: DataSet,
    run: Path,
    *,
    compute: Compute | None = None,
    start: Path | None = None,
    tensorboard: bool = False,
    announce: Callable[[Plan], None] = lambda _: None,
    report: Callable[[Progress], None] = lambda _: None,
    answer: Callable[[int], None] = lambda _: None,
    record: dict[str, Any] | None = None,
) -> Checkpoint:
    """Train the run in folder ``run``, or continue it; keep ``last`` and ``best`` checkpoints.

    Ctrl-C (SIGINT) and SIGTERM finish the current step and save it as ``last``. They interrupt a
    validation, which the continued run makes first. A second signal saves nothing more.

    Parameters
    ----------
    recipe, method, data
        What to train, the module of the method, and the data set.
    run
        Folder for ``last/``, ``best/``, ``samples/``, ``log.csv`` and ``report.html``; a run that is in it
        already is continued, also a finished one that gets more steps.
    compute
        Device, precision and the like.
    start
        A run, or a checkpoint, whose weights the networks start from as far as they fit
        (`checkpoint.start_from`); the record lists under ``start`` what did not fit.
    tensorboard
        Write event files for TensorBoard too.
    announce
        Called once, before the first step.
    report
        Called after every step.
    answer
        Called in a thread of its own with the number of signals so far, as soon as one comes.
    record
        Further entries of the training record (versions, command).

    Returns
    -------
    The best checkpoint, whose record holds the scores on the held-out images.

    Raises
    ------
    CheckpointError
        If ``run`` holds a run of another recipe, other data or another start, or nothing of
        ``start`` fits.
    ClassWeightsError
        If the method takes no class weights, or they do not fit the classes.
    DataError
        If the images are too few, have one class only, or a pool is missing.
    ComputeError
        If this machine has no such device or precision.
    OutputError
        If a file cannot be written, or the package for TensorBoard is missing.
    TrainError
        If memory does not suffice, or a loss is not finite.
    KeyboardInterrupt
        If the run was stopped; the same call continues it.
    """
    if tensorboard:
        check_events()
    compute = compute or Compute()
    preflight.check_resolution(data, recipe.mpp)
    data = data.at_mpp(recipe.mpp)
    device = devices.open_device(compute)
    parts = batches.divide(data, recipe.schedule)
    batches.check_pools(parts, hook(method, "pools")(recipe.config), recipe.method)
    preflight.check_run(recipe, method, data, parts)
    trainer = _Trainer(recipe, method, data, parts, run, compute, device, record or {})
    with stop_signals(answer) as stop:
        return trainer.run(start, stop, announce, report, tensorboard=tensorboard)


def to_jsonable(value: Any) -> Any:
    """Return a dataclass as it is after a round trip through JSON."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


class _Trainer:
    """One run: the arguments of `train`, and the networks."""

    def __init__(
        self,
        recipe: Recipe,
        method: ModuleType,
        dataset: DataSet,
        parts: Parts,
        folder: Path,
        compute: Compute,
        device: torch.device,
        record: dict[str, Any],
    ) -> None:
        self._recipe, self._method, self._parts, self._folder = recipe, method, parts, folder
        self._device, self._schedule = device, recipe.schedule
        self._images = len(parts.split.train)
        self._steps = self._schedule.total_steps(self._images)
        self._leads = devices.rank() == 0
        torch.manual_seed(self._schedule.seed)
        self._classes = recipe.classes or dataset.classes or _numbered_classes(class_count(parts.samples))
        self._channels = dataset.channels
        training = [parts.samples[i] for i in parts.split.train]
        self._counted = class_weights.count_pixels(training, len(self._classes))
        self._weights = class_weights.weights_of(recipe.class_weights, self._classes, self._counted)
        with preflight.memory_named(recipe):
            state: State = method.build(recipe.config, len(self._classes), self._channels)
        if self._weights:
            state = dataclasses.replace(state, class_weights=torch.tensor(self._weights, device=device))
        self._state = state
        with preflight.memory_named(recipe):
            devices.prepare(self._state, device, compute)
        self._align_px: int = method.align_px(recipe.config)
        self._judge = Judge(
            method, state, parts, recipe.augmentation, self._classes, align_px=self._align_px, device=device
        )
        self._division = batches.division(dataset, recipe.schedule)
        self._record = {
            "recipe": to_jsonable(recipe),
            "data": dataset.name,
            "data_sha256": checksum(parts.samples),
            "images": {k: len(v) for k, v in dataclasses.asdict(parts.split).items()},
            "pools": {name: len(pool) for name, pool in parts.pools.items()},
            "test_images": [parts.samples[i].name for i in parts.split.test],
            "torch": torch.__version__,
            "machine": _machine(device),
            "precision": compute.precision,
            "processes": devices.processes(),
            **({"class_weights": list(self._weights)} if self._weights else {}),
            **record,
        }

    def run(
        self,
        start: Path | None,
        stop: StopSignals,
        announce: Callable[[Plan], None],
        report: Callable[[Progress], None],
        *,
        tensorboard: bool,
    ) -> Checkpoint:
        """Train, or go on; the arguments are those of `train`."""
        self._at, notes = self._resume(start)
        self._saved = self._at.done, self._at.due
        self._clock = time.perf_counter() - self._at.seconds
        self._plan = self._make_plan(notes)
        announce(self._plan)
        with ExitStack() as opened:
            self._log = opened.enter_context(Log(self._folder / "log.csv", self._at.done, writes=self._leads))
            self._events = None
            if tensorboard and self._leads:
                self._events = opened.enter_context(Events(self._folder / FOLDER, self._at.done))
            try:
                self._judge_what_is_due(stop, report)
                self._take_steps(stop, report)
                if self._leads:
                    with self._interrupting(stop):
                        self._score_best()
            except KeyboardInterrupt:
                self._write_report(Status.STOPPED)
                raise
            self._write_report(Status.FINISHED)
        if devices.processes() > 1:
            dist.barrier()
        return checkpoint.read(self._folder / "best")

    def _interrupting(self, stop: StopSignals) -> AbstractContextManager[None]:
        """Let a signal interrupt what is done inside; not where other processes would wait for this one."""
        return stop.interrupting() if devices.processes() == 1 else nullcontext()

    def _judge_what_is_due(self, stop: StopSignals, report: Callable[[Progress], None]) -> None:
        """Make the validation during which the run was stopped."""
        if not (self._at.due and self._leads):
            return
        with self._interrupting(stop):
            judged = self._validate()
        progress = self._progress({}, judged)
        before = self._log.take_last()
        rates = {name: before[f"rate_{name}"] for name in progress.rates if f"rate_{name}" in before}
        losses = {name: value for name, value in before.items() if name not in progress.row()}
        self._keep(dataclasses.replace(progress, losses=losses, rates=rates), judged, report)

    def _take_steps(self, stop: StopSignals, report: Callable[[Progress], None]) -> None:
        """Take the steps that are left, with validations in between."""
        if self._is_over():
            return
        for batch in self._batches(stop):
            losses = self._step(batch)
            self._at.done = batch.step + 1
            requested = devices.any_process(stop.requested, self._device)
            due = self._schedule.validates(self._at.done, self._images) or self._at.done == self._steps
            self._at.due = due
            judged = None
            if due and self._leads and not requested:
                try:
                    with self._interrupting(stop):
                        judged = self._validate()
                except KeyboardInterrupt:
                    requested = True
            self._keep(self._progress(losses, judged), judged, report, saves=requested)
            if requested:
                raise KeyboardInterrupt
            if due and devices.any_process(self._is_over(), self._device):
                return

    def _is_over(self) -> bool:
        """Whether all steps are taken, or no validation of the last ones was better."""
        patience = self._schedule.patience
        return self._at.done >= self._steps or (patience > 0 and self._at.waited >= patience)

    def _batches(self, stop: StopSignals) -> Iterator[Batch]:
        """Yield the batches of the steps that are left; a signal interrupts the waiting for one."""
        draw = Batches(
            self._parts,
            self._schedule,
            self._recipe.augmentation,
            hook(self._method, "pools")(self._recipe.config),
            align_px=self._align_px,
            rank=devices.rank(),
            processes=devices.processes(),
        )
        drawn = draw(self._at.done, self._steps)
        while True:
            try:
                with self._interrupting(stop):
                    batch = next(drawn, None)
            except KeyboardInterrupt:
                self._save_last()
                raise
            if batch is None:
                return
            yield batch

    def _keep(
        self,
        progress: Progress,
        judged: tuple[Validated, float] | None,
        report: Callable[[Progress], None],
        *,
        saves: bool = False,
    ) -> None:
        """Log a step and, after a validation or where it ``saves``, save it.

        The log comes first: a continued run cuts rows behind its checkpoint, but cannot know what is
        missing.
        """
        self._log.write(progress.row())
        if judged or saves:
            self._log.sync()
            self._save_last()
        if self._events is not None:
            self._events.write(progress.step, progress.tags())
            if judged:
                sheet = self._sheet(progress.step)
                if sheet.is_file():
                    self._events.write_sheet(progress.step, sheet)
                self._events.flush()
        report(progress)
        if judged:
            self._write_report(Status.RUNNING)

    def _progress(self, losses: dict[str, float], judged: tuple[Validated, float] | None) -> Progress:
        validated, seconds = judged or (None, None)
        if not self._parts.split.validation:
            validated = None
        names = [name for name, _ in self._classes]
        dice: tuple[float, ...] = validated.class_dice if validated else ()
        return Progress(
            self._at.done,
            self._steps,
            losses,
            validated.loss if validated else None,
            validated.dice if validated else None,
            time.perf_counter() - self._clock,
            {name: optimizer.param_groups[0]["lr"] for name, optimizer in self._state.optimizers.items()},
            {name: dice[i] if dice else None for i, name in enumerate(names)},
            seconds,
            self._at.waited,
        )

    def _step(self, batch: Batch) -> dict[str, float]:
        set_rates(self._state.optimizers, self._schedule.rate(batch.step, batch.steps))
        torch.manual_seed(hash((self._schedule.seed, batch.step, devices.rank())) & 0x7FFFFFFF)
        try:
            hook(self._method, "before_step")(self._state, self._parts, batch.step, batch.steps)
            tensors = self._method.step(self._state, self._on_device(batch))
            losses = {name: float(loss) for name, loss in tensors.items()}
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            raise TrainError(
                f"out of memory in step {batch.step + 1}: batch={self._schedule.batch}, "
                f"crop_px={self._schedule.crop_px}; set schedule.batch or schedule.crop_px lower"
            ) from error
        if not all(math.isfinite(v) for v in losses.values()):
            raise TrainError(
                f"step {batch.step + 1}: a loss is not finite ({losses}); continue from an "
                "earlier checkpoint with a lower learning rate, or in fp32"
            )
        return losses

    def _on_device(self, batch: Batch) -> Batch:
        """Move a batch to the device, and warp its images there."""

        def warp(images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
            images = images.to(self._device, non_blocking=True)
            moved = torch.zeros_like(images[:, 0]) if labels is None else labels.to(self._device, non_blocking=True)
            return augment.warp(images, moved, self._recipe.augmentation)

        images, labels = warp(batch.images, batch.labels)
        pools = {name: warp(pool, None)[0] for name, pool in batch.pools.items()}
        return dataclasses.replace(batch, images=images, labels=labels, pools=pools)

    def _validate(self) -> tuple[Validated, float]:
        """Validate the networks as they would ship; keep them if they are the best so far.

        Returns
        -------
        The scores, and the seconds that it took.
        """
        began, step = time.perf_counter(), self._at.done
        buffers = [b for module in self._state.modules.values() for b in module.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        try:
            hook(self._method, "settle")(self._state, self._parts)
            validated = self._judge.validate(self._sheet(step) if self._leaves_sheet(step) else None)
            value = self._rank(validated, step)
            if value < self._at.lowest:
                known = validated.loss if self._parts.split.validation else None
                self._save("best", validation_loss=known)
        finally:
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
        if value < self._at.lowest:
            self._at.lowest, self._at.best, self._at.waited = value, step, 0
        elif self._at.best:  # before that, no checkpoint was one that may be best
            self._at.waited += 1
        self._at.due = False
        return validated, time.perf_counter() - began

    def _sheet(self, step: int) -> Path:
        return self._folder / "samples" / f"step-{step:06d}.png"

    def _leaves_sheet(self, step: int) -> bool:
        """Whether to leave a sheet: at every validation; of hundreds of epochs, about `MAX_SHEETS`."""
        schedule = self._schedule
        if schedule.validate_every or not schedule.epochs or step == self._steps:
            return True
        return schedule.epochs_passed(step, self._images) % math.ceil(schedule.epochs / MAX_SHEETS) == 0

    def _rank(self, validated: Validated, step: int) -> float:
        """Return the value of which the best checkpoint has the lowest; inf where this one may not be best."""
        if not hook(self._method, "eligible")(self._recipe.config, step, self._steps):
            return math.inf
        if self._schedule.select == "loss":
            return validated.loss
        if self._schedule.select == "last":
            return -step
        return -(validated.dice if self._schedule.select == "dice" else validated.jaccard)

    def _save_last(self) -> None:
        """Save the newest step, unless that is saved already."""
        at = self._at
        if not self._leads or self._saved == (at.done, at.due):
            return
        self._save(
            "last",
            lowest=at.lowest if math.isfinite(at.lowest) else None,
            best=at.best,
            waited=at.waited,
            due=at.due,
            seconds=time.perf_counter() - self._clock,
        )
        self._saved = at.done, at.due

    def _save(self, name: str, **record: Any) -> None:
        saved = Checkpoint(
            self._recipe.method,
            dataclasses.asdict(self._recipe.config),
            list(self._classes),
            self._channels,
            self._recipe.mpp,
            self._at.done,
            {**self._record, **record},
        )
        checkpoint.save(self._folder / name, saved, self._state, optimizers=name == "last")

    def _resume(self, start: Path | None) -> tuple[_Position, tuple[str, ...]]:
        """Return where to continue from, and what a person should know; a new run takes the weights of ``start``."""
        notes: tuple[str, ...] = ()
        if start is not None:
            taken = checkpoint.start_from(start, self._state, self._recipe.method)
            self._record["start"] = to_jsonable(taken)
            notes = taken.lines(self._recipe.mpp)
        last = self._folder / "last"
        if not (last / "checkpoint.safetensors").exists():
            return _Position(), notes
        before = checkpoint.read(last)
        notes = check_continuation(self._folder, before, self._recipe, self._record, self._method, self._images)
        checkpoint.load(last, self._state)
        record = before.record
        lowest = record["lowest"]
        best = record.get("best")
        if best is None:  # written by an older version
            best = checkpoint.read(self._folder / "best").step if (self._folder / "best").is_dir() else 0
        return _Position(
            before.step,
            math.inf if lowest is None else lowest,
            best,
            record.get("waited", 0),
            record.get("due", False),
            record["seconds"],
        ), notes

    def _make_plan(self, notes: tuple[str, ...]) -> Plan:
        return make_plan(
            self._recipe,
            self._parts,
            self._classes,
            self._state,
            self._counted,
            division=self._division,
            machine=machine_text(self._record, str(self._device)),
            start=self._at.done,
            steps=self._steps,
            weights=self._weights,
            notes=notes,
        )

    def _score_best(self) -> None:
        """Score the best checkpoint on the validation and the test images."""
        best = checkpoint.read(self._folder / "best")
        if "scores" not in best.record:
            checkpoint.load(self._folder / "best", self._state)
            hook(self._method, "finish")(self._state, self._parts)
            scored = dataclasses.replace(best, record={**best.record, "scores": self._judge.scores()})
            checkpoint.save(self._folder / "best", scored, self._state, optimizers=False)

    def _write_report(self, status: Status) -> None:
        if self._leads and self._at.done:
            write_report(
                self._folder,
                status,
                self._plan,
                self._log.columns,
                self._record,
                classes=self._classes,
                best=self._at.best,
                patience=(self._at.waited, self._schedule.patience),
            )


def _numbered_classes(count: int) -> Classes:
    return tuple((f"class {k}", COLORS[k % len(COLORS)]) for k in range(count))


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"

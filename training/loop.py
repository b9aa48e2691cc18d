"""The training loop: batches in, checkpoints out; the same for every method.

Each step draws its crops and its dropout from ``(seed, step)``. A stopped run therefore continues
from its checkpoint as if it had not been stopped, bit for bit on the same machine.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from histostream.training import augment, batches, checkpoint, preflight, preview
from histostream.training import device as devices
from histostream.training.batches import Batches, Parts
from histostream.training.checkpoint import Checkpoint, CheckpointError
from histostream.training.data import Classes, DataSet, checksum, class_count
from histostream.training.device import Compute
from histostream.training.methods import hook
from histostream.training.metrics import Confusion, PerImage
from histostream.training.recipe import Recipe
from histostream.training.schedule import set_rates
from histostream.training.state import Batch, State
from histostream.wsi.errors import HistoError

SHEET_ROWS = 4
MAX_SHEETS = 40  # of a run whose schedule is in epochs, about
COLORS = ((0, 0, 0), (230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127))


class TrainError(HistoError, RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of a run's log: ``step`` of ``steps`` is done."""

    step: int
    steps: int
    losses: dict[str, float]
    validation_loss: float | None
    validation_dice: float | None
    seconds: float


class Validated(NamedTuple):
    """Means over the validation images; Dice is of all classes, Jaccard of all but the first (the ground)."""

    loss: float
    dice: float
    jaccard: float


def train(
    recipe: Recipe,
    method: ModuleType,
    data: DataSet,
    run: Path,
    *,
    compute: Compute | None = None,
    start: Path | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    record: dict[str, Any] | None = None,
) -> Checkpoint:
    """Train the run in folder ``run``, or continue it; keep ``last`` and ``best`` checkpoints.

    Ctrl-C (SIGINT) and SIGTERM finish the current step and save it as ``last``.

    Parameters
    ----------
    recipe, method, data
        What to train, the module of the method, and the data set.
    run
        Folder for ``last/``, ``best/``, ``samples/`` and ``log.csv``; a run that is in it already
        is continued.
    compute
        Device, precision and the like.
    start
        A run, or a checkpoint, whose weights the networks start from as far as they fit
        (`checkpoint.start_from`); the record lists under ``start`` what did not fit.
    report
        Called after every step.
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
    DataError
        If the images are too few, have one class only, or a pool is missing.
    ComputeError
        If this machine has no such device or precision.
    TrainError
        If memory does not suffice, or a loss is not finite.
    KeyboardInterrupt
        If the run was stopped; the same call continues it.
    """
    compute = compute or Compute()
    preflight.check_resolution(data, recipe.mpp)
    data = data.at_mpp(recipe.mpp)
    device = devices.open_device(compute)
    parts = batches.divide(data, recipe.schedule)
    batches.check_pools(parts, hook(method, "pools")(recipe.config), recipe.method)
    preflight.check_run(recipe, method, data, parts)
    return _Trainer(recipe, method, data, parts, run, compute, device, record or {}).run(report, start)


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
        with preflight.memory_named(recipe):
            self._state: State = method.build(recipe.config, len(self._classes), self._channels)
            devices.prepare(self._state, device, compute)
        self._align_px: int = method.align_px(recipe.config)
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
            **record,
        }

    def run(self, report: Callable[[Progress], None], start_run: Path | None) -> Checkpoint:
        start, lowest, seconds = self._resume(start_run)
        clock = time.perf_counter() - seconds
        draw = Batches(
            self._parts,
            self._schedule,
            self._recipe.augmentation,
            hook(self._method, "pools")(self._recipe.config),
            align_px=self._align_px,
            rank=devices.rank(),
            processes=devices.processes(),
        )
        with _Log(self._folder / "log.csv", start, writes=self._leads) as log, _stop_signals() as stopped:
            for batch in draw(start, self._steps):
                losses = self._step(batch)
                done = batch.step + 1
                stop = devices.any_process(stopped.is_set(), self._device)
                is_last = done == self._steps
                validated = None
                if self._leads and (self._schedule.validates(done, self._images) or is_last):
                    validated, lowest = self._validate_and_keep_best(done, lowest)
                if self._leads and (validated or stop):
                    self._save("last", done, lowest=lowest, seconds=time.perf_counter() - clock)
                loss, dice, _ = validated or (None, None, None)
                if not self._parts.split.validation:
                    loss = dice = None
                progress = Progress(done, self._steps, losses, loss, dice, time.perf_counter() - clock)
                log.write(progress)
                report(progress)
                if stop and not is_last:
                    raise KeyboardInterrupt
        if self._leads:
            self._score_best()
        if devices.processes() > 1:
            dist.barrier()
        return checkpoint.read(self._folder / "best")

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

    def _validate_and_keep_best(self, step: int, lowest: float) -> tuple[Validated, float]:
        """Validate the networks as they would ship; return the lowest value of `_rank` so far."""
        buffers = [b for module in self._state.modules.values() for b in module.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        hook(self._method, "settle")(self._state, self._parts)
        validated = self._validate(step)
        if (value := self._rank(validated, step)) < lowest:
            lowest = value
            known = validated.loss if self._parts.split.validation else None
            self._save("best", step, validation_loss=known)
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)
        return validated, lowest

    def _validate(self, step: int) -> Validated:
        """Judge the networks by the validation images; leave a sheet of samples."""
        if not self._parts.split.validation:
            return Validated(math.nan, math.nan, math.nan)  # the last checkpoint counts
        losses, confusion = [], Confusion(len(self._classes))
        rows: list[preview.Row] = []
        for images, labels, truth in self._whole_images(self._parts.split.validation):
            loss, batch_labels = self._method.validate(self._state, images, labels)
            losses.append(loss)
            predicted = _cut(batch_labels, truth)
            confusion.add(predicted, truth)
            if len(rows) < SHEET_ROWS and self._leaves_sheet(step):
                rows.append(self._sheet_row(images, truth, predicted))
        if rows:
            folder = self._folder / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            preview.sheet(rows).save(folder / f"step-{step:06d}.png")
        dice, jaccard = confusion.dice(), confusion.jaccard()[1:]
        if not np.isfinite(jaccard).any():
            jaccard = np.zeros(1)
        return Validated(float(np.mean(losses)), float(np.nanmean(dice)), float(np.nanmean(jaccard)))

    def _leaves_sheet(self, step: int) -> bool:
        """Whether to leave a sheet: at every validation; of hundreds of epochs, about `MAX_SHEETS`."""
        schedule = self._schedule
        if schedule.validate_every or not schedule.epochs or step == self._steps:
            return True
        return schedule.epochs_passed(step, self._images) % math.ceil(schedule.epochs / MAX_SHEETS) == 0

    def _sheet_row(self, images: Tensor, truth: np.ndarray, predicted: np.ndarray) -> preview.Row:
        colors = [color for _, color in self._classes]

        def first(maps: Tensor) -> np.ndarray:
            return np.moveaxis(_cut(maps, truth), 0, -1)

        own = {
            "image": first(images),
            "true": preview.colored(truth, colors),
            "predicted": preview.colored(predicted, colors),
        }
        painted = hook(self._method, "paint")(self._state, images)
        assert not own.keys() & painted.keys(), "a method paints over the sheet's own columns"
        return {**own, **{name: first(maps) for name, maps in painted.items()}}

    def _rank(self, validated: Validated, step: int) -> float:
        """Return the value of which the best checkpoint has the lowest; inf where this one may not be best."""
        if not hook(self._method, "eligible")(self._recipe.config, step, self._steps):
            return math.inf
        if self._schedule.select == "loss":
            return validated.loss
        if self._schedule.select == "last":
            return -step
        return -(validated.dice if self._schedule.select == "dice" else validated.jaccard)

    def _whole_images(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        for images, labels, truth in batches.whole_images(
            self._parts, indices, self._recipe.augmentation, self._align_px
        ):
            yield images.to(self._device), labels.to(self._device), truth

    def _save(self, name: str, step: int, **record: Any) -> None:
        saved = Checkpoint(
            self._recipe.method,
            dataclasses.asdict(self._recipe.config),
            list(self._classes),
            self._channels,
            self._recipe.mpp,
            step,
            {**self._record, **record},
        )
        checkpoint.save(self._folder / name, saved, self._state, optimizers=name == "last")

    def _resume(self, start_run: Path | None) -> tuple[int, float, float]:
        """Return the step to continue from, the lowest value of `_rank` so far, and the seconds.

        A new run takes the weights of ``start_run``.
        """
        if start_run is not None:
            self._record["start"] = to_jsonable(checkpoint.start_from(start_run, self._state))
        last = self._folder / "last"
        if not (last / "checkpoint.safetensors").exists():
            return 0, math.inf, 0.0
        before = checkpoint.read(last)
        if before.record.get("start", {}).get("sha256") != self._record.get("start", {}).get("sha256"):
            raise CheckpointError(
                f"{last}: holds a run that started from other weights; "
                "give --out a new folder, or name what that run started from"
            )
        for name in ("recipe", "data_sha256"):
            if before.record[name] != self._record[name]:
                raise CheckpointError(
                    f"{last}: holds a run with another {name.split('_')[0]}; "
                    "give --out a new folder, or repeat the options of that run"
                )
        checkpoint.load(last, self._state)
        return before.step, before.record["lowest"], before.record["seconds"]

    def _score_best(self) -> None:
        """Score the best checkpoint on the validation and the test images."""
        best = checkpoint.load(self._folder / "best", self._state)
        hook(self._method, "finish")(self._state, self._parts)
        scores = {}
        split = self._parts.split
        for name, indices in (("validation", split.validation), ("test", split.test)):
            counts = PerImage(len(self._classes))
            for images, labels, truth in self._whole_images(indices):
                counts.add(_cut(self._method.validate(self._state, images, labels)[1], truth), truth)
            if indices:
                scores[name] = {
                    "images": len(indices),
                    "pixel_accuracy": counts.reduce(Confusion.accuracy, "pooled"),
                    "f_score": counts.reduce(Confusion.dice, "pooled").tolist(),
                    "dice_per_image": counts.reduce(Confusion.dice, "per_image_mean").tolist(),
                }
        scored = dataclasses.replace(best, record={**best.record, "scores": scores})
        checkpoint.save(self._folder / "best", scored, self._state, optimizers=False)


def _cut(maps: Tensor, truth: np.ndarray) -> np.ndarray:
    """Return the first map (..., H, W) of a batch, without what was mirrored beyond the labels."""
    height, width = truth.shape
    return maps[0, ..., :height, :width].cpu().numpy()


def _numbered_classes(count: int) -> Classes:
    return tuple((f"class {k}", COLORS[k % len(COLORS)]) for k in range(count))


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one stops at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(*_: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Log:
    """Appends progress to a CSV file, whose rows after the checkpoint of a continued run are cut."""

    def __init__(self, path: Path, start: int, *, writes: bool) -> None:
        self._file: TextIO | None = None
        if not writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        if start and path.exists():
            with path.open(newline="") as file:
                rows = [r for r in csv.reader(file) if r[0] == "step" or int(r[0]) <= start]
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerows(rows)
        self._has_header = bool(rows)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, progress: Progress) -> None:
        if not self._file:
            return
        if not self._has_header:
            self._writer.writerow(["step", "seconds", *progress.losses, "validation_loss", "validation_dice"])
            self._has_header = True
        values = (*progress.losses.values(), progress.validation_loss, progress.validation_dice)
        texts = ["" if v is None else f"{v:.6f}" for v in values]
        self._writer.writerow([progress.step, f"{progress.seconds:.1f}", *texts])
        self._file.flush()

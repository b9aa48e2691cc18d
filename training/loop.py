"""The training loop: batches in, checkpoints out; the same for every method.

Each step draws its crops and its dropout from ``(seed, step)``, so a run that was stopped goes on
from its checkpoint as if it never had been, bit for bit on the same machine.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from histostream.training import augment, batches, checkpoint, data
from histostream.training import device as compute
from histostream.training import preview as pictures
from histostream.training.augment import Augmentation
from histostream.training.batches import Batches, Parts
from histostream.training.checkpoint import Checkpoint, CheckpointError
from histostream.training.data import DataSet
from histostream.training.device import Compute
from histostream.training.methods import Batch, State
from histostream.training.metrics import Confusion, PerImage
from histostream.training.schedule import Schedule, set_rates
from histostream.wsi.errors import HistoError

SHEET_ROWS = 4
SHEETS = 40  # of a run whose schedule is in epochs, about
COLORS = ((0, 0, 0), (230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127))


class TrainError(HistoError, RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that defines a training run except the data.

    Attributes
    ----------
    method
        Name of the method.
    config
        The method's own ``Config``.
    mpp
        Resolution to train at, in micrometres per pixel; images of a known, other resolution are
        resized to it first. (Without one, that of the pixels after any zoom.)
    classes
        (name, (r, g, b)) of each class; empty: the data set's own, or named by number.
    """

    method: str
    config: Any
    mpp: float
    schedule: Schedule = field(default_factory=Schedule)
    augmentation: Augmentation = field(default_factory=Augmentation)
    classes: tuple[tuple[str, tuple[int, int, int]], ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of a run's log; ``steps`` is how many there will be."""

    step: int
    steps: int
    losses: dict[str, float]
    validation_loss: float | None
    validation_dice: float | None
    seconds: float


class Validated(NamedTuple):
    """Means over the validation images; of the classes, and of all but the first (the ground)."""

    loss: float
    dice: float
    jaccard: float


def train(
    recipe: Recipe,
    method: ModuleType,
    found: DataSet,
    run: Path,
    *,
    how: Compute | None = None,
    start: Path | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    record: dict[str, Any] | None = None,
) -> Checkpoint:
    """Train, or go on with, the run in folder ``run``; keep ``last`` and ``best`` checkpoints.

    Ctrl-C (SIGINT) and SIGTERM finish the step in hand and save it as ``last``.

    Parameters
    ----------
    recipe, method, found
        What to train, the module of the method, and the data set.
    run
        Folder for ``last/``, ``best/``, ``samples/`` and ``log.csv``; a run that is in it already
        goes on.
    how
        Device, precision and the like.
    start
        A run, or a checkpoint, whose weights the networks start from as far as they fit
        (`checkpoint.start_from`); what did not fit is in the record, as ``start``.
    report
        Called after every step.
    record
        MemoryNeeds entries of the training record (versions, command).

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
        If this machine cannot compute as asked.
    TrainError
        If memory does not last, or a loss is no number any more.
    KeyboardInterrupt
        If the run was stopped; the same call goes on with it.
    """
    how = how or Compute()
    found = found.at_mpp(recipe.mpp)
    device = compute.open_device(how)
    parts = batches.divide(found, recipe.schedule)
    batches.check_pools(parts, method.pools(recipe.config), recipe.method)
    trainer = _Trainer(recipe, method, found, parts, run, how, device, record or {})
    return trainer.run(report, start)


def plain(value: Any) -> Any:
    """Turn a dataclass into plain values that JSON keeps as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


class _Trainer:
    """One run: what `train` was given, and the networks."""

    def __init__(
        self,
        recipe: Recipe,
        method: ModuleType,
        found: DataSet,
        parts: Parts,
        folder: Path,
        how: Compute,
        device: torch.device,
        record: dict[str, Any],
    ) -> None:
        self._recipe, self._method, self._parts, self._folder = recipe, method, parts, folder
        self._device, self._schedule = device, recipe.schedule
        self._images = len(parts.split.train)
        self._steps = self._schedule.total_steps(self._images)
        torch.manual_seed(self._schedule.seed)
        self._classes = recipe.classes or found.classes or _numbered(data.class_count(parts.samples))
        self._channels = found.channels
        self._state: State = method.build(recipe.config, len(self._classes), self._channels)
        compute.prepare(self._state, device, how)
        self._align_px: int = method.align_px(recipe.config)
        self._base = {
            "recipe": plain(recipe),
            "data": found.name,
            "data_sha256": data.checksum(parts.samples),
            "images": {k: len(v) for k, v in dataclasses.asdict(parts.split).items()},
            "pools": {name: len(pool) for name, pool in parts.pools.items()},
            "test_images": [parts.samples[i].name for i in parts.split.test],
            "torch": torch.__version__,
            "machine": _machine(device),
            "precision": how.precision,
            "processes": compute.processes(),
            **record,
        }

    def run(self, report: Callable[[Progress], None], given: Path | None) -> Checkpoint:
        start, best, seconds = self._resume(given)
        clock = time.perf_counter() - seconds
        draw = Batches(
            self._parts,
            self._schedule,
            self._recipe.augmentation,
            self._method.pools(self._recipe.config),
            align_px=self._align_px,
            rank=compute.rank(),
            processes=compute.processes(),
        )
        lead = compute.rank() == 0
        with _log(self._folder / "log.csv", start, lead) as log, _stop_signals() as stopped:
            for batch in draw(start, self._steps):
                losses = self._step(batch)
                done = batch.step + 1
                stop = compute.any_process(stopped.is_set(), self._device)
                validated = None
                last_step = done == self._steps
                if lead and (self._schedule.validates(done, self._images) or last_step):
                    with self._settled():
                        validated = self._validate(done)
                        if (value := self._rank(validated, done)) < best:
                            best = value
                            known = validated.loss if self._parts.split.validation else None
                            self._save("best", done, validation_loss=known)
                if lead and (validated or stop):
                    seconds = time.perf_counter() - clock
                    self._save("last", done, lowest=best, seconds=seconds)
                seconds = time.perf_counter() - clock
                loss, dice, _ = validated or (None, None, None)
                if not self._parts.split.validation:
                    loss = dice = None
                progress = Progress(done, self._steps, losses, loss, dice, seconds)
                log(progress)
                report(progress)
                if stop and not last_step:
                    raise KeyboardInterrupt
        if lead:
            self._score_best()
        if compute.processes() > 1:
            dist.barrier()
        return checkpoint.read(self._folder / "best")

    def _step(self, batch: Batch) -> dict[str, float]:
        set_rates(self._state.optimizers, self._schedule.rate(batch.step, batch.steps))
        torch.manual_seed(hash((self._schedule.seed, batch.step, compute.rank())) & 0x7FFFFFFF)
        try:
            self._method.before_step(self._state, self._parts, batch.step, batch.steps)
            losses = self._method.step(self._state, self._on_device(batch))
            said = {name: float(loss) for name, loss in losses.items()}
        except RuntimeError as error:
            if not compute.is_out_of_memory(error):
                raise
            raise TrainError(
                f"out of memory in step {batch.step + 1}: batch={self._schedule.batch}, "
                f"crop_px={self._schedule.crop_px}; set schedule.batch or schedule.crop_px lower"
            ) from error
        if not all(math.isfinite(v) for v in said.values()):
            raise TrainError(
                f"step {batch.step + 1}: a loss is no number any more ({said}); go on from an "
                "earlier checkpoint with a lower learning rate, or in fp32"
            )
        return said

    def _on_device(self, batch: Batch) -> Batch:
        images, labels = augment.warp(
            batch.images.to(self._device, non_blocking=True),
            batch.labels.to(self._device, non_blocking=True),
            self._recipe.augmentation,
        )
        pools = {}
        for name, pool in batch.pools.items():
            there = pool.to(self._device, non_blocking=True)
            nothing = torch.zeros_like(there[:, 0])
            pools[name] = augment.warp(there, nothing, self._recipe.augmentation)[0]
        return dataclasses.replace(batch, images=images, labels=labels, pools=pools)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Hold the networks as they would ship; then put back what training goes on with."""
        settle = getattr(self._method, "settle", None)
        if settle is None:
            yield
            return
        buffers = [b for module in self._state.modules.values() for b in module.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        settle(self._state, self._parts)
        yield
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)

    def _validate(self, step: int) -> Validated:
        """Judge the networks by the validation images; leave a sheet of samples."""
        if not self._parts.split.validation:
            return Validated(math.nan, math.nan, math.nan)  # the last checkpoint counts
        losses, confusion = [], Confusion(len(self._classes))
        rows: list[pictures.Pictures] = []
        for images, labels, truth in self._whole(self._parts.split.validation):
            loss, predicted = self._method.validate(self._state, images, labels)
            losses.append(loss)
            here = predicted[0, : truth.shape[0], : truth.shape[1]].cpu().numpy()
            confusion.add(here, truth)
            if len(rows) < SHEET_ROWS and self._leaves_sheet(step):
                rows.append(self._row(images, truth, here))
        if rows:
            folder = self._folder / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            pictures.sheet(rows).save(folder / f"step-{step:06d}.png")
        dice, jaccard = confusion.dice(), confusion.jaccard()
        things = jaccard[1:] if np.isfinite(jaccard[1:]).any() else np.zeros(1)
        return Validated(float(np.mean(losses)), float(np.nanmean(dice)), float(np.nanmean(things)))

    def _leaves_sheet(self, step: int) -> bool:
        """Whether to leave a sheet: at every validation; of hundreds of epochs, `SHEETS` or so."""
        schedule = self._schedule
        if schedule.validate_every or not schedule.epochs or step == self._steps:
            return True
        passed = schedule.epochs_passed(step, self._images)
        return passed % math.ceil(schedule.epochs / SHEETS) == 0

    def _row(self, images: Tensor, truth: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
        colors = [color for _, color in self._classes]
        painted = self._method.paint(self._state, images)
        height, width = truth.shape
        more = {name: picture[0, :, :height, :width].movedim(0, -1).cpu().numpy() for name, picture in painted.items()}
        row = {
            "image": images[0, :, :height, :width].movedim(0, -1).cpu().numpy(),
            "true": pictures.colored(truth, colors),
            "predicted": pictures.colored(predicted, colors),
        }
        assert not row.keys() & more.keys(), "a method paints over the sheet's own columns"
        return {**row, **more}

    def _rank(self, validated: Validated, step: int) -> float:
        """Return what the best checkpoint has the lowest of; inf where it may not be this one."""
        eligible = getattr(self._method, "eligible", None)
        if eligible is not None and not eligible(self._recipe.config, step, self._steps):
            return math.inf
        select = self._schedule.select
        if select == "loss":
            return validated.loss
        if select == "last":
            return -step
        return -(validated.dice if select == "dice" else validated.jaccard)

    def _whole(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        for images, labels, truth in batches.whole_images(
            self._parts, indices, self._recipe.augmentation, self._align_px
        ):
            yield images.to(self._device), labels.to(self._device), truth

    def _save(self, name: str, step: int, **more: Any) -> None:
        said = Checkpoint(
            self._recipe.method,
            dataclasses.asdict(self._recipe.config),
            list(self._classes),
            self._channels,
            self._recipe.mpp,
            step,
            {**self._base, **more},
        )
        checkpoint.save(self._folder / name, said, self._state, optimizers=name == "last")

    def _resume(self, start: Path | None) -> tuple[int, float, float]:
        """Return the step to go on from, the best validation value so far, and the seconds.

        Where the run begins, it does with the weights of ``start``.
        """
        if start is not None:
            self._base["start"] = plain(checkpoint.start_from(start, self._state))
        last = self._folder / "last"
        if not (last / "checkpoint.safetensors").exists():
            return 0, math.inf, 0.0
        before = checkpoint.read(last)
        if before.record.get("start", {}).get("sha256") != self._base.get("start", {}).get("sha256"):
            raise CheckpointError(
                f"{last}: holds a run that started from other weights; "
                "give --out a new folder, or name what that run started from"
            )
        for name in ("recipe", "data_sha256"):
            if before.record[name] != self._base[name]:
                raise CheckpointError(
                    f"{last}: holds a run with another {name.split('_')[0]}; "
                    "give --out a new folder, or repeat the options of that run"
                )
        checkpoint.load(last, self._state)
        return before.step, before.record["lowest"], before.record["seconds"]

    def _score_best(self) -> None:
        """Score the best checkpoint on the validation and the test images."""
        best = checkpoint.load(self._folder / "best", self._state)
        self._method.finish(self._state, self._parts)
        scores = {}
        for name, indices in (
            ("validation", self._parts.split.validation),
            ("test", self._parts.split.test),
        ):
            found = PerImage(len(self._classes))
            for images, labels, truth in self._whole(indices):
                predicted = self._method.validate(self._state, images, labels)[1]
                found.add(predicted[0, : truth.shape[0], : truth.shape[1]].cpu().numpy(), truth)
            if indices:
                scores[name] = {
                    "images": len(indices),
                    "pixel_accuracy": found.reduce(Confusion.accuracy, "pooled"),
                    "f_score": found.reduce(Confusion.dice, "pooled").tolist(),
                    "dice_per_image": found.reduce(Confusion.dice, "per_image_mean").tolist(),
                }
        scored = dataclasses.replace(best, record={**best.record, "scores": scores})
        checkpoint.save(self._folder / "best", scored, self._state, optimizers=False)


def _numbered(count: int) -> tuple[tuple[str, tuple[int, int, int]], ...]:
    return tuple((f"class {k}", COLORS[k % len(COLORS)]) for k in range(count))


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _log:
    """Append progress to a CSV file; rows after the checkpoint that a run goes on from are cut."""

    def __init__(self, path: Path, start: int, lead: bool) -> None:
        self._writer: Any = None
        if not lead:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if start and path.exists():
            with path.open(newline="") as file:
                kept = [r for r in csv.reader(file) if r[0] == "step" or int(r[0]) <= start]
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerows(kept)
        self._header = bool(kept)

    def __enter__(self) -> Callable[[Progress], None]:
        return self._write

    def __exit__(self, *_: object) -> None:
        if self._writer:
            self._file.close()

    def _write(self, progress: Progress) -> None:
        if not self._writer:
            return
        if not self._header:
            names = ("validation_loss", "validation_dice")
            self._writer.writerow(["step", "seconds", *progress.losses, *names])
            self._header = True
        values = [f"{v:.6f}" for v in progress.losses.values()]
        validated = (progress.validation_loss, progress.validation_dice)
        said = ["" if v is None else f"{v:.6f}" for v in validated]
        self._writer.writerow([progress.step, f"{progress.seconds:.1f}", *values, *said])
        self._file.flush()

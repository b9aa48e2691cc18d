"""The training loop: crops in, checkpoints out; the same for every method.

Each step draws its crops and its dropout from ``(seed, step)``, so a run that was stopped goes on
from its checkpoint as if it never had been, bit for bit on the same machine.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from histostream.training import augment, checkpoint, data
from histostream.training.augment import Augmentation
from histostream.training.checkpoint import Checkpoint, CheckpointError
from histostream.training.data import Sample, Split
from histostream.training.metrics import Confusion

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and on what to train.

    Attributes
    ----------
    steps
        Optimiser steps in all.
    batch, crop_px
        Crops a step, and their side; a multiple of what the network takes.
    seed
        Source of all randomness: split, initial weights, crops, dropout.
    validate_every
        Steps between validations; the checkpoint with the lowest validation loss is kept.
    validation, test
        Shares of the images held back for choosing the checkpoint, and for the final score.
    warmup
        Steps over which the learning rate rises linearly.
    decay
        "none", or "cosine": down to zero at the last step.
    """

    steps: int = 40_000
    batch: int = 1
    crop_px: int = 512
    seed: int = 0
    validate_every: int = 500
    validation: float = 0.2
    test: float = 0.0
    warmup: int = 0
    decay: str = "none"

    def __post_init__(self) -> None:
        if self.decay not in ("none", "cosine"):
            raise ValueError(f"decay={self.decay!r}: use 'none' or 'cosine'")
        if min(self.steps, self.batch, self.crop_px, self.validate_every) < 1:
            raise ValueError("steps, batch, crop_px and validate_every must be at least 1")


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
        Resolution of the training pixels (after any zoom), in micrometres per pixel.
    classes
        (name, (r, g, b)) of each class; empty: named by number.
    """

    method: str
    config: Any
    mpp: float
    schedule: Schedule = field(default_factory=Schedule)
    augmentation: Augmentation = field(default_factory=Augmentation)
    classes: tuple[tuple[str, tuple[int, int, int]], ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of a run's log."""

    step: int
    losses: dict[str, float]
    validation_loss: float | None
    seconds: float


def train(
    recipe: Recipe,
    method: ModuleType,
    samples: list[Sample],
    run: Path,
    *,
    report: Callable[[Progress], None] = lambda _: None,
    record: dict[str, Any] | None = None,
) -> Checkpoint:
    """Train, or go on with, the run in folder ``run``; keep ``last`` and ``best`` checkpoints.

    Parameters
    ----------
    recipe, method, samples
        What to train, the module of the method, and the annotated images.
    run
        Folder for ``last/``, ``best/`` and ``log.csv``; a run that is in it already goes on.
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
        If ``run`` holds a run of another recipe or other data.
    DataError
        If the images are too few or have one class only.
    """
    schedule = recipe.schedule
    parts = data.split(
        len(samples), validation=schedule.validation, test=schedule.test, seed=schedule.seed
    )
    torch.manual_seed(schedule.seed)
    classes = recipe.classes or _numbered(data.class_count(samples))
    state = method.build(recipe.config, len(classes), samples[0].image.shape[2])
    base = {
        "recipe": plain(recipe),
        "data_sha256": data.checksum(samples),
        "images": {k: len(v) for k, v in dataclasses.asdict(parts).items()},
        "test_images": [samples[i].name for i in parts.test],
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        **(record or {}),
    }

    def at(step: int, **more: Any) -> Checkpoint:
        return Checkpoint(
            recipe.method, dataclasses.asdict(recipe.config), list(classes),
            samples[0].image.shape[2], recipe.mpp, step, {**base, **more},
        )  # fmt: skip

    start, lowest, seconds = _resume(run / "last", state, base)
    clock = time.perf_counter() - seconds
    held_back = _whole_images(samples, parts.validation, recipe)
    with _log(run / "log.csv", start) as log:
        for step, (images, labels) in _batches(samples, parts, recipe, start):
            _set_rates(state, recipe.config, schedule, step)
            torch.manual_seed(hash((schedule.seed, step)) & 0x7FFFFFFF)
            losses = method.step(state, images, labels)
            done = step + 1
            loss = None
            if done % schedule.validate_every == 0 or done == schedule.steps:
                loss = float(np.mean([method.validate(state, *pair)[0] for pair in held_back]))
                if loss < lowest:
                    lowest = loss
                    checkpoint.save(
                        run / "best", at(done, validation_loss=loss), state, optimizers=False
                    )
                seconds = time.perf_counter() - clock
                checkpoint.save(
                    run / "last", at(done, lowest_validation_loss=lowest, seconds=seconds), state
                )
            progress = Progress(done, losses, loss, time.perf_counter() - clock)
            log(progress)
            report(progress)
    return _score_best(run, state, method, samples, parts, recipe)


def plain(value: Any) -> Any:
    """Turn a dataclass into plain values that JSON keeps as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def _numbered(count: int) -> tuple[tuple[str, tuple[int, int, int]], ...]:
    colors = ((0, 0, 0), (230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127))
    return tuple((f"class {k}", colors[k % len(colors)]) for k in range(count))


def _resume(last: Path, state: Any, base: dict[str, Any]) -> tuple[int, float, float]:
    if not (last / "checkpoint.safetensors").exists():
        return 0, math.inf, 0.0
    before = checkpoint.load(last, state)
    for name in ("recipe", "data_sha256"):
        if before.record[name] != base[name]:
            raise CheckpointError(
                f"{last}: holds a run with another {name.split('_')[0]}; "
                "give --out a new folder, or repeat the options of that run"
            )
    return before.step, before.record["lowest_validation_loss"], before.record["seconds"]


def _batches(
    samples: list[Sample], parts: Split, recipe: Recipe, start: int
) -> Iterator[tuple[int, Pair]]:
    """Yield (step, (images (N, C, H, W) uint8, labels (N, H, W) int64)), one prepared ahead."""
    typical = typical_object_px(samples)
    schedule = recipe.schedule

    def make(step: int) -> Pair:
        rng = np.random.default_rng((schedule.seed, step))
        chosen = rng.choice(parts.train, schedule.batch)
        crops = [
            augment.draw_crop(samples[i], schedule.crop_px, recipe.augmentation, typical, rng)
            for i in chosen
        ]
        return _tensors(np.stack([c[0] for c in crops]), np.stack([c[1] for c in crops]))

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(make, start)
        for step in range(start, schedule.steps):
            batch = coming.result()
            if step + 1 < schedule.steps:
                coming = ahead.submit(make, step + 1)
            yield step, batch


def typical_object_px(samples: list[Sample]) -> float:
    """Median over images of their median object diameter, in pixels; nan without objects."""
    known = [s.object_px for s in samples if not np.isnan(s.object_px)]
    return float(np.median(known)) if known else float("nan")


def _whole_images(samples: list[Sample], indices: tuple[int, ...], recipe: Recipe) -> list[Pair]:
    """Return whole images at the training resolution, mirrored up to multiples of 16."""
    typical = typical_object_px(samples)
    pairs = []
    for i in indices:
        factor = augment.object_zoom(samples[i], recipe.augmentation, typical)
        image, labels = augment.zoom(samples[i].image, samples[i].labels, factor)
        pad = [(0, -n % 16) for n in labels.shape]
        pairs.append(
            _tensors(
                np.pad(image, [*pad, (0, 0)], mode="reflect")[None],
                np.pad(labels, pad, mode="reflect")[None],
            )
        )
    return pairs


def _tensors(images: Any, labels: Any) -> Pair:
    nchw = np.ascontiguousarray(np.moveaxis(images, -1, 1))
    return torch.from_numpy(nchw), torch.from_numpy(labels.astype(np.int64))


def _set_rates(state: Any, config: Any, schedule: Schedule, step: int) -> None:
    factor = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    if schedule.decay == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
    for name, optimizer in state.optimizers.items():
        prefix = "" if name == "generator" else f"{name}_"
        for group in optimizer.param_groups:
            group["lr"] = getattr(config, f"{prefix}learning_rate") * factor


def _score_best(
    run: Path,
    state: Any,
    method: ModuleType,
    samples: list[Sample],
    parts: Split,
    recipe: Recipe,
) -> Checkpoint:
    """Score the best checkpoint on the test images (or, without any, the validation images)."""
    best = checkpoint.load(run / "best", state)
    scores = {}
    for name, indices in (("validation", parts.validation), ("test", parts.test)):
        confusion = Confusion(len(best.classes))
        per_image = []
        for images, labels in _whole_images(samples, indices, recipe):
            one = Confusion(len(best.classes))
            one.add(method.validate(state, images, labels)[1].numpy(), labels.numpy())
            confusion.counts += one.counts
            per_image.append(one.dice())
        if indices:
            scores[name] = {
                "images": len(indices),
                "pixel_accuracy": confusion.accuracy(),
                "f_score": confusion.dice().tolist(),
                "dice_per_image": np.nanmean(per_image, axis=0).tolist(),
            }
    scored = dataclasses.replace(best, record={**best.record, "scores": scores})
    checkpoint.save(run / "best", scored, state, optimizers=False)
    return scored


class _log:
    """Append progress to a CSV file; rows after the checkpoint that a run goes on from are cut."""

    def __init__(self, path: Path, start: int) -> None:
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
        self._file.close()

    def _write(self, progress: Progress) -> None:
        if not self._header:
            self._writer.writerow(["step", "seconds", *progress.losses, "validation"])
            self._header = True
        loss = "" if progress.validation_loss is None else f"{progress.validation_loss:.6f}"
        values = [f"{v:.6f}" for v in progress.losses.values()]
        self._writer.writerow([progress.step, f"{progress.seconds:.1f}", *values, loss])
        self._file.flush()

"""From a data set to the batches of each step; crops are drawn ahead, in threads."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histostream.training import augment, splits
from histostream.training.augment import Augmentation
from histostream.training.data import DataError, DataSet, Picture, Sample, StoredSample
from histostream.training.schedule import Schedule
from histostream.training.splits import Split
from histostream.training.state import Batch

Crop = tuple[NDArray[np.uint8], NDArray[np.uint8]]
UNLABELLED = "unlabelled"  # pool that images join whose labels are left out
AHEAD = 2  # batches that are drawn while one trains
EPOCHS = 0x45504F43  # keeps the seeds of the passes apart from those of steps and crops


@dataclass(frozen=True, slots=True)
class Parts:
    """The labelled images of a data set, and which of them train, choose and score.

    Attributes
    ----------
    samples, split
        All labelled images, and the indices of each part.
    pools
        Images without labels, by name.
    """

    samples: tuple[Sample, ...]
    split: Split
    pools: Mapping[str, Sequence[Picture]]


def divide(data: DataSet, schedule: Schedule) -> Parts:
    """Divide a data set into training, validation and test images by a schedule.

    With ``schedule.folds`` or ``schedule.test`` all images are divided at random. Otherwise the
    official test part is the test part, and an official validation part is kept. With
    ``schedule.validation=0`` and ``schedule.select="last"`` no other image is held back. With
    ``schedule.labelled`` below 1, some training images lose their labels to the pool "unlabelled".

    Raises
    ------
    DataError
        If a part would be empty.
    """
    parts = _divide(data, schedule)
    return parts if schedule.labelled == 1 else _with_fewer_labels(parts, schedule)


def parts_of(data: DataSet, schedule: Schedule | None = None) -> dict[str, tuple[Sample, ...]]:
    """Return the "train", "validation" and "test" images of a data set.

    They are the official parts, or those of a run with ``schedule``.

    Raises
    ------
    DataError
        If a part of the schedule would be empty.
    """
    if schedule is None:
        return {"train": data.train, "validation": data.validation, "test": data.test}
    parts = divide(data, schedule)
    indices = {"train": parts.split.train, "validation": parts.split.validation, "test": parts.split.test}
    return {name: tuple(parts.samples[i] for i in part) for name, part in indices.items()}


def _with_fewer_labels(parts: Parts, schedule: Schedule) -> Parts:
    train = [parts.samples[i] for i in parts.split.train]
    kept = set(splits.keep_labels(train, share=schedule.labelled, seed=schedule.seed, by=schedule.labelled_by))
    unlabelled = [sample for i, sample in enumerate(train) if i not in kept]
    labelled = tuple(index for i, index in enumerate(parts.split.train) if i in kept)
    pools = {**parts.pools, UNLABELLED: (*parts.pools.get(UNLABELLED, ()), *unlabelled)}
    return replace(parts, split=replace(parts.split, train=labelled), pools=pools)


def _divide(data: DataSet, schedule: Schedule) -> Parts:
    samples = (*data.train, *data.validation, *data.test)
    share, seed = schedule.validation, schedule.seed
    chooses = schedule.select != "last" or share > 0 or bool(data.validation)
    least = 1 if chooses else 0
    if schedule.folds:
        split = splits.fold(
            samples, folds=schedule.folds, fold=schedule.fold, validation=share, seed=seed, least_validation=least
        )
    elif schedule.test or not (data.validation or data.test):
        split = splits.split(samples, validation=share, test=schedule.test, seed=seed, least_validation=least)
    else:
        train, validation = len(data.train), len(data.validation)
        split = Split(tuple(range(train)), tuple(range(train, train + validation)), ())
        if not validation:
            split = splits.split(data.train, validation=share, test=0.0, seed=seed, least_validation=least)
        split = replace(split, test=tuple(range(train + validation, len(samples))))
    return Parts(samples, split, data.pools)


def division(data: DataSet, schedule: Schedule) -> str:
    """Say in words how `divide` makes the parts."""
    drawn = f"drawn by seed {schedule.seed}, whole groups (patients, slides) at a time"
    if schedule.folds:
        how = f"fold {schedule.fold} of 0 to {schedule.folds - 1} is the test part, {drawn}"
    elif schedule.test or not (data.validation or data.test):
        how = drawn
    else:
        own = " and ".join(name for name, part in (("validation", data.validation), ("test", data.test)) if part)
        how = f"{own} as the data has them" + ("" if data.validation else f", validation {drawn}")
    if schedule.labelled < 1:
        how += f"; {100 * schedule.labelled:g} % of the training images keep their labels"
    return how


def check_pools(parts: Parts, needed: Sequence[str], method: str) -> None:
    """Raise DataError where the data lacks a pool that a method trains on."""
    missing = [name for name in needed if not parts.pools.get(name)]
    if missing:
        share = ", or set schedule.labelled below 1" if missing[0] == UNLABELLED else ""
        raise DataError(
            f"{method} trains on images without labels too ({', '.join(missing)}), the data has "
            f"none: put them into DIR/{missing[0]}/, or pass --pool {missing[0]}=SET{share}"
        )


class Passes:
    """Draws items in passes: each item once a pass, in an order of the pass's own.

    Parameters
    ----------
    seed
        The order of a pass depends on it and on the number of the pass.
    items
        Number of items.
    """

    def __init__(self, seed: Sequence[int], items: int) -> None:
        self._seed, self._items = tuple(seed), items
        self._order = functools.lru_cache(maxsize=4)(self._draw_order)

    def item_at(self, position: int) -> int:
        """Return the item at a position of the passes, strung together."""
        number, rest = divmod(position, self._items)
        return int(self._order(number)[rest])

    def _draw_order(self, number: int) -> NDArray[np.int64]:
        return np.random.default_rng((*self._seed, number)).permutation(self._items)


class Batches:
    """Draws the batch of each step, from (seed, step) alone.

    With a schedule in epochs, the images come in passes over a permutation, and a pool's images in
    passes of their own; a batch may end one pass and begin the next, so that all are of one size.
    With a schedule in steps, each image is drawn from all, with replacement. The whole batch is
    chosen before the processes share it, so that their number changes nothing.

    Parameters
    ----------
    parts, schedule, augmentation
        The images, and how they are drawn.
    pools
        Names of the pools that the method needs.
    align_px
        Whole images (``crop_px = 0``) are mirrored up to multiples of this.
    rank, processes
        Number of this process, and of all processes that share each batch.
    """

    def __init__(
        self,
        parts: Parts,
        schedule: Schedule,
        augmentation: Augmentation,
        pools: Sequence[str],
        *,
        align_px: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if schedule.batch % processes:
            raise DataError(
                f"batch={schedule.batch} is not a multiple of {processes} processes: set schedule.batch or --processes"
            )
        self._parts, self._schedule, self._augmentation = parts, schedule, augmentation
        self._pools = {name: parts.pools[name] for name in sorted(pools)}
        self._align_px = align_px
        self._own = range(rank, schedule.batch, processes)
        self._typical_px = typical_object_px(parts.samples)
        self._passes = Passes((schedule.seed, EPOCHS, 0), len(parts.split.train))
        self._pool_passes = {
            name: Passes((schedule.seed, EPOCHS, number), len(pool))
            for number, (name, pool) in enumerate(self._pools.items(), start=1)
        }

    def __call__(self, start: int, steps: int) -> Iterator[Batch]:
        """Yield the batches of steps ``start`` to ``steps - 1``, on the host."""
        workers = max(1, min(8, (os.cpu_count() or 2) - 1))
        crops, batches = ThreadPoolExecutor(workers), ThreadPoolExecutor(AHEAD)
        try:
            pending = [
                batches.submit(self._draw, step, steps, crops) for step in range(start, min(start + AHEAD, steps))
            ]
            for step in range(start, steps):
                batch = pending.pop(0).result()
                if step + AHEAD < steps:
                    pending.append(batches.submit(self._draw, step + AHEAD, steps, crops))
                yield batch
        finally:  # a run that is stopped waits for no crop
            for pool in (batches, crops):
                pool.shutdown(wait=False, cancel_futures=True)

    def _draw(self, step: int, steps: int, crops: ThreadPoolExecutor) -> Batch:
        seed = (self._schedule.seed, step)
        first = step * self._schedule.batch
        indices = self._draw_indices(seed, first)

        def draw_labelled(i: int) -> Crop:
            return self._crop(self._parts.samples[indices[i]], np.random.default_rng((*seed, i)))

        def draw_unlabelled(name: str, number: int, i: int) -> Crop:
            rng = np.random.default_rng((*seed, i, number))
            pool = self._pools[name]
            index = int(rng.integers(len(pool)))
            if self._schedule.epochs:
                index = self._pool_passes[name].item_at(first + i)
            return self._crop(unannotated(pool[index]), rng)

        labelled = list(crops.map(draw_labelled, self._own))
        pools = {}
        for number, name in enumerate(self._pools, start=1):
            pending = [crops.submit(draw_unlabelled, name, number, i) for i in self._own]
            pools[name] = stacked([future.result() for future in pending])[0]
        images, labels = stacked(labelled)
        return Batch(images, labels, pools, step, steps)

    def _draw_indices(self, seed: tuple[int, int], first: int) -> list[int]:
        """Choose the labelled images of the batch that begins at position ``first`` of the passes."""
        train, count = self._parts.split.train, self._schedule.batch
        if self._schedule.epochs:
            return [train[self._passes.item_at(first + i)] for i in range(count)]
        return [int(i) for i in np.random.default_rng(seed).choice(train, count)]

    def _crop(self, sample: Sample, rng: np.random.Generator) -> Crop:
        if self._schedule.crop_px:
            return augment.draw_crop(sample, self._schedule.crop_px, self._augmentation, self._typical_px, rng)
        return padded(*augment.draw_whole(sample, self._augmentation, self._typical_px, rng), self._align_px)


def typical_object_px(samples: Sequence[Sample]) -> float:
    """Median over images of their median object diameter, in pixels; nan without objects."""
    diameters = [s.object_px for s in samples if not np.isnan(s.object_px)]
    return float(np.median(diameters)) if diameters else float("nan")


def unannotated(picture: Picture) -> Sample:
    """Give an image labels that are all 0, so that it is cropped and varied like labelled ones."""
    image = picture.image
    labels = np.zeros(image.shape[:2], np.uint8)
    return StoredSample(picture.name, picture.group, image, labels, None, float("nan"))


def whole_images(
    parts: Parts, indices: Sequence[int], augmentation: Augmentation, align_px: int
) -> Iterator[tuple[Tensor, Tensor, NDArray[np.uint8]]]:
    """Yield whole images at the training resolution, mirrored up to multiples of ``align_px``.

    Yields
    ------
    (1, C, H, W) uint8 and (1, H, W) int64, and the (h, w) labels without the mirrored border.
    """
    typical_px = typical_object_px(parts.samples)
    for i in indices:
        sample = parts.samples[i]
        factor = augment.object_zoom(sample.object_px, augmentation, typical_px)
        image, labels = augment.zoom(sample.image, sample.labels, factor)
        yield *stacked([padded(image, labels, align_px)]), labels


def padded(image: NDArray[np.uint8], labels: NDArray[np.uint8], align_px: int) -> Crop:
    """Mirror an image and its labels up to multiples of ``align_px``, at the right and below."""
    pad = [(0, -n % align_px) for n in labels.shape]
    return np.pad(image, [*pad, (0, 0)], mode="reflect"), np.pad(labels, pad, mode="reflect")


def stacked(crops: list[Crop]) -> tuple[Tensor, Tensor]:
    """Stack images and labels of one size: (N, C, H, W) uint8 and (N, H, W) int64; else DataError."""
    shapes = {labels.shape for _, labels in crops}
    if len(shapes) > 1:
        raise DataError(
            f"whole images of different sizes do not stack ({sorted(shapes)}): "
            "set schedule.batch=1, or a schedule.crop_px"
        )
    nchw = np.ascontiguousarray(np.moveaxis(np.stack([c[0] for c in crops]), -1, 1))
    labels = np.stack([c[1] for c in crops]).astype(np.int64)
    return torch.from_numpy(nchw), torch.from_numpy(labels)

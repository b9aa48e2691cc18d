"""From a data set to the batches of each step: crops are drawn ahead, in threads."""

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
EPOCHS = 0x45504F43  # sets the seeds of the passes apart from those of steps and crops


@dataclass(frozen=True, slots=True)
class Parts:
    """The labelled images of a data set, and which of them train, choose and score.

    Attributes
    ----------
    samples, split
        All labelled images, and the indices of each part.
    pools
        Pictures without labels, by name.
    """

    samples: tuple[Sample, ...]
    split: Split
    pools: Mapping[str, Sequence[Picture]]


def divide(found: DataSet, schedule: Schedule) -> Parts:
    """Divide a data set as a schedule says.

    With ``schedule.folds`` all images are divided anew; with a share ``schedule.test`` too; else an
    official test part is the test part. An official validation part is kept in the last case; no
    other image is held back with ``schedule.validation=0`` where the last checkpoint counts. With
    ``schedule.labelled`` below 1, some of the images to train on lose their labels to the pool
    "unlabelled".

    Raises
    ------
    DataError
        If a part would be empty.
    """
    parts = _divided(found, schedule)
    if schedule.select == "last" and not schedule.validation and not found.validation:
        # Nothing is chosen: the group that validation has at least trains, too.
        split = parts.split
        train = tuple(sorted((*split.train, *split.validation)))
        parts = replace(parts, split=replace(split, train=train, validation=()))
    return parts if schedule.labelled == 1 else _with_fewer_labels(parts, schedule)


def parts_of(found: DataSet, schedule: Schedule | None = None) -> dict[str, tuple[Sample, ...]]:
    """Return the "train", "validation" and "test" images of a set.

    Parameters
    ----------
    found
        The set.
    schedule
        Of a run on it, which held images back; None: the official parts.

    Raises
    ------
    DataError
        If a part that the schedule asks for would be empty.
    """
    if schedule is None:
        return {"train": found.train, "validation": found.validation, "test": found.test}
    parts = divide(found, schedule)
    places = {"train": parts.split.train, "validation": parts.split.validation, "test": parts.split.test}
    return {name: tuple(parts.samples[i] for i in ids) for name, ids in places.items()}


def _with_fewer_labels(parts: Parts, schedule: Schedule) -> Parts:
    train = [parts.samples[i] for i in parts.split.train]
    kept = set(splits.keep_labels(train, share=schedule.labelled, seed=schedule.seed, by=schedule.labelled_by))
    hidden = [sample for i, sample in enumerate(train) if i not in kept]
    still = tuple(place for i, place in enumerate(parts.split.train) if i in kept)
    pools = {**parts.pools, UNLABELLED: (*parts.pools.get(UNLABELLED, ()), *hidden)}
    return replace(parts, split=replace(parts.split, train=still), pools=pools)


def _divided(found: DataSet, schedule: Schedule) -> Parts:
    every = (*found.train, *found.validation, *found.test)
    if schedule.folds:
        split = splits.fold(
            every, folds=schedule.folds, fold=schedule.fold, validation=schedule.validation, seed=schedule.seed
        )
        return Parts(every, split, found.pools)
    if schedule.test or not (found.validation or found.test):
        split = splits.split(every, validation=schedule.validation, test=schedule.test, seed=schedule.seed)
        return Parts(every, split, found.pools)
    train, validation = len(found.train), len(found.validation)
    test = tuple(range(train + validation, len(every)))
    if validation:
        split = Split(tuple(range(train)), tuple(range(train, train + validation)), test)
    else:
        inner = splits.split(found.train, validation=schedule.validation, test=0.0, seed=schedule.seed)
        split = Split(inner.train, inner.validation, test)
    return Parts(every, split, found.pools)


def check_pools(parts: Parts, needed: Sequence[str], method: str) -> None:
    """Raise DataError where the data has not the pools that a method trains on."""
    missing = [name for name in needed if not parts.pools.get(name)]
    if missing:
        share = ", or set schedule.labelled below 1" if missing[0] == UNLABELLED else ""
        raise DataError(
            f"{method} trains on images without labels too ({', '.join(missing)}), the data has "
            f"none: put them into DIR/{missing[0]}/, or pass --pool {missing[0]}=SET{share}"
        )


class Passes:
    """Draws from a number of items in passes: each item once a pass, in an order of its own.

    Parameters
    ----------
    seed
        Of all orders; the order of a pass is from it and the number of the pass.
    items
        How many there are.
    """

    def __init__(self, seed: Sequence[int], items: int) -> None:
        self._seed, self._items = tuple(seed), items
        self._order = functools.lru_cache(maxsize=4)(self._drawn)

    def at(self, place: int) -> int:
        """Return the item at a place of the passes, strung together."""
        number, rest = divmod(place, self._items)
        return int(self._order(number)[rest])

    def _drawn(self, number: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((*self._seed, number))
        return rng.permutation(self._items)


class Batches:
    """Draws the batch of each step, from (seed, step) alone.

    Of a schedule in epochs, the images come in passes over a permutation, and a pool's images in
    passes of their own; a batch may end one pass and begin the next, so that all are of one size.
    Of a schedule in steps, each is drawn from all, with replacement. Either way the whole batch is
    chosen before the processes share it: how many they are changes nothing.

    Parameters
    ----------
    parts, schedule, augmentation
        What to draw from, and how.
    pools
        Names of the pools that the method needs.
    align_px
        Whole images (``crop_px = 0``) are mirrored up to multiples of this.
    rank, processes
        Of the processes that share each batch, this one's number, and how many there are.
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
        self._pools = {name: parts.pools[name] for name in pools}
        self._align_px, self._rank, self._processes = align_px, rank, processes
        self._typical = typical_object_px(parts.samples)
        self._passes = Passes((schedule.seed, EPOCHS, 0), len(parts.split.train))
        self._pool_passes = {
            name: Passes((schedule.seed, EPOCHS, number), len(self._pools[name]))
            for number, name in enumerate(sorted(self._pools), start=1)
        }

    def __call__(self, start: int, steps: int) -> Iterator[Batch]:
        """Yield the batches of steps ``start`` to ``steps - 1``, on the host."""
        workers = max(1, min(8, (os.cpu_count() or 2) - 1))
        with ThreadPoolExecutor(workers) as crops, ThreadPoolExecutor(AHEAD) as batches:
            coming = [
                batches.submit(self._draw, step, steps, crops) for step in range(start, min(start + AHEAD, steps))
            ]
            for step in range(start, steps):
                batch = coming.pop(0).result()
                if step + AHEAD < steps:
                    coming.append(batches.submit(self._draw, step + AHEAD, steps, crops))
                yield batch

    def _draw(self, step: int, steps: int, crops: ThreadPoolExecutor) -> Batch:
        seed = (self._schedule.seed, step)
        mine = range(self._rank, self._schedule.batch, self._processes)
        first = step * self._schedule.batch
        chosen = self._chosen(seed, first)

        def labelled(i: int) -> Crop:
            sample = self._parts.samples[chosen[i]]
            return self._crop(sample, np.random.default_rng((*seed, i)))

        def unlabelled(name: str, number: int, i: int) -> Crop:
            rng = np.random.default_rng((*seed, i, number))
            pool = self._pools[name]
            at = int(rng.integers(len(pool)))
            if self._schedule.epochs:
                at = self._pool_passes[name].at(first + i)
            return self._crop(unannotated(pool[at]), rng)

        pairs = list(crops.map(labelled, mine))
        pools = {}
        for number, name in enumerate(sorted(self._pools), start=1):
            drawn = [crops.submit(unlabelled, name, number, i) for i in mine]
            pools[name] = _stacked([d.result() for d in drawn])[0]
        images, labels = _stacked(pairs)
        return Batch(images, labels, pools, step, steps)

    def _chosen(self, seed: tuple[int, int], first: int) -> list[int]:
        """Choose the labelled images of the batch that begins at a place of the passes."""
        train, count = self._parts.split.train, self._schedule.batch
        if self._schedule.epochs:
            return [train[self._passes.at(first + i)] for i in range(count)]
        return [int(i) for i in np.random.default_rng(seed).choice(train, count)]

    def _crop(self, sample: Sample, rng: np.random.Generator) -> Crop:
        if self._schedule.crop_px:
            return augment.draw_crop(sample, self._schedule.crop_px, self._augmentation, self._typical, rng)
        crop = augment.draw_whole(sample, self._augmentation, self._typical, rng)
        return padded(*crop, self._align_px)


def typical_object_px(samples: Sequence[Sample]) -> float:
    """Median over images of their median object diameter, in pixels; nan without objects."""
    known = [s.object_px for s in samples if not np.isnan(s.object_px)]
    return float(np.median(known)) if known else float("nan")


def unannotated(picture: Picture) -> Sample:
    """Give a picture labels that are all 0, so that it is cropped and varied like the others."""
    image = picture.image
    labels = np.zeros(image.shape[:2], np.uint8)
    return StoredSample(picture.name, picture.group, image, labels, None, float("nan"))


def whole_images(
    parts: Parts, indices: Sequence[int], augmentation: Augmentation, align_px: int
) -> Iterator[tuple[Tensor, Tensor, NDArray[np.uint8]]]:
    """Yield whole images at the training resolution, mirrored up to multiples of ``align_px``.

    Yields
    ------
    (1, C, H, W) uint8 and (1, H, W) int64, and the (h, w) labels without what was mirrored.
    """
    typical = typical_object_px(parts.samples)
    for i in indices:
        sample = parts.samples[i]
        factor = augment.object_zoom(sample, augmentation, typical)
        image, labels = augment.zoom(sample.image, sample.labels, factor)
        yield *_stacked([padded(image, labels, align_px)]), labels


def padded(image: NDArray[np.uint8], labels: NDArray[np.uint8], align_px: int) -> Crop:
    """Mirror an image and its labels up to multiples of ``align_px``, at the right and below."""
    pad = [(0, -n % align_px) for n in labels.shape]
    return np.pad(image, [*pad, (0, 0)], mode="reflect"), np.pad(labels, pad, mode="reflect")


def _stacked(crops: list[Crop]) -> tuple[Tensor, Tensor]:
    shapes = {labels.shape for _, labels in crops}
    if len(shapes) > 1:
        raise DataError(
            f"whole images of different sizes do not stack ({sorted(shapes)}): "
            "set schedule.batch=1, or a schedule.crop_px"
        )
    nchw = np.ascontiguousarray(np.moveaxis(np.stack([c[0] for c in crops]), -1, 1))
    labels = np.stack([c[1] for c in crops]).astype(np.int64)
    return torch.from_numpy(nchw), torch.from_numpy(labels)

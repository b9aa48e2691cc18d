"""How the images of a data set are divided at random, whole groups (patients, slides) at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from histostream.training.data import DataError, Picture


class DivisionError(DataError):
    """Images cannot be divided as a schedule says."""

    exit_status = 2


@dataclass(frozen=True, slots=True)
class Split:
    """Sample indices for training, for choosing the checkpoint, and for the final score."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def split(samples: Sequence[Picture], *, validation: float, test: float, seed: int, least_validation: int = 1) -> Split:
    """Divide images at random, whole groups at a time; the same seed gives the same split.

    Parameters
    ----------
    validation, test
        Shares of the images for these parts; the nearest number that whole groups allow is taken.
    seed
        Another seed is another split.
    least_validation
        Groups that validation has at least: 1, or 0 where nothing is to be chosen.

    Raises
    ------
    DivisionError
        If a part would be empty.
    """
    groups, count = _groups(samples), len(samples)
    shuffled = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    n_test = round(test * count)
    if test > 0 and not n_test:
        least = math.ceil(1000 / max(1, count)) / 1000
        raise DivisionError(f"schedule.test={test}: of {_amount(samples)} that is none; set 0, or {least} or more")
    test_part, rest = _take(shuffled, n_test)
    validation_part, train_part = _take(rest, max(least_validation, round(validation * count)))
    if not train_part:
        raise DivisionError(_nothing_left(samples, f"schedule.validation={validation}, schedule.test={test}"))
    return Split(*(_indices(part) for part in (train_part, validation_part, test_part)))


def fold(
    samples: Sequence[Picture], *, folds: int, fold: int, validation: float, seed: int, least_validation: int = 1
) -> Split:
    """Divide images for cross-validation, whole groups at a time.

    Each image is in the test part of exactly one of the ``folds`` folds, which are made as equal
    in images as the groups allow.

    Parameters
    ----------
    folds, fold
        How many folds, and which of them (from 0) is the test part.
    validation
        Share of all images to choose the checkpoint by, drawn from the rest.
    seed
        Another seed is another division; use one for all folds.
    least_validation
        As of `split`.

    Raises
    ------
    DivisionError
        If there are more folds than groups, no such fold, or nothing left to train on.
    """
    groups = _groups(samples)
    if not 2 <= folds <= len(groups):
        can = f"can make 2 to {len(groups)} folds" if len(groups) > 1 else "cannot be divided into folds: set 0"
        raise DivisionError(f"schedule.folds={folds}: {_amount(samples)} {can}")
    if not 0 <= fold < folds:
        raise DivisionError(f"schedule.fold={fold}: the {folds} folds are numbered 0 to {folds - 1}: set one of them")
    shuffled = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    sizes, fold_of = [0] * folds, {}
    for i in sorted(range(len(shuffled)), key=lambda i: -len(shuffled[i])):
        fold_of[i] = sizes.index(min(sizes))
        sizes[fold_of[i]] += len(shuffled[i])
    test_part = [group for i, group in enumerate(shuffled) if fold_of[i] == fold]
    rest = [group for i, group in enumerate(shuffled) if fold_of[i] != fold]
    validation_part, train_part = _take(rest, max(least_validation, round(validation * len(samples))))
    if not train_part:
        raise DivisionError(_nothing_left(samples, f"schedule.folds={folds}, schedule.validation={validation}"))
    return Split(*(_indices(part) for part in (train_part, validation_part, test_part)))


def keep_labels(samples: Sequence[Picture], *, share: float, seed: int, by: str = "patient") -> tuple[int, ...]:
    """Choose the images that keep their labels at random.

    Parameters
    ----------
    share
        Of the images, in (0, 1); the nearest number that whole groups allow is taken, one at least.
    seed
        Another seed is another choice. With one seed, a larger share holds a smaller one.
    by
        "patient": whole groups at a time, so that no patient is on both sides; or "image".

    Raises
    ------
    DivisionError
        If none would be left without labels.
    """
    groups = [[i] for i in range(len(samples))] if by == "image" else _groups(samples)
    shuffled = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    kept, unlabelled = _take(shuffled, max(1, round(share * len(samples))))
    if not unlabelled:
        raise DivisionError(
            f"schedule.labelled={share}: of {_amount(samples)} to train on none is left without labels; "
            "use a smaller share, or 1"
        )
    return _indices(kept)


def _groups(samples: Sequence[Picture]) -> list[list[int]]:
    """Return the indices of the samples of each group, in the order in which the groups appear."""
    groups: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(i)
    return list(groups.values())


def _take(groups: list[list[int]], images: int) -> tuple[list[list[int]], list[list[int]]]:
    """Take the first groups, one at least, that have the number of images nearest to ``images``; none for 0."""
    if not groups or not images:
        return [], groups
    total = np.cumsum([len(group) for group in groups])
    end = 1 + int(np.abs(total - images).argmin())
    return groups[:end], groups[end:]


def _indices(groups: list[list[int]]) -> tuple[int, ...]:
    return tuple(sorted(chain.from_iterable(groups)))


def _nothing_left(samples: Sequence[Picture], settings: str) -> str:
    """Return what is wrong and what can be done where no image is left to train on."""
    if len({sample.group for sample in samples}) > 2:
        return f"{settings}: of {_amount(samples)} none is left to train on; set smaller shares"
    return (
        f"{settings}: {_amount(samples)} cannot be divided; add images of other groups, or train on all, without "
        "choosing a checkpoint, by schedule.validation=0, schedule.test=0 and schedule.select=last"
    )


def _amount(samples: Sequence[Picture]) -> str:
    groups = len({sample.group for sample in samples})
    of_groups = f" of {groups} groups" if groups < len(samples) else ""
    return f"{len(samples)} images{of_groups}"

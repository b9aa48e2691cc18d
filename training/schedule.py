"""How long, on what and how fast to train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from histostream.training.checks import WHOLE, Decaying, Range, check_fields

Decay = Literal["none", "cosine", "poly"]
DEFAULT_VALIDATION_STEPS = 500  # of a schedule in steps
POLY_POWER = 0.9  # DeepLab's, which the adaptation papers took over


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long, on what images and with what learning rate to train.

    Attributes
    ----------
    steps
        Optimiser steps in all.
    epochs
        Passes over the training images, each in an order of its own, so that every image is drawn
        once an epoch; where it is not 0 it takes the place of ``steps``, whose batches are drawn
        with replacement.
    batch, crop_px
        Crops a step, and their side, a multiple of what the network takes; 0: whole images.
    seed
        Source of all randomness: split, initial weights, crops, dropout.
    validate_every
        Steps between validations; 0: an epoch, or 500 steps where the schedule is in steps.
    select
        The checkpoint that is kept as best: the one with the lowest validation "loss", with the
        highest mean "dice" of the classes or mean "jaccard" of all classes but the first (the
        ground) on the validation images, or the "last".
    patience
        The run ends after so many validations without a better checkpoint; 0: it takes all its steps.
    validation, test
        Shares of the images held back for choosing the checkpoint, and for the final score. With
        ``select="last"`` a validation share of 0 holds none back; else one group is, at least.
        Without a test share, a set's official test part is the test part.
    labelled
        Share of the training images that keep their labels, drawn by the seed; those of a smaller
        share are among those of a larger one. The others join the pool "unlabelled", for
        semi-supervised methods.
    labelled_by
        Whether labels are kept of a whole "patient" (group) at a time, or of an "image".
    folds, fold
        Cross-validation: the images are divided into so many folds (0: none), and fold number
        ``fold`` (from 0) is the test part.
    warmup
        Steps over which the learning rate rises linearly.
    decay
        "none", "cosine" (to zero at the last step) or "poly" (power 0.9, to zero).
    """

    steps: Annotated[int, Range(1, WHOLE)] = 40_000
    epochs: Annotated[int, Range(0, 10**6)] = 0
    batch: Annotated[int, Range(1, 65536)] = 1
    crop_px: Annotated[int, Range(1, 16384, off=0)] = 512
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    validate_every: Annotated[int, Range(0, WHOLE)] = 0
    select: Literal["loss", "dice", "jaccard", "last"] = "loss"
    patience: Annotated[int, Range(0, WHOLE)] = 0
    validation: Decaying = 0.2
    test: Decaying = 0.0
    labelled: Annotated[float, Range(0, 1, above=True)] = 1.0
    labelled_by: Literal["patient", "image"] = "patient"
    folds: Annotated[int, Range(2, 10**6, off=0)] = 0
    fold: Annotated[int, Range(0, 10**6)] = 0
    warmup: Annotated[int, Range(0, WHOLE)] = 0
    decay: Decay = "none"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.patience and self.select == "last":
            raise ValueError(
                f'patience={self.patience}: with select="last" no checkpoint is better than a later one; '
                'set select="loss", "dice" or "jaccard", or patience=0'
            )
        if self.validation + self.test >= 1:
            raise ValueError(f"test={self.test}: with validation={self.validation} nothing is left to train on")
        if self.folds and self.fold >= self.folds:
            raise ValueError(f"fold={self.fold}: the {self.folds} folds are numbered 0 to {self.folds - 1}")

    def total_steps(self, images: int) -> int:
        """Optimiser steps in all, for so many training images."""
        return math.ceil(self.epochs * images / self.batch) if self.epochs else self.steps

    def epochs_passed(self, done: int, images: int) -> int:
        """Whole passes over so many training images, after ``done`` steps."""
        return done * self.batch // images

    def validates(self, done: int, images: int) -> bool:
        """Whether the networks are validated after ``done`` steps on so many training images."""
        if self.validate_every or not self.epochs:
            return done % (self.validate_every or DEFAULT_VALIDATION_STEPS) == 0
        return self.epochs_passed(done, images) > self.epochs_passed(done - 1, images)

    def rate(self, step: int, steps: int) -> float:
        """Factor of the learning rate at a step."""
        factor = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.decay == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * step / steps))
        elif self.decay == "poly":
            factor *= (1 - step / steps) ** POLY_POWER
        return factor


def set_rates(optimizers: dict[str, torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rates to a factor of what their method gave them."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

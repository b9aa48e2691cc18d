"""Whether a run may go on in its folder: the same recipe, data and start; only its length may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from histostream.training.checkpoint import Checkpoint, CheckpointError
from histostream.training.data import listed
from histostream.training.methods import hook
from histostream.training.recipe import Recipe

LENGTHS = ("schedule.steps", "schedule.epochs")
MAY_CHANGE = (*LENGTHS, "schedule.patience")


def check_continuation(
    run: Path, before: Checkpoint, recipe: Recipe, record: Mapping[str, Any], method: ModuleType, images: int
) -> tuple[str, ...]:
    """Check that a run goes on as it began; return what a person should know about it.

    Parameters
    ----------
    run
        Its folder.
    before
        The run's newest checkpoint.
    recipe, record, method
        As given now.
    images
        Number of training images.

    Raises
    ------
    CheckpointError
        If the recipe, the data or the start is another, or there are fewer steps than before, or the
        method cannot go on to more.
    """
    elsewhere = "give --out a new folder"
    start = before.record.get("start", {})
    if start.get("sha256") != record.get("start", {}).get("sha256"):
        same = f"name what that run started from, --from {start['checkpoint']}" if start else "leave out --from"
        raise CheckpointError(f"{run}: holds a run that started from other weights; {elsewhere}, or {same}")
    earlier = _filled(before.record["recipe"], recipe)
    changed = dict(_changed(earlier, record["recipe"]))
    lengths = [key for key in LENGTHS if key in changed]
    other = [key for key in changed if key not in MAY_CHANGE]
    if "schedule.epochs" in changed and not all(changed["schedule.epochs"]):
        other += lengths  # epochs draw other images than steps do
    if other:
        settings = [f"{key} is {changed[key][0]!r} there and {changed[key][1]!r} here" for key in other]
        raise CheckpointError(
            f"{run}: holds a run with another recipe ({listed(settings, 3)}); {elsewhere}, or repeat the options "
            "of that run"
        )
    if before.record["data_sha256"] != record["data_sha256"]:
        raise CheckpointError(
            f"{run}: holds a run with another data set or other labels; {elsewhere}, or repeat the options of that run"
        )
    if not lengths:
        return ()
    return _extended(run, before.step, recipe, earlier["schedule"], method, images)


def _extended(
    run: Path, done: int, recipe: Recipe, schedule: dict[str, Any], method: ModuleType, images: int
) -> tuple[str, ...]:
    """Check that a run can get more steps; return what that does to the learning rate."""
    earlier = dataclasses.replace(recipe.schedule, steps=schedule["steps"], epochs=schedule["epochs"])
    steps, more = earlier.total_steps(images), recipe.schedule.total_steps(images)
    if more == steps:
        return ()
    if more < steps:
        raise CheckpointError(
            f"{run}: holds a run of {steps} steps, and {more} are fewer; a run can get more steps: set schedule.steps "
            "higher, or give --out a new folder"
        )
    cause = hook(method, "can_extend")(recipe.config, done, steps, more)
    if cause:
        raise CheckpointError(
            f"{run}: a run of {recipe.method} of {steps} steps cannot go on to {more}: {cause}; give --out a new "
            f"folder, and start from this run's weights with --from {run}"
        )
    note = f"the run gets {more} steps in place of {steps}"
    if recipe.schedule.decay == "none":
        return (note,)
    was, now = earlier.rate(done - 1, steps), recipe.schedule.rate(done, more)
    return (
        note,
        f"decay={recipe.schedule.decay!r}: the learning rate goes from {was:.3g} to {now:.3g} of its first value, and "
        f"to 0 at step {more}; the result is not that of a run of {more} steps from the beginning",
    )


def _filled(before: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the recipe of a record with the defaults of settings that there were not when it was written."""
    defaults = {"schedule": recipe.schedule, "augmentation": recipe.augmentation, "config": recipe.config}
    filled = {"class_weights": "", **before}
    for table, now in defaults.items():
        known = {
            field.name: field.default for field in dataclasses.fields(now) if field.default is not dataclasses.MISSING
        }
        filled[table] = {**known, **before[table]}
    return filled


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (setting, (before, now)) of each setting that differs, by its name in a recipe."""
    for key in (*now, *(key for key in before if key not in now)):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _changed(one, other, "method." if key == "config" else f"{key}.")
        elif one != other:
            yield f"{prefix}{key}", (one, other)

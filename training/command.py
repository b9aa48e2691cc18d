"""What ``histo-train`` does once its options are parsed: recipes, data sets, and the run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tomllib
import typing
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from histostream.training import datasets as sets
from histostream.training import device as compute
from histostream.training import loop, methods
from histostream.training.augment import Augmentation
from histostream.training.checkpoint import Checkpoint
from histostream.training.data import DataError, DataSet, Picture, Sample, StoredSample
from histostream.training.device import Compute
from histostream.training.loop import Recipe
from histostream.training.schedule import Schedule
from histostream.wsi.errors import HistoError


class RecipeError(HistoError, ValueError):
    """A recipe or an option names something that does not exist, or has a wrong value."""


def run_training(
    method_name: str,
    source: str,
    run: Path,
    *,
    pools: tuple[str, ...] = (),
    validation_set: str | None = None,
    test_set: str | None = None,
    configs: tuple[str, ...] = (),
    settings: tuple[str, ...] = (),
    mpp: float | None = None,
    device: str = "auto",
    precision: str = "fp32",
    compiled: bool = False,
    deterministic: bool = False,
    processes: int = 1,
) -> None:
    """Train a method, or go on with a run, and print its scores.

    Arguments are the options of ``histo-train``; see its ``--help``.
    """
    how = Compute(device, precision, compiled, deterministic)
    method = methods.load(method_name)
    found = sets.open_set(source)
    recipe = read_recipe(method_name, method, configs, settings, mpp=mpp, own_mpp=found.mpp)
    found = with_pools(found, pools, recipe.mpp)
    found = with_parts(found, validation_set, test_set, recipe.mpp)
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        sys.exit(_in_processes(processes))
    best = _train(recipe, method, found, run, how)
    if compute.rank() == 0:
        _tell(best, run)
    compute.close_device()


def with_pools(found: DataSet, pools: tuple[str, ...], mpp: float) -> DataSet:
    """Add pools of pictures without labels, given as ``NAME=SET``, to a data set.

    Parameters
    ----------
    found
        The set.
    pools
        Of what `sets.open_pool` reads.
    mpp
        Resolution of a set that does not know its own.

    Raises
    ------
    RecipeError
        If the text is not ``NAME=SET``.
    DataError
        If the pictures cannot be used.
    """
    known = dict(found.pools)
    for text in pools:
        name, equals, source = text.partition("=")
        if not (equals and name and source):
            raise RecipeError(f"--pool {text!r}: write NAME=SET, as target=monuseg:PATH")
        known[name] = sets.open_pool(source, name, found.mpp or mpp)
        _check_channels(found, known[name], source)
    return dataclasses.replace(found, pools=known)


def with_parts(found: DataSet, validation: str | None, test: str | None, mpp: float) -> DataSet:
    """Take the validation or the test images from other sets: from the target of an adaptation.

    Parameters
    ----------
    found
        The set.
    validation, test
        Other sets, as of `sets.open_set`.
    mpp
        Resolution of a set that does not know its own.

    Raises
    ------
    RecipeError
        If the other set has other classes.
    DataError
        If a set cannot be used.
    """
    if validation is not None:
        other = _alike(found, validation, mpp)
        chosen = other.validation or other.train
        found = dataclasses.replace(found, validation=_renamed(chosen, other.name))
    if test is not None:
        other = _alike(found, test, mpp)
        chosen = other.test or (*other.train, *other.validation)
        found = dataclasses.replace(found, test=_renamed(chosen, f"{other.name}-test"))
    return found


def _alike(found: DataSet, source: str, mpp: float) -> DataSet:
    """Open a set of the same classes and channels, at the same resolution."""
    other = sets.open_set(source)
    if len(other.classes) != len(found.classes):
        raise RecipeError(f"{source}: has classes {_names(other)}, the training set {_names(found)}")
    _check_channels(found, other.train or other.test, source)
    return other.at_mpp(found.mpp or mpp)


def _check_channels(found: DataSet, others: Sequence[Picture], source: str) -> None:
    if others and (channels := others[0].image.shape[2]) != found.channels:
        kinds = {1: "grey", 3: "RGB"}
        raise DataError(
            f"{source}: its images are {kinds[channels]}, those of {found.name} "
            f"{kinds[found.channels]}; convert them to one kind"
        )


def _names(found: DataSet) -> str:
    return ", ".join(name for name, _ in found.classes) or "unnamed"


def _renamed(samples: tuple[Sample, ...], of: str) -> tuple[Sample, ...]:
    """Keep the names and groups of two sets apart."""
    return tuple(
        StoredSample(f"{of}/{s.name}", f"{of}/{s.group}", s.image, s.labels, s.instances, s.object_px) for s in samples
    )


def read_recipe(
    method_name: str,
    method: ModuleType,
    configs: tuple[str, ...] = (),
    settings: tuple[str, ...] = (),
    *,
    mpp: float | None = None,
    own_mpp: float | None = None,
) -> Recipe:
    """Build a recipe from TOML files (or shipped names) and ``key=value`` settings.

    Parameters
    ----------
    method_name, method
        The method, and its module.
    configs
        Recipes; a key of a later one takes the place of the same key of an earlier one.
    settings
        ``table.key=value``, after all recipes.
    mpp
        Resolution to train at, whatever the recipes say.
    own_mpp
        Resolution of the data set, which holds where neither says one.

    Raises
    ------
    RecipeError
        If a file is missing or not TOML, or a key or value does not exist or fit.
    """
    tables: dict[str, Any] = {}
    for config in configs:
        for key, value in _read_toml(config).items():
            merged = isinstance(value, dict) and isinstance(tables.get(key), dict)
            tables[key] = {**tables[key], **value} if merged else value
    for setting in settings:
        _apply(tables, setting)
    if mpp is not None:
        tables["mpp"] = mpp
    if tables.setdefault("mpp", own_mpp) is None:
        raise RecipeError("the resolution of the training images is not known; pass --mpp")
    classes = tuple((c["name"], tuple(c["color"])) for c in tables.pop("classes", ()))
    recipe = Recipe(
        method=method_name,
        config=_fill(method.Config, tables.pop("method", {}), "method"),
        mpp=float(tables.pop("mpp")),
        schedule=_fill(Schedule, tables.pop("schedule", {}), "schedule"),
        augmentation=_fill(Augmentation, tables.pop("augmentation", {}), "augmentation"),
        classes=classes,
    )
    if tables:
        raise RecipeError(
            f"unknown key {next(iter(tables))!r} in the recipe; known: method, schedule, augmentation, classes"
        )
    return recipe


def _in_processes(count: int) -> int:
    """Run this command again in so many processes, by torchrun; returns the exit status."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        "-m",
        "histostream.training.cli",
        *sys.argv[1:],
    ]
    with subprocess.Popen(command) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue  # the child was told as well, and saves its last step


def _train(recipe: Recipe, method: ModuleType, found: DataSet, run: Path, how: Compute) -> Checkpoint:
    record = {"histostream": metadata.version("histostream"), "commit": commit()}
    if int(os.environ.get("RANK", "0")) > 0:
        return loop.train(recipe, method, found, run, how=how, record=record)
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, transient=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None, losses="")

        def report(progress: loop.Progress) -> None:
            text = "  ".join(f"{k} {v:.3f}" for k, v in progress.losses.items())
            bar.update(task, completed=progress.step, total=progress.steps, losses=text)
            if progress.validation_loss is not None:
                bar.console.print(
                    f"step {progress.step}: validation loss {progress.validation_loss:.4f}, "
                    f"Dice {progress.validation_dice:.3f}, {progress.seconds:.0f} s",
                    soft_wrap=True,
                )

        return loop.train(recipe, method, found, run, how=how, report=report, record=record)


def _tell(best: Checkpoint, run: Path) -> None:
    for part, score in best.record["scores"].items():
        named = zip(best.classes, score["f_score"], strict=True)
        text = ", ".join(f"{name} {f:.3f}" for (name, _), f in named)
        click.echo(f"{part} ({score['images']} images): F-score {text}")
    click.echo(f"best checkpoint (step {best.step}): {run / 'best'}")


def commit() -> str | None:
    """Commit of the code, where it runs from a checkout; with "+changes" where files differ."""
    here = Path(__file__).parent
    try:
        head, changed = (
            subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changed else head


def _read_toml(config: str) -> dict[str, Any]:
    shipped = resources.files("histostream.training") / "recipes" / f"{config}.toml"
    path = Path(config)
    try:
        text = path.read_text() if path.is_file() else shipped.read_text()
    except OSError as error:
        raise RecipeError(
            f"{config}: neither a file nor a shipped recipe; check the name (docs/training.md has them)"
        ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{config}: not a TOML file ({error}); mend it") from error


def _apply(tables: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals:
        raise RecipeError(f"--set {setting!r}: write key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    table, dot, name = key.partition(".")
    if dot:
        tables.setdefault(table, {})[name] = value
    else:
        tables[key] = value


def _fill(kind: type, values: dict[str, Any], table: str) -> Any:
    types = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in types:
            raise RecipeError(f"unknown key '{table}.{name}'; known: {', '.join(types)}")
        fits = (int, float) if types[name] is float else types[name]
        if not isinstance(value, fits) or (isinstance(value, bool) and types[name] is not bool):
            raise RecipeError(f"{table}.{name}={value!r}: expected {types[name].__name__}")
    converted = {k: float(v) if types[k] is float else v for k, v in values.items()}
    try:
        return kind(**converted)
    except ValueError as error:
        raise RecipeError(f"{table}: {error}") from error

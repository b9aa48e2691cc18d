"""``histo-train``: annotated images in, a checkpoint out."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import typing
from importlib import metadata, resources
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from histostream.training import data, loop, methods
from histostream.training.augment import Augmentation
from histostream.training.loop import Recipe, Schedule
from histostream.wsi.errors import HistoError


class RecipeError(HistoError, ValueError):
    """A recipe or an option names something that does not exist, or has a wrong value."""


@click.command(context_settings={"show_default": True})
@click.version_option(package_name="histostream")
@click.option("--method", "method_name", default="imems", help="Which paper to train.")
@click.option(
    "--data",
    "folder",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder with images/ and labels/ (class of each pixel) or labels_instance/ (objects).",
)
@click.option(
    "--out", "run", required=True, type=click.Path(path_type=Path), help="Folder of the run."
)
@click.option("--config", help="A recipe: a TOML file, or the name of a shipped one (nuclei).")
@click.option("--mpp", type=float, help="Resolution of the images, um per pixel.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="Change the recipe, e.g. schedule.steps=900 or method.base_width=32; may be repeated.",
)  # fmt: skip
def main(
    method_name: str,
    folder: Path,
    run: Path,
    config: str | None,
    mpp: float | None,
    settings: tuple[str, ...],
) -> None:
    """Train a method; the same command again goes on where a stopped run was."""
    try:
        method = methods.load(method_name)
        recipe = read_recipe(method_name, method, config, settings, mpp=mpp)
        samples = data.read_folder(folder)
        best = _train(recipe, method, samples, run)
    except KeyboardInterrupt:
        click.echo(f"\nstopped; the same command goes on from {run / 'last'}", err=True)
        sys.exit(130)
    except HistoError as error:
        click.echo(f"histo-train: {error}", err=True)
        sys.exit(1)
    for part, score in best.record["scores"].items():
        named = zip(best.classes, score["f_score"], strict=True)
        text = ", ".join(f"{name} {f:.3f}" for (name, _), f in named)
        click.echo(f"{part} ({score['images']} images): F-score {text}")
    click.echo(f"best checkpoint (step {best.step}): {run / 'best'}")


def read_recipe(
    method_name: str,
    method: ModuleType,
    config: str | None = None,
    settings: tuple[str, ...] = (),
    *,
    mpp: float | None = None,
) -> Recipe:
    """Build a recipe from a TOML file (or a shipped name) and ``key=value`` settings.

    Raises
    ------
    RecipeError
        If the file is missing or not TOML, or a key or value does not exist or fit.
    """
    tables = _read_toml(config) if config else {}
    for setting in settings:
        _apply(tables, setting)
    if mpp is not None:
        tables["mpp"] = mpp
    if "mpp" not in tables:
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
        raise RecipeError(f"unknown key {next(iter(tables))!r} in the recipe")
    return recipe


def _train(recipe: Recipe, method: ModuleType, samples: list[data.Sample], run: Path) -> Any:
    columns = (
        TextColumn("step"), MofNCompleteColumn(), BarColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    with Progress(*columns, transient=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=recipe.schedule.steps, losses="")

        def report(progress: loop.Progress) -> None:
            text = "  ".join(f"{k} {v:.3f}" for k, v in progress.losses.items())
            bar.update(task, completed=progress.step, losses=text)
            if progress.validation_loss is not None:
                bar.console.print(
                    f"step {progress.step}: validation loss {progress.validation_loss:.4f}, "
                    f"{progress.seconds:.0f} s"
                )

        record = {"histostream": metadata.version("histostream"), "commit": _commit()}
        return loop.train(recipe, method, samples, run, report=report, record=record)


def _commit() -> str | None:
    """Commit of the code, where it runs from a checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _read_toml(config: str) -> dict[str, Any]:
    shipped = resources.files("histostream.training") / "recipes" / f"{config}.toml"
    path = Path(config)
    try:
        text = path.read_text() if path.is_file() else shipped.read_text()
    except OSError as error:
        raise RecipeError(f"{config}: neither a file nor a shipped recipe") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{config}: not a TOML file ({error})") from error


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


if __name__ == "__main__":
    main()

"""Recipes: everything that defines a training run except the data, read from TOML files and settings."""

from __future__ import annotations

import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from histostream.training import methods
from histostream.training.augment import Augmentation
from histostream.training.class_weights import ClassWeights, read_class_weights
from histostream.training.data import Classes
from histostream.training.schedule import Schedule
from histostream.wsi.errors import HistoError


class RecipeError(HistoError, ValueError):
    """A recipe or an option names something that does not exist, or has a wrong value."""


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
    class_weights
        Weights of the classes in a loss per pixel: "balanced", or (name or number, weight) of those
        whose weight is not 1; "": all alike.
    """

    method: str
    config: Any
    mpp: float
    schedule: Schedule = field(default_factory=Schedule)
    augmentation: Augmentation = field(default_factory=Augmentation)
    classes: Classes = ()
    class_weights: ClassWeights = ""


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
        Resolution to train at, in place of what the recipes give.
    own_mpp
        Resolution of the data set, used where neither gives one.

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
    recipe = Recipe(
        method=method_name,
        config=_fill(method.Config, tables.pop("method", {}), "method"),
        mpp=float(tables.pop("mpp")),
        schedule=_fill(Schedule, tables.pop("schedule", {}), "schedule"),
        augmentation=_fill(Augmentation, tables.pop("augmentation", {}), "augmentation"),
        classes=tuple((c["name"], tuple(c["color"])) for c in tables.pop("classes", ())),
        class_weights=read_class_weights(tables.pop("class_weights", "")),
    )
    if tables:
        raise RecipeError(
            f"unknown key {next(iter(tables))!r} in the recipe; known: mpp, method, schedule, "
            "augmentation, classes, class_weights"
        )
    return recipe


def _read_toml(config: str) -> dict[str, Any]:
    path, shipped = Path(config), methods.recipes()
    if not path.is_file() and config not in shipped:
        raise RecipeError(f"{config}: neither a file nor a shipped recipe; check the name (docs/training.md has them)")
    try:
        return tomllib.loads(path.read_text() if path.is_file() else shipped[config].read_text())
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{config}: not a TOML file ({error}); correct it") from error


def _apply(tables: dict[str, Any], setting: str) -> None:
    """Enter ``table.key=value`` or ``key=value`` into the tables of a recipe."""
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
    """Build a dataclass from a table of a recipe, and check names and types."""
    types = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in types:
            raise RecipeError(f"unknown key '{table}.{name}'; known: {', '.join(types)}")
        allowed = (int, float) if types[name] is float else types[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and types[name] is not bool):
            raise RecipeError(f"{table}.{name}={value!r}: expected {types[name].__name__}")
    converted = {k: float(v) if types[k] is float else v for k, v in values.items()}
    try:
        return kind(**converted)
    except ValueError as error:
        raise RecipeError(f"{table}: {error}") from error

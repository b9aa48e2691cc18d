"""Recipes: everything that defines a training run except the data, read from TOML files and settings."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from histostream.training import methods
from histostream.training.augment import Augmentation
from histostream.training.checks import Range, check_values, field_types, plain_type, shown
from histostream.training.class_weights import ClassWeights, read_class_weights
from histostream.training.data import IGNORED, Classes
from histostream.training.schedule import Schedule
from histostream.wsi.errors import HistoError, reason

MPP = Range(1e-4, 1e5)  # um per pixel, from electron micrographs to whole organs
KEYS = ("mpp", "method", "schedule", "augmentation", "classes", "class_weights")


class RecipeError(HistoError, ValueError):
    """A recipe or an option names something that does not exist, or has a wrong value."""

    exit_status = 2


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
    unknown = [key for key in tables if key not in KEYS]
    if unknown:
        raise RecipeError(f"unknown key {shown(unknown[0])} in the recipe; known: {', '.join(KEYS)}")
    if tables.setdefault("mpp", own_mpp) is None:
        raise RecipeError("the resolution of the training images is not known; pass --mpp")
    return Recipe(
        method=method_name,
        config=_fill(method.Config, tables.get("method", {}), "method"),
        mpp=_mpp(tables["mpp"]),
        schedule=_fill(Schedule, tables.get("schedule", {}), "schedule"),
        augmentation=_fill(Augmentation, tables.get("augmentation", {}), "augmentation"),
        classes=_classes(tables.get("classes", [])),
        class_weights=read_class_weights(tables.get("class_weights", "")),
    )


def _read_toml(config: str) -> dict[str, Any]:
    path, shipped = Path(config), methods.recipes()
    try:
        if path.is_file():
            return tomllib.loads(path.read_text(encoding="utf-8"))
        if config in shipped:
            return tomllib.loads(shipped[config].read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of TOML, of the encoding, of a number of thousands of digits
        raise RecipeError(f"{config}: not a TOML file ({reason(error)}); correct it") from error
    except OSError as error:
        raise RecipeError(f"{config}: cannot be read ({reason(error)}); check the path") from error
    raise RecipeError(
        f"{shown(config)}: neither a file nor a shipped recipe; check the name (docs/training.md has them)"
    )


def _mpp(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in MPP:
        raise RecipeError(f"mpp={shown(value)}: use {MPP} um per pixel")
    return float(value)


def _classes(tables: Any) -> Classes:
    if not isinstance(tables, list) or len(tables) == 1 or len(tables) > IGNORED:
        raise RecipeError(f"classes={shown(tables)}: write two or more, each as [[classes]] with name and color")
    for table in tables:
        name, color = (table.get("name"), table.get("color")) if isinstance(table, dict) else (None, None)
        is_color = isinstance(color, list) and len(color) == 3 and all(type(v) is int and 0 <= v < 256 for v in color)
        if not (isinstance(name, str) and name and is_color):
            raise RecipeError(f'classes={shown(table)}: write each as name = "gland", color = [213, 62, 120]')
    return tuple((table["name"], tuple(table["color"])) for table in tables)


def _apply(tables: dict[str, Any], setting: str) -> None:
    """Enter ``table.key=value`` or ``key=value`` into the tables of a recipe."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise RecipeError(f"--set {setting!r}: write key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a bare word is a string
    table, dot, name = key.partition(".")
    if dot:
        inner = tables.setdefault(table, {})
        if not isinstance(inner, dict):
            raise RecipeError(
                f"--set {shown(setting)}: {shown(table)} is no table of a recipe; known: {', '.join(KEYS)}"
            )
        inner[name] = value
    else:
        tables[key] = value


def _fill(kind: type, values: Any, table: str) -> Any:
    """Build a dataclass from a table of a recipe, and check names and types."""
    types = field_types(kind)
    if not isinstance(values, dict):
        raise RecipeError(f"{table}={shown(values)}: it is a table; set one key of it, as {table}.{next(iter(types))}")
    for name in values:
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(types)}"
            raise RecipeError(f"unknown key {shown(f'{table}.{name}')}; {hint}")
    try:
        check_values(kind, values)
        return kind(**{k: float(v) if plain_type(types[k]) is float else v for k, v in values.items()})
    except ValueError as error:
        raise RecipeError(f"{table}.{error}") from error

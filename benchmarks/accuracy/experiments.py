"""The tables of the papers as data: algorithms, images, and how each size is trained.

A module of this folder has its tables in a TOML file of the same name::

    [algorithms.GROUP]    name in the paper = shipped recipes that make it
    [sizes.NAME]          the fields of `Size`; "schedule" and "source_schedule" are complete schedules
    [variants.GROUP]      suffix of a size = settings of the method; each is one more size beside "short"
    [tables.NAME]         the fields of `Table`; groups of algorithms, sizes and variants by name

A size or table with ``base`` takes missing keys from another one; groups of settings are merged key by key.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from typing import Any

from histostream.training import methods
from histostream.training.recipe import Recipe, read_recipe
from histostream.training.schedule import Schedule

Settings = dict[str, dict[str, Any]]  # keys of a recipe, by its group: "method", "schedule", ...


@dataclass(frozen=True, slots=True)
class Size:
    """How the rows of a table are trained.

    Attributes
    ----------
    mpp
        Resolution, um per pixel.
    recipes, final_recipes
        Shipped recipes that come before and after those of the algorithm.
    settings
        Settings of all rows, which override all recipes.
    own
        Settings of single algorithms.
    level_steps
        Steps of each level of a pyramid; 0: as the recipes and settings have it.
    query
        Further options of the data set.
    source_recipes, source_settings
        The source model that every row starts from; without recipes, rows start from scratch.
    source_name
        Key of the source model; sizes that differ only in the rows' settings share it.
    """

    mpp: float
    recipes: tuple[str, ...] = ()
    final_recipes: tuple[str, ...] = ()
    settings: Settings = field(default_factory=dict)
    own: dict[str, Settings] = field(default_factory=dict)
    level_steps: int = 0
    query: str = ""
    source_recipes: tuple[str, ...] = ()
    source_settings: Settings = field(default_factory=dict)
    source_name: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a paper.

    Attributes
    ----------
    method
        The method that trains all rows.
    algorithms
        Shipped recipes of each row, by the name of the algorithm in the paper.
    sizes
        How the rows are trained, by the value of ``--size``.
    source
        Data set, with "{data}" and "{seed}" to fill in; "" if the module opens the images.
    repeats
        Number of seeds or folds.
    folds
        Number of parts of a cross-validation; 0: runs differ in their seeds.
    labelled
        Share of the training images that keep their labels.
    judged
        Checkpoints that are scored, by the name that the result file gives them; the first one's scores are the cell's.
    """

    method: str
    algorithms: dict[str, tuple[str, ...]]
    sizes: dict[str, Size]
    source: str = ""
    repeats: int = 3
    folds: int = 0
    labelled: float = 1.0
    judged: dict[str, str] = field(default_factory=lambda: {"best": "best"})

    def recipe(self, size: Size, algorithm: str, number: int) -> Recipe:
        """Return how a row is trained; ``number`` is the seed or fold."""
        drawn: dict[str, Any] = {"folds": self.folds, "fold": number} if self.folds else {"seed": number}
        if self.labelled < 1:
            drawn["labelled"] = self.labelled
        recipes = (*size.recipes, *self.algorithms[algorithm], *size.final_recipes)
        recipe = self._read(recipes, size.mpp, size.settings, size.own.get(algorithm, {}), {"schedule": drawn})
        if size.level_steps:
            steps = size.level_steps * recipe.config.levels
            recipe = replace(recipe, schedule=replace(recipe.schedule, steps=steps))
        return recipe

    def source_recipe(self, size: Size, seed: int) -> Recipe:
        """Return how the source model is trained that every row of a seed starts from."""
        return self._read(size.source_recipes, size.mpp, size.source_settings, {"schedule": {"seed": seed}})

    def _read(self, recipes: tuple[str, ...], mpp: float, *settings: Settings) -> Recipe:
        """Read shipped recipes with settings above them; later settings override earlier ones."""
        texts = tuple(
            f"{group}.{key}={json.dumps(value)}"
            for one in settings
            for group, values in one.items()
            for key, value in values.items()
        )
        return read_recipe(self.method, methods.load_method(self.method), recipes, texts, mpp=mpp)


def read_tables(name: str) -> dict[str, Table]:
    """Read the tables of ``name.toml`` in this folder."""
    text = resources.files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    content = tomllib.loads(text)
    sizes, tables = content["sizes"], content["tables"]
    return {table: _table(_with_base(tables, table), sizes, content) for table in tables}


def cell_name(table: str, size: str, algorithm: str, number: int) -> str:
    """Return the name of a cell: its key in the result file, and the folder of its run."""
    return f"{table}-{size}-{algorithm}-{number}".lower().replace(",", "").replace(" ", "-")


def _table(values: dict[str, Any], sizes: dict[str, Any], content: dict[str, Any]) -> Table:
    algorithms = {
        name: tuple(recipes)
        for group in values.pop("algorithms")
        for name, recipes in content["algorithms"][group].items()
    }
    named = {name: _with_base(sizes, size) for name, size in values.pop("sizes").items()}
    for suffix, method in content.get("variants", {}).get(values.pop("variants", ""), {}).items():
        named[f"short-{suffix}"] = _merged(named["short"], {"settings": {"method": method}})
    return Table(algorithms=algorithms, sizes={name: _size(size) for name, size in named.items()}, **values)


def _size(values: dict[str, Any]) -> Size:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for prefix in ("", "source_"):
        if schedule := values.pop(f"{prefix}schedule", None):
            complete = {"schedule": asdict(Schedule(**schedule))}
            values[f"{prefix}settings"] = {**values.get(f"{prefix}settings", {}), **complete}
    return Size(**values)


def _with_base(entries: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    own = dict(entries[name])
    if base := own.pop("base", None):
        # A table's sizes and algorithms replace those of its base; settings and schedules are merged.
        return _merged(_with_base(entries, base), own)
    return own


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        groups = isinstance(value, dict) and isinstance(base.get(key), dict) and key != "sizes"
        merged[key] = _merged(base[key], value) if groups else value
    return merged

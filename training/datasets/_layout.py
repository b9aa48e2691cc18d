"""``dataset.toml``: classes, resolution, groups and parts of a folder of images."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histostream.training.data import Classes, DataError, listed

FILE = "dataset.toml"
TILE_PX = 512  # of slides, by default
COLORS = ((255, 255, 255), (230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127), (60, 84, 136))
KEYS = ("name", "mpp", "slide_mpp", "tile_px", "group", "parts", "classes", "splits")
CLASS_KEYS = ("name", "color", "value")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Layout:
    """Contents of ``dataset.toml``, or their defaults.

    Attributes
    ----------
    file
        Path of the file, for messages.
    name
        What the set is called.
    mpp
        Micrometres per pixel of the images, at which slides are read too; None if not known.
    slide_mpp
        Of level 0 of all slides, where their files have none or a wrong one.
    tile_px
        Side of the tiles that slides are cut into.
    group
        Its first group finds the image's group in the stem of a file name; None: each file is one.
    parts
        (rows, columns) that each image is cut into.
    classes, values
        (name, colour) of each class, empty if not known, and the class's pixel value in label
        files.
    splits
        Patterns of stems by part.
    """

    file: Path
    name: str
    mpp: float | None = None
    slide_mpp: float | None = None
    tile_px: int = TILE_PX
    group: re.Pattern[str] | None = None
    parts: tuple[int, int] = (1, 1)
    classes: Classes = ()
    values: tuple[int, ...] = ()
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def group_of(self, stem: str) -> str:
        """Return the group of a file.

        Raises
        ------
        DataError
            If the pattern does not match.
        """
        if self.group is None:
            return stem
        match = self.group.search(stem)
        if not match or match[1] is None:
            raise DataError(
                f"{self.file}: group={self.group.pattern!r} does not match {stem!r}; change it, or rename the file"
            )
        return str(match[1])


def read_layout(folder: Path) -> Layout:
    """Read ``dataset.toml``, all of whose keys may be missing, as may the file.

    Raises
    ------
    DataError
        If it is not TOML, or a key or value is not one that is known.
    """
    file = folder / FILE
    if not file.is_file():
        return Layout(file, folder.resolve().name)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a TOML file ({error}); correct it") from error
    _refuse_unknown(file, table, KEYS, "")
    classes, values = _classes(file, table.get("classes", []))
    return Layout(
        file,
        name=_checked(file, "name", table.get("name", folder.resolve().name), _is_text, "a text"),
        mpp=_positive(file, "mpp", table.get("mpp")),
        slide_mpp=_positive(file, "slide_mpp", table.get("slide_mpp")),
        tile_px=_checked(file, "tile_px", table.get("tile_px", TILE_PX), _is_whole(32), "a whole number from 32"),
        group=_pattern(file, table.get("group")),
        parts=_parts(file, table.get("parts", [1, 1])),
        classes=classes,
        values=values,
        splits=_splits(file, table.get("splits", {})),
    )


def _classes(file: Path, tables: Any) -> tuple[Classes, tuple[int, ...]]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise DataError(f"{file}: write each class as [[classes]] with its name")
    if len(tables) == 1:
        raise DataError(f"{file}: one class only; the background is a class too, the first: add it")
    names, colors, values = [], [], []
    for i, table in enumerate(tables):
        _refuse_unknown(file, table, CLASS_KEYS, "classes.")
        if "name" not in table:
            raise DataError(f"{file}: class number {i} has no name")
        names.append(_checked(file, "classes.name", table["name"], _is_text, "a text"))
        color = table.get("color", list(COLORS[i % len(COLORS)]))
        _checked(file, "classes.color", color, _is_list(3, range(256)), "[red, green, blue], 0 to 255")
        colors.append((color[0], color[1], color[2]))
        values.append(_checked(file, "classes.value", table.get("value", i), _is_whole(0), "a whole number from 0"))
    for key, entries in (("name", names), ("value", values)):
        if len(set(entries)) < len(entries):
            raise DataError(f"{file}: two classes have the same {key}: {listed(entries)}; change one")
    return tuple(zip(names, colors, strict=True)), tuple(values)


def _splits(file: Path, tables: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(tables, dict):
        raise DataError(f"{file}: write the parts as [splits] with train, validation, test")
    _refuse_unknown(file, tables, SPLITS, "splits.")
    for part, patterns in tables.items():
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise DataError(f"{file}: splits.{part}={patterns!r}: expected a list of names")
    return {part: tuple(patterns) for part, patterns in tables.items()}


def _parts(file: Path, value: Any) -> tuple[int, int]:
    _checked(file, "parts", value, _is_list(2, range(1, sys.maxsize)), "[rows, columns]")
    return value[0], value[1]


def _pattern(file: Path, value: Any) -> re.Pattern[str] | None:
    if value is None:
        return None
    try:
        pattern = re.compile(_checked(file, "group", value, _is_text, "a text"))
    except re.error as error:
        raise DataError(f"{file}: group={value!r} is no regular expression ({error}); correct it") from error
    if not pattern.groups:
        raise DataError(f"{file}: group={value!r}: put the group's name in parentheses")
    return pattern


def _positive(file: Path, key: str, value: Any) -> float | None:
    if value is None:
        return None
    return float(_checked(file, key, value, lambda v: type(v) in (int, float) and v > 0, "a positive number"))


def _checked(file: Path, key: str, value: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
    """Return a value of the file, or raise DataError."""
    if not is_valid(value):
        raise DataError(f"{file}: {key}={value!r}: expected {expected}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _is_list(length: int, allowed: range) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, list) and len(value) == length and all(type(v) is int and v in allowed for v in value)

    return check


def _refuse_unknown(file: Path, table: dict[str, Any], known: tuple[str, ...], prefix: str) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        names = ", ".join(repr(prefix + key) for key in unknown)
        raise DataError(f"{file}: unknown key {names}; known: {', '.join(known)}")

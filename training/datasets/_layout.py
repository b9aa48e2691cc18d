"""``dataset.toml``: classes, resolution, groups and parts of a folder of images."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histostream.training.data import IGNORED, Classes, DataError, listed
from histostream.training.image_files import Reading

FILE = "dataset.toml"
TILE_PX = 512  # of slides, by default
COLORS = ((255, 255, 255), (230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127), (60, 84, 136))
KEYS = (
    "name",
    "mpp",
    "slide_mpp",
    "tile_px",
    "group",
    "parts",
    "intensity",
    "transparent",
    "threshold",
    "ignore",
    "classes",
    "splits",
)
CLASS_KEYS = ("name", "color", "value")
SPLITS = ("train", "validation", "test")

Color = tuple[int, int, int]


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
    reading
        How images of more than 8 bits, or with transparent pixels, are read.
    threshold
        Least value of the second of two classes in label files; None: values are classes.
    ignore
        Value, or colour, of pixels in label files that are not annotated; None: 255, unless it is a
        class.
    classes, values
        (name, colour) of each class, empty if not known, and the class's pixel value in label
        files.
    by_color
        Whether every class was given a colour, which finds it in label files that are in colour.
    by_value
        Whether any class was given a value.
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
    reading: Reading = field(default_factory=Reading)
    threshold: float | None = None
    ignore: int | Color | None = None
    classes: Classes = ()
    values: tuple[int, ...] = ()
    by_color: bool = False
    by_value: bool = False
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def ignored_value(self) -> int | None:
        """Value of pixels in label files of numbers that are not annotated; None: there is none."""
        if isinstance(self.ignore, int):
            return self.ignore
        return None if IGNORED in self.values else IGNORED

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
        return Layout(file, folder.resolve().name, reading=Reading(place=str(file)))
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a TOML file ({error}); correct it") from error
    _refuse_unknown(file, table, KEYS, "")
    classes, values = _classes(file, table.get("classes", []))
    ignore = _ignore(file, table.get("ignore"))
    if ignore in values or ignore in [color for _, color in classes]:
        raise DataError(f"{file}: ignore={table['ignore']!r}: it is that of a class too; change one")
    threshold = _threshold(file, table.get("threshold"))
    if threshold is not None and len(classes) not in (0, 2):
        raise DataError(
            f"{file}: threshold={threshold:g}: it divides two classes, here are {len(classes)}; leave it out"
        )
    return Layout(
        file,
        name=_checked(file, "name", table.get("name", folder.resolve().name), _is_text, "a text"),
        mpp=_positive(file, "mpp", table.get("mpp")),
        slide_mpp=_positive(file, "slide_mpp", table.get("slide_mpp")),
        tile_px=_checked(file, "tile_px", table.get("tile_px", TILE_PX), _is_whole(32), "a whole number from 32"),
        group=_pattern(file, table.get("group")),
        parts=_parts(file, table.get("parts", [1, 1])),
        reading=_reading(file, table),
        threshold=threshold,
        ignore=ignore,
        classes=classes,
        values=values,
        by_color=bool(classes) and all("color" in entry for entry in table["classes"]),
        by_value=any("value" in entry for entry in table.get("classes", [])),
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
        _checked(file, "classes.color", color, _is_color, "[red, green, blue], 0 to 255")
        colors.append((color[0], color[1], color[2]))
        values.append(_checked(file, "classes.value", table.get("value", i), _is_whole(0), "a whole number from 0"))
    for key, entries in (("name", names), ("value", values)):
        if len(set(entries)) < len(entries):
            raise DataError(f"{file}: two classes have the same {key}: {listed(entries)}; change one")
    return tuple(zip(names, colors, strict=True)), tuple(values)


def _reading(file: Path, table: dict[str, Any]) -> Reading:
    intensity, transparent = table.get("intensity"), table.get("transparent")
    if intensity is not None:
        _checked(file, "intensity", intensity, _is_interval, "[black, white], two numbers that rise")
        intensity = (float(intensity[0]), float(intensity[1]))
    if transparent is not None and transparent != "channel":
        _checked(file, "transparent", transparent, _is_color, '[red, green, blue], 0 to 255, or "channel"')
        transparent = (transparent[0], transparent[1], transparent[2])
    return Reading(intensity, transparent, str(file))


def _ignore(file: Path, value: Any) -> int | Color | None:
    if value is None:
        return None
    if isinstance(value, list):
        _checked(file, "ignore", value, _is_color, "[red, green, blue], 0 to 255, or a whole number")
        return value[0], value[1], value[2]
    return int(_checked(file, "ignore", value, _is_whole(-(1 << 63)), "a whole number, or [red, green, blue]"))


def _threshold(file: Path, value: Any) -> float | None:
    if value is None:
        return None
    return float(_checked(file, "threshold", value, _is_number, "a number"))


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
    return float(_checked(file, key, value, lambda v: _is_number(v) and v > 0, "a positive number"))


def _checked(file: Path, key: str, value: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
    """Return a value of the file, or raise DataError."""
    if not is_valid(value):
        raise DataError(f"{file}: {key}={value!r}: expected {expected}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # so that nan and infinity are none


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]


def _is_whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < 1 << 63


def _is_list(length: int, allowed: range) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, list) and len(value) == length and all(type(v) is int and v in allowed for v in value)

    return check


_is_color = _is_list(3, range(256))


def _refuse_unknown(file: Path, table: dict[str, Any], known: tuple[str, ...], prefix: str) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        names = ", ".join(repr(prefix + key) for key in unknown)
        raise DataError(f"{file}: unknown key {names}; known: {', '.join(known)}")

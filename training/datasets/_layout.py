"""``dataset.toml``: what a folder of images cannot say of itself."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histostream.training.data import Classes, DataError, listed

FILE = "dataset.toml"
TILE_PX = 512  # of slides, where the file does not say
COLORS = ((255, 255, 255), (230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127), (60, 84, 136))
KEYS = ("name", "mpp", "slide_mpp", "tile_px", "group", "parts", "classes", "splits")
CLASS_KEYS = ("name", "color", "value")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Layout:
    """What ``dataset.toml`` says, or would say if it were there.

    Attributes
    ----------
    file
        Path of the file, for messages.
    name
        What the set is called.
    mpp
        Micrometres per pixel of the images, at which slides are read too; None if not known.
    slide_mpp
        Of level 0 of all slides, where their files do not say or are wrong.
    tile_px
        Side of the tiles that slides are cut into.
    group
        Finds the group in the stem of a file name, as its first group; None: each file is one.
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
        found = self.group.search(stem)
        if not found or found[1] is None:
            raise DataError(
                f"{self.file}: group={self.group.pattern!r} does not match {stem!r}; change it, or rename the file"
            )
        return str(found[1])


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
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a TOML file ({error}); mend it") from error
    _refuse_unknown(file, found, KEYS, "")
    classes, values = _classes(file, found.get("classes", []))
    return Layout(
        file,
        name=_text(file, "name", found.get("name", folder.resolve().name)),
        mpp=_positive(file, "mpp", found.get("mpp")),
        slide_mpp=_positive(file, "slide_mpp", found.get("slide_mpp")),
        tile_px=_whole(file, "tile_px", found.get("tile_px", TILE_PX), least=32),
        group=_pattern(file, found.get("group")),
        parts=_parts(file, found.get("parts", [1, 1])),
        classes=classes,
        values=values,
        splits=_splits(file, found.get("splits", {})),
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
        names.append(_text(file, "classes.name", table["name"]))
        colors.append(_color(file, table.get("color", list(COLORS[i % len(COLORS)]))))
        values.append(_whole(file, "classes.value", table.get("value", i), least=0))
    for what, given in (("name", names), ("value", values)):
        if len(set(given)) < len(given):
            raise DataError(f"{file}: two classes have the same {what}: {listed(given)}; change one")
    return tuple(zip(names, colors, strict=True)), tuple(values)


def _color(file: Path, value: Any) -> tuple[int, int, int]:
    fits = isinstance(value, list) and len(value) == 3
    if not fits or not all(type(v) is int and 0 <= v <= 255 for v in value):
        raise DataError(f"{file}: classes.color={value!r}: expected [red, green, blue], 0 to 255")
    red, green, blue = value
    return red, green, blue


def _splits(file: Path, tables: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(tables, dict):
        raise DataError(f"{file}: write the parts as [splits] with train, validation, test")
    _refuse_unknown(file, tables, SPLITS, "splits.")
    for part, patterns in tables.items():
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise DataError(f"{file}: splits.{part}={patterns!r}: expected a list of names")
    return {part: tuple(patterns) for part, patterns in tables.items()}


def _parts(file: Path, value: Any) -> tuple[int, int]:
    fits = isinstance(value, list) and len(value) == 2
    if not fits or not all(type(v) is int and v > 0 for v in value):
        raise DataError(f"{file}: parts={value!r}: expected [rows, columns]")
    return value[0], value[1]


def _pattern(file: Path, value: Any) -> re.Pattern[str] | None:
    if value is None:
        return None
    try:
        pattern = re.compile(_text(file, "group", value))
    except re.error as error:
        raise DataError(f"{file}: group={value!r} is no regular expression ({error}); mend it") from error
    if not pattern.groups:
        raise DataError(f"{file}: group={value!r}: put the group's name in parentheses")
    return pattern


def _text(file: Path, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"{file}: {key}={value!r}: expected a text")
    return value


def _positive(file: Path, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not value > 0:
        raise DataError(f"{file}: {key}={value!r}: expected a positive number")
    return float(value)


def _whole(file: Path, key: str, value: Any, *, least: int) -> int:
    if type(value) is not int or value < least:
        raise DataError(f"{file}: {key}={value!r}: expected a whole number from {least}")
    return value


def _refuse_unknown(file: Path, table: dict[str, Any], known: tuple[str, ...], at: str) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        names = ", ".join(repr(at + key) for key in unknown)
        raise DataError(f"{file}: unknown key {names}; known: {', '.join(known)}")

"""What an ONNX file says of itself: classes, normalisation, resolution and purpose, as defaults of the options.

The entries of ``metadata_props`` have no standard; the usual names and spellings are known here. They are data from an
unknown source: nothing of them is evaluated, lengths are capped, and an entry that is not understood is left out.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import onnx

from histostream.export.external.description import MAX_CHANNELS, MAX_CLASSES, ExternalModel

KEYS = {
    "classes": ("classes", "class_names", "names", "labels", "id2label"),
    "mean": ("mean", "image_mean", "pixel_mean", "img_mean"),
    "std": ("std", "image_std", "pixel_std", "img_std"),
    "mpp": ("mpp", "microns_per_pixel", "um_per_pixel", "spacing_um_px"),
    "channel_names": ("channel_names",),
    "note": ("description", "note"),
}
MAX_TEXT = 20_000  # characters of an entry that is read
MAX_NAME = 200  # characters of a name
MAX_NOTE = 2000  # characters of a description

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class FileDefaults:
    """What a file says; None, or empty, where it says nothing that is understood.

    Attributes
    ----------
    classes, mean, std, channel_names
        As in `ExternalModel`.
    mpp
        Resolution, um per pixel.
    note
        Its description.
    ignored
        Entries that are not understood, with the reason.
    """

    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channel_names: tuple[str, ...] = ()
    mpp: float | None = None
    note: str = ""
    ignored: tuple[str, ...] = ()


def read_metadata(model: onnx.ModelProto) -> FileDefaults:
    """Read the entries of a model that are known; see `KEYS`."""
    entries = {entry.key.strip().lower(): entry.value for entry in model.metadata_props}
    values: dict[str, Any] = {}
    ignored = []
    readers: dict[str, Callable[[str], Any]] = {
        "classes": lambda text: _names(text, 1, MAX_CLASSES),
        "mean": lambda text: _numbers(text, least=-math.inf),
        "std": lambda text: _numbers(text, least=0),
        "channel_names": lambda text: _names(text, 1, MAX_CHANNELS),
        "mpp": _resolution,
        "note": _description,
    }
    for name, keys in KEYS.items():
        key = next((key for key in keys if entries.get(key, "").strip()), None)
        if key is None:
            continue
        try:
            values[name] = readers[name](entries[key])
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            reason = str(error) if type(error) is ValueError else "is not understood"
            ignored.append(f"{key}={entries[key][:40]!r} {reason}")
    return FileDefaults(**values, ignored=tuple(ignored))


def with_defaults(
    options: ExternalModel, defaults: FileDefaults, *, takes_bytes: bool = False
) -> tuple[ExternalModel, list[str]]:
    """Fill in what the user did not say.

    Parameters
    ----------
    options, defaults
        What the user and the file say.
    takes_bytes
        Whether the network takes uint8, so that it has a use for the mean itself.

    Returns
    -------
    The options, and a line for each value that was taken from the file.
    """
    lines = []
    taken: dict[str, Any] = {}
    if not options.classes and defaults.classes:
        taken["classes"] = defaults.classes
        lines.append(f"classes from the file's metadata: {', '.join(defaults.classes)}")
    if not takes_bytes and options.mean is None and options.std is None and (defaults.mean or defaults.std):
        taken |= {"mean": defaults.mean, "std": defaults.std}
        lines.append(f"mean and std from the file's metadata: {_text(defaults.mean)} and {_text(defaults.std)}")
    if not options.channel_names and defaults.channel_names:
        taken["channel_names"] = defaults.channel_names
        lines.append(f"channel names from the file's metadata: {', '.join(defaults.channel_names)}")
    return replace(options, **taken), lines


def _text(values: tuple[float, ...] | None) -> str:
    return "none" if values is None else ",".join(f"{value:g}" for value in values)


def _literal(text: str) -> Any:
    """Read JSON, or a literal of Python, as several exporters write it; text that is neither is returned."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"is longer than {MAX_TEXT} characters")
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    if text.strip()[:1] in ("[", "{", "("):
        raise ValueError("is neither JSON nor a literal")
    return text


def _names(text: str, least: int, most: int) -> tuple[str, ...]:
    """Read a list, an object of names by number, or names with commas."""
    value = _literal(text)
    if isinstance(value, dict):
        by_number = {int(key): name for key, name in value.items()}
        if sorted(by_number) != list(range(len(by_number))):
            raise ValueError("is not numbered from 0 without gaps")
        value = [by_number[number] for number in range(len(by_number))]
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError("is not a list of names")
    names = tuple(" ".join(name.split()) for name in value)
    if not least <= len(names) <= most or len(set(names)) != len(names):
        raise ValueError(f"is not {least} to {most} different names")
    if not all(name and len(name) <= MAX_NAME and name.isprintable() for name in names):
        raise ValueError(f"has a name that is not 1 to {MAX_NAME} printable characters")
    return names


def _numbers(text: str, least: float) -> tuple[float, ...]:
    value = _literal(text)
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    values = tuple(float(number) for number in (value if isinstance(value, list | tuple) else [value]))
    if not 1 <= len(values) <= MAX_CHANNELS or not all(least < number < math.inf for number in values):
        raise ValueError("is not a number for each channel")
    return values


def _resolution(text: str) -> float:
    value = float(_numbers(text, least=0)[0])
    if not 0.01 <= value <= 1000:
        raise ValueError("is not a resolution in um per pixel")
    return value


def _description(text: str) -> str:
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:MAX_NOTE]

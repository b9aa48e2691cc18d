"""Types of option values that several ``histo-*`` commands have: lists of words or numbers, and devices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import click

MAX_DIGITS = 6  # of a number in a list
CPU = "cpu"
DEVICE_METAVAR = "auto|cpu|cuda|0"
DEVICES_METAVAR = "auto|cpu|0,1,..."


class WordList(click.ParamType):  # type: ignore[type-arg]
    """A list of words with commas between them, as a tuple.

    Parameters
    ----------
    choices
        The words that are allowed, of which each counts once; none: any, also repeated ones, so that names that must
        differ are not merged.

    Examples
    --------
    >>> WordList(("fp32", "fp16")).convert("fp16, fp32", None, None)
    ('fp16', 'fp32')
    """

    name = "list"

    def __init__(self, choices: Iterable[str] = ()) -> None:
        self.choices = tuple(choices)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split a text at its commas."""
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in value.split(",") if word.strip())
        if not self.choices:
            return words
        for word in words:
            if word not in self.choices:
                self.fail(f"{word!r} is none of {', '.join(self.choices)}", param, ctx)
        return tuple(dict.fromkeys(words))


class CountList(click.ParamType):  # type: ignore[type-arg]
    """A list of whole numbers from 1 on, or ``auto``, which becomes None, with commas between them.

    Examples
    --------
    >>> CountList().convert("auto,256,512", None, None)
    (None, 256, 512)
    """

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | None, ...]:
        """Read the numbers of a text."""
        if isinstance(value, tuple):
            return value
        numbers: list[int | None] = []
        for word in (word.strip() for word in value.split(",")):
            if word != "auto" and not (word.isascii() and word.isdecimal() and int(word) > 0):
                self.fail(f"{word!r} is no number from 1 on, nor auto: give one", param, ctx)
            numbers.append(None if word == "auto" else int(word))
        return tuple(dict.fromkeys(numbers))


class IndexList(click.ParamType):  # type: ignore[type-arg]
    """A list of whole numbers from 0 on, with commas between them, as a tuple; numbers may be repeated.

    Examples
    --------
    >>> IndexList().convert("0,2,2", None, None)
    (0, 2, 2)
    """

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read the numbers of a text."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",")]
        for word in words:
            if not (word.isascii() and word.isdecimal() and len(word) < MAX_DIGITS):
                self.fail(f"{word!r} is no number from 0 on: give numbers with commas, as 0,1,2", param, ctx)
        return tuple(map(int, words))


class Device(click.ParamType):  # type: ignore[type-arg]
    """What to compute on: ``auto``, ``cpu``, or a GPU as ``0``, ``cuda`` (the first) or ``cuda:1``.

    Examples
    --------
    >>> [Device().convert(name, None, None) for name in ("auto", "cpu", "cuda", "cuda:1", "1")]
    ['auto', 'cpu', 'cuda', 'cuda:1', 'cuda:1']
    """

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name that torch gives to a device, or "auto"."""
        if not re.fullmatch(r"auto|cpu|cuda|(cuda:)?[0-9]{1,4}", value):
            self.fail(f"{value!r} is no device: use auto, cpu, cuda, or the number of a GPU, as 0", param, ctx)
        return f"cuda:{value}" if value[0].isdigit() else str(value)


class DeviceList(click.ParamType):  # type: ignore[type-arg]
    """One or several devices with commas between them: none for ``auto``, else ``cpu`` or the numbers of GPUs.

    Examples
    --------
    >>> [DeviceList().convert(names, None, None) for names in ("auto", "cpu", "0,cuda:1", "cuda")]
    [(), ('cpu',), ('0', '1'), ('0',)]
    """

    name = "devices"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Read a list of devices; a GPU may be named once."""
        if isinstance(value, tuple):
            return value
        names = [Device().convert(word.strip(), param, ctx) for word in value.split(",")]
        if names == ["auto"]:
            return ()
        devices = tuple(name if name in (CPU, "auto") else name.partition(":")[2] or "0" for name in names)
        for device in devices:
            if device == "auto":
                self.fail(f"{value}: auto stands alone; name devices, as 0,1", param, ctx)
            if device != CPU and devices.count(device) > 1:
                self.fail(f"{value}: GPU {device} is named twice; name each once", param, ctx)
        return devices

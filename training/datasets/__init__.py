"""The data sets that can be trained on: one file is one set, and the folder is the registry.

A set's module offers ``read(path, *, option=default, ...) -> DataSet`` for the files as their
authors (or ``docs/data.md``) lay them out; nothing is downloaded. `folder` reads the layout for
sets of one's own. Files that begin with an underscore are shared.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from histostream.training.data import DataError, DataSet, Picture
from histostream.training.datasets import folder

NAMED = re.compile(r"([A-Za-z][\w-]+):(.+)", re.DOTALL)  # two letters or more: C: is a drive


def names() -> list[str]:
    """Return the names of all sets, which are the names of the files in this folder."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_") and name != "folder")


def open_dataset(text: str) -> DataSet:
    """Read a data set.

    Parameters
    ----------
    text
        ``NAME:PATH`` or ``NAME:PATH?option=value&option=value`` for a set known by name, else the
        path of a folder.

    Raises
    ------
    DataError
        If there is no such set, option or folder, or the set cannot be used as it is.
    """
    named = None if Path(text).exists() else NAMED.fullmatch(text)
    if not named:
        return folder.read(_existing(text))
    name, place = named.groups()
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known sets: {', '.join(names())}"
        raise DataError(f"no data set is called {name!r}: {hint}")
    path, _, query = place.partition("?")
    read = _reader(name)
    return read(_existing(path), **_options(name, read, query))


def open_pool(text: str, name: str, mpp: float) -> tuple[Picture, ...]:
    """Read pictures without labels.

    Parameters
    ----------
    text
        A slide or an image; a folder of slides and images; or a set, as of `open_dataset`: its pool of
        that name, else all its training images without their labels.
    name
        Of the pool.
    mpp
        Resolution that the pictures are brought to. Images that do not say theirs are taken to be
        at it.

    Raises
    ------
    DataError
        If there is no picture there, or one cannot be used.
    SlideError
        If a slide cannot be read.
    """
    path = Path(text).expanduser()
    if folder.holds_pictures(path):
        return folder.read_pictures(path, mpp)
    found = open_dataset(text).at_mpp(mpp)
    return tuple(found.pools.get(name) or found.train)


def _reader(name: str) -> Callable[..., DataSet]:
    read: Callable[..., DataSet] = importlib.import_module(f"{__name__}.{name}").read
    return read


def _existing(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise DataError(f"{text}: there is no such folder; check the path")
    return path


def _options(name: str, read: Callable[..., DataSet], query: str) -> dict[str, Any]:
    types = typing.get_type_hints(read)
    known = [key for key, p in inspect.signature(read).parameters.items() if p.kind is p.KEYWORD_ONLY]
    options = {}
    for setting in filter(None, query.split("&")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise DataError(f"{name}: option {setting!r}: write option=value")
        if key not in known:
            said = f"it has {', '.join(known)}: use one of them" if known else "it has none: leave it out"
            raise DataError(f"{name}: unknown option {key!r}; {said}")
        try:
            options[key] = types[key](value)
        except ValueError:
            raise DataError(f"{name}: {key}={value!r}: expected {types[key].__name__}") from None
    return options

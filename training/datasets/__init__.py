"""The data sets that can be trained on: one file reads one data set, and the folder is the registry.

A module offers ``read(path, *, option=default, ...) -> DataSet`` for the files as their authors (or
``docs/data.md``) lay them out, which raises DataError if a file is missing or cannot be used. Nothing
is downloaded. `folder` reads the layout for one's own data.
Files that begin with an underscore are shared. Another package adds a data set with an entry point
of the group ``histostream.datasets`` that names such a module.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from histostream.training.data import DataError, DataSet, Picture
from histostream.training.datasets import folder
from histostream.wsi.registry import Registry

NAMED = re.compile(r"([A-Za-z][\w-]+):(.+)", re.DOTALL)  # two letters or more: C: is a drive
DATASETS = Registry(__name__, "histostream.datasets", "data set", DataError, hidden=("folder",))


def open_dataset(text: str) -> DataSet:
    """Read a data set.

    Parameters
    ----------
    text
        ``NAME:PATH`` or ``NAME:PATH?option=value&option=value`` for a data set known by name, else
        the path of a folder.

    Raises
    ------
    DataError
        If there is no such data set, option or folder, or the data set cannot be used as it is.
    """
    named = None if Path(text).exists() else NAMED.fullmatch(text)
    if not named:
        return folder.read(_existing_folder(text))
    name, location = named.groups()
    read: Callable[..., DataSet] = DATASETS.load(name).read
    path, _, query = location.partition("?")
    return read(_existing_folder(path), **_options(name, read, query))


def open_pool(text: str, name: str, mpp: float) -> tuple[Picture, ...]:
    """Read images without labels.

    Parameters
    ----------
    text
        A slide or an image; a folder of slides and images; or a data set, as for `open_dataset`:
        its pool of that name, else all its training images without their labels.
    name
        Of the pool.
    mpp
        Resolution that the images are brought to. Images of unknown resolution are taken to be
        at it.

    Raises
    ------
    DataError
        If there is no image, or one cannot be used.
    SlideError
        If a slide cannot be read.
    """
    path = Path(text).expanduser()
    if folder.holds_pictures(path):
        return folder.read_pictures(path, mpp)
    data = open_dataset(text).at_mpp(mpp)
    return tuple(data.pools.get(name) or data.train)


def _existing_folder(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise DataError(f"{text}: there is no such folder; check the path")
    return path


def _options(name: str, read: Callable[..., DataSet], query: str) -> dict[str, Any]:
    """Parse ``option=value&option=value`` by the keyword-only parameters of a reader."""
    types = typing.get_type_hints(read)
    known = [key for key, p in inspect.signature(read).parameters.items() if p.kind is p.KEYWORD_ONLY]
    options = {}
    for setting in filter(None, query.split("&")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise DataError(f"{name}: option {setting!r}: write option=value")
        if key not in known:
            hint = f"it has {', '.join(known)}: use one of them" if known else "it has none: leave it out"
            raise DataError(f"{name}: unknown option {key!r}; {hint}")
        try:
            options[key] = types[key](value)
        except ValueError:
            raise DataError(f"{name}: {key}={value!r}: expected {types[key].__name__}") from None
    return options

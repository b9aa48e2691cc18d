"""The published methods: one file is one paper, and the folder is the registry.

A method module offers ``Config`` (frozen dataclass, every default with its source),
``build(config, classes) -> State`` and ``step(state, batch) -> losses``, ``validate(state, batch)``
and ``deployed(state)``, the module that export wraps.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from histostream.wsi.errors import HistoError


@dataclass(frozen=True, slots=True)
class State:
    """Networks and optimisers of one model; ``config`` says how they were built."""

    config: Any
    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]


class MethodError(HistoError, ValueError):
    """There is no method of that name."""


def names() -> list[str]:
    """Return the names of all methods, which are the names of the files in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """Import the method called ``name``.

    Raises
    ------
    MethodError
        If there is none; the message names the nearest.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known methods: {', '.join(known)}"
        raise MethodError(f"no method is called {name!r}: {hint}")
    return importlib.import_module(f"{__name__}.{name}")

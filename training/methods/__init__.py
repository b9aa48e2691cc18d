"""The published methods: one file is one paper, and the folder is the registry.

A method module offers

``Config``
    Frozen dataclass; every default with its source.
``build(config, classes, channels) -> State``
    The networks and their optimisers.
``step(state, batch) -> losses``
    Train on one batch. Networks are called through ``state.modules``, as a whole, and optimisers
    through their ``step``: there the loop puts mixed precision and the average over processes.
``before_step(state, parts, step, steps)``
    Called before every step with all the data: measure it (in step 0), choose pseudo-labels, change
    the phase. What it finds out is kept in the modules' buffers, so that a resumed run has it too.
``validate(state, images, labels) -> (loss, predicted labels)``
    The loss that chooses the checkpoint.
``settle(state, parts)``, where it has one
    Bring the batch statistics to what would ship, as by measuring them anew on clean images. The
    loop calls it before every validation, so that what ships is what is judged; the best checkpoint
    holds the statistics that it was judged with, and training goes on with its own (all buffers
    are put back).
``eligible(config, done, steps) -> bool``, where it has one
    Whether the best checkpoint may be that after ``done`` of ``steps`` steps.
``finish(state, parts)``
    Called with the best checkpoint, settled as it was judged, before it is scored.
``paint(state, images) -> {name: pictures}``
    What else is worth looking at, for the sample sheets of a run, whose own columns are ``image``,
    ``true`` and ``predicted``.
``deployed(state) -> nn.Module``
    The module that export wraps; ``score_kind(config)`` says what its scores are. Its attribute
    ``tile_px``, where it has one that is not 0, is the only side of a tile that it takes.
``align_px(config)``, ``pools(config)``
    What the sides of its images are multiples of; the pools of further images that it needs.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from histostream.wsi.errors import HistoError


@dataclass(frozen=True, slots=True)
class State:
    """Networks and optimisers of one model.

    Attributes
    ----------
    config
        How they were built.
    modules, optimizers
        By name.
    needed
        The modules that the deployed graph is made of; a checkpoint that is only to be exported
        may leave out the others.
    """

    config: Any
    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    needed: tuple[str, ...] = ("generator",)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step trains on.

    Attributes
    ----------
    images, labels
        (N, C, H, W) uint8 and (N, H, W) int64.
    pools
        MemoryNeeds images without labels, (N, C, H, W) uint8, by the name of their pool.
    step, steps
        Number of this step, from 0, and of all steps: for ramps.
    """

    images: Tensor
    labels: Tensor
    pools: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0
    steps: int = 1


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
    return importlib.import_module(f"{__name__}.{name}.method")

"""A run that is killed goes on as if it never stopped, whatever its method."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from histostream.training import loop
from histostream.training.checkpoint import Checkpoint
from histostream.training.data import DataSet
from histostream.training.recipe import Recipe


class Killed(Exception):
    pass


def killed_and_resumed(
    recipe: Recipe, method: ModuleType, found: DataSet, folder: Path, *, step: int
) -> tuple[Checkpoint, Checkpoint]:
    """Train in one go and with a kill after a step: the checkpoints are the same, bit for bit.

    Returns
    -------
    The best checkpoints of ``folder / "whole"`` and of ``folder / "broken"``.
    """
    whole = loop.train(recipe, method, found, folder / "whole")

    def kill(progress: loop.Progress) -> None:
        if progress.step == step:
            raise Killed

    with pytest.raises(Killed):
        loop.train(recipe, method, found, folder / "broken", report=kill)
    resumed = loop.train(recipe, method, found, folder / "broken")
    for name in ("last", "best"):
        one, other = weights_of(folder / "whole", name), weights_of(folder / "broken", name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)
    return whole, resumed


def weights_of(run: Path, name: str) -> dict[str, Tensor]:
    """Return all tensors of one of a run's checkpoints."""
    return load_file(run / name / "checkpoint.safetensors")


def logged(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's log."""
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))

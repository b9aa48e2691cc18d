"""Checkpoints: a folder with weights and optimiser states (safetensors) and ``checkpoint.json``.

A ``note.md`` beside them, written by a person, says what the model is for and where it fails.

Data, never code: reading one unpickles nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from histostream.training.methods import State
from histostream.wsi.errors import HistoError
from histostream.wsi.files import whole_file
from histostream.wsi.slides.staging import sha256_of

SCHEMA = 1


class CheckpointError(HistoError, ValueError):
    """A checkpoint is missing, damaged or of another kind than asked for."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What ``checkpoint.json`` says: how the model was built and what it was trained on.

    Attributes
    ----------
    method, config
        Name of the method, and its configuration as plain values.
    classes
        (name, (r, g, b)) of each class, in label order.
    channels
        3 for RGB, 1 for grey.
    mpp
        Resolution of the training pixels, in micrometres per pixel.
    step
        Optimiser steps taken.
    record
        Training record: recipe, data checksum, split, scores, versions, seed.
    """

    method: str
    config: dict[str, Any]
    classes: list[tuple[str, tuple[int, int, int]]]
    channels: int
    mpp: float
    step: int
    record: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, state: State, *, optimizers: bool = True) -> None:
    """Write a checkpoint; an earlier one in ``folder`` is replaced only when this one is whole.

    The optimiser states are left out of a checkpoint that is only to be exported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _weights(state)
    if optimizers:
        tensors |= _optimizer_tensors(state)
    # One file holds all tensors and the json goes in its header, so that one rename replaces both.
    text = json.dumps({"schema": SCHEMA, **_plain(checkpoint)})
    with whole_file(folder / "checkpoint.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"checkpoint": text})
    (folder / "checkpoint.json").write_text(json.dumps(json.loads(text), indent=1) + "\n")


def read_note(folder: Path) -> str:
    """Return what ``note.md`` beside a checkpoint says of the model, "" without one."""
    path = folder / "note.md"
    return " ".join(path.read_text(encoding="utf-8").split()) if path.is_file() else ""


def read(folder: Path) -> Checkpoint:
    """Read what a checkpoint says of itself.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or it is damaged or of another schema.
    """
    return _read_header(_file(folder))


def load(folder: Path, state: State) -> Checkpoint:
    """Load weights, and optimiser states where the checkpoint has them, into ``state``.

    Raises
    ------
    CheckpointError
        As `read`, or if the weights do not fit the networks of ``state``.
    """
    path = _file(folder)
    checkpoint, tensors = _read_header(path), load_file(path)
    for name, module in state.modules.items():
        prefix = f"{name}."
        own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        if not own and name not in state.needed:
            continue  # a checkpoint for export may leave the discriminator out
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointError(f"{folder}: weights of {name!r} do not fit: {error}; train it again") from error
    for name, optimizer in state.optimizers.items():
        _load_optimizer(optimizer, f"optimizer:{name}:", tensors)
    return checkpoint


@dataclass(frozen=True, slots=True)
class Start:
    """What a run starts from: weights of an earlier run.

    Attributes
    ----------
    checkpoint
        Folder that they come from.
    sha256
        Of its file.
    method, step
        Of the earlier run.
    loaded
        Tensors that fitted, by name and shape.
    left
        What keeps the weights it was built with, by name: a module of which nothing fitted, or a
        tensor of one.
    """

    checkpoint: str
    sha256: str
    method: str
    step: int
    loaded: int
    left: tuple[str, ...]


def start_from(run: Path, state: State) -> Start:
    """Load what fits of an earlier run's weights into new networks, whatever its method.

    Tensors are matched by name and shape. Modules without parameters hold what a run has measured
    of its own data, and are left out; so are the states of the optimisers.

    Parameters
    ----------
    run
        Folder of a run, whose best checkpoint is taken, or of a checkpoint.
    state
        Of the new run.

    Raises
    ------
    CheckpointError
        As `read`, or if no convolution or matrix fits.
    """
    folder = run / "best" if (run / "best").is_dir() else run
    path = _file(folder)
    said, tensors = _read_header(path), load_file(path)
    loaded, left, kernels = 0, [], 0
    for name, module in state.modules.items():
        if next(module.parameters(), None) is None:
            continue
        own = module.state_dict()
        fits = {
            key: tensors[f"{name}.{key}"]
            for key, value in own.items()
            if f"{name}.{key}" in tensors and tensors[f"{name}.{key}"].shape == value.shape
        }
        module.load_state_dict(fits, strict=False)
        loaded += len(fits)
        kernels += sum(value.ndim > 1 for value in fits.values())
        left += [f"{name}.{key}" for key in own if key not in fits] if fits else [name]
    if not kernels:  # a bias of so many classes fits many a network
        raise CheckpointError(
            f"{folder}: none of its weights fits the networks ({said.method}, {said.config}): "
            "start from a run of the same networks"
        )
    return Start(str(folder), sha256_of(path), said.method, said.step, loaded, tuple(left))


def _file(folder: Path) -> Path:
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no checkpoint in it (checkpoint.safetensors); name the folder of a run, or its best/"
        )
    return path


def _read_header(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})["checkpoint"])
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({error}); copy it again, or train it again"
        ) from error
    if said.pop("schema", None) != SCHEMA:
        raise CheckpointError(f"{path}: made by another version; train or export it again")
    said["classes"] = [(name, tuple(color)) for name, color in said["classes"]]
    return Checkpoint(**said)


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: getattr(checkpoint, name) for name in Checkpoint.__slots__}


def _weights(state: State) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, module in state.modules.items()
        for key, value in module.state_dict().items()
    }


def _optimizer_tensors(state: State) -> dict[str, Tensor]:
    return {
        f"optimizer:{name}:{index}:{key}": value.detach().cpu().contiguous()
        for name, optimizer in state.optimizers.items()
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            index, key = name[len(prefix) :].split(":")
            entries.setdefault(int(index), {})[key] = value
    if entries:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": entries, "param_groups": groups})

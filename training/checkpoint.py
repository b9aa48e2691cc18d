"""Checkpoints: a folder with weights and optimiser states (safetensors) and ``checkpoint.json``.

A person may add ``note.md``: what the model is for and where it fails. Reading a checkpoint
unpickles nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from histostream.training.data import listed, same_mpp
from histostream.training.state import State
from histostream.wsi.errors import HistoError
from histostream.wsi.files import whole_file, write_whole
from histostream.wsi.slides.staging import sha256_of

SCHEMA = 1
WEIGHTS = "checkpoint.safetensors"  # of a checkpoint's folder


class CheckpointError(HistoError, ValueError):
    """A checkpoint is missing or damaged, or does not fit the networks."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Contents of ``checkpoint.json``: how the model was built and what it was trained on.

    Attributes
    ----------
    method, config
        Name of the method, and its configuration as plain values.
    classes
        (name, (r, g, b)) of each class, in label order.
    channels
        Of an image: 3 for RGB, 1 for grey, or another number.
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
    """Write a checkpoint; an earlier one in ``folder`` is replaced once this one is complete.

    A checkpoint that is only to be exported is written without ``optimizers``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, module in state.modules.items()
        for key, value in module.state_dict().items()
    }
    if optimizers:
        tensors |= _optimizer_tensors(state)
    # One file holds all tensors and the json goes in its header, so that one rename replaces both.
    header = {name: getattr(checkpoint, name) for name in Checkpoint.__slots__}
    text = json.dumps({"schema": SCHEMA, **header})
    with whole_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"checkpoint": text})
    write_whole(folder / "checkpoint.json", json.dumps(json.loads(text), indent=1) + "\n")


def read_note(folder: Path) -> str:
    """Return the text of ``note.md`` beside a checkpoint, "" without one."""
    path = folder / "note.md"
    return " ".join(path.read_text(encoding="utf-8").split()) if path.is_file() else ""


def read(folder: Path) -> Checkpoint:
    """Read the header of a checkpoint, without its weights.

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
    """The weights of an earlier run that a run starts from.

    Attributes
    ----------
    checkpoint, sha256
        Folder of the earlier run's checkpoint, and hash of its file.
    method, step, mpp
        Of the earlier run; the resolution is in micrometres per pixel.
    loaded
        Number of tensors that fitted by name and shape.
    left
        Names of what keeps the weights it was built with: a module of which nothing fitted, or a
        tensor of one.
    reshaped
        Those tensors of ``left`` that the earlier run has in another shape, with both shapes.
    """

    checkpoint: str
    sha256: str
    method: str
    step: int
    mpp: float
    loaded: int
    left: tuple[str, ...]
    reshaped: tuple[str, ...] = ()

    def lines(self, mpp: float) -> tuple[str, ...]:
        """Say what was loaded, and what was not, for a run at ``mpp`` micrometres per pixel."""
        told = [f"starts from {self.checkpoint} ({self.method}, step {self.step}): {self.loaded} tensors loaded"]
        if not same_mpp(self.mpp, mpp):
            told.append(f"it was trained at {self.mpp:g} um per pixel, this run is at {mpp:g}")
        if self.reshaped:
            told.append(f"not loaded, of another shape there: {listed(self.reshaped)}")
        absent = [name for name in self.left if not any(text.startswith(f"{name} ") for text in self.reshaped)]
        if absent:
            told.append(f"not loaded, not there: {listed(absent)}")
        return tuple(told)


def start_from(start: Path, state: State, method: str) -> Start:
    """Load what fits of earlier weights into new networks, whatever their method.

    Tensors are matched by name and shape. Modules without parameters hold what a run has measured
    of its own data, and are left out; so are the states of the optimisers.

    Parameters
    ----------
    start
        Folder of a run, whose best checkpoint is taken; folder or file of a checkpoint; or the name
        of a method whose weights ship.
    state, method
        Of the new run, and the name of its method.

    Raises
    ------
    CheckpointError
        As `read`, or if no convolution or matrix fits.
    """
    folder = find_start(start)
    path = _file(folder)
    header, tensors = _read_header(path), load_file(path)
    loaded, left, reshaped, kernels = 0, [], [], 0
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
        others = [key for key in own if key not in fits]
        left += [f"{name}.{key}" for key in others] if fits else [name]
        reshaped += [
            f"{name}.{key} {_shape(tensors[f'{name}.{key}'])}, here {_shape(own[key])}"
            for key in others
            if fits and f"{name}.{key}" in tensors
        ]
    if not kernels:  # a bias alone fits many networks
        raise CheckpointError(f"{folder}: none of its weights fits the networks; {_differences(header, state, method)}")
    return Start(
        str(folder), sha256_of(path), header.method, header.step, header.mpp, loaded, tuple(left), tuple(reshaped)
    )


def find_start(start: Path) -> Path:
    """Return the folder of the checkpoint that `start_from` means.

    Raises
    ------
    CheckpointError
        If there is none, or it is a file or folder of another kind.
    """
    shipped = Path(str(resources.files(__package__))) / "weights"
    if start.is_dir():
        folder = start / "best" if (start / "best").is_dir() else start
        if (folder / "card.json").is_file():
            raise CheckpointError(
                f"{start}: is a bundle, whose graphs cannot be trained; name the run or the checkpoint that it was "
                "exported from"
            )
        return folder
    if start.name == WEIGHTS and start.is_file():
        return start.parent
    if start.exists():
        raise CheckpointError(
            f"{start}: is no checkpoint of HistoStream ({WEIGHTS} in a folder of its own); name the folder of a run, "
            "or its best/"
        )
    if len(start.parts) == 1 and (shipped / start).is_dir():
        return shipped / start
    names = ", ".join(sorted(each.name for each in shipped.iterdir()))
    raise CheckpointError(
        f"{start}: there is no such folder; name a run, a checkpoint, or a method whose weights ship ({names})"
    )


def _differences(header: Checkpoint, state: State, method: str) -> str:
    """Say how the configuration of a checkpoint differs from that of some networks."""
    if header.method != method:
        return f"it is of {header.method}: start from a run of this method, or pass --method {header.method}"
    own = dataclasses.asdict(state.config)
    names = [name for name in header.config if name in own and header.config[name] != own[name]]
    if not names:
        return "start from a run of the same networks"
    return "start from a run of the same networks, or pass " + " ".join(
        f"--set method.{name}={_toml(header.config[name])}" for name in names
    )


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _file(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: no checkpoint in it ({WEIGHTS}); name the folder of a run, or its best/")
    return path


def _read_header(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["checkpoint"])
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({error}); copy it again, or train it again"
        ) from error
    if header.pop("schema", None) != SCHEMA:
        raise CheckpointError(f"{path}: made by another version; train or export it again")
    header["classes"] = [(name, tuple(color)) for name, color in header["classes"]]
    return Checkpoint(**header)


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

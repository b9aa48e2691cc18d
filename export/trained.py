"""A checkpoint of one of the methods, made ready for `write_bundle`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from histostream.export.bundle import TILE_PX, Export, Network, Options, Say, check, write_bundle
from histostream.export.graph.from_torch import export_onnx
from histostream.export.graph.model import GraphError
from histostream.training import checkpoint as checkpoints
from histostream.training import methods
from histostream.training.checkpoint import Checkpoint, CheckpointError
from histostream.wsi.outputs.label_rows import ClassInfo


def shipped_checkpoint(method: str) -> Path:
    """Folder of the weights that ship for a method.

    Raises
    ------
    CheckpointError
        If none ship for it.
    """
    folder = Path(str(resources.files("histostream.training"))) / "weights" / method
    if not folder.is_dir():
        raise CheckpointError(f"no weights ship for {method!r}: pass --checkpoint RUN")
    return folder


def find_checkpoint(run: Path) -> Path:
    """Folder of the checkpoint in a run: the best one, or the folder itself."""
    return run / "best" if (run / "best").is_dir() else run


def read_checkpoint(method_name: str, run: Path | None) -> tuple[Path, Checkpoint]:
    """Find the checkpoint of a run, or the one that ships (None), and read what it says of itself.

    Raises
    ------
    CheckpointError
        If it is missing, damaged or of another method.
    """
    methods.load_method(method_name)
    folder = shipped_checkpoint(method_name) if run is None else find_checkpoint(run)
    said = checkpoints.read(folder)
    if said.method != method_name:
        raise CheckpointError(f"{folder}: trained by {said.method!r}, not {method_name!r}; pass --method {said.method}")
    return folder, said


def config_of(folder: Path, said: Checkpoint) -> Any:
    """Return the method's ``Config`` that a checkpoint was built with.

    Raises
    ------
    CheckpointError
        If it does not fit the method.
    """
    try:
        return methods.load_method(said.method).Config(**said.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its config does not fit {said.method}: {error}; "
            "use the version of HistoStream that trained it, or train it again"
        ) from error


def load_deployed(folder: Path, said: Checkpoint) -> nn.Module:
    """Build the network of a checkpoint behind the tile contract, and load its weights.

    Raises
    ------
    CheckpointError
        If its config does not fit its method, or its weights are damaged.
    """
    method = methods.load_method(said.method)
    state = method.build(config_of(folder, said), len(said.classes), said.channels)
    checkpoints.load(folder, state)
    module: nn.Module = method.deployed(state)
    return module.eval()


def export_checkpoint(
    method_name: str,
    run: Path | None,
    out: Path,
    options: Options | None = None,
    *,
    say: Say = lambda text: None,
) -> Export:
    """Export a checkpoint to the bundle ``out``.

    Parameters
    ----------
    method_name
        Name of the method; the checkpoint has to be one of it.
    run
        Folder of a training run or of a checkpoint; None takes the weights that ship.
    out
        Folder to write; an existing bundle there is replaced once the new one is whole.
    options
        How; see `Options`.
    say
        Told what is done, one line at a time.

    Raises
    ------
    CheckpointError
        If the checkpoint is missing, damaged or of another method.
    HistoError
        As `write_bundle`.
    """
    options = options or Options()
    folder, said = read_checkpoint(method_name, run)
    check(out, options)
    module = load_deployed(folder, said)
    network = trained_network(
        module,
        method=method_name,
        classes=tuple(ClassInfo(name, color) for name, color in said.classes),
        mpp=said.mpp,
        channels=said.channels,
        tile_px=options.tile_px or own_tile_px(module) or TILE_PX,
        score_kind=methods.load_method(method_name).score_kind(config_of(folder, said)),
        training={**said.record, "step": said.step, "torch": torch.__version__},
        note=checkpoints.read_note(folder),
    )
    return write_bundle(network, out, options, say=say)


def trained_network(
    module: nn.Module,
    *,
    method: str,
    classes: tuple[ClassInfo, ...],
    mpp: float,
    channels: int,
    tile_px: int,
    score_kind: str = "probability",
    training: dict[str, object] | None = None,
    note: str = "",
) -> Network:
    """Export a torch module that keeps the tile contract; torch in single precision judges it.

    Raises
    ------
    GraphError
        If it cannot be exported: an operator without ONNX form, or a tile size that the network
        does not take.
    """
    module = module.eval()
    check_tile(module, tile_px)
    stride_px = int(getattr(next(module.children(), None), "stride_px", 1))
    if tile_px % stride_px:
        below = tile_px // stride_px * stride_px
        fits = " or ".join(str(px) for px in (below, below + stride_px) if px)
        raise GraphError(f"tile of {tile_px} px: this network takes multiples of {stride_px}; use {fits}")

    def reference(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        with torch.inference_mode():
            return np.concatenate([module(torch.from_numpy(t[None])).numpy() for t in tiles])

    return Network(
        model=export_onnx(module, channels=channels, tile_px=tile_px),
        reference=reference,
        method=method,
        classes=classes,
        mpp=mpp,
        channels=channels,
        tile_px=tile_px,
        score_kind=score_kind,
        training=dict(training or {}),
        note=note,
    )


def own_tile_px(module: nn.Module) -> int:
    """Side of the tiles that a deployed module is built for, its ``tile_px``; 0 for any."""
    return int(getattr(module, "tile_px", 0))


def check_tile(module: nn.Module, tile_px: int) -> None:
    """Refuse tiles of another side than the one that a module is built for.

    Raises
    ------
    GraphError
        If it is built for another.
    """
    own_px = own_tile_px(module)
    if own_px and tile_px != own_px:
        raise GraphError(f"tile of {tile_px} px: this network is built for {own_px} px; use {own_px}")

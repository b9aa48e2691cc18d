"""Export a checkpoint of one of the methods."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from histostream.export.bundle import TILE_PX, Export, Network, Options, Say, check_options, write_bundle
from histostream.export.graph.from_torch import export_onnx
from histostream.export.graph.model import GraphError
from histostream.training import checkpoint as checkpoints
from histostream.training import methods
from histostream.training.checkpoint import Checkpoint, CheckpointError
from histostream.training.networks.tile_model import TileModel
from histostream.wsi.outputs.label_rows import ClassInfo


def shipped_checkpoint(method: str) -> Path:
    """Return the folder of the weights that ship for a method.

    Raises
    ------
    CheckpointError
        If no weights ship for it.
    """
    folder = Path(str(resources.files("histostream.training"))) / "weights" / method
    if not folder.is_dir():
        raise CheckpointError(f"no weights ship for {method!r}: pass --checkpoint RUN")
    return folder


def find_checkpoint(run: Path) -> Path:
    """Return the folder of the best checkpoint of a run, or the folder itself if it is a checkpoint."""
    return run / "best" if (run / "best").is_dir() else run


def read_checkpoint(method_name: str, run: Path | None) -> tuple[Path, Checkpoint]:
    """Find and read the checkpoint of a run; None: the one that ships with the method.

    Raises
    ------
    CheckpointError
        If it is missing, damaged or of another method.
    """
    methods.load_method(method_name)
    folder = shipped_checkpoint(method_name) if run is None else find_checkpoint(run)
    checkpoint = checkpoints.read(folder)
    if checkpoint.method != method_name:
        raise CheckpointError(
            f"{folder}: trained by {checkpoint.method!r}, not {method_name!r}; pass --method {checkpoint.method}"
        )
    return folder, checkpoint


def config_of(folder: Path, checkpoint: Checkpoint) -> Any:
    """Return the method's ``Config`` that a checkpoint was built with.

    Raises
    ------
    CheckpointError
        If it does not fit the method.
    """
    try:
        return methods.load_method(checkpoint.method).Config(**checkpoint.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its config does not fit {checkpoint.method}: {error}; "
            "use the version of HistoStream that trained it, or train it again"
        ) from error


def load_deployed(folder: Path, checkpoint: Checkpoint) -> TileModel:
    """Build the deployed network of a checkpoint, which keeps the tile contract, and load its weights.

    Raises
    ------
    CheckpointError
        If its config does not fit its method, or its weights are damaged.
    """
    method = methods.load_method(checkpoint.method)
    state = method.build(config_of(folder, checkpoint), len(checkpoint.classes), checkpoint.channels)
    checkpoints.load(folder, state)
    module: TileModel = method.deployed(state)
    return module.eval()


def export_checkpoint(
    method_name: str,
    run: Path | None,
    out: Path,
    options: Options | None = None,
    *,
    say: Say = lambda text: None,
) -> Export:
    """Write the network of a checkpoint to the bundle ``out``.

    Parameters
    ----------
    method_name
        Name of the method that trained the checkpoint.
    run
        Folder of a training run or of a checkpoint; None: the weights that ship.
    out
        Folder to write; an existing bundle there is replaced once the new one is complete.
    options
        How to export it.
    say
        Called with each line of progress.

    Raises
    ------
    CheckpointError
        If the checkpoint is missing, damaged or of another method.
    HistoError
        As `write_bundle`.
    """
    options = options or Options()
    folder, checkpoint = read_checkpoint(method_name, run)
    check_options(out, options)
    module = load_deployed(folder, checkpoint)
    network = trained_network(
        module,
        method=method_name,
        classes=tuple(ClassInfo(name, color) for name, color in checkpoint.classes),
        mpp=checkpoint.mpp,
        channels=checkpoint.channels,
        tile_px=options.tile_px or own_tile_px(module) or TILE_PX,
        score_kind=methods.hook(methods.load_method(method_name), "score_kind")(config_of(folder, checkpoint)),
        training={**nan_to_none(checkpoint.record), "step": checkpoint.step, "torch": torch.__version__},
        note=checkpoints.read_note(folder),
    )
    return write_bundle(network, out, options, say=say)


def nan_to_none(value: Any) -> Any:
    """Replace NaN, the score of a class that is in no image, by None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {name: nan_to_none(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [nan_to_none(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def trained_network(
    module: TileModel,
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
    """Export a module that keeps the tile contract to ONNX; torch in single precision is the reference.

    Raises
    ------
    GraphError
        If an operator has no form in ONNX, or the network does not take the tile size.
    """
    module = module.eval()
    check_tile(module, tile_px)
    stride_px = int(getattr(next(module.children(), None), "stride_px", 1))
    if tile_px % stride_px:
        below = tile_px // stride_px * stride_px
        sizes = " or ".join(str(px) for px in (below, below + stride_px) if px)
        raise GraphError(f"tile of {tile_px} px: this network takes multiples of {stride_px}; use {sizes}")

    def reference(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.concatenate([module.unrounded(torch.from_numpy(t[None])).numpy() for t in tiles])

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
    """Refuse another tile size than the one that a module is built for.

    Raises
    ------
    GraphError
        If it is built for another size.
    """
    own_px = own_tile_px(module)
    if own_px and tile_px != own_px:
        raise GraphError(f"tile of {tile_px} px: this network is built for {own_px} px; use {own_px}")

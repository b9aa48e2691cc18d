"""From a checkpoint to a model bundle: export, compare, describe; written whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from histostream.export.graph import depends_on_tile_statistics, halo_px
from histostream.export.onnx import OPSET, export_onnx
from histostream.export.parity import FP32_AGREEMENT, compare, demo_tiles
from histostream.runtime.card import ModelCard, write_card
from histostream.runtime.engine import open_engine
from histostream.training import checkpoint as checkpoints
from histostream.training import methods
from histostream.training.checkpoint import Checkpoint, CheckpointError
from histostream.wsi.errors import OutputError
from histostream.wsi.sink import ClassInfo

TILE_PX = 512


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


def export_bundle(
    method_name: str, run: Path | None, out: Path, *, tile_px: int = TILE_PX
) -> ModelCard:
    """Export a checkpoint to the bundle ``out``.

    Parameters
    ----------
    method_name
        Name of the method; the checkpoint has to be one of it.
    run
        Folder of a training run or of a checkpoint; None takes the weights that ship.
    out
        Folder to write; an existing bundle there is replaced once the new one is whole.
    tile_px
        Side of the network's input.

    Raises
    ------
    CheckpointError
        If the checkpoint is missing, damaged or of another method.
    GraphError, ParityError
        If the exported graph may not be deployed, or does not compute the same.
    OutputError
        If ``out`` is something else than a bundle, or cannot be written.
    """
    method = methods.load(method_name)
    folder = shipped_checkpoint(method_name) if run is None else find_checkpoint(run)
    said = checkpoints.read(folder)
    if said.method != method_name:
        raise CheckpointError(f"{folder}: trained by {said.method!r}, not {method_name!r}")
    if out.exists() and not (out.is_dir() and ((out / "card.json").exists() or _empty(out))):
        raise OutputError(f"{out}: exists and is not a model bundle; choose another folder")
    try:
        config = method.Config(**said.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its config does not fit {method_name}: {error}"
        ) from error
    state = method.build(config, len(said.classes), said.channels)
    checkpoints.load(folder, state)
    module = method.deployed(state)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
    try:
        card = _write(part, module, said, method.SCORE_KIND, tile_px, checkpoints.read_note(folder))
        _publish(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return card


def _write(
    part: Path, module: nn.Module, said: Checkpoint, score_kind: str, tile_px: int, note: str
) -> ModelCard:
    path = part / "model.onnx"
    export_onnx(module, path, channels=said.channels, tile_px=tile_px)
    network = next(iter(module.children()))
    align_px = int(getattr(network, "stride_px", 1))
    card = ModelCard(
        method=said.method,
        classes=tuple(ClassInfo(name, color) for name, color in said.classes),
        mpp=said.mpp,
        channels=said.channels,
        tile_px=tile_px,
        align_px=align_px,
        halo_px=halo_px(network, said.channels, align_px),
        tile_statistics=depends_on_tile_statistics(network),
        score_kind=score_kind,
        files={path.name: hashlib.sha256(path.read_bytes()).hexdigest()},
        opset=OPSET,
        training={**said.record, "step": said.step},
        note=note,
    )
    write_card(card, part)
    engine = open_engine(part, backend="cpu")
    tiles = demo_tiles(tile_px, said.channels, said.mpp)
    report = compare(module, engine, tiles, agreement=FP32_AGREEMENT)
    engine.close()
    card = replace(card, parity={path.name: {"torch": torch.__version__, **report.as_dict()}})
    write_card(card, part)
    return card


def _publish(part: Path, out: Path) -> None:
    try:
        part.chmod(0o755)  # mkdtemp makes it private
        if out.exists():
            old = part.with_name(f"{part.name}.old")
            out.rename(old)
            part.rename(out)
            shutil.rmtree(old)
        else:
            part.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error


def _empty(folder: Path) -> bool:
    return not any(folder.iterdir())

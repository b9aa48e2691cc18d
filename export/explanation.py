"""The graph with which a method explains its labels, as one ONNX file beside its bundle.

::

    histo-export explanation runs/translation absence.onnx

Not every method has one: it offers ``explained(state)``, and names what that needs in
``EXPLAINED_BY``. That of image-to-image translation paints the image without its target. Input is
``tiles``, uint8 (N, H, W, C); output ``images``, uint8 (N, C, H, W).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from histostream.export.bundle import TILE_PX
from histostream.export.graph.from_torch import to_onnx, write_model
from histostream.export.parity import check_images
from histostream.export.trained import check_tile, config_of, find_checkpoint, own_tile_px
from histostream.training import checkpoint as checkpoints
from histostream.training import methods
from histostream.training.checkpoint import CheckpointError


def export_explanation(run: Path, out: Path, *, tile_px: int | None = None) -> onnx.ModelProto:
    """Export the explaining graph of a trained run; it has to paint what torch does.

    Parameters
    ----------
    run
        Folder of a training run, or of a checkpoint with all its networks, as a run leaves it.
    out
        The file to write; one that is there is replaced when the new one is whole.
    tile_px
        Side of the tiles; None: the one that the network is built for, else 512.

    Raises
    ------
    CheckpointError
        If the method has no such graph, or the checkpoint lacks a network of it.
    DataError, GraphError
        If the model has no such graph, does not take the tile, or cannot be exported.
    ParityError
        If the graph does not paint what torch does.
    OutputError
        If the file cannot be written.
    """
    folder = find_checkpoint(run)
    said = checkpoints.read(folder)
    method = methods.load_method(said.method)
    if not hasattr(method, "explained"):
        raise CheckpointError(
            f"{folder}: {said.method} has no graph that explains its labels; use a run of translation"
        )
    state = method.build(config_of(folder, said), len(said.classes), said.channels)
    # What explains need not be among what is deployed, but it has to be in the checkpoint.
    checkpoints.load(folder, replace(state, needed=method.EXPLAINED_BY))
    module: nn.Module = method.explained(state)
    side = own_tile_px(module) or TILE_PX if tile_px is None else tile_px
    check_tile(module, side)
    shape = (2, side, side, said.channels)
    tiles = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    model = to_onnx(module, (tiles,), {"tiles": tiles}, "images")
    with torch.no_grad():
        wanted = module(tiles).numpy()
    check_images(model, {"tiles": tiles.numpy()}, wanted, "explanation")
    write_model(model, out)
    return model

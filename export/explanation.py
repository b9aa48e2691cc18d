"""Export the graph that explains the labels of a method, as one ONNX file.

::

    histo-export explanation runs/translation absence.onnx

A method that has such a graph offers ``explained(state)``, and lists the networks that it needs in ``EXPLAINED_BY``.
Image-to-image translation paints the image without its target. Input ``tiles``: uint8 (N, H, W, C); output ``images``:
uint8 (N, C, H, W).
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
    """Export the explaining graph of a trained run; it must paint the same images as torch.

    Parameters
    ----------
    run
        Folder of a training run, or of a checkpoint with all its networks.
    out
        File to write; an existing one is replaced once the new one is complete.
    tile_px
        Side of the tiles; None: the one that the network is built for, else 512.

    Raises
    ------
    CheckpointError
        If the method has no such graph, or the checkpoint lacks a network of it.
    GraphError
        If the network does not take the tile size, or cannot be exported.
    ParityError
        If the graph does not paint the same images as torch.
    OutputError
        If the file cannot be written.
    """
    folder = find_checkpoint(run)
    checkpoint = checkpoints.read(folder)
    method = methods.load_method(checkpoint.method)
    if not hasattr(method, "explained"):
        raise CheckpointError(
            f"{folder}: {checkpoint.method} has no graph that explains its labels; use a run of translation"
        )
    state = method.build(config_of(folder, checkpoint), len(checkpoint.classes), checkpoint.channels)
    # These networks may differ from the deployed ones, but must be in the checkpoint.
    checkpoints.load(folder, replace(state, needed=method.EXPLAINED_BY))
    module: nn.Module = method.explained(state)
    side = own_tile_px(module) or TILE_PX if tile_px is None else tile_px
    check_tile(module, side)
    shape = (2, side, side, checkpoint.channels)
    tiles = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    model = to_onnx(module, (tiles,), {"tiles": tiles}, "images")
    with torch.no_grad():
        expected = module(tiles).numpy()
    check_images(model, {"tiles": tiles.numpy()}, expected, "explanation")
    write_model(model, out)
    return model

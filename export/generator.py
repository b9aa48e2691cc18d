"""Export the generators of a pyramid GAN as one ONNX graph, to sample images without torch.

::

    histo-export generator runs/pyramid generator.onnx --tile 512

Inputs are the masks ``mask_3`` ... ``mask_0``, one-hot float32 (N, K, h, w), coarsest first, and the noise ``noise_3``
... ``noise_0``, float32 (N, C, h, w) of standard deviation 1; level n has 1 / 2^n of the tile's side. Output is
``images``, uint8 (N, H, W, C). The graph is deterministic: the same noise gives the same images.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import Tensor

from histostream.export.bundle import TILE_PX
from histostream.export.graph.from_torch import to_onnx, write_model
from histostream.export.graph.model import GraphError
from histostream.export.parity import check_images
from histostream.training.methods.pyramid_gan.networks import one_hot_levels
from histostream.training.methods.pyramid_gan.sample import Painter, open_painter


def export_generator(run: Path, out: Path, *, tile_px: int | None = None) -> onnx.ModelProto:
    """Export the generators of a trained run; they must paint the same images as torch.

    Parameters
    ----------
    run
        Folder of a training run or of a checkpoint.
    out
        File to write; an existing one is replaced once the new one is complete.
    tile_px
        Side of the images; None: 512.

    Raises
    ------
    CheckpointError
        If the run has no trained generators.
    GraphError
        If the generators do not take the tile size, or cannot be exported.
    ParityError
        If the graph does not paint the same images as torch.
    OutputError
        If the file cannot be written.
    """
    painter = open_painter(run)
    inputs = example_inputs(painter, TILE_PX if tile_px is None else tile_px)
    values = list(inputs.values())
    levels = painter.config.levels
    model = to_onnx(painter.network, (values[:levels], values[levels:]), inputs, "images")
    with torch.no_grad():
        expected = painter.network(values[:levels], values[levels:]).numpy()
    check_images(model, {k: v.numpy() for k, v in inputs.items()}, expected, "generator")
    write_model(model, out)
    return model


def example_inputs(painter: Painter, tile_px: int) -> dict[str, Tensor]:
    """Return random masks and noise for two images, by the names of the graph's inputs.

    Raises
    ------
    GraphError
        If the network does not take the tile size.
    """
    if tile_px < 1 or tile_px % painter.align_px:
        raise GraphError(f"tile of {tile_px} px: these generators take multiples of {painter.align_px}")
    source = torch.Generator().manual_seed(0)
    classes, channels = len(painter.checkpoint.classes), painter.checkpoint.channels
    labels = torch.randint(classes, (2, tile_px, tile_px), generator=source)
    masks = one_hot_levels(labels, classes, painter.config.levels)
    inputs = {f"mask_{n}": mask for n, mask in reversed(list(enumerate(masks)))}
    for n in range(len(masks) - 1, -1, -1):
        shape = (2, channels, tile_px >> n, tile_px >> n)
        inputs[f"noise_{n}"] = torch.randn(shape, generator=source)
    return inputs

"""Slides and networks of any size to measure with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

import imagecodecs
import tifffile
import torch

from histostream.training import checkpoint
from histostream.training.checkpoint import Checkpoint
from histostream.training.methods.imems import method as imems
from histostream.training.networks.unet import UNet
from histostream.wsi.synthetic import SyntheticSlide

PATCH_PX = 2048
TILE_PX = 256
CLASSES = [("background", (255, 255, 255)), ("nucleus", (30, 100, 220))]


def write_repeated(path: Path, width: int, height: int, seed: int = 0) -> None:
    """Write a tiled JPEG TIFF that repeats one synthetic patch; each of its tiles is encoded once."""
    slide = SyntheticSlide(4 * PATCH_PX, 4 * PATCH_PX, seed=seed)
    patch, _ = slide.region(2 * PATCH_PX, 2 * PATCH_PX, PATCH_PX, PATCH_PX)
    starts = range(0, PATCH_PX, TILE_PX)
    encoded = [
        [bytes(imagecodecs.jpeg8_encode(patch[y : y + TILE_PX, x : x + TILE_PX], level=85)) for x in starts]
        for y in starts
    ]

    def tiles() -> Iterator[bytes]:
        for y in range(height // TILE_PX):
            for x in range(width // TILE_PX):
                yield encoded[y % len(starts)][x % len(starts)]

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            tiles(),
            shape=(height, width, 3),
            dtype="uint8",
            tile=(TILE_PX, TILE_PX),
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
        )


def save_untrained(folder: Path, config: imems.Config, *, head_gain: float = 1.0) -> int:
    """Save a checkpoint of an untrained iMEMS network; return the number of its generator's parameters.

    The scores of an untrained network are nearly equal for all classes; a ``head_gain`` above 1 spreads them, so that
    parity can be checked.
    """
    torch.manual_seed(0)
    state = imems.build(config, len(CLASSES))
    generator = cast("UNet", state.modules["generator"])
    with torch.no_grad():
        generator.head.weight.mul_(head_gain)
    saved = Checkpoint("imems", asdict(config), CLASSES, 3, 0.5, 0, {})
    checkpoint.save(folder, saved, state, optimizers=False)
    return sum(p.numel() for p in generator.parameters())

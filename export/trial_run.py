"""Run a bundle once as ``histo-infer`` does, before it is handed over."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard, read_card
from histostream.runtime.choices import PRECISIONS
from histostream.runtime.engines.base import Engine, to_channels
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.options import Options
from histostream.runtime.pixels import segment_pixels
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.errors import HistoError
from histostream.wsi.outputs.label_rows import NOT_ANALYSED
from histostream.wsi.slides.channels import takes_colors


class TrialError(HistoError, RuntimeError):
    """A bundle does not run as it would be run."""


def run_on_two_tiles(bundle: Path, tile: NDArray[np.uint8]) -> None:
    """Run every graph of a bundle on the CPU, on a slide of two overlapping tiles.

    The options are the default ones, but for tissue, which is not looked for: the network has to be run.

    Parameters
    ----------
    bundle
        Its folder.
    tile
        (tile_px, tile_px, C) uint8, pixels that the network can be run on; the slide is made of them.

    Raises
    ------
    TrialError
        If the run fails, or labels are missing.
    """
    card = read_card(bundle)
    pixels = np.concatenate([tile, tile[:, ::-1]], axis=1)[:, : card.tile_px + card.tile_px // 3 + 1]
    for precision in PRECISIONS:
        if precision not in card.precisions:
            continue
        try:
            engine = open_engine(bundle, backend="cpu", precision=precision)
            try:
                labels = _labels(pixels, engine, card)
            finally:
                engine.close()
        except (HistoError, RuntimeError, ValueError) as error:
            raise TrialError(
                f"{precision}: the bundle does not run on a slide of {pixels.shape[1]} x {pixels.shape[0]} px with the "
                f"default options ({error}); nothing was written: report it, with the model"
            ) from error
        if labels.shape != pixels.shape[:2] or labels[labels != NOT_ANALYSED].max(initial=0) >= len(card.classes):
            raise TrialError(f"{precision}: the labels of a slide do not cover it, or are of no class; report it")


def _labels(pixels: NDArray[np.uint8], engine: Engine, card: ModelCard) -> NDArray[np.uint8]:
    """Return the labels (H, W) of a slide with these pixels; it is a file if they are RGB or grey."""
    if not takes_colors(card.channels):
        return segment_pixels(pixels, engine)
    height, width = pixels.shape[:2]
    with tempfile.TemporaryDirectory(prefix="histo-trial-") as folder:
        path = Path(folder) / "two-tiles.tif"
        tifffile.imwrite(path, to_channels(pixels, 3), photometric="rgb", tile=(256, 256))
        result = segment_slide(path, engine, Path(folder) / "out", Options(mpp=card.mpp, tissue=False))
        return np.asarray(result.labels[:height, :width])

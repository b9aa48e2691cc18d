"""Images that are in memory through a model, without a slide and without files."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.choices import AUTO
from histostream.runtime.engines.base import Engine
from histostream.runtime.layout import lay_tiles
from histostream.runtime.options import Options
from histostream.runtime.stream.column_band import HostStream
from histostream.runtime.stream.context import StageSeconds
from histostream.wsi.outputs.label_rows import LabelRows
from histostream.wsi.tiling.grid import Strip


def segment_pixels(pixels: NDArray[np.uint8], engine: Engine, *, blend: str = AUTO) -> NDArray[np.uint8]:
    """Segment an image that is in memory, at the model's resolution.

    Parameters
    ----------
    pixels
        (H, W, C) uint8.
    engine
        The network.
    blend
        Window of the weighted sum, as in `Options`.

    Returns
    -------
    (H, W) uint8, the class of each pixel.

    Raises
    ------
    BlendError
        If the blending does not fit the model.

    Examples
    --------
    >>> from histostream.runtime import default_bundle, open_engine
    >>> engine = open_engine(default_bundle(), backend="cpu")
    >>> segment_pixels(np.full((200, 300, 3), 240, np.uint8), engine).max()  # glass
    np.uint8(0)
    """
    rows = _pixel_rows(pixels, engine, blend, probabilities=False)
    return np.concatenate([row.labels for row in rows])


def score_pixels(pixels: NDArray[np.uint8], engine: Engine, *, blend: str = AUTO) -> NDArray[np.uint16]:
    """Return the blended scores of an image that is in memory, (H, W, K) uint16, ``round(65535 p)``.

    Parameters and errors are those of `segment_pixels`.
    """
    rows = _pixel_rows(pixels, engine, blend, probabilities=True)
    return np.concatenate([row.probabilities for row in rows if row.probabilities is not None])


def _pixel_rows(pixels: NDArray[np.uint8], engine: Engine, blend: str, *, probabilities: bool) -> list[LabelRows]:
    height, width = pixels.shape[:2]
    options = Options(blend=blend, probabilities=probabilities).for_model(engine.card)
    grid = lay_tiles(width, height, engine.card, options)
    stream = HostStream(engine, grid, options, StageSeconds())
    strip = Strip(0, 0, pixels)
    rows = []
    for row in range(len(grid.ys)):
        for _ in stream.feed(strip, grid.row(row)):
            pass
        rows += stream.finish_row(row)
    return rows

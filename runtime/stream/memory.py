"""How much memory a column band takes, and bands that keep a slide within a bound."""

from __future__ import annotations

import numpy as np

from histostream.runtime.engines.base import Engine
from histostream.runtime.process_memory import MIB, MemoryLimitError, resident_bytes
from histostream.wsi.outputs.journal import WAITING
from histostream.wsi.outputs.memory_needs import BAND_ALIGN_PX, MemoryNeeds
from histostream.wsi.outputs.sinks.overview import overview_size
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.tiling.grid import TileGrid

INDEX_BYTES = 32  # of each tile of labels.tif, on all levels
SLACK = 1.15  # allocator and small temporaries, over the buffers that are counted


def plan_bands(
    grid: TileGrid,
    view: SlideView,
    engine: Engine,
    max_memory_mib: int | None,
    *,
    batch: int,
    probabilities: bool,
    needs: MemoryNeeds,
) -> list[tuple[int, int]]:
    """Divide a slide into column bands that fit the bound on memory.

    The network is run first, so that what it takes itself is measured, not guessed.

    Parameters
    ----------
    grid, view, engine
        The tiles, the slide and the network.
    max_memory_mib
        The bound; None: there is none.
    batch
        Tiles per inference.
    probabilities
        Whether scores are kept.
    needs
        Memory of the CRF and of output files.

    Returns
    -------
    (x0, x1) of each band, left to right; one band where there is no bound.

    Raises
    ------
    MemoryLimitError
        If not even a band of 512 px fits; the message says what would.
    """
    if max_memory_mib is None:
        return [(0, grid.width)]
    card = engine.card
    for _ in range(2):  # ONNX Runtime plans its memory in the first run, and takes it in the next
        engine.infer(np.zeros((batch, card.tile_px, card.tile_px, card.channels), np.uint8))
    align_px = needs.align_px
    per_column = bytes_per_column(grid, view, len(card.classes), probabilities)
    per_column += SLACK * needs.bytes_per_column
    # A band also holds the tiles that reach into it from both sides.
    margin = 2 * (grid.tile_px + needs.margin_px) * per_column
    margin += needs.bytes_at_once + sink_bytes(view, len(card.classes))
    room = max_memory_mib * MIB - resident_bytes() - margin
    widest = int(room / per_column) // align_px * align_px
    if widest < align_px:
        least = (resident_bytes() + margin + align_px * per_column) / MIB
        raise MemoryLimitError(
            f"--max-memory {max_memory_mib}: one band of this slide takes {least:.0f} MiB; "
            f"give at least {int(least * 1.05) + 1}"
        )
    count = -(-grid.width // widest)
    even = -(-grid.width // count // align_px) * align_px
    return [(x, min(x + even, grid.width)) for x in range(0, grid.width, even)]


def bytes_per_column(grid: TileGrid, view: SlideView, classes: int, probabilities: bool) -> float:
    """Return the bytes that one column of pixels takes in all buffers of a run."""
    block_height = view.slide.block_px[view.level][1]
    native_rows = (grid.tile_px * view.scale + 2 * block_height) * view.scale
    strips = 3 * grid.tile_px * view.channels  # in use, ready, and being read
    sums = 4 * classes * grid.tile_px  # rows are finished in small pieces, see `blend`
    labels = 2 * grid.tile_px + BAND_ALIGN_PX
    scores = 2 * classes * (grid.tile_px + BAND_ALIGN_PX) if probabilities else 0
    # The journal's copies: those that wait, and the one that is written.
    copies = (WAITING + 1) * grid.tile_px * (1 + (2 * classes if probabilities else 0))
    return SLACK * (native_rows * view.channels + strips + sums + labels + scores + copies)


def sink_bytes(view: SlideView, classes: int) -> int:
    """Return the bytes that the overview and the index of tiles take, which do not depend on the band."""
    width, height = overview_size(view.width, view.height)
    tiles = -(-view.width // BAND_ALIGN_PX) * -(-view.height // BAND_ALIGN_PX)
    return 4 * (classes + 1) * width * height + INDEX_BYTES * tiles

"""How much memory a run takes, and column bands that keep it within a bound."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histostream.runtime.engines.base import Engine
from histostream.wsi.errors import HistoError
from histostream.wsi.outputs.journal import WAITING
from histostream.wsi.outputs.sinks.overview import overview_size
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.tiling.grid import TileGrid

MIB = 1024 * 1024
M_MMAP_THRESHOLD = -3  # malloc.h
BAND_ALIGN_PX = 512  # sinks take bands at multiples of their tile
INDEX_BYTES = 32  # of each tile of labels.tif, on all levels
SLACK = 1.15  # allocator and small temporaries, over the buffers that are counted


class MemoryLimitError(HistoError, ValueError):
    """The bound on memory is below what the narrowest band takes."""


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What a further stage needs of a column band.

    Attributes
    ----------
    align_px
        Bands begin at multiples of this, itself a multiple of `BAND_ALIGN_PX`.
    margin_px
        Columns that it sees beyond each edge.
    bytes_per_column, bytes_at_once
        Memory that it takes for each column of pixels, and in all.
    """

    align_px: int = BAND_ALIGN_PX
    margin_px: int = 0
    bytes_per_column: int = 0
    bytes_at_once: int = 0

    def __add__(self, other: MemoryNeeds) -> MemoryNeeds:
        return MemoryNeeds(
            max(self.align_px, other.align_px),
            max(self.margin_px, other.margin_px),
            self.bytes_per_column + other.bytes_per_column,
            self.bytes_at_once + other.bytes_at_once,
        )


def plan_bands(
    grid: TileGrid,
    view: SlideView,
    engine: Engine,
    max_memory_mib: int | None,
    *,
    batch: int,
    probabilities: bool,
    further: MemoryNeeds | None = None,
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
    further
        What else is done with a band.

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
    further = further or MemoryNeeds()
    align_px = further.align_px
    per_column = bytes_per_column(grid, view, len(card.classes), probabilities)
    per_column += SLACK * further.bytes_per_column
    # A band also holds the tiles that reach into it from both sides.
    margin = 2 * (grid.tile_px + further.margin_px) * per_column
    margin += further.bytes_at_once + sink_bytes(view, len(card.classes))
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
    """Bytes that one column of pixels takes in all buffers of a run."""
    block_height = view.slide.block_px[view.level][1]
    native_rows = (grid.tile_px * view.scale + 2 * block_height) * view.scale
    strips = 3 * grid.tile_px * view.channels  # in use, ready, and being read
    sums = 4 * classes * grid.tile_px  # what rows are finished with is of pieces, see `blend`
    labels = 2 * grid.tile_px + BAND_ALIGN_PX
    scores = classes * (grid.tile_px + BAND_ALIGN_PX) if probabilities else 0
    # The journal's copies, those that wait and the one that is written.
    copies = (WAITING + 1) * grid.tile_px * (1 + (classes if probabilities else 0))
    return SLACK * (native_rows * view.channels + strips + sums + labels + scores + copies)


def sink_bytes(view: SlideView, classes: int) -> int:
    """Bytes that the sinks hold of the whole slide: the overview's counts, an index of tiles."""
    width, height = overview_size(view.width, view.height)
    tiles = -(-view.width // BAND_ALIGN_PX) * -(-view.height // BAND_ALIGN_PX)
    return 4 * (classes + 1) * width * height + INDEX_BYTES * tiles


def return_buffers_at_once() -> None:
    """Let the C library give large freed buffers back to the system (glibc; elsewhere nothing).

    By default glibc learns to keep them, in one arena per thread.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MIB)


def physical_bytes() -> float:
    """Memory of this machine; infinity where the system does not say (Windows)."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def resident_bytes() -> int:
    """Memory of this process now; where the system does not say, its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return int((peak_memory_mib() or 300) * MIB)
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory_mib() -> float | None:
    """Peak memory of this process in MiB; None where the system does not say (Windows)."""
    # Not getrusage on Linux: its peak counts the process that started this one, until its exec.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (MIB if sys.platform == "darwin" else 1024), 1)

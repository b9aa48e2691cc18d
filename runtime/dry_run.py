"""What ``histo-infer --dry-run`` does: look at slides and say what a run would do, and take."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.engines.base import Engine
from histostream.runtime.layout import lay_out
from histostream.runtime.messages import duration
from histostream.runtime.options import Options
from histostream.runtime.slide_job import SlideJob
from histostream.wsi.errors import HistoError, printable
from histostream.wsi.outputs.journal import Journal
from histostream.wsi.outputs.sinks import find_sink
from histostream.wsi.outputs.sinks.pyramid import LABEL_BYTES
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.sources.base import is_remote

# Bytes of probabilities.tif for each analysed pixel and class, as CMU-1-Small-Region.svs has them with the
# nucleus model: tests/robustness/results/outputs-cpu.json. Other tissue differs.
SCORE_BYTES = 0.54
# Reading, blending and writing beside the network: benchmarks/results/stream-cpu.json has 1.04.
OVERHEAD = 1.1


@dataclass(frozen=True, slots=True)
class SlidePlan:
    """What running one slide would mean.

    Attributes
    ----------
    source
        The slide, as it was named.
    folder
        Where results would be.
    state
        "new", "begun" (a run was broken off), "done" (nothing would be done), or "remote" (it
        would be downloaded first, and was not looked at).
    reader
        Which reader opens it.
    width, height, slide_mpp
        Size in pixels, and um per pixel, of level 0; None where it was not opened.
    level, levels, scale
        Level that is read, how many there are, and its pixels for one pixel of the model.
    tiles, tiles_in_all
        Tiles that the network would see, and tiles with the glass.
    seconds
        Estimated time, without what is shared with other slides.
    disk_bytes
        Estimated size of the results.
    problem
        Why it cannot be run; "" if it can.
    """

    source: str
    folder: str
    state: str = "new"
    reader: str = ""
    width: int | None = None
    height: int | None = None
    slide_mpp: float | None = None
    level: int | None = None
    levels: int | None = None
    scale: float | None = None
    tiles: int = 0
    tiles_in_all: int = 0
    seconds: float = 0.0
    disk_bytes: int = 0
    problem: str = ""

    def __str__(self) -> str:
        """Write it as one line."""
        name = printable(self.source.rstrip("/").rpartition("/")[2])
        if self.problem:
            return f"{name}: problem: {self.problem}"
        if self.state == "done":
            return f"{name}: done already, nothing to do -> {self.folder}"
        if self.state == "remote":
            return f"{name}: would be downloaded first, not looked at -> {self.folder}"
        resumed = ", goes on where a former run stopped" if self.state == "begun" else ""
        return (
            f"{name}: {self.reader} reader, {self.width} x {self.height} px at "
            f"{self.slide_mpp:.4g} um/px, level {self.level} of {self.levels} at 1/{self.scale:.3g}"
            f"; {self.tiles} of {self.tiles_in_all} tiles, about {duration(self.seconds)}, "
            f"{size(self.disk_bytes)}{resumed} -> {self.folder}"
        )


def plan_slides(jobs: Sequence[SlideJob], engine: Engine, devices: int = 1) -> Iterator[SlidePlan]:
    """Look at each slide; nothing is written.

    Parameters
    ----------
    jobs
        The slides, and how they would be run.
    engine
        The network; it is run twice on an empty batch, to measure its speed.
    devices
        How many like it would share the work.
    """
    seconds = seconds_of_tile(engine) * OVERHEAD / devices
    for job in jobs:
        source, folder = job.source, str(job.folder)
        try:
            yield _plan_slide(job, source, engine.card, seconds)
        except HistoError as error:
            yield SlidePlan(source, folder, problem=str(error))


def seconds_of_tile(engine: Engine) -> float:
    """Measure how long the network takes for a tile, in a full batch."""
    card, n = engine.card, engine.batch
    tiles = np.full((n, card.tile_px, card.tile_px, card.channels), 128, np.uint8)
    engine.infer(tiles)  # the first run also plans memory
    start = time.perf_counter()
    engine.infer(tiles)
    return (time.perf_counter() - start) / n


def not_enough_disk(plans: Sequence[SlidePlan], out: Path) -> str:
    """Return a message if the results would not fit on the drive; "" if they would."""
    needed = sum(plan.disk_bytes for plan in plans)
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed <= free:
        return ""
    return (
        f"{out}: the results take about {size(needed)}, and {size(free)} are free there; "
        "free some, or name another --out"
    )


def _plan_slide(job: SlideJob, source: str, card: ModelCard, seconds_of_a_tile: float) -> SlidePlan:
    folder, options = str(job.folder), job.options
    if is_remote(job.slide.source):
        return SlidePlan(source, folder, "remote")
    if job.is_done(card):
        return SlidePlan(source, folder, "done")
    begun = not job.restart and Journal(job.folder).read() is not None
    with open_slide(Path(job.slide.source)) as slide:
        layout = lay_out(slide, card, options)
        view, grid = layout.view, layout.grid
        tiles = len(grid)
        share = tiles / max(len(grid.xs) * len(grid.ys), 1)
        disk_bytes = _disk_bytes(view.width * view.height * share, len(card.classes), options)
        return SlidePlan(
            source,
            folder,
            "begun" if begun else "new",
            slide.name,
            slide.levels[0].width,
            slide.levels[0].height,
            options.mpp or slide.mpp,
            view.level,
            len(slide.levels),
            view.scale,
            tiles,
            len(grid.xs) * len(grid.ys),
            tiles * seconds_of_a_tile,
            disk_bytes,
        )


def _disk_bytes(pixels: float, classes: int, options: Options) -> int:
    """Estimate the size of the results of so many analysed pixels."""
    kinds = [*options.object_sinks(), *(find_sink("rasters", name) for name in options.rasters)]
    bytes_per_px = LABEL_BYTES + sum(kind.bytes_per_px for kind in kinds)
    if options.probabilities:
        bytes_per_px += SCORE_BYTES * classes
    return math.ceil(bytes_per_px * pixels)


def size(count: float) -> str:
    """Write a number of bytes as people read it.

    Examples
    --------
    >>> size(900), size(2_400_000), size(3.2e9)
    ('900 B', '2.4 MB', '3.2 GB')
    """
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.1f} {unit}"
    return f"{count:.0f} B"

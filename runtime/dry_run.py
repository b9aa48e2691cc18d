"""The plan of a run for ``histo-infer --dry-run``: what would be done, and estimates of time and disk space."""

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
from histostream.runtime.layout import lay_out, open_for_model
from histostream.runtime.options import Options
from histostream.runtime.slide_job import SlideJob
from histostream.wsi.errors import HistoError, printable, unreadable
from histostream.wsi.outputs.journal import Journal
from histostream.wsi.outputs.sinks import find_sink
from histostream.wsi.outputs.sinks.pyramid import LABEL_BYTES
from histostream.wsi.report.figures import rough_duration, size
from histostream.wsi.slides.sources.base import is_remote

# Bytes of probabilities.tif per analysed pixel and class, measured on CMU-1-Small-Region.svs with the
# nucleus model: tests/robustness/results/outputs-cpu.json. Other tissue differs.
SCORE_BYTES = 1.7
# Time for reading, blending and writing in addition to the network: benchmarks/results/stream-cpu.json has 1.04.
OVERHEAD = 1.1


@dataclass(frozen=True, slots=True)
class SlidePlan:
    """The plan for one slide.

    Attributes
    ----------
    source
        The slide, as the user named it.
    folder
        Its output folder.
    state
        "new", "begun" (a run was interrupted), "done" (nothing to do), or "remote" (it would be
        downloaded first, and is not opened now).
    reader
        Name of the reader that opens it.
    width, height, slide_mpp
        Size in pixels and um per pixel of level 0; None if it was not opened.
    level, levels, scale
        Level that is read, number of levels, and pixels of the level per pixel of the model.
    tiles, tiles_in_all
        Tiles for the network, and tiles including those on glass.
    seconds
        Estimated time, as if the slide had the devices for itself.
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
        """Return the plan as one line."""
        name = printable(self.source.rstrip("/").rpartition("/")[2])
        if self.problem:
            return f"{name}: problem: {self.problem}"
        if self.state == "done":
            return f"{name}: done already, nothing to do -> {self.folder}"
        if self.state == "remote":
            return f"{name}: would be downloaded first, not opened -> {self.folder}"
        resumed = ", resumes an interrupted run" if self.state == "begun" else ""
        nothing = "" if self.tiles else "no tissue, nothing to analyse: "
        return (
            f"{name}: {self.reader} reader, {self.width} x {self.height} px at "
            f"{self.slide_mpp:.4g} um/px, level {self.level} of {self.levels} at 1/{self.scale:.3g}"
            f"; {nothing}{self.tiles} of {self.tiles_in_all} tiles, about {rough_duration(self.seconds)}, "
            f"{size(self.disk_bytes)}{resumed} -> {self.folder}"
        )


def plan_slides(jobs: Sequence[SlideJob], engine: Engine, devices: int = 1) -> Iterator[SlidePlan]:
    """Plan each slide; nothing is written.

    Parameters
    ----------
    jobs
        The slides.
    engine
        The network; it is run twice on an empty batch, to measure its speed.
    devices
        Number of such engines that share the work.
    """
    seconds = seconds_of_tile(engine) * OVERHEAD / devices
    for job in jobs:
        try:
            yield _plan_slide(job, engine.card, seconds)
        except HistoError as error:
            yield SlidePlan(job.source, str(job.folder), problem=str(error))
        except OSError as error:
            yield SlidePlan(job.source, str(job.folder), problem=str(unreadable(job.source, error)))


def seconds_of_tile(engine: Engine) -> float:
    """Measure the seconds per tile of a full batch."""
    card, n = engine.card, engine.batch
    tiles = np.full((n, card.tile_px, card.tile_px, card.channels), 128, np.uint8)
    engine.infer(tiles)  # the first run also plans memory
    start = time.perf_counter()
    engine.infer(tiles)
    return (time.perf_counter() - start) / n


def not_enough_disk(plans: Sequence[SlidePlan], out: Path) -> str:
    """Return an error message if the results do not fit on the drive of ``out``; "" if they do."""
    needed = sum(plan.disk_bytes for plan in plans)
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed <= free:
        return ""
    return (
        f"{out}: the results need about {size(needed)}, but {size(free)} are free there; "
        "free some space, or name another --out"
    )


def _plan_slide(job: SlideJob, card: ModelCard, seconds_per_tile: float) -> SlidePlan:
    source, folder = job.source, str(job.folder)
    if job.slide.problem:
        return SlidePlan(source, folder, problem=job.slide.problem)
    options = job.options.for_model(card)
    if is_remote(job.slide.source):
        return SlidePlan(source, folder, "remote")
    if job.is_done(card):
        return SlidePlan(source, folder, "done")
    is_begun = not job.restart and Journal(job.folder).read() is not None
    with open_for_model(Path(job.slide.source), card, options) as slide:
        layout = lay_out(slide, card, options)
        view, grid = layout.view, layout.grid
        tiles, tiles_in_all = len(grid), len(grid.xs) * len(grid.ys)
        pixels = view.width * view.height * tiles / max(tiles_in_all, 1)
        return SlidePlan(
            source,
            folder,
            "begun" if is_begun else "new",
            slide.name,
            slide.levels[0].width,
            slide.levels[0].height,
            options.mpp or slide.mpp,
            view.level,
            len(slide.levels),
            view.scale,
            tiles,
            tiles_in_all,
            tiles * seconds_per_tile,
            _disk_bytes(pixels, len(card.classes), options),
        )


def _disk_bytes(pixels: float, classes: int, options: Options) -> int:
    """Estimate the size of the results for a number of analysed pixels."""
    kinds = [*options.object_sinks(), *(find_sink("rasters", name) for name in options.rasters)]
    bytes_per_px = LABEL_BYTES + sum(kind.bytes_per_px for kind in kinds)
    if options.probabilities:
        bytes_per_px += SCORE_BYTES * classes
    return math.ceil(bytes_per_px * pixels)

"""A slide through a model: read, predict, blend, write; memory bounded by rows, not by area.

::

    read_strips     every source block decoded once, ahead of need, in threads
      predict       every tile inferred once
        Blender     weighted sums over a ring of rows; finished rows leave
          sinks     every output row written once

There is one way through, and each stage is a generator or an object that is fed.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.blend import Blender, check_blend, exact_overlap_px
from histostream.runtime.card import ModelCard
from histostream.runtime.engine import Engine
from histostream.runtime.memory import peak_memory_mib, plan_bands
from histostream.wsi.errors import HistoError, SlideError
from histostream.wsi.grid import Box, Strip, Tile, TileGrid
from histostream.wsi.reader import SlideReader, open_slide
from histostream.wsi.resolution import SlideView, at_mpp, thumbnail
from histostream.wsi.sink import OUTSIDE, OutputFolder, SlideInfo
from histostream.wsi.sinks.overview import Overview, overview_size
from histostream.wsi.sinks.summary import Summary
from histostream.wsi.sinks.tiff import LabelTiff, ProbabilityTiff
from histostream.wsi.strips import cut, read_strips
from histostream.wsi.tissue import RegionOfInterest, find_tissue, read_roi

DEFAULT_OVERLAP_PX = 64
log = logging.getLogger(__name__)


class OptionError(HistoError, ValueError):
    """An option has a value that cannot work."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a slide is run; ``histo-infer`` has an option for each.

    Attributes
    ----------
    overlap_px
        Pixels that neighbouring tiles share; None: 64, or what ``blend="exact"`` needs.
    blend
        Window of the weighted sum: hann, gaussian, linear, mean, crop or exact.
    mpp
        Resolution of the slide's level 0 in um per pixel, where the file has none or a wrong one.
    roi
        GeoJSON file; only its polygons (level 0 pixels) are analysed.
    tissue
        Whether glass is left out.
    batch
        Tiles per inference; None: what suits the device.
    threads
        CPU threads for reading; None: 2.
    max_memory_mib
        Bound on the process's memory; wide slides are then run in column bands.
    probabilities
        Whether ``probabilities.tif`` is written.
    force_upsampling
        Whether a slide much coarser than the model may be enlarged.
    """

    overlap_px: int | None = None
    blend: str = "hann"
    mpp: float | None = None
    roi: Path | None = None
    tissue: bool = True
    batch: int | None = None
    threads: int | None = None
    max_memory_mib: int | None = None
    probabilities: bool = False
    force_upsampling: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "max_memory_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value}: use 1 or more")
        if self.overlap_px is not None and self.overlap_px < 0:
            raise OptionError(f"overlap_px={self.overlap_px}: use 0 or more")


@dataclass(frozen=True, slots=True)
class SlideResult:
    """What a run left behind.

    Attributes
    ----------
    folder
        Where ``labels.tif`` and the other files are.
    summary
        Area and share per class, as in ``summary.json``.
    run
        Versions, options and times, as in ``run.json``.
    """

    folder: Path
    summary: dict[str, Any]
    run: dict[str, Any]


@dataclass(slots=True)
class StageSeconds:
    """Seconds that the main thread spent in, or waited for, each stage."""

    prepare: float = 0.0
    read: float = 0.0
    infer: float = 0.0
    blend: float = 0.0
    write: float = 0.0
    finish: float = 0.0

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to one stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)


@dataclass(slots=True)
class Counts:
    """What was done, for the record and for the progress bar."""

    tiles: int = 0
    pixels: int = 0
    total_pixels: int = 0
    report: Callable[[int, int], None] = field(default=lambda done, total: None)


def segment_slide(
    path: Path,
    engine: Engine,
    out: Path,
    options: Options | None = None,
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> SlideResult:
    """Segment one slide into ``out/<slide stem>/``.

    Parameters
    ----------
    path
        The slide.
    engine
        The network, from `open_engine`.
    out
        Folder for results; a folder with the slide's name is made in it.
    options
        How to run; see `Options`.
    report
        Called with (pixels done, pixels in all), at the model's resolution.

    Raises
    ------
    SlideError
        If the slide cannot be opened or read, or has no resolution.
    BlendError, OptionError
        If an option does not fit the model.
    OutputError
        If a result cannot be written. Nothing is left under a final name then.
    """
    options = options or Options()
    started = datetime.now(UTC)
    seconds = StageSeconds()
    counts = Counts(report=report)
    clock = time.perf_counter()
    with open_slide(path) as slide, OutputFolder(out, slide_stem(path)) as folder:
        with seconds.time("prepare"):
            view = at_mpp(
                slide, engine.card.mpp, slide_mpp=options.mpp, force=options.force_upsampling
            )
            picture = thumbnail(view, max(overview_size(view.width, view.height)))
            grid, roi = plan_grid(view, engine.card, options, picture)
            bands = plan_bands(
                grid,
                view,
                engine,
                options.max_memory_mib,
                batch=options.batch or engine.batch,
                probabilities=options.probabilities,
            )
            summary = _add_sinks(folder, view, engine.card, options, picture)
            overview_blocks = slide.decoded_blocks
        counts.total_pixels = sum(_write_pixels(grid.band(x0, x1)) for x0, x1 in bands)
        for x0, x1 in bands:
            _run_band(view, grid.band(x0, x1), roi, engine, options, folder, seconds, counts)
        with seconds.time("finish"):
            folder.finish()
        record = {
            "slide": _slide_record(slide, view),
            "source_blocks_decoded": {
                "overview": overview_blocks,
                "stream": slide.decoded_blocks - overview_blocks,
            },
            "model": {"method": engine.card.method, "engine": engine.name,
                      "sha256": engine.card.files, "mpp": engine.card.mpp},
            "options": _plain(asdict(options)),
            "grid": {"tile_px": grid.tile_px, "overlap_px": grid.overlap_px,
                     "tiles": len(grid.xs) * len(grid.ys), "tiles_inferred": counts.tiles,
                     "column_bands": len(bands)},
            **_time_record(seconds, counts, time.perf_counter() - clock),
            "peak_memory_mib": peak_memory_mib(),
            "started": started.isoformat(timespec="seconds"),
            "versions": versions(),
        }  # fmt: skip
        folder.run.update(record)
    return SlideResult(folder.path, summary.as_dict(), record)


def segment_pixels(
    pixels: NDArray[np.uint8], engine: Engine, *, blend: str = "hann"
) -> NDArray[np.uint8]:
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
    """
    height, width = pixels.shape[:2]
    grid = _lay_tiles(width, height, engine.card, Options(blend=blend))
    blender = Blender(grid, len(engine.card.classes), blend)
    whole = Strip(0, 0, pixels)
    rows = []
    for row in range(len(grid.ys)):
        for tiles, scores in predict(engine, grid, whole, grid.row(row), engine.batch):
            for tile, score in zip(tiles, scores, strict=True):
                blender.add(tile, score)
        rows.append(blender.finish_row(row).labels)
    return np.concatenate(rows)


def slide_stem(path: Path) -> str:
    """Name of a slide's result folder."""
    return path.resolve().name if path.is_dir() else path.stem


def plan_grid(
    view: SlideView,
    card: ModelCard,
    options: Options,
    picture: NDArray[np.uint8] | None = None,
) -> tuple[TileGrid, RegionOfInterest | None]:
    """Lay tiles over a slide and choose those to run.

    Parameters
    ----------
    view
        The slide at the model's resolution.
    card, options
        The model, and how to run it.
    picture
        An overview (H, W, C) of the slide, where one was read already.

    Returns
    -------
    The grid, and the region of interest where one was given.

    Raises
    ------
    BlendError
        If the overlap or the blending does not fit the model.
    SlideError
        If nothing is left to analyse in the region of interest.
    """
    grid = _lay_tiles(view.width, view.height, card, options)
    roi = None if options.roi is None else read_roi(options.roi, view)
    keep = None if roi is None else roi.tiles(grid)
    if options.tissue:
        tissue = find_tissue(view, picture=picture).tiles(grid)
        keep = tissue if keep is None else keep & tissue
    if keep is None:
        return grid, roi
    if roi is not None and not keep.any():
        raise SlideError(
            f"{options.roi}: no tissue inside the region of interest; "
            "check the polygons, or pass --no-tissue to analyse glass too"
        )
    if not keep.any():
        log.warning(
            "%s: no tissue found, nothing is analysed; pass --no-tissue to analyse all of it",
            view.slide.path,
        )
    return grid.where(keep), roi


def _lay_tiles(width: int, height: int, card: ModelCard, options: Options) -> TileGrid:
    overlap_px = options.overlap_px
    if overlap_px is None:
        exact = options.blend == "exact" and not card.tile_statistics
        overlap_px = exact_overlap_px(card) if exact else min(DEFAULT_OVERLAP_PX, card.tile_px // 4)
    overlap_px = -(-overlap_px // card.align_px) * card.align_px
    check_blend(options.blend, card, overlap_px)
    return TileGrid.cover(
        width, height, tile_px=card.tile_px, overlap_px=overlap_px, align_px=card.align_px
    )


def predict(
    engine: Engine, grid: TileGrid, strip: Strip, tiles: list[Tile], batch: int
) -> Iterator[tuple[list[Tile], NDArray[np.uint8]]]:
    """Run the tiles of one row in batches.

    Yields
    ------
    The tiles of a batch, and their scores (N, K, tile_px, tile_px).
    """
    for first in range(0, len(tiles), batch):
        some = tiles[first : first + batch]
        pixels = [cut(strip, tile, width=grid.width, height=grid.height) for tile in some]
        yield some, engine.infer(to_channels(np.stack(pixels), engine.card.channels))


def to_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Turn grey pixels (..., 1) into RGB by repetition, or RGB into grey (ITU-R 601)."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    grey = pixels.astype(np.float32) @ np.array((0.299, 0.587, 0.114), np.float32)
    return np.asarray(np.floor(grey + 0.5), np.uint8)[..., None]


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    names = ("histostream", "numpy", "onnxruntime-gpu", "onnxruntime", "large-image", "tifffile")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _run_band(
    view: SlideView,
    grid: TileGrid,
    roi: RegionOfInterest | None,
    engine: Engine,
    options: Options,
    folder: OutputFolder,
    seconds: StageSeconds,
    counts: Counts,
) -> None:
    """Segment one column band of a slide, top to bottom."""
    blender = Blender(
        grid, len(engine.card.classes), options.blend, probabilities=options.probabilities
    )
    with closing(read_strips(view, grid, threads=options.threads or 2)) as strips:
        for row in range(len(grid.ys)):
            if grid.row(row):
                with seconds.time("read"):
                    tiles, strip = next(strips)
                batches = predict(engine, grid, strip, tiles, options.batch or engine.batch)
                while True:
                    with seconds.time("infer"):
                        some, scores = next(batches, ([], np.empty(0, np.uint8)))
                    if not some:
                        break
                    with seconds.time("blend"):
                        for tile, score in zip(some, scores, strict=True):
                            blender.add(tile, score)
                    counts.tiles += len(some)
                    counts.pixels += sum(_band_pixels(grid, tile) for tile in some)
                    counts.report(counts.pixels, counts.total_pixels)
            with seconds.time("blend"):
                part = blender.finish_row(row)
                if roi is not None:
                    height, width = part.labels.shape
                    part.labels[~roi.inside(Box(part.x, part.y, width, height))] = OUTSIDE
            with seconds.time("write"):
                folder.write(part)


def _add_sinks(
    folder: OutputFolder,
    view: SlideView,
    card: ModelCard,
    options: Options,
    picture: NDArray[np.uint8],
) -> Summary:
    assert view.mpp is not None  # a resolution was asked for, so the view has one
    info = SlideInfo(view.slide.path.name, view.width, view.height, view.mpp, card.classes)
    folder.add(LabelTiff(folder.path / "labels.tif", info))
    if options.probabilities:
        folder.add(ProbabilityTiff(folder.path / "probabilities.tif", info))
    folder.add(Overview(folder.path / "overview.png", info, to_channels(picture, 3)))
    return folder.add(Summary(folder.path, info))


def _band_pixels(grid: TileGrid, tile: Tile) -> int:
    width = min(tile.write.right, grid.x1) - max(tile.write.x, grid.x0)
    return max(width, 0) * tile.write.height


def _write_pixels(grid: TileGrid) -> int:
    return sum(_band_pixels(grid, tile) for tile in grid)


def _slide_record(slide: SlideReader, view: SlideView) -> dict[str, Any]:
    stat = slide.path.stat()
    return {
        "path": str(slide.path),
        "bytes": stat.st_size,
        "modified": datetime.fromtimestamp(stat.st_mtime, UTC).isoformat(timespec="seconds"),
        "reader": slide.name,
        "mpp": slide.mpp,
        "level": view.level,
        "scale": view.scale,
        "width": view.width,
        "height": view.height,
        "result_mpp": view.mpp,
    }


def _time_record(seconds: StageSeconds, counts: Counts, total: float) -> dict[str, Any]:
    stages = {name: round(value, 3) for name, value in asdict(seconds).items()}
    return {
        "seconds": {"total": round(total, 3), **stages},
        "mpx": round(counts.pixels / 1e6, 3),
        "mpx_per_s": round(counts.pixels / 1e6 / total, 3),
        "bound_by": max(stages, key=lambda name: stages[name]),
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

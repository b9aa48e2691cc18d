"""A slide through a model: read, predict, blend, write; memory bounded by rows, not by area.

::

    read_strips     every source block decoded once, ahead of need, in threads
      RowStream     every tile inferred once, and blended: weighted sums over a ring of rows
        sinks       every output row written once

There is one way through, and each stage is a generator or an object that is fed. A `RowStream` is
fed rows of tiles and gives finished rows back: `HostStream` with any engine, `DeviceStream` where
the engine runs on a GPU, with the pixels staying there from the strip to the labels.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.blend import Blender, check_blend, exact_overlap_px
from histostream.runtime.card import ModelCard
from histostream.runtime.crf.options import CrfOptions, check_memory
from histostream.runtime.crf.stream import CrfStage, widened
from histostream.runtime.device_stream import DeviceEngine, DeviceStream
from histostream.runtime.engine import Engine
from histostream.runtime.engine import to_channels as to_channels
from histostream.runtime.memory import Further, peak_memory_mib, plan_bands
from histostream.wsi.errors import HistoError, SlideError
from histostream.wsi.grid import Box, Strip, Tile, TileGrid
from histostream.wsi.reader import SlideReader, open_slide
from histostream.wsi.resolution import SlideView, at_mpp, thumbnail
from histostream.wsi.sink import OUTSIDE, OutputFolder, Segmented, SlideInfo
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
    crf
        How labels are refined by a dense CRF; None: not at all.
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
    crf: CrfOptions | None = None

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
    """Seconds that the main thread spent in, or waited for, each stage.

    On a device, infer is the time for queueing its work and waiting for it, blending included, and
    copy that for staging rows in pinned memory; on the host there is no copy.
    """

    prepare: float = 0.0
    read: float = 0.0
    copy: float = 0.0
    infer: float = 0.0
    blend: float = 0.0
    crf: float = 0.0
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
    engine: Engine | ManyDevices,
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
        The network, from `open_engine`, or a `Fleet` of several devices.
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
            if options.crf is not None:
                check_memory(options.crf, len(engine.card.classes), options.max_memory_mib)
            bands = _plan_bands(grid, view, engine, options)
            summary = _add_sinks(folder, view, engine.card, options, picture)
            overview_blocks = slide.decoded_blocks
        counts.total_pixels = sum(_write_pixels(grid.band(x0, x1)) for x0, x1 in bands)
        device: dict[str, Any] = {}
        refined: list[dict[str, int]] = []
        if isinstance(engine, ManyDevices):
            device = engine.run_bands(path, grid, roi, bands, options, folder, seconds, counts)
            refined = [found.pop("crf", {}) for found in device["devices"]]
        else:
            for x0, x1 in bands:
                band = grid.band(x0, x1)
                found = run_band(view, band, roi, engine, options, folder, seconds, counts)
                refined.append(found.pop("crf", {}))
                device = _of_all_bands(device, found)
        with seconds.time("finish"):
            folder.finish()
        record = {
            "slide": _slide_record(slide, view),
            "source_blocks_decoded": {
                "overview": overview_blocks,
                "stream": slide.decoded_blocks - overview_blocks
                + sum(d["source_blocks_decoded"] for d in device.get("devices", ())),
            },
            "model": {"method": engine.card.method, "engine": engine.name,
                      "sha256": engine.card.files, "mpp": engine.card.mpp},
            "options": _plain(asdict(options)),
            "grid": {"tile_px": grid.tile_px, "overlap_px": grid.overlap_px,
                     "tiles": len(grid.xs) * len(grid.ys), "tiles_inferred": counts.tiles,
                     "column_bands": len(bands)},
            **_time_record(seconds, counts, time.perf_counter() - clock),
            "peak_memory_mib": peak_memory_mib(),
            **({"device": device} if device else {}),
            **({"crf": _crf_record(options.crf, refined)} if options.crf else {}),
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
    rows = _pixel_rows(pixels, engine, blend, probabilities=False)
    return np.concatenate([row.labels for row in rows])


def score_pixels(
    pixels: NDArray[np.uint8], engine: Engine, *, blend: str = "hann"
) -> NDArray[np.uint8]:
    """Return the blended scores of an image that is in memory, (H, W, K) uint8.

    Parameters and errors as of `segment_pixels`.
    """
    rows = _pixel_rows(pixels, engine, blend, probabilities=True)
    return np.concatenate([row.probabilities for row in rows if row.probabilities is not None])


def _pixel_rows(
    pixels: NDArray[np.uint8], engine: Engine, blend: str, *, probabilities: bool
) -> list[Segmented]:
    height, width = pixels.shape[:2]
    grid = _lay_tiles(width, height, engine.card, Options(blend=blend))
    blender = Blender(grid, len(engine.card.classes), blend, probabilities=probabilities)
    whole = Strip(0, 0, pixels)
    rows = []
    for row in range(len(grid.ys)):
        for tiles, scores in predict(engine, grid, whole, grid.row(row), engine.batch):
            for tile, score in zip(tiles, scores, strict=True):
                blender.add(tile, score)
        rows.append(blender.finish_row(row))
    return rows


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


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    names = (
        "histostream", "numpy", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx",
        "cuda-python", "pycuda", "large-image", "tifffile",
    )  # fmt: skip
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class TakesRows(Protocol):
    """Where finished rows go: an `OutputFolder`, or what stands for one in another process."""

    def write(self, part: Segmented) -> None:
        """Take the next rows."""


@runtime_checkable
class ManyDevices(Protocol):
    """The same network on several devices, which share the column bands of a slide."""

    card: ModelCard
    name: str

    def plan_bands(self, grid: TileGrid, align_px: int) -> list[tuple[int, int]]:
        """Cut a slide into column bands that begin at multiples of ``align_px``."""

    def run_bands(
        self,
        slide: Path,
        grid: TileGrid,
        roi: RegionOfInterest | None,
        bands: list[tuple[int, int]],
        options: Options,
        folder: OutputFolder,
        seconds: StageSeconds,
        counts: Counts,
    ) -> dict[str, Any]:
        """Run the bands and write their rows; returns what ``run.json`` says of the devices."""


def _plan_bands(
    grid: TileGrid, view: SlideView, engine: Engine | ManyDevices, options: Options
) -> list[tuple[int, int]]:
    further = Further()
    if options.crf is not None:
        further = options.crf.needs(len(engine.card.classes), view.channels, grid.tile_px)
    if isinstance(engine, ManyDevices):
        if options.max_memory_mib is not None:
            raise OptionError("--max-memory cannot be kept while several devices share a slide")
        return engine.plan_bands(grid, further.align_px)
    return plan_bands(
        grid, view, engine, options.max_memory_mib, batch=options.batch or engine.batch,
        probabilities=options.probabilities or options.crf is not None, further=further,
    )  # fmt: skip


class RowStream(Protocol):
    """Rows of tiles in, finished rows of one column band out."""

    def feed(self, strip: Strip, tiles: list[Tile]) -> Iterator[list[Tile]]:
        """Infer and blend the tiles of one row of the grid; yields those of each batch."""

    def finish_row(self, row: int) -> list[Segmented]:
        """Say that row ``row`` was fed, or has no tiles; returns the rows that are ready now."""

    def drain(self) -> list[Segmented]:
        """Return the rows that are left."""

    def record(self) -> dict[str, Any]:
        """Return what ``run.json`` says of the device; nothing on the host."""

    def close(self) -> None:
        """Give memory back."""


class HostStream:
    """One column band through an engine and a `Blender` in host memory.

    Parameters
    ----------
    engine
        The network.
    grid
        The tiles of the band.
    options
        How to run.
    seconds
        Where the time goes to.
    """

    def __init__(
        self, engine: Engine, grid: TileGrid, options: Options, seconds: StageSeconds
    ) -> None:
        self._engine, self._grid, self._seconds = engine, grid, seconds
        self._batch = options.batch or engine.batch
        self._blender = Blender(
            grid, len(engine.card.classes), options.blend, probabilities=options.probabilities
        )

    def feed(self, strip: Strip, tiles: list[Tile]) -> Iterator[list[Tile]]:
        """Infer and blend the tiles of one row; yields those of each batch."""
        batches = predict(self._engine, self._grid, strip, tiles, self._batch)
        while True:
            with self._seconds.time("infer"):
                some, scores = next(batches, ([], np.empty(0, np.uint8)))
            if not some:
                return
            with self._seconds.time("blend"):
                for tile, score in zip(some, scores, strict=True):
                    self._blender.add(tile, score)
            yield some

    def finish_row(self, row: int) -> list[Segmented]:
        """Return the rows that no tile after row ``row`` reaches."""
        with self._seconds.time("blend"):
            return [self._blender.finish_row(row)]

    def drain(self) -> list[Segmented]:
        """Return nothing: every row was returned at once."""
        return []

    def record(self) -> dict[str, Any]:
        """Return nothing: there is no device."""
        return {}

    def close(self) -> None:
        """Do nothing: memory ends with the object."""


def open_stream(
    engine: Engine, grid: TileGrid, options: Options, seconds: StageSeconds, *, channels: int
) -> RowStream:
    """Open the way through one column band: on the engine's device where it has one.

    Parameters
    ----------
    engine
        The network.
    grid
        The tiles of the band.
    options
        How to run.
    seconds
        Where the time goes to.
    channels
        Of the strips that will be fed.

    Raises
    ------
    DeviceMemoryError
        If the band does not fit on the device.
    """
    if not isinstance(engine, DeviceEngine):
        return HostStream(engine, grid, options, seconds)
    return DeviceStream(
        engine, grid, options.blend, channels=channels, batch=options.batch or engine.batch,
        probabilities=options.probabilities, time=seconds.time,
    )  # fmt: skip


def run_band(
    view: SlideView,
    grid: TileGrid,
    roi: RegionOfInterest | None,
    engine: Engine,
    options: Options,
    folder: TakesRows,
    seconds: StageSeconds,
    counts: Counts,
) -> dict[str, Any]:
    """Segment one column band of a slide, top to bottom.

    Parameters
    ----------
    view
        The slide at the model's resolution.
    grid
        The tiles of the band.
    roi
        Outside of it nothing is labelled.
    engine, options
        The network, and how to run it.
    folder
        Where the finished rows go.
    seconds, counts
        Where times and numbers are added to.

    Returns
    -------
    What ``run.json`` says of the device, nothing on the host; and ``crf``, where it was run.
    """
    own, crf = grid, None
    if options.crf is not None:
        grid = widened(grid, options.crf)
        crf = CrfStage(
            grid, (own.x0, own.x1), options.crf, classes=len(engine.card.classes),
            channels=view.channels, probabilities=options.probabilities,
        )  # fmt: skip
        # The scores are needed whether they are written or not.
        options = replace(options, probabilities=True)

    def write(parts: Iterable[Segmented]) -> None:
        if crf is not None:
            with seconds.time("crf"):
                parts = list(crf.take(parts))
        for part in parts:
            if roi is not None:
                with seconds.time("blend"):
                    height, width = part.labels.shape
                    part.labels[~roi.inside(Box(part.x, part.y, width, height))] = OUTSIDE
            with seconds.time("write"):
                folder.write(part)

    with (
        closing(open_stream(engine, grid, options, seconds, channels=view.channels)) as stream,
        closing(read_strips(view, grid, threads=options.threads or 2)) as strips,
    ):
        for row in range(len(grid.ys)):
            if grid.row(row):
                with seconds.time("read"):
                    tiles, strip = next(strips)
                if crf is not None:
                    crf.see(strip, tiles)
                for some in stream.feed(strip, tiles):
                    counts.tiles += len(some)
                    counts.pixels += sum(_band_pixels(own, tile) for tile in some)
                    counts.report(counts.pixels, counts.total_pixels)
            write(stream.finish_row(row))
        write(stream.drain())
        record = stream.record()
        return record if crf is None else {**record, "crf": crf.record()}


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


def _of_all_bands(before: dict[str, Any], band: dict[str, Any]) -> dict[str, Any]:
    """Join what bands say of the device: bytes that moved add up, bytes that are held do not."""
    if not before:
        return band
    joined = {**band, "bytes_uploaded": before["bytes_uploaded"] + band["bytes_uploaded"]}
    for held in ("bytes_planned", "pinned_bytes"):
        joined[held] = max(before[held], band[held])
    joined["batch"] = min(before["batch"], band["batch"])
    return joined


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


def _crf_record(options: CrfOptions, bands: list[dict[str, int]]) -> dict[str, Any]:
    return {
        "halo_px": options.halo_px,
        "cell_px": options.cell_px,
        **{name: sum(band[name] for band in bands) for name in ("cells", "cells_skipped")},
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

"""A slide through a model: read, predict, blend, write; memory bounded by rows, not by area.

::

    prepare   open the slide, lay tiles over its tissue, see what a former run has finished, and
              begin to read                                                       on the host
    run       column bands, one after the other; see `band.Band`                  on the device
    finish    complete the files and put them in place                            on the host

`segment_slide` does one after the other. A cohort prepares the next slide and finishes the last
one while the device is busy with this one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.cohort.inputs import stem_of
from histostream.runtime.crf.options import check_memory
from histostream.runtime.engines.base import Engine, to_channels
from histostream.runtime.options import OptionError, Options
from histostream.runtime.record import (
    card_record,
    crf_record,
    differences,
    inputs_of,
    plain,
    read_run,
    seen_record,
    slide_record,
    time_record,
    versions,
)
from histostream.runtime.report import REPORT
from histostream.runtime.report.slide import slide_report
from histostream.runtime.result import SlideResult
from histostream.runtime.stream.blend import Blender, check_blend, exact_overlap_px
from histostream.runtime.stream.column_band import Band, Counts, StageSeconds, band_pixels, join_records, predict
from histostream.runtime.stream.memory import MemoryNeeds, peak_memory_mib, plan_bands
from histostream.wsi.errors import SlideError, StoppedError
from histostream.wsi.outputs.folder import OutputFolder
from histostream.wsi.outputs.journal import Journal, JournalError, RunManifest
from histostream.wsi.outputs.label_rows import LabelRows, SlideInfo
from histostream.wsi.outputs.lock import Process
from histostream.wsi.outputs.sinks import rasters
from histostream.wsi.outputs.sinks.objects import Objects, memory_bytes
from histostream.wsi.outputs.sinks.overview import Overview, overview_size
from histostream.wsi.outputs.sinks.summary import Summary
from histostream.wsi.outputs.sinks.tiff import LabelTiff, ProbabilityTiff
from histostream.wsi.slides.damage import Damage, Undamaged
from histostream.wsi.slides.reader import SlideReader, open_slide
from histostream.wsi.slides.resolution import SlideView, at_mpp, thumbnail
from histostream.wsi.slides.sources.base import is_remote, redact_url
from histostream.wsi.slides.staging import sha256_of, version_of
from histostream.wsi.tiling.grid import Strip, TileGrid
from histostream.wsi.tiling.tissue import RegionOfInterest, find_tissue, read_roi

DEFAULT_OVERLAP_PX = 64
log = logging.getLogger(__name__)


class DoneError(Exception):
    """A job is done already, and was to be run only if not."""


@dataclass(frozen=True, slots=True)
class Job:
    """One slide to segment.

    Attributes
    ----------
    path
        The slide, on a local drive.
    out
        Folder for results.
    options
        How to run.
    name
        Of the folder that is made in ``out``; empty: the slide's stem.
    source
        The slide as the user named it, where that is not ``path``; results are told apart by it.
    asked
        What was asked for beside ``options``, as ``{"precision": "auto"}``.
    restart
        Whether what a former run left is forgotten.
    unless_done
        Whether `DoneError` is raised where the folder holds the result of just these inputs.
    gone
        Processes that are known to have ended, and may have been at work on the slide.
    """

    path: Path
    out: Path
    options: Options = field(default_factory=Options)
    name: str = ""
    source: str = ""
    asked: Mapping[str, str] = field(default_factory=dict)
    restart: bool = False
    unless_done: bool = False
    gone: tuple[Process, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the results of the slide will be."""
        return self.out / (self.name or stem_of(str(self.path)))

    @property
    def place(self) -> str:
        """Where the slide is, for records: an absolute path, or a URL without its signature."""
        source = self.source or str(self.path)
        return redact_url(source) if is_remote(source) else str(Path(source).absolute())

    def inputs(self, card: ModelCard) -> dict[str, Any]:
        """Return what decides the result, as run.json says it; see `record.inputs_of`.

        Raises
        ------
        SlideError
            If there is no such slide.
        """
        version = version_of(self.source or str(self.path))
        return inputs_of(version, card, self.options, self.asked)

    def is_done(self, card: ModelCard) -> bool:
        """Whether the folder holds the result of just these inputs.

        Raises
        ------
        SlideError
            If there is no such slide.
        """
        run = read_run(self.folder)
        return run is not None and run.get("inputs") == self.inputs(card)


def segment_slide(
    path: Path,
    engine: Engine | ManyDevices,
    out: Path,
    options: Options | None = None,
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
    stopping: Callable[[], bool] = lambda: False,
    restart: bool = False,
) -> SlideResult:
    """Segment one slide into ``out/<slide stem>/``.

    What a run that was killed, stopped or failed has finished is not done again.

    Parameters
    ----------
    path
        The slide.
    engine
        The network, from `open_engine`, or a `ProcessPool` of several devices.
    out
        Folder for results; a folder with the slide's name is made in it.
    options
        How to run; see `Options`.
    report
        Called with (pixels done, pixels in all), at the model's resolution.
    stopping
        Asked after each row of tiles; if it says so, `StoppedError` is raised.
    restart
        Whether what a former run has finished is forgotten.

    Raises
    ------
    SlideError
        If the slide cannot be opened or read, or has no resolution.
    BlendError, OptionError
        If an option does not fit the model.
    JournalError
        If another run was begun in the folder, of another model or with other options.
    LockedError
        If another process is at work on the slide.
    OutputError
        If a result cannot be written. Nothing is left under a final name then.
    StoppedError
        If it was stopped; what is finished is kept.

    Examples
    --------
    >>> from histostream.runtime import default_bundle, open_engine
    >>> engine = open_engine(default_bundle(), backend="cpu")
    >>> result = segment_slide(Path("slide.svs"), engine, Path("results"))
    >>> result.folder.as_posix(), round(result.summary["analysed_mm2"], 2)
    ('results/slide', 0.1)
    """
    job = Job(path, out, options or Options(), restart=restart)
    with SlideRun(job, engine, report=report, stopping=stopping) as run:
        run.prepare()
        run.run()
        return run.finish()


class SlideRun:
    """One slide on its way: `prepare`, `run` and `finish` it, in a ``with`` block.

    `prepare` and `finish` do not touch the device, and may be called in another thread than `run`.

    Parameters
    ----------
    job
        The slide, and how it is run.
    engine
        The network.
    report, stopping
        As for `segment_slide`.
    """

    def __init__(
        self,
        job: Job,
        engine: Engine | ManyDevices,
        *,
        report: Callable[[int, int], None] = lambda done, total: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._job, self._engine, self._stopping = job, engine, stopping
        self._started = datetime.now(UTC)
        self._clock = time.perf_counter()
        self.seconds = StageSeconds()
        self._counts = Counts(report=report)
        self._open = ExitStack()
        self._bands: list[tuple[int, int]] = []
        self._band: Band | None = None  # begun ahead
        self._begun: RunManifest | None = None
        self._of_band: ExitStack | None = None
        self._device: dict[str, Any] = {}
        self._refined: list[dict[str, int]] = []

    def __enter__(self) -> Self:
        return self

    def prepare(self) -> None:
        """Open the slide, lay tiles over it, and begin to read.

        Errors as of `segment_slide`, and `DoneError`.
        """
        job, card, options = self._job, self._engine.card, self._job.options
        self._version = version_of(job.source or str(job.path))
        self._slide = self._open.enter_context(open_slide(job.path))
        self._folder = self._open.enter_context(OutputFolder(job.out, job.folder.name, job.gone))
        self._journal = Journal(self._folder.path)
        self._open.push(self._forget_nothing)
        with self.seconds.time("prepare"):
            self._inputs = inputs_of(self._version, card, options, job.asked)
            run = read_run(self._folder.path)
            done = None if run is None else run.get("inputs")
            if job.unless_done and done == self._inputs:  # while nobody else is at work on it
                self._journal.remove()
                raise DoneError
            self._begun = self._former(done)
            view = self._see(self._slide)
            self._damage = Damage(self._slide)
            readable = view
            if not options.strict:
                readable = replace(view, slide=Undamaged(self._slide, self._damage))
            picture = thumbnail(readable, max(overview_size(view.width, view.height)))
            self._grid, self._roi = plan_grid(view, card, options, picture)
            if options.crf is not None:
                check_memory(options.crf, len(card.classes), options.max_memory_mib)
            self._view = view
            self._summary, self._objects = _add_sinks(self._folder, view, card, options, picture)
            self._overview_blocks = self._slide.decoded_blocks
            self._hash = _Hash(job.path)
            self._open.callback(self._hash.stop)
        if isinstance(self._engine, ManyDevices) or options.max_memory_mib is not None:
            return  # bands are planned with what memory is there when they are run
        self._plan()
        with self.seconds.time("prepare"):
            self._band = self._begin_band(0)

    def run(self) -> None:
        """Run the network over the slide, on the device.

        Errors as of `segment_slide`.
        """
        engine = self._engine
        if not self._bands:
            self._plan()
        self._counts.total_pixels = sum(_write_pixels(self._grid.band(*b)) for b in self._bands)
        if isinstance(engine, ManyDevices):
            self._device = engine.run_bands(
                self._job,
                self._grid,
                self._roi,
                self._bands,
                self._folder,
                self._journal,
                self._damage,
                self.seconds,
                self._counts,
                self._stopping,
            )
            self._refined = [found.pop("crf", {}) for found in self._device["devices"]]
            return
        for i in range(len(self._bands)):
            band = self._band or self._begin_band(i)
            self._band = None
            found = band.run(engine)
            self._close_band()
            self._refined.append(found.pop("crf", {}))
            self._device = join_records(self._device, found)
            if self._stopping() and i + 1 < len(self._bands):
                raise StoppedError

    def finish(self) -> SlideResult:
        """Complete the files and put them in place.

        Errors as of `segment_slide`.
        """
        engine, options, grid = self._engine, self._job.options, self._grid
        with self.seconds.time("finish"):
            self._folder.finish()
            sha256 = self._hash.result()
        total = time.perf_counter() - self._clock
        device = self._device
        assert self._begun is not None
        record = {
            "slide": {
                **slide_record(self._slide, self._view, self._version),
                "sha256": sha256,
                "source": self._job.place,
            },
            "source_blocks_decoded": {
                "overview": self._overview_blocks,
                "stream": self._slide.decoded_blocks
                - self._overview_blocks
                + sum(d["source_blocks_decoded"] for d in device.get("devices", ())),
            },
            "damaged": self._damage.record(),
            "model": {
                "method": engine.card.method,
                "engine": engine.name,
                "sha256": engine.card.files,
                "mpp": engine.card.mpp,
                "card": card_record(engine.card),
            },
            "options": plain(asdict(options)),
            "grid": {
                "tile_px": grid.tile_px,
                "overlap_px": grid.overlap_px,
                "tiles": len(grid.xs) * len(grid.ys),
                "tiles_inferred": self._counts.tiles,
                "column_bands": len(self._bands),
            },
            **time_record(self.seconds, self._counts, total),
            "peak_memory_mib": peak_memory_mib(),
            **({"device": device} if device else {}),
            **({"crf": crf_record(options.crf, self._refined)} if options.crf else {}),
            **({"objects": self._objects.by_class()} if self._objects else {}),
            **(
                {"resumed": {"runs": self._begun.runs, "mpx_before": round(self._counts.pixels_before / 1e6, 3)}}
                if self._begun.runs > 1
                else {}
            ),
            "started": self._started.isoformat(timespec="seconds"),
            "inputs": self._inputs,
            "versions": versions(),
        }
        self._folder.run.update(record)
        summary = self._summary.as_dict()
        files = self._folder.unpublished
        said = {**record, "outputs": sorted([*files, REPORT])}
        self._folder.add_text(REPORT, slide_report(said, summary, files["overview.png"]))
        self._folder.after_publishing(self._journal.remove)
        self._open.close()
        return SlideResult(self._folder.path, summary, said)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(Exception):
            self._close_band()
        self._open.__exit__(kind, error, trace)

    def _see(self, slide: SlideReader) -> SlideView:
        options = self._job.options
        return at_mpp(slide, self._engine.card.mpp, slide_mpp=options.mpp, force=options.force_upsampling)

    def _former(self, done: dict[str, Any] | None) -> RunManifest | None:
        """Return what a run of the same inputs has begun; ``done`` are those of the last result.

        Raises
        ------
        JournalError
            If it was another run that was broken off.
        """
        if self._job.restart:
            self._journal.remove()
        begun = self._journal.read()
        if begun is None:
            return None
        if done == {name: value for name, value in begun.what.items() if name != "engine"}:
            self._journal.remove()  # left by a run that was killed when all was done
            return None
        changed = differences(begun.what, self._what())
        if changed:
            raise JournalError(
                f"{self._folder.path}: a run with another {', '.join(changed)} was broken off "
                "here; repeat its command to go on with it, or add --restart to start over"
            )
        return begun

    def _what(self) -> dict[str, Any]:
        engine = self._engine
        name = engine.each if isinstance(engine, ManyDevices) else engine.name
        return {**self._inputs, "engine": name}

    def _plan(self) -> None:
        """Lay column bands: those of the run that was broken off, where there is one."""
        with self.seconds.time("prepare"):
            memory, begun = self._job.options.max_memory_mib, self._begun
            if begun is None:
                bands = _plan_bands(self._grid, self._view, self._engine, self._job.options)
                begun = RunManifest(self._what(), bands, memory, runs=0)
            elif memory is not None and memory < (begun.max_memory_mib or memory + 1):
                self._check_width(begun)
            self._bands = begun.bands
            seen = seen_record(self._job.place, self._view, self._engine.card.classes)
            self._begun = replace(begun, runs=begun.runs + 1, seen=seen)
            self._journal.begin(self._begun)

    def _check_width(self, begun: RunManifest) -> None:
        """Refuse bands that were laid for more memory than there is now.

        Raises
        ------
        JournalError
            If they are wider than they may be.
        """
        bands = _plan_bands(self._grid, self._view, self._engine, self._job.options)
        widest = max(x1 - x0 for x0, x1 in begun.bands)
        if widest > max(x1 - x0 for x0, x1 in bands):
            raise JournalError(
                f"{self._folder.path}: the run that was broken off here has column bands of "
                f"{widest} px, more than --max-memory leaves room for; allow it more memory to go "
                "on, or add --restart to start over"
            )

    def _begin_band(self, i: int) -> Band:
        x0, x1 = self._bands[i]
        self._of_band = ExitStack()
        journal = self._of_band.enter_context(self._journal.band(x0, x1, self._view.height))
        band = Band(
            self._view,
            self._grid.band(x0, x1),
            self._roi,
            self._engine.card,
            self._job.options,
            journal,
            self._folder,
            self._damage,
            self.seconds,
            self._counts,
            self._stopping,
        )
        self._of_band.enter_context(closing(band))
        band.begin()
        return band

    def _close_band(self) -> None:
        if self._of_band is not None:
            self._of_band.close()

    def _forget_nothing(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove a journal that holds nothing, so that a failure leaves no trace."""
        if kind is not None and not self._journal.has_strips():
            self._journal.remove()


class _Hash:
    """SHA-256 of a file, computed beside other work."""

    def __init__(self, path: Path) -> None:
        self._stop = threading.Event()
        self._found: str | OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(path,), name="hash", daemon=True)
        self._thread.start()

    def result(self) -> str:
        """Wait for it.

        Raises
        ------
        SlideError
            If the file cannot be read.
        """
        self._thread.join()
        if not isinstance(self._found, str):
            raise self._found or SlideError("stopped")
        return self._found

    def stop(self) -> None:
        """Give up."""
        self._stop.set()
        self._thread.join()

    def _run(self, path: Path) -> None:
        try:
            self._found = sha256_of(path, self._stop.is_set)
        except OSError as error:
            self._found = error
        except StoppedError:
            pass


def segment_pixels(pixels: NDArray[np.uint8], engine: Engine, *, blend: str = "hann") -> NDArray[np.uint8]:
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


def score_pixels(pixels: NDArray[np.uint8], engine: Engine, *, blend: str = "hann") -> NDArray[np.uint8]:
    """Return the blended scores of an image that is in memory, (H, W, K) uint8.

    Parameters and errors as of `segment_pixels`.
    """
    rows = _pixel_rows(pixels, engine, blend, probabilities=True)
    return np.concatenate([row.probabilities for row in rows if row.probabilities is not None])


def _pixel_rows(pixels: NDArray[np.uint8], engine: Engine, blend: str, *, probabilities: bool) -> list[LabelRows]:
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
        tissue = find_tissue(view, preview=picture).tiles(grid)
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
    return TileGrid.cover(width, height, tile_px=card.tile_px, overlap_px=overlap_px, align_px=card.align_px)


@runtime_checkable
class ManyDevices(Protocol):
    """The same network on several devices, which share the column bands of a slide."""

    card: ModelCard
    name: str
    each: str  # what one of them says of itself

    def plan_bands(self, grid: TileGrid, align_px: int) -> list[tuple[int, int]]:
        """Cut a slide into column bands that begin at multiples of ``align_px``."""

    def run_bands(
        self,
        job: Job,
        grid: TileGrid,
        roi: RegionOfInterest | None,
        bands: list[tuple[int, int]],
        folder: OutputFolder,
        journal: Journal,
        damage: Damage,
        seconds: StageSeconds,
        counts: Counts,
        stopping: Callable[[], bool],
    ) -> dict[str, Any]:
        """Run the bands and write their rows; returns what ``run.json`` says of the devices."""

    def close(self) -> None:
        """Give the devices back."""


def _plan_bands(
    grid: TileGrid, view: SlideView, engine: Engine | ManyDevices, options: Options
) -> list[tuple[int, int]]:
    further = MemoryNeeds()
    if options.crf is not None:
        further = options.crf.needs(len(engine.card.classes), view.channels, grid.tile_px)
    if options.annotations or options.objects:
        further += MemoryNeeds(bytes_at_once=memory_bytes(view.height, options.objects))
    if names := tuple(set(options.rasters)):
        further += MemoryNeeds(
            bytes_per_column=rasters.column_bytes(grid.tile_px, names),
            bytes_at_once=rasters.memory_bytes(view.width, view.height, names),
        )
    if isinstance(engine, ManyDevices):
        if options.max_memory_mib is not None:
            raise OptionError(
                "--max-memory cannot be kept while several devices share a slide: leave one of the two out"
            )
        return engine.plan_bands(grid, further.align_px)
    return plan_bands(
        grid,
        view,
        engine,
        options.max_memory_mib,
        batch=options.batch or engine.batch,
        probabilities=options.probabilities or options.crf is not None,
        further=further,
    )


def _add_sinks(
    folder: OutputFolder,
    view: SlideView,
    card: ModelCard,
    options: Options,
    picture: NDArray[np.uint8],
) -> tuple[Summary, Objects | None]:
    assert view.mpp is not None  # a resolution was asked for, so the view has one
    info = SlideInfo(view.slide.path.name, view.width, view.height, view.mpp, card.classes)
    folder.add(LabelTiff(folder.path / "labels.tif", info))
    if options.probabilities:
        folder.add(ProbabilityTiff(folder.path / "probabilities.tif", info))
    for name in dict.fromkeys(options.rasters):
        file, make = rasters.RASTERS[name]
        folder.add(make(folder.path / file, info, view.slide.path))
    folder.add(Overview(folder.path / "overview.png", info, to_channels(picture, 3)))
    objects = None
    if files := (*options.annotations, *options.objects):
        objects = Objects(
            folder.path,
            info,
            tuple(dict.fromkeys(files)),
            downsample=view.downsample,
            min_area_um2=options.min_area_um2,
            simplify_um=options.simplify_um,
        )
        folder.add(objects)
    return folder.add(Summary(folder.path, info)), objects


def _write_pixels(grid: TileGrid) -> int:
    return sum(band_pixels(grid, tile) for tile in grid)

"""A slide through a model: read, predict, blend, write; memory is bounded by rows, not by area.

::

    open      open the slide, lay tiles over its tissue, take up an interrupted run, begin to read   on the host
    run       column bands, one after the other; see `column_band`                                  on the device
    finish    complete the files and publish them                                                   on the host

`segment_slide` does one after the other. A cohort opens the next slide and finishes the last one
while this one is on the device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.crf.options import check_memory
from histostream.runtime.engines.base import Engine, to_channels
from histostream.runtime.layout import SlideLayout, lay_out, open_for_model
from histostream.runtime.options import OptionError, Options
from histostream.runtime.process_memory import peak_memory_mib
from histostream.runtime.record import (
    CrfRecord,
    DamagedBlock,
    DecodedBlocks,
    GridRecord,
    ModelRecord,
    ResumedRecord,
    RunRecord,
    SecondsRecord,
    SlideRecord,
    bound_by,
    card_record,
    differences,
    fingerprint,
    read_run,
    versions,
    why_nothing,
)
from histostream.runtime.report import REPORT
from histostream.runtime.report.slide import slide_report
from histostream.runtime.result import SlideResult
from histostream.runtime.slide_job import SlideInput, SlideJob, stem_of
from histostream.runtime.stream.column_band import ColumnBand, band_pixels, open_band
from histostream.runtime.stream.context import (
    BandResult,
    Counts,
    DeviceRecord,
    RunContext,
    RunPlan,
    StageSeconds,
    join_devices,
)
from histostream.runtime.stream.memory import plan_bands
from histostream.wsi.errors import SlideError, StoppedError
from histostream.wsi.outputs.area_outline import AREA_FILE, area_geojson
from histostream.wsi.outputs.folder import OutputFolder
from histostream.wsi.outputs.journal import Journal, JournalError, RunManifest, ViewInfo
from histostream.wsi.outputs.label_rows import ClassInfo, SlideInfo
from histostream.wsi.outputs.memory_needs import MemoryNeeds
from histostream.wsi.outputs.objects.counting import counted_labels
from histostream.wsi.outputs.sinks import find_sink
from histostream.wsi.outputs.sinks.object_counts import ObjectCounts, count_needs
from histostream.wsi.outputs.sinks.object_files import Objects, object_needs
from histostream.wsi.outputs.sinks.overview import Overview
from histostream.wsi.outputs.sinks.summary import Summary, SummaryRecord
from histostream.wsi.outputs.sinks.tiff import LabelTiff, ProbabilityTiff
from histostream.wsi.records import to_json
from histostream.wsi.slides.coordinates import origin_px
from histostream.wsi.slides.damage import Damage
from histostream.wsi.slides.reader import mpp_source
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.slides.staging import SlideVersion, sha256_of, version_of
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.strips import all_blocks_are_in


class DoneError(Exception):
    """The result of a job is there already, and the job says to skip it then."""


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

    Rows that a killed, stopped or failed run finished are not run again.

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
        Called with the number of pixels that are done, and of all pixels, at the model's resolution.
    stopping
        Called after each row of tiles; if it returns True, `StoppedError` is raised.
    restart
        Whether rows that a former run finished are run again.

    Raises
    ------
    SlideError
        If the slide cannot be opened or read, or has no resolution.
    BlendError, OptionError
        If an option does not fit the model.
    JournalError
        If a run with another model or other options was interrupted in the folder.
    LockedError
        If another process is running the slide.
    OutputError
        If a result cannot be written. No file has its final name then.
    StoppedError
        If the run was stopped; finished rows are kept.

    Examples
    --------
    >>> from histostream.runtime import default_bundle, open_engine
    >>> engine = open_engine(default_bundle(), backend="cpu")
    >>> result = segment_slide(Path("slide.svs"), engine, Path("results"))
    >>> result.folder.as_posix(), round(result.summary.analysed_mm2, 2)
    ('results/slide', 0.03)
    """
    slide = SlideInput(str(path), stem_of(str(path)))
    job = SlideJob(slide, out, options or Options(), restart=restart, skip_done=False)
    with SlideRun.open(job, engine, report=report, stopping=stopping) as run:
        run.run()
        return run.finish()


@runtime_checkable
class ManyDevices(Protocol):
    """The same network on several devices, which share the column bands of a slide."""

    card: ModelCard
    name: str
    engine_name: str  # name of the engine of one device

    def plan_bands(self, grid: TileGrid, align_px: int) -> list[tuple[int, int]]:
        """Divide a slide into column bands that begin at multiples of ``align_px``."""

    def run_bands(self, context: RunContext, bands: Sequence[tuple[int, int]]) -> list[BandResult]:
        """Run the column bands of a slide, and write their rows one band after the other."""

    def close(self) -> None:
        """Free the devices."""


@dataclass(frozen=True, slots=True)
class _Outputs:
    """The output folder of a run, and the sink that also gives numbers."""

    folder: OutputFolder
    summary: Summary


@dataclass(slots=True, eq=False)
class SlideRun:
    """The run of one slide: made by `open`, then `run`, then `finish`.

    ::

        with SlideRun.open(job, engine) as run:
            run.run()
            result = run.finish()

    `open` and `finish` do not touch the device, and may be called in another thread than `run`.

    Attributes
    ----------
    context
        What column bands and other processes are given of the run.
    version, inputs
        Version of the slide's file, and `fingerprint` of the run.
    manifest
        What the journal says of the run; None where a new run has not planned its bands.
    layout
        What of the slide is analysed.
    overview_blocks
        Blocks that were decoded for the overview.
    started, clock
        Time of the begin, and the same as `time.perf_counter`.
    stack
        Closes everything, and publishes the outputs.
    """

    job: SlideJob
    engine: Engine | ManyDevices
    context: RunContext
    outputs: _Outputs
    version: SlideVersion
    inputs: Mapping[str, Any]
    manifest: RunManifest | None
    layout: SlideLayout
    overview_blocks: int
    sha256: Future[str]
    started: datetime
    clock: float
    stack: ExitStack
    _band_stack: ExitStack = field(default_factory=ExitStack)
    _bands: list[tuple[int, int]] = field(default_factory=list)
    _begun: ColumnBand | None = None  # the first band, which is read before the device is free
    _results: list[BandResult] = field(default_factory=list)
    _ready: float = 0.0

    @classmethod
    @contextmanager
    def open(
        cls,
        job: SlideJob,
        engine: Engine | ManyDevices,
        path: Path | None = None,
        *,
        report: Callable[[int, int], None] = lambda done, total: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Iterator[Self]:
        """Open the slide, lay tiles over it, and begin to read.

        Parameters
        ----------
        job, engine
            The slide and the network.
        path
            Local copy of the slide; None: ``job.slide.source`` is a local path.
        report, stopping
            As for `segment_slide`.

        Raises
        ------
        DoneError
            If the job is done, and is to be skipped then.
        HistoError
            As `segment_slide`.
        """
        started, clock = datetime.now(UTC), time.perf_counter()
        path, card = path or Path(job.slide.source), engine.card
        options = job.options.for_model(card)
        job = replace(job, options=options)
        seconds = StageSeconds()
        with ExitStack() as stack:
            version = version_of(job.slide.source)
            slide = stack.enter_context(open_for_model(path, card, options))
            folder = stack.enter_context(OutputFolder(job.out, job.folder.name, job.dead_processes))
            journal = Journal(folder.path)
            stack.push(lambda kind, *_: None if kind is None or journal.has_strips() else journal.remove())
            with seconds.time("prepare"):
                inputs = fingerprint(version, card, options, job.requested)
                manifest = _interrupted_run(job, inputs, engine, journal)
                damage = Damage(slide)
                layout = lay_out(slide, card, options, None if options.strict else damage)
                if options.crf is not None:
                    check_memory(options.crf, len(card.classes), options.max_memory_mib)
                outputs = _add_sinks(folder, layout, card, options)
                plan = RunPlan(path, folder.path, options, layout.grid, layout.area)
                counts = Counts(report=report)
                context = RunContext(plan, layout.view, card, folder.write, damage, seconds, counts, stopping)
                blocks = slide.decoded_blocks
                hashing_stopped = threading.Event()
                pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="hash"))
                stack.callback(hashing_stopped.set)
                sha256 = pool.submit(sha256_of, path, hashing_stopped.is_set)  # beside other work
            run = cls(
                job, engine, context, outputs, version, inputs, manifest, layout, blocks, sha256, started, clock, stack
            )
            stack.push(run._band_stack)
            run._begin()
            yield run

    def run(self) -> None:
        """Run the network over the slide, on the device.

        Raises
        ------
        HistoError
            As `segment_slide`.
        """
        context, engine = self.context, self.engine
        context.seconds.wait += time.perf_counter() - self._ready  # another slide had the device
        if context.stopping():
            raise StoppedError
        bands, grid = self._bands or self._plan_bands(), context.plan.grid
        context.counts.total_pixels = sum(
            band_pixels(band, tile) for band in (grid.band(*columns) for columns in bands) for tile in band
        )
        if isinstance(engine, ManyDevices):
            self._results = engine.run_bands(context, bands)
            return
        for i, columns in enumerate(bands):
            band = self._begun or self._begin_band(columns)
            self._begun = None
            self._results.append(band.run(engine))
            self._band_stack.close()
            if context.stopping() and i + 1 < len(bands):
                raise StoppedError

    def finish(self) -> SlideResult:
        """Complete the files and publish them.

        Raises
        ------
        HistoError
            As `segment_slide`.
        """
        folder = self.outputs.folder
        with self.context.seconds.time("finish"):
            self._check_decoded()
            folder.finish()
            sha256 = self.sha256.result()
        files = folder.unpublished
        view, summary = self.context.view, self.outputs.summary.record()
        record = self._record(sha256, [*files, REPORT, AREA_FILE], summary)
        folder.run.update(to_json(record))
        base = view.slide.levels[0]
        origin = origin_px(view.bounds, self.job.options.coordinates)
        area = area_geojson(self.context.plan.area.mask, base.width, base.height, origin)
        folder.add_text(AREA_FILE, area)
        folder.add_text(REPORT, slide_report(record, summary, files["overview.png"]))
        folder.after_publishing(self.context.journal.remove)
        self.stack.close()
        return SlideResult(folder.path, summary, record)

    def _check_decoded(self) -> None:
        """Raise SlideError if none of the blocks that the network should see could be decoded."""
        context = self.context
        damaged, grid = context.damage.of_level(context.view.level), context.plan.grid
        if damaged and len(grid) and all_blocks_are_in(damaged, context.view, grid):
            context.journal.remove()
            raise SlideError(
                f"{context.view.slide.path}: none of the {len(damaged)} blocks of level {context.view.level} that are "
                "to be analysed can be decoded; copy or scan it again"
            )

    def _begin(self) -> None:
        """Begin to read, unless the bands depend on the memory that is free when the device is."""
        if not isinstance(self.engine, ManyDevices) and self.job.options.max_memory_mib is None:
            self._bands = self._plan_bands()
            with self.context.seconds.time("prepare"):
                self._begun = self._begin_band(self._bands[0])
        self._ready = time.perf_counter()

    def _begin_band(self, columns: tuple[int, int]) -> ColumnBand:
        return self._band_stack.enter_context(open_band(self.context, columns))

    def _plan_bands(self) -> list[tuple[int, int]]:
        """Divide the slide into column bands, as an interrupted run did, and note the run in its journal.

        Raises
        ------
        JournalError
            If the bands of the interrupted run are too wide for the memory that is allowed now.
        """
        context, engine, memory = self.context, self.engine, self.job.options.max_memory_mib
        with context.seconds.time("prepare"):
            manifest = self.manifest
            if manifest is None:
                bands = tuple(_bands(context, engine))
                manifest = RunManifest(_with_engine(self.inputs, engine), bands, memory, runs=0)
            elif memory is not None and memory < (manifest.max_memory_mib or memory + 1):
                widest = max(x1 - x0 for x0, x1 in manifest.bands)
                allowed = max(x1 - x0 for x0, x1 in _bands(context, engine))
                if widest > allowed:
                    raise JournalError(
                        f"{context.plan.folder}: the run that was interrupted here has column bands of {widest} px, "
                        "more than --max-memory leaves room for; allow more memory to continue it, or add "
                        "--restart to start over"
                    )
            view = context.view
            assert view.mpp is not None  # the card has a resolution, so the view has one
            view_info = ViewInfo(
                self.job.location, view.width, view.height, view.mpp, view.downsample, context.card.classes
            )
            self.manifest = replace(manifest, runs=manifest.runs + 1, view_info=view_info)
            context.journal.begin(self.manifest)
            return list(manifest.bands)

    def _record(self, sha256: str, files: Sequence[str], summary: SummaryRecord) -> RunRecord:
        context, engine, options, manifest = self.context, self.engine, self.job.options, self.manifest
        card, view, grid, counts = context.card, context.view, context.plan.grid, context.counts
        assert manifest is not None
        total = time.perf_counter() - self.clock
        stages: dict[str, Any] = context.seconds.rounded()
        waited = stages.pop("wait")
        several = [result.band for result in self._results if result.band is not None]
        decoded = view.slide.decoded_blocks - self.overview_blocks + sum(b.source_blocks_decoded for b in several)
        mpx_before = counts.pixels_before / 1e6
        record = RunRecord(
            SlideRecord(
                str(view.slide.path),
                self.version.bytes,
                self.version.modified,
                view.slide.name,
                view.slide.mpp,
                "--mpp" if options.mpp is not None else mpp_source(view.slide),
                view.level,
                view.scale,
                view.downsample,
                view.width,
                view.height,
                view.mpp,
                sha256,
                self.job.location,
                view.bounds,
                tuple(getattr(view.slide, "notes", ())),
            ),
            DecodedBlocks(self.overview_blocks, decoded),
            tuple(DamagedBlock(**block) for block in context.damage.record()),
            ModelRecord(card.method, engine.name, card.files, card.mpp, card_record(card)),
            to_json(options),
            GridRecord(grid.tile_px, grid.overlap_px, len(grid.xs) * len(grid.ys), counts.tiles, len(manifest.bands)),
            SecondsRecord(round(total - waited, 3), **stages, wait=waited),
            mpx=round(counts.pixels / 1e6, 3),
            mpx_per_s=round((counts.pixels / 1e6 - mpx_before) / max(total - waited, 1e-9), 3),
            bound_by=bound_by(stages),
            peak_memory_mib=peak_memory_mib(),
            device=DeviceRecord(devices=tuple(several)) if several else join_devices(self._results),
            crf=None
            if options.crf is None
            else CrfRecord(
                options.crf.halo_px,
                options.crf.cell_px,
                sum(result.cells for result in self._results),
                sum(result.cells_skipped for result in self._results),
            ),
            resumed=ResumedRecord(manifest.runs, round(mpx_before, 3)) if manifest.runs > 1 else None,
            started=self.started.isoformat(timespec="seconds"),
            inputs=self.inputs,
            versions=versions(),
            area=self.layout.record(summary.slide_mm2 or 0.0),
            outputs=tuple(sorted(files)),
        )
        return record if summary.analysed_mm2 else replace(record, no_tissue=why_nothing(record))


def _interrupted_run(
    job: SlideJob, inputs: Mapping[str, Any], engine: Engine | ManyDevices, journal: Journal
) -> RunManifest | None:
    """Return the manifest of an interrupted run with the same inputs; None if there is none.

    Raises
    ------
    DoneError
        If the folder holds the result, and the job says to skip it then.
    JournalError
        If a run with other inputs was interrupted here.
    """
    result = read_run(job.folder)
    done = None if result is None else result.inputs
    if job.skip_done and not job.restart and done == inputs:  # while no other process can be at work on it
        journal.remove()
        raise DoneError
    if job.restart:
        journal.remove()
    manifest = journal.read()
    if manifest is None:
        return None
    if done == {name: value for name, value in manifest.fingerprint.items() if name != "engine"}:
        journal.remove()  # the run was killed after it had published its result
        return None
    changed = differences(manifest.fingerprint, _with_engine(inputs, engine))
    if changed:
        raise JournalError(
            f"{job.folder}: a run with another {', '.join(changed)} was interrupted here; "
            "repeat its command to continue it, or add --restart to start over"
        )
    return manifest


def _with_engine(inputs: Mapping[str, Any], engine: Engine | ManyDevices) -> dict[str, Any]:
    return {**inputs, "engine": engine.engine_name if isinstance(engine, ManyDevices) else engine.name}


def _bands(context: RunContext, engine: Engine | ManyDevices) -> list[tuple[int, int]]:
    """Divide a slide into column bands.

    Raises
    ------
    OptionError
        If memory is bounded, and several devices share the slide.
    MemoryLimitError
        If not even the narrowest band fits.
    """
    options, grid, needs = context.plan.options, context.plan.grid, _memory_needs(context)
    if isinstance(engine, ManyDevices):
        if options.max_memory_mib is not None:
            raise OptionError(
                "--max-memory cannot be kept while several devices share a slide: leave one of the two out"
            )
        return engine.plan_bands(grid, needs.align_px)
    return plan_bands(
        grid,
        context.view,
        engine,
        options.max_memory_mib,
        batch=options.batch or engine.batch,
        probabilities=options.probabilities or options.crf is not None,
        needs=needs,
    )


def _memory_needs(context: RunContext) -> MemoryNeeds:
    """Return the memory that the CRF and the chosen output files take."""
    options, view, tile_px = context.plan.options, context.view, context.plan.grid.tile_px
    info = _slide_info(view, options.classes_of(context.card))
    needs = MemoryNeeds()
    if options.crf is not None:
        needs += options.crf.needs(len(context.card.classes), view.channels, tile_px)
    for name in set(options.rasters):
        needs += find_sink("rasters", name).needs(info, tile_px)
    if kinds := options.object_sinks():
        needs += object_needs(info)
        for kind in kinds:
            needs += kind.needs(info, tile_px)
    elif counted_labels(info.classes):
        needs += count_needs(info)
    return needs


def _slide_info(view: SlideView, classes: tuple[ClassInfo, ...]) -> SlideInfo:
    assert view.mpp is not None  # the card has a resolution, so the view has one
    return SlideInfo(view.slide.path.name, view.width, view.height, view.mpp, classes)


def _add_sinks(folder: OutputFolder, layout: SlideLayout, card: ModelCard, options: Options) -> _Outputs:
    info, path = _slide_info(layout.view, options.classes_of(card)), layout.view.slide.path
    folder.add(LabelTiff(folder.path / "labels.tif", info))
    if options.probabilities:
        folder.add(ProbabilityTiff(folder.path / "probabilities.tif", info))
    for name in dict.fromkeys(options.rasters):
        kind = find_sink("rasters", name)
        folder.add(kind.open(folder.path / kind.file, info, path))
    folder.add(Overview(folder.path / "overview.png", info, to_channels(layout.overview, 3), layout.marks()))
    counts: Objects | ObjectCounts | None = None
    if kinds := options.object_sinks():
        counts = Objects(
            folder.path,
            info,
            path,
            kinds,
            downsample=layout.view.downsample,
            origin=origin_px(layout.view.bounds, options.coordinates),
            simplify_um=options.simplify_um,
        )
    elif counted_labels(info.classes):
        counts = ObjectCounts(info)
    if counts is not None:
        folder.add(counts)  # before the summary, which takes the numbers over
    counter = None if counts is None else counts.counter
    return _Outputs(folder, folder.add(Summary(folder.path, info, counter)))

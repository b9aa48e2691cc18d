"""One column band of a slide, from top to bottom: read, predict, blend, refine, write.

::

    read_strips     every source block is decoded once, ahead of need, in threads
      RowStream     every tile is inferred once, and blended: weighted sums over a ring of rows
        [CrfStage]  labels are refined, cell by cell
          write     every output row is journalled and written once
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Protocol

import numpy as np

from histostream.runtime.crf.stage import CrfStage, widened
from histostream.runtime.engines.base import Engine, to_channels
from histostream.runtime.engines.device_engine import DeviceEngine
from histostream.runtime.options import Options
from histostream.runtime.stream.blend import Blender
from histostream.runtime.stream.context import BandResult, DeviceRecord, RunContext, StageSeconds
from histostream.runtime.stream.device import DeviceStream
from histostream.wsi.errors import SlideError, StoppedError
from histostream.wsi.geometry import Box
from histostream.wsi.outputs.journal import BandJournal
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, SCORE_MAX, LabelRows, background_label
from histostream.wsi.tiling.grid import Strip, Tile, TileGrid
from histostream.wsi.tiling.strips import cut, read_strips


class RowStream(Protocol):
    """Rows of tiles in, finished rows of one column band out."""

    def feed(self, strip: Strip, tiles: list[Tile]) -> Iterator[list[Tile]]:
        """Infer and blend the tiles of one row of the grid; yield the tiles of each batch."""

    def finish_row(self, row: int) -> list[LabelRows]:
        """Return the rows that are ready, after row ``row`` of the grid was fed or has no tiles."""

    def drain(self) -> list[LabelRows]:
        """Return the remaining rows."""

    def record(self) -> DeviceRecord | None:
        """Return what run.json records of the device; None on the host."""

    def close(self) -> None:
        """Free the memory."""


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
        The times are added to it.
    """

    def __init__(self, engine: Engine, grid: TileGrid, options: Options, seconds: StageSeconds) -> None:
        self._engine, self._grid, self._seconds = engine, grid, seconds
        self._batch = options.batch or engine.batch
        self._blender = Blender(grid, len(engine.card.classes), options.blend, probabilities=options.probabilities)

    def feed(self, strip: Strip, tiles: list[Tile]) -> Iterator[list[Tile]]:
        """Infer and blend the tiles of one row; yield the tiles of each batch."""
        grid, channels = self._grid, self._engine.card.channels
        for first in range(0, len(tiles), self._batch):
            batch = tiles[first : first + self._batch]
            with self._seconds.time("infer"):
                pixels = [cut(strip, tile, width=grid.width, height=grid.height) for tile in batch]
                scores = self._engine.infer(to_channels(np.stack(pixels), channels))
            with self._seconds.time("blend"):
                for tile, tile_scores in zip(batch, scores, strict=True):
                    self._blender.add(tile, tile_scores)
            yield batch

    def finish_row(self, row: int) -> list[LabelRows]:
        """Return the rows that no tile after row ``row`` reaches."""
        with self._seconds.time("blend"):
            return [self._blender.finish_row(row)]

    def drain(self) -> list[LabelRows]:
        """Return nothing: `finish_row` has returned every row."""
        return []

    def record(self) -> None:
        """Return nothing: there is no device."""

    def close(self) -> None:
        """Do nothing: the memory is freed with the object."""


def open_stream(engine: Engine, grid: TileGrid, options: Options, seconds: StageSeconds, *, channels: int) -> RowStream:
    """Open a stream for one column band, in device memory if the engine supports it.

    Parameters as of `HostStream`; ``channels`` is the number of channels of the strips.

    Raises
    ------
    DeviceMemoryError
        If the band does not fit on the device.
    """
    if not isinstance(engine, DeviceEngine):
        return HostStream(engine, grid, options, seconds)
    return DeviceStream(
        engine,
        grid,
        options.blend,
        channels=channels,
        batch=options.batch or engine.batch,
        probabilities=options.probabilities,
        time=seconds.time,
    )


@contextmanager
def open_band(context: RunContext, columns: tuple[int, int]) -> Iterator[ColumnBand]:
    """Begin one column band: write the rows that an interrupted run finished, and begin to read the others.

    Parameters
    ----------
    context
        The run of the slide.
    columns
        (x0, x1) in pixels of the model's resolution.

    Raises
    ------
    SlideError, OutputError
        If the slide cannot be read, or rows cannot be written.
    """
    plan, counts = context.plan, context.counts
    own = plan.grid.band(*columns)
    with context.journal.band(*columns, own.height) as journal:
        damaged = _write_journalled(context, journal)
        grid = own if plan.options.crf is None else widened(own, plan.options.crf)
        first_row = _first_unfinished_row(grid, journal.y, plan.options)
        before = sum(band_pixels(own, tile) for row in range(first_row) for tile in own.row(row))
        counts.pixels += before
        counts.pixels_before += before
        grid = _from_row(grid, first_row)
        with closing(_read_strips(context, grid)) as strips:
            first = next(strips, None)  # read now, so that the device need not wait for it
            ahead = chain(() if first is None else (first,), strips)
            yield ColumnBand(context, own, grid, ahead, journal, damaged)


class ColumnBand:
    """One column band of a slide: begun on the host by `open_band`, run on the device by `run`.

    Parameters
    ----------
    context
        The run of the slide.
    own
        The band's tiles, without those that only the CRF needs.
    grid
        The tiles that are still to be run.
    strips
        The tiles of each row, and the pixels that they need.
    journal
        Finished rows are appended to it.
    damaged
        Damaged blocks that the journal lists already.
    """

    def __init__(
        self,
        context: RunContext,
        own: TileGrid,
        grid: TileGrid,
        strips: Iterator[tuple[list[Tile], Strip]],
        journal: BandJournal,
        damaged: set[Box],
    ) -> None:
        self._context, self._own, self._grid = context, own, grid
        self._strips, self._journal, self._journalled = strips, journal, damaged

    def run(self, engine: Engine) -> BandResult:
        """Run the rows that are not finished.

        Raises
        ------
        SlideError, OutputError
            If the slide cannot be read, or rows cannot be written.
        StoppedError
            If the run was stopped; what is finished is in the journal.
        """
        context, grid = self._context, self._grid
        if self._journal.y >= grid.height:
            return BandResult()
        options, crf = context.plan.options, self._crf_stage()
        if crf is not None:  # it needs scores, whether they are written or not
            options = replace(options, probabilities=True)
        channels = context.view.channels
        with closing(open_stream(engine, grid, options, context.seconds, channels=channels)) as stream:
            for row in range(len(grid.ys)):
                if grid.row(row):
                    with context.seconds.time("read"):
                        tiles, strip = next(self._strips)
                    if crf is not None:
                        crf.add_pixels(strip, tiles)
                    for batch in stream.feed(strip, tiles):
                        self._count(batch)
                self._write(stream.finish_row(row), crf)
                if context.stopping() and row + 1 < len(grid.ys):
                    self._write(stream.drain(), crf)
                    raise StoppedError
            self._write(stream.drain(), crf)
            device = stream.record()
        return BandResult(device) if crf is None else BandResult(device, crf.cells, crf.skipped)

    def _crf_stage(self) -> CrfStage | None:
        options = self._context.plan.options
        if options.crf is None:
            return None
        return CrfStage(
            self._grid,
            (self._own.x0, self._own.x1),
            options.crf,
            classes=len(self._context.card.classes),
            channels=self._context.view.channels,
            probabilities=options.probabilities,
            start=self._journal.y,
        )

    def _count(self, tiles: list[Tile]) -> None:
        counts = self._context.counts
        counts.tiles += len(tiles)
        counts.pixels += sum(band_pixels(self._own, tile) for tile in tiles)
        counts.report(counts.pixels, counts.total_pixels)

    def _write(self, parts: Iterable[LabelRows], crf: CrfStage | None) -> None:
        """Refine, journal and write finished rows, except for those that are in the journal already."""
        context = self._context
        if crf is not None:
            with context.seconds.time("crf"):
                parts = list(crf.refine(parts))
        for finished in parts:
            part = _below(finished, self._journal.y)
            if part is None:
                continue
            damaged = context.damage.of_level(context.view.level)
            if not part.all_outside:
                with context.seconds.time("blend"):
                    self._leave_out(part, damaged)
            with context.seconds.time("write"):
                self._journal.write(part, tuple(set(damaged) - self._journalled))
                self._journalled.update(damaged)
                context.write(part)

    def _leave_out(self, part: LabelRows, damaged: Iterable[Box]) -> None:
        """Set damaged blocks to the background, and pixels outside of the analysed area to `NOT_ANALYSED`."""
        context, (height, width) = self._context, part.labels.shape
        classes = context.card.classes
        label = background_label(classes)
        background = NOT_ANALYSED if label is None else label
        rows_box = Box(part.x, part.y, width, height)
        for box in damaged:
            block = _overlap(_in_view(box, context.view.scale), rows_box)
            labels = part.labels[block]
            analysed = labels != NOT_ANALYSED
            labels[analysed] = background
            if part.probabilities is not None:
                one_hot = SCORE_MAX * (np.arange(len(classes)) == background)
                part.probabilities[block][analysed] = one_hot.astype(np.uint16)
        context.plan.area.leave_out(rows_box, part.labels, part.probabilities)


def _write_journalled(context: RunContext, journal: BandJournal) -> set[Box]:
    """Write the rows that are in the journal; return the damaged blocks that it lists."""
    damaged = set()
    with context.seconds.time("write"):
        for record in journal.finished():
            context.write(record.part)
            for box in record.damaged:
                context.damage.add(context.view.level, box)
                damaged.add(box)
    return damaged


def _first_unfinished_row(grid: TileGrid, finished_px: int, options: Options) -> int:
    """Return the first row of tiles that reaches into unfinished rows, or into the CRF's halo there."""
    if finished_px >= grid.height:
        return len(grid.ys)
    halo_px = 0 if options.crf is None else options.crf.halo_px
    return next(row for row, y in enumerate(grid.ys) if y + grid.tile_px > finished_px - halo_px)


def _read_strips(context: RunContext, grid: TileGrid) -> Generator[tuple[list[Tile], Strip], None, None]:
    """Read the strips of a grid; without ``options.strict``, undecodable blocks are noted and not errors."""
    view, options = context.view, context.plan.options

    def note(box: Box, error: SlideError) -> None:
        context.damage.add(view.level, box, error)

    return read_strips(view, grid, threads=options.threads or 2, on_bad_block=None if options.strict else note)


def _from_row(grid: TileGrid, first: int) -> TileGrid:
    """Leave out the tiles above row ``first``."""
    if first == 0:
        return grid
    shape = len(grid.ys), len(grid.xs)
    keep = np.ones(shape, bool) if grid.keep is None else grid.keep.copy()
    keep[:first] = False
    return grid.where(keep)


def _below(part: LabelRows, y: int) -> LabelRows | None:
    """Return the rows of a part from row ``y`` of the slide on; None if there are none."""
    if part.y >= y:
        return part
    above = y - part.y
    if above >= len(part.labels):
        return None
    scores = part.probabilities
    return LabelRows(part.x, y, part.labels[above:], None if scores is None else scores[above:])


def _in_view(box: Box, scale: float) -> Box:
    """Return the pixels of the view that a box of the level touches."""
    x, y = int(box.x / scale), int(box.y / scale)
    return Box(x, y, -int(-box.right // scale) - x, -int(-box.bottom // scale) - y)


def _overlap(box: Box, within: Box) -> tuple[slice, slice]:
    """Return the rows and columns of ``within``, counted from its corner, that lie in ``box``."""
    rows = slice(max(box.y - within.y, 0), max(min(box.bottom, within.bottom) - within.y, 0))
    columns = slice(max(box.x - within.x, 0), max(min(box.right, within.right) - within.x, 0))
    return rows, columns


def band_pixels(grid: TileGrid, tile: Tile) -> int:
    """Return how many pixels of the band the write box of a tile covers."""
    width = min(tile.write.right, grid.x1) - max(tile.write.x, grid.x0)
    return max(width, 0) * tile.write.height

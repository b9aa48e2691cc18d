"""One column band of a slide, top to bottom: read, predict, blend, refine, hand on.

::

    read_strips     every source block decoded once, ahead of need, in threads
      RowStream     every tile inferred once, and blended: weighted sums over a ring of rows
        [CrfStage]  labels refined, cell by cell
          rows      every output row journalled, and handed on once
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.crf.stage import CrfStage, widened
from histostream.runtime.engines.base import Engine, to_channels
from histostream.runtime.engines.device_engine import DeviceEngine
from histostream.runtime.options import Options
from histostream.runtime.stream.blend import Blender
from histostream.runtime.stream.device import DeviceStream
from histostream.wsi.errors import SlideError, StoppedError
from histostream.wsi.geometry import Box
from histostream.wsi.outputs.journal import BandJournal
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, LabelRows
from histostream.wsi.outputs.sinks.overview import BACKGROUND
from histostream.wsi.slides.damage import Damage
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.tiling.grid import Strip, Tile, TileGrid
from histostream.wsi.tiling.strips import cut, read_strips
from histostream.wsi.tiling.tissue import RegionOfInterest


@dataclass(slots=True)
class StageSeconds:
    """Seconds that the main thread spent in, or waited for, each stage.

    On a device, infer is the time for queueing its work and waiting for it, blending included, and
    copy that for staging rows in pinned memory; on the host there is no copy. Wait is the time in
    which another slide had the device.
    """

    prepare: float = 0.0
    read: float = 0.0
    copy: float = 0.0
    infer: float = 0.0
    blend: float = 0.0
    crf: float = 0.0
    write: float = 0.0
    finish: float = 0.0
    wait: float = 0.0

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
    pixels_before: int = 0  # of them, by a run that was broken off
    total_pixels: int = 0
    report: Callable[[int, int], None] = field(default=lambda done, total: None)


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


class TakesRows(Protocol):
    """Where finished rows go: an `OutputFolder`, or what stands for one in another process."""

    def write(self, part: LabelRows) -> None:
        """Take the next rows."""


class RowStream(Protocol):
    """Rows of tiles in, finished rows of one column band out."""

    def feed(self, strip: Strip, tiles: list[Tile]) -> Iterator[list[Tile]]:
        """Infer and blend the tiles of one row of the grid; yields those of each batch."""

    def finish_row(self, row: int) -> list[LabelRows]:
        """Say that row ``row`` was fed, or has no tiles; returns the rows that are ready now."""

    def drain(self) -> list[LabelRows]:
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

    def __init__(self, engine: Engine, grid: TileGrid, options: Options, seconds: StageSeconds) -> None:
        self._engine, self._grid, self._seconds = engine, grid, seconds
        self._batch = options.batch or engine.batch
        self._blender = Blender(grid, len(engine.card.classes), options.blend, probabilities=options.probabilities)

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

    def finish_row(self, row: int) -> list[LabelRows]:
        """Return the rows that no tile after row ``row`` reaches."""
        with self._seconds.time("blend"):
            return [self._blender.finish_row(row)]

    def drain(self) -> list[LabelRows]:
        """Return nothing: every row was returned at once."""
        return []

    def record(self) -> dict[str, Any]:
        """Return nothing: there is no device."""
        return {}

    def close(self) -> None:
        """Do nothing: memory ends with the object."""


def open_stream(engine: Engine, grid: TileGrid, options: Options, seconds: StageSeconds, *, channels: int) -> RowStream:
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
        engine,
        grid,
        options.blend,
        channels=channels,
        batch=options.batch or engine.batch,
        probabilities=options.probabilities,
        time=seconds.time,
    )


class Band:
    """One column band of a slide: begun on the host, run on the device.

    ::

        with closing(Band(...)) as band:
            band.begin()
            record = band.run(engine)

    Parameters
    ----------
    view
        The slide at the model's resolution.
    grid
        The tiles of the band.
    roi
        Outside of it nothing is labelled.
    card, options
        The model, and how to run it.
    journal
        Open; what a former run finished is taken from it, and what is finished is added.
    rows
        Where finished rows go.
    damage
        Where damaged blocks are noted.
    seconds, counts
        Where times and numbers are added to.
    stopping
        Asked after each row of tiles; if it says so, the band is left there.
    """

    def __init__(
        self,
        view: SlideView,
        grid: TileGrid,
        roi: RegionOfInterest | None,
        card: ModelCard,
        options: Options,
        journal: BandJournal,
        rows: TakesRows,
        damage: Damage,
        seconds: StageSeconds,
        counts: Counts,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._view, self._own, self._roi, self._card = view, grid, roi, card
        self._options, self._journal, self._rows, self._damage = options, journal, rows, damage
        self._seconds, self._counts, self._stopping = seconds, counts, stopping
        self._grid = grid if options.crf is None else widened(grid, options.crf)
        self._journalled: set[Box] = set()
        self._strips: Strips | None = None

    def begin(self) -> None:
        """Hand on what a former run finished, and begin to read the rest.

        Raises
        ------
        SlideError, OutputError
            If the slide cannot be read, or the rows not be written.
        """
        with self._seconds.time("write"):
            for record in self._journal.finished():
                self._rows.write(record.part)
                for box in record.damaged:
                    self._damage.add(self._view.level, box)
                    self._journalled.add(box)
        done = self._journal.y
        if done >= self._grid.height:
            first = len(self._grid.ys)
        else:
            # Unfinished rows need every tile that reaches into them, or into the CRF's halo there.
            halo = 0 if self._options.crf is None else self._options.crf.halo_px
            first = next(i for i, y in enumerate(self._grid.ys) if y + self._grid.tile_px > done - halo)
        before = sum(band_pixels(self._own, tile) for row in range(first) for tile in self._own.row(row))
        self._counts.pixels += before
        self._counts.pixels_before += before
        self._grid = _from_row(self._grid, first)
        self._strips = Strips(self._view, self._grid, self._options, self._damage)

    def run(self, engine: Engine) -> dict[str, Any]:
        """Run the rows that are not finished.

        Returns
        -------
        What ``run.json`` says of the device, nothing on the host; and ``crf``, where it was run.

        Raises
        ------
        SlideError, OutputError
            If the slide cannot be read, or the rows not be written.
        StoppedError
            If it was stopped; what is finished is in the journal.
        """
        assert self._strips is not None, "begin first"
        if self._journal.y >= self._grid.height:
            return {}
        options, crf = self._options, self._crf_stage()
        if crf is not None:  # which needs scores whether they are written or not
            options = replace(options, probabilities=True)
        channels = self._view.channels
        with closing(open_stream(engine, self._grid, options, self._seconds, channels=channels)) as stream:
            for row in range(len(self._grid.ys)):
                if self._grid.row(row):
                    with self._seconds.time("read"):
                        tiles, strip = next(self._strips)
                    if crf is not None:
                        crf.see(strip, tiles)
                    for some in stream.feed(strip, tiles):
                        self._count(some)
                self._hand_on(stream.finish_row(row), crf)
                if self._stopping() and row + 1 < len(self._grid.ys):
                    self._hand_on(stream.drain(), crf)
                    raise StoppedError
            self._hand_on(stream.drain(), crf)
            record = stream.record()
        return record if crf is None else {**record, "crf": crf.record()}

    def close(self) -> None:
        """Stop reading."""
        if self._strips is not None:
            self._strips.close()

    def _crf_stage(self) -> CrfStage | None:
        if self._options.crf is None:
            return None
        return CrfStage(
            self._grid,
            (self._own.x0, self._own.x1),
            self._options.crf,
            classes=len(self._card.classes),
            channels=self._view.channels,
            probabilities=self._options.probabilities,
            start=self._journal.y,
        )

    def _count(self, tiles: list[Tile]) -> None:
        counts = self._counts
        counts.tiles += len(tiles)
        counts.pixels += sum(band_pixels(self._own, tile) for tile in tiles)
        counts.report(counts.pixels, counts.total_pixels)

    def _hand_on(self, parts: Iterable[LabelRows], crf: CrfStage | None) -> None:
        """Refine, journal and write finished rows; those that are in the journal are left out."""
        if crf is not None:
            with self._seconds.time("crf"):
                parts = list(crf.take(parts))
        for whole in parts:
            part = _below(whole, self._journal.y)
            if part is None:
                continue
            damaged = self._damage.of_level(self._view.level)
            if not part.all_outside:
                with self._seconds.time("blend"):
                    self._leave_out(part, damaged)
            with self._seconds.time("write"):
                self._journal.write(part, tuple(set(damaged) - self._journalled))
                self._journalled.update(damaged)
                self._rows.write(part)

    def _leave_out(self, part: LabelRows, damaged: Iterable[Box]) -> None:
        """Set damaged blocks to the background, and what is outside the region to `NOT_ANALYSED`."""
        height, width = part.labels.shape
        names = [c.name for c in self._card.classes]
        background = names.index(BACKGROUND) if BACKGROUND in names else NOT_ANALYSED
        for box in damaged:
            place = _overlap(_seen_as(box, self._view.scale), Box(part.x, part.y, width, height))
            labels = part.labels[place]
            analysed = labels != NOT_ANALYSED
            labels[analysed] = background
            if part.probabilities is not None:
                one_hot = 255 * (np.arange(len(names)) == background)
                part.probabilities[place][analysed] = one_hot.astype(np.uint8)
        if self._roi is not None:
            inside = self._roi.inside(Box(part.x, part.y, width, height))
            part.labels[~inside] = NOT_ANALYSED


class Strips:
    """The strips of a band, of which the first is read at once: the device need not wait for it.

    Parameters
    ----------
    view, grid, options
        As in `Band`.
    damage
        Where blocks that cannot be decoded are noted; with ``options.strict`` they are errors.
    """

    def __init__(self, view: SlideView, grid: TileGrid, options: Options, damage: Damage) -> None:
        def note(box: Box, error: SlideError) -> None:
            damage.add(view.level, box, error)

        self._strips: Generator[tuple[list[Tile], Strip], None, None] = read_strips(
            view, grid, threads=options.threads or 2, on_bad_block=None if options.strict else note
        )
        self._first = next(self._strips, None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[list[Tile], Strip]:
        if self._first is None:
            return next(self._strips)
        first, self._first = self._first, None
        return first

    def close(self) -> None:
        """Stop reading."""
        self._first = None
        self._strips.close()


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


def _seen_as(box: Box, scale: float) -> Box:
    """Return the pixels of the view that a box of the level has a part in."""
    x, y = int(box.x / scale), int(box.y / scale)
    return Box(x, y, -int(-box.right // scale) - x, -int(-box.bottom // scale) - y)


def _overlap(box: Box, within: Box) -> tuple[slice, slice]:
    """Return rows and columns of ``within``, from its corner, that lie in ``box``."""
    rows = slice(max(box.y - within.y, 0), max(min(box.bottom, within.bottom) - within.y, 0))
    columns = slice(max(box.x - within.x, 0), max(min(box.right, within.right) - within.x, 0))
    return rows, columns


def join_records(before: dict[str, Any], band: dict[str, Any]) -> dict[str, Any]:
    """Join what bands say of the device: bytes that moved add up, bytes that are held do not."""
    if not before or not band:
        return before or band
    joined = {**band, "bytes_uploaded": before["bytes_uploaded"] + band["bytes_uploaded"]}
    for held in ("bytes_planned", "pinned_bytes"):
        joined[held] = max(before[held], band[held])
    joined["batch"] = min(before["batch"], band["batch"])
    return joined


def band_pixels(grid: TileGrid, tile: Tile) -> int:
    """Pixels of the band that a tile answers for."""
    width = min(tile.write.right, grid.x1) - max(tile.write.x, grid.x0)
    return max(width, 0) * tile.write.height

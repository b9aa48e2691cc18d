"""A column band in device memory: each row is uploaded once; tiles are cut, inferred and blended there.

::

    host      read_strips -> pinned chunks              pinned labels -> sinks
                                  |                          ^
    upload stream            new rows, H2D                   |
                                  v  uploaded                |
    compute stream      cut -> network -> add, per batch; finish
                                                             |  finished
    download stream                                   labels, D2H

All work is queued, and the host waits only for the row of tiles before the last one: while the
device works on row r, the host reads row r + 1 and writes row r - 1. Buffers that two rows use at the
same time exist twice, and events mark when they are free again. Device memory is bounded by band
width x tile height, for any height of the slide.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from histostream.runtime.bundle.card import OLD_SCHEMA, ModelCard
from histostream.runtime.cuda.base import Bytes, DeviceError, DeviceMemoryError
from histostream.runtime.engines.base import to_channels
from histostream.runtime.engines.device_engine import DeviceEngine, score_bytes, tile_bytes
from histostream.runtime.stream.blend import axis_profile, profile
from histostream.runtime.stream.context import DeviceRecord
from histostream.wsi.outputs.label_rows import LabelRows
from histostream.wsi.tiling.grid import Strip, Tile, TileGrid

CHUNK_BYTES = 8 * 1024 * 1024  # of a pinned chunk; large enough for the full rate of PCIe
CHUNKS = 4
BLOCK = (128, 1, 1)  # threads; neighbours in x lie on neighbouring addresses
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BandPlan:
    """Sizes of the buffers of a band, in bytes.

    Attributes
    ----------
    pixels
        One strip of raw pixels; there are two.
    positions
        Left edge and column of each tile of a row; there are two.
    sums
        The ring of weighted sums.
    column_weights
        Summed window weights of each column, for every row of tiles that reaches unfinished rows.
    windows
        The windows along x and y of every column and row of tiles, and where the rows begin.
    labels, probabilities
        Finished labels and probabilities; there are two, on the device and pinned on the host.
    batch
        Tiles and scores of one batch.
    chunk
        One chunk of pinned memory for uploads; there are `CHUNKS`.
    """

    pixels: int
    positions: int
    sums: int
    column_weights: int
    windows: int
    labels: int
    probabilities: int
    batch: int
    chunk: int

    @property
    def device_bytes(self) -> int:
        """Total device memory, without that of the network itself."""
        double = self.pixels + self.positions + self.labels + self.probabilities
        return 2 * double + self.sums + self.column_weights + self.windows + self.batch

    @property
    def pinned_bytes(self) -> int:
        """Total pinned host memory."""
        return CHUNKS * self.chunk + 2 * (self.positions + self.labels + self.probabilities)


def plan_band(grid: TileGrid, card: ModelCard, *, channels: int, batch: int, probabilities: bool) -> BandPlan:
    """Plan the buffers of a band.

    Parameters
    ----------
    grid
        The tiles of the band.
    card
        The model.
    channels
        Channels of the strips.
    batch
        Tiles per inference.
    probabilities
        Whether the blended scores are downloaded too.
    """
    tile_px, classes = grid.tile_px, len(card.classes)
    width = _band_width(grid)
    row_bytes = min(width, grid.width) * channels
    strip_bytes = min(tile_px, grid.height) * row_bytes
    finished_px = max(bottom - top for top, bottom in _finished_rows(grid)) * (grid.x1 - grid.x0)
    return BandPlan(
        pixels=strip_bytes,
        positions=2 * 4 * len(grid.columns),
        sums=4 * classes * tile_px * width,
        column_weights=4 * _overlapping_rows(grid) * width,
        windows=4 * (tile_px * (len(grid.columns) + len(grid.ys)) + len(grid.ys)),
        labels=finished_px,
        probabilities=2 * finished_px * classes if probabilities else 0,
        batch=batch * (tile_bytes(card) + score_bytes(card)),
        chunk=max(row_bytes, min(CHUNK_BYTES, strip_bytes)),
    )


class DeviceStream:
    """Infers and blends one column band on a device; `column_band.HostStream` does so on the host.

    Parameters
    ----------
    engine
        The network.
    grid
        The tiles of the band.
    mode
        Window of the weighted sum, one of `choices.WINDOWS`.
    channels
        Channels of the strips.
    batch
        Tiles per inference; reduced if memory does not suffice.
    probabilities
        Whether the blended scores are returned too.
    time
        Returns a context that adds its duration to a stage, "copy" or "infer".

    Raises
    ------
    DeviceMemoryError
        If the band does not fit even with one tile at a time.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        grid: TileGrid,
        mode: str,
        *,
        channels: int,
        batch: int,
        probabilities: bool = False,
        time: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self._engine, self._grid, self._mode, self._time = engine, grid, mode, time
        self._probabilities = probabilities
        # Grey pixels are repeated on the device, and colours are turned into grey on the host, so that
        # the smaller number of channels is uploaded.
        self._channels = min(channels, engine.card.channels)
        self._device = engine.device
        self._memory: list[int] = []
        self._pinned: list[Bytes] = []
        self._left = grid.xs[grid.columns.start]
        self._width = _band_width(grid)
        self._overlapping_rows = _overlapping_rows(grid)
        self._finished_rows = list(_finished_rows(grid))
        self._last_fed: tuple[list[int], Strip] | None = None  # columns of the tiles, and the strip
        self._row = -1  # last row of the grid that was begun
        self._rows_fed = self._rows_finished = self._tiles_in_row = 0
        self._tiles_bottom = 0  # slide row at which the tiles end that were fed last
        # First slide row, number of rows, and slot of finished rows; no slot if no tile reaches them.
        self._pending: deque[tuple[int, int, int | None]] = deque()
        self._uploaded_bytes = 0
        self._closed = False
        self._device.activate()
        try:
            self._prepare(batch)
        except BaseException:
            self.close()
            raise

    @property
    def batch(self) -> int:
        """Tiles per inference, after any reduction."""
        return self._batch

    def feed(self, strip: Strip, tiles: list[Tile]) -> Iterator[list[Tile]]:
        """Queue the tiles of one row of the grid, which the strip has to cover.

        Yields
        ------
        The tiles of each batch, once they are queued.
        """
        slot, row = self._rows_fed % 2, tiles[0].row
        self._rows_fed += 1
        self._tiles_in_row = len(tiles)
        self._tiles_bottom = tiles[0].read.bottom
        with self._time("copy"):
            strip = Strip(strip.x, strip.y, to_channels(strip.pixels, self._channels))
            self._upload(strip, tiles, slot)
        for first in range(0, len(tiles), self._batch):
            batch = tiles[first : first + self._batch]
            with self._time("infer"):
                if first == 0:
                    self._compute.wait(self._uploaded[slot])
                    self._begin_row(row)
                self._infer(strip, slot, first, batch)
                if first + len(batch) == len(tiles):
                    self._consumed[slot].record(self._compute)
            yield batch

    def finish_row(self, row: int) -> list[LabelRows]:
        """Queue the rows that no tile after row ``row`` reaches; return those queued by the call before.

        The first call returns nothing, each later one a single part.
        """
        with self._time("infer"):
            if self._row != row:  # it has no tiles
                self._begin_row(row)
            self._finish(row)
        return [self._fetch()] if len(self._pending) > 1 else []

    def drain(self) -> list[LabelRows]:
        """Wait for all queued rows, and return them."""
        return [self._fetch() for _ in range(len(self._pending))]

    def record(self) -> DeviceRecord:
        """Return the record of the device for ``run.json``."""
        device = self._device
        return DeviceRecord(
            name=device.name,
            sm=device.sm,
            memory_bytes=device.total_bytes,
            bytes_planned=self.plan.device_bytes,
            pinned_bytes=self.plan.pinned_bytes,
            batch=self._batch,
            bytes_uploaded=self._uploaded_bytes,
        )

    def close(self) -> None:
        """Wait for the device, and free all memory; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with suppress(DeviceError):  # a failed device has raised its error before
            self._device.synchronize()
        for pointer in self._memory:
            with suppress(DeviceError):
                self._device.free(pointer)
        for array in self._pinned:
            with suppress(DeviceError):
                self._device.unpin(array)

    def _prepare(self, batch: int) -> None:
        """Allocate all memory, upload the windows, and find the batch that fits."""
        device, grid = self._device, self._grid
        card = self._engine.card
        self.plan = plan_band(grid, card, channels=self._channels, batch=1, probabilities=self._probabilities)
        plan = self.plan
        self._compute, self._up, self._down = self._engine.stream, device.stream(), device.stream()
        self._uploaded, self._consumed, self._finished, self._downloaded = (
            (device.event(), device.event()) for _ in range(4)
        )
        self._pixels = self._alloc(plan.pixels), self._alloc(plan.pixels)
        self._positions = self._alloc(plan.positions), self._alloc(plan.positions)
        self._sums, self._column_weights = self._alloc(plan.sums), self._alloc(plan.column_weights)
        self._labels = self._alloc(plan.labels), self._alloc(plan.labels)
        self._shares = (0, 0)
        self._shares_out: tuple[Bytes, ...] = ()
        if plan.probabilities:
            self._shares = self._alloc(plan.probabilities), self._alloc(plan.probabilities)
            self._shares_out = self._pin(plan.probabilities), self._pin(plan.probabilities)
        self._labels_out = self._pin(plan.labels), self._pin(plan.labels)
        self._positions_in = self._pin(plan.positions), self._pin(plan.positions)
        self._chunks = deque((self._pin(plan.chunk), device.event()) for _ in range(CHUNKS))
        device.zero(self._sums, plan.sums, self._compute)
        self._upload_windows()
        max_batch = self._engine.max_batch
        if batch > max_batch:
            log.warning("%s takes %d tiles at once, not %d", self._engine.name, max_batch, batch)
        self._batch = self._fitting_batch(min(batch, max_batch))
        self.plan = plan_band(grid, card, channels=self._channels, batch=self._batch, probabilities=self._probabilities)
        log.info(
            "%s: %.0f MiB planned on the device, %.0f MiB pinned on the host, %d tiles at once",
            device.name,
            self.plan.device_bytes / 2**20,
            self.plan.pinned_bytes / 2**20,
            self._batch,
        )

    def _upload_windows(self) -> None:
        """Upload the windows, and the first slide row of each row of tiles."""
        grid = self._grid
        base = profile(self._mode, grid.tile_px, grid.overlap_px)
        wx = [axis_profile(self._mode, base, grid.xs, i) for i in grid.columns]
        wy = [axis_profile(self._mode, base, grid.ys, i) for i in range(len(grid.ys))]
        parts = [np.stack(wx).reshape(-1), np.stack(wy).reshape(-1), np.array(grid.ys, np.uint32)]
        table = np.concatenate(parts).view(np.uint8)
        self._wx = self._alloc(table.nbytes)
        self._wy = self._wx + parts[0].nbytes
        self._ys = self._wy + parts[1].nbytes
        staged = self._device.pinned(table.nbytes)
        staged[:] = table
        self._device.upload(self._wx, staged, self._compute)
        self._compute.synchronize()
        self._device.unpin(staged)

    def _fitting_batch(self, batch: int) -> int:
        """Try a batch, and half of it while memory does not suffice; this also warms the network up."""
        while True:
            try:
                tiles, scores = self._engine.buffers(batch)
                size = batch * tile_bytes(self._engine.card)
                self._device.zero(tiles, size, self._compute)
                self._engine.infer_device(tiles, scores, batch, self._compute)
                self._compute.synchronize()
            except DeviceMemoryError as error:
                if batch == 1:
                    raise
                log.warning("%d tiles at once do not fit on the device, running %d: %s", batch, batch // 2, error)
                batch //= 2
            else:
                self._tiles, self._scores = tiles, scores
                return batch

    def _upload(self, strip: Strip, tiles: list[Tile], slot: int) -> None:
        """Upload the rows of a strip that are not on the device yet, and the positions of its tiles."""
        height, width, channels = strip.pixels.shape
        row_bytes = width * channels
        if channels != self._channels or height * row_bytes > self.plan.pixels:
            raise ValueError(
                f"a strip of {strip.pixels.shape} does not fit the plan of {self.plan.pixels} bytes "
                f"and {self._channels} channels"
            )
        self._up.wait(self._consumed[slot])  # by the row before the last
        first = self._reuse_rows(strip, tiles, slot)
        chunk_rows = max(self.plan.chunk // row_bytes, 1)
        for at, stop in pairwise([*range(first, height, chunk_rows), height]):
            chunk, free = self._chunks[0]
            self._chunks.rotate(-1)
            free.synchronize()
            staged = chunk[: (stop - at) * row_bytes]
            staged.reshape(stop - at, width, channels)[...] = strip.pixels[at:stop]
            self._device.upload(self._pixels[slot] + at * row_bytes, staged, self._up)
            free.record(self._up)
            self._uploaded_bytes += staged.nbytes
        columns = [tile.column - self._grid.columns.start for tile in tiles]
        positions = np.array([[tile.read.x for tile in tiles], columns], np.int32)
        self._uploaded[slot].synchronize()  # the positions of the row before the last are copied
        staged = self._positions_in[slot][: positions.nbytes]
        staged[:] = positions.view(np.uint8).reshape(-1)
        self._device.upload(self._positions[slot], staged, self._up)
        self._uploaded[slot].record(self._up)

    def _reuse_rows(self, strip: Strip, tiles: list[Tile], slot: int) -> int:
        """Copy the rows that the last strip has in common on the device; return their number.

        Both need tiles in the same columns, because `read_strips` leaves pixels white that no tile of
        the row needs.
        """
        columns = [tile.column for tile in tiles]
        last, self._last_fed = self._last_fed, (columns, strip)
        if last is None or last[0] != columns:
            return 0
        before = last[1]
        end = before.y + len(before.pixels)
        same = before.x == strip.x and before.pixels.shape[1:] == strip.pixels.shape[1:]
        if not same or not before.y <= strip.y < end:
            return 0
        row_bytes = strip.pixels.shape[1] * self._channels
        count = min(end - strip.y, len(strip.pixels))
        start = self._pixels[1 - slot] + (strip.y - before.y) * row_bytes
        self._device.copy(self._pixels[slot], start, count * row_bytes, self._up)
        return count

    def _begin_row(self, row: int) -> None:
        self._row = row
        size = 4 * self._width
        self._device.zero(self._column_weights + row % self._overlapping_rows * size, size, self._compute)

    def _infer(self, strip: Strip, slot: int, first: int, batch: list[Tile]) -> None:
        """Queue one batch of a row, from its tile ``first`` on: cut, network, add."""
        grid, card, n = self._grid, self._engine.card, len(batch)
        xs = self._positions[slot] + 4 * first
        # The columns of the row's tiles lie behind the left edges of all of them.
        columns = self._positions[slot] + 4 * (first + self._tiles_in_row)
        size = grid.tile_px
        blocks = (-(-size // BLOCK[0]), size, n)
        y, row = batch[0].read.y, batch[0].row
        self._device.launch(
            "cut_tiles",
            blocks,
            BLOCK,
            (
                self._pixels[slot],
                xs,
                self._tiles,
                strip.x,
                strip.y,
                strip.pixels.shape[1],
                self._channels,
                y,
                grid.width,
                grid.height,
                size,
                card.channels,
            ),
            self._compute,
        )
        self._engine.infer_device(self._tiles, self._scores, n, self._compute)
        self._device.launch(
            "add_scores",
            blocks,
            BLOCK,
            (
                self._scores,
                xs,
                columns,
                self._wx,
                self._wy + 4 * row * size,
                self._sums,
                self._column_weights + 4 * (row % self._overlapping_rows) * self._width,
                n,
                len(card.classes),
                size,
                y,
                self._left,
                self._width,
                int(card.schema == OLD_SCHEMA),
            ),
            self._compute,
        )

    def _finish(self, row: int) -> None:
        """Queue the kernel of the finished rows, and their download."""
        grid, slot = self._grid, self._rows_finished % 2
        top, bottom = self._finished_rows[row]
        count, width = bottom - top, grid.x1 - grid.x0
        if self._tiles_bottom <= top:  # no tile reaches them, the sums are 0
            self._pending.append((top, count, None))
            return
        self._rows_finished += 1
        first = next(r for r in range(row + 1) if grid.ys[r] + grid.tile_px > top)
        self._compute.wait(self._downloaded[slot])  # the rows before the last
        self._device.launch(
            "finish_rows",
            (-(-self._width // BLOCK[0]), count, 1),
            BLOCK,
            (
                self._sums,
                self._column_weights,
                self._ys,
                self._wy,
                self._labels[slot],
                self._shares[slot],
                len(self._engine.card.classes),
                grid.tile_px,
                self._width,
                top,
                count,
                first,
                row,
                self._overlapping_rows,
                int(grid.keep is not None),
                grid.x0 - self._left,
                grid.x1 - self._left,
            ),
            self._compute,
        )
        self._finished[slot].record(self._compute)
        self._down.wait(self._finished[slot])
        pixels = count * width
        self._device.download(self._labels_out[slot][:pixels], self._labels[slot], self._down)
        if self._probabilities:
            size = 2 * pixels * len(self._engine.card.classes)
            self._device.download(self._shares_out[slot][:size], self._shares[slot], self._down)
        self._downloaded[slot].record(self._down)
        self._pending.append((top, count, slot))

    def _fetch(self) -> LabelRows:
        """Wait for the oldest queued rows, and return them."""
        top, count, slot = self._pending.popleft()
        x0, width = self._grid.x0, self._grid.x1 - self._grid.x0
        classes = len(self._engine.card.classes) if self._probabilities else None
        if slot is None:
            return LabelRows.outside(x0, top, width, count, classes=classes)
        with self._time("infer"):
            self._downloaded[slot].synchronize()
        with self._time("copy"):
            labels = self._labels_out[slot][: count * width].reshape(count, width).copy()
            shares = None
            if classes is not None:
                shape = (count, width, classes)
                shares = self._shares_out[slot][: 2 * np.prod(shape)].view(np.uint16).reshape(shape).copy()
        return LabelRows(x0, top, labels, shares)

    def _alloc(self, nbytes: int) -> int:
        self._memory.append(self._device.alloc(nbytes))
        return self._memory[-1]

    def _pin(self, nbytes: int) -> Bytes:
        self._pinned.append(self._device.pinned(nbytes))
        return self._pinned[-1]


def _band_width(grid: TileGrid) -> int:
    """Return the number of pixel columns that the band's tiles cover."""
    return grid.xs[grid.columns[-1]] + grid.tile_px - grid.xs[grid.columns.start]


def _finished_rows(grid: TileGrid) -> Iterator[tuple[int, int]]:
    """Return the first and last slide row, exclusive, that each row of tiles finishes."""
    return pairwise((*grid.ys, grid.height))


def _overlapping_rows(grid: TileGrid) -> int:
    """Return the largest number of rows of tiles that cover the same pixel row."""
    return max(sum(1 for y in grid.ys[: row + 1] if y + grid.tile_px > top) for row, top in enumerate(grid.ys))

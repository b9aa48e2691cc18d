"""A column band on the device: rows up once, tiles cut, inferred, blended; finished rows down.

::

    host      read_strips -> pinned chunks              pinned labels -> sinks
                                  |                          ^
    upload stream            new rows, H2D                   |
                                  v  uploaded                |
    compute stream      cut -> network -> add, per batch; finish
                                                             |  finished
    download stream                                   labels, D2H

Everything is queued; the host waits only for the rows before the last. So while the device works
on row r of the tiles, the host reads row r + 1 and writes row r - 1. What two rows use at the same
time is there twice, and events say when it is free again. Memory on the device is bounded by the
band's width x the tile's height, whatever the height of the slide.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.cuda.base import Bytes, DeviceError, DeviceMemoryError
from histostream.runtime.engines.base import to_channels
from histostream.runtime.engines.device_engine import DeviceEngine, score_bytes, tile_bytes
from histostream.runtime.stream.blend import axis_profile, profile
from histostream.wsi.outputs.label_rows import LabelRows
from histostream.wsi.tiling.grid import Strip, Tile, TileGrid

CHUNK_BYTES = 8 * 1024 * 1024  # of the pinned ring; large enough for the full rate of PCIe
CHUNKS = 4
BLOCK = (128, 1, 1)  # threads; neighbours in x lie on neighbouring addresses
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BandPlan:
    """Sizes of what a band takes, in bytes.

    Attributes
    ----------
    rows
        One strip of raw pixels; there are two.
    places
        Edge and column of each tile of a row; there are two.
    sums
        The ring of weighted sums.
    columns
        The column weights of the rows of tiles that still reach unfinished rows.
    weights
        The windows along x and y of every column and row of tiles, and where the rows begin.
    labels, shares
        Finished labels and probabilities; there are two, on the device and pinned on the host.
    batch
        Tiles and scores of one batch.
    chunk
        One chunk of the pinned ring.
    """

    rows: int
    places: int
    sums: int
    columns: int
    weights: int
    labels: int
    shares: int
    batch: int
    chunk: int

    @property
    def device_bytes(self) -> int:
        """Device memory in all, without the network's own."""
        twice = self.rows + self.places + self.labels + self.shares
        return 2 * twice + self.sums + self.columns + self.weights + self.batch

    @property
    def pinned_bytes(self) -> int:
        """Pinned host memory in all."""
        return CHUNKS * self.chunk + 2 * (self.places + self.labels + self.shares)


def plan_band(grid: TileGrid, card: ModelCard, *, channels: int, batch: int, probabilities: bool) -> BandPlan:
    """Count what a band takes.

    Parameters
    ----------
    grid
        The tiles of the band.
    card
        The model.
    channels
        Of the strips.
    batch
        Tiles per inference.
    probabilities
        Whether the blended scores are wanted too.
    """
    tile_px, classes = grid.tile_px, len(card.classes)
    width = _band_width(grid)
    row = min(width, grid.width) * channels
    finished = max(bottom - top for top, bottom in _finished(grid)) * (grid.x1 - grid.x0)
    return BandPlan(
        rows=min(tile_px, grid.height) * row,
        places=2 * 4 * len(grid.columns),
        sums=4 * classes * tile_px * width,
        columns=4 * _slots(grid) * width,
        weights=4 * (tile_px * (len(grid.columns) + len(grid.ys)) + len(grid.ys)),
        labels=finished,
        shares=finished * classes if probabilities else 0,
        batch=batch * (tile_bytes(card) + score_bytes(card)),
        chunk=max(row, min(CHUNK_BYTES, min(tile_px, grid.height) * row)),
    )


class DeviceStream:
    """One column band through a device; the counterpart of `band.HostStream`.

    Parameters
    ----------
    engine
        The network.
    grid
        The tiles of the band.
    mode
        Window of the weighted sum, one of `blend.WINDOWS`.
    channels
        Of the strips.
    batch
        Tiles per inference; fewer where memory does not last for so many.
    probabilities
        Whether the blended scores are wanted too.
    time
        Gives a context that adds its duration to a stage, "copy" or "infer".

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
        # Grey is sent as it is and repeated on the device; colours that a grey model does not see
        # stay on the host.
        self._channels = min(channels, engine.card.channels)
        self._device = engine.device
        self._memory: list[int] = []
        self._pins: list[Bytes] = []
        self._left = grid.xs[grid.columns.start]
        self._width = _band_width(grid)
        self._slots = _slots(grid)
        self._finished_rows = list(_finished(grid))
        self._last: tuple[list[int], Strip] | None = None  # columns and strip that were fed last
        self._row = -1  # of the grid, fed last
        self._fed = self._done = self._tiles_in_row = 0
        self._reach = 0  # slide row at which the tiles that were fed end
        # Slide row, rows, and slot; no slot where no tile reaches.
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
        """Tiles per inference."""
        return self._batch

    def feed(self, strip: Strip, tiles: list[Tile]) -> Iterator[list[Tile]]:
        """Queue the tiles of one row of the grid; they have to lie on the strip.

        Yields
        ------
        The tiles of a batch, once they are queued.
        """
        slot, row = self._fed % 2, tiles[0].row
        self._fed += 1
        rows = self._rows[slot]
        self._tiles_in_row = len(tiles)
        self._reach = tiles[0].read.bottom
        with self._time("copy"):
            strip = Strip(strip.x, strip.y, to_channels(strip.pixels, self._channels))
            self._upload(strip, tiles, slot)
        for first in range(0, len(tiles), self._batch):
            some = tiles[first : first + self._batch]
            with self._time("infer"):
                if first == 0:
                    self._compute.wait(self._uploaded[slot])
                    self._begin_row(row)
                self._infer(strip, rows, slot, first, some)
                if first + len(some) == len(tiles):
                    self._consumed[slot].record(self._compute)
            yield some

    def finish_row(self, row: int) -> list[LabelRows]:
        """Queue the rows that no tile after row ``row`` reaches; return those that are ready.

        Those are the rows before: nothing at the first call, one part at each later one.
        """
        with self._time("infer"):
            if self._row != row:  # a row without tiles
                self._begin_row(row)
            self._finish(row)
        return [self._take()] if len(self._pending) > 1 else []

    def drain(self) -> list[LabelRows]:
        """Wait for all rows that are queued."""
        return [self._take() for _ in range(len(self._pending))]

    def record(self) -> dict[str, Any]:
        """Return what ``run.json`` says of the device."""
        device = self._device
        return {
            "name": device.name,
            "sm": device.sm,
            "memory_bytes": device.total_bytes,
            "bytes_planned": self.plan.device_bytes,
            "pinned_bytes": self.plan.pinned_bytes,
            "batch": self._batch,
            "bytes_uploaded": self._uploaded_bytes,
        }

    def close(self) -> None:
        """Wait for the device, and give its memory back; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with suppress(DeviceError):  # a failed device matters where it failed
            self._device.synchronize()
        for pointer in self._memory:
            with suppress(DeviceError):
                self._device.free(pointer)
        for array in self._pins:
            with suppress(DeviceError):
                self._device.unpin(array)

    def _prepare(self, batch: int) -> None:
        """Take all memory, smaller batches first where it does not last."""
        device, grid = self._device, self._grid
        card = self._engine.card
        self.plan = plan_band(grid, card, channels=self._channels, batch=1, probabilities=self._probabilities)
        plan = self.plan
        self._compute, self._up, self._down = self._engine.stream, device.stream(), device.stream()
        self._uploaded, self._consumed, self._finished, self._downloaded = (
            (device.event(), device.event()) for _ in range(4)
        )
        self._rows = self._alloc(plan.rows), self._alloc(plan.rows)
        self._places = self._alloc(plan.places), self._alloc(plan.places)
        self._sums, self._columns = self._alloc(plan.sums), self._alloc(plan.columns)
        self._labels = self._alloc(plan.labels), self._alloc(plan.labels)
        self._shares = (0, 0)
        self._shares_out: tuple[Bytes, ...] = ()
        if plan.shares:
            self._shares = self._alloc(plan.shares), self._alloc(plan.shares)
            self._shares_out = self._pin(plan.shares), self._pin(plan.shares)
        self._labels_out = self._pin(plan.labels), self._pin(plan.labels)
        self._places_in = self._pin(plan.places), self._pin(plan.places)
        self._chunks = deque((self._pin(plan.chunk), device.event()) for _ in range(CHUNKS))
        device.zero(self._sums, plan.sums, self._compute)
        self._send_weights()
        most = self._engine.max_batch
        if batch > most:
            log.warning("%s takes %d tiles at once, not %d", self._engine.name, most, batch)
        self._batch = self._fitting_batch(min(batch, most))
        self.plan = plan_band(grid, card, channels=self._channels, batch=self._batch, probabilities=self._probabilities)
        log.info(
            "%s: %.0f MiB planned on the device, %.0f MiB pinned on the host, %d tiles at once",
            device.name,
            self.plan.device_bytes / 2**20,
            self.plan.pinned_bytes / 2**20,
            self._batch,
        )

    def _send_weights(self) -> None:
        """Upload the windows, and where rows of tiles begin."""
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
        """Try a batch, and half of it where memory does not last; also the network's warm-up."""
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
        """Send what the device does not have yet of a strip, and where its tiles are."""
        height, width, channels = strip.pixels.shape
        row_bytes = width * channels
        if channels != self._channels or height * row_bytes > self.plan.rows:
            raise ValueError(
                f"a strip of {strip.pixels.shape} does not fit the plan of {self.plan.rows} bytes "
                f"and {self._channels} channels"
            )
        self._up.wait(self._consumed[slot])  # of the row before the last
        first = self._reuse(strip, tiles, slot)
        for at, stop in self._pieces(first, height, row_bytes):
            chunk, free = self._chunks[0]
            self._chunks.rotate(-1)
            free.synchronize()
            staged = chunk[: (stop - at) * row_bytes]
            staged.reshape(stop - at, width, channels)[...] = strip.pixels[at:stop]
            self._device.upload(self._rows[slot] + at * row_bytes, staged, self._up)
            free.record(self._up)
            self._uploaded_bytes += staged.nbytes
        places = np.array(
            [[t.read.x for t in tiles], [t.column - self._grid.columns.start for t in tiles]],
            np.int32,
        )
        self._uploaded[slot].synchronize()  # the row before the last has left the host
        staged = self._places_in[slot][: places.nbytes]
        staged[:] = places.view(np.uint8).reshape(-1)
        self._device.upload(self._places[slot], staged, self._up)
        self._uploaded[slot].record(self._up)

    def _reuse(self, strip: Strip, tiles: list[Tile], slot: int) -> int:
        """Copy the rows that the last strip has on the device; return how many those are.

        Only where both have the same columns of tiles: elsewhere `read_strips` leaves white what
        no tile of the row needs.
        """
        columns = [tile.column for tile in tiles]
        last, self._last = self._last, (columns, strip)
        if last is None or last[0] != columns:
            return 0
        before = last[1]
        end = before.y + len(before.pixels)
        same = before.x == strip.x and before.pixels.shape[1:] == strip.pixels.shape[1:]
        if not same or not before.y <= strip.y < end:
            return 0
        row_bytes = strip.pixels.shape[1] * self._channels
        count = min(end - strip.y, len(strip.pixels))
        start = self._rows[1 - slot] + (strip.y - before.y) * row_bytes
        self._device.copy(self._rows[slot], start, count * row_bytes, self._up)
        return count

    def _pieces(self, first: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
        """Rows first:stop in pieces that fit a pinned chunk."""
        rows = max(self.plan.chunk // row_bytes, 1)
        edges = [*range(first, stop, rows), stop]
        return iter(pairwise(edges))

    def _begin_row(self, row: int) -> None:
        self._row = row
        size = 4 * self._width
        self._device.zero(self._columns + row % self._slots * size, size, self._compute)

    def _infer(self, strip: Strip, rows: int, slot: int, first: int, some: list[Tile]) -> None:
        """Queue one batch: cut, network, add."""
        grid, card, n = self._grid, self._engine.card, len(some)
        xs = self._places[slot] + 4 * first
        # Tiles' edges, then their columns: the second half begins after all of the row's tiles.
        places = self._places[slot] + 4 * (first + self._tiles_in_row)
        size = grid.tile_px
        blocks = (-(-size // BLOCK[0]), size, n)
        y, row = some[0].read.y, some[0].row
        self._device.launch(
            "cut_tiles",
            blocks,
            BLOCK,
            (
                rows,
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
                places,
                self._wx,
                self._wy + 4 * row * size,
                self._sums,
                self._columns + 4 * (row % self._slots) * self._width,
                n,
                len(card.classes),
                size,
                y,
                self._left,
                self._width,
            ),
            self._compute,
        )

    def _finish(self, row: int) -> None:
        """Queue the finished rows' kernel and their way down."""
        grid, slot = self._grid, self._done % 2
        top, bottom = self._finished_rows[row]
        count, width = bottom - top, grid.x1 - grid.x0
        if self._reach <= top:  # the sums are 0 already
            self._pending.append((top, count, None))
            return
        self._done += 1
        first = next(r for r in range(row + 1) if grid.ys[r] + grid.tile_px > top)
        self._compute.wait(self._downloaded[slot])  # of the row before the last
        self._device.launch(
            "finish_rows",
            (-(-self._width // BLOCK[0]), count, 1),
            BLOCK,
            (
                self._sums,
                self._columns,
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
                self._slots,
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
            size = pixels * len(self._engine.card.classes)
            self._device.download(self._shares_out[slot][:size], self._shares[slot], self._down)
        self._downloaded[slot].record(self._down)
        self._pending.append((top, count, slot))

    def _take(self) -> LabelRows:
        """Wait for the oldest rows that are queued."""
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
                shares = self._shares_out[slot][: np.prod(shape)].reshape(shape).copy()
        return LabelRows(x0, top, labels, shares)

    def _alloc(self, nbytes: int) -> int:
        self._memory.append(self._device.alloc(nbytes))
        return self._memory[-1]

    def _pin(self, nbytes: int) -> Bytes:
        self._pins.append(self._device.pinned(nbytes))
        return self._pins[-1]


def _band_width(grid: TileGrid) -> int:
    """Columns that the band's tiles reach."""
    return grid.xs[grid.columns[-1]] + grid.tile_px - grid.xs[grid.columns.start]


def _finished(grid: TileGrid) -> Iterator[tuple[int, int]]:
    """First and last row of the slide, exclusive, that each row of tiles finishes."""
    return pairwise((*grid.ys, grid.height))


def _slots(grid: TileGrid) -> int:
    """Most rows of tiles that meet in one row of pixels, so many column weights are kept."""
    return max(sum(1 for y in grid.ys[: row + 1] if y + grid.tile_px > top) for row, top in enumerate(grid.ys))

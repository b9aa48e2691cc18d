"""Read a slide as strips, each the pixels of one row of tiles; threads decode every block once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.slides.damage import read_block
from histostream.wsi.slides.reader import WHITE, read_from_blocks
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.tiling.grid import Strip, Tile, TileGrid

PIECE_PX = 1024  # columns that one thread assembles at a time

BlockKey = tuple[int, int]  # (row, column) in the level's lattice of blocks
Span = tuple[int, int]  # [first, last)


def read_strips(
    view: SlideView,
    grid: TileGrid,
    *,
    threads: int = 2,
    prefetch: int = 1,
    on_bad_block: Callable[[Box, SlideError], None] | None = None,
) -> Generator[tuple[list[Tile], Strip], None, None]:
    """Read the pixels of a grid's tiles, one row of tiles at a time.

    A block of the file that several tiles need is decoded once; a block that no tile needs is not
    decoded. Memory holds ``prefetch + 1`` strips and the blocks that they share with the next row,
    whatever the height of the slide.

    Parameters
    ----------
    view
        The slide at the resolution of the grid.
    grid
        The tiles; it must have the size of the view.
    threads
        Decoding threads.
    prefetch
        Number of strips that are prepared while the caller works on one.
    on_bad_block
        Called in another thread with the box of a block that cannot be decoded (in pixels of
        ``view.level``) and the error; the block becomes white. None raises the error.

    Yields
    ------
    The tiles of a row of the grid (rows without tiles are skipped), and the strip that they lie on,
    from the first tile's left edge to the last one's right edge, cut at the slide's border. If a
    tile lies mostly outside of the slide, the strip begins earlier, since the tile's mirrored part
    needs more pixels. Pixels that no tile needs are white. Do not change the pixels: the next strip
    copies the rows that both share.

    Raises
    ------
    SlideError
        If a block cannot be decoded.
    ValueError
        If the grid and the view differ in size.
    """
    if (grid.width, grid.height) != (view.width, view.height):
        raise ValueError(f"the grid covers {grid.width}x{grid.height} px, the view has {view.width}x{view.height}")
    rows = [row for row in range(len(grid.ys)) if grid.row(row)]
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    # One thread prepares the strips in order and owns the blocks; it waits for the pool's threads.
    conductor = ThreadPoolExecutor(1, thread_name_prefix="strips")
    window = _BlockWindow(view, grid, rows, pool, on_bad_block)
    ahead: deque[Future[tuple[list[Tile], Strip]]] = deque()
    try:
        for row in rows:
            ahead.append(conductor.submit(window.strip, row))
            if len(ahead) > prefetch:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        conductor.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=False, cancel_futures=True)
        conductor.shutdown(wait=True)
        pool.shutdown(wait=True)


def all_blocks_are_in(blocks: Collection[Box], view: SlideView, grid: TileGrid) -> bool:
    """Whether all blocks of the view's level that the tiles of a grid need are among some boxes of the level."""
    block_w, block_h = view.slide.block_px[view.level]
    keys = {(box.y // block_h, box.x // block_w) for box in blocks}
    rows = [row for row in range(len(grid.ys)) if grid.row(row)]
    return all(keys.issuperset(_needs_of(view, grid, row).blocks) for row in rows)


def cut(strip: Strip, tile: Tile, *, width: int, height: int) -> NDArray[np.uint8]:
    """Cut one tile out of its strip; beyond the slide's border, the slide is mirrored.

    Parameters
    ----------
    strip
        The strip that `read_strips` yields with this tile.
    tile
        The tile.
    width, height
        Size of the slide, in pixels of the view.

    Returns
    -------
    (read.height, read.width, C) uint8; equal to numpy's ``pad(mode="reflect")`` of the slide.
    """
    box = tile.read
    x, y = box.x - strip.x, box.y - strip.y
    if box.right <= width and box.bottom <= height:
        return strip.pixels[y : y + box.height, x : x + box.width]
    columns = _mirrored(box.x, box.right, width) - strip.x
    rows = _mirrored(box.y, box.bottom, height) - strip.y
    return strip.pixels[rows[:, None], columns]


def _mirrored(start: int, stop: int, size: int) -> NDArray[np.int64]:
    """Return an index into 0:size for each of start:stop, mirrored at the first and last pixel."""
    period = max(2 * (size - 1), 1)
    index = np.arange(start, stop) % period
    return np.minimum(index, period - index) if size > 1 else np.zeros_like(index)


@dataclass(frozen=True, slots=True)
class _Needs:
    """The pixels of the view and the blocks of the file that one row of tiles needs."""

    tiles: list[Tile]
    rows: Span  # of the view
    runs: list[Span]  # of the view's columns, separated by gaps
    blocks: list[BlockKey]


def _needs_of(view: SlideView, grid: TileGrid, row: int) -> _Needs:
    tiles = grid.row(row)
    block_w, block_h = view.slide.block_px[view.level]
    rows = _inside(tiles[0].read.y, tiles[0].read.bottom, view.height)
    runs = _joined([_inside(tile.read.x, tile.read.right, view.width) for tile in tiles])
    columns = {c for run in runs for c in _lattice(view.source_columns(*run), block_w)}
    block_rows = _lattice(view.source_rows(*rows), block_h)
    blocks = [(row, column) for row in block_rows for column in sorted(columns)]
    return _Needs(tiles, rows, runs, blocks)


class _BlockWindow:
    """Makes strips, and keeps the decoded blocks that later strips need."""

    def __init__(
        self,
        view: SlideView,
        grid: TileGrid,
        rows: list[int],
        pool: ThreadPoolExecutor,
        on_bad_block: Callable[[Box, SlideError], None] | None,
    ) -> None:
        self._view, self._grid, self._pool = view, grid, pool
        self._on_bad_block = on_bad_block
        self._keep_from = self._first_blocks(rows)
        self._blocks: dict[BlockKey, NDArray[np.uint8]] = {}
        self._last: tuple[_Needs, Strip] | None = None

    def strip(self, row: int) -> tuple[list[Tile], Strip]:
        """Prepare one row of tiles; rows must come in order."""
        needs = _needs_of(self._view, self._grid, row)
        missing = [key for key in needs.blocks if key not in self._blocks]
        self._blocks.update(zip(missing, self._pool.map(self._decode, missing), strict=True))
        strip = self._assemble(needs)
        self._forget(row)
        self._last = needs, strip
        return needs.tiles, strip

    def _first_blocks(self, rows: list[int]) -> dict[int, int]:
        """Return for each row of tiles the first row of blocks that any later row needs."""
        height, size = self._grid.tile_px, self._view.height
        block_h = self._view.slide.block_px[self._view.level][1]
        keep_from, first = {}, self._view.slide.levels[self._view.level].height
        for row in reversed(rows):
            keep_from[row] = first
            rows_read = _inside(self._grid.ys[row], self._grid.ys[row] + height, size)
            first = min(first, self._view.source_rows(*rows_read)[0] // block_h)
        return keep_from

    def _decode(self, key: BlockKey) -> NDArray[np.uint8]:
        view = self._view
        return read_block(view.slide, view.level, *key, fill=WHITE, note=self._on_bad_block)

    def _assemble(self, needs: _Needs) -> Strip:
        (top, bottom), left, right = needs.rows, needs.runs[0][0], needs.runs[-1][1]
        pixels = np.full((bottom - top, right - left, self._view.channels), WHITE, np.uint8)
        strip = Strip(left, top, pixels)
        first = self._reuse(needs, strip)
        pieces = [(x, min(x + PIECE_PX, end)) for start, end in needs.runs for x in range(start, end, PIECE_PX)]
        if first < bottom:
            list(self._pool.map(lambda piece: self._fill(strip, piece, (first, bottom)), pieces))
        return strip

    def _fill(self, strip: Strip, columns: Span, rows: Span) -> None:
        """Fill columns and rows of a strip; they must lie on decoded blocks."""
        view = self._view
        (x0, x1), (y0, y1) = columns, rows
        out = strip.pixels[y0 - strip.y : y1 - strip.y, x0 - strip.x : x1 - strip.x]
        if view.scale == 1:
            self._copy(out, columns, rows)
            return
        source = self._copy(None, view.source_columns(*columns), view.source_rows(*rows))
        out[...] = view.resample(source, x0, y0, x1 - x0, y1 - y0)

    def _copy(self, out: NDArray[np.uint8] | None, columns: Span, rows: Span) -> NDArray[np.uint8]:
        """Copy the level's pixels in these columns and rows from their blocks to ``out``."""
        view, box = self._view, Box(columns[0], rows[0], columns[1] - columns[0], rows[1] - rows[0])
        block_px = view.slide.block_px[view.level]
        return read_from_blocks(box, block_px, view.channels, lambda row, column: self._blocks[row, column], out)

    def _reuse(self, needs: _Needs, strip: Strip) -> int:
        """Copy the rows that the last strip has already; return the first row that is missing."""
        if self._last is None or self._last[0].runs != needs.runs:
            return strip.y
        last = self._last[1]
        end = last.y + len(last.pixels)
        if not last.y <= strip.y < end:
            return strip.y
        strip.pixels[: end - strip.y] = last.pixels[strip.y - last.y :]
        return end

    def _forget(self, row: int) -> None:
        first = self._keep_from[row]
        self._blocks = {key: block for key, block in self._blocks.items() if key[0] >= first}


def _inside(start: int, stop: int, size: int) -> Span:
    """Return the pixels in 0:size that start:stop needs, where it is mirrored beyond the border."""
    if stop <= size:
        return start, stop
    index = _mirrored(start, stop, size)
    return int(index.min()), int(index.max()) + 1


def _lattice(span: Span, block_px: int) -> range:
    """Return the blocks of one axis that the pixels [first, last) lie on."""
    return range(span[0] // block_px, (span[1] - 1) // block_px + 1)


def _joined(spans: list[Span]) -> list[Span]:
    """Join spans, sorted by their start, that touch or overlap."""
    joined = [spans[0]]
    for start, end in spans[1:]:
        if start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined

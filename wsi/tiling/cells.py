"""Which cells of a lattice over a view are analysed: the pixels of a mask, or the blocks of a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.geometry import Box
from histostream.wsi.tiling.grid import TileGrid

Longs = NDArray[np.int64]
Span = tuple[Longs, Longs]  # first and last + 1 pixel of each of several intervals


@dataclass(frozen=True, slots=True)
class Cells:
    """A lattice of cells over a view, each of which is analysed or not.

    Attributes
    ----------
    keep
        (rows, columns) bool: whether a cell is analysed.
    xs, ys
        The pixels of the view that each column and each row of cells covers. Where a cell that is left out
        overlaps one that is kept, the pixels of both are left out.
    """

    keep: NDArray[np.bool_]
    xs: Span
    ys: Span

    @classmethod
    def of_picture(cls, keep: NDArray[np.bool_], width: int, height: int) -> Cells:
        """Lay a mask (h, w) over a view of ``width`` x ``height`` px: a pixel is of the cell that holds its centre."""
        (rows, ys), (columns, xs) = (_shares(size, px) for size, px in zip(keep.shape, (height, width), strict=True))
        return cls(keep[rows][:, columns], xs, ys)

    @classmethod
    def of_blocks(
        cls, keep: NDArray[np.bool_], block_px: tuple[int, int], scale: float, width: int, height: int
    ) -> Cells:
        """Lay the blocks of a level over a view: each pixel is of all blocks that it touches.

        Parameters
        ----------
        keep
            (rows, columns) bool.
        block_px
            (width, height) of a block in pixels of the level.
        scale
            Pixels of the level per pixel of the view, along one side.
        width, height
            Size of the view.
        """
        spans = []
        for count, block, size in zip(keep.shape[::-1], block_px, (width, height), strict=True):
            edges = np.arange(count + 1) * block / scale
            first = np.minimum(np.floor(edges[:-1]).astype(np.int64), size)
            spans.append((first, np.minimum(np.ceil(edges[1:]).astype(np.int64), size)))
        return cls(keep, spans[0], spans[1])

    def touches(self, xs: Span, ys: Span) -> NDArray[np.bool_]:
        """Return (rows, columns) bool: the boxes ``ys`` x ``xs`` of the view that contain a pixel of a kept cell."""
        (left, right), (top, bottom) = _meeting(self.xs, xs), _meeting(self.ys, ys)
        rows = _any_of(self.keep, top, bottom)
        return _any_of(np.ascontiguousarray(rows.T), left, right).T

    def left_out(self, box: Box) -> Iterator[tuple[slice, slice]]:
        """Yield rows and columns, counted from the corner of a box of the view, of what is not analysed in it."""
        (left, right), (top, bottom) = self.xs, self.ys
        first, last = _within(self.xs, box.x, box.right)
        for row in range(*_within(self.ys, box.y, box.bottom)):
            rows = slice(max(int(top[row]) - box.y, 0), min(int(bottom[row]), box.bottom) - box.y)
            edges = np.flatnonzero(np.diff(self.keep[row, first:last].view(np.int8), prepend=1, append=1)) + first
            for start, stop in edges.reshape(-1, 2).tolist():
                yield rows, slice(max(int(left[start]) - box.x, 0), min(int(right[stop - 1]), box.right) - box.x)


def tile_spans(grid: TileGrid) -> tuple[Span, Span]:
    """Return the pixels that the write boxes of a grid's columns and rows of tiles cover."""
    columns = [grid.tile(0, column).write for column in range(len(grid.xs))]
    rows = [grid.tile(row, 0).write for row in range(len(grid.ys))]
    xs = np.array([box.x for box in columns]), np.array([box.right for box in columns])
    return xs, (np.array([box.y for box in rows]), np.array([box.bottom for box in rows]))


def dilated(mask: NDArray[np.bool_], radius_px: int) -> NDArray[np.bool_]:
    """Widen the marked parts of a mask (h, w) by some pixels, in a square."""
    wide = mask.copy()
    for shift in range(1, radius_px + 1):
        wide[shift:] |= mask[:-shift]
        wide[:-shift] |= mask[shift:]
    wider = wide.copy()
    for shift in range(1, radius_px + 1):
        wider[:, shift:] |= wide[:, :-shift]
        wider[:, :-shift] |= wide[:, shift:]
    return wider


def eroded(mask: NDArray[np.bool_], radius_px: int = 1) -> NDArray[np.bool_]:
    """Narrow the marked parts of a mask (h, w) by some pixels, in a square."""
    return ~dilated(~mask, radius_px)


def _shares(count: int, size: int) -> tuple[NDArray[np.bool_], Span]:
    """Share ``size`` pixels among ``count`` cells; return the cells that get any, and the pixels of those."""
    edges = np.ceil(np.arange(count + 1) * (size / count) - 0.5).astype(np.int64).clip(0, size)
    edges[-1] = size
    some = edges[1:] > edges[:-1]
    return some, (edges[:-1][some], edges[1:][some])


def _meeting(cells: Span, spans: Span) -> Span:
    """Return the cells [first, last) that have a pixel in each span."""
    first = np.searchsorted(cells[1], spans[0], side="right")
    last = np.searchsorted(cells[0], spans[1], side="left")
    return first, np.maximum(first, last)


def _any_of(marked: NDArray[np.bool_], first: Longs, last: Longs) -> NDArray[np.bool_]:
    """Return (spans, columns) bool: whether any of the rows [first, last) is marked."""
    some = [marked[i:j].any(axis=0) for i, j in zip(first.tolist(), last.tolist(), strict=True)]
    return np.array(some, np.bool_).reshape(len(some), marked.shape[1])


def _within(cells: Span, start: int, stop: int) -> tuple[int, int]:
    first, last = _meeting(cells, (np.array([start]), np.array([stop])))
    return int(first[0]), int(last[0])

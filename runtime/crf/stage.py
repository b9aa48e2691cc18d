"""The CRF as a stage of the stream: finished rows of scores in, rows with refined labels out.

The CRF runs on square cells of the slide, each with a halo, so that at least 99.99 % of the labels,
at the borders of cells too, are those of a CRF over the whole slide. Cells and the kernels' grids
are anchored to the slide's corner, so that labels do not depend on column bands, threads or
interruptions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.crf import dense_crf
from histostream.runtime.crf.options import CrfOptions
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, SCORE_MAX, LabelRows
from histostream.wsi.slides.reader import WHITE
from histostream.wsi.tiling.grid import Strip, Tile, TileGrid

Value = TypeVar("Value", np.uint8, np.uint16)


class CrfStage:
    """Refines the labels of one column band.

    Pixels come in with `add_pixels`, finished rows with `refine`, which yields refined rows once
    the halo below them is complete.

    Parameters
    ----------
    grid
        The tiles of the band, widened by the halo; see `widened`.
    columns
        First and last column of the band, exclusive, without the halo.
    options
        Parameters of the CRF.
    classes, channels
        Number of score planes, and of channels of the strips.
    probabilities
        Whether the yielded rows have the network's scores.
    start
        First row to refine: a multiple of the cell's side.
    """

    def __init__(
        self,
        grid: TileGrid,
        columns: tuple[int, int],
        options: CrfOptions,
        *,
        classes: int,
        channels: int,
        probabilities: bool,
        start: int = 0,
    ) -> None:
        self._grid, self._columns, self._options = grid, columns, options
        self._probabilities = probabilities
        width, top = grid.x1 - grid.x0, max(start - options.halo_px, 0)
        self._image = _RowBuffer(width, (channels,), WHITE, top, np.uint8)
        self._scores = _RowBuffer(width, (classes,), 0, top, np.uint16)
        self._labels = _RowBuffer(width, (), NOT_ANALYSED, top, np.uint8)
        self._refined_end = start  # slide row up to which labels are refined
        self.cells = self.skipped = 0

    def add_pixels(self, strip: Strip, tiles: list[Tile]) -> None:
        """Keep the pixels of the tiles of one row; what no tile covers is white."""
        grid = self._grid
        for tile in tiles:
            box = tile.read
            top, left = max(box.y, 0), max(box.x, grid.x0)
            bottom, right = min(box.bottom, grid.height), min(box.right, grid.x1)
            if top < bottom and left < right:
                pixels = strip.pixels[top - strip.y : bottom - strip.y]
                self._image.put(top, left - grid.x0, pixels[:, left - strip.x : right - strip.x])

    def refine(self, parts: Iterable[LabelRows]) -> Iterator[LabelRows]:
        """Take finished rows with scores; yields refined rows."""
        for part in parts:
            assert part.probabilities is not None
            self._labels.put(part.y, part.x - self._grid.x0, part.labels)
            self._scores.put(part.y, part.x - self._grid.x0, part.probabilities)
            yield from self._complete_rows(part.y + len(part.labels))

    def record(self) -> dict[str, Any]:
        """Return the counts of cells for ``run.json``."""
        return {"cells": self.cells, "cells_skipped": self.skipped}

    def _complete_rows(self, bottom: int) -> Iterator[LabelRows]:
        """Refine the rows of cells whose halo ends above ``bottom``."""
        options, height = self._options, self._grid.height
        while self._refined_end < height:
            end = min(self._refined_end + options.cell_px, height)
            if bottom < min(end + options.halo_px, height):
                return
            yield self._row_of_cells(self._refined_end, end)
            self._refined_end = end
            for rows in (self._image, self._scores, self._labels):
                rows.drop_above(end - options.halo_px)

    def _row_of_cells(self, top: int, end: int) -> LabelRows:
        (x0, x1), left = self._columns, self._grid.x0
        labels = self._labels.get(top, end, x0 - left, x1 - left).copy()
        cell_px = self._options.cell_px
        for x in range(x0 // cell_px * cell_px, x1, cell_px):
            a, b = max(x, x0), min(x + cell_px, x1)
            self._refine(labels[:, a - x0 : b - x0], top, end, a, b)
        scores = None
        if self._probabilities:
            scores = self._scores.get(top, end, x0 - left, x1 - left).copy()
        return LabelRows(x0, top, labels, scores)

    def _refine(self, labels: NDArray[np.uint8], top: int, end: int, a: int, b: int) -> None:
        """Refine the labels of one cell, rows ``top:end`` and columns ``a:b`` of the slide, in place."""
        options, grid = self._options, self._grid
        may_change = labels != NOT_ANALYSED
        if options.uncertain is not None:
            scores = self._scores.get(top, end, a - grid.x0, b - grid.x0)
            may_change &= _margin(scores) < round(SCORE_MAX * options.uncertain)
        if not may_change.any():
            self.skipped += 1
            return
        self.cells += 1
        halo = options.halo_px
        y0, y1 = max(top - halo, 0), min(end + halo, grid.height)
        x0, x1 = max(a - halo, 0), min(b + halo, grid.width)
        box = (y0, y1, x0 - grid.x0, x1 - grid.x0)
        p = to_probabilities(self._scores.get(*box), self._labels.get(*box) == NOT_ANALYSED)
        q = dense_crf(self._image.get(*box), p, options.params, origin=(y0, x0), backend=options.backend)
        core = q[:, top - y0 : end - y0, a - x0 : b - x0].argmax(axis=0)
        labels[may_change] = core[may_change]


def widened(grid: TileGrid, options: CrfOptions) -> TileGrid:
    """Widen a column band by the halo on both sides, within the slide."""
    halo = options.halo_px
    return grid.band(max(grid.x0 - halo, 0), min(grid.x1 + halo, grid.width))


def to_probabilities(scores: NDArray[np.uint16], outside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Turn scores into probabilities: the share of each class in the sum of scores.

    Parameters
    ----------
    scores
        (H, W, K) uint16, of any kind whose arg-max is the label.
    outside
        (H, W), pixels that were not analysed; their classes get equal probabilities.

    Returns
    -------
    (K, H, W) float32; the sum over K is 1.
    """
    p = np.ascontiguousarray(scores.transpose(2, 0, 1), np.float32)
    total = p.sum(axis=0)
    unknown = outside | (total == 0)
    p /= np.where(unknown, 1, total)
    p[:, unknown] = 1 / len(p)
    return p


def _margin(scores: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Return the difference of the two largest scores of each pixel (H, W, K)."""
    best = np.partition(scores, scores.shape[2] - 2, axis=2)
    return np.asarray(best[..., -1] - best[..., -2])


class _RowBuffer(Generic[Value]):
    """Rows of a band from row ``top`` on, (rows, width, *depth); pixels that were not set are ``fill``."""

    def __init__(self, width: int, depth: tuple[int, ...], fill: int, top: int, dtype: type[Value]) -> None:
        self._fill = fill
        self._top = top
        self._array: NDArray[Value] = np.empty((0, width, *depth), dtype)

    def put(self, y: int, x: int, values: NDArray[Value]) -> None:
        """Set the values at row ``y`` and column ``x``; rows above the buffer are ignored."""
        first = max(self._top - y, 0)
        values, y = values[first:], y + first
        if not len(values):
            return
        self._extend(y + len(values))
        at = y - self._top
        self._array[at : at + len(values), x : x + values.shape[1]] = values

    def get(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Value]:
        """Return rows ``y0:y1`` and columns ``x0:x1``."""
        self._extend(y1)
        return self._array[y0 - self._top : y1 - self._top, x0:x1]

    def drop_above(self, y: int) -> None:
        """Free the rows above ``y``."""
        if y > self._top:
            self._extend(y)
            self._array = self._array[y - self._top :].copy()
            self._top = y

    def _extend(self, bottom: int) -> None:
        missing = bottom - self._top - len(self._array)
        if missing > 0:
            rows = np.full((missing, *self._array.shape[1:]), self._fill, self._array.dtype)
            self._array = np.concatenate([self._array, rows])

"""Tiles of a label map: of ``labels.tif``, or of the strips that a run has finished so far.

Level k holds every 2^k-th pixel of both axes, as in ``labels.tif``.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.result import ResultError
from histostream.wsi.outputs.journal import JOURNAL, Record, watched_strips
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, SCORE_MAX, LabelRows, SlideInfo
from histostream.wsi.outputs.pyramid import level_sizes
from histostream.wsi.outputs.raster import Raster
from histostream.wsi.outputs.sinks.summary import Summary

TILE_PX = 512
MAX_KEPT_PX = 32 << 20  # pixels of the finest level of an unfinished label map that is kept in memory
MAX_STRIP_BYTES = 96 << 20  # of decoded strips that are kept
MAX_COMPARED_PX = 1 << 27  # larger label maps are compared at a coarser level

Labels = NDArray[np.uint8]


def tile_box(sizes: Sequence[tuple[int, int]], level: int, column: int, row: int) -> tuple[int, int, int, int]:
    """Return x0, y0, x1, y1 of a tile in pixels of its level.

    Raises
    ------
    ResultError
        If there is no such tile.
    """
    if 0 <= level < len(sizes):
        width, height = sizes[level]
        x0, y0 = column * TILE_PX, row * TILE_PX
        if 0 <= x0 < width and 0 <= y0 < height:
            return x0, y0, min(x0 + TILE_PX, width), min(y0 + TILE_PX, height)
    raise ResultError(f"there is no tile {column}, {row} of level {level}; load the page again")


class FinishedLabels:
    """The label map of a finished run as a pyramid of tiles.

    Parameters
    ----------
    labels, scores
        Paths of ``labels.tif`` and, if there is one, ``probabilities.tif``.
    info
        Size and classes of the label map.

    Raises
    ------
    ResultError, SlideError
        If a file cannot be read, or does not have this size.

    Attributes
    ----------
    sizes
        (width, height) of each level, finest first.
    """

    def __init__(self, labels: Path, scores: Path | None, info: SlideInfo) -> None:
        self.sizes = level_sizes(info.width, info.height)
        self._labels = self._open(labels, ())
        self._scores = None if scores is None else self._open(scores, (len(info.classes),))

    def tile(self, level: int, column: int, row: int) -> Labels:
        """Return a tile, (H, W) uint8, with `TILE_PX` pixels a side, less at the right and bottom border.

        Raises
        ------
        ResultError, SlideError
            If there is no such tile, or it cannot be read.
        """
        x0, y0, x1, y1 = tile_box(self.sizes, level, column, row)
        return self._labels.read(level, x0, y0, x1 - x0, y1 - y0)

    def scores(self, x: int, y: int) -> list[float] | None:
        """Return the score of each class at a pixel, 0 to 1; None if the run did not write scores."""
        if self._scores is None:
            return None
        largest = np.iinfo(self._scores.dtype).max
        return [int(score) / largest for score in self._scores[y, x]]

    def _open(self, path: Path, channels: tuple[int, ...]) -> Raster:
        raster = Raster(path)
        levels = tuple((height, width) for width, height in self.sizes)
        if raster.levels != levels or raster.shape[2:] != channels:
            raise ResultError(f"{path.parent.name}: {path.name} is damaged, or of another run; run the slide again")
        return raster


@dataclass(frozen=True, slots=True)
class _Strip:
    """Position of a strip in its file, and its box in the label map."""

    path: Path
    offset: int
    x0: int
    x1: int
    y0: int
    y1: int


class UnfinishedLabels:
    """The strips that a run has finished, as a label map like `FinishedLabels`; the rest is `NOT_ANALYSED`.

    Coarse levels, of up to `MAX_KEPT_PX` pixels, are kept in memory. Finer levels are read from the
    journal, and the strips that were used last are kept decoded.

    Parameters
    ----------
    folder
        The slide's output folder.
    bands
        (x0, x1) of each column band, in pixels.
    info
        Size and classes of the label map.

    Attributes
    ----------
    rows
        Number of finished rows of each band.
    summary
        Pixels of each class in the finished rows.
    """

    def __init__(self, folder: Path, bands: Sequence[tuple[int, int]], info: SlideInfo) -> None:
        self.sizes = level_sizes(info.width, info.height)
        self.rows = [0] * len(bands)
        self.summary = Summary(folder, info)  # only counts; it writes nothing until it is finished
        self._bands = bands
        self._paths = [folder / JOURNAL / f"{x0}.strips" for x0, _ in bands]
        self._ends = [0] * len(bands)
        self._strips: list[list[_Strip]] = [[] for _ in bands]
        self._kept_from = next(k for k, (w, h) in enumerate(self.sizes) if w * h <= MAX_KEPT_PX)
        self._kept = [np.full((h, w), NOT_ANALYSED, np.uint8) for w, h in self.sizes[self._kept_from :]]
        self._decoded: OrderedDict[_Strip, LabelRows] = OrderedDict()  # last used last
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Read the strips that were finished since the last call.

        Raises
        ------
        JournalError
            If the journal cannot be read.
        ResultError
            If it holds labels without a class.
        """
        with self._lock:
            height = self.sizes[0][1]
            for band, (x0, x1) in enumerate(self._bands):
                strips = watched_strips(
                    self._paths[band], x0, x1, height, offset=self._ends[band], y=self.rows[band], scores=False
                )
                for record, end in strips:
                    self._add(band, record, end)

    def tile(self, level: int, column: int, row: int) -> Labels:
        """Return a tile; see `FinishedLabels.tile`."""
        x0, y0, x1, y1 = tile_box(self.sizes, level, column, row)
        with self._lock:
            if level >= self._kept_from:
                return self._kept[level - self._kept_from][y0:y1, x0:x1].copy()
            tile = np.full((y1 - y0, x1 - x0), NOT_ANALYSED, np.uint8)
            for strips in self._strips:
                for strip in strips:
                    across = strip.x0 < x1 << level and strip.x1 > x0 << level
                    if across and strip.y0 < y1 << level and strip.y1 > y0 << level:
                        _paste(self._decode(strip), level, x0, y0, tile)
            return tile

    def scores(self, x: int, y: int) -> list[float] | None:
        """Return the scores of a pixel; see `FinishedLabels.scores`."""
        with self._lock:
            strips = [strip for strips in self._strips for strip in strips]
        for strip in strips:
            if strip.x0 <= x < strip.x1 and strip.y0 <= y < strip.y1:
                part = self._read(strip, scores=True)
                if part.probabilities is not None:
                    return [int(p) / SCORE_MAX for p in part.probabilities[y - strip.y0, x - strip.x0]]
        return None

    def _add(self, band: int, record: Record, end: int) -> None:
        part = record.part
        height, width = part.labels.shape
        try:
            self.summary.write(part)
        except ValueError as error:
            raise ResultError(f"the journal does not fit the run: {error}") from error
        strip = _Strip(self._paths[band], self._ends[band], part.x, part.x + width, part.y, part.y + height)
        self._strips[band].append(strip)
        self._ends[band], self.rows[band] = end, strip.y1
        for level, kept in enumerate(self._kept, self._kept_from):
            _paste(part, level, 0, 0, kept)

    def _decode(self, strip: _Strip) -> LabelRows:
        """Return a strip's labels; those that were used last are kept."""
        if strip not in self._decoded:
            self._decoded[strip] = self._read(strip, scores=False)
            while len(self._decoded) > 1 and self._decoded_bytes() > MAX_STRIP_BYTES:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(strip)
        return self._decoded[strip]

    def _decoded_bytes(self) -> int:
        return sum(part.labels.nbytes for part in self._decoded.values() if not part.all_outside)

    def _read(self, strip: _Strip, *, scores: bool) -> LabelRows:
        height = self.sizes[0][1]
        records = watched_strips(strip.path, strip.x0, strip.x1, height, offset=strip.offset, y=strip.y0, scores=scores)
        for record, _ in records:
            return record.part
        # The run was finished or started over since; the page learns that with its next request.
        return LabelRows.outside(strip.x0, strip.y0, strip.x1 - strip.x0, strip.y1 - strip.y0)


LabelMap = FinishedLabels | UnfinishedLabels


@dataclass(frozen=True, slots=True)
class Difference:
    """How many of the pixels that two runs analysed have different labels, counted at one level."""

    pixels: int
    compared: int
    level: int


def count_differences(one: LabelMap, other: LabelMap) -> Difference:
    """Compare two label maps of the same size, at the finest level of at most `MAX_COMPARED_PX` pixels."""
    level = next((k for k, (w, h) in enumerate(one.sizes) if w * h <= MAX_COMPARED_PX), len(one.sizes) - 1)
    width, height = one.sizes[level]
    pixels = compared = 0
    for row in range(-(-height // TILE_PX)):
        for column in range(-(-width // TILE_PX)):
            a, b = one.tile(level, column, row), other.tile(level, column, row)
            both = (a != NOT_ANALYSED) & (b != NOT_ANALYSED)
            compared += int(np.count_nonzero(both))
            pixels += int(np.count_nonzero(both & (a != b)))
    return Difference(pixels, compared, level)


def _paste(part: LabelRows, level: int, x0: int, y0: int, tile: Labels) -> None:
    """Copy every 2^level-th pixel of a strip into a tile whose corner is x0, y0 in pixels of the level."""
    step, height, width = 1 << level, *part.labels.shape
    # The pixels of the level whose first pixel of level 0 lies in the strip, and in the tile.
    left, right = max(x0, -(-part.x // step)), min(x0 + tile.shape[1], -(-(part.x + width) // step))
    top, bottom = max(y0, -(-part.y // step)), min(y0 + len(tile), -(-(part.y + height) // step))
    if left < right and top < bottom:
        tile[top - y0 : bottom - y0, left - x0 : right - x0] = part.labels[
            top * step - part.y : (bottom - 1) * step - part.y + 1 : step,
            left * step - part.x : (right - 1) * step - part.x + 1 : step,
        ]

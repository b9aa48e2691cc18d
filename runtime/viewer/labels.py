"""Tiles of a label map: of the finished file, or of the strips that a run has finished so far.

Level k holds every 2^k-th pixel of both axes, as in ``labels.tif``.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.result import ResultError
from histostream.wsi.outputs.journal import JOURNAL, Record, watched_strips
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, LabelRows, SlideInfo
from histostream.wsi.outputs.pyramid import level_sizes
from histostream.wsi.outputs.raster import Raster
from histostream.wsi.outputs.sinks.summary import Summary

TILE_PX = 512
KEPT_PX = 32 << 20  # pixels of the finest level of a journal that is kept in memory
STRIP_BYTES = 96 << 20  # of decoded strips that are kept

Labels = NDArray[np.uint8]


class LabelMap(Protocol):
    """Where labels come from.

    Attributes
    ----------
    sizes
        (width, height) of each level, finest first.
    """

    sizes: list[tuple[int, int]]

    def tile(self, level: int, column: int, row: int) -> Labels:
        """Return a tile, (H, W) uint8; `TILE_PX` a side, less at the right and bottom border.

        Raises
        ------
        ResultError
            If there is no such tile, or it cannot be read.
        """

    def scores(self, x: int, y: int) -> list[int] | None:
        """Return ``round(255 p)`` of each class at a pixel; None where none were written."""


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
    """The label map of a finished run; see `LabelMap`.

    Parameters
    ----------
    labels, scores
        ``labels.tif``, and ``probabilities.tif`` where there is one.
    width, height
        Of the label map, in pixels.
    classes
        Number of classes.

    Raises
    ------
    ResultError, SlideError
        If a file is not what it should be.
    """

    def __init__(self, labels: Path, scores: Path | None, width: int, height: int, classes: int) -> None:
        self.sizes = level_sizes(width, height)
        self._labels = self._checked(labels, ())
        self._scores = None if scores is None else self._checked(scores, (classes,))

    def tile(self, level: int, column: int, row: int) -> Labels:
        """Return a tile; see `LabelMap.tile`."""
        x0, y0, x1, y1 = tile_box(self.sizes, level, column, row)
        return self._labels.read(level, x0, y0, x1 - x0, y1 - y0)

    def scores(self, x: int, y: int) -> list[int] | None:
        """Return the scores of a pixel; see `LabelMap.scores`."""
        return None if self._scores is None else [int(score) for score in self._scores[y, x]]

    def _checked(self, path: Path, samples: tuple[int, ...]) -> Raster:
        found = Raster(path)
        wanted = tuple((height, width) for width, height in self.sizes)
        if found.levels != wanted or found.shape[2:] != samples:
            raise ResultError(f"{path.parent.name}: {path.name} is damaged, or of another run; run the slide again")
        return found


@dataclass(frozen=True, slots=True)
class _Strip:
    """Where a strip lies: in its file, and in the label map."""

    path: Path
    offset: int
    x0: int
    x1: int
    y0: int
    y1: int


class UnfinishedLabels:
    """The strips that a run has finished, as a label map; what is missing is `NOT_ANALYSED`.

    Coarse levels are kept in memory, `KEPT_PX` pixels at most; finer ones are read from the
    journal, of which the last used strips are kept decoded.

    Parameters
    ----------
    folder
        The slide's output folder.
    bands
        (x0, x1) of each column band, in pixels.
    info
        The label map.

    Attributes
    ----------
    rows
        Finished rows of each band.
    summary
        Pixels of each class in them.
    """

    def __init__(self, folder: Path, bands: Sequence[tuple[int, int]], info: SlideInfo) -> None:
        self.sizes = level_sizes(info.width, info.height)
        self.rows = [0] * len(bands)
        self.summary = Summary(folder, info)  # counts; writes nothing unless it is finished
        self._bands = list(bands)
        self._paths = [folder / JOURNAL / f"{x0}.strips" for x0, _ in bands]
        self._ends = [0] * len(bands)
        self._strips: list[list[_Strip]] = [[] for _ in bands]
        self._kept_from = next(k for k, (w, h) in enumerate(self.sizes) if w * h <= KEPT_PX)
        self._kept = [np.full((h, w), NOT_ANALYSED, np.uint8) for w, h in self.sizes[self._kept_from :]]
        self._decoded: OrderedDict[_Strip, LabelRows] = OrderedDict()
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Take in the strips that were finished since the last time.

        Raises
        ------
        JournalError
            If the journal cannot be read.
        ResultError
            If it holds labels that are no class.
        """
        with self._lock:
            for number, (x0, x1) in enumerate(self._bands):
                path, height = self._paths[number], self.sizes[0][1]
                found = watched_strips(
                    path, x0, x1, height, offset=self._ends[number], y=self.rows[number], scores=False
                )
                for record, end in found:
                    self._take(number, record, end)

    def tile(self, level: int, column: int, row: int) -> Labels:
        """Return a tile; see `LabelMap.tile`."""
        x0, y0, x1, y1 = tile_box(self.sizes, level, column, row)
        with self._lock:
            if level >= self._kept_from:
                return self._kept[level - self._kept_from][y0:y1, x0:x1].copy()
            out = np.full((y1 - y0, x1 - x0), NOT_ANALYSED, np.uint8)
            for strips in self._strips:
                for strip in strips:
                    if strip.x0 < x1 << level and strip.x1 > x0 << level:
                        self._lay(strip, level, x0, y0, out)
            return out

    def scores(self, x: int, y: int) -> list[int] | None:
        """Return the scores of a pixel; see `LabelMap.scores`."""
        with self._lock:
            strips = [strip for strips in self._strips for strip in strips]
        for strip in strips:
            if strip.x0 <= x < strip.x1 and strip.y0 <= y < strip.y1:
                part = self._read(strip, scores=True)
                if part.probabilities is not None:
                    return [int(p) for p in part.probabilities[y - strip.y0, x - strip.x0]]
        return None

    def _take(self, number: int, record: Record, end: int) -> None:
        part = record.part
        height, width = part.labels.shape
        try:
            self.summary.write(part)
        except ValueError as error:
            raise ResultError(f"the journal does not fit the run: {error}") from error
        strip = _Strip(self._paths[number], self._ends[number], part.x, part.x + width, part.y, part.y + height)
        self._strips[number].append(strip)
        self._ends[number], self.rows[number] = end, strip.y1
        for k, kept in enumerate(self._kept, self._kept_from):
            _paste(part, k, 0, 0, kept)

    def _lay(self, strip: _Strip, level: int, x0: int, y0: int, out: Labels) -> None:
        """Copy what a tile shows of a strip; ``x0``, ``y0`` are the tile's, of its level."""
        if strip.y0 < (y0 + len(out)) << level and strip.y1 > y0 << level:
            _paste(self._segmented(strip), level, x0, y0, out)

    def _segmented(self, strip: _Strip) -> LabelRows:
        """Return a strip's labels, decoded once while it is in use."""
        if strip not in self._decoded:
            self._decoded[strip] = self._read(strip, scores=False)
            while len(self._decoded) > 1 and _bytes(self._decoded.values()) > STRIP_BYTES:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(strip)
        return self._decoded[strip]

    def _read(self, strip: _Strip, *, scores: bool) -> LabelRows:
        found = watched_strips(
            strip.path, strip.x0, strip.x1, self.sizes[0][1], offset=strip.offset, y=strip.y0, scores=scores
        )
        for record, _ in found:
            return record.part
        # The run was finished, or begun anew; the page will hear of it.
        return LabelRows.outside(strip.x0, strip.y0, strip.x1 - strip.x0, strip.y1 - strip.y0)


def _bytes(parts: Iterable[LabelRows]) -> int:
    return sum(part.labels.nbytes for part in parts if not part.all_outside)


def _paste(part: LabelRows, level: int, x0: int, y0: int, out: Labels) -> None:
    """Copy every 2^level-th pixel of a strip to where it belongs in ``out``.

    ``out`` begins at ``x0``, ``y0`` of the level, and shows its own height and width.
    """
    step, height, width = 1 << level, *part.labels.shape
    # The level's pixels whose first pixel of level 0 lies in the strip, and in `out`.
    left, right = max(x0, -(-part.x // step)), min(x0 + out.shape[1], -(-(part.x + width) // step))
    top, bottom = max(y0, -(-part.y // step)), min(y0 + len(out), -(-(part.y + height) // step))
    if left < right and top < bottom:
        out[top - y0 : bottom - y0, left - x0 : right - x0] = part.labels[
            top * step - part.y : (bottom - 1) * step - part.y + 1 : step,
            left * step - part.x : (right - 1) * step - part.x + 1 : step,
        ]

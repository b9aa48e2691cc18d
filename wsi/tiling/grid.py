"""Overlapping tiles over a slide: the pixels that each reads, and those that it is responsible for.

All boxes are in pixels of the level that inference runs at, not of the slide's level 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.geometry import Box


@dataclass(frozen=True, slots=True)
class Tile:
    """One input of the network.

    Attributes
    ----------
    row, column
        Position in the grid.
    read
        The pixels that the network gets. They extend beyond the right and bottom of the slide only
        if it is smaller than a tile, or where no multiple of ``align_px`` ends a tile at its border.
    write
        The pixels nearest to this tile's centre. The write boxes of a grid cover every pixel of the
        slide once.
    """

    row: int
    column: int
    read: Box
    write: Box


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows of pixels over the whole width: raw pixels before the network, labels after it.

    Attributes
    ----------
    x, y
        Top left corner on the slide, in pixels of the level that inference runs at.
    pixels
        (H, W, C) raw pixels, or (H, W) labels.
    """

    x: int
    y: int
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class TileGrid:
    """Overlapping tiles over a slide, in rows and columns.

    The last tile of a row or column is moved so that it ends at the slide's border: no tile is
    mostly padding, and the network's zero padding lies at the slide's border, as it does for the
    whole image. Make a grid with `TileGrid.cover`.

    Attributes
    ----------
    width, height
        Size of the slide, in pixels of the level that inference runs at.
    tile_px, overlap_px
        Side of a tile, and the pixels that neighbours share (the last two may share more).
    align_px
        Tiles start at multiples of this, so that pooling has the same phase everywhere.
    x0, x1
        The columns of pixels that are processed: the whole width, or a column band.
    keep
        (rows, columns) bool, the tiles that are processed; None means all.
    """

    width: int
    height: int
    tile_px: int
    overlap_px: int
    align_px: int
    x0: int
    x1: int
    keep: NDArray[np.bool_] | None = None

    @classmethod
    def cover(cls, width: int, height: int, *, tile_px: int, overlap_px: int, align_px: int = 1) -> TileGrid:
        """Cover a slide of ``width`` x ``height`` pixels with tiles.

        Raises
        ------
        ValueError
            If a size is not positive, or the overlap does not fit the tile.

        Examples
        --------
        >>> grid = TileGrid.cover(1000, 600, tile_px=512, overlap_px=64)
        >>> grid.xs, grid.ys, len(grid)
        ((0, 448, 488), (0, 88), 6)
        >>> sum(tile.write.width * tile.write.height for tile in grid) == 1000 * 600
        True
        """
        if width < 1 or height < 1:
            raise ValueError(f"a slide of {width} x {height} px has no pixels to cover")
        if not 1 <= align_px <= tile_px:
            raise ValueError(f"align_px={align_px} does not fit tile_px={tile_px}: use 1 to {tile_px}")
        if not 0 <= overlap_px < tile_px or (tile_px - overlap_px) % align_px:
            least = tile_px % align_px
            raise ValueError(
                f"overlap_px={overlap_px} does not fit tile_px={tile_px}: "
                f"use {least} or a multiple of {align_px} more, below {tile_px}"
            )
        return cls(width, height, tile_px, overlap_px, align_px, 0, width)

    @cached_property
    def xs(self) -> tuple[int, ...]:
        """Left edge of each column of tiles."""
        return self._starts(self.width)

    @cached_property
    def ys(self) -> tuple[int, ...]:
        """Top edge of each row of tiles."""
        return self._starts(self.height)

    @cached_property
    def columns(self) -> range:
        """Columns of tiles that touch the band ``x0:x1``."""
        inside = [i for i, x in enumerate(self.xs) if x < self.x1 and x + self.tile_px > self.x0]
        return range(inside[0], inside[-1] + 1)

    def band(self, x0: int, x1: int) -> TileGrid:
        """Restrict the grid to the tiles that touch the pixel columns ``x0:x1``."""
        if not 0 <= x0 < x1 <= self.width:
            raise ValueError(f"band {x0}:{x1} does not lie in a slide {self.width} px wide")
        return replace(self, x0=x0, x1=x1)

    def where(self, keep: NDArray[np.bool_]) -> TileGrid:
        """Keep only the tiles marked in ``keep``, (rows, columns) bool."""
        if keep.shape != (len(self.ys), len(self.xs)):
            raise ValueError(f"keep is {keep.shape}, the grid {(len(self.ys), len(self.xs))}")
        return replace(self, keep=keep)

    def tile(self, row: int, column: int) -> Tile:
        """Return the tile at one position of the grid."""
        x, y = self.xs[column], self.ys[row]
        left, right = self._share(self.xs, column, self.width)
        top, bottom = self._share(self.ys, row, self.height)
        write = Box(left, top, right - left, bottom - top)
        return Tile(row, column, Box(x, y, self.tile_px, self.tile_px), write)

    def row(self, row: int) -> list[Tile]:
        """Return the tiles of one row that are processed, left to right."""
        return [self.tile(row, column) for column in self.columns if self.keep is None or self.keep[row, column]]

    def __iter__(self) -> Iterator[Tile]:
        for row in range(len(self.ys)):
            yield from self.row(row)

    def __len__(self) -> int:
        if self.keep is None:
            return len(self.ys) * len(self.columns)
        return int(self.keep[:, self.columns.start : self.columns.stop].sum())

    def _starts(self, size: int) -> tuple[int, ...]:
        last = max(-((self.tile_px - size) // self.align_px) * self.align_px, 0)
        stride = self.tile_px - self.overlap_px
        return (*range(0, last, stride), last)

    def _share(self, starts: tuple[int, ...], i: int, size: int) -> tuple[int, int]:
        # Neighbours meet in the middle of what they share.
        first, last = i == 0, i == len(starts) - 1
        low = 0 if first else (starts[i] + starts[i - 1] + self.tile_px) // 2
        high = size if last else (starts[i + 1] + starts[i] + self.tile_px) // 2
        return low, high

"""Fixed-point blending: the scores of overlapping tiles become one label per pixel.

Scores become integers of 14 bits (`fixed_point`), window weights are integers of 8 bits, sums are uint32. The order of
summands does not change the sum of integers, so the label map is bit-identical for every batch size, thread count, tile
order and column band.

A window is the outer product of two profiles. A profile falls off only towards neighbours: at the
slide's border it stays at its full weight. Next to tiles that are left out (glass), the divisor is
smaller by the weight of the missing tile.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard, Scores
from histostream.runtime.choices import WINDOWS
from histostream.runtime.stream.fixed_point import ONE, to_integers
from histostream.wsi.errors import HistoError
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, SCORE_MAX, LabelRows
from histostream.wsi.tiling.grid import Tile, TileGrid

Pixels = NDArray[np.uint8]

# Largest weight of a profile that falls off. Where the last tile is shifted in, three tiles meet along an axis, and
# their weights sum to at most 2 * FULL + 1, so (2 * FULL + 1)^2 * 2^14 has to fit uint32: FULL < 256. It is even, so
# that two halves sum to it. A flat profile weighs 1.
FULL = 254
PIECE_BYTES = 1 << 19  # bytes of one plane of sums that are finished at a time: they stay in a core's cache
AVERAGING = ("hann", "gaussian", "linear", "mean")  # windows in which overlapping tiles are averaged
GAUSSIAN_SIGMA = 0.125  # of the tile's side; as in MONAI's sliding window and nnU-Net


class BlendError(HistoError, ValueError):
    """A blending mode does not fit the model or the overlap."""


def check_blend(mode: str, card: ModelCard, overlap_px: int) -> None:
    """Check that a blending mode fits the model and the overlap.

    Raises
    ------
    BlendError
        If the mode is unknown, if the overlap is more than half a tile, or if "exact" is combined with
        a network that depends on tile statistics or an overlap of less than twice the halo.
    """
    if mode not in WINDOWS:
        raise BlendError(f"no blending is called {mode!r}: use {', '.join(WINDOWS)}")
    reason = card.unblendable
    if reason and mode in AVERAGING:
        raise BlendError(f"--blend {mode}: {reason}; leave --blend out, or use crop")
    if overlap_px < 2 * card.border_px:
        least = aligned_overlap_px(card, 2 * card.border_px)
        raise BlendError(f"--overlap {overlap_px}: {reason}; leave --overlap out, or use at least {least}")
    if overlap_px >= card.tile_px:
        raise BlendError(f"--overlap {overlap_px} leaves nothing of a tile; use 0 to {card.tile_px // 2}")
    if mode == "exact":
        if card.tile_statistics:
            raise BlendError(
                "--blend exact: this model's result depends on the whole tile (instance or group normalisation, "
                "pooling over the tile) or on the position in it (aligned corners), so no overlap makes tiles agree; "
                "use hann"
            )
        if overlap_px < 2 * card.halo_px:
            raise BlendError(
                f"--blend exact needs --overlap of at least {exact_overlap_px(card)} "
                f"(twice the halo of {card.halo_px} px), not {overlap_px}"
            )
    elif overlap_px > card.tile_px // 2 and not card.border_px:
        raise BlendError(f"--overlap {overlap_px} is more than half a tile; use 0 to {card.tile_px // 2}")


def exact_overlap_px(card: ModelCard) -> int:
    """Return the smallest overlap at which every written pixel is at least a halo away from its tile's edges.

    Raises
    ------
    BlendError
        If the halo leaves nothing of the tile.
    """
    overlap_px = aligned_overlap_px(card, 2 * card.halo_px)
    if overlap_px >= card.tile_px:
        raise BlendError(
            f"--blend exact: the halo of {card.halo_px} px leaves nothing of a tile of "
            f"{card.tile_px} px; export the model with larger tiles"
        )
    return overlap_px


def aligned_overlap_px(card: ModelCard, least_px: int) -> int:
    """Return the smallest overlap of ``least_px`` or more with which tiles begin at multiples of the alignment."""
    return least_px + (card.tile_px - least_px) % card.align_px


def profile(mode: str, tile_px: int, overlap_px: int) -> NDArray[np.uint32]:
    """Return the integer weights along one axis of a tile that has neighbours on both sides.

    Over the overlap, hann and linear profiles of two neighbours sum to `FULL` exactly.

    Returns
    -------
    (tile_px,) uint32 in 1..FULL; all 1 for "mean", and for "crop" and "exact", which `axis_profile` limits to the write
    box.

    Examples
    --------
    >>> left, right = profile("linear", 8, 4)[-4:], profile("linear", 8, 4)[:4]
    >>> (left + right).tolist()
    [254, 254, 254, 254]
    """
    if mode in ("mean", "crop", "exact") or overlap_px == 0:
        return np.ones(tile_px, np.uint32)
    flat = np.full(tile_px, FULL, np.uint32)
    if mode == "gaussian":
        t = (np.arange(tile_px) - (tile_px - 1) / 2) / (GAUSSIAN_SIGMA * tile_px)
        return np.asarray(np.maximum(np.rint(FULL * np.exp(-0.5 * t * t)), 1), np.uint32)
    t = (np.arange(overlap_px) + 0.5) / overlap_px
    rise = 0.5 - 0.5 * np.cos(np.pi * t) if mode == "hann" else t
    ramp = np.rint(FULL * rise).astype(np.uint32)
    # The second half mirrors the first, so that rounding cannot break the sum of neighbours.
    half = overlap_px // 2
    ramp[overlap_px - half :] = FULL - ramp[:half][::-1]
    ramp = np.clip(ramp, 1, FULL - 1)
    flat[:overlap_px], flat[tile_px - overlap_px :] = ramp, ramp[::-1]
    return flat


def axis_profile(mode: str, weights: NDArray[np.uint32], starts: tuple[int, ...], i: int) -> NDArray[np.uint32]:
    """Return the integer weights along one axis of one tile, with its neighbours and the slide's border.

    Parameters
    ----------
    mode
        One of `WINDOWS`.
    weights
        `profile` of the mode, (tile_px,).
    starts
        Where the tiles of the axis begin, in pixels.
    i
        Which of them.

    Returns
    -------
    (tile_px,) uint32 in 0..FULL.
    """
    first, last = i == 0, i == len(starts) - 1
    weights = weights.copy()
    tile_px = len(weights)
    if mode in ("crop", "exact"):
        if not first:
            weights[: (starts[i - 1] + tile_px - starts[i]) // 2] = 0
        if not last:
            weights[(starts[i + 1] + tile_px - starts[i]) // 2 :] = 0
        return weights
    # At the slide's border there is no neighbour to fall off to.
    half = tile_px // 2
    if first:
        weights[:half] = weights[:half].max()
    if last:
        weights[half:] = weights[half:].max()
    return weights


class Blender:
    """Weighted sum of tile scores over a ring of rows; finished rows leave it.

    Add the tiles of one grid row in any order with `add`, then call `finish_row`, which returns the rows
    that no later tile covers. Memory: classes x tile_px x band width x 4 bytes.

    Parameters
    ----------
    grid
        The tiles, maybe of a column band.
    classes
        Number of score planes K.
    mode
        One of `WINDOWS`.
    probabilities
        Whether blended scores are returned too.
    """

    def __init__(self, grid: TileGrid, classes: int, mode: str, *, probabilities: bool = False) -> None:
        self._grid = grid
        self._mode = mode
        self._probabilities = probabilities
        self._profile = profile(mode, grid.tile_px, grid.overlap_px)
        self._left = grid.xs[grid.columns.start]
        width = grid.xs[grid.columns[-1]] + grid.tile_px - self._left
        self._sums = np.zeros((classes, grid.tile_px, width), np.uint32)
        self._top = 0  # slide row of the ring's first row
        # Weight sums are separable within a row of tiles: (first row, rows' weights, columns' sum).
        self._weights: list[tuple[int, NDArray[np.uint32], NDArray[np.uint32]]] = []
        self._columns = np.zeros(width, np.uint32)
        # Allocated once: a new array of this size comes from the system and is returned to it, which
        # takes as long as the computation.
        self._window, self._product = np.empty((2, grid.tile_px, grid.tile_px), np.uint32)

    def add(self, tile: Tile, scores: Scores) -> None:
        """Add the scores (K, tile_px, tile_px) of one tile of the current row."""
        wy = self._axis_profile(self._grid.ys, tile.row)
        wx = self._axis_profile(self._grid.xs, tile.column)
        x, y = tile.read.x - self._left, tile.read.y - self._top
        ys, xs = _extent(wy), _extent(wx)
        used = slice(0, ys.stop - ys.start), slice(0, xs.stop - xs.start)
        window, product = self._window[used], self._product[used]
        np.outer(wy[ys], wx[xs], out=window)
        target = self._sums[:, y + ys.start : y + ys.stop, x + xs.start : x + xs.stop]
        for sums, plane in zip(target, scores, strict=True):
            to_integers(plane[ys, xs], out=product)
            np.multiply(window, product, out=product)
            sums += product
        self._columns[x : x + len(wx)] += wx

    def finish_row(self, row: int) -> LabelRows:
        """Return the rows that no tile after row ``row`` of the grid reaches."""
        grid = self._grid
        last = row + 1 == len(grid.ys)
        bottom = grid.height if last else grid.ys[row + 1]
        if self._columns.any():
            wy = self._axis_profile(grid.ys, row)
            self._weights.append((grid.ys[row], wy, self._columns))
            self._columns = np.zeros_like(self._columns)
        count = min(bottom - self._top, grid.tile_px)
        reached = self._reached()
        finished = self._segmented(count, reached)
        self._weights = [w for w in self._weights if w[0] + grid.tile_px > bottom]
        for columns in reached:
            sums = self._sums[:, :, columns]
            sums[:, : grid.tile_px - count] = sums[:, count:]
            sums[:, grid.tile_px - count :] = 0
        self._top = bottom
        return finished

    def _reached(self) -> list[slice]:
        """Return the columns of the ring that any of its tiles covers; elsewhere all sums are 0."""
        if not self._weights:
            return []
        is_reached = np.any([columns for _, _, columns in self._weights], axis=0)
        edges = np.flatnonzero(np.diff(is_reached, prepend=False, append=False)).tolist()
        return [slice(*edge) for edge in zip(edges[::2], edges[1::2], strict=True)]

    def _segmented(self, count: int, reached: list[slice]) -> LabelRows:
        grid, classes = self._grid, len(self._sums)
        left, right = grid.x0 - self._left, grid.x1 - self._left
        clipped = [slice(max(c.start, left), min(c.stop, right)) for c in reached]
        parts = [columns for columns in clipped if columns.start < columns.stop]
        if not parts:
            scores = classes if self._probabilities else None
            return LabelRows.outside(grid.x0, self._top, right - left, count, classes=scores)
        labels = np.full((count, right - left), NOT_ANALYSED, np.uint8)
        probabilities = np.zeros((*labels.shape, classes), np.uint16) if self._probabilities else None
        for columns in parts:
            step = max(1, PIECE_BYTES // (4 * (columns.stop - columns.start)))
            for first in range(0, count, step):
                rows = slice(first, min(first + step, count))
                piece = rows, slice(columns.start - left, columns.stop - left)
                self._finish_piece(
                    rows, columns, labels[piece], None if probabilities is None else probabilities[piece]
                )
        return LabelRows(grid.x0, self._top, labels, probabilities)

    def _finish_piece(
        self, rows: slice, columns: slice, labels: Pixels, probabilities: NDArray[np.uint16] | None
    ) -> None:
        """Write the labels, and the probabilities if there are any, of a piece of the ring into arrays."""
        sums = self._sums[:, rows, columns]
        labels[...] = _arg_max(sums)
        if probabilities is None and (self._grid.keep is None or self._covered(rows, columns)):
            return
        weight = self._weight(rows, columns)
        labels[weight == 0] = NOT_ANALYSED
        if probabilities is not None:
            divisor = np.maximum(weight, 1).astype(np.uint64) * ONE
            for k, plane in enumerate(sums):
                probabilities[..., k] = (plane.astype(np.uint64) * SCORE_MAX + divisor // 2) // divisor

    def _covered(self, rows: slice, columns: slice) -> bool:
        """Whether one row of tiles covers every pixel of a piece of the ring."""
        return any(
            y <= self._top + rows.start
            and self._top + rows.stop <= y + len(wy)
            and wy[self._top + rows.start - y : self._top + rows.stop - y].all()
            and wx[columns].all()
            for y, wy, wx in self._weights
        )

    def _weight(self, rows: slice, columns: slice) -> NDArray[np.uint32]:
        """Return the sum of the windows over a piece of the ring, (rows, columns)."""
        top, bottom = self._top + rows.start, self._top + rows.stop
        weight = np.zeros((bottom - top, columns.stop - columns.start), np.uint32)
        for y, wy, wx in self._weights:
            first, stop = max(y, top), min(y + len(wy), bottom)
            if first < stop:
                weight[first - top : stop - top] += np.outer(wy[first - y : stop - y], wx[columns])
        return weight

    def _axis_profile(self, starts: tuple[int, ...], i: int) -> NDArray[np.uint32]:
        return axis_profile(self._mode, self._profile, starts, i)


def _extent(weights: NDArray[np.uint32]) -> slice:
    used = np.flatnonzero(weights)
    return slice(int(used[0]), int(used[-1]) + 1)


def _arg_max(sums: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Return the class of the largest sum, (H, W); the lower class where two are equal."""
    if len(sums) == 2:  # several times faster than a general arg-max
        return np.asarray((sums[1] > sums[0]).view(np.uint8))
    best = sums[0].copy()
    labels = np.zeros(best.shape, np.uint8)
    for k in range(1, len(sums)):
        labels[sums[k] > best] = k
        np.maximum(best, sums[k], out=best)
    return labels

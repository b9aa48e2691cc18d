"""Connected components of a label map that is written in parts: each is returned once, when it is complete.

::

    rows ──> runs ──> components of a block ──> joined with the row above and the band to the left
                 └──> corners of their outlines, which is all that is kept of their pixels

Two pixels are connected if they share a side and a class (4-connectivity): the inside of an object
is then in one piece, and its outline a valid polygon; see `outline`. When parts of a component meet,
this is only noted (union-find). From time to time the components are settled: those that cannot
grow any more are returned, and the others are renumbered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.outputs.label_rows import is_one_value
from histostream.wsi.runs import Runs, connected

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

BLOCK_PX = 1 << 20  # rows are taken in blocks of this: temporaries of about 25 bytes a pixel
# New corners or components after which components are settled; but at least as many as stayed open
# the last time, so that the total time is proportional to the number of corners.
SETTLE_CORNERS, SETTLE_COMPONENTS = 1 << 18, 1 << 16
FEW_CLASSES = 16  # so many are compared one by one: 0.1 to 0.2 ns a pixel and class, a table takes 3 ns

# Flags of a corner: whether its horizontal edge leads right, whether its vertical edge leads down, and
# whether the object fills one of the four quadrants around it (convex) or three.
RIGHT, DOWN, CONVEX = 1, 2, 4
FLAGS = 3  # number of bits of the flags

_SUMS = ("area", "x", "y", "xx_low", "xx_high", "yy_low", "yy_high", "xy_low", "xy_high")
_LIMB = 32  # bits: sums of squares over a slide of 200 000 px do not fit 64 bits, so each is kept in two numbers


@dataclass(frozen=True, slots=True)
class Corners:
    """Corners of outlines, of many objects in any order.

    Attributes
    ----------
    owner
        (n,) the object of each corner.
    x_flags
        (n,) x of the vertex in pixel edges (0 is the left edge of the first pixel) times 8, plus
        `RIGHT`, `DOWN` and `CONVEX`.
    y
        (n,) y of the vertex.
    """

    owner: Ints
    x_flags: Ints
    y: Ints

    def select(self, chosen: NDArray[np.bool_], number: Ints) -> Corners:
        """Return the chosen corners; object i becomes object number[i]."""
        return Corners(number[self.owner[chosen]], self.x_flags[chosen], self.y[chosen])


@dataclass(frozen=True, slots=True)
class Complete:
    """Complete objects, in the order of their first pixels.

    Attributes
    ----------
    value
        (n,) class.
    first
        (n,) index of the first pixel, ``y * width + x``.
    area
        (n,) pixels.
    box
        (n, 4) left, top, right and bottom; right and bottom are exclusive.
    moments
        (n, 5) sums over the pixels of x, y, x^2, y^2 and xy, as Python integers; the x of a pixel is
        its column.
    corners
        Corners of all objects; an owner is an index into the arrays above.
    """

    value: Bytes
    first: Longs
    area: Longs
    box: Ints
    moments: NDArray[np.object_]
    corners: Corners


class Components:
    """Find the connected components of some classes in rows that come as `Sink` describes.

    Memory: a few bytes for each row and column, and 12 to 24 bytes for each corner of a component
    that is not complete.

    Parameters
    ----------
    width, height
        Size of the label map in pixels.
    classes
        Classes whose components are returned.
    areas
        For each class the smallest and the largest number of pixels of a component that is returned; none: any.
    outlines
        Whether corners of outlines are found; without, the time is less than half.
    """

    def __init__(
        self,
        width: int,
        height: int,
        classes: Sequence[int],
        areas: Sequence[tuple[float, float]] = (),
        *,
        outlines: bool = True,
    ) -> None:
        self._width, self._height, self._outlines = width, height, outlines
        self._code = np.zeros(256, np.uint8)  # 0 for other classes
        self._code[list(classes)] = np.arange(1, len(classes) + 1)
        self._classes = np.array([0, *classes], np.uint8)
        self._areas = np.array([(0, 0), *(areas or [(0, math.inf)] * len(classes))])
        # The last column of the band to the left, that of this band, and the row above.
        self._left, self._right, self._above = _Line.empty(height), _Line.empty(height), _Line.empty(0)
        self._x0 = self._x1 = self._y = 0
        self._book = _Book()
        self._corners: list[Corners] = []
        self._new_corners = self._kept_corners = self._kept_components = 0

    def add(self, x: int, y: int, labels: Bytes) -> Iterator[Complete]:
        """Take the next rows; yield the objects that are complete."""
        if y == 0:
            self._begin_band(x, labels.shape[1])
        rows = max(1, BLOCK_PX // labels.shape[1])
        for top in range(0, len(labels), rows):
            self._add_block(self._coded(labels[top : top + rows]))
            if self._is_due():
                yield self._settle(self._open())

    def finish(self) -> Complete:
        """Return the objects that the end of the slide completes.

        Raises
        ------
        ValueError
            If rows are missing.
        """
        if (self._x1, self._y) != (self._width, self._height):
            raise ValueError(
                f"the label map ended at column {self._x1}, row {self._y} of {self._width} x {self._height} px: "
                "write all rows"
            )
        return self._settle(np.zeros(0, np.int32))

    def _begin_band(self, x: int, width: int) -> None:
        if x != self._x1 or self._y not in {0, self._height}:
            raise ValueError(f"a band begins at x={x}, row {self._y} of that before at {self._x1}")
        if x:
            self._left, self._right = self._right, _Line.empty(self._height)
        self._x0, self._x1, self._y, self._above = x, x + width, 0, _Line.empty(width)

    def _coded(self, labels: Bytes) -> Bytes:
        """Return the code of each pixel's class."""
        if is_one_value(labels):  # rows of glass
            return np.broadcast_to(self._code[labels[0, 0]], labels.shape)
        if len(self._classes) > FEW_CLASSES:
            return self._code[labels]
        codes = np.zeros(labels.shape, np.uint8)
        for code, label in enumerate(self._classes[1:], 1):
            codes |= np.multiply(labels == label, np.uint8(code))
        return codes

    def _add_block(self, codes: Bytes) -> None:
        height, width = codes.shape
        y, self._y = self._y, self._y + height
        here, before = slice(y, y + height), slice(max(y - 1, 0), y + height)
        is_empty = not (codes[0, 0] if is_one_value(codes) else codes.any())
        if is_empty and not (self._above.code.any() or self._left.code[before].any()):
            self._above = _Line.empty(width)
            return
        runs = Runs(codes)
        number = self._book.add(runs, self._x0, y, self._width)
        if self._outlines:
            ids = runs.painted(number)
            self._find_corners(codes, ids, y, before)
            first, last, left, right = ids[0], ids[-1], ids[:, 0], ids[:, -1]
        else:
            first, last, left, right = runs.painted_border(number)
        self._join(codes[0], first, self._above.code, self._above.number)
        self._join(codes[:, 0], left, self._left.code[here], self._left.number[here])
        self._above = _Line(codes[-1].copy(), last.copy())
        self._right.code[here], self._right.number[here] = codes[:, -1], right

    def _find_corners(self, codes: Bytes, ids: Ints, y: int, before: slice) -> None:
        height, width = codes.shape
        framed, framed_ids = np.pad(codes, 1), np.pad(ids, 1)
        for frame, above, left in (
            (framed, self._above.code, self._left.code),
            (framed_ids, self._above.number, self._left.number),
        ):
            frame[0, 1:-1] = above
            frame[1 - (y > 0) : -1, 0] = left[before]
        # Vertices on the right and bottom edges belong to the next band and the next rows, if any.
        kept = np.s_[: height + 1 + (self._y == self._height), : width + 1 + (self._x1 == self._width)]
        corners = _corners(framed[kept], framed_ids[kept], self._x0, y)
        self._corners.append(corners)
        self._new_corners += len(corners.y)

    def _join(self, codes: Bytes, ids: Ints, other_codes: Bytes, other_ids: Ints) -> None:
        """Join components of one class along a line of pixels and the line beside it."""
        touch = np.flatnonzero((codes == other_codes) & (codes > 0))
        if len(touch):
            pairs = np.stack([ids[touch], other_ids[touch]])
            first = np.flatnonzero((np.diff(pairs, axis=1, prepend=-1) != 0).any(axis=0))
            self._book.join(*pairs[:, first])

    def _open(self) -> Ints:
        """Return the components that may still grow."""
        waiting = [self._above.number] if self._y < self._height else []
        if self._x0:
            # From the last row on, since the vertices below it are not known yet.
            waiting.append(self._left.number[max(self._y - 1, 0) :])
        if self._x1 < self._width:
            waiting.append(self._right.number[: self._y])
        return np.concatenate([np.zeros(0, np.int32), *waiting])

    def _is_due(self) -> bool:
        components = len(self._book) - self._kept_components
        return self._new_corners > max(SETTLE_CORNERS, self._kept_corners) or components > max(
            SETTLE_COMPONENTS, self._kept_components
        )

    def _settle(self, still_open: Ints) -> Complete:
        """Return the components that are complete, and renumber the others."""
        root = self._book.roots()
        totals, corners = self._book.totals(root), _joined(self._corners, root)
        stays = np.zeros(len(root), bool)
        stays[root[still_open]] = True
        stays[0] = False
        roots = np.flatnonzero(root == np.arange(len(root)))[1:]
        complete = self._complete(totals, roots[~stays[roots]], corners)

        kept = roots[stays[roots]]
        number = np.zeros(len(root), np.int32)
        number[kept] = np.arange(1, len(kept) + 1, dtype=np.int32)
        self._book = _Book(totals.select(kept))
        self._corners = [corners.select(stays[corners.owner], number)]
        for line in (self._above, self._left, self._right):
            line.number = number[root[line.number]]
        self._kept_corners, self._new_corners = len(self._corners[0].y), 0
        self._kept_components = len(kept)
        return complete

    def _complete(self, totals: _Measures, leaving: Longs, corners: Corners) -> Complete:
        area, (least, most) = totals.sums[leaving, 0], self._areas[totals.code[leaving]].T
        leaving = leaving[(area >= least) & (area <= most)]
        leaving = leaving[np.argsort(totals.least[leaving, 0])]
        index = np.full(len(totals.code), -1, np.int32)
        index[leaving] = np.arange(len(leaving), dtype=np.int32)
        measures = totals.select(leaving)
        first, left, right, bottom = measures.least.T
        return Complete(
            self._classes[measures.code],
            first,
            measures.sums[:, 0],
            np.stack([left, first // self._width, -right, -bottom], axis=1).astype(np.int32),
            _moments(measures.sums),
            corners.select(index[corners.owner] >= 0, index),
        )


@dataclass(slots=True)
class _Line:
    """Class codes and component numbers along a line of pixels."""

    code: Bytes
    number: Ints

    @classmethod
    def empty(cls, length: int) -> _Line:
        """Return a line without components."""
        return cls(np.zeros(length, np.uint8), np.zeros(length, np.int32))


@dataclass(frozen=True, slots=True)
class _Measures:
    """Class, sums and extent of n components.

    Attributes
    ----------
    code
        (n,) class code.
    sums
        (n, 9) sums over the pixels, in the order of `_SUMS`.
    least
        (n, 4) index of the first pixel, left edge, and the right and bottom edges times -1: of
        several parts of a component the minimum is taken.
    """

    code: Bytes
    sums: Longs
    least: Longs

    @classmethod
    def merged(cls, count: int, owner: NDArray[Any], code: Bytes, sums: list[Longs], least: list[Longs]) -> _Measures:
        """Merge parts into ``count`` components; ``owner`` is the component of each part."""
        merged = cls(
            np.zeros(count, np.uint8),
            np.zeros((count, len(sums)), np.int64),
            np.full((count, len(least)), np.iinfo(np.int64).max),
        )
        merged.code[owner] = code
        for i, column in enumerate(sums):
            np.add.at(merged.sums[:, i], owner, column)
        for i, column in enumerate(least):
            np.minimum.at(merged.least[:, i], owner, column)
        return merged

    def select(self, chosen: Longs) -> _Measures:
        """Return the measures of some components."""
        return _Measures(self.code[chosen], self.sums[chosen], self.least[chosen])


class _Book:
    """The components so far, and which of them have joined (union-find). Number 0 is no component."""

    def __init__(self, parts: _Measures | None = None) -> None:
        none = _Measures(np.zeros(1, np.uint8), np.zeros((1, len(_SUMS)), np.int64), np.zeros((1, 4), np.int64))
        self._parts = [none] if parts is None else [none, parts]
        self._parent = np.arange(sum(len(part.code) for part in self._parts), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._parent) - 1

    def add(self, runs: Runs, x: int, y: int, width: int) -> Ints:
        """Add the components of a block at (x, y) of an image ``width`` wide; return their numbers."""
        start, stop, row = runs.start + x, runs.end + x, runs.row + y
        area, sum_x = stop - start, _triangle(stop) - _triangle(start)
        sums = [area, sum_x, row * area]
        for square in (_pyramid(stop) - _pyramid(start), row * row * area, row * sum_x):  # each below 2^63 / 2^31
            sums += [square & ((1 << _LIMB) - 1), square >> _LIMB]
        least = [row * width + start, start, -stop, -row - 1]
        self._parts.append(_Measures.merged(runs.components, runs.component, runs.value, sums, least))
        number = np.arange(runs.components, dtype=np.int32) + np.int32(len(self._parent))
        self._parent = np.concatenate([self._parent, number])
        return number

    def join(self, a: Ints, b: Ints) -> None:
        """Note that the components a[i] and b[i] are parts of one."""
        a, b = self._roots_of(a), self._roots_of(b)
        differ = a != b
        if differ.any():
            nodes, at = np.unique(np.concatenate([a[differ], b[differ]]), return_inverse=True)
            half = len(at) // 2
            self._parent[nodes] = nodes[connected(len(nodes), at[:half], at[half:])]

    def roots(self) -> Ints:
        """Return the lowest number of the parts of each component."""
        return self._roots_of(self._parent)

    def totals(self, root: Ints) -> _Measures:
        """Return the measures of each component at its root."""
        sums, least = (np.concatenate([getattr(part, name) for part in self._parts]).T for name in ("sums", "least"))
        code = np.concatenate([part.code for part in self._parts])
        return _Measures.merged(len(root), root, code, list(sums), list(least))

    def _roots_of(self, numbers: Ints) -> Ints:
        while not np.array_equal(numbers, above := self._parent[numbers]):
            numbers = above
        return numbers


def _corners(codes: Bytes, ids: Ints, x: int, y: int) -> Corners:
    """Find the corners at the vertices between pixels; (x, y) is the vertex after the first pixel."""
    across, down = codes[:, 1:] != codes[:, :-1], codes[1:] != codes[:-1]
    bends = (across[1:] | across[:-1]) & (down[:, 1:] | down[:, :-1])
    rows, columns = np.divmod(np.flatnonzero(bends), bends.shape[1])  # np.nonzero takes 5 times that
    flat = rows * codes.shape[1] + columns
    around = {(i, j): flat + (i * codes.shape[1] + j) for i in (0, 1) for j in (0, 1)}
    code = {q: codes.ravel()[at] for q, at in around.items()}
    owners, xs, ys = [], [], []
    for (i, j), of_quadrant in code.items():
        beside, over, opposite = code[i, 1 - j], code[1 - i, j], code[1 - i, 1 - j]
        convex = (of_quadrant > 0) & (beside != of_quadrant) & (over != of_quadrant)
        reflex = (of_quadrant != beside) & (beside == over) & (beside == opposite) & (beside > 0)
        flags = RIGHT * j + DOWN * i
        for chosen, quadrant, more in (
            (np.flatnonzero(convex), (i, j), CONVEX),
            (np.flatnonzero(reflex), (1 - i, 1 - j), 0),
        ):
            owners.append(ids.ravel()[around[quadrant][chosen]])
            xs.append(((columns[chosen] + x) << FLAGS) | (flags + more))
            ys.append(rows[chosen] + y)
    return Corners(
        np.concatenate(owners),
        np.concatenate(xs).astype(np.int32),
        np.concatenate(ys).astype(np.int32),
    )


def _joined(several: list[Corners], root: Ints) -> Corners:
    """Put corners together; their owners become the roots of their components."""
    none = np.zeros(0, np.int32)
    owner, x_flags, y = (np.concatenate([none, *(getattr(c, n) for c in several)]) for n in ("owner", "x_flags", "y"))
    return Corners(root[owner], x_flags, y)


def _moments(sums: Longs) -> NDArray[np.object_]:
    wide = sums.astype(object)
    squares = [wide[:, i] + (wide[:, i + 1] << _LIMB) for i in (3, 5, 7)]
    return np.stack([wide[:, 1], wide[:, 2], *squares], axis=1)


def _triangle(n: Longs) -> Longs:
    """0 + 1 + ... + (n - 1)."""
    return n * (n - 1) // 2


def _pyramid(n: Longs) -> Longs:
    """0 + 1 + 4 + ... + (n - 1)^2."""
    return (n - 1) * n * (2 * n - 1) // 6

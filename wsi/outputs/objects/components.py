"""Connected components of a label map that comes in parts: each leaves once, when it is complete.

::

    rows ──> runs ──> components of a block ──> joined with the row above and the band to the left
                 └──> corners of their outlines, which is all that is kept of their pixels

Two pixels are connected if they share a side and a class (4-connectivity): an object's inside is
then in one piece, and its outline a valid polygon; see `outline`. Objects are numbered within; a
component that turns out to be part of another is only noted (union-find), and now and then the
books are settled: what can grow no more leaves, the rest is numbered anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

BLOCK_PX = 1 << 20  # rows are taken in blocks of this: temporaries of about 25 bytes a pixel
# Corners and components that may come in before the books are settled. Also as many as were kept
# the last time: then the whole time is proportional to the corners, whatever stays open.
SETTLE_CORNERS, SETTLE_COMPONENTS = 1 << 18, 1 << 16

# Of a corner: where its horizontal and its vertical edge lead, and whether the object has one
# quadrant of the four around it (convex), or three.
RIGHT, DOWN, CONVEX, FLAGS = 1, 2, 4, 3  # the last: how many bits

_SUMS = ("area", "x", "y", "xx_low", "xx_high", "yy_low", "yy_high", "xy_low", "xy_high")
_COLUMNS = ("sums", "code", "first", "left", "right", "bottom")
_LIMB = 32  # squares of 200 000 px summed over a slide do not fit 64 bits, so they are kept in two


@dataclass(frozen=True, slots=True)
class Corners:
    """Corners of outlines, of many objects in any order.

    Attributes
    ----------
    owner
        (n,) the object of each.
    x_flags
        (n,) column of the vertex, 0 is the left edge of the first pixel, times 8, plus `RIGHT`,
        `DOWN` and `CONVEX`.
    y
        (n,) row of the vertex.
    """

    owner: Ints
    x_flags: Ints
    y: Ints

    def of(self, chosen: NDArray[np.bool_], number: Ints) -> Corners:
        """Return some of them, their objects renumbered."""
        return Corners(number[self.owner[chosen]], self.x_flags[chosen], self.y[chosen])


@dataclass(frozen=True, slots=True)
class Complete:
    """Objects that are complete, in the order of their first pixels.

    Attributes
    ----------
    value
        (n,) class.
    first
        (n,) place of the first pixel, ``y * width + x``: no two objects have the same.
    area
        (n,) pixels.
    box
        (n, 4) left, top, right and bottom; the latter two exclusive.
    moments
        (n, 5) sums over the pixels of x, y, x^2, y^2 and xy, Python integers; a pixel's x is its
        column.
    corners
        Of all of them; an owner is the place of an object in the arrays above.
    """

    value: Bytes
    first: Longs
    area: Longs
    box: Ints
    moments: NDArray[np.object_]
    corners: Corners


class Components:
    """Components of the wanted classes.

    Parts come as `Sink` says. Memory: a few bytes for each row and column, and 12 bytes for each
    corner of what is still open, which may be twice that until the books are settled.

    Parameters
    ----------
    width, height
        The label map, in pixels.
    wanted
        Classes whose components are wanted.
    min_area
        Components with fewer pixels are left out.
    """

    def __init__(self, width: int, height: int, wanted: list[int], min_area: float = 0) -> None:
        self._width, self._height, self._min_area = width, height, min_area
        self._code = np.zeros(256, np.uint8)  # 0: not wanted
        self._code[wanted] = np.arange(1, len(wanted) + 1)
        self._wanted = np.array([0, *wanted], np.uint8)
        # The last column of the band to the left, and of this one; the row above.
        self._left, self._right = _Line(height), _Line(height)
        self._above = _Line(0)
        self._x0 = self._x1 = self._y = 0
        self._book = _Book()
        self._corners: list[Corners] = []
        self._new_corners = self._kept_corners = self._kept_components = 0

    def add(self, x: int, y: int, labels: Bytes) -> Iterator[Complete]:
        """Take the next rows; yields what is complete."""
        if y == 0:
            self._begin_band(x, labels.shape[1])
        rows = max(1, BLOCK_PX // labels.shape[1])
        for top in range(0, len(labels), rows):
            self._add_block(self._code[labels[top : top + rows]])
            if self._is_due():
                yield self._settle(self._open())

    def finish(self) -> Complete:
        """Return what the end of the slide completes.

        Raises
        ------
        ValueError
            If rows are missing: outlines would be open.
        """
        if (self._x1, self._y) != (self._width, self._height):
            raise ValueError(
                f"column {self._x1}, row {self._y} of {self._width} x {self._height} px is the "
                "last that came: the rest was never written"
            )
        return self._settle(np.zeros(0, np.int32))

    def _begin_band(self, x: int, width: int) -> None:
        if x != self._x1 or self._y not in {0, self._height}:
            raise ValueError(f"a band begins at x={x}, row {self._y} of that before at {self._x1}")
        if x:
            self._left, self._right = self._right, _Line(self._height)
        self._x0, self._x1, self._y, self._above = x, x + width, 0, _Line(width)

    def _add_block(self, codes: Bytes) -> None:
        height, width = codes.shape
        y, self._y = self._y, self._y + height
        here, before = slice(y, y + height), slice(max(y - 1, 0), y + height)
        if not (codes.any() or self._above.code.any() or self._left.code[before].any()):
            self._above.clear()
            return
        runs = _Runs(codes)
        number = self._book.add(runs, self._x0, y, self._width)
        ids = runs.painted(number)
        # One pixel more on each side.
        framed = np.zeros((height + 2, width + 2), np.uint8)
        framed[1:-1, 1:-1] = codes
        framed_ids = np.zeros(framed.shape, np.int32)
        framed_ids[1:-1, 1:-1] = ids
        for frame, above, left in (
            (framed, self._above.code, self._left.code),
            (framed_ids, self._above.number, self._left.number),
        ):
            frame[0, 1:-1] = above
            frame[1 - (y > 0) : -1, 0] = left[before]
        self._join(codes[0], ids[0], self._above.code, self._above.number)
        self._join(codes[:, 0], ids[:, 0], self._left.code[here], self._left.number[here])
        # Vertices at the right and at the bottom are of the next band or rows, if there are any.
        kept = np.s_[: height + 1 + (self._y == self._height), : width + 1 + (self._x1 == self._width)]
        found = _corners(framed[kept], framed_ids[kept], self._x0, y)
        self._corners.append(found)
        self._new_corners += len(found.y)
        self._above = _Line.of(codes[-1], ids[-1])
        self._right.code[here], self._right.number[here] = codes[:, -1], ids[:, -1]

    def _join(self, codes: Bytes, ids: Ints, other_codes: Bytes, other_ids: Ints) -> None:
        """Note that neighbours of one class are one component."""
        touch = np.flatnonzero((codes == other_codes) & (codes > 0))
        if len(touch):
            pairs = np.stack([ids[touch], other_ids[touch]])
            first = np.flatnonzero((np.diff(pairs, axis=1, prepend=-1) != 0).any(axis=0))
            self._book.join(*pairs[:, first])

    def _open(self) -> Ints:
        """Components that may still grow."""
        waiting = [self._above.number] if self._y < self._height else []
        if self._x0:
            # From the last row on: the vertices below it are still to come.
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
        """Let go what is complete, and number the rest anew."""
        root = self._book.roots()
        totals, corners = self._book.totals(root), _joined(self._corners, root)
        stays = np.zeros(len(root), bool)
        stays[root[still_open]] = True
        stays[0] = False
        whole = np.flatnonzero(root == np.arange(len(root)))[1:]
        complete = self._complete(totals, whole[~stays[whole]], corners)

        kept = whole[stays[whole]]
        number = np.zeros(len(root), np.int32)
        number[kept] = np.arange(1, len(kept) + 1, dtype=np.int32)
        self._book = totals.only(kept)
        self._corners = [corners.of(stays[corners.owner], number)]
        for line in (self._above, self._left, self._right):
            line.number = number[root[line.number]]
        self._kept_corners, self._new_corners = len(self._corners[0].y), 0
        self._kept_components = len(kept)
        return complete

    def _complete(self, book: _Book, leaving: Longs, corners: Corners) -> Complete:
        leaving = leaving[book.sums[leaving, 0] >= self._min_area]
        leaving = leaving[np.argsort(book.first[leaving])]
        place = np.full(len(book) + 1, -1, np.int32)
        place[leaving] = np.arange(len(leaving), dtype=np.int32)
        top = book.first // self._width
        box = np.stack([book.left, top, book.right, book.bottom], axis=1)
        return Complete(
            self._wanted[book.code[leaving]],
            book.first[leaving],
            book.sums[leaving, 0],
            box[leaving].astype(np.int32),
            _moments(book.sums[leaving]),
            corners.of(place[corners.owner] >= 0, place),
        )


class _Line:
    """Classes and components along a line of pixels."""

    def __init__(self, length: int) -> None:
        self.code: Bytes = np.zeros(length, np.uint8)
        self.number: Ints = np.zeros(length, np.int32)

    @classmethod
    def of(cls, code: Bytes, number: Ints) -> _Line:
        """Copy them."""
        line = cls(0)
        line.code, line.number = code.copy(), number.copy()
        return line

    def clear(self) -> None:
        """Forget them."""
        self.code[:], self.number[:] = 0, 0


class _Runs:
    """Runs of one class in the rows of a block, and which of them are connected.

    Attributes
    ----------
    row, start, end
        Where each run is; end exclusive.
    code
        Its class.
    component
        0 to ``components - 1``, in the order of their first pixels.
    """

    def __init__(self, codes: Bytes) -> None:
        height, width = codes.shape
        self._shape, stride = codes.shape, width + 1
        padded = np.zeros((height, stride), np.uint8)  # a gap after each row
        padded[:, :width] = codes
        flat = padded.ravel()
        edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        self._edges = np.concatenate([[0], edges, [flat.size]])
        code = flat[self._edges[:-1]]
        self._filled = np.flatnonzero(code)
        first, last = self._edges[:-1][self._filled], self._edges[1:][self._filled]
        self.code = code[self._filled]
        self.row = first // stride
        self.start = first - self.row * stride
        self.end = self.start + (last - first)
        # The runs of the row above that each run lies under.
        low = np.searchsorted(last, first - stride, side="right")
        many = np.searchsorted(first, last - stride, side="left") - low
        below = np.repeat(np.arange(len(first)), many)
        above = np.arange(many.sum()) + np.repeat(low - (np.cumsum(many) - many), many)
        same = self.code[below] == self.code[above]
        root = connected(len(first), below[same], above[same])
        new = root == np.arange(len(root))
        self.components = int(new.sum())
        self.component = (np.cumsum(new) - 1)[root]

    def painted(self, number: Ints) -> Ints:
        """Each pixel's component, numbered so; 0 where there is none."""
        height, width = self._shape
        value = np.zeros(len(self._edges) - 1, np.int32)
        value[self._filled] = number[self.component]
        return np.repeat(value, np.diff(self._edges)).reshape(height, width + 1)[:, :width]


class _Book:
    """What is known of each component; the first entry is none."""

    def __init__(self) -> None:
        self._used = 1
        self._parent = np.zeros(1, np.int32)
        self.sums = np.zeros((1, len(_SUMS)), np.int64)
        self.code = np.zeros(1, np.uint8)
        self.first = np.zeros(1, np.int64)
        self.left, self.right, self.bottom = (np.zeros(1, np.int64) for _ in range(3))

    def __len__(self) -> int:
        return self._used - 1

    def add(self, runs: _Runs, x: int, y: int, width: int) -> Ints:
        """Enter the components of a block at x, y; returns their numbers."""
        begin, end = self._used, self._used + runs.components
        self._reserve(end)
        number = np.arange(begin, end, dtype=np.int32)
        self._parent[begin:end] = number
        of = runs.component + begin
        start, stop, row = runs.start + x, runs.end + x, runs.row + y
        area, sum_x = stop - start, _triangle(stop) - _triangle(start)
        squares = (
            _pyramid(stop) - _pyramid(start),
            row * row * area,
            row * sum_x,
        )
        columns = [area, sum_x, row * area]
        for square in squares:  # each below 2^63 / 2^31
            columns += [square & ((1 << _LIMB) - 1), square >> _LIMB]
        for i, column in enumerate(columns):
            np.add.at(self.sums[:, i], of, column)
        first = row * width + start
        self.code[of] = runs.code
        self.first[begin:end] = np.iinfo(np.int64).max
        self.left[begin:end] = width
        np.minimum.at(self.first, of, first)
        np.minimum.at(self.left, of, start)
        np.maximum.at(self.right, of, stop)
        np.maximum.at(self.bottom, of, row + 1)
        self._used = end
        return number

    def join(self, a: Ints, b: Ints) -> None:
        """Note that components are parts of one."""
        a, b = self._roots_of(a), self._roots_of(b)
        differ = a != b
        if differ.any():
            both = np.concatenate([a[differ], b[differ]])
            nodes, at = np.unique(both, return_inverse=True)
            half = len(at) // 2
            self._parent[nodes] = nodes[connected(len(nodes), at[:half], at[half:])]

    def roots(self) -> Ints:
        """Return the number that each component goes by: the least of its parts."""
        return self._roots_of(self._parent[: self._used])

    def totals(self, root: Ints) -> _Book:
        """Add up the parts of each component, at its root."""
        book = _Book()
        book._used = self._used
        for name in _COLUMNS:
            old = getattr(self, name)
            setattr(book, name, np.zeros((self._used, *old.shape[1:]), old.dtype))
        used = slice(0, self._used)
        for i in range(len(_SUMS)):
            np.add.at(book.sums[:, i], root, self.sums[used, i])
        book.code[root] = self.code[used]
        book.first[used], book.left[used] = self.first[used], self.left[used]
        np.minimum.at(book.first, root, self.first[used])
        np.minimum.at(book.left, root, self.left[used])
        np.maximum.at(book.right, root, self.right[used])
        np.maximum.at(book.bottom, root, self.bottom[used])
        return book

    def only(self, kept: Longs) -> _Book:
        """Return some components, numbered from 1."""
        book, chosen = _Book(), np.concatenate([[0], kept])
        book._used = len(chosen)
        book._parent = np.arange(len(chosen), dtype=np.int32)
        for name in _COLUMNS:
            setattr(book, name, getattr(self, name)[chosen])
        return book

    def _roots_of(self, numbers: Ints) -> Ints:
        while True:
            above = self._parent[numbers]
            if np.array_equal(above, numbers):
                return numbers
            numbers = above

    def _reserve(self, size: int) -> None:
        room = len(self._parent)
        if size > room:
            more = max(size, 2 * room) - room
            for name in ("_parent", *_COLUMNS):
                old = getattr(self, name)
                new = np.zeros((more, *old.shape[1:]), old.dtype)
                setattr(self, name, np.concatenate([old, new]))


def connected(n: int, a: Longs, b: Longs) -> Longs:
    """Return the least node that each of n nodes is connected to, by edges from a to b."""
    root = np.arange(n)
    while True:
        from_a, from_b = root[a], root[b]
        differ = from_a != from_b
        if not differ.any():
            return root
        a, b, from_a, from_b = a[differ], b[differ], from_a[differ], from_b[differ]
        np.minimum.at(root, np.maximum(from_a, from_b), np.minimum(from_a, from_b))
        while True:
            above = root[root]
            if np.array_equal(above, root):
                break
            root = above


def _corners(codes: Bytes, ids: Ints, x: int, y: int) -> Corners:
    """Corners at the vertices between pixels; (x, y) is the vertex after the first of them."""
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
    """Put corners together, each with the root of its component."""
    none = np.zeros(0, np.int32)
    return Corners(
        root[np.concatenate([none, *(c.owner for c in several)])],
        np.concatenate([none, *(c.x_flags for c in several)]),
        np.concatenate([none, *(c.y for c in several)]),
    )


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

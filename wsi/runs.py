"""Runs of equal pixels in the rows of an image, and which of them are connected."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Longs = NDArray[np.int64]
T = TypeVar("T", bound=np.generic)


class Runs:
    """Horizontal runs of one value that is not 0.

    Runs of one value are connected if they lie in neighbouring rows and share a column.

    Parameters
    ----------
    image
        (H, W) uint8.
    corners
        Whether runs that meet in a corner are connected too (8-connectivity instead of 4).

    Attributes
    ----------
    row, start, end
        (n,) where each run is; end is exclusive.
    value
        (n,) its value.
    component
        (n,) 0 to ``components - 1``, numbered in the order of their first pixels.
    """

    def __init__(self, image: NDArray[np.uint8], *, corners: bool = False) -> None:
        height, width = image.shape
        self._shape, stride = image.shape, width + 1
        padded = np.zeros((height, stride), np.uint8)  # a gap after each row
        padded[:, :width] = image
        flat = padded.ravel()
        self._edges = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
        value = flat[self._edges[:-1]]
        self._filled = np.flatnonzero(value)
        first, last = self._edges[:-1][self._filled], self._edges[1:][self._filled]
        self.value = value[self._filled]
        self.row = first // stride
        self.start = first - self.row * stride
        self.end = self.start + (last - first)
        # Each run touches the runs low to low + count - 1 of the row above.
        low = np.searchsorted(last, first - stride - int(corners), side="right")
        count = np.searchsorted(first, last - stride + int(corners), side="left") - low
        below = np.repeat(np.arange(len(first)), count)
        above = np.arange(count.sum()) + np.repeat(low - (np.cumsum(count) - count), count)
        same = self.value[below] == self.value[above]
        root = connected(len(first), below[same], above[same])
        is_root = root == np.arange(len(root))
        self.components = int(is_root.sum())
        self.component = (np.cumsum(is_root) - 1)[root]

    def painted(self, number: NDArray[T]) -> NDArray[T]:
        """Return (H, W): at each pixel the entry of ``number`` of its component; 0 outside of runs."""
        height, width = self._shape
        value = np.zeros(len(self._edges) - 1, number.dtype)
        value[self._filled] = number[self.component]
        return np.repeat(value, np.diff(self._edges)).reshape(height, width + 1)[:, :width]

    def painted_border(self, number: NDArray[T]) -> tuple[NDArray[T], NDArray[T], NDArray[T], NDArray[T]]:
        """Return the first and last row (W,), and the first and last column (H,), of `painted`."""
        height, width = self._shape
        value = number[self.component]
        borders = []
        for row in (0, height - 1):
            line = np.zeros(width, number.dtype)
            inside = slice(*np.searchsorted(self.row, (row, row + 1)))
            start, length = self.start[inside], self.end[inside] - self.start[inside]
            ends = np.cumsum(length)
            columns = np.arange(length.sum()) + np.repeat(start - (ends - length), length)
            line[columns] = np.repeat(value[inside], length)
            borders.append(line)
        for touches in (self.start == 0, self.end == width):
            line = np.zeros(height, number.dtype)
            line[self.row[touches]] = value[touches]
            borders.append(line)
        first, last, left, right = borders
        return first, last, left, right


def connected(n: int, a: Longs, b: Longs) -> Longs:
    """Return the lowest node that each of n nodes is connected to, by edges from a to b."""
    root = np.arange(n)
    while True:
        from_a, from_b = root[a], root[b]
        differ = from_a != from_b
        if not differ.any():
            return root
        a, b, from_a, from_b = a[differ], b[differ], from_a[differ], from_b[differ]
        np.minimum.at(root, np.maximum(from_a, from_b), np.minimum(from_a, from_b))
        while not np.array_equal(root, above := root[root]):
            root = above

"""Outlines of objects from their corners: closed rings along the edges of pixels.

Where two pixels of an object meet only in a corner, the ring turns so that it follows the same piece
of background. Each ring is then the border between the object and one connected piece of background.
No ring touches itself, since the object, which is in one piece, separates the two sides of such a
corner. Rings may touch each other in single points: that is a valid polygon of OGC 06-103r4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.outputs.objects.components import CONVEX, DOWN, FLAGS, RIGHT, Corners

Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Outlines:
    """Polygons of n objects, one after the other.

    Attributes
    ----------
    points
        (p, 2) int32, x and y of the vertices in pixel edges: pixel i lies between i and i + 1. A
        ring begins with its topmost point, of several the leftmost; it is not repeated at the end.
    ring_ends
        (r,) index into ``points`` where each ring ends.
    object_ends
        (n,) index into ``ring_ends`` where the rings of each object end: its outside, then its
        holes. With y down, the outside runs clockwise and holes the other way.
    perimeter_px
        (n,) length of all rings, as if borders were smooth; see `perimeter`.
    """

    points: NDArray[np.int32]
    ring_ends: Longs
    object_ends: Longs
    perimeter_px: NDArray[np.float64]


def trace(corners: Corners, count: int) -> Outlines:
    """Order corners into rings.

    Parameters
    ----------
    corners
        All corners of the objects, in any order.
    count
        How many objects there are: owners are 0 to ``count - 1``.
    """
    owner, x, y = corners.owner.astype(np.int64), corners.x_flags >> FLAGS, corners.y
    right, down = (corners.x_flags & bit > 0 for bit in (RIGHT, DOWN))
    order = _order(owner, y, x, right)
    owner, x, y, right, down = owner[order], x[order], y[order], right[order], down[order]
    convex = corners.x_flags[order] & CONVEX > 0

    # Where two pixels of an object meet in a corner, exchange the vertical edges of the two corners:
    # they become two corners of the background.
    same = (owner[1:] == owner[:-1]) & (x[1:] == x[:-1]) & (y[1:] == y[:-1])
    twins = np.flatnonzero(same)
    down[twins], down[twins + 1] = down[twins + 1], down[twins]
    convex[twins] = convex[twins + 1] = False

    # In this order the horizontal neighbour of a corner lies beside it, in the other order the vertical one.
    here = np.arange(len(order))
    vertical = _order(owner, x, y, down)
    partner = np.empty_like(here)
    partner[vertical[0::2]], partner[vertical[1::2]] = vertical[1::2], vertical[0::2]
    # Edges above the object lead right, so that the object lies on the right of every edge.
    along = right == (down == convex)
    following = np.where(along, here ^ 1, partner)
    position, ring_ends = _rings(following)
    points = np.empty((len(order), 2), np.int32)
    points[position, 0], points[position, 1] = x, y

    ring_starts = np.concatenate([np.zeros(1, np.int64), ring_ends])[:-1]
    ring_owner = np.empty(len(order), np.int64)
    ring_owner[position] = owner
    object_ends = np.cumsum(np.bincount(ring_owner[ring_starts], minlength=count))

    lengths = (x[1::2] - x[0::2]) + np.abs(y - y[partner]).reshape(-1, 2).sum(axis=1) / 2
    edge_px = np.bincount(owner[0::2], lengths, minlength=count).astype(np.int64)
    number = np.bincount(owner, minlength=count)
    meeting = np.bincount(owner[twins], minlength=count)
    return Outlines(points, ring_ends, object_ends, perimeter(edge_px, number, meeting))


def perimeter(edge_px: Longs, corners: Longs, meeting: Longs) -> NDArray[np.float64]:
    """Estimate the length of a smooth border from its image in pixels (Crofton's formula).

    The pixel edges of a disc are 4 / pi times too long, however fine the pixels. Crofton's formula
    counts how often lines in four directions cross the border instead,
    P = pi / 8 (rows + columns + (both diagonals) / sqrt 2). Rows and columns cross once for each
    pixel edge. Diagonals cross twice where the border runs straight past a vertex, once at a
    corner, and not at all where two pixels of the object meet in a corner.

    Parameters
    ----------
    edge_px
        Length of the pixel edges.
    corners
        Number of corners.
    meeting
        Number of vertices where two pixels of the object meet; each counts as two corners.
    """
    diagonals = 2 * edge_px - corners - 2 * meeting
    length: NDArray[np.float64] = np.pi / 8 * (edge_px + diagonals / np.sqrt(2))
    return length


def _order(owner: Longs, major: NDArray[np.int32], minor: NDArray[np.int32], last: NDArray[np.bool_]) -> Longs:
    """Return the order that sorts by owner, then by the other keys in turn."""
    if not len(owner):
        return np.zeros(0, np.int64)
    majors, minors = int(major.max()) + 1, int(minor.max()) + 1
    if (int(owner.max()) + 1) * majors * minors * 2 >= 1 << 63:
        return np.lexsort((last, minor, major, owner))
    return np.argsort(((owner * majors + major) * minors + minor) * 2 + last)


def _rings(following: Longs) -> tuple[Longs, Longs]:
    """Lay cycles one after the other, each from its least member.

    All corners follow their cycle at once, in steps of 1, 2, 4, ... (pointer jumping).

    Returns
    -------
    Position of each corner, and the end of each ring.
    """
    count = len(following)
    following = following.astype(np.int32)  # corners in memory are fewer than 2^31
    least, jump = np.arange(count, dtype=np.int32), following
    while True:
        less = np.minimum(least, least[jump])
        if np.array_equal(less, least):
            break
        least, jump = less, jump[jump]
    # Count the corners from each one to the last of its ring.
    is_last = following == least
    jump = np.where(is_last, np.arange(count, dtype=np.int32), following)
    left = (~is_last).astype(np.int32)
    while True:
        more = left[jump]
        if not more.any():
            break
        left, jump = left + more, jump[jump]
    is_first = least == np.arange(count)
    ends = np.cumsum(np.bincount(least, minlength=count)[is_first])
    ring = (np.cumsum(is_first) - 1)[least]
    return ends[ring] - 1 - left, ends

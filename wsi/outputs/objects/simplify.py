"""Simplify polygons so that they stay valid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Rings = Sequence[NDArray[np.float64]]

MANY_RINGS = 64  # above, GEOS takes too long; see `_ring_by_ring`


def simplify(polygons: Sequence[Rings], tolerance: float) -> list[list[NDArray[np.float64]]]:
    """Remove points of polygons by the algorithm of Douglas and Peucker.

    The remaining points keep their order. A removed point lies within the tolerance of the new
    outline; only the first point of a ring, if removed, may be twice as far. Rings do not vanish,
    cross or change sides (GEOS's ``TopologyPreservingSimplifier``).

    Parameters
    ----------
    polygons
        Rings of each, (n, 2), the outside first; the first point of a ring is not repeated.
    tolerance
        Largest distance, in the units of the points.
    """
    import shapely

    simplified: list[list[NDArray[np.float64]]] = [[] for _ in polygons]
    few = [i for i, polygon in enumerate(polygons) if len(polygon) <= MANY_RINGS]
    exact = _polygons([polygons[i] for i in few])
    simple = shapely.simplify(exact, tolerance, preserve_topology=True)
    # No case is known that makes them invalid, but a file that other programs refuse would be worst.
    simple = np.where(shapely.is_valid(simple) & ~shapely.is_empty(simple), simple, exact)
    rings, owners = shapely.get_rings(simple, return_index=True)
    for owner, ring in zip(owners.tolist(), _open(rings), strict=True):
        simplified[few[owner]].append(ring)
    for i, polygon in enumerate(polygons):
        if len(polygon) > MANY_RINGS:
            simplified[i] = _ring_by_ring(polygon, tolerance)
    return simplified


def _ring_by_ring(polygon: Rings, tolerance: float) -> list[NDArray[np.float64]]:
    """Simplify each ring on its own, and restore the rings that then meet another ring.

    GEOS compares every ring with every other: an hour for a tissue with 100 000 nuclei in it.
    """
    import shapely

    exact = _polygons([[ring] for ring in polygon])
    simple = shapely.simplify(exact, tolerance, preserve_topology=True)
    done = np.zeros(len(exact), bool)
    while True:
        lines = shapely.get_exterior_ring(simple)
        holes = shapely.STRtree(lines[1:])
        a, b = holes.query(lines[1:], predicate="intersects")
        meet = a != b
        meeting = np.concatenate([a[meet] + 1, b[meet] + 1])
        at_border = holes.query(lines[0], predicate="intersects") + 1
        if len(at_border):
            meeting = np.concatenate([meeting, at_border, [0]])
        meeting = np.unique(meeting)
        meeting = meeting[~done[meeting]]
        if not len(meeting):
            break
        simple[meeting], done[meeting] = exact[meeting], True
    polygon_of_lines = shapely.Polygon(lines[0], lines[1:])
    return list(_open(lines)) if polygon_of_lines.is_valid else list(polygon)


def _polygons(polygons: Sequence[Rings]) -> NDArray[np.object_]:
    import shapely

    rings = [ring for polygon in polygons for ring in polygon]
    if not rings:
        return np.zeros(0, object)
    of_ring = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    of_polygon = np.repeat(np.arange(len(polygons)), [len(polygon) for polygon in polygons])
    closed = shapely.linearrings(np.concatenate(rings), indices=of_ring)
    result: NDArray[np.object_] = shapely.polygons(closed, indices=of_polygon)
    return result


def _open(rings: NDArray[np.object_]) -> Iterator[NDArray[np.float64]]:
    """Yield the points of each ring without the last one, which repeats the first."""
    import shapely

    points, of_point = shapely.get_coordinates(rings, return_index=True)
    ends = np.cumsum(np.bincount(of_point, minlength=len(rings)))
    for begin, end in zip(np.concatenate([[0], ends])[:-1].tolist(), ends.tolist(), strict=True):
        yield points[begin : end - 1]

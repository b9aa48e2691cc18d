"""Polygons with fewer points, which stay valid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rings = Sequence[NDArray[np.float64]]


def simplify(polygons: Sequence[Rings], tolerance: float) -> list[list[NDArray[np.float64]]]:
    """Leave out points of polygons, as Douglas and Peucker do.

    What remains are points of the polygon, in their order, and none that is left out is further
    than the tolerance from the new outline. Rings do not vanish, cross or change sides (GEOS's
    ``TopologyPreservingSimplifier``).

    Parameters
    ----------
    polygons
        Rings of each, (n, 2), the outside first; the first point of a ring is not repeated.
    tolerance
        In the units of the points.
    """
    import shapely

    rings = [ring for polygon in polygons for ring in polygon]
    if not rings:
        return []
    of_ring = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    of_polygon = np.repeat(np.arange(len(polygons)), [len(polygon) for polygon in polygons])
    closed = shapely.linearrings(np.concatenate(rings), indices=of_ring)
    exact = shapely.polygons(closed, indices=of_polygon)
    fewer = shapely.simplify(exact, tolerance, preserve_topology=True)
    # Nothing is known to break them, but a file that others refuse would be the worst outcome.
    fewer = np.where(shapely.is_valid(fewer) & ~shapely.is_empty(fewer), fewer, exact)
    found: list[list[NDArray[np.float64]]] = [[] for _ in polygons]
    kept, owners = shapely.get_rings(fewer, return_index=True)
    points, of_point = shapely.get_coordinates(kept, return_index=True)
    ends = np.cumsum(np.bincount(of_point))
    for owner, ring in zip(owners.tolist(), np.split(points, ends[:-1]), strict=True):
        found[owner].append(ring[:-1])
    return found

"""tissue.geojson: the outline of the area that was analysed, as QuPath reads it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.outputs.objects.components import Components
from histostream.wsi.outputs.objects.outline import trace

AREA_FILE = "tissue.geojson"
CLASS = {"name": "Tissue", "color": [0, 128, 96]}
DECIMALS = 2  # of coordinates, in pixels of level 0


def area_geojson(mask: NDArray[np.bool_], width: int, height: int, origin: tuple[int, int] = (0, 0)) -> str:
    """Return a mask of a whole slide as a GeoJSON FeatureCollection (RFC 7946), an annotation for each piece.

    Parameters
    ----------
    mask
        (h, w) bool.
    width, height
        Size of the slide in pixels of level 0, which is the unit of the coordinates.
    origin
        Where the slide begins in the coordinates, see `origin_px`.
    """
    scale = np.array([width / mask.shape[1], height / mask.shape[0]])
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [_closed(ring * scale + origin) for ring in polygon]},
            "properties": {"objectType": "annotation", "classification": CLASS},
        }
        for polygon in outlines(mask)
    ]
    lines = ",\n".join(json.dumps(feature, separators=(",", ":"), allow_nan=False) for feature in features)
    return f'{{"type":"FeatureCollection","features":[\n{lines}\n]}}\n'


def outlines(mask: NDArray[np.bool_]) -> list[list[NDArray[np.int32]]]:
    """Return the polygons of a mask (h, w): for each piece its outside and its holes, (n, 2) x and y of pixel edges.

    The pixels of a piece share sides, so that each polygon is valid.
    """
    height, width = mask.shape
    components = Components(width, height, [1])
    complete = [*components.add(0, 0, mask.view(np.uint8)), components.finish()]
    polygons = []
    for part in complete:
        traced = trace(part.corners, len(part.area))
        rings = np.split(traced.points, traced.ring_ends[:-1]) if len(traced.ring_ends) else []
        start = 0
        for end in traced.object_ends.tolist():
            polygons.append(rings[start:end])
            start = end
    return polygons


def _closed(ring: NDArray[np.float64]) -> list[Any]:
    points: list[Any] = np.round(ring, DECIMALS).tolist()
    return [*points, points[0]]

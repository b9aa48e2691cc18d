"""Files of regions that are no GeoJSON, or strange GeoJSON."""

from __future__ import annotations

import json
import random

import numpy as np

from tests.robustness.hostile.case import Case, roi_case
from tests.robustness.hostile.edit import some_bytes

NUMBERS = (
    "0",
    "-1",
    "50",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "1e300",
    "1e18",
    "2147483648",
    "0.5",
    "-2147483649",
    "1e-320",
    "9" * 5000,
    "true",
    "null",
    '"7"',
    "[]",
    "{}",
)
SQUARE = "[[10, 10], [150, 10], [150, 100], [10, 100], [10, 10]]"


def _ring(rng: random.Random) -> str:
    way = rng.randrange(9)
    if way == 0:
        return SQUARE
    if way > 5:
        way = 1
    if way == 1:  # crosses itself
        points = [f"[{rng.randint(-50, 250)}, {rng.randint(-50, 200)}]" for _ in range(50)]
    elif way == 2:
        points = [f"[{rng.choice(NUMBERS)}, {rng.choice(NUMBERS)}]" for _ in range(4)]
    elif way == 3:
        points = [rng.choice(("[1]", "[]", "[1, 2, 3]", "1", "null", '"ab"', "[[1, 2]]"))] * 4
    elif way == 4:
        far = rng.choice(("1e6", "1e9", "1e12", "1e300"))
        points = [f"[-{far}, -{far}]", f"[{far}, -{far}]", f"[0, {far}]", "[50, 50]"]
    else:
        points = ["[10, 10]"] * rng.choice((0, 1, 2, 3, 5))
    return f"[{', '.join(points)}]"


def _geometry(rng: random.Random, depth: int = 0) -> str:
    kind = rng.choice(
        (
            *["Polygon"] * 8,
            "MultiPolygon",
            "MultiPolygon",
            "GeometryCollection",
            "Point",
            "LineString",
            "Nonsense",
            'Poly"gon',
            "",
        )
    )
    rings = f"[{', '.join(_ring(rng) for _ in range(rng.choice((0, 1, 1, 1, 2, 4))))}]"
    if kind == "MultiPolygon":
        rings = f"[{', '.join([rings] * rng.choice((0, 1, 3, 200)))}]"
    if kind == "GeometryCollection" and depth < 3:
        return f'{{"type": "{kind}", "geometries": [{_geometry(rng, depth + 1)}]}}'
    return f'{{"type": "{kind}", "coordinates": {rings}}}'


def _nested(rng: random.Random) -> str:
    depth = rng.choice((10, 900, 2000, 100_000))
    opening, closing = rng.choice(
        (
            ("[", "]"),
            ('{"type": "Feature", "geometry": ', "}"),
            ('{"type": "FeatureCollection", "features": [', "]}"),
            ('{"type": "GeometryCollection", "geometries": [', "]}"),
            ('{"type": "Polygon", "coordinates": [', "]}"),
        )
    )
    return opening * depth + closing * rng.choice((0, depth))


def _many_points(rng: random.Random) -> str:
    count = rng.choice((1000, 100_000, 1_000_000))
    angle = np.linspace(0, 2 * np.pi, count)
    radius = 60 + 20 * np.sin(97 * angle)
    xy = np.stack([100 + radius * np.cos(angle), 75 + radius * np.sin(angle)], axis=1).round(2)
    return f'{{"type": "Polygon", "coordinates": [{json.dumps(xy.tolist())}]}}'


def _many_polygons(rng: random.Random) -> str:
    hole = "[[20, 20], [30, 20], [30, 30]]" if rng.random() < 0.5 else SQUARE
    rings = f"[{SQUARE}, {hole}]"
    return f'{{"type": "MultiPolygon", "coordinates": [{", ".join([rings] * 20_000)}]}}'


NOT_GEOJSON = (
    b"",
    b"null",
    b"1",
    b'"x"',
    b"[]",
    b"{}",
    b"[null]",
    b"[[]]",
    b"\xff\xfe\x00",
    b"\x80",
    b"not json",
    b'{"type": null}',
    b'{"type": "Feature"}',
    b'{"type": "Feature", "geometry": 1}',
    b'{"type": "FeatureCollection", "features": null}',
    b'{"type": ["Polygon"]}',
    b'{"type": "Polygon", "coordinates": "abc"}',
    b'{"type": "Polygon", "coordinates": {}}',
    b'{"type": "Polygon", "coordinates": [{"a": 1}]}',
    b"\xef\xbb\xbf{}",
    b"\0" * 1000,
    b'{"type": "Polygon", "coordinates": ["' + b"x" * 100_000 + b'"]}',
    b'{"type": "Polygon", "coordinates": [["' + b"x" * 100_000 + b'"]]}',
    b"PK\x03\x04",
    b"<xml/>",
    ("[" + "1" * 5000 + "]").encode(),
)


def make_roi(rng: random.Random) -> Case:
    """Make a file of regions that is no GeoJSON, or strange GeoJSON."""
    way = rng.randrange(10)
    if way == 0:
        content = rng.choice(NOT_GEOJSON)
        return roi_case(f"not GeoJSON: {content[:40]!r}", content)
    if way == 1:
        return roi_case("nested", _nested(rng).encode())
    if way == 2 and rng.random() < 0.2:
        return roi_case("many points", _many_points(rng).encode())
    if way == 3 and rng.random() < 0.2:
        return roi_case("many polygons", _many_polygons(rng).encode())
    said = rng.choice(
        (
            "{}",
            "null",
            "[]",
            '{"name": "../../x"}',
            '{"classification": 5}',
            '{"classification": {"name": ["\\ud800"]}}',
        )
    )
    text = f'{{"type": "Feature", "properties": {said}, "geometry": {_geometry(rng)}}}'
    what, content = "geometry", text.encode()
    if way >= 8:
        what, content = some_bytes(content, rng)
    return roi_case(f"{what}: {content[:300]!r}", content)

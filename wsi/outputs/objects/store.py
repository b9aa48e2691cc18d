"""Keep objects on disk until all are found, and return them in the order of their first pixels.

The order in which they are found depends on the column bands; the order in files must not.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.files import remove, writing
from histostream.wsi.outputs.objects.components import Complete
from histostream.wsi.outputs.objects.ellipse import eccentricity
from histostream.wsi.outputs.objects.outline import Outlines, trace

# Class; area; left, top, right, bottom; perimeter, eccentricity, centroid x, y; rings, points.
_HEADER = struct.Struct("<Bq4i4d2i")


@dataclass(frozen=True, slots=True)
class Shape:
    """An object, in pixels of the label map; pixel i lies between i and i + 1.

    Attributes
    ----------
    value
        Class.
    area_px, perimeter_px
        Number of pixels, and length of the border with its holes; see `outline.perimeter`.
    eccentricity
        Eccentricity of the ellipse with the same second moments: 0 is round, near 1 is thin.
    x, y
        Centroid.
    box
        Left, top, right, bottom.
    rings
        (n, 2) int32 each: the outside, then the holes; see `outline.Outlines`.
    """

    value: int
    area_px: int
    perimeter_px: float
    eccentricity: float
    x: float
    y: float
    box: tuple[int, int, int, int]
    rings: tuple[NDArray[np.int32], ...]


class Store:
    """Keeps objects in a file; in memory it holds 16 bytes of each.

    Parameters
    ----------
    path
        The file; an older one is overwritten.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._file = path.open("w+b")
        self._first, self._end = array("q"), array("q", [0])

    def __len__(self) -> int:
        return len(self._first)

    def add(self, complete: Complete) -> None:
        """Keep objects.

        Raises
        ------
        OutputError
            If the disk is full.
        """
        if not len(complete.first):
            return
        records = list(_records(complete, trace(complete.corners, len(complete.first))))
        for record in records:
            self._end.append(self._end[-1] + len(record))
        self._first.extend(complete.first.tolist())
        with writing(self._path):
            self._file.write(b"".join(records))

    def __iter__(self) -> Iterator[Shape]:
        with writing(self._path):
            self._file.flush()
            for i in np.argsort(np.frombuffer(self._first, np.int64)).tolist():
                self._file.seek(self._end[i])
                yield _shape(self._file.read(self._end[i + 1] - self._end[i]))

    def remove(self) -> None:
        """Remove the file. Allowed twice."""
        self._file.close()
        remove([self._path])


def _records(complete: Complete, outlines: Outlines) -> Iterator[bytes]:
    centers = (complete.moments[:, :2] / complete.area[:, None].astype(object)).astype(np.float64) + 0.5
    columns = zip(
        complete.value.tolist(),
        complete.area.tolist(),
        complete.box.tolist(),
        outlines.perimeter_px.tolist(),
        eccentricity(complete.area, complete.moments).tolist(),
        centers.tolist(),
        outlines.object_ends.tolist(),
        strict=True,
    )
    ring_ends = outlines.ring_ends.astype(np.int32)
    points, first_ring, begin = outlines.points, 0, 0
    for value, area, box, perimeter_px, eccentric, center, last_ring in columns:
        ends = ring_ends[first_ring:last_ring]
        end = int(ends[-1])
        header = _HEADER.pack(value, area, *box, perimeter_px, eccentric, *center, len(ends), end - begin)
        yield header + (ends - begin).tobytes() + points[begin:end].tobytes()
        first_ring, begin = last_ring, end


def _shape(record: bytes) -> Shape:
    value, area, *rest = _HEADER.unpack_from(record)
    box, (perimeter_px, eccentric, x, y, rings, points) = tuple(rest[:4]), rest[4:]
    ends = np.frombuffer(record, np.int32, rings, _HEADER.size)
    flat = np.frombuffer(record, np.int32, 2 * points, _HEADER.size + ends.nbytes).reshape(-1, 2)
    cut = (flat,) if rings == 1 else tuple(np.split(flat, ends[:-1]))
    return Shape(value, area, perimeter_px, eccentric, x, y, box, cut)

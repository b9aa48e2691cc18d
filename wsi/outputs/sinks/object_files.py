"""The objects of the label map, found once and written to each file that lists them.

::

    rows ──> Components ──> Store ──> simplified, at the slide's full size ──> GeoJson, Dsa, tables

Memory holds only objects that may still grow: a nucleus is on disk soon after its last row. Files
are written at the end, in the order of the objects' first pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.files import temporary_name
from histostream.wsi.optional import require
from histostream.wsi.outputs.label_rows import LabelRows, SlideInfo, background_label
from histostream.wsi.outputs.memory_needs import MemoryNeeds
from histostream.wsi.outputs.objects.components import Complete
from histostream.wsi.outputs.objects.counting import ObjectCounter, find_components
from histostream.wsi.outputs.objects.simplify import simplify
from histostream.wsi.outputs.objects.slide_object import ObjectFile, SlideObject
from histostream.wsi.outputs.objects.store import Shape, Store
from histostream.wsi.outputs.sinks import SinkKind
from histostream.wsi.outputs.sinks.object_counts import LINE_BYTES

DECIMALS = 2  # of coordinates, in pixels of level 0
GROUP_POINTS = 1 << 16  # simplified at a time
# Blocks of the label map, corners that may still change, rings that are traced; measured.
BUFFERS = 64 << 20
STORE = "objects"  # name of the temporary file


class Objects:
    """Finds the objects of all classes but the background, by the rules of the classes, and counts them; see `Sink`.

    The files do not depend on how the rows were cut.

    Parameters
    ----------
    folder
        Of the files.
    info
        The label map.
    slide
        The slide's path.
    kinds
        The files to write.
    downsample
        Pixels of level 0 per pixel of the label map, along one side.
    origin
        Where the slide begins in the coordinates of the files, in pixels of level 0.
    simplify_um
        Outlines may deviate by this, to have fewer points; 0: they follow the pixels.

    Raises
    ------
    OutputError
        If a file cannot be written, or a library that it needs is not installed.

    Attributes
    ----------
    counter
        The counts of the classes that are counted, complete after `finish`.
    """

    def __init__(
        self,
        folder: Path,
        info: SlideInfo,
        slide: Path,
        kinds: Sequence[SinkKind],
        *,
        downsample: float = 1.0,
        origin: tuple[int, int] = (0, 0),
        simplify_um: float = 0.0,
    ) -> None:
        check_installed(kinds, simplify_um)
        self._info, self._downsample, self._origin = info, downsample, origin
        self._integer = float(downsample).is_integer()  # coordinates without decimals are shorter to read
        self._tolerance_px = simplify_um / info.mpp * downsample
        background = background_label(info.classes)
        labels = [label for label in range(len(info.classes)) if label != background]
        self._components = find_components(info, labels, outlines=True)
        self.counter = ObjectCounter(info)
        self._files: list[ObjectFile] = []
        self._store = Store(temporary_name(folder / STORE))
        try:
            for kind in kinds:
                self._files.append(kind.open(folder / kind.file, info, slide))
        except BaseException:
            self.abort()
            raise

    def __len__(self) -> int:
        """Return how many objects are complete."""
        return len(self._store)

    def write(self, part: LabelRows) -> None:
        """Take the next rows."""
        for complete in self._components.add(part.x, part.y, part.labels):
            self._add(complete)

    def finish(self) -> list[tuple[Path, Path]]:
        """Write the files under their temporary names."""
        self._add(self._components.finish())
        for item in self._full_size():
            for file in self._files:
                file.write(item)
        self._store.remove()
        return [file.finish() for file in self._files]

    def abort(self) -> None:
        """Remove what was written."""
        self._store.remove()
        for file in self._files:
            file.abort()

    def _add(self, complete: Complete) -> None:
        self._store.add(complete)
        self.counter.add(complete)

    def _full_size(self) -> Iterator[SlideObject]:
        number = 1
        for group in _grouped(self._store):
            polygons = [[self._scaled(ring) for ring in shape.rings] for shape in group]
            if self._tolerance_px:
                polygons = simplify(polygons, self._tolerance_px)
            for shape, rings in zip(group, polygons, strict=True):
                yield self._object(number, shape, rings)
                number += 1

    def _object(self, number: int, shape: Shape, rings: list[NDArray[np.float64]]) -> SlideObject:
        mpp, scale = self._info.mpp, self._downsample
        x, y = self._origin
        left, top, right, bottom = (
            round(side * scale + start, DECIMALS) for side, start in zip(shape.box, (x, y, x, y), strict=True)
        )
        return SlideObject(
            number,
            shape.value,
            shape.area_px * mpp**2,
            shape.perimeter_px * mpp,
            shape.eccentricity,
            shape.x * scale + x,
            shape.y * scale + y,
            (left, top, right, bottom),
            [ring.astype(np.int64) for ring in rings] if self._integer else rings,
        )

    def _scaled(self, ring: NDArray[np.int32]) -> NDArray[np.float64]:
        return np.round(ring * self._downsample + self._origin, DECIMALS)


def check_installed(kinds: Sequence[SinkKind], simplify_um: float) -> None:
    """Check that the packages for some files and for simplified outlines are installed.

    Raises
    ------
    OutputError
        If one is not; the message says how to install it.
    """
    for kind in kinds:
        kind.check_installed()
    if simplify_um:
        require("shapely", "simplified outlines need", "simplify")


def object_needs(info: SlideInfo) -> MemoryNeeds:
    """Return the memory that finding objects takes, if none of them fills much of the slide.

    Each corner of the outline of a larger object takes 24 bytes more while the object may grow, and
    about 150 bytes at its end.
    """
    return MemoryNeeds(bytes_at_once=BUFFERS + LINE_BYTES * info.height)


def _grouped(shapes: Iterable[Shape]) -> Iterator[list[Shape]]:
    """Yield the shapes in groups of about `GROUP_POINTS` points."""
    group: list[Shape] = []
    points = 0
    for shape in shapes:
        group.append(shape)
        points += sum(len(ring) for ring in shape.rings)
        if points >= GROUP_POINTS:
            yield group
            group, points = [], 0
    if group:
        yield group

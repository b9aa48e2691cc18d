"""density.tif: objects per mm2 on a grid of 64 um."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from histostream.wsi.errors import OutputError, SlideError, reason
from histostream.wsi.files import remove, temporary_name, writing
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, LabelRows, SlideInfo
from histostream.wsi.outputs.memory_needs import MemoryNeeds
from histostream.wsi.outputs.objects.components import Complete
from histostream.wsi.outputs.objects.counting import counted_labels, find_components
from histostream.wsi.outputs.sinks import SinkKind
from histostream.wsi.outputs.sinks.object_counts import count_needs

DENSITY_FILE = "density.tif"
CELL_UM = 64.0
MIN_ANALYSED = 0.25  # of a cell; in slivers of tissue one object would be thousands per mm2
UM_PER_CM = 1e4
MAX_CELLS = 1 << 25  # of all classes in a file that is read


class Density:
    """Objects per mm2 of the analysed area of each cell of a grid; see `Sink`.

    A pixel, and an object by its centroid, is in the cell ``floor(x / cell), floor(y / cell)``; x and y are in um from
    the slide's corner, and those of a pixel are its centre. A cell is `CELL_UM` wide, or a pixel where pixels are
    larger. Cells of which less than `MIN_ANALYSED` was analysed are nan.

    Parameters
    ----------
    path
        Final name.
    info
        The slide; the classes whose rules say so are counted.

    Raises
    ------
    OutputError
        If there is no such class.
    """

    def __init__(self, path: Path, info: SlideInfo) -> None:
        self._path, self._info = path, info
        self._labels = counted_labels(info.classes)
        if not self._labels:
            raise OutputError(
                f"{path.name}: the model has no class whose objects are counted; leave --rasters density out"
            )
        self._cell_um = cell_um(info)
        height, width = grid_shape(info)
        self._objects = np.zeros((height, width, len(self._labels)), np.int32)
        self._pixels = np.zeros((height, width), np.int64)
        self._components = find_components(info, self._labels, outlines=False)

    def write(self, part: LabelRows) -> None:
        """Take the next rows."""
        for complete in self._components.add(part.x, part.y, part.labels):
            self._count(complete)
        if part.all_outside:
            return
        height, width = part.labels.shape
        rows, first_rows = self._cells(part.y, height)
        columns, first_columns = self._cells(part.x, width)
        analysed = np.add.reduceat(part.labels != NOT_ANALYSED, first_columns, axis=1, dtype=np.int64)
        self._pixels[np.ix_(rows, columns)] += np.add.reduceat(analysed, first_rows, axis=0)

    def finish(self) -> list[tuple[Path, Path]]:
        """Write the file under its temporary name."""
        self._count(self._components.finish())
        temporary, info = temporary_name(self._path), self._info
        names = [info.classes[label].name for label in self._labels]
        description = {
            "histostream": "density",
            "slide": info.name,
            "unit": "objects per mm2",
            "cell_um": self._cell_um,
            "classes": [{"value": label, "name": name} for label, name in zip(self._labels, names, strict=True)],
        }
        per_cm = UM_PER_CM / self._cell_um
        with writing(self._path), tifffile.TiffWriter(temporary) as file:
            file.write(
                np.moveaxis(self.values(), 2, 0),  # a page for each class
                photometric="minisblack",
                compression="deflate",
                predictor=True,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                description=json.dumps(description),
                metadata=None,
                software="HistoStream",
            )
        return [(temporary, self._path)]

    def abort(self) -> None:
        """Remove what was written."""
        remove([temporary_name(self._path)])

    def values(self) -> NDArray[np.float32]:
        """Return the objects per mm2 so far, (H, W, K) with one value for each class that is counted."""
        analysed_mm2 = self._pixels * (self._info.mpp / 1000) ** 2
        known = analysed_mm2 >= MIN_ANALYSED * (self._cell_um / 1000) ** 2
        values = np.full(self._objects.shape, np.nan, np.float32)
        values[known] = self._objects[known] / analysed_mm2[known][:, None]
        return values

    def _count(self, complete: Complete) -> None:
        centroids = (complete.moments[:, :2] / complete.area[:, None].astype(object)).astype(np.float64) + 0.5
        column, row = (np.floor(centroids * (self._info.mpp / self._cell_um)).astype(np.int64)).T
        index = np.zeros(256, np.int64)
        index[self._labels] = np.arange(len(self._labels))
        np.add.at(self._objects, (row, column, index[complete.value]), 1)

    def _cells(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the cells that some rows (or columns) of pixels are in, and the first pixel in each."""
        centers = np.arange(start, start + count) + 0.5
        cells = np.floor(centers * (self._info.mpp / self._cell_um)).astype(np.int64)
        first = np.flatnonzero(np.diff(cells, prepend=-1))
        return cells[first], first


@dataclass(frozen=True, slots=True)
class DensityMap:
    """Objects per mm2 on a grid.

    Attributes
    ----------
    values
        (H, W, K) float32, one value for each class that is counted; nan where too little was analysed.
    labels
        Labels of the K classes.
    cell_um
        Side of a cell in um; the first one begins at the slide's corner.
    """

    values: NDArray[np.float32]
    labels: tuple[int, ...]
    cell_um: float


def read_density(path: Path) -> DensityMap:
    """Read ``density.tif``.

    Raises
    ------
    SlideError
        If it is missing, damaged, or no file that HistoStream wrote.
    """
    try:
        with tifffile.TiffFile(path) as file:
            pages = file.pages
            page = pages.first
            labels, cell, shape = _parse_description(page.description, len(pages)), page.resolution[0], page.shape
            kinds = {(one.shape, one.dtype) for one in pages}
            if kinds != {(shape, np.dtype(np.float32))} or len(shape) != 2 or len(labels) * prod(shape) > MAX_CELLS:
                raise ValueError(f"{shape} {page.dtype}")
            values = np.stack([one.asarray() for one in pages], axis=2)
    except (OSError, ValueError, TypeError, KeyError, LookupError, RuntimeError, MemoryError, struct.error) as error:
        raise SlideError(f"{path}: no density map ({reason(error)}); run the slide again") from error
    return DensityMap(values, labels, UM_PER_CM / cell)


def cell_um(info: SlideInfo) -> float:
    """Return the side of a cell."""
    return max(CELL_UM, info.mpp)


def grid_shape(info: SlideInfo) -> tuple[int, int]:
    """Return how many rows and columns of cells cover a slide."""
    scale = info.mpp / cell_um(info)
    return math.ceil(info.height * scale), math.ceil(info.width * scale)


def _needs(info: SlideInfo, tile_px: int) -> MemoryNeeds:
    rows, columns = grid_shape(info)
    classes = len(counted_labels(info.classes))
    return count_needs(info) + MemoryNeeds(bytes_at_once=rows * columns * (16 + 12 * classes))


def _parse_description(text: str, pages: int) -> tuple[int, ...]:
    """Return the labels of the classes, of the text that `Density` writes."""
    content = json.loads(text)
    labels = tuple(entry["value"] for entry in content["classes"])
    is_valid = all(isinstance(label, int) and 0 <= label < NOT_ANALYSED for label in labels)
    if content["histostream"] != "density" or len(labels) != pages or not is_valid:
        raise ValueError("its description is of another file")
    return labels


SINK = SinkKind(
    DENSITY_FILE,
    lambda path, info, slide: Density(path, info),
    needs=_needs,
    bytes_per_px=0.001,  # 4 bytes a cell of 4096 um2 and class; most models run at 0.25 to 1 um per pixel
    counts_objects=True,
)

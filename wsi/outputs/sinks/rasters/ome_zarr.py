"""labels.ome.zarr: the label map as OME-Zarr, a folder of small files.

::

    labels.ome.zarr/                 an image: the levels below, so that any reader opens it
        labels/classes/              a label image of it: its levels, colours and names
            0/  1/  ...              the arrays, in chunks of 512 x 512

The specification has label images in ``labels/`` of an image. Here the image is the label map itself,
so both refer to the same arrays. The version is 0.4 (Zarr 2): the reader of QuPath and Fiji (Bio-Formats
with jzarr) reads no later one, and napari and large-image read both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from histostream.wsi.errors import printable
from histostream.wsi.files import remove, temporary_name
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, SlideInfo, background_label
from histostream.wsi.outputs.pyramid import DEFLATE_LEVEL, PyramidLayout, PyramidWriter, deflate_codec, nearest
from histostream.wsi.outputs.sinks import SinkKind
from histostream.wsi.outputs.sinks.pyramid import LABEL_BYTES, PyramidSink, pyramid_needs
from histostream.wsi.outputs.sinks.tiff import NOT_ANALYSED_NAME

VERSION = "0.4"
GROUP = "labels/classes"
MEMORY_BYTES = 48 << 20  # zarr and numcodecs themselves; measured


class OmeZarr(PyramidSink):
    """The label map as in labels.tif, in chunks; chunks that were not analysed are left out.

    Parameters
    ----------
    path
        Final name of the folder.
    info
        The slide.
    tile_px
        Side of a chunk; band edges must be multiples of it.

    Raises
    ------
    OutputError
        If zarr is not installed, or the file for tiles cannot be made.
    """

    def __init__(self, path: Path, info: SlideInfo, tile_px: int = 512) -> None:
        SINK.check_installed()
        self._info = info
        layout = PyramidLayout(info.width, info.height, 1, info.mpp, nearest, tile_px)
        remove([temporary_name(path)])  # a killed run may have left other chunks
        super().__init__(PyramidWriter(path, layout, deflate_codec({}), self._assemble))

    def _assemble(self, pyramid: PyramidWriter, path: Path) -> None:
        import zarr

        layout = pyramid.layout
        root = zarr.create_group(path, zarr_format=2)
        names = [f"{GROUP}/{level}" for level in range(len(layout.level_sizes))]
        root.attrs.update(image_metadata(self._info, names))
        root.create_group("labels").attrs.update({"labels": [GROUP.rpartition("/")[2]]})
        levels = [name.rpartition("/")[2] for name in names]
        root.create_group(GROUP).attrs.update(label_metadata(self._info, levels))
        for level, name in enumerate(names):
            _write_level(path, root, name, pyramid, level)


def image_metadata(info: SlideInfo, paths: Sequence[str]) -> dict[str, Any]:
    """Return the ``multiscales`` of a pyramid; its levels, finest first, are at ``paths``.

    ``omero`` is the display of readers that ignore the colours; large-image requires it.
    """
    last = max(len(info.classes) - 1, 1)
    window = {"min": 0, "max": 255, "start": 0, "end": last}
    # Each level keeps every second pixel of the one above, so their first centres coincide.
    return {
        "omero": {"channels": [{"label": "class", "color": "FFFFFF", "active": True, "window": window}]},
        "multiscales": [
            {
                "version": VERSION,
                "name": printable(info.name),
                "type": "nearest",
                "axes": [{"name": n, "type": "space", "unit": "micrometer"} for n in ("y", "x")],
                "datasets": [
                    {
                        "path": path,
                        "coordinateTransformations": [{"type": "scale", "scale": [info.mpp * 2**level] * 2}],
                    }
                    for level, path in enumerate(paths)
                ],
            }
        ],
    }


def label_metadata(info: SlideInfo, paths: Sequence[str]) -> dict[str, Any]:
    """Return `image_metadata` with the colours of the classes, and their names as properties."""
    background = background_label(info.classes)
    opaque = [0 if label == background else 255 for label in range(len(info.classes))]
    colors = [(*entry.color, a) for entry, a in zip(info.classes, opaque, strict=True)]
    return {
        **image_metadata(info, paths),
        "image-label": {
            "version": VERSION,
            "colors": [
                {"label-value": value, "rgba": list(rgba)}
                for value, rgba in (*enumerate(colors), (NOT_ANALYSED, (255, 255, 255, 0)))
            ],
            "properties": [
                {"label-value": value, "name": name}
                for value, name in (
                    *((k, printable(entry.name)) for k, entry in enumerate(info.classes)),
                    (NOT_ANALYSED, NOT_ANALYSED_NAME),
                )
            ],
            "source": {"image": "../../"},
        },
    }


def _write_level(path: Path, root: Any, name: str, pyramid: PyramidWriter, level: int) -> None:
    import numcodecs

    layout = pyramid.layout
    (width, height), px = layout.level_sizes[level], layout.tile_px
    root.create_array(
        name,
        shape=(height, width),
        chunks=(px, px),
        dtype="uint8",
        fill_value=NOT_ANALYSED,
        compressors=numcodecs.Zlib(DEFLATE_LEVEL),  # jzarr reads it; Blosc files are twice as large
        chunk_key_encoding={"name": "v2", "separator": "/"},  # required by the specification
    )
    # The tiles are zlib streams, as zarr's own codec would write in 4 ms a chunk.
    glass = pyramid.codec.encode(np.full((px, px), NOT_ANALYSED, np.uint8))
    places = product(*map(range, layout.grid(level)))
    for (row, column), data in zip(places, pyramid.tiles(level), strict=True):
        if data != glass:  # a missing chunk has the fill value
            chunk = path / name / str(row) / str(column)
            chunk.parent.mkdir(exist_ok=True)
            chunk.write_bytes(data)


SINK = SinkKind(
    "labels.ome.zarr",
    lambda path, info, slide: OmeZarr(path, info),
    needs=partial(pyramid_needs, library_bytes=MEMORY_BYTES),
    bytes_per_px=LABEL_BYTES,
    module="zarr",
    extra="zarr",
)

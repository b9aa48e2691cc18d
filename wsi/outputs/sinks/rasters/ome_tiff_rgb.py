"""labels.rgb.ome.tif: a picture of the label map. QuPath opens OME-TIFF by Bio-Formats, without palettes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from histostream.wsi.outputs.label_rows import LabelRows, SlideInfo, is_one_value
from histostream.wsi.outputs.pyramid import PyramidLayout, PyramidWriter, deflate_codec, nearest, write_tiff
from histostream.wsi.outputs.sinks import SinkKind
from histostream.wsi.outputs.sinks.pyramid import LABEL_BYTES, PyramidSink, pyramid_needs
from histostream.wsi.outputs.sinks.rasters.ome_tiff import ome_xml
from histostream.wsi.outputs.sinks.tiff import color_map

ROWS = 64  # coloured at a time


class OmeTiffRgb(PyramidSink):
    """The label map in colours, for people to look at; reduced levels take every second pixel.

    Parameters
    ----------
    path, info, tile_px
        As in `OmeTiff`.
    """

    def __init__(self, path: Path, info: SlideInfo, tile_px: int = 512) -> None:
        xml = ome_xml(info, samples=3)
        layout = PyramidLayout(info.width, info.height, 3, info.mpp, nearest, tile_px, description=xml)
        codec = deflate_codec({"photometric": "rgb", "planarconfig": "contig"})
        super().__init__(PyramidWriter(path, layout, codec, partial(write_tiff, subifds=True)))
        self._colors = np.ascontiguousarray((color_map(info) >> 8).astype(np.uint8).T)  # (256, 3)

    def write(self, part: LabelRows) -> None:
        """Take the next rows."""
        labels = part.labels
        if is_one_value(labels):
            pixels = np.broadcast_to(self._colors[labels[0, 0]], (*labels.shape, 3))
            self._file.write(part.x, part.y, pixels)
            return
        for top in range(0, len(labels), ROWS):  # three times the labels' bytes, so a few at a time
            pixels = np.take(self._colors, labels[top : top + ROWS], axis=0)
            self._file.write(part.x, part.y + top, pixels)


SINK = SinkKind(
    "labels.rgb.ome.tif",
    lambda path, info, slide: OmeTiffRgb(path, info),
    needs=partial(pyramid_needs, pixel_bytes=4),  # three colours, and the labels
    bytes_per_px=LABEL_BYTES,
)

"""tissue.tif: the pixels of the label map that were analysed, as 255 and 0."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from histostream.wsi.outputs.label_rows import NOT_ANALYSED, LabelRows, SlideInfo
from histostream.wsi.outputs.pyramid import PyramidLayout, PyramidWriter, deflate_codec, nearest
from histostream.wsi.outputs.sinks import SinkKind
from histostream.wsi.outputs.sinks.pyramid import PyramidSink, pyramid_needs

BYTES_PER_PX = 0.0015  # measured, see docs/rasters.md


class TissueTiff(PyramidSink):
    """Where labels are a class, 255, and where they are `NOT_ANALYSED`, 0; of the size of the label map.

    Parameters
    ----------
    path
        Final name.
    info
        The slide.
    """

    def __init__(self, path: Path, info: SlideInfo) -> None:
        layout = PyramidLayout(info.width, info.height, 1, info.mpp, nearest)
        super().__init__(PyramidWriter(path, layout, deflate_codec({"photometric": "minisblack"})))

    def write(self, part: LabelRows) -> None:
        """Take the next rows."""
        if part.all_outside:
            super().write(replace(part, labels=np.broadcast_to(np.uint8(0), part.labels.shape), probabilities=None))
            return
        analysed = (part.labels != NOT_ANALYSED) * np.uint8(255)
        super().write(LabelRows(part.x, part.y, analysed))


SINK = SinkKind(
    "tissue.tif",
    lambda path, info, slide: TissueTiff(path, info),
    needs=partial(pyramid_needs, pixel_bytes=2),
    bytes_per_px=BYTES_PER_PX,
)

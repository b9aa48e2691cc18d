"""labels.tif and probabilities.tif: pyramids that OpenSlide and large-image open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.outputs.label_rows import NOT_ANALYSED, LabelRows, SlideInfo
from histostream.wsi.outputs.pyramid import PyramidLayout, PyramidWriter, deflate_codec, mean, nearest
from histostream.wsi.outputs.sinks.pyramid import PyramidSink

NOT_ANALYSED_NAME = "not analysed"  # in files that name every label
NOT_ANALYSED_COLOR = (255, 255, 255)
UNUSED_COLOR = (128, 128, 128)


class LabelTiff(PyramidSink):
    """The label map, lossless, one byte a pixel, coloured by its classes.

    Reduced levels take every second pixel, so that they hold labels too.

    Parameters
    ----------
    path
        Final name.
    info
        The slide.
    tile_px
        Side of the file's tiles; band edges must be multiples of it.
    """

    def __init__(self, path: Path, info: SlideInfo, tile_px: int = 512) -> None:
        super().__init__(label_pyramid(path, info, tile_px))


class ProbabilityTiff(PyramidSink):
    """The probability of each class, ``round(65535 p)``, as K values of 16 bits a pixel.

    Reduced levels are averages of 2 x 2.

    Parameters
    ----------
    path, info, tile_px
        As in `LabelTiff`.
    """

    def __init__(self, path: Path, info: SlideInfo, tile_px: int = 512) -> None:
        self._classes = len(info.classes)
        tags: dict[str, object] = {"photometric": "minisblack"}
        if self._classes > 1:
            tags |= {"planarconfig": "contig", "extrasamples": [0] * (self._classes - 1)}
        layout = PyramidLayout(
            info.width,
            info.height,
            self._classes,
            info.mpp,
            mean,
            tile_px,
            description=_description("probabilities", info),
            dtype=np.uint16,
        )
        super().__init__(PyramidWriter(path, layout, deflate_codec(tags, np.uint16)))

    def write(self, part: LabelRows) -> None:
        """Take the next rows.

        Raises
        ------
        ValueError
            If they have no probabilities, or not one for each class.
        """
        pixels = part.probabilities
        if pixels is None or pixels.shape[2] != self._classes:
            shape = "none" if pixels is None else str(pixels.shape)
            raise ValueError(f"{self._file.path.name} needs probabilities (H, W, {self._classes}), got {shape}")
        self._file.write(part.x, part.y, pixels[..., 0] if self._classes == 1 else pixels)


def label_pyramid(path: Path, info: SlideInfo, tile_px: int = 512) -> PyramidWriter:
    """Open a label map for writing, also tile by tile."""
    layout = PyramidLayout(
        info.width,
        info.height,
        1,
        info.mpp,
        nearest,
        tile_px,
        description=_description("labels", info),
    )
    tags = {"photometric": "palette", "colormap": color_map(info)}
    return PyramidWriter(path, layout, deflate_codec(tags))


def color_map(info: SlideInfo) -> NDArray[np.uint16]:
    """Return the TIFF palette of the classes, (3, 256) uint16."""
    colors = np.full((256, 3), UNUSED_COLOR, np.uint16)
    colors[: len(info.classes)] = [entry.color for entry in info.classes]
    colors[NOT_ANALYSED] = NOT_ANALYSED_COLOR
    return np.ascontiguousarray(colors.T * 257)


def _description(kind: str, info: SlideInfo) -> str:
    return json.dumps(
        {
            "histostream": kind,
            "slide": info.name,
            "mpp": info.mpp,
            "outside": NOT_ANALYSED,
            "classes": [
                {"value": value, "name": entry.name, "color": list(entry.color)}
                for value, entry in enumerate(info.classes)
            ],
        }
    )

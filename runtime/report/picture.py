"""Overviews as pictures inside a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from histostream.wsi.outputs.sinks.overview import LEGEND_PX, OVERVIEW_PX, overview_size

PICTURE_PX = 1400  # longer side in a slide's report: sharp on a page, at twice its pixels on paper
MAX_BYTES = 1_000_000  # of a picture; base64 makes a third more of it
QUALITIES = (88, 80, 70, 55, 35)  # of JPEG, tried in this order until the picture is small enough
THUMBNAIL_PX = 220
THUMBNAIL_QUALITY = 72


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a ``data:`` URI, with its size in pixels."""

    uri: str
    width: int
    height: int


def read_picture(path: Path, width: int, height: int, longest_px: int) -> Picture | None:
    """Read an ``overview.png`` without its legend.

    Parameters
    ----------
    path
        The file.
    width, height
        Size of the label map in pixels, which decides where the legend begins.
    longest_px
        Maximum of the longer side of the result; `THUMBNAIL_PX` gives a thumbnail of lower quality.

    Returns
    -------
    None if there is no such file, or it is not an overview of a label map of this size.
    """
    if not (width >= 1 and height >= 1):
        return None
    inner = overview_size(width, height)
    try:
        with Image.open(path, formats=("PNG",)) as page:
            # Nothing is decoded yet: a file of another size is not an overview, and may be a decompression bomb.
            if page.width != inner[0] + LEGEND_PX or not inner[1] <= page.height <= 8 * OVERVIEW_PX:
                return None
            picture = page.crop((0, 0, *inner)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises
        return None
    picture.thumbnail((longest_px, longest_px), Image.Resampling.BOX, reducing_gap=None)
    encoded = b""
    for quality in (THUMBNAIL_QUALITY,) if longest_px == THUMBNAIL_PX else QUALITIES:
        encoded = _jpeg(picture, quality)
        if len(encoded) <= MAX_BYTES:
            break
    uri = "data:image/jpeg;base64," + base64.b64encode(encoded).decode()
    return Picture(uri, *picture.size)


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    data = io.BytesIO()
    # Not optimize=True: Pillow's buffer is then too small for noise.
    picture.save(data, "JPEG", quality=quality, subsampling=0 if quality > 80 else 2)
    return data.getvalue()

"""Sheets of sample pictures: what a run sees, what is true, and what it makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE_PX = 256  # of one picture; larger images are cut, smaller ones stay
GAP_PX = 4
HEAD_PX = 14

Pictures = dict[str, NDArray[np.uint8]]


def colored(labels: NDArray[np.integer], colors: Sequence[tuple[int, int, int]]) -> NDArray[np.uint8]:
    """Paint a label map (H, W) in the colours of its classes, (H, W, 3)."""
    palette = np.asarray(colors, np.uint8)
    return palette[np.asarray(labels, np.int64)]


def sheet(rows: Sequence[Pictures]) -> Image.Image:
    """Lay named pictures out in rows, one row an image, the names above.

    Parameters
    ----------
    rows
        Pictures by name, (H, W) or (H, W, 1 or 3) uint8; the same names in each row.
    """
    names = list(rows[0])
    cut = [[_rgb(row[name])[:SIDE_PX, :SIDE_PX] for name in names] for row in rows]
    font = ImageFont.load_default()
    widths = [
        max(math.ceil(font.getlength(name)) + GAP_PX, *(row[i].shape[1] for row in cut)) for i, name in enumerate(names)
    ]
    heights = [max(picture.shape[0] for picture in row) for row in cut]
    width = sum(widths) + GAP_PX * (len(names) - 1)
    height = HEAD_PX + sum(heights) + GAP_PX * (len(rows) - 1)
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    lefts = np.cumsum([0, *(w + GAP_PX for w in widths[:-1])])
    tops = HEAD_PX + np.cumsum([0, *(h + GAP_PX for h in heights[:-1])])
    for name, left in zip(names, lefts, strict=True):
        pen.text((int(left) + 2, 1), name, fill="black")
    for row, top in zip(cut, tops, strict=True):
        for picture, left in zip(row, lefts, strict=True):
            page.paste(Image.fromarray(picture), (int(left), int(top)))
    return page


def _rgb(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if picture.ndim == 2:
        picture = picture[..., None]
    return np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))

"""Sheets of sample images: the image, its true labels, and what the networks make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from histostream.training.data import IGNORED
from histostream.wsi.files import whole_file

MAX_SIDE_PX = 256  # larger images are cut
GAP_PX = 4
HEAD_PX = 14

Row = dict[str, NDArray[np.uint8]]  # images by name


def colored(labels: NDArray[np.integer], colors: Sequence[tuple[int, int, int]]) -> NDArray[np.uint8]:
    """Paint a label map (H, W) in the colours of its classes, (H, W, 3); what is not annotated is grey."""
    palette = np.full((IGNORED + 1, 3), 128, np.uint8)
    palette[: len(colors)] = colors
    return palette[np.asarray(labels, np.int64)]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a `sheet` as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        sheet(rows).save(temporary, "PNG")


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Lay named images out in rows below their names.

    Parameters
    ----------
    rows
        Images, (H, W) or (H, W, C) uint8; the same names in each row. Of more than three channels
        the first three are shown, of two both, as red and green.
    """
    names = list(rows[0])
    cut = [[_rgb(row[name])[:MAX_SIDE_PX, :MAX_SIDE_PX] for name in names] for row in rows]
    font = ImageFont.load_default()
    widths = [
        max(math.ceil(font.getlength(name)) + GAP_PX, *(row[i].shape[1] for row in cut)) for i, name in enumerate(names)
    ]
    heights = [max(image.shape[0] for image in row) for row in cut]
    width = sum(widths) + GAP_PX * (len(names) - 1)
    height = HEAD_PX + sum(heights) + GAP_PX * (len(rows) - 1)
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    lefts = np.cumsum([0, *(w + GAP_PX for w in widths[:-1])])
    tops = HEAD_PX + np.cumsum([0, *(h + GAP_PX for h in heights[:-1])])
    for name, left in zip(names, lefts, strict=True):
        pen.text((int(left) + 2, 1), name, fill="black")
    for row, top in zip(cut, tops, strict=True):
        for image, left in zip(row, lefts, strict=True):
            page.paste(Image.fromarray(image), (int(left), int(top)))
    return page


def _rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[2] == 2:
        image = np.concatenate([image, np.zeros_like(image[..., :1])], axis=2)
    return np.ascontiguousarray(np.broadcast_to(image[..., :3], (*image.shape[:2], 3)))

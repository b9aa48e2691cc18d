"""overview.png: the slide with its classes painted over it, what was analysed, a legend and a scale bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from histostream.wsi.files import remove, temporary_name, writing
from histostream.wsi.outputs.label_rows import ClassInfo, LabelRows, SlideInfo, background_label

OVERVIEW_PX = 1600  # longer side; fits a screen, and a report page at 150 dpi
PAINT = 0.7  # opacity where every pixel is of painted classes: the tissue stays visible
# Samples a side of each overview pixel: 64 levels of opacity, and most pixels need no counting.
SAMPLES = 8
LEGEND_PX = 200
CHUNK_ROWS = 128
PNG_LEVEL = 3  # two thirds of the time of the default level, for a file 7 % larger
LINE_PX = 24
HATCH_PX = 6  # from one line of a hatching to the next
OUTLINE = {True: (255, 255, 255), False: (0, 0, 0)}  # of the analysed area, on a dark and on a light ground
DARK = 64  # median brightness


def overview_size(width: int, height: int, longest_px: int = OVERVIEW_PX) -> tuple[int, int]:
    """Return the size of the thumbnail for `Overview`.

    Parameters
    ----------
    width, height
        The slide, in pixels of the level that inference runs at.
    longest_px
        Longer side of the result; smaller slides keep their size.

    Returns
    -------
    (width, height), both at least 1.
    """
    scale = min(1.0, longest_px / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


@dataclass(frozen=True, slots=True)
class Mark:
    """A part of the slide that is marked on the overview, and named in the legend.

    Attributes
    ----------
    name
        Its name.
    mask
        (h, w) bool, over the whole slide, of any size.
    color
        It is hatched in this colour, red, green, blue; None: it is outlined.
    """

    name: str
    mask: NDArray[np.bool_]
    color: tuple[int, int, int] | None = None


class Overview:
    """The slide's thumbnail with each class blended in by its share of the area.

    Parameters
    ----------
    path
        Final name.
    info
        The slide.
    thumbnail
        (h, w, 3) uint8 of the whole slide, not larger than it; see `overview_size`.
    marks
        Parts that are outlined or hatched.
    """

    def __init__(self, path: Path, info: SlideInfo, thumbnail: NDArray[np.uint8], marks: Sequence[Mark] = ()) -> None:
        height, width = thumbnail.shape[:2]
        if width > info.width or height > info.height or thumbnail.shape[2:] != (3,):
            raise ValueError(
                f"thumbnail is {thumbnail.shape}, the slide {info.width} x {info.height} px: "
                "pass (h, w, 3) of `overview_size`"
            )
        self.path, self._info, self._thumbnail, self._marks = path, info, thumbnail, tuple(marks)
        self._outline = OUTLINE[bool(np.median(thumbnail.max(axis=2)) < DARK)]
        background = background_label(info.classes)
        self._painted = [label for label in range(len(info.classes)) if label != background]
        self._step = max(1, min(info.width // width, info.height // height) // SAMPLES)
        self._counts = np.zeros((height, width, len(self._painted)), np.uint32)
        self._total = np.zeros((height, width), np.uint32)

    def write(self, part: LabelRows) -> None:
        """Take the next rows."""
        height, width = self._total.shape
        top, left = -part.y % self._step, -part.x % self._step
        labels = part.labels[top :: self._step, left :: self._step]
        if not labels.size:
            return
        ys = np.arange(part.y + top, part.y + len(part.labels), self._step)
        xs = np.arange(part.x + left, part.x + part.labels.shape[1], self._step)
        rows, row_starts = _bins(ys * height // self._info.height)
        columns, column_starts = _bins(xs * width // self._info.width)
        covered = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        for i, label in enumerate(self._painted):
            hits = (labels == label).view(np.uint8)
            if hits.any():
                counts = np.add.reduceat(hits, row_starts, axis=0, dtype=np.uint32)
                self._counts[(*covered, i)] += np.add.reduceat(counts, column_starts, axis=1)
        sizes = np.diff([*row_starts, len(ys)])[:, None] * np.diff([*column_starts, len(xs)])
        self._total[covered] += sizes.astype(np.uint32)

    def image(self) -> NDArray[np.uint8]:
        """Return the painted thumbnail, (h, w, 3) uint8, without the legend."""
        colors = np.array([self._info.classes[k].color for k in self._painted], np.float32)
        image = np.empty_like(self._thumbnail)
        for y in range(0, len(image), CHUNK_ROWS):  # in float it would take 100 MB at once
            rows = np.s_[y : y + CHUNK_ROWS]
            total = np.maximum(self._total[rows], 1)[..., None].astype(np.float32)
            share = self._counts[rows].astype(np.float32) / total
            paint = share @ colors.reshape(-1, 3)
            opacity = PAINT * share.sum(axis=2, keepdims=True)
            image[rows] = np.rint(self._thumbnail[rows] * (1 - opacity) + PAINT * paint)
        for mark in self._marks:
            _draw_mark(image, mark, self._outline)
        return image

    def finish(self) -> list[tuple[Path, Path]]:
        """Write the picture under its temporary name."""
        temporary = temporary_name(self.path)
        with writing(self.path):
            self._page().save(temporary, format="PNG", compress_level=PNG_LEVEL)
        return [(temporary, self.path)]

    def abort(self) -> None:
        """Remove what was written."""
        remove([temporary_name(self.path)])

    def _page(self) -> Image.Image:
        picture, classes = Image.fromarray(self.image()), self._info.classes
        bar_px, bar_text = scale_bar(self._info.mpp * self._info.width / picture.width)
        lines = len(classes) + len(self._marks)
        height = max(picture.height, LINE_PX * (lines + 3))
        page = Image.new("RGB", (picture.width + LEGEND_PX, height), "white")
        page.paste(picture, (0, 0))
        draw, left = ImageDraw.Draw(page), picture.width + 12
        _draw_legend(draw, left, classes)
        for i, mark in enumerate(self._marks, len(classes)):
            _draw_key(page, left, i, mark)
        y = LINE_PX * (lines + 1)
        draw.rectangle((left, y, left + bar_px - 1, y + 3), fill="black")
        draw.text((left, y + 8), bar_text, fill="black", font=ImageFont.load_default(13))
        return page


def scale_bar(mpp: float, longest_px: int = LEGEND_PX - 24) -> tuple[int, str]:
    """Return length in pixels and text of the longest round scale bar (1, 2 or 5 times 10^n um).

    Parameters
    ----------
    mpp
        Side of a pixel of the picture, in um.
    longest_px
        Room for the bar.
    """
    room = longest_px * mpp
    decade = 10.0 ** floor(log10(room))
    length = max(step * decade for step in (1, 2, 5) if step * decade <= room)
    # The font that comes with Pillow has no micro sign.
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} um"
    return max(1, round(length / mpp)), text


def _draw_legend(draw: ImageDraw.ImageDraw, left: int, classes: tuple[ClassInfo, ...]) -> None:
    font, background = ImageFont.load_default(13), background_label(classes)
    for i, entry in enumerate(classes):
        y = 10 + LINE_PX * i
        painted = i != background
        fill = entry.color if painted else (255, 255, 255)
        draw.rectangle((left, y, left + 14, y + 14), fill=fill, outline="black")
        text = entry.name if painted else f"{entry.name} (not painted)"
        draw.text((left + 22, y), text, fill="black", font=font)


def _draw_key(page: Image.Image, left: int, line: int, mark: Mark) -> None:
    draw, y = ImageDraw.Draw(page), 10 + LINE_PX * line
    if mark.color is None:
        draw.rectangle((left, y + 3, left + 14, y + 11), outline="black")
    else:
        box = np.full((15, 15, 3), 255, np.uint8)
        box[_hatching(15, 15)] = mark.color
        page.paste(Image.fromarray(box), (left, y))
    draw.text((left + 22, y), mark.name, fill="black", font=ImageFont.load_default(13))


def _draw_mark(image: NDArray[np.uint8], mark: Mark, outline: tuple[int, int, int]) -> None:
    """Outline or hatch a part of the slide on a picture of it."""
    height, width = image.shape[:2]
    rows, columns = (np.arange(n) * size // n for n, size in zip((height, width), mark.mask.shape, strict=True))
    mask = mark.mask[rows][:, columns]
    if mark.color is None:
        inner = np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MinFilter(3))) > 0
        image[mask & ~inner] = outline
    else:
        image[mask & _hatching(height, width)] = mark.color


def _hatching(height: int, width: int) -> NDArray[np.bool_]:
    """Return (h, w) bool: slanted lines."""
    lines: NDArray[np.bool_] = np.add.outer(np.arange(height), np.arange(width)) % HATCH_PX < 2
    return lines


def _bins(bins: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bins of a rising sequence without gaps, and where each begins."""
    starts = np.flatnonzero(np.diff(bins, prepend=bins[0] - 1))
    return bins[starts], starts

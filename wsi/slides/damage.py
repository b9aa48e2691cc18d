"""Record the blocks of a slide that cannot be decoded, and read around them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import DamagedError, SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.slides.reader import SlideReader, read_from_blocks

FEW = 16  # so many damaged blocks are accepted, whatever their share
GREY = 128  # of damaged blocks in an overview: darker than glass, so that they are analysed
log = logging.getLogger(__name__)


class Damage:
    """The damaged blocks of one slide; several threads may add to it."""

    def __init__(self, slide: SlideReader) -> None:
        self._slide = slide
        self._boxes: dict[tuple[int, Box], None] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._boxes)

    def add(self, level: int, box: Box, error: SlideError | None = None) -> None:
        """Record a block that cannot be decoded, in pixels of its level.

        Raises
        ------
        SlideError
            If most blocks so far are damaged: then the whole slide is.
        """
        with self._lock:
            known = (level, box) in self._boxes
            self._boxes[level, box] = None
            count = len(self._boxes)
        if known or error is None:
            return
        if count == 1:
            log.warning("%s; it is left out; run.json lists all such blocks", error)
        if count > FEW and count > self._slide.decoded_blocks:
            raise SlideError(
                f"{self._slide.path}: most of it cannot be decoded ({count} blocks so far); copy or scan it again"
            ) from error

    def of_level(self, level: int) -> list[Box]:
        """Return the damaged blocks of a level, in its pixels."""
        with self._lock:
            return [box for at, box in self._boxes if at == level]

    def record(self) -> list[dict[str, Any]]:
        """Return the entries of run.json: level, and box in pixels of level 0."""
        entries = []
        for level, box in sorted(self._boxes, key=lambda key: (key[0], key[1].y, key[1].x)):
            k = self._slide.levels[level].downsample
            sides = {"x": box.x, "y": box.y, "width": box.width, "height": box.height}
            entries.append({"level": level, **{n: round(v * k) for n, v in sides.items()}})
        return entries


class Undamaged:
    """A slide whose damaged blocks are read as grey and recorded in ``damage``; see `SlideReader`."""

    def __init__(self, slide: SlideReader, damage: Damage) -> None:
        self._slide, self._damage = slide, damage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slide, name)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a box of one level; see `SlideReader.read`."""
        slide = self._slide
        try:
            return slide.read(level, x, y, width, height)
        except DamagedError:
            return read_from_blocks(
                Box(x, y, width, height),
                slide.block_px[level],
                slide.channels,
                lambda row, column: read_block(
                    slide, level, row, column, fill=GREY, note=partial(self._damage.add, level)
                ),
            )


def read_block(
    slide: SlideReader,
    level: int,
    row: int,
    column: int,
    *,
    fill: int,
    note: Callable[[Box, SlideError], None] | None,
) -> NDArray[np.uint8]:
    """Read one block of a level; those at the right and bottom border may be smaller.

    Parameters
    ----------
    fill
        Value of a block that cannot be decoded.
    note
        Called with the box of such a block and the error; None raises the error.
    """
    width, height = slide.block_px[level]
    x, y, size = column * width, row * height, slide.levels[level]
    box = Box(x, y, min(width, size.width - x), min(height, size.height - y))
    try:
        return slide.read(level, box.x, box.y, box.width, box.height)
    except DamagedError as error:
        if note is None:
            raise
        note(box, error)
        return np.full((box.height, box.width, slide.channels), fill, np.uint8)

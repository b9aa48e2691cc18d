"""Finished rows of the label map, and the contract of a sink, which writes them to files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

NOT_ANALYSED = 255  # label of pixels that were not analysed: outside the tissue mask or the ROI
SCORE_MAX = 65535  # a score of 1; image libraries scale 16-bit values to 0..1 in the same way


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """A class of the label map; its label is its index in the list of classes.

    Attributes
    ----------
    name
        Name of the class. The class called "background" is never painted.
    color
        Red, green, blue, 0 to 255.
    """

    name: str
    color: tuple[int, int, int]

    def __post_init__(self) -> None:
        if len(self.color) != 3 or not all(0 <= value <= 255 for value in self.color):
            raise ValueError(f"color {self.color!r} of class {self.name!r}: use 3 x 0 to 255")

    @property
    def hex(self) -> str:
        """The colour as "#rrggbb"."""
        return f"#{bytes(self.color).hex()}"


@dataclass(frozen=True, slots=True)
class SlideInfo:
    """Size, resolution and classes of a label map.

    Attributes
    ----------
    name
        Name of the slide, as it appears in tables.
    width, height
        Pixels of the level that inference runs at.
    mpp
        Side of such a pixel, in um.
    classes
        The class of label 0, 1, ...; at most 255, since label 255 is `NOT_ANALYSED`.
    """

    name: str
    width: int
    height: int
    mpp: float
    classes: tuple[ClassInfo, ...]

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"{self.name}: {self.width} x {self.height} px has no pixels")
        if not self.mpp > 0:
            raise ValueError(f"{self.name}: mpp={self.mpp!r} is not positive: use um per pixel")
        if not 1 <= len(self.classes) <= NOT_ANALYSED:
            raise ValueError(f"{self.name}: {len(self.classes)} classes: use 1 to {NOT_ANALYSED}")


@dataclass(frozen=True, slots=True)
class LabelRows:
    """Finished rows of one column band.

    Attributes
    ----------
    x, y
        Top left corner, in pixels of the level that inference runs at.
    labels
        (H, W) uint8, a class or `NOT_ANALYSED`.
    probabilities
        (H, W, K) uint16, ``round(65535 p)`` of each class, or None.
    """

    x: int
    y: int
    labels: NDArray[np.uint8]
    probabilities: NDArray[np.uint16] | None = None

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or self.labels.dtype != np.uint8:
            raise ValueError(f"labels are {_kind(self.labels)}: use (H, W) uint8")
        probs = self.probabilities
        if probs is not None and (probs.ndim != 3 or probs.shape[:2] != self.labels.shape or probs.dtype != np.uint16):
            raise ValueError(f"probabilities are {_kind(probs)}: use (H, W, K) uint16 beside {_kind(self.labels)}")

    @classmethod
    def outside(cls, x: int, y: int, width: int, height: int, *, classes: int | None = None) -> LabelRows:
        """Return rows without tissue: one label, and ``classes`` scores of 0, broadcast and so read-only."""
        labels = np.broadcast_to(np.uint8(NOT_ANALYSED), (height, width))
        if classes is None:
            return cls(x, y, labels)
        return cls(x, y, labels, np.broadcast_to(np.uint16(0), (height, width, classes)))

    @property
    def all_outside(self) -> bool:
        """Whether the labels are one broadcast `NOT_ANALYSED`, as `outside` makes them."""
        return is_one_value(self.labels) and bool(self.labels[0, 0] == NOT_ANALYSED)


def is_one_value(pixels: NDArray[Any]) -> bool:
    """Whether pixels (H, W[, C]) are one pixel broadcast, judged by their strides alone."""
    return pixels.size > 0 and pixels.strides[:2] == (0, 0)


class Sink(Protocol):
    """Writes finished rows to files.

    Rows come in column bands, from left to right. A band comes from top to bottom without gaps, in
    parts of any height. Band edges are multiples of 512 px, except at the slide's right border. Rows
    without tissue come too, full of `NOT_ANALYSED` (and read-only, see `LabelRows.outside`).
    """

    def write(self, part: LabelRows) -> None:
        """Take the next rows."""

    def finish(self) -> list[tuple[Path, Path]]:
        """Complete the files, or folders, under temporary names; return (temporary, final)."""

    def abort(self) -> None:
        """Remove the temporary files. Allowed at any time, also twice, also after `finish`."""


AnySink = TypeVar("AnySink", bound=Sink)


def _kind(array: NDArray[Any]) -> str:
    return f"{array.shape} {array.dtype}"

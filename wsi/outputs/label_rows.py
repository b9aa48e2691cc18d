"""Finished rows of the label map, and the contract of a sink, which writes them to files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.outputs.object_rule import ObjectRule

NOT_ANALYSED = 255  # label of pixels that were not analysed: outside the tissue mask or the ROI
SCORE_MAX = 65535  # a score of 1; image libraries scale 16-bit values to 0..1 in the same way
BACKGROUND = "background"  # role, and usual name, of the class that is not painted and has no objects
ROLES = ("", BACKGROUND)
# By these names a class is the background where no class has the role; compared without regard to case.
# fmt: off
BACKGROUND_NAMES = frozenset((
    BACKGROUND, "bg", "hintergrund", "fond", "arrière-plan", "fondo", "sfondo", "fundo", "achtergrond", "bakgrund",
    "bakgrunn", "baggrund", "tausta", "tło", "pozadí", "háttér", "фон", "背景", "배경",
))
# fmt: on


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """A class of the label map; its label is its index in the list of classes.

    Attributes
    ----------
    name
        Name of the class.
    color
        Red, green, blue, 0 to 255.
    role
        "background" for the class that is not painted and has no objects, else "". See `background_label`.
    rule
        Which regions of the class are objects; None where nobody says.
    """

    name: str
    color: tuple[int, int, int]
    role: str = ""
    rule: ObjectRule | None = None

    def __post_init__(self) -> None:
        if len(self.color) != 3 or not all(0 <= value <= 255 for value in self.color):
            raise ValueError(f"color {self.color!r} of class {self.name!r}: use 3 x 0 to 255")
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} of class {self.name!r}: use one of {ROLES}")

    @property
    def hex(self) -> str:
        """The colour as "#rrggbb"."""
        return f"#{bytes(self.color).hex()}"


class NamedClass(Protocol):
    """What `background_label` reads of a class: `ClassInfo`, or a record with the same fields."""

    @property
    def name(self) -> str:
        """Name of the class."""

    @property
    def role(self) -> str | None:
        """One of `ROLES`; None or "" where it has none."""


def background_label(classes: Sequence[NamedClass]) -> int | None:
    """Return the label of the background: the class with that role, else the first one that is called so.

    Parameters
    ----------
    classes
        The classes, in label order.

    Returns
    -------
    The label, or None if no class is the background.

    Examples
    --------
    >>> background_label([ClassInfo("Tumor", (255, 0, 0)), ClassInfo("Hintergrund", (255, 255, 255))])
    1
    >>> background_label([ClassInfo("background", (0, 0, 0)), ClassInfo("glass", (255, 255, 255), "background")])
    1
    """
    by_role = (label for label, entry in enumerate(classes) if entry.role == BACKGROUND)
    by_name = (label for label, entry in enumerate(classes) if is_background_name(entry.name))
    return next(by_role, next(by_name, None))


def is_background_name(name: str) -> bool:
    """Whether a class of this name is the background where no class has the role."""
    return " ".join(name.casefold().split()) in BACKGROUND_NAMES


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

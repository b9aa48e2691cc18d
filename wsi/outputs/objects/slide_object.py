"""An object as output files show it, and the contract of a file of objects."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.files import remove, temporary_name, writing


@dataclass(frozen=True, slots=True)
class SlideObject:
    """An object in pixels of the slide's full size (level 0).

    Attributes
    ----------
    number
        1, 2, ..., in the order of their topmost rows.
    label
        Class.
    area_um2, perimeter_um, eccentricity
        As in `Shape`, measured before outlines are simplified.
    x, y
        Centroid.
    box
        Left, top, right, bottom.
    rings
        (n, 2) each, x and y of the outside, then of the holes; the first point is not repeated.
    """

    number: int
    label: int
    area_um2: float
    perimeter_um: float
    eccentricity: float
    x: float
    y: float
    box: tuple[float, float, float, float]
    rings: Sequence[NDArray[np.float64 | np.int64]]


class ObjectFile(Protocol):
    """A file of objects."""

    def write(self, slide_object: SlideObject) -> None:
        """Take the next object."""

    def finish(self) -> tuple[Path, Path]:
        """Complete the file under a temporary name; return the (temporary, final) pair."""

    def abort(self) -> None:
        """Remove the temporary file. Allowed at any time, also twice, also after `finish`."""


class WholeObjectFile:
    """Base of an `ObjectFile` of one file, which has a temporary name until it is complete.

    A subclass opens the file under ``_temporary`` and puts all that has to be closed into ``_open``,
    in the order of closing.

    Parameters
    ----------
    path
        Final name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = temporary_name(path)
        self._open: list[Any] = []

    def finish(self) -> tuple[Path, Path]:
        """Close the file under its temporary name; return the (temporary, final) pair."""
        with writing(self.path):
            for file in self._open:
                file.close()
        return self._temporary, self.path

    def abort(self) -> None:
        """Remove what was written."""
        for file in self._open:
            with suppress(OSError):
                file.close()
        remove([self._temporary])

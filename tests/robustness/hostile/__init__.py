"""Hostile input: slides, regions, cards and graphs that were damaged on purpose.

Each `Case` starts from a small valid input (a seed) and changes it where its format is fragile. Everything
comes from a `random.Random`, so that a number names a case, and a property-based test can hand in
its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.robustness.hostile.cards import make_card
from tests.robustness.hostile.case import Case, seed_case
from tests.robustness.hostile.graphs import make_onnx
from tests.robustness.hostile.images import make_dicom, make_image, make_name
from tests.robustness.hostile.regions import make_roi
from tests.robustness.hostile.tiff import make_tiff

__all__ = ["KINDS", "Case", "make_case", "seed_case"]

KINDS: dict[str, Callable[[random.Random], Case]] = {
    "tiff": make_tiff,
    "image": make_image,
    "dicom": make_dicom,
    "name": make_name,
    "roi": make_roi,
    "card": make_card,
    "onnx": make_onnx,
}


def make_case(kind: str, rng: random.Random) -> Case:
    """Make one hostile input.

    Parameters
    ----------
    kind
        One of `KINDS`.
    rng
        Where every choice comes from.
    """
    return KINDS[kind](rng)

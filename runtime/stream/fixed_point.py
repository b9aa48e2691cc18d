"""Scores as integers, so that sums of them do not depend on the order of the summands.

A score in [0, 1] becomes ``floor(s * 2**14 + 1/2)``. For scores of at least 1/16 no precision of float16 is lost. The
kernels in ``kernels.cu`` compute the same integers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import Scores

SCORE_BITS = 14
ONE = 1 << SCORE_BITS  # the integer of the score 1


def _integers_of_halves() -> NDArray[np.uint32]:
    """Return the integer of each of the 65536 float16 numbers; NaN and negative ones are 0, more than 1 is `ONE`."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    clipped = np.clip(np.nan_to_num(values, nan=0, posinf=1, neginf=0), 0, 1)
    return np.floor(clipped * ONE + 0.5).astype(np.uint32)


_HALVES = _integers_of_halves()
_BYTES = ((np.arange(256) * ONE + 127) // 255).astype(np.uint32)  # of schema 1: round(255 s)


def to_integers(scores: Scores, out: NDArray[np.uint32] | None = None) -> NDArray[np.uint32]:
    """Return scores as integers of 0 to 2**14.

    Parameters
    ----------
    scores
        Of any shape: float16 in [0, 1], or uint8, ``round(255 s)``, of bundles of schema 1.
    out
        Array for the result; None makes one.
    """
    # A table is twice as fast as arithmetic in float32, and decides what NaN is.
    integers = np.empty(scores.shape, np.uint32) if out is None else out
    if scores.dtype == np.uint8:
        np.take(_BYTES, scores.view(np.uint8), out=integers, mode="clip")
    else:
        np.take(_HALVES, scores.view(np.uint16), out=integers, mode="clip")
    return integers

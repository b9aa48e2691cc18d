from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import Scores
from histostream.runtime.stream.fixed_point import to_integers
from tests.runtime.host_device import run_kernel

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
BYTES = np.arange(256, dtype=np.uint8)


def by_definition(score: float) -> int:
    """Return floor(s * 2**14 + 1/2) in exact arithmetic, with s clipped to 0..1 and NaN as 0."""
    if math.isnan(score) or score <= 0:
        return 0
    return 2**14 if score >= 1 else math.floor(Fraction(score) * 2**14 + Fraction(1, 2))


def test_every_float16_number_becomes_the_integer_of_the_definition() -> None:
    wanted = [by_definition(float(value)) for value in HALVES]
    np.testing.assert_array_equal(to_integers(HALVES), wanted)


def test_every_byte_of_schema_1_becomes_the_nearest_integer() -> None:
    wanted = [math.floor(Fraction(value, 255) * 2**14 + Fraction(1, 2)) for value in range(256)]
    np.testing.assert_array_equal(to_integers(BYTES), wanted)


def kernel_integers(scores: Scores, *, is_bytes: bool) -> NDArray[np.uint32]:
    """Add a tile of scores of one class with weight 1 to sums of 0, by the kernel."""
    side = int(np.sqrt(scores.size))
    xs, columns = np.zeros(1, np.int32), np.zeros(1, np.int32)
    wx, wy = np.ones(side, np.uint32), np.ones(side, np.uint32)
    sums, weights = np.zeros((side, side), np.uint32), np.zeros(side, np.uint32)
    arrays = (np.ascontiguousarray(scores), xs, columns, wx, wy, sums, weights)
    pointers = tuple(int(array.ctypes.data) for array in arrays)
    numbers = (1, 1, side, 0, 0, side, int(is_bytes))
    run_kernel("add_scores", (-(-side // 32), side, 1), (32, 1, 1), (*pointers, *numbers))
    return sums.reshape(-1)


def test_the_kernel_makes_the_same_integers_of_all_halves_and_bytes() -> None:
    np.testing.assert_array_equal(kernel_integers(HALVES, is_bytes=False), to_integers(HALVES))
    np.testing.assert_array_equal(kernel_integers(BYTES, is_bytes=True), to_integers(BYTES))

"""How values are spread: bars for how many there are, and a tick for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

WIDTH, HEIGHT = 400, 44  # of the drawing, in its own units
RUG = 8  # height of the ticks
FLOOR = HEIGHT - RUG - 2  # on which the bars stand
BINS = 40
STEPS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)  # where axes end


@dataclass(frozen=True, slots=True)
class Distribution:
    """A drawing of `WIDTH` x `HEIGHT`, as paths of SVG.

    Attributes
    ----------
    bars, ticks
        Paths: how many values are in each of `BINS` equal parts, and where each is.
    middle
        Where the median is.
    most
        The value at the right edge; the left is 0.
    """

    bars: str
    ticks: str
    middle: float
    most: float


def distribution(values: Sequence[float], most: float = math.inf) -> Distribution:
    """Draw how values from 0 on are spread.

    Parameters
    ----------
    values
        At least one; what is outside of the drawing is at its edge.
    most
        The largest value that there can be; the drawing may end before.
    """
    end = min(most, round_up(max(values)))
    places = [min(max(value / end, 0.0), 1.0) for value in values]
    counts = [0] * BINS
    for place in places:
        counts[min(int(place * BINS), BINS - 1)] += 1
    wide = WIDTH / BINS
    bars = "".join(
        f"M{i * wide:g} {FLOOR}v-{FLOOR * count / max(counts):.1f}h{wide - 1:g}V{FLOOR}z"
        for i, count in enumerate(counts)
        if count
    )
    ticks = "".join(f"M{x} {HEIGHT - RUG}v{RUG}" for x in sorted({round(WIDTH * p) for p in places}))
    return Distribution(bars, ticks, WIDTH * min(max(median(values) / end, 0.0), 1.0), end)


def round_up(value: float) -> float:
    """Return the least of `STEPS` times a power of ten that is not below a value; 1 for 0."""
    if value <= 0:
        return 1.0
    decade = 10.0 ** math.floor(math.log10(value))
    return next(step * decade for step in (*STEPS, 20) if step * decade >= value)

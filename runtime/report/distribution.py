"""Plot of a distribution: bars that count values, and a tick for each value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

WIDTH, HEIGHT = 400, 44  # of the drawing, in its own units
TICK_HEIGHT = 8
FLOOR = HEIGHT - TICK_HEIGHT - 2  # y of the lower end of the bars
BINS = 40
STEPS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)  # times a power of ten: possible ends of the axis


@dataclass(frozen=True, slots=True)
class Distribution:
    """A drawing of `WIDTH` x `HEIGHT`, as SVG paths.

    Attributes
    ----------
    bars, ticks
        Paths: the number of values in each of `BINS` equal parts of the axis, and the position of each value.
    middle
        x of the median.
    end
        Value at the right end of the axis; the left end is 0.
    """

    bars: str
    ticks: str
    middle: float
    end: float


def distribution(values: Sequence[float], limit: float = math.inf) -> Distribution:
    """Draw the distribution of values from 0 on.

    Parameters
    ----------
    values
        At least one value; values outside the axis are drawn at its ends.
    limit
        Largest possible value; the axis never ends beyond it.
    """
    end = min(limit, round_up(max(values)))
    positions = [min(max(value / end, 0.0), 1.0) for value in values]
    counts = [0] * BINS
    for position in positions:
        counts[min(int(position * BINS), BINS - 1)] += 1
    bin_width = WIDTH / BINS
    bars = "".join(
        f"M{i * bin_width:g} {FLOOR}v-{FLOOR * count / max(counts):.1f}h{bin_width - 1:g}V{FLOOR}z"
        for i, count in enumerate(counts)
        if count
    )
    xs = sorted({round(WIDTH * position) for position in positions})
    ticks = "".join(f"M{x} {HEIGHT - TICK_HEIGHT}v{TICK_HEIGHT}" for x in xs)
    return Distribution(bars, ticks, WIDTH * min(max(median(values) / end, 0.0), 1.0), end)


def round_up(value: float) -> float:
    """Return the smallest product of one of `STEPS` and a power of ten that is at least ``value``; 1 for 0."""
    if value <= 0:
        return 1.0
    decade = 10.0 ** math.floor(math.log10(value))
    return next(step * decade for step in (*STEPS, 20) if step * decade >= value)

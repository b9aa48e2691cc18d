"""Curves over the steps of a run, as SVG: nice ticks, means of many steps, and a logarithmic axis where needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 560, 230  # of a drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 20, 40  # margins, with the ticks' numbers and the axes' names
BINS = 160  # points of a line; more steps are averaged
MAX_DOTS = 32  # points of a line that are marked
LOG_RATIO = 40  # of the largest to the smallest value, from which on the axis is logarithmic
# Okabe and Ito's, which people who are colour-blind tell apart; dashes do so on a grey print.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 3")


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a plot.

    Attributes
    ----------
    name
        For the legend.
    path, band
        SVG path of the line, and of the area between the lowest and the highest of the averaged
        values ("" where none are).
    dots
        (x, y, text) of the marked points.
    color, dash
        CSS colour, and SVG's dash array.
    """

    name: str
    path: str
    band: str
    dots: list[tuple[float, float, str]]
    color: str
    dash: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing of `WIDTH` x `HEIGHT`.

    Attributes
    ----------
    title, unit
        What is drawn, and the name of the vertical axis.
    curves
        The lines.
    x_ticks, y_ticks
        (position, text) of the ticks.
    averaged
        Number of steps that a point of a line is the mean of.
    mark
        x of a step that is marked; None: there is none.
    """

    title: str
    unit: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    averaged: int = 1
    mark: float | None = None


def draw(
    title: str,
    unit: str,
    steps: NDArray[np.float64],
    lines: Sequence[tuple[str, NDArray[np.float64]]],
    *,
    limits: tuple[float, float] | None = None,
    mark: int = 0,
) -> Plot | None:
    """Draw lines over the steps.

    Parameters
    ----------
    title, unit
        What is drawn, and the name of the vertical axis.
    steps
        (N,) steps, rising; the last one ends the horizontal axis.
    lines
        Name and (N,) values of each line; nan where there is none.
    limits
        Ends of the vertical axis; None: from the values, without the extreme 1 % of them.
    mark
        A step that is marked; 0: none.

    Returns
    -------
    None if there is no value.
    """
    known = [(name, steps[np.isfinite(v)], v[np.isfinite(v)]) for name, v in lines]
    known = [line for line in known if len(line[1])]
    if not known:
        return None
    last = float(steps[-1])
    averaged = max(1, math.ceil(max(len(xs) for _, xs, _ in known) / BINS))
    binned = [(name, *_binned(xs, values, averaged)) for name, xs, values in known]
    all_values = np.concatenate([values for *_, values in known])
    low, high, logarithmic = (*limits, False) if limits else _limits(all_values)
    x_of = _Axis(0.0, max(last, 1.0), LEFT, WIDTH - RIGHT)
    y_of = _Axis(low, high, HEIGHT - BOTTOM, TOP, logarithmic=logarithmic)
    curves = []
    for i, (name, xs, means, lows, highs) in enumerate(binned):
        at, middle = x_of(xs), y_of(means)
        dots = []
        if averaged == 1 and len(xs) <= MAX_DOTS:
            dots = [
                (round(float(x), 1), round(float(y), 1), f"step {step:,.0f}: {_number(value)}")
                for x, y, step, value in zip(at, middle, xs, means, strict=True)
            ]
        band = _path([*zip(at, y_of(lows), strict=True), *zip(at[::-1], y_of(highs)[::-1], strict=True)]) + "z"
        curves.append(
            Curve(
                name,
                _path([*zip(at, middle, strict=True)]),
                band if averaged > 1 else "",
                dots,
                COLORS[i % len(COLORS)],
                DASHES[i % len(DASHES)],
            )
        )
    x_ticks = [(round(float(x_of(t)), 1), _count(t, last)) for t in _ticks(0.0, max(last, 1.0), 6) if t == round(t)]
    values = _log_ticks(low, high) if logarithmic else _ticks(low, high, 5)
    y_ticks = [(round(float(y_of(t)), 1), _number(t)) for t in values]
    marked = round(float(x_of(mark)), 1) if 0 < mark <= last else None
    return Plot(title, unit, curves, x_ticks, y_ticks, averaged, marked)


class _Axis:
    """Maps values to positions; those beyond the ends are drawn at them."""

    def __init__(self, low: float, high: float, start: float, end: float, *, logarithmic: bool = False) -> None:
        self._low, self._high, self._start, self._end, self._log = low, high, start, end, logarithmic

    def __call__(self, values: NDArray[np.float64] | float) -> NDArray[np.float64]:
        clipped = np.clip(np.asarray(values, np.float64), self._low, self._high)
        if self._log:
            share = np.log(clipped / self._low) / math.log(self._high / self._low)
        else:
            share = (clipped - self._low) / (self._high - self._low)
        return np.asarray(self._start + share * (self._end - self._start))


def _binned(
    xs: NDArray[np.float64], values: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return last step, mean, lowest and highest value of each group of ``count`` points."""
    starts = np.arange(0, len(xs), count)
    sizes = np.diff([*starts, len(xs)])
    ends = starts + sizes - 1
    means = np.add.reduceat(values, starts) / sizes
    return xs[ends], means, np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def _limits(values: NDArray[np.float64]) -> tuple[float, float, bool]:
    """Return the ends of an axis, and whether it is logarithmic."""
    low, high = (float(v) for v in np.percentile(values, (1, 99)))
    if len(values) <= MAX_DOTS:
        low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > LOG_RATIO:
        return low / 1.1, high * 1.1, True
    if high == low:
        spread = abs(high) or 1.0
        return (0.0, 1.25 * high, False) if high > 0 else (low - spread, high + spread, False)
    room = 0.06 * (high - low)
    bottom = 0.0 if 0 <= low < 0.6 * high else low - room
    return bottom, (0.0 if high == 0 else high + room), False


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return up to ``most`` + 1 round numbers from ``low`` to ``high``, evenly spaced."""
    raw = (high - low) / most
    decade = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * decade for factor in (1, 2, 2.5, 5, 10) if factor * decade >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten from ``low`` to ``high``; where they are few, some numbers between too."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) < 4 else (1,)
    return [v for d in decades for f in factors if low <= (v := f * 10.0**d) <= high]


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Return an SVG path; a single point becomes a short line."""
    texts = [f"{x:.1f} {y:.1f}" for x, y in points]
    return "M" + "L".join(texts if len(texts) > 1 else texts * 2)


def _number(value: float) -> str:
    """Return a number with four digits, a small or a large one as 1.5e-4."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _count(value: float, last: float) -> str:
    return f"{value / 1000:g}k" if last >= 10_000 and value else f"{value:,.0f}"

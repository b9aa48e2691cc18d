"""Numbers as people read them: significant digits, shares, durations and sizes."""

from __future__ import annotations

import math

MAX_FIGURE = 1e18  # larger numbers are not shown
MIN_FIGURE = 0.0001  # smaller numbers are shown as "< 0.0001"
NO_VALUE = "\N{EN DASH}"


def figure(value: float | None, digits: int = 3) -> str:
    """Write a number with some significant digits, all digits before the point, and no exponent.

    Examples
    --------
    >>> figure(0.049385), figure(5.145), figure(6586740), figure(0.00000123)
    ('0.0494', '5.14', '6,586,740', '< 0.0001')
    """
    if value is None:
        return NO_VALUE
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    if abs(value) < MIN_FIGURE:
        return f"< {MIN_FIGURE}" if value > 0 else f"> -{MIN_FIGURE}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    text = f"{value:,.{min(max(places, 0), 12)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float | None) -> str:
    """Write a share as percent; only 0 is "0 %" and only 1 is "100 %", whatever the rounding."""
    if share is None:
        return NO_VALUE
    places = 1
    while places < 6 and share not in (0, 1) and round(100 * share, places) in (0, 100):
        places += 1
    return f"{100 * share:.{places}f} %"


def duration(seconds: float | None) -> str:
    """Write seconds as "12.3 s", "4 min 05 s" or "2 h 04 min"."""
    if seconds is None:
        return NO_VALUE
    if seconds < 100:
        return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def rough_duration(seconds: float) -> str:
    """Write an estimated time.

    Examples
    --------
    >>> rough_duration(42), rough_duration(180), rough_duration(7300)
    ('42 s', '3 min', '2.0 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(byte_count: float) -> str:
    """Write a number of bytes as "1.94 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if byte_count < 1000:
            return f"{figure(byte_count)} {unit}"
        byte_count /= 1000
    return f"{figure(byte_count)} TB"

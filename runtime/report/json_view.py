"""JSON that an older version, or anybody, may have written: what is not as expected is not said."""

from __future__ import annotations

import math
from collections.abc import Iterator

MAX_FIGURE = 1e18  # no figure of a run is; more digits than these are shown to nobody
MIN_FIGURE = 0.0001  # that is written as it is


class JsonView:
    """A value of a JSON file, and what is inside of it.

    Parameters
    ----------
    value
        As `json.loads` returned it.
    """

    def __init__(self, value: object) -> None:
        self._value = value

    def __bool__(self) -> bool:
        """Whether anything is said."""
        return bool(self._value)

    def at(self, *path: str) -> JsonView:
        """Return what is said under a name, and a name inside of that; nothing if it is not."""
        value = self._value
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return JsonView(value)

    def number(self, *path: str) -> float | None:
        """Return a finite number; None if it is none."""
        value = self.at(*path)._value
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return value if abs(value) < MAX_FIGURE else None  # False of nan, too

    def text(self, *path: str) -> str:
        """Return a text; empty if it is none."""
        value = self.at(*path)._value
        return value if isinstance(value, str) else ""

    def true(self, *path: str) -> bool:
        """Whether just ``true`` is said."""
        return self.at(*path)._value is True

    def items(self, *path: str) -> list[tuple[str, JsonView]]:
        """Return names and what is said under them."""
        value = self.at(*path)._value
        return [(k, JsonView(v)) for k, v in value.items()] if isinstance(value, dict) else []

    def __iter__(self) -> Iterator[JsonView]:
        return map(JsonView, self._value if isinstance(self._value, list) else ())

    def __len__(self) -> int:
        return len(self._value) if isinstance(self._value, list) else 0

    def shown(self) -> str:
        """Return it as a page shows it, a list as "a, b"."""
        value = self._value
        if isinstance(value, list):
            return ", ".join(JsonView(v).shown() for v in value)
        if isinstance(value, dict):
            return ", ".join(f"{k} {JsonView(v).shown()}" for k, v in value.items())
        if isinstance(value, bool) or value is None:
            return {True: "yes", False: "no", None: "none"}[value]
        number = self.number()
        return str(value) if number is None else figure(number, digits=6)

    def scores(self) -> str:
        """Return one figure, or those of each class, with four digits."""
        value = self._value if isinstance(self._value, list) else [self._value]
        return " / ".join(figure(JsonView(v).number(), digits=4) for v in value)

    def plain(self) -> object:
        """Return the value, to be compared."""
        return self._value


def figure(value: float | None, digits: int = 3) -> str:
    """Write a number with some significant digits and no exponent; all digits before the point.

    ::

        0.049385 -> 0.0494    5.145 -> 5.15    6586740 -> 6,586,740    0.00000123 -> < 0.0001
    """
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    if abs(value) < MIN_FIGURE:
        return f"< {MIN_FIGURE}" if value > 0 else f"> -{MIN_FIGURE}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    text = f"{value:,.{min(max(places, 0), 12)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float | None) -> str:
    """Write a share of 1 as percent; what is there is never "0 %", nor what is missing "100 %"."""
    if share is None:
        return "\N{EN DASH}"
    places = 1
    while places < 6 and share not in (0, 1) and round(100 * share, places) in (0, 100):
        places += 1
    return f"{100 * share:.{places}f} %"


def duration(seconds: float | None) -> str:
    """Write seconds as "12.3 s", "4 min 05 s" or "2 h 04 min"."""
    if seconds is None:
        return "\N{EN DASH}"
    if seconds < 100:
        return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(byte_count: float | None) -> str:
    """Write a number of bytes as "1.94 MB"."""
    if byte_count is None:
        return "\N{EN DASH}"
    for unit in ("bytes", "kB", "MB", "GB"):
        if byte_count < 1000:
            return f"{figure(byte_count)} {unit}"
        byte_count /= 1000
    return f"{figure(byte_count)} TB"

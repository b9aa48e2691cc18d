"""Reading of JSON that may have been written by an older version, or by anybody."""

from __future__ import annotations

from histostream.wsi.report.figures import MAX_FIGURE, figure


class JsonView:
    """A value of a JSON file; what is missing or of another type than expected reads as empty.

    Parameters
    ----------
    value
        As `json.loads` returned it.
    """

    def __init__(self, value: object) -> None:
        self._value = value

    def __bool__(self) -> bool:
        return bool(self._value)

    def at(self, *path: str) -> JsonView:
        """Return the value under a key, or under a path of keys; an empty view if there is none."""
        value = self._value
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return JsonView(value)

    def number(self, *path: str) -> float | None:
        """Return the number under a path of keys; None if it is not a finite number below `MAX_FIGURE`."""
        value = self.at(*path)._value
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return value if abs(value) < MAX_FIGURE else None  # the comparison is False for nan, too

    def text(self, *path: str) -> str:
        """Return the text under a path of keys; "" if it is not a text."""
        value = self.at(*path)._value
        return value if isinstance(value, str) else ""

    def items(self, *path: str) -> list[tuple[str, JsonView]]:
        """Return the keys and values of the object under a path of keys."""
        value = self.at(*path)._value
        return [(k, JsonView(v)) for k, v in value.items()] if isinstance(value, dict) else []

    def numbers(self) -> list[float | None]:
        """Return the numbers of a list, None where an entry is no finite number; [] if it is no list."""
        return [JsonView(v).number() for v in self._value] if isinstance(self._value, list) else []

    def shown(self) -> str:
        """Return the value as a page shows it, a list as "a, b"."""
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
        """Return one number, or one number per class separated by slashes, with four digits."""
        values = self._value if isinstance(self._value, list) else [self._value]
        return " / ".join(figure(JsonView(v).number(), digits=4) for v in values)

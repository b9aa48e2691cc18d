"""Ranges of the fields of a configuration: written in the fields' types, checked in one place.

A field of a ``Config``, of `Schedule` or of `Augmentation` is a ``bool``, a ``Literal`` of its words,
or ``Annotated`` with a range::

    learning_rate: LearningRate = 2e-4
    depth: Annotated[int, Range(1, 8)] = 4
    norm: Literal["none", "instance"] = "none"

`check_fields` is the first line of each ``__post_init__``. A message begins with the name of the
field and its value, so that a recipe can put the name of its table before it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

MAX_SHOWN = 60  # characters of a value in a message
WHOLE = 10**9  # most of a number of steps


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a field may have.

    Attributes
    ----------
    least, most
        The smallest and the largest.
    above, below
        Whether the smallest, or the largest, is itself left out.
    off
        A further number, which switches the thing off; None: there is none.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False
    off: float | None = None

    def __contains__(self, value: float) -> bool:
        """Whether a number is in the range; nan is in none."""
        if self.off is not None and value == self.off:
            return True
        return (self.least < value if self.above else self.least <= value) and (
            value < self.most if self.below else value <= self.most
        )

    def __str__(self) -> str:
        """Return the range in words, as "more than 0, up to 1"."""
        off = "" if self.off is None else f"{self.off:g} (off), or "
        if not (self.above or self.below):
            return f"{off}{self.least:.10g} to {self.most:.10g}"
        least = f"more than {self.least:.10g}" if self.above else f"{self.least:.10g} or more"
        return f"{off}{least}, {'less than' if self.below else 'up to'} {self.most:.10g}"


@dataclass(frozen=True, slots=True)
class Pattern:
    """The texts that a field may have.

    Attributes
    ----------
    expression
        Regular expression of the whole text.
    words
        The same for a message.
    """

    expression: str
    words: str

    def __contains__(self, value: str) -> bool:
        """Whether a text is one of them."""
        return re.fullmatch(self.expression, value, re.DOTALL) is not None

    def __str__(self) -> str:
        """Return the words."""
        return self.words


Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0, 1e6)]  # of one loss in a sum of several
LearningRate = Annotated[float, Range(0, 1, above=True)]
Decaying = Annotated[float, Range(0, 1, below=True)]  # a dropout rate, or the part that a running mean keeps
Width = Annotated[int, Range(1, 4096)]  # channels
NumberList = Annotated[str, Pattern(r"([0-9]{1,6}(, *[0-9]{1,6})*)?", 'whole numbers with commas, as "8,6,4,4", or ""')]
FileName = Annotated[str, Pattern(r"[^\0]*", 'the path of a file, or ""')]


@dataclass(frozen=True, slots=True)
class _Rule:
    fits: Callable[[Any], bool]
    words: str


def check_fields(config: Any) -> None:
    """Check the type and the range of every field of a dataclass.

    Raises
    ------
    ValueError
        If a value is not allowed; the message begins with ``name=value`` and ends with what is.
    """
    check_values(type(config), {f.name: getattr(config, f.name) for f in dataclasses.fields(config)})


def check_values(kind: type, values: Mapping[str, Any]) -> None:
    """Check values for fields of the dataclass ``kind``, as `check_fields` does, before it is made."""
    types = field_types(kind)
    for name, value in values.items():
        rule = _rule(types[name])
        if not rule.fits(value):
            raise ValueError(f"{name}={shown(value)}: use {rule.words}")


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass, with its range."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def plain_type(hint: Any) -> Any:
    """Return a field's type without its range."""
    return typing.get_args(hint)[0] if has_range(hint) and typing.get_origin(hint) is Annotated else hint


def has_range(hint: Any) -> bool:
    """Whether a field's type says which values are allowed."""
    if typing.get_origin(hint) is Annotated:
        return any(isinstance(extra, Range | Pattern) for extra in typing.get_args(hint)[1:])
    return hint is bool or typing.get_origin(hint) is Literal


def shown(value: object) -> str:
    """Return a value for a message, cut where it is long."""
    text = value if isinstance(value, str) and len(value) > MAX_SHOWN else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


@functools.cache
def _rule(hint: Any) -> _Rule:
    plain, words = plain_type(hint), ""
    allowed: Range | Pattern | None = None
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return _Rule(lambda value: isinstance(value, str) and value in choices, " or ".join(map(repr, choices)))
    if plain is not hint:
        (allowed,) = (extra for extra in typing.get_args(hint)[1:] if isinstance(extra, Range | Pattern))
        words = f"{allowed}"
    if plain is bool:
        return _Rule(lambda value: isinstance(value, bool), "true or false")
    kinds = {int: (int, "a whole number"), float: (int | float, "a number"), str: (str, "a text")}
    other = typing.get_origin(plain) or plain  # of a method from elsewhere
    accepted, noun = kinds.get(plain, (other if isinstance(other, type) else object, str(plain)))
    if words and plain is not str:
        words = f"{noun}, {words}" if plain is int else words

    def fits(value: Any) -> bool:
        if not isinstance(value, accepted) or isinstance(value, bool):
            return False
        return allowed is None or value in allowed  # type: ignore[operator]  # of a number or a text, as its hint

    return _Rule(fits, words or noun)

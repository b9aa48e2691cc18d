"""Checks of the values in a method's ``Config``, with one form of message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_choices(config: Any, **choices: Sequence[str]) -> None:
    """Raise ValueError unless each named attribute has one of its choices."""
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: use {' or '.join(map(repr, allowed))}")


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Raise ValueError unless each named attribute is ``least`` or more."""
    for name in names:
        if not (value := getattr(config, name)) >= least:
            raise ValueError(f"{name}={value}: use {least} or more")


def check_shares(config: Any, *names: str) -> None:
    """Raise ValueError unless each named attribute is between 0 and 1."""
    for name in names:
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise ValueError(f"{name}={value}: a share, use 0 to 1")

"""Dataclasses that are read from JSON files and written to them.

A record is a dataclass with one field for each key of a JSON object; ``metadata={"key": ...}`` names the
key where it is not the field's name. Older and newer versions write
other keys, and a file may have been edited by hand. Therefore a value of an unexpected type becomes
the field's default, and unknown keys are kept in the field ``further`` and written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from histostream.wsi.errors import HistoError

OMIT = {"omit": True}  # metadata of a field that is left out of the file where it is None
FURTHER = "further"  # the field of a record that holds unknown keys
MAX_NUMBER = 1e18  # larger numbers, infinities and nan are no measurements
Record = TypeVar("Record")


class RecordError(HistoError, ValueError):
    """A JSON object lacks a required key, or has a value of another type there."""


def to_json(record: Any) -> Any:
    """Return a record as JSON values; keys are in the order of the fields, unknown keys come last."""
    if is_dataclass(record) and not isinstance(record, type):
        values = {
            _key(entry): to_json(value)
            for entry, value in ((entry, getattr(record, entry.name)) for entry in fields(record))
            if entry.name != FURTHER and not (value is None and entry.metadata.get("omit"))
        }
        return {**values, **to_json(getattr(record, FURTHER, {}))}
    if isinstance(record, Mapping):
        return {name: to_json(value) for name, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return str(record) if isinstance(record, Path) else record


def from_json(kind: type[Record], values: object) -> Record:
    """Read a record from JSON values.

    Parameters
    ----------
    kind
        The dataclass.
    values
        As `json.loads` returned them.

    Raises
    ------
    RecordError
        If a field without a default is missing, or its value has another type.
    """
    content = values if isinstance(values, dict) else {}
    hints = _hints(kind)  # type: ignore[arg-type]
    known: dict[str, Any] = {}
    keys = set()
    for entry in fields(kind):  # type: ignore[arg-type]  # mypy: not every type is a dataclass
        key = _key(entry)
        keys.add(key)
        if entry.name == FURTHER:
            continue
        try:
            known[entry.name] = _convert(hints[entry.name], content[key])
        except (KeyError, TypeError, ValueError) as error:
            if entry.default is MISSING and entry.default_factory is MISSING:
                raise RecordError(f"{kind.__name__} needs the key {key!r} of type {hints[entry.name]}") from error
    if FURTHER in hints:
        known[FURTHER] = {key: value for key, value in content.items() if key not in keys}
    return kind(**known)


def _key(entry: Field[Any]) -> str:
    return entry.metadata.get("key") or entry.name


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _convert(hint: Any, value: Any) -> Any:
    """Return a JSON value as a field of this type holds it.

    Raises
    ------
    TypeError, ValueError
        If the value has another type.
    """
    origin, parameters = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return None if value is None and type(None) in parameters else _convert(parameters[0], value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(value)
        if parameters[-1] is Ellipsis:
            return tuple(_convert(parameters[0], entry) for entry in value)
        return tuple(_convert(kind, entry) for kind, entry in zip(parameters, value, strict=True))
    if hint is Mapping or origin is Mapping:
        if not isinstance(value, Mapping):
            raise TypeError(value)
        return {str(name): _convert(parameters[1], entry) for name, entry in value.items()}
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise TypeError(value)
        return from_json(hint, value)  # type: ignore[arg-type]
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_NUMBER:
            raise TypeError(value)
        return value
    if hint is int and (isinstance(value, bool) or not abs(value) < MAX_NUMBER):
        raise TypeError(value)
    if not isinstance(value, hint):
        raise TypeError(value)
    return value

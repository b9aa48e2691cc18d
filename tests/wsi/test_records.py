"""Records: dataclasses of JSON files, which older and newer versions write too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from histostream.wsi.records import OMIT, RecordError, from_json, to_json


@dataclass(frozen=True)
class Inner:
    name: str = ""
    color: tuple[int, int, int] = (0, 0, 0)
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    fingerprint: Mapping[str, Any] = field(metadata={"key": "what"})
    size: int
    share: float | None = None
    path: str = ""
    parts: tuple[Inner, ...] = ()
    device: Inner | None = field(default=None, metadata=OMIT)
    further: Mapping[str, Any] = field(default_factory=dict)


def test_a_record_is_what_its_file_holds_in_the_order_of_its_fields() -> None:
    record = Outer({"a": [1]}, 3, 0.5, "x", (Inner("n", (1, 2, 3)),), Inner("gpu"))
    content = to_json(record)
    assert list(content) == ["what", "size", "share", "path", "parts", "device"]
    assert from_json(Outer, content) == record


def test_none_is_null_or_left_out() -> None:
    assert to_json(Outer({}, 1)) == {"what": {}, "size": 1, "share": None, "path": "", "parts": []}


def test_unknown_keys_are_kept() -> None:
    content = {"what": {}, "size": 1, "parts": [{"name": "n", "later": [1]}], "new": {"a": 1}}
    record = from_json(Outer, content)
    assert record.further == {"new": {"a": 1}}
    assert record.parts[0].further == {"later": [1]}
    assert to_json(record)["new"] == {"a": 1}
    assert to_json(record)["parts"][0]["later"] == [1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("share", "much"),
        ("share", True),
        ("share", float("nan")),
        ("share", 10**400),
        ("path", 3),
        ("parts", {}),
        ("parts", [1]),
        ("parts", 3),
        ("device", []),
    ],
)
def test_a_value_of_another_type_is_the_default(key: str, value: object) -> None:
    assert from_json(Outer, {"what": {}, "size": 1, key: value}) == Outer({}, 1)


@pytest.mark.parametrize("content", [{}, [], None, {"what": 3, "size": 1}, {"what": {}, "size": 1.5}, {"size": 1}])
def test_a_required_key_that_is_missing_is_an_error(content: object) -> None:
    with pytest.raises(RecordError, match="Outer needs the key"):
        from_json(Outer, content)


def test_paths_become_text() -> None:
    assert to_json({"roi": Path("a") / "b", "names": ("x",)}) == {"roi": str(Path("a") / "b"), "names": ["x"]}

"""Modules, names, files and folders that the pages mention exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY
from tests.docs.pages import INLINE, PAGES, prose

NAME = re.compile(r"\bhistostream(?:\.[A-Za-z_]\w*)+")
FOLDERS = "wsi|runtime|training|export|benchmarks|tests|docs|docker"
FILE = re.compile(rf"(?:{FOLDERS})/[\w./-]*")
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what there was


def entry_point_groups() -> set[str]:
    """Return the groups of entry points that the registries in the code read."""
    files = [path for name in ("wsi", "runtime", "training") for path in (REPOSITORY / name).rglob("*.py")]
    return {name for path in files for name in re.findall(r'"(histostream\.\w+)"', path.read_text(encoding="utf-8"))}


def resolve(name: str) -> object:
    """Import the longest module of a dotted name, and take the attributes that follow."""
    parts = name.split(".")
    for end in range(len(parts), 1, -1):
        try:
            found: ModuleType = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        value: object = found
        for attribute in parts[end:]:
            value = getattr(value, attribute)
        return value
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_dotted_names_of_a_page_exist(page: Path) -> None:
    for name in set(NAME.findall(page.read_text(encoding="utf-8"))) - entry_point_groups():
        resolve(name)


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_paths_of_a_page_exist(page: Path) -> None:
    for code in INLINE.findall(prose(page)):
        if FILE.fullmatch(code) and "NAME" not in code:
            assert (REPOSITORY / code).exists(), code


def test_the_messages_that_the_troubleshooting_page_quotes_are_in_the_code() -> None:
    """The page writes "..." for the values in a message."""
    text = prose(REPOSITORY / "docs" / "troubleshooting.md")
    files = [path for name in ("wsi", "runtime") for path in (REPOSITORY / name).rglob("*.py")]
    sources = [path.read_text(encoding="utf-8") for path in files]
    code = re.sub(r"\"\s+f?\"", "", "\n".join(sources))  # a message can continue on the next line
    quoted = [message for message in re.findall(r"\"([^\"]+)\"", text) if " " in message]
    assert len(quoted) > 3
    for message in quoted:
        pattern = r"[^\n]*".join(re.escape(part) for part in message.split("..."))
        assert re.search(pattern, code), message

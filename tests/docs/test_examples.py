"""The examples of the pages and of the docstrings do what they say, run as they stand."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from histostream.wsi.synthetic import SyntheticSlide
from tests.conftest import REPOSITORY

FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A block whose first line names a file of the project is that file, found as if it lay there.
FILE = re.compile(r"# ((?:wsi|runtime|training)/[\w/]+\.py)\n")
PAGES = [
    page
    for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
    if FENCE.search(page.read_text(encoding="utf-8"))
]
MODULES = [
    f"histostream.{source.relative_to(REPOSITORY).with_suffix('').as_posix().replace('/', '.')}"
    for folder in ("wsi", "runtime", "export", "training", "benchmarks")
    for source in sorted((REPOSITORY / folder).rglob("*.py"))
    if ">>> " in source.read_text(encoding="utf-8")
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder to work in, which holds ``slide.svs``: 700 x 600 px at 0.5 um."""
    monkeypatch.chdir(tmp_path)
    SyntheticSlide(700, 600, 0.5, 1).write(tmp_path / "slide.svs")
    return tmp_path


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of each Python block of a page."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield text.count("\n", 0, found.start(1)), found.group(1)


def run(source: str, page: Path, line: int, names: dict[str, Any]) -> None:
    """Run a block: a session with its answers, or plain code."""
    if ">>> " not in source:
        exec(compile("\n" * line + source, str(page), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(source, names, page.name, str(page), line)
    output: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=output.append, clear_globs=False)
    names.update(test.globs)
    assert not result.failed, "".join(output)


def package_of(file: Path) -> ModuleType:
    return importlib.import_module(f"histostream.{'.'.join(file.parent.parts)}")


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    for line, source in blocks(page):
        file = FILE.match(source)
        if file is None:
            run(source, page, line, names)
            continue
        path = place / file.group(1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        package = package_of(Path(file.group(1)))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(path.parent)])
        importlib.invalidate_caches()


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings(name: str, place: Path) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed

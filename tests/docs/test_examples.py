"""The examples of the pages and of the docstrings do what they say, run as they stand."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from histostream.wsi.synthetic import SyntheticSlide
from tests.conftest import REPOSITORY
from tests.docs.pages import PAGES as ALL_PAGES
from tests.docs.pages import blocks

# A block whose first line names a file of the example package is that file.
FILE = re.compile(r"# (histo_example/\w+\.py|pyproject\.toml)\n")
PAGES = [page for page in ALL_PAGES if any(block.info == "python" and not block.not_run for block in blocks(page))]
EXTENDING = REPOSITORY / "docs" / "extending.md"
MODULES = [
    f"histostream.{source.relative_to(REPOSITORY).with_suffix('').as_posix().replace('/', '.')}"
    for folder in ("wsi", "runtime", "export", "training", "benchmarks")
    for source in sorted((REPOSITORY / folder).rglob("*.py"))
    if ">>> " in source.read_text(encoding="utf-8")
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, which has ``slide.svs``: 700 x 600 px at 0.5 um."""
    monkeypatch.chdir(tmp_path)
    SyntheticSlide(700, 600, 0.5, 1).write(tmp_path / "slide.svs")
    return tmp_path


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


def run_page(page: Path) -> None:
    """Run the Python blocks of a page one after another, in one namespace."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.info == "python" and not block.not_run and not FILE.match(block.text):
            run(block.text, page, block.line, names)


def install_example(page: Path, folder: Path) -> None:
    """Write the example package of a page, and the metadata with which pip would install its entry points."""
    for block in blocks(page):
        if found := FILE.match(block.text):
            path = folder / found.group(1)
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {module}" for name, module in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.mark.full
@pytest.mark.parametrize("page", [page for page in PAGES if page != EXTENDING], ids=lambda page: page.name)
def test_the_examples_of_a_page(page: Path, folder: Path) -> None:
    run_page(page)


@pytest.mark.full
def test_the_package_of_the_page_about_extending_works(folder: Path) -> None:
    """A new process finds the entry points, which HistoStream reads once."""
    install_example(EXTENDING, folder)
    code = f"from pathlib import Path; from {__name__} import run_page; run_page(Path({str(EXTENDING)!r}))"
    path = os.pathsep.join([str(folder), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings(name: str, folder: Path) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed

"""Every message of the source is on the page of troubleshooting, and says what to do."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from histostream.runtime import Options, default_bundle, open_engine, read_card
from histostream.runtime.crf.options import read_params
from histostream.runtime.inputs import find_inputs
from histostream.wsi import OutputFolder, at_mpp, open_slide, read_roi
from histostream.wsi.errors import HistoError
from histostream.wsi.journal import Journal
from histostream.wsi.synthetic import SyntheticSlide
from tests.conftest import REPOSITORY

# Exceptions made with a text that is another's: of the error that led there, of another process.
FORWARDED = {
    "benchmarks/accuracy/cells.py", "export/cli.py", "export/foreign_file.py",
    "runtime/command.py", "runtime/messages.py", "runtime/cohort.py",
    "runtime/devices/__init__.py", "runtime/fleet.py", "runtime/inputs.py", "runtime/ray_crew.py",
    "runtime/tensorrt.py", "training/command.py",
    "wsi/console.py", "wsi/lock.py", "wsi/mosaic.py", "wsi/readers/large_image.py",
    "wsi/readers/tiff.py",
    "wsi/synthetic.py", "benchmarks/outputs.py", "benchmarks/sandbox.py", "benchmarks/size.py",
    "runtime/segmenter.py", "runtime/viewer/command.py", "runtime/viewer/server.py",
}  # fmt: skip

# What a message may ask for; an option or a package to install is one too, and a nearest name.
REMEDY = re.compile(
    r"\b(add|allow|begin|bring|build|call|change|compare|check|choose|convert|copy|cut|delete|download|"
    r"draw|expected|export|fetch|fill|free|give|goes on|install|leave|load|lower|make|mend|merge|"
    r"mirror|move|must|name|needs|order|paint|pass|put|quote|remove|rename|repeat|replace|report|"
    r"resample|restart|run|save|say|scan|see|set|shorten|take|train|try|tune|uses?|wait|write|"
    r"written)\b"
    r"|--[a-z]|pip install|known:|did you mean|⟨(hint|advice|known|pip install \.\.\.)⟩"
)
# These are printed within another message, which says what to do.
WITHIN = {
    "DeclinedError",
    "_RefusedError",
    "NotUnderstoodError",
    "NotUsableError",
    "StoppedError",
    "warning",
    "text",
}
HEADS = ("card: ", "header: ", "profile: ")
HANDED_ON = {
    "backend 'tensorrt': ⟨reason⟩",
    "backend ⟨device⟩: ⟨reason⟩",
    "device ⟨device⟩: ⟨content⟩",
    "⟨text⟩; and ⟨more⟩ more like these",
    "no second context (⟨said⟩)",  # caught: a full batch then runs without a graph of its own
    "no ⟨takes⟩ bytes to spare for a second context",
    "stopped",
}


@functools.cache
def extension(name: str) -> Any:
    """Import a module of docs/_ext, as Sphinx does."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / f"docs/_ext/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def catalogue() -> Any:
    return extension("messages").read_catalogue(REPOSITORY)


def raised() -> Iterator[tuple[str, ast.expr]]:
    """Yield file and text of every ``raise Name(text)`` of an exception of the project."""
    ours = set(catalogue().classes)
    for area in extension("messages").AREAS:
        for path in sorted((REPOSITORY / area).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                made = node.exc if isinstance(node, ast.Raise) else None
                if isinstance(made, ast.Call) and made.args and ast.unparse(made.func) in ours:
                    yield path.relative_to(REPOSITORY).as_posix(), made.args[0]


@pytest.mark.full
def test_every_exception_that_is_raised_is_listed() -> None:
    """Look for the words of each in another way than the page's: any piece of its text."""
    listed = {area: "" for area in extension("messages").AREAS}
    for message in catalogue().messages:
        listed[message.area] += message.text + "\n"
    missing = [
        f"{file}: {piece.value}"
        for file, text in raised()
        for piece in ast.walk(text)
        if isinstance(piece, ast.Constant)
        and isinstance(piece.value, str)
        and re.search(r"[a-z]{3}.* .*[a-z]", piece.value)
        and piece.value not in listed[file.split("/")[0]]
    ]
    assert not missing


def test_only_known_places_hand_on_what_another_has_said() -> None:
    assert {line.split(": ")[0] for line in catalogue().forwarded} <= FORWARDED


@pytest.mark.full
def test_every_message_says_what_to_do() -> None:
    mute = [
        f"{message.source}: {message.text}"
        for message in catalogue().messages
        if message.kind not in WITHIN and not message.text.startswith(HEADS)
        if not REMEDY.search(re.sub("⟨(?!hint|advice|known|pip install)[^⟩]*⟩", "X", message.text))
        and message.text not in HANDED_ON
    ]
    assert not mute, "say what to do, or add the verb to REMEDY"


def test_the_page_lists_every_area() -> None:
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    listed = re.findall(r"```\{error-messages\} (\w+)", page)
    assert sorted(listed) == sorted(extension("messages").AREAS)


def file(path: Path, text: str = "") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def see(folder: Path, mpp: float = 0.5, *, own: float | None = None, roi: str = "") -> None:
    """Look at a slide of 0.5 um per pixel."""
    SyntheticSlide(64, 48, 0.5, 1).write(folder / "slide.tif")
    with open_slide(folder / "slide.tif") as slide:
        view = at_mpp(slide, mpp, slide_mpp=own)
        if roi:
            read_roi(folder / roi, view)


MISTAKES: dict[str, Callable[[Path], object]] = {
    "no slide": lambda at: open_slide(at / "none.svs"),
    "an empty slide": lambda at: open_slide(file(at / "a.svs")),
    "a text": lambda at: open_slide(file(at / "a.svs", "no slide at all")),
    "no reader": lambda at: open_slide(file(at / "a.svs", "x"), reader="magic"),
    "too fine": lambda at: see(at, 0.1),
    "an absurd resolution": lambda at: see(at, own=9000),
    "no regions": lambda at: see(at, roi="none.geojson"),
    "no slides": lambda at: find_inputs([str(at)]),
    "a list without paths": lambda at: find_inputs([str(file(at / "list.csv", "name\na\n"))]),
    "no bundle": lambda at: read_card(at),
    "a card that is no JSON": lambda at: read_card(file(at / "b/card.json", "{").parent),
    "a card of tomorrow": lambda at: read_card(file(at / "b/card.json", '{"schema": 9}').parent),
    "no backend": lambda at: open_engine(default_bundle(), backend="abacus"),
    "no precision": lambda at: open_engine(default_bundle(), precision="fp16", backend="cpu"),
    "a batch of none": lambda at: Options(batch=0),
    "no table": lambda at: Options(objects=("xls",)),
    "a CRF of words": lambda at: read_params("w1=much", {}, mpp=0.5),
    "a name that leads out": lambda at: OutputFolder(at, "../elsewhere"),
    "no journal": lambda at: Journal(file(at / ".journal/begun.json", "[]").parents[1]).read(),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_printed_is_what_is_listed(mistake: str, tmp_path: Path) -> None:
    with pytest.raises(HistoError) as caught:
        MISTAKES[mistake](tmp_path)
    listed = [m for m in catalogue().messages if m.kind == type(caught.value).__name__]
    assert any(m.matches(str(caught.value)) for m in listed), str(caught.value)

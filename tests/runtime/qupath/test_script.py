"""The script that imports results into QuPath: its syntax, its calls, and a run on stand-ins of QuPath's classes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from pygments.lexers.jvm import GroovyLexer
from pygments.token import Comment, Error, Punctuation, String, Token

from histostream.runtime.options import Options
from histostream.runtime.qupath.command import SCRIPT, qupath, script, write_script
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.errors import HistoError
from histostream.wsi.outputs.label_rows import ClassInfo
from tests.runtime.conftest import CARD, IdentityEngine, write_slide
from tests.wsi.slides.mirax import write_mirax

HERE = Path(__file__).parent
API = json.loads((HERE / "api.json").read_text())
PAIRS = {")": "(", "]": "[", "}": "{"}
# The second class is the background, so the objects are the red ones.
CLASSES = (ClassInfo("red", (255, 0, 0)), ClassInfo("green", (0, 255, 0), "background"), ClassInfo("blue", (0, 0, 255)))


def tokens() -> list[tuple[Any, str]]:
    """Return the tokens of the script that are not space or comments."""
    kept = []
    text = script(Path("/results")).replace(" / ", " % ")  # the lexer takes a division for the begin of a string
    for kind, token in GroovyLexer().get_tokens(text):
        if token.strip() and kind not in Comment:
            kept.append((kind, token))
    return kept


def arguments(found: list[tuple[Any, str]], at: int) -> int:
    """Return how many arguments a call has whose parenthesis is the token ``at``."""
    depth, count, is_empty = 0, 1, True
    for kind, text in found[at:]:
        for c in text if kind in Punctuation or kind in Token.Operator else "":
            depth += (c in "([{") - (c in ")]}")
            count += c == "," and depth == 1
        if depth == 0:
            return 0 if is_empty else count
        is_empty = is_empty and text == "("
    raise AssertionError("a call that does not end")


def calls() -> set[tuple[str, str, int]]:
    """Return (what stands before the dot, name, number of arguments) of the calls of the script."""
    found = tokens()
    made = set()
    for i, (_, text) in enumerate(found[:-1]):
        if text.lstrip(".").isidentifier() and found[i + 1][1].startswith("(") and found[i - 1][1].endswith("."):
            made.add((found[i - 2][1], text.lstrip("."), arguments(found, i + 1)))
    return made


def test_the_script_is_groovy_as_far_as_a_lexer_can_tell() -> None:
    opened: list[str] = []
    for kind, text in tokens():
        assert kind not in Error, text
        if kind in String:
            continue
        for c in text:
            if c in PAIRS.values():
                opened.append(c)
            elif c in PAIRS:
                assert opened.pop() == PAIRS[c]
    assert not opened


def test_the_script_calls_only_what_the_public_api_has() -> None:
    text = script(Path("/results"))
    imported = set(re.findall(r"^import (qupath\.\S+)$", text, re.MULTILINE))
    assert imported == set(API["imports"])
    static = {name.rpartition(".")[2]: methods for name, methods in API["imports"].items()}
    ours = {(name, count) for methods in API["methods"].values() for name, count in methods.items()}
    made = calls()
    assert len(made) > 40
    for before, name, count in made:
        if before in static:
            assert static[before].get(name) == count, (before, name, count)
        else:
            assert (name, count) in ours or name in API["java and groovy"], (before, name, count)
    used = {name for _, name, _ in made}
    assert {name for methods in API["methods"].values() for name in methods} <= used, "the list has what is used only"
    assert {name for methods in static.values() for name in methods} <= used


def test_the_folder_of_results_is_written_into_the_script(tmp_path: Path) -> None:
    with pytest.raises(HistoError, match="no results there; name the folder"):
        write_script(tmp_path)
    folder = tmp_path / "it's\\here"
    (folder / "slide").mkdir(parents=True)
    (folder / "slide" / "run.json").write_text("{}")
    path = write_script(folder)
    assert path == folder / SCRIPT
    escaped = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    assert f"new File('{escaped}')" in path.read_text()
    assert write_script(folder / "slide").parent == folder / "slide"


def test_the_command_says_what_to_do_with_the_script_and_refuses_other_folders(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    done = CliRunner().invoke(qupath, [str(tmp_path)])
    assert done.exit_code == 0
    assert f"{tmp_path / SCRIPT}: drag it onto QuPath's window" in done.output
    wrong = CliRunner().invoke(qupath, [str(tmp_path / "none")])
    assert wrong.exit_code == 1
    assert len(wrong.output.splitlines()) == 1


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a slide and a MIRAX slide, each with one red square."""
    top = tmp_path_factory.mktemp("qupath")
    pixels = np.full((256, 512, 3), (240, 250, 240), np.uint8)
    pixels[30:60, 100:140] = (250, 20, 30)
    slides = [
        write_slide(top / "slide one.tif", pixels),
        write_mirax(top / "case.mrxs", pixels, grid=(8, 8), first=(3, 2), zooms=3),
    ]
    engine = IdentityEngine(card=replace(CARD, classes=CLASSES))
    for slide in slides:
        for out, coordinates in (("out", "qupath"), ("openslide", "openslide")):
            options = Options(tissue=False, annotations=("qupath",), coordinates=coordinates)
            folder = segment_slide(slide, engine, top / out, options).folder
            tissue = {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 0]]]}
            feature = {"type": "Feature", "geometry": tissue, "properties": {"objectType": "annotation"}}
            text = json.dumps({"type": "FeatureCollection", "features": [feature]})
            (folder / "tissue.geojson").write_text(text)
    return top


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the stand-ins of QuPath's classes."""
    if shutil.which("groovyc") is None or shutil.which("java") is None:
        pytest.skip("Groovy is not installed: apt-get install groovy")
    classes = tmp_path_factory.mktemp("classes")
    sources = sorted(map(str, (HERE / "stand_ins" / "qupath").rglob("*.groovy")))
    groovy("groovyc", "-d", str(classes), *sources)
    return classes


def groovy(*command: str) -> str:
    java = Path(shutil.which("java") or "").resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAVA_HOME": str(java)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def imported(stand_ins: Path, out: Path, images: list[dict[str, Any]], **more: Any) -> tuple[dict[str, Any], str]:
    """Run the script; return what became of the images, and what it printed."""
    wanted = {"project": False, "open": 0, "runs": 1, "images": images, **more}
    driver = str(HERE / "stand_ins" / "drive.groovy")
    printed = groovy("groovy", "-cp", str(stand_ins), driver, str(write_script(out)), json.dumps(wanted))
    *lines, last = printed.splitlines()
    return json.loads(last), "\n".join(lines)


def image(path: Path, width: int = 512, height: int = 256, um: float | None = 0.5) -> dict[str, Any]:
    return {"uri": path.as_uri(), "width": width, "height": height, "um": um}


@pytest.mark.full
def test_an_open_image_gets_objects_tissue_and_pixel_size_and_again_the_same(results: Path, stand_ins: Path) -> None:
    found, printed = imported(stand_ins, results / "out", [image(results / "slide one.tif", um=None)], runs=2)
    (opened,) = found["images"]
    assert opened["um"] == 0.5
    assert opened["objects"] == [
        ["detection", [100, 30], [0, 0], False, "objects.geojson.gz"],
        ["annotation", [0, 0], [0, 0], True, "tissue.geojson"],
    ]
    assert "2 objects imported, 0 of before removed" in printed
    assert "2 objects imported, 2 of before removed" in printed


@pytest.mark.full
def test_a_project_gets_each_result_at_its_image_and_the_label_maps(results: Path, stand_ins: Path) -> None:
    images = [
        image(results / "slide one.tif", um=0.6),
        image(Path("/moved/case.mrxs")),
        image(results / "other.svs"),
        image(Path("/elsewhere/case.mrxs"), 100, 100),
    ]
    found, printed = imported(stand_ins, results / "out", images, project=True, runs=2)
    assert [len(one["objects"]) for one in found["images"]] == [2, 2, 0, 0]
    assert found["saved"] == [True, True, False, False]
    assert [one["closed"] for one in found["images"]] == [False, True, True, True]
    names = ["slide one (labels)", "case (labels)"]
    assert [name for name, _ in found["added"]] == names
    assert all(builder.endswith("labels.tif") for _, builder in found["added"])
    assert "slide one.tif: QuPath has 0.6 um per pixel, histo-infer ran with 0.5: areas differ" in printed
    assert "other.svs: no result" in printed
    assert "case.mrxs: it has 100 x 100 px, and" in printed


@pytest.mark.full
@pytest.mark.parametrize(
    ("out", "size", "shift"),
    [("openslide", (512, 256), [-768, -512]), ("out", (2048, 2048), [768, 512])],
    ids=["openslide's pixels, cropped", "qupath's pixels, not cropped"],
)
def test_objects_of_a_mirax_slide_lie_where_qupath_shows_them(
    results: Path, stand_ins: Path, out: str, size: tuple[int, int], shift: list[int]
) -> None:
    found, _ = imported(stand_ins, results / out, [image(results / "case.mrxs", *size)])
    _, corner, moved, *_ = found["images"][0]["objects"][0]
    assert moved == shift
    at = (100, 30) if size == (512, 256) else (768 + 100, 512 + 30)
    assert (corner[0] + moved[0], corner[1] + moved[1]) == at


@pytest.mark.full
def test_without_an_open_image_the_script_says_so(results: Path, stand_ins: Path) -> None:
    _, printed = imported(stand_ins, results / "out", [], open=None)
    assert "open an image or a project first" in printed

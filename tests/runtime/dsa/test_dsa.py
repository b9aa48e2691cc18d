"""The task of the Digital Slide Archive: what its plug-in asks for, and a run with the arguments that it passes."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import tifffile
from click.testing import CliRunner, Result

from histostream.runtime.dsa.command import dsa, task, task_xml
from tests.runtime.conftest import write_slide

ROOT = Path(__file__).parents[3]
NUCLEI = (90, 50, 130)  # the colour of haematoxylin


def run(*arguments: object) -> Result:
    return CliRunner().invoke(dsa, [str(argument) for argument in arguments])


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """Draw two dark discs on pink, 80 um apart."""
    y, x = np.mgrid[:300, :400]
    pixels = np.full((300, 400, 3), (235, 190, 215), np.uint8)
    for cx, cy in ((100, 100), (260, 200)):
        pixels[(x - cx) ** 2 + (y - cy) ** 2 < 14**2] = NUCLEI
    return write_slide(tmp_path / "slide [1].tif", pixels)


def centres(path: Path) -> list[tuple[float, float]]:
    annotation = json.loads(path.read_text())
    assert annotation["name"]
    found = [np.asarray(element["points"], float)[:, :2] for element in annotation["elements"]]
    return sorted(tuple(((points.min(0) + points.max(0)) / 2).tolist()) for points in found)


def test_the_container_lists_its_task_as_json() -> None:
    done = run("--list_cli")
    assert done.exit_code == 0
    assert json.loads(done.output) == {"histo-infer": {"type": "python"}}


def test_the_container_without_arguments_explains_itself() -> None:
    done = run()
    assert done.exit_code == 2
    assert "--list_cli" in done.output


def test_the_parameters_are_those_of_the_command() -> None:
    """slicer_cli_web passes the long flags of the XML, and then what has an index, in its order."""
    done = run("histo-infer", "--xml")
    assert done.exit_code == 0
    root = ET.fromstring(done.output)
    assert root.tag == "executable"
    assert [root.findtext(name) for name in ("title", "version")] == [
        "Segment a slide with HistoStream",
        re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1],  # type: ignore[index]
    ]
    parameters = [entry for group in root.findall("parameters") for entry in group if entry.find("name") is not None]
    by_flag = {entry.findtext("longflag"): entry for entry in parameters if entry.find("index") is None}
    options = {o.opts[0].lstrip("-"): o for o in task.params if isinstance(o, click.Option) and o.opts != ["--xml"]}
    assert set(by_flag) == set(options)
    for flag, entry in by_flag.items():
        option = options[str(flag)]
        default, kind = entry.findtext("default"), option.type
        if default is not None:
            assert str(option.default) == default or float(str(option.default)) == float(default)
        if isinstance(kind, click.Choice):
            assert entry.tag == "string-enumeration"
            listed = [element.text for element in entry.findall("element")]
            assert set(listed) <= set(kind.choices)
            assert default in listed
        else:
            assert entry.tag in {"double", "region", "file", "directory"}
            assert (entry.tag == "double") == (kind is click.FLOAT)
        assert (entry.findtext("channel") == "output") == (entry.tag == "file")
    indexed = sorted(
        (entry for entry in parameters if entry.find("index") is not None), key=lambda e: int(e.findtext("index", ""))
    )
    assert [entry.tag for entry in indexed] == ["image", "file"]
    assert [p.name for p in task.params if isinstance(p, click.Argument)] == ["image", "output"]
    # The archive makes an annotation of an output whose name ends so, on the image that it refers to.
    assert str(indexed[1].findtext("name")).endswith("AnnotationFile")
    assert indexed[1].get("reference") == indexed[0].findtext("name")


@pytest.mark.full
def test_the_parser_of_the_archive_reads_the_parameters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ctk_cli = pytest.importorskip("ctk_cli", reason="of the extra dev")
    path = tmp_path / "histo-infer.xml"
    path.write_text(task_xml())
    module = ctk_cli.CLIModule(str(path))
    indexed, optional, simple = module.classifyParameters()
    assert [parameter.name for parameter in indexed] == ["inputImageFile", "outputAnnotationFile"]
    assert {parameter.longflag for parameter in optional} == {
        f"--{name}" for name in ("region", "mpp", "min-area", "model", "glass", "precision", "label-map", "summary")
    }
    assert not simple


def test_a_run_as_the_archive_starts_it_leaves_an_annotation_at_the_place_it_asks_for(
    slide: Path, tmp_path: Path
) -> None:
    output, labels, summary = (tmp_path / name for name in ("out.anot", "map.tif", "areas.csv"))
    # The values of the form, as slicer_cli_web passes them: texts of numbers, the whole slide as -1.
    form: list[object] = ["--glass", "analyse", "--label-map", labels, "--min-area", "8", "--mpp", "0"]
    form += ["--precision", "auto", "--region", "-1, -1, -1, -1", "--summary", summary]
    done = run("histo-infer", *form, slide, output)
    assert done.exit_code == 0, done.output
    found = centres(output)
    assert len(found) == 2
    assert np.abs(np.asarray(found) - [(100, 100), (260, 200)]).max() < 3
    assert tifffile.imread(labels).shape == (300, 400)
    rows = list(csv.DictReader(summary.open()))
    assert {row["name"] for row in rows} == {"background", "nucleus"}
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_rectangle_that_is_drawn_is_all_that_is_analysed(slide: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.anot"
    done = run("histo-infer", "--glass", "analyse", "--region", "200.0, 150, 150, 120", slide, output)
    assert done.exit_code == 0, done.output
    (centre,) = centres(output)
    assert np.abs(np.subtract(centre, (260, 200))).max() < 3


@pytest.mark.parametrize("region", ["1,2,3", "1,2,0,5", "a,b,c,d", "1,2,nan,4", "1,2,3,4,5,6,7,8", ""])
def test_a_region_that_is_no_rectangle_is_refused_before_any_work(slide: Path, tmp_path: Path, region: str) -> None:
    done = run("histo-infer", "--region", region, slide, tmp_path / "out.anot")
    assert done.exit_code == 2
    assert "draw one rectangle, X,Y,WIDTH,HEIGHT" in done.output
    assert len(done.output.splitlines()) == 1
    assert not (tmp_path / "out.anot").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.tif"], "there is no such file"),
        (["--mpp", "900"], "mpp"),
        (["--model", "none"], "none"),
    ],
)
def test_what_fails_is_one_line_with_the_status_and_leaves_no_file(
    slide: Path, tmp_path: Path, arguments: list[Any], message: str
) -> None:
    image = [tmp_path / arguments.pop()] if len(arguments) == 1 else [slide]
    done = run("histo-infer", *arguments, *image, tmp_path / "out.anot")
    assert done.exit_code != 0
    lines = [line for line in done.output.splitlines() if not line.startswith("model:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out.anot").exists()


def test_the_container_starts_the_task() -> None:
    lines = (ROOT / "docker" / "dsa.Dockerfile").read_text().splitlines()
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT")]
    assert json.loads(entry.removeprefix("ENTRYPOINT ")) == ["histo-infer", "dsa"]

"""The page about file formats names every file and every field that is written."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.cli import main
from histostream.runtime.cohort.inputs import COLUMNS
from histostream.runtime.engines.tensorrt.file import EngineHeader
from histostream.training.checkpoint import Checkpoint
from histostream.wsi.outputs.journal import RunManifest
from histostream.wsi.outputs.lock import Holder
from histostream.wsi.outputs.sinks.objects import _table
from histostream.wsi.synthetic import SyntheticSlide
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.full

PAGE = (REPOSITORY / "docs" / "file-formats.md").read_text(encoding="utf-8")
# The content of these fields depends on the model or on the options; other pages describe it.
OPEN = {"options", "versions", "model.sha256", "model.card", "inputs.options"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of a cohort of two slides, with every kind of file."""
    folder = tmp_path_factory.mktemp("formats")
    for name in ("one", "two"):
        SyntheticSlide(300, 200, 0.5, 1).write(folder / f"{name}.tif")
    result = CliRunner().invoke(
        main,
        [
            str(folder),
            "--out",
            str(folder / "out"),
            "--probabilities",
            "--geojson",
            "--annotations",
            "dsa",
            "--objects",
            "csv,parquet",
            "--rasters",
            "ome-tiff,ome-tiff-rgb,ome-zarr,dicom-seg,density",
            "--backend",
            "cpu",
            "--no-tissue",
        ],
    )
    assert result.exit_code == 0, result.output
    return folder / "out"


def fields(record: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names of all fields of a JSON object."""
    if isinstance(record, dict):
        for name, value in record.items():
            yield name
            if prefix + name not in OPEN:
                yield from fields(value, f"{prefix}{name}.")
    elif isinstance(record, list):
        for value in record:
            yield from fields(value, prefix)


def named(section: str) -> set[str]:
    """Return the names in backticks in a section of the page and its sub-sections."""
    found = re.search(rf"^(#+) {re.escape(section)}\n(.*?)(?=^#{{1,2}} |\Z)", PAGE, re.M | re.S)
    assert found is not None, section
    text = found.group(2)
    if found.group(1) == "###":
        text = text.split("\n### ")[0]
    names = {name.strip() for code in re.findall(r"`([^`]+)`", text) for name in code.split(",")}
    return names | {name.removeprefix("OUT/") for name in names}


def test_every_file_is_named(results: Path) -> None:
    folder = {path.name for path in (results / "one").iterdir()}
    assert len(folder) > 8
    assert folder <= named("The output folder")
    assert {path.name for path in results.iterdir() if path.is_file()} <= named("A cohort")


@pytest.mark.parametrize(
    ("name", "section"),
    [("one/run.json", "run.json"), ("one/summary.json", "summary.json, summary.csv"), ("cohort.json", "A cohort")],
)
def test_every_field_is_named(results: Path, name: str, section: str) -> None:
    written = set(fields(json.loads((results / name).read_text(encoding="utf-8"))))
    # CLASS_mm2 and the like stand for a column of each class.
    by_class = [name.removeprefix("CLASS") for name in named(section) if name.startswith("CLASS_")]
    classes = {f"{name}{column}" for name in ("background", "nucleus") for column in by_class}
    assert written - classes <= named(section)


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        (ModelCard, "card.json"),
        (EngineHeader, "An engine file"),
        (Checkpoint, "A run of histo-train"),
        (RunManifest, "The journal"),
        (Holder, "The lock"),
    ],
)
def test_every_key_is_named(kind: Any, section: str) -> None:
    keys = {field.metadata.get("key", field.name) for field in dataclasses.fields(kind)}
    assert keys - {"further"} <= named(section)  # which holds keys of other versions


def test_every_column_is_named() -> None:
    assert set(COLUMNS) <= named("A list of slides")
    assert set(_table.COLUMNS) <= named("objects")

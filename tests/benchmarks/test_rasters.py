"""What the shipped measurement of rasters says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from histostream.benchmarks import rasters
from histostream.benchmarks.rasters import FIRST, write
from histostream.runtime.stream.memory import SLACK
from histostream.wsi.outputs.label_rows import SlideInfo
from histostream.wsi.outputs.objects.counting import with_rules
from histostream.wsi.outputs.sinks import find_sink, sink_names
from histostream.wsi.synthetic import CLASSES

RESULT = Path(rasters.__file__).parent / "results" / "rasters-cpu.json"
MIB = 1 << 20
HIGHDICOM_MIB = 130  # loaded when the sink is opened, so it is not counted again


@pytest.mark.full
@pytest.mark.parametrize("name", [FIRST, *sink_names("rasters")])
def test_every_raster_can_be_measured(tmp_path: Path, name: str) -> None:
    raw = tmp_path / "labels"
    raw.write_bytes(bytes(600 * 700))
    found = write(raw, (600, 700), name, tmp_path / "out")
    assert found["files"] >= 1
    assert found["megabytes"] > 0


@pytest.mark.parametrize("name", sink_names("rasters"))
def test_memory_follows_the_width_and_is_counted(name: str) -> None:
    runs = json.loads(RESULT.read_text())["runs"]
    whole, half = runs["synthetic"][name], runs["half"][name]
    assert whole["height"] == 2 * half["height"]
    assert whole["raster_mib"] == pytest.approx(half["raster_mib"], abs=2)
    info = SlideInfo("synthetic", whole["width"], whole["height"], 0.5, with_rules(CLASSES, count_all=True))
    needs = find_sink("rasters", name).needs(info, 512)
    counted = needs.bytes_at_once + int(SLACK * needs.bytes_per_column * whole["width"])
    before = HIGHDICOM_MIB if name == "dicom-seg" else 0
    assert whole["raster_mib"] <= counted / MIB + before

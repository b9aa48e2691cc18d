"""The sinks that options choose: the files of the sinks' folders, and those of other packages."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from histostream.runtime.options import OptionError, Options
from histostream.wsi.outputs import sinks
from histostream.wsi.outputs.sinks import SinkError, SinkKind, find_sink, sink_names
from histostream.wsi.registry import entry_points
from tests.runtime.conftest import random_pixels, write_slide

PLUGIN = '''
"""labels.count: how many pixels of the label map were written."""

from histostream.wsi.files import remove, temporary_name, write_temporary
from histostream.wsi.outputs.memory_needs import MemoryNeeds
from histostream.wsi.outputs.sinks import SinkKind


class CountSink:
    def __init__(self, path):
        self.path, self.pixels = path, 0

    def write(self, part):
        self.pixels += part.labels.size

    def finish(self):
        return [write_temporary(self.path, str(self.pixels))]

    def abort(self):
        remove([temporary_name(self.path)])


SINK = SinkKind(
    "labels.count",
    lambda path, info, slide: CountSink(path),
    needs=lambda info, tile_px: MemoryNeeds(bytes_at_once=8),
)
'''


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Install a package with a sink into a folder, as pip would."""
    folder = tmp_path / "site"
    info = folder / "counting-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "counting.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[histostream.sinks]\nrasters.count = counting:SINK\n")
    return folder


def infer(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "histostream.runtime.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_sink_of_another_package_is_offered_and_writes_its_file(
    site: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    assert "count,density,dicom-seg" in infer(site, "--help").stdout
    slide = write_slide(tmp_path / "slide.tif", random_pixels(300, 200))
    out = tmp_path / "out"
    options = ("--model", tiny_bundle, "--backend", "cpu", "--no-tissue", "--rasters", "count")
    done = infer(site, slide, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert (out / "slide" / "labels.count").read_text() == str(300 * 200)
    bounded = infer(site, slide, "--out", out, *options, "--max-memory", "2GiB", "--restart")
    assert bounded.returncode == 0, bounded.stderr


def test_every_kind_is_found_by_its_file() -> None:
    for option in sinks.OPTIONS:
        for name in sink_names(option):
            assert isinstance(find_sink(option, name), SinkKind)
    files = [find_sink(option, name).file for option in sinks.OPTIONS for name in sink_names(option)]
    assert len(files) == len(set(files))


def test_an_unknown_kind_names_those_that_there_are() -> None:
    with pytest.raises(OptionError, match=r"objects='xls': use csv or parquet"):
        Options(objects=("xls",))
    with pytest.raises(SinkError, match="dsa or qupath"):
        find_sink("annotations", "paper")


def test_a_broken_entry_point_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = metadata.EntryPoint("rasters.gone", "no_such_package:SINK", sinks.ENTRY_POINTS)
    other = metadata.EntryPoint("rasters.other", "json:dumps", sinks.ENTRY_POINTS)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [broken, other])
    entry_points.cache_clear()
    try:
        for name in ("gone", "other"):
            with pytest.raises(SinkError, match=f"--rasters {name}: .*update or remove its package"):
                find_sink("rasters", name)
    finally:
        monkeypatch.undo()
        entry_points.cache_clear()

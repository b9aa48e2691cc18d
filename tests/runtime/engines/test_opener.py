"""Engines are found by name, those of other packages too, and the best one is chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from histostream.runtime.choices import BACKENDS, ENGINES
from histostream.runtime.engines import cpu, cuda
from histostream.runtime.engines.base import Engine
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.errors import EngineError
from tests.runtime.conftest import random_pixels, write_slide

# An engine in a package of its own: the darkest of the three channels is the label.
ENGINE = """
import numpy as np

PRECISIONS = ("fp32",)
AUTO_PRIORITY = 0
EXTRA = ""


class Darkest:
    batch = 4

    def __init__(self, card):
        self.card, self.name = card, "darkest 1.0"

    def infer(self, tiles):
        return np.ascontiguousarray(255 - np.moveaxis(tiles, -1, 1))

    def close(self):
        pass


def available_hardware():
    return "the CPU"


def open(bundle, card, *, precision, threads, device):
    return Darkest(card)


def check():
    return iter(())
"""


@pytest.fixture
def other_package(tmp_path: Path) -> dict[str, str]:
    """Install a package with an engine; returns an environment that finds it."""
    site = tmp_path / "site"
    info = site / "darkest_engine-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "darkest_engine.py").write_text(ENGINE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: darkest-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[histostream.engines]\ndarkest = darkest_engine\n")
    return {**os.environ, "PYTHONPATH": str(site)}


def test_the_files_of_the_folder_are_the_backends() -> None:
    assert BACKENDS == ("auto", "cpu", "cuda", "openvino", "tensorrt")


@pytest.mark.parametrize("name", ENGINES.names())
def test_every_engine_offers_the_same(name: str) -> None:
    module = ENGINES.load(name)
    assert "fp32" in module.PRECISIONS
    assert module.AUTO_PRIORITY >= 0
    assert isinstance(module.EXTRA, str)
    for function in ("open", "available_hardware", "check"):
        assert callable(getattr(module, function))


def test_an_engine_of_another_package_runs_a_slide(
    tmp_path: Path, tiny_bundle: Path, other_package: dict[str, str]
) -> None:
    import tifffile

    pixels = random_pixels(300, 200)
    slide = write_slide(tmp_path / "slide.tif", pixels)
    command = [
        sys.executable,
        "-m",
        "histostream.runtime.cli",
        str(slide),
        "--model",
        str(tiny_bundle),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--backend", "darkest", "--no-tissue"]
    done = subprocess.run(command, env=other_package, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    labels = tifffile.imread(tmp_path / "out" / "slide" / "labels.tif", level=0)
    np.testing.assert_array_equal(labels, pixels.argmin(axis=-1))
    run = json.loads((tmp_path / "out" / "slide" / "run.json").read_text())
    assert "darkest 1.0" in json.dumps(run)


def test_an_engine_of_another_package_is_offered_by_the_command(other_package: dict[str, str]) -> None:
    command = [sys.executable, "-m", "histostream.runtime.cli", "slide.svs", "--backend", "nothing"]
    done = subprocess.run(command, env=other_package, capture_output=True, text=True, check=False)
    assert "'darkest'" in done.stderr


def test_a_precision_that_an_engine_does_not_offer_names_one_that_does(tiny_bundle: Path) -> None:
    for backend in ("auto", "cpu"):
        with pytest.raises(EngineError, match=f"bf16 is not offered by {backend}: pass --backend openvino"):
            open_engine(tiny_bundle, backend=backend, precision="bf16")


def test_auto_takes_the_engine_of_the_highest_priority_that_can_be_opened(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(cuda, "available_hardware", lambda: "a GPU")
    monkeypatch.setattr(cuda, "open", cpu.open)
    assert isinstance(open_engine(tiny_bundle, say=lines.append), Engine)
    assert lines[0].endswith("(a GPU is here)")


def test_auto_falls_back_to_the_cpu_and_says_why(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> Engine:
        raise EngineError("no cuDNN")

    lines: list[str] = []
    monkeypatch.setattr(cuda, "available_hardware", lambda: "a GPU")
    monkeypatch.setattr(cuda, "open", refuse)
    open_engine(tiny_bundle, say=lines.append)
    assert lines[0].endswith("cpu fp32 (the GPU cannot be used)")
    assert "a GPU is here but cannot be used, running on the CPU: cuda: no cuDNN" in caplog.text


def test_an_engine_without_its_library_names_the_extra(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"backend 'openvino' needs a package .*\[openvino\]"):
        open_engine(tiny_bundle, backend="openvino")

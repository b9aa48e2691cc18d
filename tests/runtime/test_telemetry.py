"""Nothing is written or sent beside the results: the libraries' telemetry is off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from histostream.runtime import default_bundle
from tests.runtime.conftest import random_pixels, write_slide

MODEL = default_bundle() / "model.onnx"
OPEN = f"import onnxruntime; onnxruntime.InferenceSession({str(MODEL)!r})"


def run_at_home(home: Path, *command: str) -> list[str]:
    """Run Python with an empty HOME and no CI variable; return the files that are in it then."""
    home.mkdir()
    silencers = {"CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY"}
    environment = {
        name: value for name, value in os.environ.items() if name not in silencers and not name.startswith("XDG_")
    }
    environment |= {"HOME": str(home), "TMPDIR": str(home.parent)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=home.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file())


def test_a_run_leaves_the_home_folder_empty(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "slide.tif", random_pixels(300, 300))
    arguments = (str(slide), "--out", str(tmp_path / "out"), "--no-tissue")
    assert run_at_home(tmp_path / "home", "-m", "histostream.runtime.cli", *arguments) == []
    assert (tmp_path / "out" / "slide" / "labels.tif").is_file()


@pytest.mark.parametrize("package", ["runtime", "export", "benchmarks"])
def test_importing_any_package_first_switches_the_library_off(package: str, tmp_path: Path) -> None:
    code = f"import histostream.{package}; {OPEN}"
    assert run_at_home(tmp_path / "home", "-c", code) == []


def test_without_us_the_library_writes_a_device_id(tmp_path: Path) -> None:
    """If this fails, ONNX Runtime has changed: the tests above may prove nothing any more."""
    if not sys.platform.startswith("linux"):
        pytest.skip("elsewhere it writes to other places")
    found = run_at_home(tmp_path / "home", "-c", OPEN)
    assert any(name.endswith("deviceid") for name in found)

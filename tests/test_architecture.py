"""The shape of the project: who imports whom, what is shipped, what is public."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED: dict[str, set[str]] = {
    "wsi": set(),
    "runtime": {"wsi"},
    "training": {"wsi"},
    "export": {"training", "runtime", "wsi"},
    "benchmarks": {"wsi", "runtime", "training", "export"},
}
PUBLIC = ("histostream.wsi", "histostream.runtime")


def imported_names(source: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no sources in {folder}"
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_downwards(folder: str) -> None:
    for source in sources(folder):
        used = {n.split(".")[1] for n in imported_names(source) if n.startswith("histostream.")}
        upward = used - ALLOWED[folder] - {folder}
        assert not upward, f"{source.relative_to(ROOT)} imports {sorted(upward)}"


@pytest.mark.parametrize("folder", ["wsi", "runtime"])
def test_a_deployment_needs_no_torch_and_no_onnx(folder: str) -> None:
    for source in sources(folder):
        roots = {name.split(".")[0] for name in imported_names(source)}
        assert not roots & {"torch", "onnx", "safetensors"}, source


def test_every_package_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = set(project["tool"]["setuptools"]["packages"])
    present = {
        "histostream." + init.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for folder in ALLOWED
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert shipped == present


@pytest.mark.parametrize("folder", ALLOWED)
def test_every_folder_is_typed(folder: str) -> None:
    assert (ROOT / folder / "py.typed").exists()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_exactly_those_listed(name: str) -> None:
    module = importlib.import_module(name)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("histostream.")
        for alias in node.names
    }
    assert set(module.__all__) == imported
    assert len(module.__all__) == len(imported)


def test_importing_the_runtime_loads_no_heavy_library() -> None:
    code = (
        "import sys, histostream.runtime.cli, histostream.runtime.crf; heavy = "
        "{'torch', 'onnx', 'onnxruntime', 'large_image', 'numba'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_loads_slide_libraries_only_when_it_reads_slides() -> None:
    code = (
        "import sys, histostream.training.loop, histostream.training.cli; "
        "print(sorted({'large_image', 'openslide', 'tifffile'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_deployment_install_brings_no_torch() -> None:
    needed = [text for text in metadata.requires("histostream") or [] if "extra ==" not in text]
    names = {re.split(r"[ <>=;\[~!]", text)[0].lower() for text in needed}
    assert {"numpy", "large-image", "click"} <= names
    assert not names & {"torch", "onnx", "safetensors", "openvino", "tensorrt"}


def test_onnxruntime_is_named_once_on_every_platform() -> None:
    from packaging.markers import Marker

    needed = [text for text in metadata.requires("histostream") or [] if "extra ==" not in text]
    for system, machine in (("linux", "x86_64"), ("win32", "AMD64"), ("darwin", "arm64"),
                            ("linux", "aarch64")):  # fmt: skip
        here = {"sys_platform": system, "platform_machine": machine}
        runtimes = [
            text for text in needed
            if text.startswith("onnxruntime") and Marker(text.split(";")[1]).evaluate(here)
        ]  # fmt: skip
        assert len(runtimes) == 1, (system, machine, runtimes)


def test_the_wheel_holds_the_model_and_the_recipes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in ALLOWED:
        shutil.copytree(ROOT / folder, tree / folder)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tree / done.stdout.splitlines()[-1]) as wheel:
        names = set(wheel.namelist())
    assert {
        "histostream/runtime/kernels.cu",
        "histostream/runtime/models/nuclei/card.json",
        "histostream/runtime/models/nuclei/model.onnx",
        "histostream/training/weights/imems/checkpoint.safetensors",
        "histostream/training/recipes/nuclei.toml",
        "histostream/wsi/py.typed",
        "histostream/runtime/viewer/static/index.html",
        "histostream/runtime/viewer/static/openseadragon/LICENSE.txt",
        "histostream/runtime/viewer/static/openseadragon/openseadragon.min.js",
    } <= names
    assert all(name.startswith("histostream") for name in names)

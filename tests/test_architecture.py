"""The shape of the project: who imports whom, what is shipped, what is public."""

from __future__ import annotations

import ast
import graphlib
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ALLOWED: dict[str, set[str]] = {
    "wsi": set(),
    "runtime": {"wsi"},
    "training": {"wsi"},
    "export": {"training", "runtime", "wsi"},
    "benchmarks": {"wsi", "runtime", "training", "export"},
}
PUBLIC = ("histostream.wsi", "histostream.runtime", "histostream.training", "histostream.export")


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


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name, without the name of the distribution."""
    named = {".".join(s.relative_to(ROOT).with_suffix("").parts): s for f in ALLOWED for s in sources(f)}
    return {name.removesuffix(".__init__"): source for name, source in named.items()}


def imports_between_modules() -> dict[str, set[str]]:
    """Module -> the product's modules that it imports, those imported inside functions included."""
    known = modules()
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, source in known.items():
        for imported in imported_names(source):
            parts = imported.removeprefix("histostream.").split(".")
            candidates = (".".join(parts[:n]) for n in (len(parts), len(parts) - 1))
            target = next((each for each in candidates if each in known), name)
            if target != name:
                graph[name].add(target)
    return graph


def sub_package(module: str) -> str:
    """Return the part of the layout that a module belongs to: a folder such as runtime.crf, or itself."""
    folder = ".".join(module.split(".")[:2])
    return folder if (ROOT / folder.replace(".", "/")).is_dir() else module


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"circle of imports: {' -> '.join(error.args[1])}")


def test_modules_import_each_other_in_no_circle() -> None:
    graph = imports_between_modules()
    assert sum(map(len, graph.values())) > 500, "the imports were not found"
    assert_no_circle(graph)


def test_sub_packages_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in imports_between_modules().items():
        if module in ALLOWED:  # a package's own __init__ names its parts, for whoever imports from it
            continue
        targets = {sub_package(each) for each in imported - set(ALLOWED)}
        graph.setdefault(sub_package(module), set()).update(targets - {sub_package(module)})
    assert_no_circle(graph)


def test_a_circle_would_be_found() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"a -> b -> a|b -> a -> b"):
        assert_no_circle({"a": {"b"}, "b": {"a"}})


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
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))  # by a type checker
    typed = {
        (str(node.module).removeprefix(f"{name}."), alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    imported = {(home, each) for home, names in module._MODULES.items() for each in names}
    assert imported == typed
    assert sorted(module.__all__) == sorted(each for _, each in imported)
    for each in module.__all__:
        assert getattr(module, each) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


HEAVY = ("torch", "onnx", "onnxruntime", "large_image", "numba", "scipy", "matplotlib")
SLOW = ("numpy", "rich", "PIL", "tifffile", "imagecodecs")  # a tenth of a second and more


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("histostream.runtime.command, histostream.runtime.crf", HEAVY),
        ("histostream.runtime.cli", HEAVY + SLOW),
        ("histostream.training.cli", HEAVY + SLOW),
        ("histostream.export.cli", HEAVY + SLOW),
        ("histostream.benchmarks.cli", HEAVY + SLOW),
    ],
)
def test_libraries_are_loaded_when_they_are_needed(modules: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {modules}; print(sorted(set({absent}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_loads_slide_libraries_only_when_it_reads_slides() -> None:
    code = (
        "import sys, histostream.training.loop, histostream.training.command; "
        "print(sorted({'large_image', 'openslide', 'tifffile'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def needed_by(*extras: str) -> set[str]:
    """Names of the packages that an installation with these extras asks for itself."""
    return {
        requirement.name.lower()
        for requirement in map(Requirement, metadata.requires("histostream") or [])
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    }


def test_a_deployment_install_brings_no_torch() -> None:
    assert {"numpy", "large-image", "click"} <= needed_by()
    assert not needed_by() & {"torch", "onnx", "safetensors", "openvino", "tensorrt"}
    assert not needed_by("cpu") & {"torch", "onnx", "safetensors", "openvino", "tensorrt"}


def test_onnxruntime_comes_once_by_the_extra_that_was_chosen() -> None:
    """onnxruntime and onnxruntime-gpu overwrite each other's files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    both = {"onnxruntime", "onnxruntime-gpu"}
    assert not needed_by() & both
    assert needed_by("cpu") & both == {"onnxruntime"}
    assert needed_by("cuda") & both == {"onnxruntime-gpu"}
    for extra in set(project["optional-dependencies"]) - {"cpu", "cuda"}:
        assert not needed_by(extra) & both, extra


def test_the_wheel_holds_the_model_and_the_recipes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in ALLOWED:
        shutil.copytree(ROOT / folder, tree / folder)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tree / done.stdout.splitlines()[-1]) as wheel:
        names = set(wheel.namelist())
    assert {
        "histostream/runtime/cuda/kernels.cu",
        "histostream/runtime/models/nuclei/card.json",
        "histostream/runtime/models/nuclei/model.onnx",
        "histostream/training/weights/imems/checkpoint.safetensors",
        "histostream/training/methods/imems/nuclei.toml",
        "histostream/wsi/py.typed",
        "histostream/runtime/viewer/static/index.html",
        "histostream/runtime/viewer/static/openseadragon/LICENSE.txt",
        "histostream/runtime/viewer/static/openseadragon/openseadragon.min.js",
    } <= names
    assert all(name.startswith("histostream") for name in names)

"""Methods, data sets and recipes are found by name, in the folders and in other packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from histostream.training import open_dataset
from histostream.training.datasets import DATASETS
from histostream.training.methods import DEFAULTS, METHODS, MethodError, hook, load_method, recipes
from histostream.wsi.registry import entry_points

METHOD_FOLDERS = Path(__file__).parents[2] / "training" / "methods"


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with a method and a data set, as pip would install it."""
    (tmp_path / "colours.py").write_text("Config = int\n")
    (tmp_path / "pebbles.py").write_text(
        "from histostream.training.datasets import folder\n"
        "def read(path, *, side: int = 1):\n"
        "    return folder.read(path / str(side))\n"
    )
    info = tmp_path / "colours-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: colours\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[histostream.methods]\ncolours = colours\n[histostream.datasets]\npebbles = pebbles\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry_points.cache_clear()
    yield
    entry_points.cache_clear()


@pytest.mark.usefixtures("other_package")
def test_another_package_adds_a_method_and_a_data_set(nuclei_folder: Path, tmp_path: Path) -> None:
    assert {"colours", "imems"} <= set(METHODS.names())
    assert load_method("colours").Config is int
    assert {"pebbles", "glas"} <= set(DATASETS.names())
    (tmp_path / "stones").mkdir()
    (tmp_path / "stones" / "3").symlink_to(nuclei_folder)
    assert len(open_dataset(f"pebbles:{tmp_path / 'stones'}?side=3").train) == 8


def test_methods_are_the_folders_and_unknown_ones_are_refused() -> None:
    folders = {path.parent.name for path in METHOD_FOLDERS.glob("*/method.py")}
    assert len(folders) == 5
    assert set(METHODS.names()) == folders
    with pytest.raises(MethodError, match="did you mean 'apma_net'"):
        load_method("apmanet")


def test_the_names_of_recipes_are_unique() -> None:
    files = sorted(path.stem for path in METHOD_FOLDERS.glob("*/*.toml"))
    assert files == sorted(recipes())


@pytest.mark.parametrize("name", METHODS.names())
def test_no_method_repeats_a_default(name: str) -> None:
    method = load_method(name)
    for function in DEFAULTS:
        assert callable(hook(method, function))
    assert all(callable(getattr(method, f)) for f in ("build", "step", "validate", "align_px", "deployed"))

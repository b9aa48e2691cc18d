"""The command that a message advises is one that works for this installation."""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from histostream.runtime.errors import EngineError
from histostream.wsi import optional
from histostream.wsi.errors import OutputError
from tests.conftest import REPOSITORY


class Distribution:
    """What pip recorded of an installation; PEP 610 has the forms."""

    def __init__(self, origin: dict[str, Any] | None) -> None:
        self._origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self._origin is None else json.dumps(self._origin)


@pytest.fixture
def pip_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a project folder, with the environment's own pip first on PATH."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(pip.with_name("python")))
    monkeypatch.setenv("PATH", str(pip.parent))
    return folder


@pytest.mark.parametrize(
    ("origin", "requirement"),
    [
        (None, "'histostream[crf]'"),  # from the package index
        ({"url": "file://{here}", "dir_info": {}}, "'.[crf]'"),
        ({"url": "file://{here}", "dir_info": {"editable": True}}, "--editable '.[crf]'"),
        ({"url": "file:///some%20where", "dir_info": {}}, "'/some where[crf]'"),
        (
            {"url": "file:///d/histostream-1-py3-none-any.whl", "archive_info": {}},
            "'histostream[crf] @ file:///d/histostream-1-py3-none-any.whl'",
        ),
        (
            {"url": "https://host/h.git", "vcs_info": {"vcs": "git", "commit_id": "0a"}},
            "'histostream[crf] @ git+https://host/h.git'",
        ),
    ],
)
def test_the_command_names_where_histostream_came_from(
    origin: dict[str, Any] | None,
    requirement: str,
    pip_on_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if origin is not None:
        origin = {**origin, "url": origin["url"].format(here=pip_on_path)}
    recorded = [Distribution(None), Distribution(origin)]  # a checkout's egg-info comes first
    monkeypatch.setattr(metadata, "distributions", lambda name: recorded)
    assert optional.install_command("crf") == f"pip install {requirement}"


def test_another_pip_on_the_path_is_not_advised(pip_on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert optional.install_command("crf").startswith(f"{sys.executable} -m pip install ")


def test_an_engine_is_exchanged_by_one_pip(pip_on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # another environment's pip would remove another's
    installed = {"onnxruntime": [Distribution(None)]}
    monkeypatch.setattr(metadata, "distributions", lambda name: installed.get(name, []))
    pip = f"{sys.executable} -m pip"
    assert optional.engine_command("cuda") == (
        f"{pip} uninstall --yes onnxruntime && {pip} install 'histostream[cuda]'"
    )


def test_a_missing_package_is_named_with_its_extra() -> None:
    optional.require("json", "this needs", "tables")
    with pytest.raises(OutputError, match=r"^this needs no_such_module: .*pip install .*tables"):
        optional.require("no_such_module", "this needs", "tables")
    with pytest.raises(EngineError, match="no_such_module"):
        optional.require("no_such_module", "that needs", "ray", EngineError)


def test_here_the_command_resolves_to_this_project() -> None:
    """pip itself takes the requirement apart, as it would when the command is typed."""
    from packaging.requirements import InvalidRequirement, Requirement

    command = optional.install_command("crf", "tables")
    requirement = command.split("'")[1]
    try:
        found = Requirement(requirement)
    except InvalidRequirement:  # a folder
        folder, _, extras = requirement.partition("[")
        assert (Path(folder) / "pyproject.toml").is_file()
        assert extras == "crf,tables]"
    else:
        assert found.name == "histostream"
        assert found.extras == {"crf", "tables"}


def test_every_extra_that_a_message_advises_exists() -> None:
    """Read the literal arguments of `install_command`, `require` and `SinkKind` from the source."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    advised = set()
    for folder in ("wsi", "runtime", "training", "export", "benchmarks"):
        for source in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                    continue
                if node.func.id == "install_command":
                    advised |= {a.value for a in node.args if isinstance(a, ast.Constant)}
                elif node.func.id == "require" and isinstance(node.args[2], ast.Constant):
                    advised.add(node.args[2].value)
                elif node.func.id == "SinkKind":
                    advised |= {k.value.value for k in node.keywords if k.arg == "extra"}  # type: ignore[attr-defined]
    assert len(advised) > 8
    assert advised <= set(project["optional-dependencies"])

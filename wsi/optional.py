"""Optional packages, and the command that installs them into this installation."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from histostream.wsi.errors import HistoError, OutputError

DISTRIBUTION = "histostream"
ENGINES = ("onnxruntime", "onnxruntime-gpu")


def require(module: str, purpose: str, extra: str, error: Callable[[str], HistoError] = OutputError) -> None:
    """Check that an optional package is installed, without importing it.

    Parameters
    ----------
    module
        Top-level module, as ``pyarrow``.
    purpose
        Begin of the message, as ``objects.parquet needs``.
    extra
        Extra of HistoStream that installs it.
    error
        Class of the error.

    Raises
    ------
    HistoError
        If the package is missing; the message names the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise error(f"{purpose} {module}: {install_command(extra)}")


def install_command(*extras: str) -> str:
    """Return the command that adds extras to this installation of HistoStream.

    If HistoStream was installed from a checkout, a wheel file or a repository, the command names that
    origin, as ``pip install '.[crf]'``. pip records it in ``direct_url.json`` (PEP 610); without that
    record HistoStream came from the package index.
    """
    suffix = f"[{','.join(extras)}]" if extras else ""
    return f"{_pip()} install {_requirement(suffix)}"


def engine_command(extra: str) -> str:
    """Return the command that installs the extra ``cpu`` or ``cuda``.

    The two packages of ONNX Runtime overwrite each other's files, so an installed one is removed first.
    """
    packages = [name for name in ENGINES if any(metadata.distributions(name=name))]
    remove = f"{_pip()} uninstall --yes {' '.join(packages)} && " if packages else ""
    return f"{remove}{install_command(extra)}"


def either_engine() -> str:
    """Return the commands of which either installs an engine."""
    return f"{install_command('cpu')}, or {install_command('cuda')} for an NVIDIA GPU"


def _pip() -> str:
    """Return ``pip`` if the shell's own pip installs for this interpreter, else ``PYTHON -m pip``."""
    pip = shutil.which("pip")
    if pip is not None and Path(pip).parent == Path(sys.executable).parent:
        return "pip"
    return f"{_shortest(Path(sys.executable))} -m pip"


def _requirement(extras: str) -> str:
    origin = _origin()
    url, editable = origin.get("url", ""), origin.get("dir_info", {}).get("editable", False)
    if not url:
        return f"'{DISTRIBUTION}{extras}'"
    if "vcs_info" in origin:
        return f"'{DISTRIBUTION}{extras} @ {origin['vcs_info']['vcs']}+{url}'"
    if "dir_info" not in origin:
        return f"'{DISTRIBUTION}{extras} @ {url}'"
    folder = _shortest(Path(url2pathname(unquote(urlsplit(url).path))))
    return f"{'--editable ' if editable else ''}'{folder}{extras}'"


def _origin() -> dict[str, Any]:
    """Return pip's record of where HistoStream came from; {} without a record."""
    # In a checkout, setuptools' egg-info comes first on the path, and has no such record.
    for distribution in metadata.distributions(name=DISTRIBUTION):
        if text := distribution.read_text("direct_url.json"):
            origin = json.loads(text)
            return origin if isinstance(origin, dict) else {}
    return {}


def _shortest(path: Path) -> str:
    """Return a path relative to the working directory if it lies in it, else as it is."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return os.fspath(path)

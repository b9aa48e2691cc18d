"""Packages that only some features need, and the command that installs them here."""

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
        What needs it, as ``objects.parquet needs``; begins the message.
    extra
        The extra of HistoStream that brings it.
    error
        Makes the exception from its message.

    Raises
    ------
    HistoError
        Of the kind ``error``, if the package is missing; the message names the command to type.
    """
    if importlib.util.find_spec(module) is None:
        raise error(f"{purpose} {module}: {install_command(extra)}")


def install_command(*extras: str) -> str:
    """Return the command that adds extras to this installation of HistoStream.

    How HistoStream was installed decides what works: ``pip install 'histostream[crf]'`` finds
    nothing where it came from a checkout, a wheel file or a repository. pip records the origin in
    ``direct_url.json`` (PEP 610); without that record it came from the package index.

    Parameters
    ----------
    extras
        Names of extras in pyproject.toml.

    Returns
    -------
    A shell command, as ``pip install '.[crf]'``.
    """
    wanted = f"[{','.join(extras)}]" if extras else ""
    return f"{_pip()} install {_requirement(wanted)}"


def engine_command(extra: str) -> str:
    """Return the command that makes ``cpu`` or ``cuda`` the engine of this installation.

    The two packages of ONNX Runtime overwrite each other's files: what is there goes first.
    """
    packages = [name for name in ENGINES if any(metadata.distributions(name=name))]
    remove = f"{_pip()} uninstall --yes {' '.join(packages)} && " if packages else ""
    return f"{remove}{install_command(extra)}"


def either_engine() -> str:
    """Return the two commands of which one installs an engine."""
    return f"{install_command('cpu')}, or {install_command('cuda')} for an NVIDIA GPU"


def _pip() -> str:
    """Return ``pip`` if the shell's own pip installs for this interpreter, else how to call it."""
    here = Path(sys.executable).parent
    found = shutil.which("pip")
    if found is not None and Path(found).parent == here:
        return "pip"
    return f"{_shortest(Path(sys.executable))} -m pip"


def _requirement(wanted: str) -> str:
    origin = _origin()
    url, editable = origin.get("url", ""), origin.get("dir_info", {}).get("editable", False)
    if not url:
        return f"'{DISTRIBUTION}{wanted}'"
    if "vcs_info" in origin:
        return f"'{DISTRIBUTION}{wanted} @ {origin['vcs_info']['vcs']}+{url}'"
    if "dir_info" not in origin:
        return f"'{DISTRIBUTION}{wanted} @ {url}'"
    folder = _shortest(Path(url2pathname(unquote(urlsplit(url).path))))
    return f"{'--editable ' if editable else ''}'{folder}{wanted}'"


def _origin() -> dict[str, Any]:
    """Return what pip recorded of where HistoStream came from; {} without a record."""
    # In a checkout, setuptools' egg-info comes first on the path, and has no such record.
    for distribution in metadata.distributions(name=DISTRIBUTION):
        if text := distribution.read_text("direct_url.json"):
            found = json.loads(text)
            return found if isinstance(found, dict) else {}
    return {}


def _shortest(path: Path) -> str:
    """Return a path relative to the working directory if it lies in it, else the whole path."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return os.fspath(path)

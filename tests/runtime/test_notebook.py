"""The notebook of the docs runs from its first cell to its last, and is kept as it came out."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.full

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    kept = nbformat.read(NOTEBOOK, as_version=4)
    run = NotebookClient(
        nbformat.from_dict(kept), timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    for before, now in zip(kept.cells, run.cells, strict=True):
        if now.cell_type != "code":
            continue
        # What came out is there for readers on the web.
        assert kinds(before) == kinds(now), now.source


def kinds(cell: nbformat.NotebookNode) -> list[list[str]]:
    return [sorted(out.get("data", [out.get("name")])) for out in cell.outputs]

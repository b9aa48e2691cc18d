"""Reports of results that are there already, also of those of older versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from histostream.runtime.record import read_run
from histostream.runtime.report import REPORT
from histostream.runtime.report.slide import slide_report
from histostream.wsi.errors import HistoError
from histostream.wsi.sink import write_whole


class ReportError(HistoError, ValueError):
    """A folder holds no results that a report could be made of."""


def write_report(folder: Path) -> Path:
    """Make ``report.html`` of a slide's results again.

    Of what run.json and summary.json say, only what is there and of its kind is told; no file that
    they name is opened.

    Parameters
    ----------
    folder
        Where run.json, summary.json and overview.png are; the latter two may be missing.

    Returns
    -------
    The report.

    Raises
    ------
    ReportError
        If there is no run.json, or it is broken.
    OutputError
        If the report cannot be written.
    """
    run = read_run(folder)
    if run is None:
        raise ReportError(f"{folder}: no results (no run.json that can be read); run histo-infer")
    text = slide_report(run, read_summary(folder), folder / "overview.png")
    write_whole(folder / REPORT, text)
    return folder / REPORT


def read_summary(folder: Path) -> dict[str, Any]:
    """Return what the summary.json of an output folder says; nothing if it cannot be read."""
    try:
        said = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}

"""Reports of results that are there already, also of those of older versions."""

from __future__ import annotations

from pathlib import Path

from histostream.runtime.record import read_json, read_run
from histostream.runtime.report import REPORT
from histostream.runtime.report.cohort import CohortReport, CohortSlide, cohort_slide
from histostream.runtime.report.said import Said
from histostream.runtime.report.slide import slide_report
from histostream.wsi.errors import HistoError
from histostream.wsi.sink import write_whole
from histostream.wsi.staging import is_plain

WITH_RESULT = ("done", "damaged", "unchanged")  # statuses of slides that have results of that run


class ReportError(HistoError, ValueError):
    """A folder holds no results that a report could be made of."""


def write_report(folder: Path) -> Path:
    """Make ``report.html`` of a slide's results again, or of a cohort's.

    Of what the files say, only what is there and of its kind is told; no file that they name is
    opened, but for the folders of a cohort's slides, which are inside of its own.

    Parameters
    ----------
    folder
        Where run.json, summary.json and overview.png are, of which the latter two may be missing;
        or cohort.json, and the slides' folders.

    Returns
    -------
    The report.

    Raises
    ------
    ReportError
        If there is neither a run.json nor a cohort.json, or it is broken.
    OutputError
        If the report cannot be written.
    """
    run = read_run(folder)
    if run is not None:
        text = slide_report(run, read_json(folder / "summary.json") or {}, folder / "overview.png")
    else:
        text = _cohort_report(folder)
    write_whole(folder / REPORT, text)
    return folder / REPORT


def _cohort_report(folder: Path) -> str:
    said = Said(read_json(folder / "cohort.json"))
    if not said.at("slides"):
        raise ReportError(
            f"{folder}: no results (no run.json or cohort.json that can be read); run histo-infer"
        )
    when = {name: said.text(name) for name in ("host", "started", "updated")}
    slides = [_cohort_slide(folder, line) for line in said.at("slides")]
    return CohortReport(folder).text(slides, **when)


def _cohort_slide(folder: Path, line: Said) -> CohortSlide:
    name, status = line.text("name"), line.text("status")
    # The name is that of a folder: one that leads elsewhere has no results here.
    at = folder / name if is_plain(name) and status in WITH_RESULT else None
    return cohort_slide(
        name, line.text("path"), status, line.text("reason"),
        None if at is None else read_run(at),
        None if at is None else read_json(at / "summary.json"),
    )  # fmt: skip

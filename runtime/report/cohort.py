"""The report of a cohort: the status of each slide, areas of the classes over all slides, and speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from histostream.runtime.report import REPORT
from histostream.runtime.report.distribution import FLOOR, Distribution, distribution
from histostream.runtime.report.json_view import JsonView
from histostream.runtime.report.page import render
from histostream.runtime.report.picture import THUMBNAIL_PX, Picture, read_picture
from histostream.runtime.report.slide import Share, shares_of

# Statuses of `histostream.runtime.cohort.worker`, those that need attention first.
WORST_FIRST = ("failed", "damaged", "stopped", "elsewhere", "not begun", "done", "unchanged")
WELL = ("done", "unchanged")
MAX_PICTURES = 200  # of 10 kB
READERS = 2  # threads; reading an overview takes 60 ms and 12 MB
MAX_TROUBLES = 100  # slides listed under "Needs attention"; the table has all
MAX_CLASSES = 8  # classes with columns and plots of their own
MAX_SHARES = 16  # classes in the bar of a slide


@dataclass(frozen=True, slots=True)
class CohortSlide:
    """A slide of a cohort, as its row of the table shows it.

    Attributes
    ----------
    name
        Name of its folder of results.
    status, reason
        Its status, and why it has this status.
    classes
        Area and share of each class; empty without a result.
    analysed_mm2, mpx, seconds, mpx_per_s
        From summary.json and run.json, of the run that made the result.
    damaged
        Number of damaged blocks.
    size
        Width and height of the label map in pixels; (0, 0) without a result.
    """

    name: str
    status: str
    reason: str
    classes: tuple[Share, ...] = ()
    analysed_mm2: float | None = None
    mpx: float | None = None
    seconds: float | None = None
    mpx_per_s: float | None = None
    damaged: int = 0
    size: tuple[int, int] = (0, 0)

    @property
    def has_result(self) -> bool:
        """Whether the slide has a label map."""
        return self.size != (0, 0)

    @property
    def bar(self) -> str:
        """CSS background that shows the shares of the classes from left to right."""
        stops, end = [], 0.0
        for entry in self.classes[:MAX_SHARES]:
            end += 100 * min(1.0, max(0.0, entry.share or 0.0))
            stops.append(f"{entry.color} 0 {end:.1f}%")
        return f"linear-gradient(90deg,{','.join([*stops, 'transparent 0'])})"

    def share_of(self, name: str) -> Share | None:
        """Return the area of a class; None if the slide does not have this class."""
        return next((entry for entry in self.classes if entry.name == name), None)


@dataclass(frozen=True, slots=True)
class ClassOverSlides:
    """A class over all slides: its area and share, and median and distribution of its shares of the slides."""

    name: str
    color: str
    area_mm2: float
    share: float | None
    median: float | None
    plot: Distribution | None


def cohort_slide(
    name: str, status: str, reason: str, run: Mapping[str, Any] | None, summary: Mapping[str, Any] | None
) -> CohortSlide:
    """Return a slide with the contents of its run.json and summary.json, if it has them."""
    run_view, summary_view = JsonView(run), JsonView(summary)
    width, height = (int(summary_view.number(f"{side}_px") or 0) for side in ("width", "height"))
    return CohortSlide(
        name,
        status,
        " ".join(reason.split()),
        tuple(shares_of(summary_view)),
        summary_view.number("analysed_mm2"),
        run_view.number("mpx"),
        run_view.number("seconds", "total"),
        run_view.number("mpx_per_s"),
        len(run_view.at("damaged")),
        (width, height) if run and width > 0 and height > 0 else (0, 0),
    )


class CohortReport:
    """The report of a cohort, written several times during a run; each overview is read once.

    Parameters
    ----------
    folder
        Folder of the results.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pictures: dict[str, Picture] = {}
        self._with_report: set[str] = set()

    def text(self, slides: Sequence[CohortSlide], *, host: str, started: str, updated: str) -> str:
        """Return the page as HTML.

        Parameters
        ----------
        slides
            All slides of the cohort, in the order of the inputs.
        host, started, updated
            Name of the machine, and times in ISO 8601, as in cohort.json.
        """
        ordered = sorted(slides, key=lambda slide: _rank(slide.status))
        results = [slide for slide in ordered if slide.has_result]
        classes = _classes(results)
        pictured = results[:MAX_PICTURES]
        self._read_pictures(pictured)
        # Results of older versions have no report of their own.
        unlinked = [slide.name for slide in results if slide.name not in self._with_report]
        self._with_report |= {name for name in unlinked if (self._folder / name / REPORT).is_file()}
        rates = [s.mpx_per_s for s in results if s.mpx_per_s and s.mpx_per_s > 0]
        times = [1 / rate for rate in rates]  # seconds per Mpx
        troubles = [s for s in ordered if s.status not in WELL or s.damaged]
        return render(
            "cohort.html",
            css_class=lambda status: status.replace(" ", "-") if status in WORST_FIRST else "failed",
            name=self._folder.resolve().name or str(self._folder),
            counts=Counter(slide.status for slide in ordered),
            results=len(results),
            analysed_mm2=sum(s.analysed_mm2 or 0.0 for s in results),
            mpx=sum(s.mpx or 0.0 for s in results),
            seconds=sum(s.seconds or 0.0 for s in results),
            listed={slide.name for slide in troubles[:MAX_TROUBLES]},
            well=WELL,
            with_report=self._with_report,
            damaged=any(slide.damaged for slide in slides),
            floor=FLOOR,
            troubles=troubles[:MAX_TROUBLES],
            troubles_left=max(0, len(troubles) - MAX_TROUBLES),
            classes=classes[:MAX_CLASSES],
            classes_left=max(0, len(classes) - MAX_CLASSES),
            median_rate=median(rates) if rates else None,
            times=distribution(times) if times else None,
            median_time=median(times) if times else None,
            pictures=[(slide, self._pictures.get(slide.name)) for slide in pictured],
            pictures_left=len(results) - len(pictured),
            slides=ordered,
            host=host,
            started=started,
            updated=updated,
        )

    def _read_pictures(self, slides: Sequence[CohortSlide]) -> None:
        """Read the overviews that were not read before."""
        missing = [slide for slide in slides if slide.name not in self._pictures]
        with ThreadPoolExecutor(READERS) as pool:
            for slide, picture in zip(missing, pool.map(self._thumbnail, missing), strict=True):
                if picture is not None:
                    self._pictures[slide.name] = picture

    def _thumbnail(self, slide: CohortSlide) -> Picture | None:
        return read_picture(self._folder / slide.name / "overview.png", *slide.size, THUMBNAIL_PX)


def _rank(status: str) -> int:
    return WORST_FIRST.index(status) if status in WORST_FIRST else -1


def _classes(slides: Sequence[CohortSlide]) -> list[ClassOverSlides]:
    """Return the classes of all slides, in the order in which they first appear."""
    analysed = sum(slide.analysed_mm2 or 0.0 for slide in slides)
    by_name: dict[str, list[Share]] = {}
    for slide in slides:
        for entry in slide.classes:
            by_name.setdefault(entry.name, []).append(entry)
    classes = []
    for name, entries in by_name.items():
        shares = [entry.share for entry in entries if entry.share is not None]
        area = sum(entry.area_mm2 or 0.0 for entry in entries)
        classes.append(
            ClassOverSlides(
                name,
                entries[-1].color,
                area,
                area / analysed if analysed > 0 else None,
                median(shares) if shares else None,
                distribution(shares, limit=1.0) if shares else None,
            )
        )
    return classes

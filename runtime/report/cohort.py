"""The report of a cohort: what became of its slides, what was found in them, and how fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from histostream.runtime.report import REPORT
from histostream.runtime.report.distribution import FLOOR, Distribution, distribution
from histostream.runtime.report.json_view import JsonView, duration, figure
from histostream.runtime.report.page import render
from histostream.runtime.report.picture import THUMBNAIL_PX, Picture, read_picture
from histostream.runtime.report.slide import MM2, Share, shares_of

# Statuses of `histostream.runtime.cohort.worker`: what a reader has to see to comes first.
WORST_FIRST = ("failed", "damaged", "stopped", "elsewhere", "not begun", "done", "unchanged")
WELL = ("done", "unchanged")
MAX_PICTURES = 200  # 10 kB each
READERS = 2  # threads; an overview takes 60 ms and 12 MB
MAX_TROUBLES = 100  # that are listed at the top; all are in the table
MAX_CLASSES = 8  # that have columns and plots of their own
MAX_SHARES = 16  # that a bar in the table shows


@dataclass(frozen=True, slots=True)
class CohortSlide:
    """A slide of a cohort, as its line shows it.

    Attributes
    ----------
    name
        Of its folder, and of the line.
    source
        The slide as the user named it.
    status, reason
        What became of it, and why.
    classes
        Area and share of each class; none where there is no result.
    analysed_mm2, mpx, seconds, mpx_per_s
        As run.json and summary.json say; of the run that made the result.
    damaged
        Damaged blocks, or places.
    size
        Of the label map, in pixels; (0, 0) where there is none.
    """

    name: str
    source: str
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
        """Whether there is a label map of it."""
        return self.size != (0, 0)

    @property
    def bar(self) -> str:
        """Shares of the classes from left to right, as a background in CSS."""
        stops, at = [], 0.0
        for entry in self.classes[:MAX_SHARES]:
            at += 100 * min(1.0, max(0.0, entry.share or 0.0))
            stops.append(f"{entry.color} 0 {at:.1f}%")
        return f"linear-gradient(90deg,{','.join([*stops, 'transparent 0'])})"

    def of(self, name: str) -> Share | None:
        """Return the class of a name."""
        return next((entry for entry in self.classes if entry.name == name), None)


@dataclass(frozen=True, slots=True)
class ClassOverSlides:
    """A class in all slides together, and from slide to slide; None where nothing is known."""

    name: str
    color: str
    area_mm2: float
    share: float | None
    median: float | None
    plot: Distribution | None


def cohort_slide(
    name: str,
    source: str,
    status: str,
    reason: str,
    run: Mapping[str, Any] | None,
    summary: Mapping[str, Any] | None,
) -> CohortSlide:
    """Return a slide of what its run.json and summary.json say, where there are any."""
    ran, found = JsonView(run), JsonView(summary)
    width, height = (int(found.number(f"{side}_px") or 0) for side in ("width", "height"))
    return CohortSlide(
        name,
        source,
        status,
        " ".join(reason.split()),
        tuple(shares_of(found)),
        found.number("analysed_mm2"),
        ran.number("mpx"),
        ran.number("seconds", "total"),
        ran.number("mpx_per_s"),
        len(ran.at("damaged")),
        (width, height) if ran and width > 0 and height > 0 else (0, 0),
    )


class CohortReport:
    """The report of a cohort that is written again and again; pictures are read once.

    Parameters
    ----------
    folder
        Of the results.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pictures: dict[str, Picture] = {}
        self._with_report: set[str] = set()

    def text(self, slides: Sequence[CohortSlide], *, host: str, started: str, updated: str) -> str:
        """Return the page.

        Parameters
        ----------
        slides
            All slides of the cohort, in its order.
        host, started, updated
            Where and when, as cohort.json says it.
        """
        ordered = sorted(slides, key=lambda slide: _rank(slide.status))
        results = [slide for slide in ordered if slide.has_result]
        classes = _classes(results)
        shown = results[:MAX_PICTURES]
        self._read_pictures(shown)
        self._find_reports(results)
        speeds = [1 / s.mpx_per_s for s in results if s.mpx_per_s and s.mpx_per_s > 0]
        troubles = [s for s in ordered if s.status not in WELL or s.damaged]
        return render(
            "cohort.html",
            known=lambda status: status.replace(" ", "-") if status in WORST_FIRST else "failed",
            name=self._folder.resolve().name or str(self._folder),
            headline_figures=_headlines(ordered, results),
            counts=_counts(ordered),
            listed={slide.name for slide in troubles[:MAX_TROUBLES]},
            well=WELL,
            with_report=self._with_report,
            damaged=any(slide.damaged for slide in slides),
            floor=FLOOR,
            troubles=troubles[:MAX_TROUBLES],
            troubles_left=max(0, len(troubles) - MAX_TROUBLES),
            classes=classes[:MAX_CLASSES],
            classes_left=max(0, len(classes) - MAX_CLASSES),
            speeds=distribution(speeds) if speeds else None,
            speed_median=median(speeds) if speeds else None,
            pictures=[(slide, self._pictures.get(slide.name)) for slide in shown],
            pictures_left=len(results) - len(shown),
            slides=ordered,
            host=host,
            started=started,
            updated=updated,
        )

    def _find_reports(self, slides: Sequence[CohortSlide]) -> None:
        """See which slides have a report of their own: results of older versions have none."""
        self._with_report |= {
            slide.name
            for slide in slides
            if slide.name not in self._with_report and (self._folder / slide.name / REPORT).is_file()
        }

    def _read_pictures(self, slides: Sequence[CohortSlide]) -> None:
        """Read overviews that were not there before."""
        missing = [slide for slide in slides if slide.name not in self._pictures]
        with ThreadPoolExecutor(READERS) as pool:
            for slide, found in zip(missing, pool.map(self._thumbnail, missing), strict=True):
                if found is not None:
                    self._pictures[slide.name] = found

    def _thumbnail(self, slide: CohortSlide) -> Picture | None:
        path = self._folder / slide.name / "overview.png"
        return read_picture(path, *slide.size, THUMBNAIL_PX)


def _rank(status: str) -> int:
    return WORST_FIRST.index(status) if status in WORST_FIRST else -1


def _counts(slides: Iterable[CohortSlide]) -> list[tuple[str, int]]:
    counts = Counter(slide.status for slide in slides)
    return sorted(counts.items(), key=lambda entry: _rank(entry[0]))


def _headlines(slides: Sequence[CohortSlide], results: Sequence[CohortSlide]) -> list[tuple[str, str, str]]:
    failed = sum(slide.status == "failed" for slide in slides)
    mpx, seconds = (sum(getattr(s, n) or 0.0 for s in results) for n in ("mpx", "seconds"))
    speeds = [s.mpx_per_s for s in results if s.mpx_per_s]
    area = sum(s.analysed_mm2 or 0.0 for s in results)
    return [
        ("Slides", figure(len(slides)), f"{figure(len(results))} with results"),
        ("Failed", figure(failed), "reasons are below" if failed else "none"),
        ("Analysed", f"{figure(area)} {MM2}", f"{figure(mpx)} Mpx"),
        ("Time on slides", duration(seconds), f"{figure(median(speeds))} Mpx/s in the median" if speeds else ""),
    ]


def _classes(slides: Sequence[CohortSlide]) -> list[ClassOverSlides]:
    """Return the classes of all slides, in the order in which they are found."""
    known = {entry.name: entry for slide in slides for entry in slide.classes}
    analysed = sum(slide.analysed_mm2 or 0.0 for slide in slides)
    found = []
    for name, entry in known.items():
        every = [c for slide in slides for c in slide.classes if c.name == name]
        shares = [c.share for c in every if c.share is not None]
        area = sum(c.area_mm2 or 0.0 for c in every)
        found.append(
            ClassOverSlides(
                name,
                entry.color,
                area,
                area / analysed if analysed > 0 else None,
                median(shares) if shares else None,
                distribution(shares, most=1.0) if shares else None,
            )
        )
    return found

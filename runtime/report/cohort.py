"""The report of a cohort: the status of each slide, areas of the classes over all slides, and speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from histostream.runtime.outcome import DAMAGED, DONE, FAILED, LOCKED, NO_TISSUE, NOT_BEGUN, STOPPED, UNCHANGED, Outcome
from histostream.runtime.report import REPORT
from histostream.runtime.report.distribution import FLOOR, Distribution, distribution
from histostream.runtime.report.picture import THUMBNAIL_PX, Picture, read_picture
from histostream.wsi.outputs.sinks.summary import ClassSummary, SummaryRecord
from histostream.wsi.report.page import css_color, render

WORST_FIRST = (FAILED, DAMAGED, NO_TISSUE, STOPPED, LOCKED, NOT_BEGUN, DONE, UNCHANGED)
WELL = (DONE, UNCHANGED)
MAX_PICTURES = 200  # of 10 kB
READERS = 2  # threads; reading an overview takes 60 ms and 12 MB
MAX_TROUBLES = 100  # slides listed under "Needs attention"; the table has all
MAX_CLASSES = 8  # classes with columns and plots of their own
MAX_SHARES = 16  # classes in the bar of a slide


@dataclass(frozen=True, slots=True)
class ClassOverSlides:
    """A class over all slides.

    Attributes
    ----------
    area_mm2, share
        Its area, and its share of what was analysed.
    median, plot
        Median and distribution of its shares of the slides.
    objects
        Number of its objects; None where they are not counted.
    per_mm2
        Median over the slides of its objects per mm2.
    touching
        Share of its objects that are probably several that touch.
    """

    name: str
    color: tuple[int, ...]
    area_mm2: float
    share: float | None
    median: float | None
    plot: Distribution | None
    objects: int | None
    per_mm2: float | None
    touching: float | None


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

    def text(self, slides: Sequence[tuple[str, Outcome]], *, host: str, started: str, updated: str) -> str:
        """Return the page as HTML.

        Parameters
        ----------
        slides
            (name of the output folder, outcome) of all slides, in the order of the inputs.
        host, started, updated
            Name of the machine, and times in ISO 8601, as in cohort.json.
        """
        ordered = sorted(slides, key=lambda slide: _rank(slide[1].status))
        results = [
            (name, outcome.run, outcome.summary)
            for name, outcome in ordered
            if outcome.run is not None and outcome.summary is not None and outcome.summary.width_px
        ]
        runs, summaries = [run for _, run, _ in results], [summary for *_, summary in results]
        classes = _classes(summaries)
        pictured = results[:MAX_PICTURES]
        self._read_pictures([(name, summary) for name, _, summary in pictured])
        # Results of older versions have no report of their own.
        unlinked = [name for name, *_ in results if name not in self._with_report]
        self._with_report |= {name for name in unlinked if (self._folder / name / REPORT).is_file()}
        rates = [run.mpx_per_s for run in runs if run.mpx_per_s and run.mpx_per_s > 0]
        times = [1 / rate for rate in rates]  # seconds per Mpx
        troubles = [(name, o) for name, o in ordered if o.status not in WELL or o.damaged_blocks]
        return render(
            __package__,
            "cohort.html",
            css_class=lambda status: status.replace(" ", "-") if status in WORST_FIRST else FAILED,
            share_bar=share_bar,
            class_of=lambda summary, name: next((c for c in summary.classes if c.name == name), None),
            name=self._folder.resolve().name or str(self._folder),
            counts=Counter(outcome.status for _, outcome in ordered),
            with_result={name for name, *_ in results},
            analysed_mm2=sum(summary.analysed_mm2 or 0.0 for summary in summaries),
            mpx=sum(run.mpx or 0.0 for run in runs),
            seconds=sum(run.seconds.total or 0.0 for run in runs),
            listed={name for name, _ in troubles[:MAX_TROUBLES]},
            well=WELL,
            with_report=self._with_report,
            damaged=any(outcome.damaged_blocks for _, outcome in slides),
            floor=FLOOR,
            troubles=troubles[:MAX_TROUBLES],
            troubles_left=max(0, len(troubles) - MAX_TROUBLES),
            classes=classes[:MAX_CLASSES],
            counted=[entry.name for entry in classes[:MAX_CLASSES] if entry.objects is not None],
            classes_left=max(0, len(classes) - MAX_CLASSES),
            median_rate=median(rates) if rates else None,
            times=distribution(times) if times else None,
            median_time=median(times) if times else None,
            pictures=[(name, run, summary, self._pictures.get(name)) for name, run, summary in pictured],
            pictures_left=len(results) - len(pictured),
            slides=ordered,
            host=host,
            started=started,
            updated=updated,
        )

    def _read_pictures(self, slides: Sequence[tuple[str, SummaryRecord]]) -> None:
        """Read the overviews that were not read before."""
        missing = [(name, summary) for name, summary in slides if name not in self._pictures]
        with ThreadPoolExecutor(READERS) as pool:
            for (name, _), picture in zip(missing, pool.map(self._thumbnail, missing), strict=True):
                if picture is not None:
                    self._pictures[name] = picture

    def _thumbnail(self, slide: tuple[str, SummaryRecord]) -> Picture | None:
        name, summary = slide
        path = self._folder / name / "overview.png"
        return read_picture(path, summary.width_px or 0, summary.height_px or 0, THUMBNAIL_PX)


def share_bar(summary: SummaryRecord) -> str:
    """Return a CSS background that shows the shares of the classes from left to right."""
    stops, end = [], 0.0
    for entry in summary.classes[:MAX_SHARES]:
        end += 100 * min(1.0, max(0.0, entry.share or 0.0))
        stops.append(f"{css_color(entry.color)} 0 {end:.1f}%")
    return f"linear-gradient(90deg,{','.join([*stops, 'transparent 0'])})"


def _rank(status: str) -> int:
    return WORST_FIRST.index(status) if status in WORST_FIRST else -1


def _classes(summaries: Sequence[SummaryRecord]) -> list[ClassOverSlides]:
    """Return the classes of all slides, in the order in which they first appear."""
    analysed = sum(summary.analysed_mm2 or 0.0 for summary in summaries)
    by_name: dict[str, list[ClassSummary]] = {}
    for summary in summaries:
        for entry in summary.classes:
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
                *_objects(entries),
            )
        )
    return classes


def _objects(entries: Sequence[ClassSummary]) -> tuple[int | None, float | None, float | None]:
    """Return the last three values of `ClassOverSlides`."""
    counts = [entry.objects for entry in entries if entry.objects is not None]
    rates = [entry.objects_per_mm2 for entry in entries if entry.objects_per_mm2 is not None]
    several = [(entry.objects or 0, entry.touching_share) for entry in entries if entry.touching_share is not None]
    of = sum(count for count, _ in several)
    return (
        sum(counts) if counts else None,
        median(rates) if rates else None,
        sum(count * share for count, share in several) / of if of else None,
    )

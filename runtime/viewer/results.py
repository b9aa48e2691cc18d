"""Which results lie in a folder, and what their files say; nothing in those files is trusted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from histostream.runtime.record import read_run
from histostream.runtime.result import ResultError
from histostream.wsi.errors import HistoError
from histostream.wsi.outputs.folder import LOCK_FILE, RUN_FILE
from histostream.wsi.outputs.journal import BEGUN, JOURNAL, Journal, RunManifest
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, ClassInfo
from histostream.wsi.outputs.lock import holder_of
from histostream.wsi.slides.resolution import MAX_MPP, MIN_MPP
from histostream.wsi.slides.slide_locator import SlideLocator
from histostream.wsi.slides.sources.base import is_plain_name
from histostream.wsi.slides.staging import SlideVersion

DONE = "done"
RUNNING = "running"
BROKEN_OFF = "broken off"
MAX_PX = 1 << 24  # side of a slide; four times that of the largest scanners


@dataclass(frozen=True, slots=True)
class Run:
    """The results of one slide.

    Attributes
    ----------
    key
        What pages call it: ``<number of the root>/<name of the folder>``.
    folder
        Where they are, without symbolic links.
    """

    key: str
    folder: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def status(self) -> str:
        """``done``, ``running`` or ``broken off``."""
        if (self.folder / RUN_FILE).is_file():
            return DONE
        return RUNNING if holder_of(self.folder / LOCK_FILE) else BROKEN_OFF

    def file(self, name: str) -> Path:
        """Return one of its files.

        Raises
        ------
        ResultError
            If there is none, or the name is a link that leads out of the folder.
        """
        path = self.folder / name
        if not path.is_file():
            raise ResultError(f"{self.name}: there is no {name}; run the slide again")
        if path.resolve().parent != self.folder:
            raise ResultError(f"{self.name}: {name} is a link to another folder; put it there")
        return path

    def json(self, name: str) -> dict[str, Any]:
        """Return what one of its JSON files says.

        Raises
        ------
        ResultError
            If it cannot be read.
        """
        try:
            said = json.loads(self.file(name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, ResultError):
                raise
            raise ResultError(f"{self.name}: {name} cannot be read; run the slide again") from error
        if not isinstance(said, dict):
            raise ResultError(f"{self.name}: {name} holds no table; run the slide again")
        return said


class Results:
    """Folders of results: each is one slide's, or holds those of several.

    Parameters
    ----------
    roots
        The folders.

    Raises
    ------
    ResultError
        If one is no folder, or holds no results.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = []
        for root in roots:
            if not root.is_dir():
                raise ResultError(f"{root}: there is no such folder; name one of histo-infer's")
            self._roots.append(root.resolve())
        for number, root in enumerate(roots):
            if next(self._in(number), None) is None:
                raise ResultError(
                    f"{root}: no results are in it; name the folder that was given to "
                    "histo-infer as --out, or one slide's folder in it"
                )

    def __iter__(self) -> Iterator[Run]:
        for number in range(len(self._roots)):
            yield from self._in(number)

    def find(self, root: str, name: str) -> Run:
        """Return one slide's results.

        Parameters
        ----------
        root
            Number of the root.
        name
            Name of the folder.

        Raises
        ------
        ResultError
            If there are none of that name.
        """
        if root in {str(i) for i in range(len(self._roots))}:
            folder = self._roots[int(root)]
            if not _holds_results(folder) and is_plain_name(name):
                folder /= name
            if folder.name == name and _is_ours(folder):
                return Run(f"{root}/{name}", folder)
        raise ResultError("there are no such results (any more); see all slides, at /")

    def _in(self, number: int) -> Iterator[Run]:
        root = self._roots[number]
        if _holds_results(root):
            yield Run(f"{number}/{root.name}", root)
            return
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if is_plain_name(entry.name))
        for name in names:
            if _is_ours(root / name):
                yield Run(f"{number}/{name}", root / name)


@dataclass(frozen=True, slots=True)
class Seen:
    """How the label map of a run lies on its slide.

    Attributes
    ----------
    width, height
        Of the label map, in its pixels.
    mpp
        Side of such a pixel, in um.
    downsample
        Pixels of the slide's level 0 per pixel of the label map, along one side.
    classes
        The class of label 0, 1, ...
    place
        Where the slide is.
    """

    width: int
    height: int
    mpp: float
    downsample: float
    classes: tuple[ClassInfo, ...]
    place: SlideLocator


def seen_in_result(run: Run) -> Seen:
    """Return how the label map of a finished run lies on its slide.

    Raises
    ------
    ResultError
        If its files do not say, or say what cannot be.
    """
    said, summary = run.json(RUN_FILE), run.json("summary.json")
    try:
        slide = said["slide"]
        if "downsample" not in slide:  # written before it was recorded
            own = said["options"].get("mpp") or slide["mpp"]
            slide = {**slide, "downsample": slide["result_mpp"] / own}
        return _seen({**slide, "classes": summary["classes"]}, slide)
    except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as error:
        raise _strange(run, RUN_FILE) from error


def begun_in(run: Run) -> RunManifest:
    """Return what an unfinished run began.

    Raises
    ------
    ResultError
        If nothing was begun, or what was cannot be read.
    """
    folder = run.folder / JOURNAL
    if folder.resolve().parent != run.folder or (folder / BEGUN).is_symlink():
        raise ResultError(f"{run.name}: {JOURNAL} is a link to another folder; put it there")
    try:
        begun = Journal(run.folder).read()
    except (HistoError, RecursionError) as error:
        raise _strange(run, BEGUN) from error
    if begun is None:
        raise ResultError(f"{run.name}: nothing of it is finished yet; wait")
    return begun


def seen_in_journal(run: Run, begun: RunManifest) -> Seen:
    """Return how the label map of an unfinished run lies on its slide.

    Raises
    ------
    ResultError
        If its journal does not say, or says what cannot be.
    """
    try:
        seen = _seen(begun.seen, {**begun.what["slide"], "source": begun.seen["source"]})
        ends = [0, *(x1 for _, x1 in begun.bands)]
        if list(pairwise(ends)) != begun.bands or sorted(set(ends)) != ends:
            raise ValueError(f"bands {begun.bands}")
        if ends[-1] != seen.width:
            raise ValueError(f"bands to {ends[-1]}")
        return seen
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise _strange(run, BEGUN) from error


def version_in(run: Run) -> list[Any] | None:
    """Return size and time of a run's slide, the same in all runs of it; None if not known."""
    try:
        said = read_run(run.folder)
        what = begun_in(run).what if said is None else said["inputs"]
        return [int(what["slide"]["bytes"]), str(what["slide"]["modified"])]
    except (HistoError, TypeError, KeyError, ValueError, OverflowError):
        return None


def _seen(said: Mapping[str, Any], slide: Mapping[str, Any]) -> Seen:
    width, height = int(said["width"]), int(said["height"])
    mpp, downsample = float(said["result_mpp"]), float(said["downsample"])
    classes = tuple(ClassInfo(str(c["name"]), _color(c["color"])) for c in said["classes"])
    if not (0 < width <= MAX_PX and 0 < height <= MAX_PX):
        raise ValueError(f"{width} x {height} px")
    if not (MIN_MPP <= mpp <= 4 * MAX_MPP and math.isfinite(downsample) and 0 < downsample < 1e4):
        raise ValueError(f"{mpp} um, downsample {downsample}")
    if not 1 <= len(classes) <= NOT_ANALYSED:
        raise ValueError(f"{len(classes)} classes")
    version = SlideVersion(int(slide["bytes"]), str(slide["modified"]))
    source, sha256 = str(slide.get("source", "")), str(slide.get("sha256", ""))
    return Seen(width, height, mpp, downsample, classes, SlideLocator(source, version, sha256))


def _color(said: Any) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in said)
    return red, green, blue


def _strange(run: Run, file: str) -> ResultError:
    return ResultError(f"{run.name}: {file} says what cannot be; run the slide again")


def _holds_results(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file() or (folder / JOURNAL / BEGUN).is_file()


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds results, and is no link to somewhere else."""
    try:
        return _holds_results(folder) and folder.resolve() == folder
    except (OSError, ValueError):
        return False

"""The results in a folder, and what their files hold; no value in those files is trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from histostream.runtime.record import SUMMARY_FILE
from histostream.runtime.result import ResultError
from histostream.wsi.errors import HistoError
from histostream.wsi.outputs.folder import LOCK_FILE, RUN_FILE
from histostream.wsi.outputs.journal import BEGUN, JOURNAL, Journal, RunManifest, ViewInfo
from histostream.wsi.outputs.label_rows import SlideInfo
from histostream.wsi.outputs.lock import holder_of
from histostream.wsi.records import from_json
from histostream.wsi.slides.resolution import MAX_MPP, MIN_MPP
from histostream.wsi.slides.slide_locator import SlideLocator
from histostream.wsi.slides.sources.base import is_plain_name
from histostream.wsi.slides.staging import SlideVersion

DONE = "done"
RUNNING = "running"
INTERRUPTED = "interrupted"
MAX_PX = 1 << 24  # side of a label map; four times that of the largest scanners
MAX_DOWNSAMPLE = 1e4
INVALID = (TypeError, KeyError, ValueError, AttributeError, ArithmeticError)  # from wrong values in JSON


@dataclass(frozen=True, slots=True)
class Run:
    """The results of one slide.

    Attributes
    ----------
    key
        Its name on the pages: ``<number of the root>/<name of the folder>``.
    folder
        Path of the folder, without symbolic links.
    """

    key: str
    folder: Path

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def status(self) -> str:
        """``done``, ``running`` or ``interrupted``."""
        if (self.folder / RUN_FILE).is_file():
            return DONE
        return RUNNING if holder_of(self.folder / LOCK_FILE) else INTERRUPTED

    def file(self, name: str) -> Path:
        """Return the path of a file of the results.

        Raises
        ------
        ResultError
            If there is no such file, or it is a link that leads out of the folder.
        """
        path = self.folder / name
        if not path.is_file():
            raise ResultError(f"{self.name}: there is no {name}; run the slide again")
        if path.resolve().parent != self.folder:
            raise ResultError(f"{self.name}: {name} is a link to another folder; put the file itself there")
        return path

    def json(self, name: str) -> dict[str, Any]:
        """Read a file that holds a JSON object.

        Raises
        ------
        ResultError
            If it cannot be read.
        """
        path = self.file(name)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ResultError(f"{self.name}: {name} cannot be read; run the slide again") from error
        if not isinstance(content, dict):
            raise ResultError(f"{self.name}: {name} holds no JSON object; run the slide again")
        return content


class Results:
    """The results in some folders, each of which holds the results of one slide or of several.

    Parameters
    ----------
    roots
        The folders.

    Raises
    ------
    ResultError
        If one is not a folder, or holds no results.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = []
        for root in roots:
            if not root.is_dir():
                raise ResultError(f"{root}: there is no such folder; name an output folder of histo-infer")
            self._roots.append(root.resolve())
        for number, root in enumerate(roots):
            if next(self._runs_in(number), None) is None:
                raise ResultError(
                    f"{root}: no results in this folder; name the folder that was given to "
                    "histo-infer as --out, or one slide's folder in it"
                )

    def __iter__(self) -> Iterator[Run]:
        for number in range(len(self._roots)):
            yield from self._runs_in(number)

    def find(self, root: str, name: str) -> Run:
        """Return the results of one slide.

        Parameters
        ----------
        root
            Number of the root.
        name
            Name of the folder.

        Raises
        ------
        ResultError
            If there are no such results.
        """
        if root in {str(i) for i in range(len(self._roots))}:
            folder = self._roots[int(root)]
            if not _holds_results(folder) and is_plain_name(name):
                folder /= name
            if folder.name == name and _is_own_folder(folder):
                return Run(f"{root}/{name}", folder)
        raise ResultError("there are no such results (any more); see all slides, at /")

    def _runs_in(self, number: int) -> Iterator[Run]:
        root = self._roots[number]
        if _holds_results(root):
            yield Run(f"{number}/{root.name}", root)
            return
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if is_plain_name(entry.name))
        for name in names:
            if _is_own_folder(root / name):
                yield Run(f"{number}/{name}", root / name)


@dataclass(frozen=True, slots=True)
class LabelView:
    """A label map on its slide.

    Attributes
    ----------
    info
        Size, resolution and classes of the label map.
    downsample
        Pixels of the slide's level 0 per pixel of the label map, along one side.
    place
        Where the slide is.
    """

    info: SlideInfo
    downsample: float
    place: SlideLocator


def view_of_result(run: Run) -> LabelView:
    """Return the view of a finished run.

    Raises
    ------
    ResultError
        If run.json or summary.json cannot be read, or holds invalid values.
    """
    record, summary = run.json(RUN_FILE), run.json(SUMMARY_FILE)
    try:
        slide = {"source": "", **record["slide"]}
        if "downsample" not in slide:  # older versions did not record it
            slide["downsample"] = slide["result_mpp"] / (record["options"].get("mpp") or slide["mpp"])
        view = from_json(ViewInfo, {**slide, "classes": summary["classes"]})
        return _label_view(run, view, slide)
    except INVALID as error:
        raise _invalid(run, RUN_FILE) from error


def read_manifest(run: Run) -> RunManifest:
    """Read the manifest of an unfinished run.

    Raises
    ------
    ResultError
        If there is no manifest, or it cannot be read.
    """
    folder = run.folder / JOURNAL
    if folder.resolve().parent != run.folder or (folder / BEGUN).is_symlink():
        raise ResultError(f"{run.name}: {JOURNAL} is a link to another folder; put the folder itself there")
    try:
        manifest = Journal(run.folder).read()
    except (HistoError, RecursionError) as error:
        raise _invalid(run, BEGUN) from error
    if manifest is None:
        raise ResultError(f"{run.name}: nothing of it is finished yet; wait")
    return manifest


def view_of_journal(run: Run, manifest: RunManifest) -> LabelView:
    """Return the view of an unfinished run.

    Raises
    ------
    ResultError
        If its manifest holds invalid values.
    """
    try:
        if manifest.view_info is None:  # as in journals of older versions
            raise ValueError("no view")
        view = _label_view(run, manifest.view_info, manifest.fingerprint["slide"])
        ends = [0, *(x1 for _, x1 in manifest.bands)]
        if tuple(pairwise(ends)) != manifest.bands or sorted(set(ends)) != ends or ends[-1] != view.info.width:
            raise ValueError(f"bands {manifest.bands}")
        return view
    except INVALID as error:
        raise _invalid(run, BEGUN) from error


def slide_version(run: Run) -> list[Any] | None:
    """Return size and time of a run's slide, which are the same for all runs of it; None if unknown."""
    try:
        is_finished = (run.folder / RUN_FILE).is_file()
        fingerprint = run.json(RUN_FILE)["inputs"] if is_finished else read_manifest(run).fingerprint
        return [int(fingerprint["slide"]["bytes"]), str(fingerprint["slide"]["modified"])]
    except (HistoError, *INVALID):
        return None


def _label_view(run: Run, view: ViewInfo, slide: Mapping[str, Any]) -> LabelView:
    if not (view.width <= MAX_PX and view.height <= MAX_PX):
        raise ValueError(f"{view.width} x {view.height} px")
    if not (MIN_MPP <= view.result_mpp <= 4 * MAX_MPP and 0 < view.downsample < MAX_DOWNSAMPLE):
        raise ValueError(f"{view.result_mpp} um, downsample {view.downsample}")
    info = SlideInfo(run.name, view.width, view.height, view.result_mpp, view.classes)
    version = SlideVersion(int(slide["bytes"]), str(slide["modified"]))
    return LabelView(info, view.downsample, SlideLocator(view.source, version, str(slide.get("sha256", ""))))


def _invalid(run: Run, file: str) -> ResultError:
    return ResultError(f"{run.name}: {file} holds invalid values; run the slide again")


def _holds_results(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file() or (folder / JOURNAL / BEGUN).is_file()


def _is_own_folder(folder: Path) -> bool:
    """Whether a folder holds results and is not reached through a link."""
    try:
        return _holds_results(folder) and folder.resolve() == folder
    except (OSError, ValueError):
        return False

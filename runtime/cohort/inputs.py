"""Finds the slides that arguments of ``histo-infer`` name: files, folders, patterns, lists and URLs."""

from __future__ import annotations

import csv
import glob
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path, PurePath

from histostream.runtime.cohort.names import name_folders, no_name
from histostream.runtime.cohort.windows_paths import find_windows_path, is_windows_path
from histostream.runtime.slide_job import SlideInput, stem_of
from histostream.wsi.errors import HistoError, SlideError, unreadable
from histostream.wsi.outputs.folder import RUN_FILE
from histostream.wsi.outputs.journal import JOURNAL
from histostream.wsi.slides.dicom_series import is_dicom, series_among, series_files
from histostream.wsi.slides.reader import slide_suffixes
from histostream.wsi.slides.resolution import LIGHT_MPP, MAX_MPP
from histostream.wsi.slides.sources.base import is_plain_name, is_remote, redact_url
from histostream.wsi.slides.staging import list_files

DICOM = ".dcm"
# Files beside slides that are never opened to see whether they are DICOM; such files often have no suffix.
NO_DICOM = frozenset({".csv", ".geojson", ".gz", ".jpeg", ".jpg", ".json", ".md", ".png", ".txt", ".xml", ".zip"})
IMAGES = frozenset({".png", ".jpg", ".jpeg"})  # not taken from folders, where most are thumbnails and masks
LIST = ".csv"
RESULTS = frozenset({RUN_FILE, JOURNAL})  # one of them is in each folder of results, finished or not
COLUMNS = ("path", "mpp", "roi", "mask", "name")
FILES = ("roi", "mask")  # columns that name a file
DELIMITERS = (",", ";", "\t")


class InputError(HistoError, ValueError):
    """The inputs do not name a cohort of slides."""


def find_inputs(arguments: Sequence[str], out: Path | None = None) -> list[SlideInput]:
    """Find the slides that arguments of the command line name, in the order of the arguments.

    An argument is one of

    - a slide file or its URL. It need not exist: the run reports a missing slide and goes on;
    - a folder: one slide if it holds the files of a DICOM series; otherwise every slide below it, each series one,
      sorted. Hidden files, folders of results, and PNG and JPEG files are left out;
    - a pattern such as ``/data/**/*.svs``, if no file has exactly this name. Matching PNG and JPEG files
      are slides; a ``.dcm`` file stands for its folder, if the folder holds no other slides;
    - a list, ``.csv``: UTF-8 with a header; the columns are ``path`` and optionally ``mpp``, ``roi``,
      ``mask`` and ``name``; others are kept for the results. Paths are relative to the list's folder;
    - a folder (ending with ``/``) or pattern of ``s3://`` or ``gs://``.

    Windows paths are looked for as `find_windows_path` does. Inputs that are equal are taken once. A
    slide may appear twice under different names. Slides that would share an output folder get folders
    that tell them apart, see `name_folders`.

    One of several inputs that cannot be run does not stop the others: it has a ``problem``.

    Parameters
    ----------
    arguments
        As described above.
    out
        Folder for results, in which slides keep the folders that they have; None: it is new.

    Raises
    ------
    InputError
        If a list cannot be used, a pattern matches no slide, or there is one input only and it has a problem.

    Examples
    --------
    >>> [slide.name for slide in find_inputs(["slide.svs", "elsewhere/other.ndpi"])]
    ['slide', 'other']
    """
    found: dict[tuple[str, str, str], SlideInput] = {}
    for slide in (slide for argument in arguments for slide in _inputs_of(argument)):
        key = (_absolute(slide.source), slide.name or _stem(slide.source), slide.problem)
        other = found.setdefault(key, slide)
        if (other.mpp, other.roi, other.mask, other.further) != (slide.mpp, slide.roi, slide.mask, slide.further):
            problem = (
                f"{redact_url(slide.source)} is named twice, with different mpp, roi, mask or other columns: "
                "name it once, or give one of them another name (column `name` of a .csv)"
            )
            found[key] = replace(other, problem=problem)
    slides = name_folders(list(found.values()), out)
    if len(slides) == 1 and slides[0].problem:
        raise InputError(slides[0].problem)
    return slides


def _inputs_of(argument: str) -> Iterator[SlideInput]:
    if _suffix(argument) == LIST and not _is_folder(argument):
        yield from _read_list(argument)
        return
    note = ""
    if is_windows_path(argument):
        named = _of_windows(argument, Path())
        if named.problem:
            yield named
            return
        argument, note = named.source, named.note
    for source, problem in _sources_of(argument).items():
        yield SlideInput(source, "", note=note, problem=problem)


def _of_windows(path: str, folder: Path) -> SlideInput:
    """Return the slide that a Windows path names on this system."""
    found, places = find_windows_path(path, folder)
    if found == str(folder / path):
        return SlideInput(found, "")
    if found:
        return SlideInput(found, "", note=f"{path} was taken to be {found}")
    problem = (
        f"{path}: a Windows path, and there is no {places}; write the path that the slide has on this computer, "
        "or put the list into the folder that the slides are below"
    )
    return SlideInput(path, "", problem=problem)


def _sources_of(argument: str) -> dict[str, str]:
    """Return the slides of an argument that is no list, and why one cannot be run, or ""."""
    if is_remote(argument):
        try:
            sources = _remote_sources(argument)
        except SlideError as error:
            return {argument: str(error)}
    elif _is_folder(argument):
        sources = _sources_below(argument)
    elif glob.has_magic(argument) and not os.path.lexists(argument):
        sources = _matches(argument)
    else:
        return {argument: ""}
    if sources:
        return sources
    problem = (
        f"{redact_url(argument)}: no slide found; check the path (name PNG and JPEG files or match them "
        "by a pattern; results of earlier runs are left out)"
    )
    if not _is_folder(argument):
        raise InputError(problem)
    return {argument: problem}  # a shell's * may match such a folder among slides


def _sources_below(top: str) -> dict[str, str]:
    """Return the slides below a local folder in the order of a walk, and folders that cannot be searched with why."""
    sources: dict[str, str] = {}

    def refuse(error: OSError) -> None:
        folder = error.filename or top
        sources[folder] = (
            f"{folder}: the folder cannot be listed ({error.strerror or error}); change its permissions, or name "
            "the slides"
        )

    visited = set()
    for folder, subfolders, names in os.walk(top, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited or not RESULTS.isdisjoint((*subfolders, *names)):
            subfolders.clear()  # visited before through a link, or results of an earlier run
            continue
        visited.add(real)
        slides = _slides_among(folder, names)
        sources |= slides
        is_series = list(slides) == [folder] and not slides[folder]
        subfolders[:] = [] if is_series else sorted(name for name in subfolders if not name.startswith("."))
    return sources


def _slides_among(folder: str, names: Iterable[str]) -> dict[str, str]:
    """Return the slides among the files of one folder: the folder itself if it is one DICOM series.

    Of several series, and of one beside other slides, the first file of each is returned.
    """
    visible = sorted(name for name in names if not name.startswith("."))
    slides = [name for name in visible if _suffix(name) in slide_suffixes()]
    sources = [os.path.join(folder, name) for name in slides]  # noqa: PTH118
    others = [name for name in visible if name not in slides and _suffix(name) not in NO_DICOM]
    try:
        series = [] if is_remote(folder) else series_among(Path(folder, name) for name in others)
    except OSError as error:
        return {folder: str(unreadable(error.filename or folder, error))}
    if len(series) > 1 or (series and slides):
        return dict.fromkeys(sources + [str(files[0]) for files in series], "")
    if not series and all(_suffix(name) != DICOM for name in visible):
        return dict.fromkeys(sources, "")
    problem = ""
    if slides:
        problem = (
            f"{folder}: holds DICOM files and other slides ({slides[0]}); "
            "name the slides, or use a pattern such as '*.svs'"
        )
    return {folder: problem}


def _matches(pattern: str) -> dict[str, str]:
    """Return the slides that match a local pattern, in the order in which a shell lists them."""
    sources: dict[str, str] = {}
    for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207
        folder = str(Path(match).parent)
        if _is_folder(match):
            sources |= _sources_below(match)
        elif any(os.path.lexists(Path(folder, name)) for name in RESULTS):
            continue
        elif _suffix(match) == DICOM and (source := _series_of(match)) is not None:
            sources.setdefault(source, "")
        elif _suffix(match) in slide_suffixes() | IMAGES | {DICOM}:
            sources.setdefault(match, "")
    return sources


def _series_of(file: str) -> str | None:
    """Return the source of the DICOM series of a file; None if the file is none, and lies beside other slides."""
    folder = str(Path(file).parent)
    try:
        among = [] if _has_other_slides(folder) else list(_slides_among(folder, os.listdir(folder)))  # noqa: PTH208
        if len(among) == 1:
            return among[0]
        return str(series_files(Path(file))[0]) if is_dicom(Path(file)) else None
    except OSError:  # opening the file will say what is wrong
        return None


def _has_other_slides(folder: str) -> bool:
    try:
        return any(_suffix(name) in slide_suffixes() for name in os.listdir(folder))  # noqa: PTH208
    except OSError:  # it was listed a moment ago; opening its files will say what is wrong
        return False


def _remote_sources(url: str) -> dict[str, str]:
    is_folder, is_web = url.endswith("/"), url.lower().startswith(("http:", "https:"))
    if is_web or not (is_folder or glob.has_magic(url)):
        return {url: ""}
    folders: dict[str, list[str]] = {}
    for file in list_files(url):
        folder, _, name = file.rpartition("/")
        folders.setdefault(folder + "/", []).append(name)
    results = {folder for folder, names in folders.items() if not RESULTS.isdisjoint(names)}
    sources: dict[str, str] = {}
    for folder in sorted(folders):
        if not any(folder.startswith(result) for result in results) and "/." not in folder:
            sources |= _slides_among(folder, folders[folder])
    return sources


def _read_list(path: str) -> Iterator[SlideInput]:
    """Read a .csv of slides; see `find_inputs`."""
    rows = _rows(path)
    line, header = next(rows, (1, []))
    names = [name.lower() if name.lower() in COLUMNS else name for name in header]
    if "path" not in names:
        raise InputError(
            f"{path}, line {line}: no column `path` (found: {', '.join(header) or 'nothing'}); "
            "the first line names the columns: path,mpp,roi,mask,name"
        )
    for name in names:
        if name and names.count(name) > 1:
            raise InputError(f"{path}, line {line}: two columns {name!r}; rename one")
    slides: list[SlideInput] = []
    for line, row in rows:
        if any(cell for name, cell in zip_longest(names, row) if not name):
            raise InputError(f"{path}, line {line}: a cell without a column; quote cells that contain the delimiter")
        row += [""] * (len(names) - len(row))
        slides.append(_slide_of_row(f"{path}, line {line}", Path(path).parent, dict(zip(names, row, strict=False))))
    if not slides:
        raise InputError(f"{path}: no slides after the header; add a line for each slide")
    yield from _without_doubtful(slides)


def _slide_of_row(line: str, folder: Path, cells: dict[str, str]) -> SlideInput:
    """Return the slide of a row of a list; errors begin with ``line``."""
    path, name = cells["path"], cells.get("name") or ""
    files = {column: cells[column] for column in FILES if cells.get(column)}
    slide = SlideInput(
        path or line,
        name,
        mpp=_mpp(line, cells.get("mpp", "")),
        further={key: cell for key, cell in cells.items() if key and key not in COLUMNS},
    )
    if not path or "\0" in path:
        problem = f"{line}: no path of a slide ({path!r}); fill in the path or remove the line"
        return replace(slide, name="", problem=problem)
    if name and not is_plain_name(name):
        return replace(slide, name="", problem=f"{line}: {no_name(name)}")
    for column, file in files.items():
        if is_remote(file):
            raise InputError(f"{line}: {column} {file!r} is not a local file; download it and give its path")
        files[column] = (find_windows_path(file, folder)[0] if is_windows_path(file) else "") or str(folder / file)
    slide = replace(slide, roi=files.get("roi"), mask=files.get("mask"))
    if is_remote(path):
        return slide
    if is_windows_path(path):
        found = _of_windows(path, folder)
        problem = found.problem and f"{line}: {found.problem}"
        return replace(slide, source=found.source, note=found.note, problem=problem)
    return replace(slide, source=str(folder / path))


def _without_doubtful(slides: Sequence[SlideInput]) -> Iterator[SlideInput]:
    """Yield the slides of a list; several Windows paths that were taken to be one file have a problem each."""
    notes: dict[str, set[str]] = {}
    for slide in slides:
        notes.setdefault(slide.source, set()).add(slide.note)
    for slide in slides:
        if slide.note and len(notes[slide.source]) > 1:
            problem = (
                f"{slide.note}, which another line of the list names too; write the paths that the slides have on "
                "this computer"
            )
            slide = replace(slide, note="", problem=problem)
        yield slide


def _mpp(line: str, cell: str) -> float | None:
    if not cell:
        return None
    try:
        mpp = float(cell)
    except ValueError:
        mpp = math.nan
    if not LIGHT_MPP <= mpp <= MAX_MPP:
        raise InputError(
            f"{line}: mpp {cell!r} is not a number from {LIGHT_MPP:g} to {MAX_MPP:g}; "
            "it is in um per pixel, written with a decimal point (40x is usually 0.25)"
        )
    return mpp


def _rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, stripped cells) of each row of a .csv that is not empty."""
    text = _text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, [cell.strip() for cell in row]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not a .csv ({error}); check the quotes") from error


def _text(path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{redact_url(path)}: there is no such local file; check the path") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save it as CSV UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check it") from error


def _delimiter(text: str) -> str:
    header = text.lstrip().partition("\n")[0]

    def columns(delimiter: str) -> list[str]:
        return [name.strip(' \t\r"').lower() for name in header.split(delimiter)]

    return max(DELIMITERS, key=lambda d: ("path" in columns(d), len(columns(d))))


def _stem(source: str) -> str:
    """Return the name of a slide's file, if a folder can have it."""
    try:
        return stem_of(source)
    except SlideError:
        return ""


def _absolute(source: str) -> str:
    return source if is_remote(source) else os.path.normcase(os.path.abspath(source))  # noqa: PTH100


def _is_folder(path: str) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  (Path.is_dir raises where a parent folder cannot be read)


def _suffix(name: str) -> str:
    return PurePath(name).suffix.lower()

"""Finds the slides that arguments of ``histo-infer`` name: files, folders, patterns, lists and URLs."""

from __future__ import annotations

import csv
import glob
import io
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path, PurePath

from histostream.runtime.slide_job import SlideInput, stem_of
from histostream.wsi.errors import HistoError, SlideError
from histostream.wsi.outputs.folder import RUN_FILE
from histostream.wsi.outputs.journal import JOURNAL
from histostream.wsi.slides.reader import slide_suffixes
from histostream.wsi.slides.resolution import LIGHT_MPP, MAX_MPP
from histostream.wsi.slides.sources.base import is_plain_name, is_remote, redact_url
from histostream.wsi.slides.staging import list_files

DICOM = ".dcm"
IMAGES = frozenset({".png", ".jpg", ".jpeg"})  # not taken from folders, where most are thumbnails and masks
LIST = ".csv"
RESULTS = frozenset({RUN_FILE, JOURNAL})  # one of them is in each folder of results, finished or not
COLUMNS = ("path", "mpp", "roi", "mask", "name")
FILES = ("roi", "mask")  # columns that name a file
DELIMITERS = (",", ";", "\t")


class InputError(HistoError, ValueError):
    """The inputs do not name a cohort of slides."""


def find_inputs(arguments: Sequence[str]) -> list[SlideInput]:
    """Find the slides that arguments of the command line name, in the order of the arguments.

    An argument is one of

    - a slide file or its URL. It need not exist: the run reports a missing slide and goes on;
    - a folder: one slide if it holds ``.dcm`` files (a DICOM series); otherwise every slide below it,
      sorted. Hidden files, folders of results, and PNG and JPEG files are left out;
    - a pattern such as ``/data/**/*.svs``, if no file has exactly this name. Matching PNG and JPEG files
      are slides; a ``.dcm`` file stands for its folder, if the folder holds no other slides;
    - a list, ``.csv``: UTF-8 with a header; the columns are ``path`` and optionally ``mpp``, ``roi``,
      ``mask`` and ``name``; others are kept for the results. Paths are relative to the list's folder;
    - a folder (ending with ``/``) or pattern of ``s3://`` or ``gs://``.

    Inputs that are equal are taken once. A slide may appear twice under different names.

    Raises
    ------
    InputError
        If a list, folder or pattern cannot be read or holds no slide, a name cannot be the name of a
        folder, or two inputs would write to the same folder.
    SlideError
        If a bucket cannot be listed.

    Examples
    --------
    >>> [slide.name for slide in find_inputs(["slide.svs", "elsewhere/other.ndpi"])]
    ['slide', 'other']
    """
    inputs: dict[str, SlideInput] = {}  # by folder of results
    for slide in (slide for argument in arguments for slide in _inputs_of(argument)):
        other = inputs.setdefault(os.path.normcase(slide.name), slide)
        if _absolute(other.source) != _absolute(slide.source):
            raise InputError(
                f"{redact_url(other.source)} and {redact_url(slide.source)} would both write to "
                f"{slide.name}/: give one of them another name (column `name` of a .csv), "
                "or run them with different --out folders"
            )
        if (other.mpp, other.roi, other.mask, other.further) != (slide.mpp, slide.roi, slide.mask, slide.further):
            raise InputError(
                f"{redact_url(slide.source)} is named twice, with different mpp, roi, mask or other columns: "
                "name it once, or give one of them another name (column `name` of a .csv)"
            )
    return list(inputs.values())


def _inputs_of(argument: str) -> Iterator[SlideInput]:
    if _suffix(argument) == LIST and not _is_folder(argument):
        yield from _read_list(argument)
        return
    for source in _sources_of(argument):
        yield SlideInput(source, _plain_name(source))


def _sources_of(argument: str) -> list[str]:
    if is_remote(argument):
        sources = _remote_sources(argument)
    elif _is_folder(argument):
        sources = _sources_below(argument)
    elif glob.has_magic(argument) and not os.path.lexists(argument):
        sources = _matches(argument)
    else:
        return [argument]
    if not sources:
        raise InputError(
            f"{redact_url(argument)}: no slide found; check the path (name PNG and JPEG files or match them "
            "by a pattern; results of earlier runs are left out)"
        )
    return list(dict.fromkeys(sources))


def _sources_below(top: str) -> list[str]:
    """Return the slides below a local folder, in the order of a walk."""
    sources, visited = [], set()
    for folder, subfolders, names in os.walk(top, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited or not RESULTS.isdisjoint((*subfolders, *names)):
            subfolders.clear()  # visited before through a link, or results of an earlier run
            continue
        visited.add(real)
        slides = _slides_among(folder, names)
        sources += slides
        is_series = slides == [folder]
        subfolders[:] = [] if is_series else sorted(name for name in subfolders if not name.startswith("."))
    return sources


def _refuse_folder(error: OSError) -> None:
    raise InputError(
        f"{error.filename}: the folder cannot be listed ({error.strerror}); change its permissions, or name the slides"
    ) from error


def _slides_among(folder: str, names: Iterable[str]) -> list[str]:
    """Return the slides among the files of one folder, or the folder if it is a DICOM series."""
    visible = sorted(name for name in names if not name.startswith("."))
    slides = [name for name in visible if _suffix(name) in slide_suffixes()]
    if all(_suffix(name) != DICOM for name in visible):
        return [os.path.join(folder, name) for name in slides]  # noqa: PTH118
    if slides:
        raise InputError(
            f"{folder}: holds DICOM files and other slides ({slides[0]}); "
            "name the slides, or use a pattern such as '*.svs'"
        )
    return [folder]


def _matches(pattern: str) -> list[str]:
    """Return the slides that match a local pattern, in the order in which a shell lists them."""
    sources: dict[str, None] = {}
    for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207
        folder = str(Path(match).parent)
        if _is_folder(match):
            sources |= dict.fromkeys(_sources_below(match))
        elif any(os.path.lexists(Path(folder, name)) for name in RESULTS):
            continue
        elif _suffix(match) == DICOM and (folder in sources or not _has_other_slides(folder)):
            sources[folder] = None
        elif _suffix(match) in slide_suffixes() | IMAGES | {DICOM}:
            sources[match] = None
    return list(sources)


def _has_other_slides(folder: str) -> bool:
    return any(_suffix(name) in slide_suffixes() for name in os.listdir(folder))  # noqa: PTH208


def _remote_sources(url: str) -> list[str]:
    is_folder, is_web = url.endswith("/"), url.lower().startswith(("http:", "https:"))
    if is_web or not (is_folder or glob.has_magic(url)):
        return [url]
    folders: dict[str, list[str]] = {}
    for file in list_files(url):
        folder, _, name = file.rpartition("/")
        folders.setdefault(folder + "/", []).append(name)
    results = {folder for folder, names in folders.items() if not RESULTS.isdisjoint(names)}
    sources = []
    for folder in sorted(folders):
        if not any(folder.startswith(result) for result in results) and "/." not in folder:
            sources += _slides_among(folder, folders[folder])
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
    is_empty = True
    for line, row in rows:
        is_empty = False
        if any(cell for name, cell in zip_longest(names, row) if not name):
            raise InputError(f"{path}, line {line}: a cell without a column; quote cells that contain the delimiter")
        row += [""] * (len(names) - len(row))
        yield _slide_of_row(f"{path}, line {line}", Path(path).parent, dict(zip(names, row, strict=False)))
    if is_empty:
        raise InputError(f"{path}: no slides after the header; add a line for each slide")


def _slide_of_row(line: str, folder: Path, cells: dict[str, str]) -> SlideInput:
    """Return the slide of a row of a list; errors begin with ``line``."""
    source, name = cells["path"], cells.get("name")
    files = {column: cells[column] for column in FILES if cells.get(column)}
    if not source or "\0" in source:
        raise InputError(f"{line}: no path of a slide ({source!r}); fill in the path or remove the line")
    for column, file in files.items():
        if is_remote(file):
            raise InputError(f"{line}: {column} {file!r} is not a local file; download it and give its path")
    if not is_remote(source):
        source = str(folder / source)
    return SlideInput(
        source,
        _plain_name(source, name, f"{line}: "),
        mpp=_mpp(line, cells.get("mpp", "")),
        **{column: str(folder / file) for column, file in files.items()},
        further={key: cell for key, cell in cells.items() if key and key not in COLUMNS},
    )


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


def _plain_name(source: str, name: str | None = None, line: str = "") -> str:
    try:
        name = name or _printable(stem_of(source))
    except SlideError as error:
        raise InputError(f"{line}{error}") from None
    if not is_plain_name(name):
        raise InputError(
            f"{line}{redact_url(source)}: {name!r} cannot be the name of a folder of results; give another "
            "name (column `name` of a .csv: no path separators, no leading dot)"
        )
    return name


def _printable(name: str) -> str:
    """Replace control characters, and bytes that are not text, by _; a file name may contain both."""
    return "".join("_" if unicodedata.category(c) in {"Cc", "Cs"} else c for c in name)


def _absolute(source: str) -> str:
    return source if is_remote(source) else os.path.normcase(os.path.abspath(source))  # noqa: PTH100


def _is_folder(path: str) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  (Path.is_dir raises where a parent folder cannot be read)


def _suffix(name: str) -> str:
    return PurePath(name).suffix.lower()

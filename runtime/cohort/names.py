"""Names the output folders of a cohort, so that no two slides share one."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from histostream.runtime.record import SlideRecord, read_json
from histostream.runtime.slide_job import SlideInput, absolute_source, stem_of
from histostream.wsi.errors import SlideError
from histostream.wsi.outputs.folder import RUN_FILE
from histostream.wsi.outputs.journal import Journal, JournalError
from histostream.wsi.records import from_json
from histostream.wsi.slides.sources.base import file_name, is_plain_name, is_remote, redact_url
from histostream.wsi.slides.staging import SlideVersion, version_of

MAX_PARENTS = 4  # that a name begins with, before a digest of the path tells two slides apart
MAX_NAME_BYTES = 180  # of a folder; file systems allow 255, and temporary names are longer
DIGEST_CHARACTERS = 8


@dataclass(frozen=True, slots=True)
class _Owner:
    """The slide of a folder of results: where it was, and its version where a finished run recorded it."""

    source: str
    version: SlideVersion | None


def name_folders(slides: Sequence[SlideInput], out: Path | None) -> list[SlideInput]:
    """Give each slide the name of its output folder.

    A slide has the name of its file. Slides that would share a folder begin with the name of the folder
    that they are in, ``site-a_slide`` and ``site-b_slide``, or with more parent folders, and keep their
    suffixes where these are the difference. Names that differ only in case count as equal, because many
    file systems take them for one. Which names these are does not depend on the order of the slides.

    A slide keeps the folder in which ``out`` has a result or an interrupted run of it, so that slides
    that are added later rename none. A folder with the result of another slide that still exists is
    not used. Names that the user gave are kept as they are; slides that were given the same one have a
    problem, each of them.

    Parameters
    ----------
    slides
        With the names that the user gave, or "" where the name is to be found.
    out
        Folder for results; None: it is new.

    Returns
    -------
    The slides with their names, in the same order. Where a name is not that of the file, or there is
    none, ``note`` or ``problem`` says why.
    """
    given = Counter(_key(slide.name) for slide in slides if slide.name and not slide.problem)
    named = [_refuse_shared(slide, given) if slide.name else slide for slide in slides]
    folders = _folders(out)
    choices: dict[int, list[str]] = {}
    for number, slide in enumerate(named):
        if not slide.name and not slide.problem:
            try:
                choices[number] = _candidates(slide.source)
            except SlideError as error:
                named[number] = replace(slide, problem=str(error))
    chosen: dict[int, str] = {}
    taken = set(given)
    for number, candidates in choices.items():  # folders of earlier runs first
        if kept := _kept_folder(absolute_source(named[number].source), candidates, folders):
            chosen[number] = kept
            taken.add(_key(kept))
    waiting = {number: candidates for number, candidates in choices.items() if number not in chosen}
    for turn in range(2 * MAX_PARENTS + 2):
        wanted = {number: candidates[min(turn, len(candidates) - 1)] for number, candidates in waiting.items()}
        counts = Counter(map(_key, wanted.values()))
        for number, name in wanted.items():
            if counts[_key(name)] == 1 and _key(name) not in taken and not _is_used(named[number], name, folders):
                chosen[number] = name
        taken |= {_key(chosen[number]) for number in wanted if number in chosen}
        waiting = {number: candidates for number, candidates in waiting.items() if number not in chosen}
    for number, candidates in waiting.items():  # the same file under two names, as through a link
        chosen[number] = candidates[-1]
    for number, name in chosen.items():
        stem, note = choices[number][0], named[number].note
        if _key(name) != _key(stem):
            note = f"{note}; " * bool(note) + f"its folder is {name}, because another slide has the name {stem} too"
        named[number] = replace(named[number], name=name, note=note)
    return [slide if slide.name else replace(slide, name=_display_name(slide.source)) for slide in named]


def printable_name(name: str) -> str:
    """Replace control characters, and bytes that are not text, by _; a file name may contain both."""
    return "".join("_" if unicodedata.category(c) in {"Cc", "Cs"} else c for c in name)


def no_name(name: str) -> str:
    """Return the message for a name that no folder can have."""
    return (
        f"{name!r} cannot be the name of a folder of results; give another name (column `name` of a .csv: no path "
        "separators, no leading dot)"
    )


def _refuse_shared(slide: SlideInput, given: Mapping[str, int]) -> SlideInput:
    """Return a slide, with a problem if the user gave its name to another one too."""
    if slide.problem or given[_key(slide.name)] < 2:
        return slide
    problem = (
        f"{redact_url(slide.source)}: another slide has the name {slide.name} too; give one of them another name "
        "(column `name` of a .csv), or leave the cells empty"
    )
    return replace(slide, problem=problem)


def _candidates(source: str) -> list[str]:
    """Return names for the folder of a slide, the one to prefer first; only the last is surely its own.

    Raises
    ------
    SlideError
        If it has no name that a folder can have.
    """
    stem, file = printable_name(stem_of(source)), printable_name(_file_of(source))
    if not is_plain_name(stem):
        raise SlideError(f"{redact_url(source)}: {no_name(stem)}")
    names, before = [stem], ""
    for parent in _parents(source):
        before = f"{printable_name(parent)}_{before}"
        names += [before + stem] if stem == file else [before + stem, before + file]
    digest = hashlib.sha256(absolute_source(source).encode("utf-8", "surrogateescape")).hexdigest()[:DIGEST_CHARACTERS]
    fitting = [name for name in names[1:] if is_plain_name(name) and len(os.fsencode(name)) <= MAX_NAME_BYTES]
    return [stem, *fitting, f"{stem}_{digest}"]


def _file_of(source: str) -> str:
    return file_name(source) if is_remote(source) else Path(source).name or stem_of(source)


def _parents(source: str) -> list[str]:
    """Return the names of the folders around a slide, the nearest first."""
    if is_remote(source):
        where = unquote(redact_url(source)).partition("://")[2].rstrip("/")
        names = PurePosixPath(where).parent.parts
    else:
        path = Path(absolute_source(source))
        names = path.parent.relative_to(path.anchor).parts
    return [name for name in reversed(names) if name not in {"", ".", ".."}][:MAX_PARENTS]


def _folders(out: Path | None) -> dict[str, list[Path]]:
    """Return the folders in ``out`` by the keys of their names."""
    folders: dict[str, list[Path]] = {}
    try:
        names = [] if out is None else sorted(os.listdir(out))  # noqa: PTH208
    except OSError:  # not there yet; if it cannot be read, writing will say so
        names = []
    for name in names:
        assert out is not None
        folders.setdefault(_key(name), []).append(out / name)
    return folders


def _kept_folder(source: str, candidates: Iterable[str], folders: Mapping[str, list[Path]]) -> str:
    """Return the name of the folder that has a result or an interrupted run of a slide; "" if none has."""
    for folder, owner in _owners(candidates, folders):
        if absolute_source(owner.source) == source:
            return folder.name
    return ""


def _is_used(slide: SlideInput, name: str, folders: Mapping[str, list[Path]]) -> bool:
    """Whether a folder belongs to another slide that still exists; a slide that was moved is the same one."""
    for _, owner in _owners([name], folders):
        if is_remote(owner.source) or not os.path.lexists(owner.source):
            continue
        try:
            version = version_of(slide.source)
        except (SlideError, OSError):
            return True
        if version != (owner.version or _version(owner.source)):
            return True
    return False


def _version(source: str) -> SlideVersion | None:
    try:
        return version_of(source)
    except (SlideError, OSError):
        return None


def _owners(names: Iterable[str], folders: Mapping[str, list[Path]]) -> Iterator[tuple[Path, _Owner]]:
    """Yield the folders of these names, and the slides that they belong to."""
    for name in names:
        for folder in folders.get(_key(name), ()):
            run = read_json(folder / RUN_FILE)
            if run is not None:
                slide = from_json(SlideRecord, run.get("slide"))  # the rest of thousands of files takes seconds
                version = None if slide.bytes is None else SlideVersion(slide.bytes, slide.modified)
                yield folder, _Owner(slide.source or slide.path, version)
                continue
            try:
                manifest = Journal(folder).read()
            except JournalError:
                continue
            if manifest is not None and manifest.view_info is not None:
                yield folder, _Owner(manifest.view_info.source, None)


def _key(name: str) -> str:
    """Return what equal names have in common, on file systems that ignore case or the form of accents."""
    return unicodedata.normalize("NFC", name).casefold()


def _display_name(source: str) -> str:
    """Return a name, for tables, of a slide that has no folder."""
    return printable_name(redact_url(source)).strip("/\\").replace("/", "_").replace("\\", "_") or "(no name)"

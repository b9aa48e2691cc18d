"""Staging of slides: a local copy of a slide, made before it is read and removed afterwards.

Slides are read block by block in no regular order, which is slow on network drives and impossible
on object storage; a staged slide is read from a local disk instead. Sources are local paths and
URLs; `histostream.wsi.slides.sources` lists them.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from histostream.wsi.errors import OutputError, SlideError, StoppedError
from histostream.wsi.files import locked, temporary_name, writing
from histostream.wsi.slides.sources.base import (
    SlidePart,
    TransientError,
    file_name,
    is_remote,
    redact_url,
    source_of,
)

PAUSES_S = (0.5, 2.0)  # before the second and the third attempt
CHUNK_BYTES = 8 << 20  # one request of object storage; a stop waits for its end
HASHED_BYTES = 1 << 20
Result = TypeVar("Result")


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class SlideVersion:
    """Size and time of a slide, by which a change of its content is noticed without reading it.

    Attributes
    ----------
    bytes
        Size of all its files together.
    modified
        As in `SlidePart`; of a slide of several files, a digest of all their names, sizes and times.
    """

    bytes: int
    modified: str


def version_of(source: str) -> SlideVersion:
    """Return the version of a slide's content, from sizes and times alone.

    Parameters
    ----------
    source
        Local path or URL. Files that belong to it (of .mrxs, .vms, .vmu, a DICOM folder) count.

    Raises
    ------
    SlideError
        If there is no such slide, or it cannot be reached.
    """
    return _version(_find_parts(source))


def list_files(url: str) -> list[str]:
    """List the URLs of the files below a folder of a bucket (``.../``), or that match a pattern.

    Raises
    ------
    SlideError
        If the bucket cannot be listed, or the URL is of a kind that has no listings.
    """
    return _retried(lambda: source_of(url).list_files(url))


def sha256_of(path: Path, stopping: Callable[[], bool] = _never) -> str:
    """Return the SHA-256 of a file's content, as ``sha256sum`` prints it.

    Of a folder: that of the lines which ``sha256sum`` prints for its files, sorted by relative
    name, without hidden ones.

    Raises
    ------
    SlideError
        If it cannot be read.
    StoppedError
        If ``stopping()`` is true; it is called after every MiB.
    """
    try:
        if not path.is_dir():
            return _sha256_of_file(path, stopping)
        files = {f.relative_to(path).as_posix(): f for f in path.rglob("[!.]*") if f.is_file()}
        lines = (f"{_sha256_of_file(files[name], stopping)}  {name}\n" for name in sorted(files))
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror or error}); check the disk") from error


@contextmanager
def staged(source: str, folder: Path | None, *, stopping: Callable[[], bool] = _never) -> Iterator[Path]:
    """Give a local path to open a slide by, for the time of a ``with`` block.

    The slide is copied to a folder of its own below ``folder``, under its own name, and removed when
    the block ends. If a killed process left a complete copy of the same version of the slide, it is
    used; an incomplete one is copied again. Several processes that stage one slide at the same time
    make a copy each.

    Parameters
    ----------
    source
        Local path or URL; a URL that ends with ``/`` is the folder of a DICOM series.
    folder
        Where to stage, on a fast local disk; None opens a local slide where it is.
    stopping
        Called between chunks of 8 MiB and while waiting for the next attempt; true stops.

    Yields
    ------
    Path of the slide's file, or of the folder of a DICOM series.

    Raises
    ------
    SlideError
        If the slide is missing, changes while it is copied, or cannot be reached in 3 attempts.
    OutputError
        If there is no room for it, or ``folder`` cannot be written.
    StoppedError
        If ``stopping()`` is true.
    """
    if folder is None:
        if is_remote(source):
            raise SlideError(f"{redact_url(source)}: remote slides need a folder to be staged in: pass one")
        yield Path(source)
        return
    name = file_name(source)
    parts = _find_parts(source, stopping)
    with _reserved_folder(Path(folder), _key(source, _version(parts))) as target_folder:
        try:
            if not _is_whole(target_folder, parts):
                _remove(target_folder)
                _stage(source, parts, target_folder, stopping)
            yield target_folder / name
        finally:
            _remove(target_folder)


def _stage(source: str, parts: Sequence[SlidePart], target_folder: Path, stopping: Callable[[], bool]) -> None:
    """Copy all files of a slide; ``target_folder`` appears when they are complete."""
    needed, free = sum(part.bytes for part in parts), shutil.disk_usage(target_folder.parent).free
    if needed > free:
        raise OutputError(
            f"no room to stage {redact_url(source)} in {target_folder.parent}: {needed / 2**30:.2f} GiB are "
            f"needed, {free / 2**30:.2f} GiB are free; free space there or choose another folder"
        )
    temporary = temporary_name(target_folder)
    _remove(temporary)
    try:
        for part in parts:
            target = _below(temporary, part.name)
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            _retried(partial(_fetch, part, target, stopping), stopping)
        with writing(target_folder):
            temporary.rename(target_folder)
    finally:
        _remove(temporary)


def _fetch(part: SlidePart, target: Path, stopping: Callable[[], bool]) -> None:
    """Copy or download one file, and check that it is complete."""
    copied = 0
    chunks = source_of(part.address).read_part(part, CHUNK_BYTES)
    with writing(target), closing(chunks), target.open("wb") as file:
        for chunk in chunks:
            if stopping():
                raise StoppedError(f"{redact_url(part.address)}: stopped while it was staged")
            file.write(chunk)
            copied += len(chunk)
            if copied > part.bytes:  # it may grow as fast as it is copied
                break
    if copied != part.bytes and is_remote(part.address):
        raise TransientError(
            f"{redact_url(part.address)}: {copied} of {part.bytes} bytes came; the connection was cut or "
            "the server announces a wrong size: try again, or download it and pass the file"
        )
    if copied != part.bytes:
        raise SlideError(
            f"{part.address}: it had {part.bytes} bytes and now {copied}; try again when it is no longer being written"
        )
    if not is_remote(part.address):
        with writing(target):
            os.utime(target, ns=(int(part.modified), int(part.modified)))


def _below(folder: Path, name: str) -> Path:
    """Return the path of a slide's file; names come from servers and must not leave the folder."""
    parts = name.split("/")
    if any(p in {"", ".", ".."} or "\0" in p or os.sep in p for p in parts):
        raise SlideError(f"{name!r}: not a plain name of a file of a slide; rename it at its source")
    return folder.joinpath(*parts)


def _is_whole(target_folder: Path, parts: Sequence[SlidePart]) -> bool:
    try:  # after a power failure, a folder may have its name without all bytes of its files
        return all(_below(target_folder, part.name).stat().st_size == part.bytes for part in parts)
    except OSError:
        return False


def _remove(target_folder: Path) -> None:
    shutil.rmtree(target_folder, ignore_errors=True)


def _key(source: str, version: SlideVersion) -> str:
    where = source if is_remote(source) else str(Path(source).absolute())
    text = f"{where}\n{version.bytes}\n{version.modified}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _version(parts: Sequence[SlidePart]) -> SlideVersion:
    size = sum(part.bytes for part in parts)
    if len(parts) == 1:
        return SlideVersion(size, parts[0].modified)
    lines = "\n".join(f"{part.name}\t{part.bytes}\t{part.modified}" for part in parts)
    digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
    return SlideVersion(size, digest[:16])


def _find_parts(source: str, stopping: Callable[[], bool] = _never) -> list[SlidePart]:
    return _retried(lambda: source_of(source).find_parts(source), stopping)


def _retried(attempt: Callable[[], Result], stopping: Callable[[], bool] = _never) -> Result:
    for pause_s in PAUSES_S:
        try:
            return attempt()
        except TransientError:
            end = time.monotonic() + pause_s
            while time.monotonic() < end:
                if stopping():
                    raise StoppedError("stopped while waiting to try again") from None
                time.sleep(min(0.1, pause_s))
    return attempt()


def _sha256_of_file(path: Path, stopping: Callable[[], bool]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASHED_BYTES):
            if stopping():
                raise StoppedError(f"{path}: stopped while its checksum was computed")
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _reserved_folder(folder: Path, key: str) -> Iterator[Path]:
    """Give the name of a folder that no other process or thread uses until the block ends.

    It is reserved by a lock, not by being there: a lock ends with its process, however that ends.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        reserved = folder / f"{key}-{number}"
        with locked(reserved, wait=False) as held:
            if held:
                yield reserved
                return

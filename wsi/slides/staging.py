"""A slide from wherever it is as a local file: copied or downloaded first, removed afterwards.

Slides are read block by block in no regular order, which is slow on network drives and impossible
on object storage; a staged slide is read from a local disk instead. Sources are local paths and
``s3://``, ``gs://``, ``http://`` and ``https://`` URLs. Nothing is configured here; each kind of
source has its own environment:

``s3://``
    AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL (MinIO
    and others), or FSSPEC_S3='{"anon": true}' for public buckets.
``gs://``
    GOOGLE_APPLICATION_CREDENTIALS or ``gcloud auth application-default login``,
    STORAGE_EMULATOR_HOST, or FSSPEC_GS='{"token": "anon"}' for public buckets.
``https://``
    A signed URL, or name and password in ``~/.netrc`` (or the file that NETRC names).
"""

from __future__ import annotations

import hashlib
import importlib
import io
import itertools
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import unquote

from histostream.wsi.errors import OutputError, SlideError, StoppedError
from histostream.wsi.files import temporary_name, writing

SOURCES = {"s3": "cloud", "gs": "cloud", "http": "web", "https": "web"}  # file in wsi/sources
PAUSES_S = (0.5, 2.0)  # before the second and the third attempt
CHUNK_BYTES = 8 << 20  # one request of object storage; also what a stop waits for
HASHED_BYTES = 1 << 20
Result = TypeVar("Result")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # two characters or more: C:// is a drive


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class SlideVersion:
    """What tells one content of a slide from another, without reading it.

    Attributes
    ----------
    bytes
        Size of all its files together.
    modified
        Local: modification time in ns since 1970. Remote: ETag, or time of modification. Of a
        slide of several files: a digest of those of all.
    """

    bytes: int
    modified: str


@dataclass(frozen=True, slots=True)
class SlidePart:
    """One of the files that make a slide; most slides are a single one.

    Attributes
    ----------
    address
        Path or URL to read it from.
    name
        Where it lies below the slide's folder, with ``/``.
    bytes
        Its size, as announced.
    modified
        As in `SlideVersion`.
    """

    address: str
    name: str
    bytes: int
    modified: str


class TransientError(SlideError):
    """A source failed in a way that may be over in a moment."""


class _Source(Protocol):
    def find_parts(self, source: str) -> list[SlidePart]: ...
    def read_part(self, part: SlidePart, chunk_bytes: int) -> Generator[bytes]: ...


def is_remote(source: str) -> bool:
    """Whether a source is a URL rather than a local path."""
    return _SCHEME.match(source) is not None


def shown(source: str) -> str:
    """Return a source as it may be shown and recorded: a URL without its signature."""
    if not source.lower().startswith(("http://", "https://")):
        return source
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", source)[0])


def file_name(source: str) -> str:
    """Return the last component of a path or URL, checked to be a plain name.

    Raises
    ------
    SlideError
        If that of a URL is none: empty, hidden, ``..``, with a separator or control character.
    """
    if not is_remote(source):
        return Path(source).name or Path(source).resolve().name  # of "." and ".."
    if _module_of(source) == "web":
        host_and_path = re.split(r"[?#]", source)[0].partition("://")[2]
        name = unquote(host_and_path.partition("/")[2].rpartition("/")[2])
    else:
        name = source.rstrip("/").rpartition("/")[2]
    if not is_plain(name):
        raise SlideError(f"{shown(source)}: its last part {name!r} is no plain file name; rename it there")
    return name


def is_plain(name: str) -> bool:
    """Whether a name can be that of a file or folder without leading anywhere else."""
    odd = any(c in "/\\" or unicodedata.category(c) in {"Cc", "Cs"} for c in name)
    return bool(name.strip()) and not name.startswith(".") and not odd


def version_of(source: str) -> SlideVersion:
    """Tell which content a slide has, from sizes and times alone.

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
    if _module_of(url) == "web":
        raise SlideError(f"{shown(url)}: http has no listings; name every slide, in a .csv if many")
    from histostream.wsi.slides.sources import cloud

    return _retried(lambda: cloud.list_files(url))


def sha256_of(path: Path, stopping: Callable[[], bool] = _never) -> str:
    """Return the SHA-256 of a file's content, as ``sha256sum`` prints it.

    Of a folder: that of the lines which ``sha256sum`` prints for its files, sorted by relative
    name, without hidden ones.

    Raises
    ------
    SlideError
        If it cannot be read.
    StoppedError
        If ``stopping()`` says so, asked every MiB.
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

    A staged slide lies whole in a folder of its own below ``folder``, under its own name, and is
    removed when the block ends, however it ends. What a killed process left is taken over by the
    next one that stages the same version of the same slide: used if it is whole, else begun again.
    Processes that stage the same slide at the same time get a copy each.

    Parameters
    ----------
    source
        Local path or URL; a URL that ends with ``/`` is the folder of a DICOM series.
    folder
        Where to stage, on a fast local disk; None opens a local slide where it is.
    stopping
        Asked between chunks of 8 MiB and while waiting for the next attempt.

    Yields
    ------
    The path: of the slide's file, or of the folder of a DICOM series.

    Raises
    ------
    SlideError
        If the slide is missing, changes while it is copied, or cannot be reached in 3 attempts.
    OutputError
        If there is no room for it, or ``folder`` cannot be written.
    StoppedError
        If ``stopping()`` said so.
    """
    if folder is None:
        if is_remote(source):
            raise SlideError(f"{shown(source)}: remote slides need a folder to be staged in: pass one")
        yield Path(source)
        return
    name = file_name(source)
    parts = _find_parts(source, stopping)
    with _free_place(Path(folder), _key(source, _version(parts))) as place:
        try:
            if not _is_whole(place, parts):
                _remove(place)
                _stage(source, parts, place, stopping)
            yield place / name
        finally:
            _remove(place)


def _stage(source: str, parts: Sequence[SlidePart], place: Path, stopping: Callable[[], bool]) -> None:
    """Bring all files of a slide into ``place``, which appears when they are whole."""
    needed, free = sum(part.bytes for part in parts), shutil.disk_usage(place.parent).free
    if needed > free:
        raise OutputError(
            f"no room to stage {shown(source)} in {place.parent}: {needed / 2**30:.2f} GiB are "
            f"needed, {free / 2**30:.2f} GiB are free; free space there or choose another folder"
        )
    temporary = temporary_name(place)
    _remove(temporary)
    try:
        for part in parts:
            target = _below(temporary, part.name)
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            _retried(partial(_fetch, part, target, stopping), stopping)
        with writing(place):
            temporary.rename(place)
    finally:
        _remove(temporary)


def _fetch(part: SlidePart, target: Path, stopping: Callable[[], bool]) -> None:
    """Copy or download one file, and check that all of it came."""
    got = 0
    with writing(target):
        out = target.open("wb", buffering=0)
    with out, closing(_source(part.address).read_part(part, CHUNK_BYTES)) as chunks:
        for chunk in chunks:
            if stopping():
                raise StoppedError(f"{shown(part.address)}: stopped while it was staged")
            with writing(target):
                _write_all(out, chunk)
            got += len(chunk)
            if got > part.bytes:  # it may grow as fast as it is copied
                break
    if got != part.bytes and is_remote(part.address):
        raise TransientError(
            f"{shown(part.address)}: {got} of {part.bytes} bytes came; the connection was cut or "
            "the server announces a wrong size: try again, or download it and pass the file"
        )
    if got != part.bytes:
        raise SlideError(
            f"{part.address}: it had {part.bytes} bytes and now {got}; try again when nothing writes it any more"
        )
    if not is_remote(part.address):
        with writing(target):
            os.utime(target, ns=(int(part.modified), int(part.modified)))


def _write_all(out: io.FileIO, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:  # an unbuffered write may take a part only, as at the end of a full disk
        left = left[out.write(left) :]


def _below(folder: Path, name: str) -> Path:
    """Where a file of a slide goes; names come from servers, and must not lead out."""
    parts = name.split("/")
    if any(p in {"", ".", ".."} or "\0" in p or os.sep in p for p in parts):
        raise SlideError(f"{name!r}: not a plain name of a file of a slide; rename it at its source")
    return folder.joinpath(*parts)


def _is_whole(place: Path, parts: Sequence[SlidePart]) -> bool:
    try:  # the rename said so; after a power failure, sizes may still say otherwise
        return all(_below(place, part.name).stat().st_size == part.bytes for part in parts)
    except OSError:
        return False


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)


def _key(source: str, version: SlideVersion) -> str:
    where = source if is_remote(source) else str(Path(source).absolute())
    said = f"{where}\n{version.bytes}\n{version.modified}"
    return hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _version(parts: Sequence[SlidePart]) -> SlideVersion:
    size = sum(part.bytes for part in parts)
    if len(parts) == 1:
        return SlideVersion(size, parts[0].modified)
    said = "\n".join(f"{part.name}\t{part.bytes}\t{part.modified}" for part in parts)
    digest = hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()
    return SlideVersion(size, digest[:16])


def _find_parts(source: str, stopping: Callable[[], bool] = _never) -> list[SlidePart]:
    return _retried(lambda: _source(source).find_parts(source), stopping)


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


def _source(source: str) -> _Source:
    module: _Source = importlib.import_module(f"histostream.wsi.slides.sources.{_module_of(source)}")
    return module


def _module_of(source: str) -> str:
    scheme = _SCHEME.match(source)
    if scheme is None:
        return "disk"
    if scheme[1].lower() not in SOURCES:
        known = ", ".join(f"{name}://" for name in SOURCES)
        raise SlideError(f"{source}: no such kind of source; use a local path or one of {known}")
    return SOURCES[scheme[1].lower()]


def _sha256_of_file(path: Path, stopping: Callable[[], bool]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASHED_BYTES):
            if stopping():
                raise StoppedError(f"{path}: stopped while its checksum was computed")
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _free_place(folder: Path, key: str) -> Iterator[Path]:
    """Give a folder name that no other process or thread uses until the block ends.

    A lock says so, not a file's presence: it ends with its process, however that ends.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        place = folder / f"{key}-{number}"
        lock = place.with_name(f"{place.name}.lock")
        with writing(lock):
            handle = _lock(lock)
        if handle is None:
            continue
        try:
            yield place
        finally:
            with suppress(OSError):  # Windows does not remove an open file
                lock.unlink()
            os.close(handle)
        return


def _lock(path: Path) -> int | None:
    """Lock a file; None if another holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    ours = False
    try:
        with suppress(FileNotFoundError):  # its holder removed it between our two calls
            ours = _is_locked(handle) and os.path.samestat(os.fstat(handle), path.stat())
    finally:
        if not ours:
            os.close(handle)
    return handle if ours else None


if sys.platform == "win32":
    import msvcrt

    def _is_locked(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _is_locked(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

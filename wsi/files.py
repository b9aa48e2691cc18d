"""Write files so that each appears whole or not at all, and lock files against other processes."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from histostream.wsi.errors import HistoError, OutputError

log = logging.getLogger(__name__)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write one JSON file, whole or not at all."""
    write_whole(path, json_text(content))


def write_whole(path: Path, *contents: str | bytes) -> None:
    """Write a file whole or not at all; other processes may write it at the same time.

    Parameters
    ----------
    path
        Final name; its folder must exist.
    contents
        What the file holds, one part after the other. Text is written as UTF-8.

    Raises
    ------
    OutputError
        If it cannot be written; an older file is then kept.
    """
    with whole_file(path, f"{uuid.uuid4().hex}.part") as temporary, temporary.open("wb") as file:
        for content in contents:
            file.write(_encoded(content) if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path, suffix: str = "part") -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; the file gets its final name when the block ends.

    If the block fails, what it wrote is removed and an older file under ``path`` is kept.

    Raises
    ------
    OutputError
        If the operating system refuses to write the file.
    """
    temporary = temporary_name(path, suffix)
    with writing(path):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        except BaseException:
            remove([temporary])
            raise


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `write_whole` that killed processes left beside ``path``.

    Only for the holder of its lock (`locked`): another writer may be at work otherwise.
    """
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.part")
    remove(other for other in path.parent.iterdir() if leftover.fullmatch(other.name))


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file or folder against other processes and threads of this host.

    The lock is the file ``path`` + ".lock", removed by its last holder. The operating system frees
    it when its process ends, however that ends.

    Parameters
    ----------
    path
        What the lock protects; its folder must exist.
    wait
        Wait for another holder.

    Yields
    ------
    Whether the lock is held; it always is if ``wait``.
    """
    from filelock import FileLock, Timeout

    file = path.with_name(f"{path.name}.lock")
    lock = FileLock(file, thread_local=False)
    with writing(file):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if wait:
                log.info("%s: waiting for another process that works on it", path)
                lock.acquire()
    if not lock.is_locked:
        yield False
        return
    try:
        yield True
    finally:
        # Removed while it is held: a waiting process notices that its file is removed and makes a new one.
        with suppress(OSError):  # Windows does not remove an open file; there filelock does it
            file.unlink()
        lock.release()


def json_text(content: Mapping[str, object]) -> str:
    """Return ``content`` as indented JSON, in the order of its keys."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_temporary(path: Path, text: str) -> tuple[Path, Path]:
    """Write ``text`` (UTF-8) under the temporary name of ``path``; return the (temporary, final) pair."""
    temporary = temporary_name(path)
    with writing(path):
        try:
            temporary.write_bytes(_encoded(text))
        except OSError:
            remove([temporary])
            raise
    return temporary, path


def _encoded(text: str) -> bytes:
    # A file's name may hold bytes that are no text: JSON's own escape stands for them.
    return text.encode("utf-8", "backslashreplace")


def temporary_name(path: Path, suffix: str = "part") -> Path:
    """Return the hidden name beside ``path`` of an unfinished file.

    It is the same in every run, so that the next run overwrites the file of a killed one.
    """
    return path.with_name(f".{path.name}.{suffix}")


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders that may not exist, without raising an error."""
    for path in paths:
        with suppress(OSError):
            if is_folder(path):
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's errors while ``path`` is written into an `OutputError`."""
    try:
        yield
    except HistoError:
        raise
    except OSError as error:
        raise OutputError(_message(path, error)) from error


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def _message(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return f"no room to write {path} ({reason}): free space there or choose another folder"
    if error.errno in _DENIED:
        return f"no permission to write {path} ({reason}): change its permissions or choose another folder"
    if error.errno in {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}:
        return f"cannot write {path} ({reason}): move the file that is in the way or choose another folder"
    return f"cannot write {path} ({reason}): check the disk or choose another folder"


def replace_whole(temporary: Path, final: Path) -> None:
    """Rename a finished file or folder to its final name, in place of an older one.

    A folder cannot be renamed over another, so an older folder is renamed first and then removed. If
    the process is killed between the two renames, there is no marker (run.json) either: the run is
    done again, which also removes the renamed folder.
    """
    if not is_folder(temporary):
        temporary.replace(final)
        return
    old = temporary_name(final, "old")
    remove([old])
    if is_folder(final):
        final.replace(old)
    temporary.replace(final)
    remove([old])


def is_folder(path: Path) -> bool:
    """Whether a path is a folder and not a link, whose target must not be moved or removed."""
    return path.is_dir() and not path.is_symlink()


def sync_all(path: Path) -> None:
    """Force a file, or a folder with its content, to the disk."""
    if is_folder(path):
        for entry in path.iterdir():
            sync_all(entry)
    sync(path)


def sync(path: Path) -> None:
    """Force one file or folder to the disk."""
    # Otherwise a rename may reach the disk before the file's content.
    if os.name == "nt" and path.is_dir():  # Windows cannot sync folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # network drives that cannot sync
            raise
    finally:
        os.close(handle)

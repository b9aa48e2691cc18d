"""Write files so that each appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from histostream.wsi.errors import OutputError


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write one JSON file, whole or not at all."""
    write_whole(path, json_text(content))


def write_whole(path: Path, text: str) -> None:
    """Write a text (UTF-8), whole or not at all, whoever else writes it at the same time."""
    temporary, _ = write_temporary(path, text, f"{uuid.uuid4().hex}.part")
    with writing(path):
        try:
            sync(temporary)
            temporary.replace(path)
        except OSError:
            remove([temporary])
            raise


def json_text(content: Mapping[str, object]) -> str:
    """Return ``content`` as indented JSON, in the order of its keys."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_temporary(path: Path, text: str, suffix: str = "part") -> tuple[Path, Path]:
    """Write ``text`` (UTF-8) beside ``path``; return the (temporary, final) pair."""
    temporary = temporary_name(path, suffix)
    with writing(path):
        try:
            # A file's name may hold bytes that are no text: JSON's own escape stands for them.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
        except OSError:
            remove([temporary])
            raise
    return temporary, path


def temporary_name(path: Path, suffix: str = "part") -> Path:
    """Return the hidden name beside ``path`` that an unfinished file has.

    It is the same in every run, so what a killed run left is overwritten by the next.
    """
    return path.with_name(f".{path.name}.{suffix}")


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders that may not exist.

    The error that led here matters more than a new one.
    """
    for path in paths:
        with suppress(OSError):
            if is_folder(path):
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's errors while writing ``path`` into an `OutputError`."""
    try:
        yield
    except OutputError:
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
        return f"may not write {path} ({reason}): change its permissions or choose another folder"
    if error.errno in {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}:
        return f"cannot write {path} ({reason}): move what is in the way or choose another folder"
    return f"cannot write {path} ({reason}): check the disk or choose another folder"


def replace_whole(temporary: Path, final: Path) -> None:
    """Put a finished file or folder in place of an older one.

    A folder cannot be renamed over another, so the older one steps aside first. Between the two
    renames there is none of the name; a process that is killed there leaves no marker either, so
    the run is done again, which also removes what stepped aside.
    """
    if not is_folder(temporary):
        temporary.replace(final)
        return
    aside = temporary_name(final, "old")
    remove([aside])
    if is_folder(final):
        final.replace(aside)
    temporary.replace(final)
    remove([aside])


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself: what a link points to is not ours to move or remove."""
    return path.is_dir() and not path.is_symlink()


def sync_all(path: Path) -> None:
    """Force a file, or a folder with all that is in it, to the disk."""
    if is_folder(path):
        for entry in path.iterdir():
            sync_all(entry)
    sync(path)


def sync(path: Path) -> None:
    """Force one file or folder to the disk."""
    # A rename may reach the disk before the bytes it points to, unless they are forced first.
    if os.name == "nt" and path.is_dir():  # Windows has no such call for folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # network drives: no such call
            raise
    finally:
        os.close(handle)

"""Where finished rows go: the contract of a sink, and the folder that its files are published in.

A sink writes beside its final names. The folder moves everything there at the end, ``run.json``
last, so that a folder with a ``run.json`` is always complete and never a mixture of two runs.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import OutputError
from histostream.wsi.lock import Lock, Process

OUTSIDE = 255  # label of pixels that were not analysed: outside the tissue mask or the ROI
RUN_FILE = "run.json"
LOCK_FILE = ".lock"


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """A class of the label map; its label is its place in the list of classes.

    Attributes
    ----------
    name
        As shown to people. The class called "background" is never painted.
    color
        Red, green, blue, 0 to 255.
    """

    name: str
    color: tuple[int, int, int]

    def __post_init__(self) -> None:
        if len(self.color) != 3 or not all(0 <= value <= 255 for value in self.color):
            raise ValueError(f"color {self.color!r} of class {self.name!r}: use 3 x 0 to 255")

    @property
    def hex(self) -> str:
        """The colour as "#rrggbb"."""
        return f"#{bytes(self.color).hex()}"


@dataclass(frozen=True, slots=True)
class SlideInfo:
    """What sinks need to know of a slide.

    Attributes
    ----------
    name
        Name of the slide, as it appears in tables.
    width, height
        Pixels of the level that inference runs at.
    mpp
        Side of such a pixel, in um.
    classes
        The class of label 0, 1, ...; at most 255, since `OUTSIDE` is none of them.
    """

    name: str
    width: int
    height: int
    mpp: float
    classes: tuple[ClassInfo, ...]

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"{self.name}: {self.width} x {self.height} px has no pixels")
        if not self.mpp > 0:
            raise ValueError(f"{self.name}: mpp={self.mpp!r} is not a size: use um per pixel")
        if not 1 <= len(self.classes) <= OUTSIDE:
            raise ValueError(f"{self.name}: {len(self.classes)} classes: use 1 to {OUTSIDE}")


@dataclass(frozen=True, slots=True)
class Segmented:
    """Finished rows of one column band.

    Attributes
    ----------
    x, y
        Top left corner, in pixels of the level that inference runs at.
    labels
        (H, W) uint8, a class or `OUTSIDE`.
    probabilities
        (H, W, K) uint8, ``round(255 p)`` of each class, or None.
    """

    x: int
    y: int
    labels: NDArray[np.uint8]
    probabilities: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or self.labels.dtype != np.uint8:
            raise ValueError(f"labels are {_kind(self.labels)}: use (H, W) uint8")
        probs = self.probabilities
        if probs is not None and (
            probs.ndim != 3 or probs.shape[:2] != self.labels.shape or probs.dtype != np.uint8
        ):
            raise ValueError(
                f"probabilities are {_kind(probs)}: use (H, W, K) uint8 beside {_kind(self.labels)}"
            )

    @classmethod
    def outside(
        cls, x: int, y: int, width: int, height: int, *, classes: int | None = None
    ) -> Segmented:
        """Rows that no tile reaches: one label and one score, broadcast, so read-only.

        Parameters
        ----------
        x, y, width, height
            Where, in pixels of the level that inference runs at.
        classes
            Number of scores, all 0; None: there are no scores.
        """
        labels = np.broadcast_to(np.uint8(OUTSIDE), (height, width))
        if classes is None:
            return cls(x, y, labels)
        return cls(x, y, labels, np.broadcast_to(np.uint8(0), (height, width, classes)))

    @property
    def all_outside(self) -> bool:
        """Whether the shape of the arrays alone shows that nothing was analysed here."""
        return is_one_value(self.labels) and bool(self.labels[0, 0] == OUTSIDE)


def is_one_value(pixels: NDArray[np.uint8]) -> bool:
    """Whether pixels (H, W[, C]) are one pixel broadcast, as their strides say without a look."""
    return pixels.size > 0 and pixels.strides[:2] == (0, 0)


class Sink(Protocol):
    """Takes finished rows, leaves files.

    Parts come in column bands: inside a band top to bottom without gaps, each band from the first
    row to the last; band edges are multiples of 512 px except at the slide's right border; part
    heights vary. Rows without tissue come too, full of `OUTSIDE` (and read-only, see
    `Segmented.outside`).
    """

    def write(self, part: Segmented) -> None:
        """Take the next rows."""

    def finish(self) -> list[tuple[Path, Path]]:
        """Complete the files, or folders, under temporary names; return (temporary, final)."""

    def abort(self) -> None:
        """Remove the temporary files. Allowed at any time, also twice, also after `finish`."""


AnySink = TypeVar("AnySink", bound=Sink)


class OutputFolder:
    """The folder ``out/stem``: all files of a run appear in it, or none.

    ::

        with OutputFolder(out, "slide") as folder:
            folder.add(LabelTiff(folder.path / "labels.tif", info))
            for part in parts:
                folder.write(part)
            folder.run["seconds"] = 12.3

    Leaving the block publishes; an exception inside it removes what was written, and the folder
    too if it is new and empty. Inside the block no other process works on the folder, not on
    another host either; of those in ``gone`` it is known that they have ended.

    Raises
    ------
    LockedError
        On entering, if another process is at work on it.
    OutputError
        On entering or leaving, if something cannot be written.

    Attributes
    ----------
    path
        The folder.
    run
        What ``run.json`` will say; the names of the published files are added as ``outputs``.
    """

    def __init__(self, out: Path, stem: str, gone: Collection[Process] = ()) -> None:
        if not stem or stem == ".." or Path(stem).name != stem:
            raise OutputError(
                f"{stem!r} is not a plain name for a folder of results: give the slide another"
            )
        self.path = Path(out) / stem
        self.run: dict[str, object] = {}
        self._sinks: list[Sink] = []
        self._finished: list[tuple[Path, Path]] | None = None
        self._texts: list[tuple[Path, Path]] = []
        self._created: list[Path] = []
        self._lock = Lock(self.path / LOCK_FILE, gone)
        self._afterwards: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        while not self._entered():
            pass
        self._created = missing
        return self

    def _entered(self) -> bool:
        """Make the folder and lock it; False if another process removed it in between."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.__enter__()
        except OutputError:
            if self.path.exists():
                raise
            return False
        return True

    def after_publishing(self, call: Callable[[], None]) -> None:
        """Call something when the files are in place, and still nobody else is at work."""
        self._afterwards.append(call)

    def add(self, sink: AnySink) -> AnySink:
        """Send what is written to the folder to ``sink`` too; returns it."""
        self._sinks.append(sink)
        return sink

    def write(self, part: Segmented) -> None:
        """Hand finished rows to every sink.

        Raises
        ------
        OutputError
            If the disk is full or refuses, or another process has taken the folder over.
        """
        self._lock.check()
        for sink in self._sinks:
            sink.write(part)

    def finish(self) -> None:
        """Complete every file, still under its temporary name.

        Leaving the block does it too; call it to measure the time it takes.
        """
        if self._finished is None:
            self._finished = [pair for sink in self._sinks for pair in sink.finish()]

    @property
    def unpublished(self) -> dict[str, Path]:
        """Where the files are that `finish` has completed, by their final names."""
        return {final.name: temporary for temporary, final in (self._finished or [])}

    def add_text(self, name: str, text: str) -> None:
        """Publish a text that is made of what the sinks have finished.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        self._texts.append(write_temporary(self.path / name, text))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self._abort()
                return
            try:
                self.finish()
                self._publish()
            except BaseException:
                self._abort()
                raise
        finally:
            self._lock.__exit__(kind, error, trace)
            if self._created and not (self.path / RUN_FILE).exists():
                self._remove_new_folders()

    def _publish(self) -> None:
        self._lock.check()
        pairs = [*(self._finished or []), *self._texts]
        names = sorted(final.name for _, final in pairs)
        marker = self.path / RUN_FILE
        before = [self.path / name for name in sorted(_outputs_of(marker) - set(names))]
        last = write_temporary(marker, json_text({**self.run, "outputs": names}))
        for temporary, final in (*pairs, last):
            with writing(final):
                _sync_all(temporary)
        with writing(marker):
            # From here to the end the folder is a mixture of two runs, and has no marker.
            marker.unlink(missing_ok=True)
            _sync(self.path)
        remove(before)  # of other options; beside the new ones they would pass for theirs
        for temporary, final in (*pairs, last):
            with writing(final):
                if final == marker:
                    _sync(self.path)
                _replace(temporary, final)
        with writing(self.path):
            _sync(self.path)
        for call in self._afterwards:
            call()

    def _abort(self) -> None:
        for sink in self._sinks:
            sink.abort()
        remove([temporary_name(self.path / RUN_FILE), *(temporary for temporary, _ in self._texts)])

    def _remove_new_folders(self) -> None:
        with suppress(OSError):  # not empty, or already gone: then it is not ours to remove
            for folder in self._created:
                folder.rmdir()


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write one JSON file, whole or not at all."""
    write_whole(path, json_text(content))


def write_whole(path: Path, text: str) -> None:
    """Write a text (UTF-8), whole or not at all, whoever else writes it at the same time."""
    temporary, _ = write_temporary(path, text, f"{uuid.uuid4().hex}.part")
    with writing(path):
        try:
            _sync(temporary)
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
            if _is_folder(path):
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


def _replace(temporary: Path, final: Path) -> None:
    """Put a finished file or folder in place of an older one.

    A folder cannot be renamed over another, so the older one steps aside first. Between the two
    renames there is none of the name; a process that is killed there leaves no marker either, so
    the run is done again, which also removes what stepped aside.
    """
    if not _is_folder(temporary):
        temporary.replace(final)
        return
    aside = temporary_name(final, "old")
    remove([aside])
    if _is_folder(final):
        final.replace(aside)
    temporary.replace(final)
    remove([aside])


def _outputs_of(marker: Path) -> set[str]:
    """Return the names in its folder that a run.json lists; none if it cannot be read."""
    try:
        names = json.loads(marker.read_text(encoding="utf-8"))["outputs"]
        texts = [name for name in names if isinstance(name, str)]
        return {name for name in texts if Path(name).name == name and not name.startswith(".")}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()


def _is_folder(path: Path) -> bool:
    """Whether it is a folder itself: what a link points to is not ours to move or remove."""
    return path.is_dir() and not path.is_symlink()


def _sync_all(path: Path) -> None:
    """Force a file, or a folder with all that is in it, to the disk."""
    if _is_folder(path):
        for entry in path.iterdir():
            _sync_all(entry)
    _sync(path)


def _sync(path: Path) -> None:
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


def _kind(array: NDArray[np.uint8]) -> str:
    return f"{array.shape} {array.dtype}"

"""What a run has finished of a slide, on disk, so that a killed run goes on where it was.

::

    OUT/slide/.journal/begun.json      what is run: slide, model, options, column bands
    OUT/slide/.journal/0.strips        finished strips of the band that begins at column 0
    OUT/slide/.journal/4096.strips     ...

A strip is one record: a header with a checksum, what is known of the strip, labels, and scores
where they are wanted. Records are only ever appended, and each is forced to the disk; a record that
a killed process left half-written fails its checksum and is cut off. Sinks are fed from the
records again, so they need not know how to go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Self

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import OutputError
from histostream.wsi.files import write_json, writing
from histostream.wsi.geometry import Box
from histostream.wsi.outputs.label_rows import ClassInfo, LabelRows
from histostream.wsi.records import from_json, to_json
from histostream.wsi.slides.resolution import SlideView

JOURNAL = ".journal"
BEGUN = "begun.json"
MAGIC = b"HSJ1"
# Magic, CRC-32 of all that follows; bytes of: what is known, labels, scores.
HEADER = struct.Struct("<4sIIQQ")
ZSTD_LEVEL = 1  # label maps: above 1 GB/s
WAITING = 1  # strips that wait while one is written


class JournalError(OutputError):
    """A journal belongs to another run, or cannot be read."""


@dataclass(frozen=True, slots=True)
class ClassView:
    """Name and colour of a class, as the viewer shows it."""

    name: str
    color: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ViewInfo:
    """What the viewer needs to show a run that is not finished.

    Attributes
    ----------
    source
        Path or URL of the slide.
    width, height, result_mpp, downsample
        Size and resolution of the label map, see `SlideView`.
    classes
        The classes, in the order of their labels.
    """

    source: str
    width: int
    height: int
    result_mpp: float
    downsample: float
    classes: tuple[ClassView, ...]

    @classmethod
    def of(cls, source: str, view: SlideView, classes: Sequence[ClassInfo]) -> Self:
        """Return it for a slide that is run."""
        assert view.mpp is not None  # a model has a resolution, so the view has one
        colors = tuple(ClassView(entry.name, entry.color) for entry in classes)
        return cls(source, view.width, view.height, view.mpp, view.downsample, colors)


@dataclass(frozen=True, slots=True)
class RunManifest:
    """What begun.json holds: the run that the journal belongs to.

    Attributes
    ----------
    fingerprint
        Names and values that decide the bits of the result: slide, model, options.
    bands
        (x0, x1) of each column band, in pixels.
    max_memory_mib
        Bound on memory that the bands were planned for; None: there was none.
    runs
        How often the run was begun or continued.
    view_info
        Where the slide is and how it is read, for the viewer; None in journals of older versions.
    further
        Keys that this version does not know.
    """

    fingerprint: Mapping[str, Any] = field(metadata={"key": "what"})
    bands: tuple[tuple[int, int], ...]
    max_memory_mib: int | None
    runs: int
    view_info: ViewInfo | None = field(default=None, metadata={"key": "seen"})
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """A finished strip, and the damaged places that were found on the way to it."""

    part: LabelRows
    damaged: tuple[Box, ...]


class Journal:
    """The journal of one slide's run.

    Parameters
    ----------
    folder
        The slide's output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL

    def read(self) -> RunManifest | None:
        """Return the run that was begun; None if there is none.

        Raises
        ------
        JournalError
            If the journal cannot be read.
        """
        try:
            return from_json(RunManifest, json.loads((self.path / BEGUN).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise JournalError(
                f"{self.path / BEGUN}: cannot be read ({error}); --restart starts the slide over"
            ) from error

    def begin(self, manifest: RunManifest) -> None:
        """Write the manifest of a run; strips may follow."""
        with writing(self.path):
            self.path.mkdir(exist_ok=True)
        write_json(self.path / BEGUN, to_json(manifest))

    def band(self, x0: int, x1: int, height: int) -> BandJournal:
        """Open the strips of one column band; see `BandJournal`."""
        return BandJournal(self.path / f"{x0}.strips", x0, x1, height)

    def has_strips(self) -> bool:
        """Whether any strip is finished."""
        return any(file.stat().st_size for file in self.path.glob("*.strips"))

    def remove(self) -> None:
        """Forget the run."""
        with contextlib.suppress(OSError):  # first: without it the rest means nothing
            (self.path / BEGUN).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or holds what is not ours
            for file in self.path.iterdir():
                file.unlink()
            self.path.rmdir()


class BandJournal:
    """The finished strips of one column band, in order; hold it in a ``with`` block.

    `finished` gives those that a former run left; call it first. A thread writes what is appended.

    Parameters
    ----------
    path
        The file.
    x0, x1
        The band's columns, in pixels.
    height
        The slide's, in pixels.

    Attributes
    ----------
    y
        Rows that are finished, from the top.
    """

    def __init__(self, path: Path, x0: int, x1: int, height: int) -> None:
        self.path, self.y = path, 0
        self._x0, self._x1, self._height = x0, x1, height
        self._file: IO[bytes] | None = None
        self._queue: queue.Queue[Record | None] = queue.Queue(WAITING)
        self._writer: threading.Thread | None = None
        self._failed: Exception | None = None

    def __enter__(self) -> Self:
        with writing(self.path):
            self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        return self

    def finished(self) -> Iterator[Record]:
        """Yield the strips that are whole, and cut off what comes after them.

        Raises
        ------
        OutputError
            If the file cannot be read.
        """
        assert self._file is not None
        self.y, end = 0, 0
        with writing(self.path):
            self._file.seek(0)
        while True:
            with writing(self.path):
                record = _read_record(self._file)
            if record is None or not self._continues(record.part):
                break
            end = self._file.tell()
            self.y += len(record.part.labels)
            yield record
        with writing(self.path):
            self._file.truncate(end)
            self._file.seek(end)

    def write(self, part: LabelRows, damaged: tuple[Box, ...] = ()) -> None:
        """Append a strip; its arrays may be used again at once.

        Raises
        ------
        OutputError
            If an earlier one could not be written.
        """
        self._raise()
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="journal", daemon=True)
            self._writer.start()
        self._queue.put(Record(_copy(part), damaged))
        self.y = part.y + len(part.labels)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._writer is not None:
                self._queue.put(None)
                self._writer.join()
            if kind is None:
                self._raise()
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()

    def _continues(self, part: LabelRows) -> bool:
        return _continues(part, self._x0, self._x1, self.y, self._height)

    def _raise(self) -> None:
        if self._failed is not None:
            with writing(self.path):
                raise self._failed

    def _write_all(self) -> None:
        """Write strips until there are no more; what waits together is forced to the disk once."""
        more = True
        while more:
            waiting = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.append(self._queue.get_nowait())
            more = None not in waiting
            if self._failed is not None:
                continue  # the other side is told with its next strip
            try:
                assert self._file is not None
                for record in waiting:
                    if record is not None:
                        self._file.write(_encoded(record))
                self._file.flush()
                os.fsync(self._file.fileno())
            except Exception as error:  # whatever it is, the other side must not wait for ever
                self._failed = error


def watched_strips(
    path: Path,
    x0: int,
    x1: int,
    height: int,
    *,
    offset: int = 0,
    y: int = 0,
    scores: bool = True,
) -> Iterator[tuple[Record, int]]:
    """Read the whole strips of a band while another process may append to it; changes nothing.

    Parameters
    ----------
    path
        The file; if there is none, there are no strips.
    x0, x1, height
        The band's columns and the slide's height, in pixels.
    offset, y
        Where to begin: bytes, and rows, before a strip; what was yielded last gives the next.
    scores
        Whether scores are decoded too, where there are any.

    Yields
    ------
    Each strip, and the offset of the byte after it. They end at a strip that is not whole (yet).

    Raises
    ------
    JournalError
        If the file cannot be read, or is no journal.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while (record := _read_record(file, scores)) is not None:
                if not _continues(record.part, x0, x1, y, height):
                    return
                y += len(record.part.labels)
                yield record, file.tell()
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
        raise JournalError(f"{path}: cannot be read ({error}); --restart starts over") from error


def _continues(part: LabelRows, x0: int, x1: int, y: int, height: int) -> bool:
    rows, columns = part.labels.shape
    return (part.x, part.y, columns) == (x0, y, x1 - x0) and 0 < rows <= height - y


def _copy(part: LabelRows) -> LabelRows:
    if part.all_outside:  # one value, which nobody changes
        return part
    scores = part.probabilities
    return replace(part, labels=part.labels.copy(), probabilities=None if scores is None else scores.copy())


def _encoded(record: Record) -> bytes:
    part = record.part
    height, width = part.labels.shape
    scores = part.probabilities
    known = {
        "x": part.x,
        "y": part.y,
        "height": height,
        "width": width,
        "classes": None if scores is None else scores.shape[2],
        "outside": part.all_outside,
        "damaged": [[b.x, b.y, b.width, b.height] for b in record.damaged],
    }
    said = json.dumps(known).encode()
    labels = pressed = b""
    if not part.all_outside:
        labels = _pressed(part.labels)
        pressed = b"" if scores is None else _pressed(scores)
    sizes = HEADER.pack(MAGIC, 0, len(said), len(labels), len(pressed))[8:]
    body = b"".join((sizes, said, labels, pressed))
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def _pressed(array: NDArray[np.uint8]) -> bytes:
    return bytes(imagecodecs.zstd_encode(array.tobytes(), level=ZSTD_LEVEL))


def _read_record(file: IO[bytes], with_scores: bool = True) -> Record | None:
    """Read the next record; None at the end, and where a record is not whole."""
    head = file.read(HEADER.size)
    if len(head) < HEADER.size or head[:4] != MAGIC:
        return None
    _, checksum, *sizes = HEADER.unpack(head)
    left = os.fstat(file.fileno()).st_size - file.tell()
    if sum(sizes) > left:
        return None
    body = file.read(sum(sizes))
    if zlib.crc32(body, zlib.crc32(head[8:])) != checksum:
        return None
    said, labels, scores = (body[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes)))
    known = json.loads(said)
    damaged = tuple(Box(*box) for box in known["damaged"])
    x, y, height, width = (known[name] for name in ("x", "y", "height", "width"))
    classes = known["classes"] if with_scores else None
    if known["outside"]:
        return Record(LabelRows.outside(x, y, width, height, classes=classes), damaged)
    shared = _unpressed(scores, (height, width, classes)) if classes else None
    return Record(LabelRows(x, y, _unpressed(labels, (height, width)), shared), damaged)


def _unpressed(data: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    values = imagecodecs.zstd_decode(data, out=int(np.prod(shape)))
    return np.frombuffer(values, np.uint8).reshape(shape)

"""The finished rows of a run on disk, so that an interrupted run can be continued.

::

    OUT/slide/.journal/begun.json      the run: slide, model, options, column bands
    OUT/slide/.journal/0.strips        finished strips of the band that begins at column 0
    OUT/slide/.journal/4096.strips     ...

A strip is one record: a header with a checksum, a description of the strip in JSON, labels, and scores
if they are written. Records are only appended, and each is flushed to the disk. A record that a killed
process left incomplete fails its checksum and is cut off. A continued run writes the records to the
output files again, so that sinks need no state of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import OutputError
from histostream.wsi.files import write_json, writing
from histostream.wsi.geometry import Box
from histostream.wsi.outputs.label_rows import SCORE_MAX, ClassInfo, LabelRows
from histostream.wsi.records import from_json, to_json

JOURNAL = ".journal"
BEGUN = "begun.json"
MAGIC = b"HSJ2"
MAGIC_BYTES = b"HSJ1"  # of versions before 0.2, whose scores are bytes
# Magic, CRC-32 of all that follows, and the lengths of description, labels and scores.
HEADER = struct.Struct("<4sIIQQ")
ZSTD_LEVEL = 1  # label maps: above 1 GB/s
Value = TypeVar("Value", np.uint8, np.uint16)
WAITING = 1  # strips that wait for the writing thread


class JournalError(OutputError):
    """A journal belongs to another run, or cannot be read."""


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
    classes: tuple[ClassInfo, ...]


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
    """A finished strip, and the damaged blocks that were found while it was read."""

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
    """The finished strips of one column band, in order; use it in a ``with`` block.

    Call `finished` first: it returns the strips of an interrupted run. A thread writes new strips.

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
        Number of finished rows, from the top.
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
        """Yield the complete strips, and cut off what comes after them.

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
        """Append a strip. Its arrays are copied.

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
        """Write strips until there are no more; those that wait together are flushed to the disk once."""
        more = True
        while more:
            waiting = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.append(self._queue.get_nowait())
            more = None not in waiting
            if self._failed is not None:
                continue  # `write` raises the error with its next strip
            try:
                assert self._file is not None
                for record in waiting:
                    if record is not None:
                        self._file.write(_encoded(record))
                self._file.flush()
                os.fsync(self._file.fileno())
            except Exception as error:  # any error: `write` must not wait for ever
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
    """Read the complete strips of a band while another process may append to it.

    Parameters
    ----------
    path
        The file; without it there are no strips.
    x0, x1, height
        The band's columns and the slide's height, in pixels.
    offset, y
        Where to begin: bytes and rows before the first strip to read.
    scores
        Whether scores are decoded too, if there are any.

    Yields
    ------
    Each strip, and the offset of the byte after it, until a strip is not complete (yet).

    Raises
    ------
    JournalError
        If the file cannot be read, or is not a journal.
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
    if part.all_outside:  # one broadcast value, which is never changed
        return part
    scores = part.probabilities
    return replace(part, labels=part.labels.copy(), probabilities=None if scores is None else scores.copy())


def _encoded(record: Record) -> bytes:
    part = record.part
    height, width = part.labels.shape
    scores = part.probabilities
    description = {
        "x": part.x,
        "y": part.y,
        "height": height,
        "width": width,
        "classes": None if scores is None else scores.shape[2],
        "outside": part.all_outside,
        "damaged": [[b.x, b.y, b.width, b.height] for b in record.damaged],
    }
    text = json.dumps(description).encode()
    labels = compressed_scores = b""
    if not part.all_outside:
        labels = _compressed(part.labels)
        compressed_scores = b"" if scores is None else _compressed(scores)
    sizes = HEADER.pack(MAGIC, 0, len(text), len(labels), len(compressed_scores))[8:]
    body = b"".join((sizes, text, labels, compressed_scores))
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def _compressed(array: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    return bytes(imagecodecs.zstd_encode(array.tobytes(), level=ZSTD_LEVEL))


def _read_record(file: IO[bytes], with_scores: bool = True) -> Record | None:
    """Read the next record; None at the end, and where a record is not complete."""
    head = file.read(HEADER.size)
    if len(head) < HEADER.size or head[:4] not in (MAGIC, MAGIC_BYTES):
        return None
    _, checksum, *sizes = HEADER.unpack(head)
    left = os.fstat(file.fileno()).st_size - file.tell()
    if sum(sizes) > left:
        return None
    body = file.read(sum(sizes))
    if zlib.crc32(body, zlib.crc32(head[8:])) != checksum:
        return None
    text, labels, scores = (body[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes)))
    description = json.loads(text)
    damaged = tuple(Box(*box) for box in description["damaged"])
    x, y, height, width = (description[name] for name in ("x", "y", "height", "width"))
    classes = description["classes"] if with_scores else None
    if description["outside"]:
        return Record(LabelRows.outside(x, y, width, height, classes=classes), damaged)
    probabilities = None
    if classes and head[:4] == MAGIC:
        probabilities = _decompressed(scores, (height, width, classes), np.uint16)
    elif classes:
        probabilities = _decompressed(scores, (height, width, classes), np.uint8) * np.uint16(SCORE_MAX // 255)
    return Record(LabelRows(x, y, _decompressed(labels, (height, width), np.uint8), probabilities), damaged)


def _decompressed(data: bytes, shape: tuple[int, ...], dtype: type[Value]) -> NDArray[Value]:
    values = imagecodecs.zstd_decode(data, out=int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.frombuffer(values, dtype).reshape(shape)

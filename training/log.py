"""``log.csv`` of a run: a row for each step, and its columns in memory for the report."""

from __future__ import annotations

import csv
import math
import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from histostream.wsi.files import write_whole

DIGITS = 7  # significant digits of a value
FEWEST = ("step", "seconds")  # columns that every log has


class Log:
    """The rows of a run up to a step; rows behind it, of a run that was killed, are cut.

    Parameters
    ----------
    path
        The file.
    start
        Last step to keep; 0: a new log.
    writes
        Whether this process writes the file.

    Attributes
    ----------
    columns
        Values by column, nan where a row has none. The first two are ``step`` and ``seconds``.
    """

    def __init__(self, path: Path, start: int, *, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        self._file: TextIO | None = None
        self.columns: dict[str, array[float]] = {name: array("d") for name in FEWEST}
        if start and path.is_file():
            self._read(start)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, row: Mapping[str, float | None]) -> None:
        """Append a row, which begins with ``step``; a column that is new is added to all rows."""
        if self.add(row):
            self._close()
        if not self._writes:
            return
        if self._file is None:
            self._open()
        else:
            csv.writer(self._file).writerow(self._texts(-1))
            self._file.flush()

    def add(self, row: Mapping[str, float | None]) -> bool:
        """Append a row in memory alone; return whether it brought a new column."""
        count = len(self.columns["step"])
        new = [name for name in row if name not in self.columns]
        for name in new:
            self.columns[name] = array("d", [math.nan]) * count
        for name, values in self.columns.items():
            value = row.get(name)
            values.append(math.nan if value is None else value)
        return bool(new)

    def take_last(self) -> dict[str, float]:
        """Remove the last row, and return its values that are not nan; {} if there is no row."""
        row = {name: values.pop() for name, values in self.columns.items() if values}
        self._close()  # it is written again with the next row
        return {name: value for name, value in row.items() if not math.isnan(value)}

    def sync(self) -> None:
        """Force the rows to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _read(self, start: int) -> None:
        with self._path.open(newline="", encoding="utf-8") as file, suppress(ValueError):
            rows = csv.reader(file)
            header = next(rows, [])
            for texts in rows:
                # A row that a full disk cut short is behind the checkpoint.
                row = dict(zip(header, (float(text) if text else None for text in texts), strict=True))
                if not 0 < (row.get("step") or 0) <= start:
                    break
                self.add(row)

    def _open(self) -> None:
        """Write all rows anew, whole or not at all; further ones are appended."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, "".join(self._lines()))
        self._file = self._path.open("a", newline="", encoding="utf-8")

    def _lines(self) -> Iterator[str]:
        yield ",".join(_quoted(name) for name in self.columns) + "\r\n"
        for i in range(len(self.columns["step"])):
            yield ",".join(self._texts(i)) + "\r\n"

    def _texts(self, index: int) -> list[str]:
        return [_text(name, values[index]) for name, values in self.columns.items()]

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _text(name: str, value: float) -> str:
    if math.isnan(value):
        return ""
    if name == "step":
        return f"{value:.0f}"
    return f"{value:.1f}" if name == "seconds" else f"{value:.{DIGITS}g}"


def _quoted(name: str) -> str:
    """Return a name as `csv` writes it."""
    return '"' + name.replace('"', '""') + '"' if any(c in name for c in ',"\r\n') else name

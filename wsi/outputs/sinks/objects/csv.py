"""objects.csv: a line for each object."""

from __future__ import annotations

import csv
from contextlib import suppress
from pathlib import Path

from histostream.wsi.files import remove, temporary_name, writing
from histostream.wsi.outputs.label_rows import SlideInfo
from histostream.wsi.outputs.objects.slide_object import SlideObject
from histostream.wsi.outputs.sinks import SinkKind
from histostream.wsi.outputs.sinks.objects._table import COLUMNS, table_line


class CsvTable:
    """Objects as CSV, UTF-8.

    Parameters
    ----------
    path
        Final name.
    info
        The slide.
    """

    def __init__(self, path: Path, info: SlideInfo) -> None:
        self.path, self._info = path, info
        self._temporary = temporary_name(path)
        with writing(path):
            # A file's name may hold bytes that are not text.
            self._file = self._temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="")
            self._table = csv.writer(self._file, lineterminator="\n")
            self._table.writerow(COLUMNS)

    def write(self, item: SlideObject) -> None:
        """Take the next object."""
        with writing(self.path):
            self._table.writerow(table_line(item, self._info))

    def finish(self) -> tuple[Path, Path]:
        """Complete the file under its temporary name."""
        with writing(self.path):
            self._file.close()
        return self._temporary, self.path

    def abort(self) -> None:
        """Remove what was written."""
        with suppress(OSError):
            self._file.close()
        remove([self._temporary])


SINK = SinkKind("objects.csv", lambda path, info, slide: CsvTable(path, info), bytes_per_px=0.035)

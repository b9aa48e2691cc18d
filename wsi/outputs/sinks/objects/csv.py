"""objects.csv: a line for each object."""

from __future__ import annotations

import csv
from pathlib import Path

from histostream.wsi.files import writing
from histostream.wsi.outputs.label_rows import SlideInfo
from histostream.wsi.outputs.objects.slide_object import SlideObject, WholeObjectFile
from histostream.wsi.outputs.sinks import SinkKind
from histostream.wsi.outputs.sinks.objects._table import COLUMNS, table_line


class CsvTable(WholeObjectFile):
    """Objects as CSV, UTF-8.

    Parameters
    ----------
    path
        Final name.
    info
        The slide.
    """

    def __init__(self, path: Path, info: SlideInfo) -> None:
        super().__init__(path)
        self._info = info
        with writing(path):
            # A file's name may hold bytes that are not text.
            file = self._temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="")
            self._open.append(file)
            self._table = csv.writer(file, lineterminator="\n")
            self._table.writerow(COLUMNS)

    def write(self, item: SlideObject) -> None:
        """Take the next object."""
        with writing(self.path):
            self._table.writerow(table_line(item, self._info))


SINK = SinkKind("objects.csv", lambda path, info, slide: CsvTable(path, info), bytes_per_px=0.035)

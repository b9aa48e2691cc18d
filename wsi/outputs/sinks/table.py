"""objects.csv and objects.parquet: a line for each object."""

from __future__ import annotations

import csv
from contextlib import suppress
from pathlib import Path
from typing import Any

from histostream.wsi.files import remove, temporary_name, writing
from histostream.wsi.outputs.label_rows import SlideInfo
from histostream.wsi.outputs.objects.slide_object import SlideObject

DECIMALS = 4
GROUP_LINES = 1 << 16  # of Parquet, which keeps as many in memory
COLUMNS = (
    "slide",
    "object",
    "class",
    "x_px",
    "y_px",
    "left_px",
    "top_px",
    "right_px",
    "bottom_px",
    "area_um2",
    "perimeter_um",
    "eccentricity",
    "holes",
)


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
            # A file's name may hold bytes that are no text.
            self._file = self._temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="")
            self._table = csv.writer(self._file, lineterminator="\n")
            self._table.writerow(COLUMNS)

    def write(self, found: SlideObject) -> None:
        """Take the next object."""
        with writing(self.path):
            self._table.writerow(_line(found, self._info))

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


class ParquetTable:
    """Objects as Parquet.

    Parameters
    ----------
    path, info
        As in `CsvTable`.
    """

    def __init__(self, path: Path, info: SlideInfo) -> None:
        import pyarrow
        import pyarrow.parquet

        self.path, self._info = path, info
        self._temporary = temporary_name(path)
        text = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
        kinds = {"slide": text, "class": text, "object": pyarrow.int64(), "holes": pyarrow.int32()}
        self._schema = pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in COLUMNS])
        self._lines: list[tuple[Any, ...]] = []
        with writing(path):
            self._file = pyarrow.parquet.ParquetWriter(self._temporary, self._schema)

    def write(self, found: SlideObject) -> None:
        """Take the next object."""
        self._lines.append(_line(found, self._info))
        if len(self._lines) == GROUP_LINES:
            self._flush()

    def finish(self) -> tuple[Path, Path]:
        """Complete the file under its temporary name."""
        self._flush()
        with writing(self.path):
            self._file.close()
        return self._temporary, self.path

    def abort(self) -> None:
        """Remove what was written."""
        with suppress(OSError):
            self._file.close()
        remove([self._temporary])

    def _flush(self) -> None:
        import pyarrow

        columns = zip(*self._lines, strict=True) if self._lines else [()] * len(COLUMNS)
        arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._lines = []
        with writing(self.path):
            self._file.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))


def _line(found: SlideObject, info: SlideInfo) -> tuple[Any, ...]:
    return (
        info.name,
        found.number,
        info.classes[found.label].name,
        round(found.x, DECIMALS),
        round(found.y, DECIMALS),
        *found.box,
        round(found.area_um2, DECIMALS),
        round(found.perimeter_um, DECIMALS),
        round(found.eccentricity, DECIMALS),
        len(found.rings) - 1,
    )

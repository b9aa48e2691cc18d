"""objects.parquet: a line for each object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from histostream.wsi.files import writing
from histostream.wsi.outputs.label_rows import SlideInfo
from histostream.wsi.outputs.memory_needs import MemoryNeeds
from histostream.wsi.outputs.objects.slide_object import SlideObject, WholeObjectFile
from histostream.wsi.outputs.sinks import SinkKind
from histostream.wsi.outputs.sinks.objects._table import COLUMNS, table_line

GROUP_LINES = 1 << 16  # written together, and kept in memory until then
ARROW_BYTES = 128 << 20  # pyarrow itself, and the lines that wait


class ParquetTable(WholeObjectFile):
    """Objects as Parquet.

    Parameters
    ----------
    path, info
        Final name, and the slide.
    """

    def __init__(self, path: Path, info: SlideInfo) -> None:
        import pyarrow
        import pyarrow.parquet

        super().__init__(path)
        self._info = info
        text = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
        kinds = {"slide": text, "class": text, "object": pyarrow.int64(), "holes": pyarrow.int32()}
        self._schema = pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in COLUMNS])
        self._lines: list[tuple[Any, ...]] = []
        with writing(path):
            self._file = pyarrow.parquet.ParquetWriter(self._temporary, self._schema)
        self._open.append(self._file)

    def write(self, item: SlideObject) -> None:
        """Take the next object."""
        self._lines.append(table_line(item, self._info))
        if len(self._lines) == GROUP_LINES:
            self._flush()

    def finish(self) -> tuple[Path, Path]:
        """Complete the file under its temporary name."""
        self._flush()
        return super().finish()

    def _flush(self) -> None:
        import pyarrow

        columns = zip(*self._lines, strict=True) if self._lines else [()] * len(COLUMNS)
        arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._lines = []
        with writing(self.path):
            self._file.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))


SINK = SinkKind(
    "objects.parquet",
    lambda path, info, slide: ParquetTable(path, info),
    needs=lambda info, tile_px: MemoryNeeds(bytes_at_once=ARROW_BYTES),
    bytes_per_px=0.017,
    module="pyarrow",
    extra="tables",
)

"""What the sinks of one pyramid have in common."""

from __future__ import annotations

from pathlib import Path

from histostream.wsi.outputs.label_rows import LabelRows
from histostream.wsi.outputs.pyramid import PyramidWriter


class PyramidSink:
    """Writes one pyramid, of labels if nothing else is said; see `Sink`.

    Parameters
    ----------
    file
        What it is written with.
    """

    def __init__(self, file: PyramidWriter) -> None:
        self._file = file

    def write(self, part: LabelRows) -> None:
        """Take the next rows."""
        self._file.write(part.x, part.y, part.labels)

    def finish(self) -> list[tuple[Path, Path]]:
        """Complete the file, or folder, under its temporary name."""
        return [self._file.finish()]

    def abort(self) -> None:
        """Remove what was written."""
        self._file.abort()

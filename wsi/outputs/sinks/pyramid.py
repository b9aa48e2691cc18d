"""The part that all sinks of one pyramid share."""

from __future__ import annotations

from pathlib import Path

from histostream.wsi.outputs.label_rows import LabelRows, SlideInfo
from histostream.wsi.outputs.memory_needs import MemoryNeeds
from histostream.wsi.outputs.pyramid import PyramidWriter

TILE_PX = 512
LABEL_BYTES = 0.037  # of a file for each analysed pixel, in CMU-1-Small-Region.svs with the nucleus model
TILE_BYTES = 80  # for each tile of the file: its position, and the file's own tables; measured


def pyramid_needs(info: SlideInfo, tile_px: int, *, pixel_bytes: int = 1, library_bytes: int = 0) -> MemoryNeeds:
    """Return the memory that one pyramid takes.

    Parameters
    ----------
    info
        The label map.
    tile_px
        Side of the network's tiles: finished rows wait until they fill tiles of the file.
    pixel_bytes
        Bytes of a pixel of those rows.
    library_bytes
        Memory of a library that is loaded at the end.
    """
    tiles = -(-info.width // TILE_PX) * -(-info.height // TILE_PX)
    return MemoryNeeds(
        bytes_per_column=pixel_bytes * (tile_px + TILE_PX),
        bytes_at_once=TILE_BYTES * tiles + library_bytes,
    )


class PyramidSink:
    """Writes one pyramid of labels; see `Sink`.

    Parameters
    ----------
    file
        The pyramid.
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

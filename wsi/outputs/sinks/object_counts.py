"""Count objects without writing them to files."""

from __future__ import annotations

from pathlib import Path

from histostream.wsi.outputs.label_rows import LabelRows, SlideInfo
from histostream.wsi.outputs.memory_needs import MemoryNeeds
from histostream.wsi.outputs.objects.counting import ObjectCounter, counted_labels, find_components

LINE_BYTES = 10  # for each row of the slide: a class and a number, at both edges of a column band
BUFFERS = 48 << 20  # blocks of the label map, and components that are not settled yet; measured


class ObjectCounts:
    """Counts the objects of the classes whose rules say so; see `Sink`. It writes no file.

    Attributes
    ----------
    counter
        The counts, complete after `finish`.
    """

    def __init__(self, info: SlideInfo) -> None:
        self.counter = ObjectCounter(info)
        self._components = find_components(info, counted_labels(info.classes), outlines=False)

    def write(self, part: LabelRows) -> None:
        """Take the next rows."""
        for complete in self._components.add(part.x, part.y, part.labels):
            self.counter.add(complete)

    def finish(self) -> list[tuple[Path, Path]]:
        """Count the objects that the end of the slide completes."""
        self.counter.add(self._components.finish())
        return []

    def abort(self) -> None:
        """Do nothing: there is no file."""


def count_needs(info: SlideInfo) -> MemoryNeeds:
    """Return the memory that counting takes."""
    return MemoryNeeds(bytes_at_once=BUFFERS + LINE_BYTES * info.height)

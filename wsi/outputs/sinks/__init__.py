"""Output files: each module writes one kind.

``labels.tif``, ``overview.png`` and the summary are always written. The other kinds are chosen by
an option, and the folder is their registry: the option ``--rasters ome-zarr`` is the module
``rasters/ome_zarr.py``. Its name is known without importing it. It defines ``SINK``, a `SinkKind`.

Another package adds a kind with an entry point of the group ``histostream.sinks``. The entry point's
name is the option and the value, as ``rasters.npy``; it refers to a `SinkKind`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histostream.wsi.errors import HistoError
from histostream.wsi.optional import require
from histostream.wsi.outputs.memory_needs import MemoryNeeds
from histostream.wsi.registry import entry_points

if TYPE_CHECKING:
    from histostream.wsi.outputs.label_rows import SlideInfo

OPTIONS = ("rasters", "annotations", "objects")
ENTRY_POINTS = "histostream.sinks"


class SinkError(HistoError, ValueError):
    """There is no such kind of output file, or it cannot be loaded."""


@dataclass(frozen=True, slots=True)
class SinkKind:
    """A kind of output file that an option chooses.

    Attributes
    ----------
    file
        Name of the file, or folder, in the slide's output folder.
    open
        Called with the final path, the `SlideInfo` and the path of the slide. Kinds of ``rasters``
        return a `Sink`; kinds of ``annotations`` and ``objects`` return an `ObjectFile`.
    needs
        Called with the `SlideInfo` and the side of the network's tiles in pixels; returns the memory
        that the file takes until it is complete.
    bytes_per_px
        Estimated size of the file for each analysed pixel.
    counts_objects
        Whether the file needs classes to be counted whose model has no rule of objects.
    module, extra
        An optional package that it needs, and the extra of HistoStream that installs it.
    """

    file: str
    open: Callable[[Path, SlideInfo, Path], Any]
    needs: Callable[[SlideInfo, int], MemoryNeeds] = lambda info, tile_px: MemoryNeeds()
    bytes_per_px: float = 0.0
    counts_objects: bool = False
    module: str = ""
    extra: str = ""

    def check_installed(self) -> None:
        """Check that the optional package is installed.

        Raises
        ------
        OutputError
            If it is not; the message says how to install it.
        """
        if self.module:
            require(self.module, f"{self.file} needs", self.extra)


def sink_names(option: str) -> tuple[str, ...]:
    """Return the values of an option, without importing any sink.

    Examples
    --------
    >>> sink_names("annotations")
    ('dsa', 'qupath')
    """
    files = (Path(__file__).parent / option).glob("[!_]*.py")
    return tuple(sorted({file.stem.replace("_", "-") for file in files} | _entry_points(option).keys()))


def find_sink(option: str, name: str) -> SinkKind:
    """Import the sink of a value of an option.

    Raises
    ------
    SinkError
        If there is none, or the entry point of another package cannot be loaded.
    """
    if name not in sink_names(option):
        raise SinkError(f"{option}={name!r}: use {' or '.join(sink_names(option))}")
    entry_point = _entry_points(option).get(name)
    try:
        kind = (
            import_module(f"{__name__}.{option}.{name.replace('-', '_')}").SINK
            if entry_point is None
            else entry_point.load()
        )
    except (ImportError, AttributeError) as error:
        raise SinkError(f"--{option} {name}: cannot be loaded ({error}); update or remove its package") from error
    if not isinstance(kind, SinkKind):
        raise SinkError(f"--{option} {name}: {kind!r} is no SinkKind; update or remove its package")
    return kind


def _entry_points(option: str) -> dict[str, metadata.EntryPoint]:
    """Return the entry points of other packages for an option, by value."""
    prefix = f"{option}."
    every = entry_points(ENTRY_POINTS).items()
    return {name.removeprefix(prefix): entry for name, entry in every if name.startswith(prefix)}

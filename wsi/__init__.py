"""Slides in, tiles out: what the rest of HistoStream needs of a whole-slide image."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histostream.wsi.errors import HistoError, OutputError, SlideError
    from histostream.wsi.grid import Box, Strip, Tile, TileGrid
    from histostream.wsi.reader import Level, SlideReader, open_slide
    from histostream.wsi.resolution import SlideView, at_mpp, thumbnail
    from histostream.wsi.sink import OUTSIDE, ClassInfo, OutputFolder, Segmented, Sink, SlideInfo
    from histostream.wsi.strips import cut, read_strips
    from histostream.wsi.tissue import RegionOfInterest, TissueMask, find_tissue, read_roi

__all__ = [
    "OUTSIDE",
    "Box",
    "ClassInfo",
    "HistoError",
    "Level",
    "OutputError",
    "OutputFolder",
    "RegionOfInterest",
    "Segmented",
    "Sink",
    "SlideError",
    "SlideInfo",
    "SlideReader",
    "SlideView",
    "Strip",
    "Tile",
    "TileGrid",
    "TissueMask",
    "at_mpp",
    "cut",
    "find_tissue",
    "open_slide",
    "read_roi",
    "read_strips",
    "thumbnail",
]

_MODULES = {
    "errors": ("HistoError", "OutputError", "SlideError"),
    "grid": ("Box", "Strip", "Tile", "TileGrid"),
    "reader": ("Level", "SlideReader", "open_slide"),
    "resolution": ("SlideView", "at_mpp", "thumbnail"),
    "sink": ("OUTSIDE", "ClassInfo", "OutputFolder", "Segmented", "Sink", "SlideInfo"),
    "strips": ("cut", "read_strips"),
    "tissue": ("RegionOfInterest", "TissueMask", "find_tissue", "read_roi"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562): the commands start without numpy."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

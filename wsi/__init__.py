"""Slides in, tiles out: what the rest of HistoStream needs of a whole-slide image."""

from typing import TYPE_CHECKING

from histostream.wsi.lazy import import_on_use

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
__getattr__ = import_on_use(__name__, _MODULES)

"""Read whole-slide images as tiles, and write label maps: the public names of the package."""

from typing import TYPE_CHECKING

from histostream.wsi.lazy import import_on_use

if TYPE_CHECKING:
    from histostream.wsi.errors import DamagedError, HistoError, OutputError, SlideError
    from histostream.wsi.geometry import Box
    from histostream.wsi.outputs.folder import OutputFolder
    from histostream.wsi.outputs.label_rows import NOT_ANALYSED, ClassInfo, LabelRows, Sink, SlideInfo
    from histostream.wsi.slides.reader import BlockReader, DeclinedError, Level, SlideReader, open_slide
    from histostream.wsi.slides.resolution import SlideView, at_mpp, thumbnail
    from histostream.wsi.tiling.area import AnalysedArea
    from histostream.wsi.tiling.grid import Strip, Tile, TileGrid
    from histostream.wsi.tiling.polygons import RegionOfInterest, read_roi
    from histostream.wsi.tiling.strips import cut, read_strips
    from histostream.wsi.tiling.tissue import TissueMask, find_tissue

__all__ = [
    "NOT_ANALYSED",
    "AnalysedArea",
    "BlockReader",
    "Box",
    "ClassInfo",
    "DamagedError",
    "DeclinedError",
    "HistoError",
    "LabelRows",
    "Level",
    "OutputError",
    "OutputFolder",
    "RegionOfInterest",
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
    "errors": ("DamagedError", "HistoError", "OutputError", "SlideError"),
    "geometry": ("Box",),
    "outputs.folder": ("OutputFolder",),
    "outputs.label_rows": ("NOT_ANALYSED", "ClassInfo", "LabelRows", "Sink", "SlideInfo"),
    "slides.reader": ("BlockReader", "DeclinedError", "Level", "SlideReader", "open_slide"),
    "slides.resolution": ("SlideView", "at_mpp", "thumbnail"),
    "tiling.area": ("AnalysedArea",),
    "tiling.grid": ("Strip", "Tile", "TileGrid"),
    "tiling.strips": ("cut", "read_strips"),
    "tiling.polygons": ("RegionOfInterest", "read_roi"),
    "tiling.tissue": ("TissueMask", "find_tissue"),
}
__getattr__ = import_on_use(__name__, _MODULES)

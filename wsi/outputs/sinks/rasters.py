"""The label map in further formats; see `RASTERS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from histostream.wsi.outputs.label_rows import Sink, SlideInfo
from histostream.wsi.outputs.sinks import dicom_seg, ome_zarr
from histostream.wsi.outputs.sinks.dicom_seg import DicomSeg
from histostream.wsi.outputs.sinks.ome_tiff import OmeTiff, OmeTiffRgb
from histostream.wsi.outputs.sinks.ome_zarr import OmeZarr

# Of the file, the label map, and the slide.
RasterMaker = Callable[[Path, SlideInfo, Path], Sink]
# The file's name, and what writes it.
RASTERS: dict[str, tuple[str, RasterMaker]] = {
    "ome-tiff": ("labels.ome.tif", lambda path, info, _: OmeTiff(path, info)),
    "ome-tiff-rgb": ("labels.rgb.ome.tif", lambda path, info, _: OmeTiffRgb(path, info)),
    "ome-zarr": ("labels.ome.zarr", lambda path, info, _: OmeZarr(path, info)),
    "dicom-seg": ("labels.dcm", DicomSeg),
}
TILE_PX = 512
TILE_BYTES = 80  # of each tile: its place, and those of the file's own tables; measured
# Of libraries that are loaded at the end. highdicom (120 MiB) is when its sink is opened, before
# anybody asks what memory is left.
LIBRARY_BYTES = {"ome-zarr": ome_zarr.MEMORY_BYTES}


def check_installed(names: Sequence[str]) -> None:
    """See that the libraries are there that some rasters take.

    Raises
    ------
    OutputError
        If one is not; the message says how to get it.
    """
    if "ome-zarr" in names:
        ome_zarr.check_installed()
    if "dicom-seg" in names:
        dicom_seg.check_installed()


def memory_bytes(width: int, height: int, names: Sequence[str]) -> int:
    """Bytes that rasters take of the whole slide; `column_bytes` are those of a band."""
    tiles = -(-width // TILE_PX) * -(-height // TILE_PX)
    return sum(TILE_BYTES * tiles + LIBRARY_BYTES.get(name, 0) for name in names)


def column_bytes(tile_px: int, names: Sequence[str]) -> int:
    """Bytes that rasters take for each column of a band: rows that wait until they fill tiles."""
    pixel_bytes = sum(4 if name == "ome-tiff-rgb" else 1 for name in names)  # its rows, and labels
    return pixel_bytes * (tile_px + TILE_PX)

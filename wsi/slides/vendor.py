"""Tell files of scanners' own layouts, which OpenSlide reads, from plain TIFF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from histostream.wsi.errors import SlideError
from histostream.wsi.slides.tiff_check import is_tiff

# Formats of OpenSlide whose files are read as plain TIFF, or by a reader of their own.
PLAIN = frozenset({"", "generic-tiff", "aperio", "dicom"})
# Marks of programs, as tifffile calls them, whose files are ordinary TIFF pyramids.
UNDERSTOOD = frozenset({"svs", "ome", "shaped", "imagej", "qpi", "gdal", "geotiff", "micromanager"})
SCANNERS = {"scn": "Leica", "bif": "Ventana", "philips": "Philips", "ndpi": "Hamamatsu", "avs": "Argos"}
# Flags of tifffile that describe the form of a page, not the program that wrote it.
FORM = frozenset({"frame", "multipage", "subifd", "virtual", "volumetric"})


def scanner_format(path: Path) -> str:
    """Return OpenSlide's name of a scanner's own layout, as "leica"; empty for plain TIFF and other files.

    Raises
    ------
    SlideError
        If a TIFF file has the marks of a scanner's layout, and OpenSlide does not know it as such.
    """
    import openslide

    try:
        vendor = openslide.OpenSlide.detect_format(str(path)) or ""
    except openslide.OpenSlideError:
        vendor = ""
    if vendor in PLAIN:
        _refuse_unknown_layout(path)
        return ""
    return str(vendor)


def understands(file: Any) -> bool:
    """Whether all programs that left their marks in a TIFF file write ordinary pyramids.

    Parameters
    ----------
    file
        The open ``tifffile.TiffFile``.
    """
    return not (set(file.pages.first.flags) - UNDERSTOOD - FORM)


def _refuse_unknown_layout(path: Path) -> None:
    if not is_tiff(path):
        return
    import tifffile

    try:
        with tifffile.TiffFile(path, _multifile=False) as file:
            flags = set(file.pages.first.flags) if len(file.pages) else set()
    except Exception:  # tifffile raises errors of any kind where tags contradict each other; a reader says which
        return
    for flag in sorted(flags & SCANNERS.keys()):
        raise SlideError(
            f"{path}: it has the marks of a file of {SCANNERS[flag]}, but OpenSlide does not know it as one; export "
            "the slide as plain TIFF"
        )

"""Tell files of scanners' own layouts, which OpenSlide reads, from plain TIFF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from histostream.wsi.errors import SlideError

# Formats of OpenSlide whose files are read as plain TIFF, or by a reader of their own.
PLAIN = frozenset({"", "generic-tiff", "aperio", "dicom"})
# Marks of programs, as tifffile calls them, whose files are ordinary TIFF pyramids.
UNDERSTOOD = frozenset({"svs", "ome", "shaped", "imagej", "qpi", "gdal", "geotiff", "micromanager"})
SCANNERS = {"scn": "Leica", "bif": "Ventana", "philips": "Philips", "ndpi": "Hamamatsu", "avs": "Argos"}
# Flags of tifffile that describe the form of a page, not the program that wrote it.
FORM = frozenset({"frame", "multipage", "subifd", "virtual", "volumetric"})


def scanner_format(path: Path) -> str:
    """Return OpenSlide's name of a scanner's own layout, as "leica"; empty for plain TIFF and other files."""
    import openslide

    try:
        vendor = openslide.OpenSlide.detect_format(str(path)) or ""
    except openslide.OpenSlideError:
        vendor = ""
    return "" if vendor in PLAIN else str(vendor)


def understands(file: Any) -> bool:
    """Whether all programs that left their marks in a TIFF file write ordinary pyramids.

    Parameters
    ----------
    file
        The open ``tifffile.TiffFile``.
    """
    return not (set(file.pages.first.flags) - UNDERSTOOD - FORM)


def refuse_scanner_marks(path: Path, file: Any) -> None:
    """Refuse a TIFF file of a scanner that OpenSlide does not know as such.

    Parameters
    ----------
    path
        The file, for which `scanner_format` found nothing.
    file
        The open ``tifffile.TiffFile``.

    Raises
    ------
    SlideError
        If the file has the marks of a scanner's own layout.
    """
    for flag, name in SCANNERS.items():
        if flag in file.pages.first.flags:
            raise SlideError(
                f"{path}: it has the marks of a file of {name}, but OpenSlide does not know it as one; export "
                "the slide as plain TIFF"
            )

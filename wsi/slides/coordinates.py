"""Where a slide begins in the coordinates of other programs.

Files of some scanners (MIRAX, Leica SCN, Ventana BIF) describe a scanned area within a larger one that is empty.
OpenSlide counts pixels from the corner of the larger one. QuPath, large-image (Digital Slide Archive), converters to
DICOM and the readers here count from the corner of the scanned area.
"""

from __future__ import annotations

from histostream.wsi.geometry import Box

COORDINATES = ("qupath", "openslide")


def origin_px(bounds: Box | None, coordinates: str) -> tuple[int, int]:
    """Return the place (x, y) of a slide's first pixel, in pixels of level 0, in the coordinates of a program.

    Parameters
    ----------
    bounds
        As in `SlideReader`.
    coordinates
        One of `COORDINATES`.

    Raises
    ------
    ValueError
        If the coordinates are unknown.

    Examples
    --------
    >>> scanned = Box(1280, 768, width=1024, height=512)
    >>> origin_px(scanned, "qupath"), origin_px(scanned, "openslide"), origin_px(None, "openslide")
    ((0, 0), (1280, 768), (0, 0))
    """
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates {coordinates!r}: use {' or '.join(COORDINATES)}")
    return (bounds.x, bounds.y) if coordinates == "openslide" and bounds is not None else (0, 0)

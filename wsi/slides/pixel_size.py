"""Find the size of a slide's pixels in its file, whichever reader decodes them.

Programs write it in many places: OpenSlide's properties, OME-XML, DICOM attributes, the text of Aperio
and ImageJ, tags of microscopes, and the resolution tags of TIFF. The first of these that has it is taken.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histostream.wsi.errors import SlideError

SQUARE_TOLERANCE = 0.10  # relative difference of x and y that still counts as a square pixel
# 1200 dpi: programs write 72 to 1200 dpi for a printer into any image, and no slide is scanned at more than 21 um.
PRINTED_UM = 25_400 / 1200 * (1 - 1e-6)
UM_PER_TIFF_UNIT = {2: 25_400.0, 3: 10_000.0}  # ResolutionUnit: inch, centimetre
UM_PER_UNIT = {
    **dict.fromkeys(("um", "µm", "μm", "\\u00b5m", "micron", "microns", "micrometer", "micrometre"), 1.0),
    **dict.fromkeys(("pm", "picometer"), 1e-6),
    **dict.fromkeys(("å", "angstrom"), 1e-4),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e4),
    **dict.fromkeys(("m", "meter", "metre"), 1e6),
    **dict.fromkeys(("inch", "in", '"'), 25_400.0),
}
APERIO_ENTRY = re.compile(r"\|\s*MPP\s*=\s*([^|\r\n]*)")
_QUOTED = r'(?:"|&quot;)([^"&<]+)(?:"|&quot;)'
PHILIPS = re.compile(rf'Name="DICOM_PIXEL_SPACING"[^>]*>\s*{_QUOTED}\s+{_QUOTED}')

Sides = tuple[float | None, float | None]  # width and height of a pixel, in um


@dataclass(frozen=True, slots=True)
class PixelSize:
    """Side of a slide's pixels, and where it was found.

    Attributes
    ----------
    um
        Micrometres, the mean of width and height.
    source
        Where it comes from, as "OME-XML".
    """

    um: float
    source: str


def square_pixel(path: Path, sides: Sides, source: str) -> PixelSize | None:
    """Return the size of square pixels; None if a side is not known.

    Parameters
    ----------
    path
        The slide, for errors.
    sides
        Width and height of a pixel, in um.
    source
        Where they come from.

    Raises
    ------
    SlideError
        If the pixels are not square.
    """
    x, y = sides
    if not x or not y or not (0 < x < math.inf and 0 < y < math.inf):
        return None
    if abs(x - y) > SQUARE_TOLERANCE * max(x, y):
        raise SlideError(
            f"{path}: its pixels are {x:.4g} x {y:.4g} um, not square; resample the slide to square pixels first"
        )
    return PixelSize((x + y) / 2, source)


def tiff_pixel_size(path: Path, file: Any, page: Any) -> PixelSize | None:
    """Find the pixel size in a TIFF file.

    Parameters
    ----------
    path
        The file.
    file, page
        The open ``tifffile.TiffFile``, and the page of level 0.

    Returns
    -------
    None if the file does not say it. Resolutions of 72 to 1200 dpi are a printer's and are not taken.

    Raises
    ------
    SlideError
        If the pixels are not square.
    """
    for source, sides in _tiff_sides(file, page):
        found = square_pixel(path, sides, source)
        if found is not None:
            return found
    return None


def image_pixel_size(path: Path) -> PixelSize | None:
    """Find the pixel size in the header of a PNG or JPEG; a printer's resolution is not taken."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            x, y = image.info["dpi"]
    except Exception:  # no image that Pillow knows, or no resolution in it
        return None
    return square_pixel(path, _unprinted(25_400.0, float(x), float(y)), "resolution of the image")


def dicom_pixel_size(path: Path, header: Any) -> PixelSize | None:
    """Find the pixel size in a ``pydicom.Dataset``, the header of level 0; ``path`` is the slide, for errors."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in list(header.get(groups) or ())[:1]:
            for measures in list(group.get("PixelMeasuresSequence") or ())[:1]:
                found = _spacing(path, measures.get("PixelSpacing"), "DICOM PixelSpacing")
                if found is not None:
                    return found
    for name in ("PixelSpacing", "NominalScannedPixelSpacing"):
        found = _spacing(path, header.get(name), f"DICOM {name}")
        if found is not None:
            return found
    width, height = header.get("ImagedVolumeWidth"), header.get("ImagedVolumeHeight")
    columns, rows = header.get("TotalPixelMatrixColumns"), header.get("TotalPixelMatrixRows")
    if not (width and height and columns and rows):
        return None
    return square_pixel(
        path, (1e3 * float(width) / int(columns), 1e3 * float(height) / int(rows)), "DICOM ImagedVolumeWidth"
    )


def openslide_pixel_size(path: Path, properties: Mapping[str, str]) -> PixelSize | None:
    """Find the pixel size in the properties that OpenSlide gives of a scanner's file."""
    sides = (_number(properties.get("openslide.mpp-x")), _number(properties.get("openslide.mpp-y")))
    return square_pixel(path, sides, f"OpenSlide ({properties.get('openslide.vendor', 'no vendor')})")


def _spacing(path: Path, spacing: Any, source: str) -> PixelSize | None:
    """Return the pixel size of DICOM's spacing, which is row spacing, column spacing in mm."""
    if not spacing or len(spacing) != 2:
        return None
    return square_pixel(path, (1e3 * float(spacing[1]), 1e3 * float(spacing[0])), source)


def _tiff_sides(file: Any, page: Any) -> Iterator[tuple[str, Sides]]:
    """Yield the sides of pixels that a TIFF file states, the most reliable statement first."""
    if file.is_svs and APERIO_ENTRY.search(file.pages.first.description):
        yield "Aperio", _aperio(file)  # if it is no number, nothing else is trusted
        return
    for source, statement in _STATEMENTS:
        try:
            sides = statement(file, page)
        except Exception:  # metadata of other programs may have any form
            continue
        yield source, sides
    um = UM_PER_TIFF_UNIT.get(int(page.resolutionunit))
    if um is not None:
        yield "TIFF resolution", _unprinted(um, *(float(value) for value in page.resolution))


def _unprinted(um_per_unit: float, x: float, y: float) -> Sides:
    """Return the sides of pixels at so many per unit; None where that is the resolution of a printer."""
    if min(x, y) <= 0:
        return None, None
    sides = um_per_unit / x, um_per_unit / y
    return (None, None) if max(sides) >= PRINTED_UM else sides


def _aperio(file: Any) -> Sides:
    match = APERIO_ENTRY.search(file.pages.first.description)
    um = _number(match[1].strip().replace(",", ".")) if match else None
    return um, um


def _ome(file: Any, page: Any) -> Sides:
    if not file.is_ome:
        return None, None
    pixels = ET.fromstring(file.ome_metadata).find(".//{*}Pixels")
    if pixels is None:
        return None, None

    def side(axis: str) -> float | None:
        um = UM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "um").lower())
        length = _number(pixels.get(f"PhysicalSize{axis}"))
        return length * um if length and um else None

    return side("X"), side("Y")


def _philips(file: Any, page: Any) -> Sides:
    match = PHILIPS.search(file.pages.first.description)
    if match is None:
        return None, None
    height, width = (_number(text) for text in match.groups())  # rows first, in mm, as in DICOM
    return (width * 1e3 if width else None), (height * 1e3 if height else None)


def _imagej(file: Any, page: Any) -> Sides:
    if not file.is_imagej:
        return None, None
    um = UM_PER_UNIT.get(str(file.imagej_metadata.get("unit", "")).lower())
    x, y = (float(value) for value in page.resolution)
    return _unprinted(um, x, y) if um else (None, None)


def _micro_manager(file: Any, page: Any) -> Sides:
    um = _number(page.tags[51123].value["PixelSizeUm"])
    return um, um


def _fei(file: Any, page: Any) -> Sides:
    scan = file.fei_metadata.get("EScan") or file.fei_metadata["Scan"]
    return _metres(scan["PixelWidth"]), _metres(scan["PixelHeight"])


def _zeiss_sem(file: Any, page: Any) -> Sides:
    value = file.sem_metadata["ap_image_pixel_size"]
    um = float(value[1]) * UM_PER_UNIT[str(value[2]).lower()]
    return um, um


def _zeiss_lsm(file: Any, page: Any) -> Sides:
    return _metres(file.lsm_metadata["VoxelSizeX"]), _metres(file.lsm_metadata["VoxelSizeY"])


def _metaseries(file: Any, page: Any) -> Sides:
    values = file.metaseries_metadata["PlaneInfo"]
    um = UM_PER_UNIT[str(values["spatial-calibration-units"]).lower()]
    return float(values["spatial-calibration-x"]) * um, float(values["spatial-calibration-y"]) * um


def _olympus_sis(file: Any, page: Any) -> Sides:
    return _metres(file.sis_metadata["pixelsizex"]), _metres(file.sis_metadata["pixelsizey"])


# Each returns the sides of a pixel, or raises any error where the file does not say them.
_STATEMENTS: tuple[tuple[str, Callable[[Any, Any], Sides]], ...] = (
    ("OME-XML", _ome),
    ("Philips XML", _philips),
    ("ImageJ", _imagej),
    ("Micro-Manager", _micro_manager),
    ("FEI", _fei),
    ("Zeiss SEM", _zeiss_sem),
    ("Zeiss LSM", _zeiss_lsm),
    ("MetaSeries", _metaseries),
    ("Olympus SIS", _olympus_sis),
)


def _metres(value: Any) -> float:
    return float(value) * 1e6


def _number(text: Any) -> float | None:
    """Return a positive number; None if the text is not one."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if 0 < value < math.inf else None

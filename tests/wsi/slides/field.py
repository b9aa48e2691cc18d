"""Writers of slides as they come from the field: odd layouts, whose pixels are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from histostream.wsi.synthetic import SyntheticSlide

Pixels = NDArray[np.uint8]
UM: dict[str, Any] = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}  # 0.5 um per pixel
TILED: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "metadata": None}
GLASS = 243


@cache
def _slide() -> SyntheticSlide:
    return SyntheticSlide(4096, 4096, seed=3)


def tissue(width: int = 512, height: int = 512, x: int = 1500, y: int = 1500) -> Pixels:
    """Return pixels of a synthetic H&E slide, (height, width, 3)."""
    return _slide().region(x, y, width, height)[0]


def halved(pixels: NDArray[Any], times: int = 2) -> Pixels:
    """Return the means of ``times`` x ``times`` pixels."""
    height, width = (side // times * times for side in pixels.shape[:2])
    parts = pixels[:height, :width].reshape(height // times, times, width // times, times, *pixels.shape[2:])
    return np.asarray(parts.mean(axis=(1, 3)).round().astype(np.uint8))


def drop_tiles(path: Path, tiles: Sequence[int], page: int = 0) -> Path:
    """Set place and byte count of some tiles to 0, as writers leave those that were never written."""
    with tifffile.TiffFile(path, mode="r+") as file:
        directory = file.pages[page].aspage()
        for tag, values in ((324, directory.dataoffsets), (325, directory.databytecounts)):
            directory.tags[tag].overwrite([0 if i in tiles else value for i, value in enumerate(values)])
    return path


def write_pyramid(
    path: Path, levels: Sequence[NDArray[Any]], *, flagged: bool = True, subifds: bool = False, **options: Any
) -> Path:
    """Write one image and its reduced copies."""
    with tifffile.TiffWriter(path) as file:
        add_pyramid(file, levels, flagged=flagged, subifds=subifds, **options)
    return path


def add_pyramid(
    file: tifffile.TiffWriter,
    levels: Sequence[NDArray[Any]],
    *,
    flagged: bool = True,
    subifds: bool = False,
    **options: Any,
) -> None:
    """Add one image and its reduced copies to a file."""
    options = TILED | UM | {"compression": "deflate"} | options
    file.write(levels[0], subifds=len(levels) - 1 if subifds else None, **options)
    for level in levels[1:]:
        file.write(level, subfiletype=int(flagged), **options)


def write_leica(path: Path, areas: Sequence[tuple[Pixels, int, int]], canvas: tuple[int, int] = (4000, 9000)) -> Path:
    """Write areas of one scan as Leica's SCN does, with an overview first.

    Parameters
    ----------
    areas
        Pixels of each, and where its corner lies in the collection, in pixels.
    canvas
        (width, height) of the collection, in pixels.
    """
    nm = 500
    wide, high = (side * nm for side in canvas)
    images, pages = [], [np.full((90, 40, 3), 235, np.uint8)]

    def image(name: str, sizes: Sequence[tuple[int, int]], view: str, objective: float) -> str:
        first = len(pages) - len(sizes)
        rows = "".join(
            f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{first + r}"/>' for r, (w, h) in enumerate(sizes)
        )
        return (
            f'<image name="{name}" uuid="{name}"><creationDate>2012-01-01</creationDate>'
            '<device model="Leica SCN400" version="1"/>'
            f'<pixels sizeX="{sizes[0][0]}" sizeY="{sizes[0][1]}">{rows}</pixels>'
            f"<view {view}/><scanSettings><objectiveSettings><objective>{objective}</objective></objectiveSettings>"
            "<illuminationSettings><numericalAperture>0.4</numericalAperture><illuminationSource>brightfield"
            "</illuminationSource></illuminationSettings></scanSettings></image>"
        )

    images.append(image("macro", [(40, 90)], f'sizeX="{wide}" sizeY="{high}" offsetX="0" offsetY="0"', 0.6))
    for i, (pixels, x, y) in enumerate(areas):
        levels = [pixels, halved(pixels, 4)]
        pages += levels
        h, w = pixels.shape[:2]
        view = f'sizeX="{w * nm}" sizeY="{h * nm}" offsetX="{x * nm}" offsetY="{y * nm}"'
        images.append(image(f"area {i}", [(p.shape[1], p.shape[0]) for p in levels], view, 20))
    text = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" uuid="x" sizeX="{wide}" sizeY="{high}">{"".join(images)}</collection></scn>'
    )
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for i, page in enumerate(pages):
            described: dict[str, Any] = {"description": text} if i == 0 else {}
            file.write(
                page, software=None, compression="jpeg", compressionargs={"level": 95}, **TILED, **UM, **described
            )
    return path


def write_philips(path: Path, pixels: Pixels) -> Path:
    """Write an image as Philips does: XML with the size of pixels in mm, no resolution tags."""

    def level(number: int, mm: float) -> str:
        return (
            '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" '
            f'Element="0x0030" PMSVR="IDoubleArray">&quot;{mm}&quot; &quot;{mm}&quot;</Attribute>'
            f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_NUMBER" Group="0x301D" Element="0x1001" '
            f'PMSVR="IUInt16">{number}</Attribute></DataObject>'
        )

    levels = [pixels, halved(pixels)]
    entries = "".join(level(i, 0.0005 * 2**i) for i in range(len(levels)))
    text = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport"><Attribute '
        'Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array><DataObject '
        'ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D" Element="0x1004" '
        'PMSVR="IString">WSI</Attribute><Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" Group="0x301D" '
        f'Element="0x1010" PMSVR="IDataObjectArray"><Array>{entries}</Array></Attribute></DataObject></Array>'
        "</Attribute></DataObject>"
    )
    with tifffile.TiffWriter(path) as file:
        for i, page in enumerate(levels):
            described: dict[str, Any] = {"description": text} if i == 0 else {}
            file.write(
                page, software="Philips DP v1.0", compression="jpeg", subfiletype=int(i > 0), **TILED, **described
            )
    return path


def write_trestle(path: Path, pixels: Pixels) -> Path:
    """Write an image as Trestle's MedScan does: its resolution tags hold um per pixel."""
    text = "Objective Magnification=20;OverlapsXY=0 0 0 0;Background Color=f3f3f3;"
    with tifffile.TiffWriter(path) as file:
        for i, page in enumerate([pixels, halved(pixels)]):
            file.write(
                page,
                software="MedScan",
                description=text,
                compression="jpeg",
                subfiletype=int(i > 0),
                resolution=(0.5, 0.5),  # um per pixel, whatever the unit
                **TILED,
            )
    return path


SCANNERS: dict[str, Callable[[Path, Pixels], Path]] = {
    "leica": lambda path, pixels: write_leica(path, [(pixels, 700, 300)]),
    "philips-tiff": write_philips,
    "trestle": write_trestle,
}

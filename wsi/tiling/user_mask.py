"""Read the mask of a user or of another program: what of a slide is to be analysed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histostream.wsi.errors import SlideError, reason
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.tiling.polygons import RegionOfInterest, read_polygons

MAX_PX = 1 << 26  # 8192 x 8192: 8 um per pixel on the largest slides
ASPECT_TOLERANCE = 0.01  # relative, beside half a pixel of rounding at each side
IMAGES = ("PNG", "TIFF")
GEOJSON = frozenset({".geojson", ".json"})
# Classes of polygons that are left out, in lower case; QuPath ignores classes whose name ends with *, as Ignore*.
# fmt: off
EXCLUDED = frozenset((
    "exclude", "excluded", "ignore", "artefact", "artefacts", "artifact", "artifacts",
    "pen", "ink", "fold", "folds", "blur", "blurred", "out of focus",
))
# fmt: on


@dataclass(frozen=True, slots=True)
class UserMask:
    """What a user's mask keeps: the pixels of an image, and the inside or outside of polygons.

    Attributes
    ----------
    masks
        (h, w) bool each, over the whole slide.
    regions
        Polygons.
    """

    masks: tuple[NDArray[np.bool_], ...] = ()
    regions: tuple[RegionOfInterest, ...] = ()


def read_mask(path: str | Path, view: SlideView, origin: tuple[int, int] = (0, 0)) -> UserMask:
    """Read which parts of a slide are to be analysed, from an image or from GeoJSON.

    Of a PNG or TIFF image of the whole slide, of any size, pixels of value 0 are not analysed, and all others are. Of
    GeoJSON (pixels of level 0) polygons are analysed, without those of a class such as Ignore*, pen, fold, blur or
    artefact (`EXCLUDED`, or with a name that ends with ``*``). If all polygons are of such classes, the rest is
    analysed.

    Parameters
    ----------
    path
        The file.
    view
        The slide.
    origin
        Where the slide begins in coordinates of GeoJSON, see `origin_px`.

    Raises
    ------
    SlideError
        If the file cannot be read, does not have the proportions of the slide, or keeps nothing.
    """
    path = Path(path)
    if path.suffix.lower() in GEOJSON:
        return UserMask(regions=_regions(path, view, origin))
    mask = _marked(path)
    height, width = mask.shape
    given, needed = width / height, view.width / view.height
    if abs(given / needed - 1) > ASPECT_TOLERANCE + 0.5 / width + 0.5 / height:
        raise SlideError(
            f"{path}: it has {width} x {height} px, which are not the proportions of the slide {view.slide.path} "
            f"({view.width} x {view.height} px); give a mask of the whole slide"
        )
    if not mask.any():
        raise SlideError(f"{path}: all of it is 0, so that nothing would be analysed; mark what is to be analysed")
    return UserMask(masks=(mask,))


def _regions(path: Path, view: SlideView, origin: tuple[int, int]) -> tuple[RegionOfInterest, ...]:
    polygons = read_polygons(path, view.downsample, origin)
    excluded = [polygon for polygon in polygons if _is_excluded(polygon.name)]
    included = [polygon for polygon in polygons if not _is_excluded(polygon.name)]
    regions = [RegionOfInterest.of(included, view)] if included else []
    if included and not regions[0].mask.any():
        raise SlideError(
            f"{path}: no polygon lies on the slide {view.slide.path}; "
            "coordinates are pixels of level 0, check that the two belong together"
        )
    if excluded:
        regions.append(RegionOfInterest.of(excluded, view, excluded=True))
    if not _overlap(regions, view):
        raise SlideError(f"{path}: its excluded polygons cover all that is to be analysed; check their classes")
    return tuple(regions)


def _overlap(regions: Sequence[RegionOfInterest], view: SlideView) -> bool:
    """Whether regions have any pixel of the overview in common."""
    masks = [region.cells(view.width, view.height).keep for region in regions]
    return bool(np.logical_and.reduce(masks).any())


def _is_excluded(name: str) -> bool:
    return name.endswith("*") or name.casefold() in EXCLUDED


def _marked(path: Path) -> NDArray[np.bool_]:
    """Return (h, w) bool: the pixels of an image that are not 0 or black, whatever their transparency."""
    try:
        with Image.open(path, formats=IMAGES) as image:
            if image.width * image.height > MAX_PX:
                raise SlideError(
                    f"{path}: {image.width} x {image.height} px are too many for a mask; "
                    f"scale it down to {MAX_PX / 1e6:.0f} megapixels or less"
                )
            opaque = {"RGBA": "RGB", "LA": "L", "PA": "P"}.get(image.mode)
            pixels = np.asarray(image.convert(opaque) if opaque else image)
    except SlideError:
        raise
    except FileNotFoundError as error:
        raise SlideError(f"{path}: there is no such file; check the path") from error
    except Exception as error:  # Pillow's decoders raise errors of any kind
        raise SlideError(
            f"{path}: cannot be read as a mask ({reason(error)}); save it as PNG, or give GeoJSON (.geojson)"
        ) from error
    marked: NDArray[np.bool_] = np.logical_or.reduce(np.atleast_3d(pixels) != 0, axis=2)
    return marked

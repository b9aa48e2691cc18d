"""Tell what the bands of an image are: colours, transparency, or channels that are neither."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import SlideError, printable
from histostream.wsi.slides.tiff_images import PageComparison, series_of

WHITE_IS_ZERO, GREY, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6  # PhotometricInterpretation
ASSOCIATED, UNASSOCIATED = 1, 2  # ExtraSamples: alpha, with which the colours are multiplied already, or not
PLANES = ("CYX", "SYX")  # tifffile's axes of images with one plane for each channel
ALL_TRANSPARENT = "by its alpha everything is transparent; alpha is ignored"


@dataclass(frozen=True, slots=True)
class Bands:
    """The meaning of the bands of an image whose first bands are colours.

    Attributes
    ----------
    colors
        Number of the bands of colour: 1 (grey) or 3 (RGB).
    count
        Number of all bands.
    alpha
        Index of the band of transparency; None if there is none.
    associated
        Whether the colours are multiplied with alpha already.
    """

    colors: int
    count: int
    alpha: int | None = None
    associated: bool = False

    def color_of(self, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the colours of a block (H, W, count) uint8, over white where it is transparent."""
        colors = block[..., : self.colors]
        if self.alpha is None:
            return colors
        alpha = block[..., self.alpha : self.alpha + 1]
        if alpha.min() == 255:
            return colors
        clear = 255 * (255 - alpha.astype(np.uint16))
        if self.associated:
            blended = np.minimum(colors + clear // 255, 255)
        else:
            blended = (colors.astype(np.uint16) * alpha + clear + 127) // 255
        return np.asarray(blended, np.uint8)


def color_bands(path: Path, file: Any, page: Any) -> tuple[Bands, tuple[str, ...]]:
    """Return the meaning of the bands of a TIFF page.

    Parameters
    ----------
    path
        The file, for errors.
    file, page
        The open ``tifffile.TiffFile``, and a page of it.

    Returns
    -------
    The meaning, and what a user should know: alpha that makes everything transparent, and a band without meaning
    that is the same everywhere, are ignored.

    Raises
    ------
    SlideError
        If it has channels that are no colours.
    """
    count, extra = int(page.samplesperpixel), [int(kind) for kind in page.extrasamples]
    series = series_of(file)
    planes = series[0].shape[0] if series and series[0].axes in PLANES and page.samplesperpixel == 1 else 1
    photometric = int(page.photometric)
    colors = {RGB: 3, YCBCR: 3}.get(photometric, 1)
    kinds = extra[len(extra) - (count - colors) :] if count > colors else []
    kinds = [0] * (count - colors - len(kinds)) + kinds  # the tag may be shorter than it should be
    alphas = [i for i, kind in enumerate(kinds, colors) if kind in (ASSOCIATED, UNASSOCIATED)]
    alpha = alphas[0] if alphas else None
    unknown = [i for i in range(colors, count) if i != alpha]
    if planes > 1 or count < colors or (unknown and colors == 1):
        raise not_colors(path, max(planes, count), channel_names(file.ome_metadata if file.is_ome else None))
    if not unknown and alpha is None:
        return Bands(colors, count), ()
    values = _constant_bands(page, [*unknown, *alphas[:1]])
    if filled := [band for band in unknown if band not in values]:
        raise SlideError(
            f"{path}: beside its colours it has {_listed(filled)}, of which it does not say what that is; "
            f"pass --channels 0,1,2 to read the colours alone"
        )
    notes = [f"{_listed(unknown)} without a meaning: the same everywhere, and ignored"] if unknown else []
    if alpha is not None and values.get(alpha) == 0:
        notes.append(ALL_TRANSPARENT)
        alpha = None
    return Bands(colors, count, alpha, alpha is not None and kinds[alpha - colors] == ASSOCIATED), tuple(notes)


def not_colors(path: Path, count: int, names: Sequence[str]) -> SlideError:
    """Return the error for a slide whose channels are no colours, and none of which is picked."""
    listed = f" ({', '.join(map(printable, names))})" if names else ""
    example = ",".join(str(min(i, count - 1)) for i in range(3))
    return SlideError(
        f"{path}: it has {count} channels{listed}, which are not colours: use a model for {count} channels, or pick "
        f"one for each channel of the model, counted from 0, as --channels {example}"
    )


def channel_names(ome_xml: str | None) -> list[str]:
    """Return the names of the channels in OME-XML; empty without all of them."""
    try:
        entries = ET.fromstring(ome_xml or "").findall(".//{*}Pixels/{*}Channel")
    except ET.ParseError:
        return []
    names = [entry.get("Name", "") for entry in entries]
    return names if all(names) else []


def _constant_bands(page: Any, bands: Sequence[int]) -> dict[int, int]:
    """Return the value of each of these bands that is the same in some tiles of a page, those of the most bytes."""
    if page.planarconfig != 1:  # a tile holds one band
        return {}
    samples = PageComparison().samples(page)
    values = {band: np.concatenate([tile[..., band].ravel() for tile in samples]) for band in bands if samples}
    return {band: int(v[0]) for band, v in values.items() if v.min() == v.max()}


def _listed(bands: Sequence[int]) -> str:
    numbers = " and ".join(str(band + 1) for band in bands)
    return f"band {numbers}" if len(bands) == 1 else f"bands {numbers}"

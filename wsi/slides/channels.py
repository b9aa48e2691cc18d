"""Read TIFF images of any number of channels, for models whose input is neither RGB nor grey."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import HistoError, SlideError, reason
from histostream.wsi.slides.image_header import check_claim
from histostream.wsi.slides.reader import BlockReader, Level, SlideReader, downsample_between, open_slide
from histostream.wsi.slides.readers.tiff import slide_mpp
from histostream.wsi.slides.tiff_check import check_tiff, is_tiff

INTERLEAVED, PLANES = ("YXS",), ("CYX", "SYX")  # tifffile's axes of what is read
SINGLE = ("YX",)
GREY = 1  # PhotometricInterpretation: 0 is black
ALPHA = (1, 2)  # ExtraSamples: transparency, associated or not


class ChannelReader(BlockReader):
    """Reads blocks of all channels of a TIFF file, interleaved or one plane for each; see `SlideReader`."""

    name = "channels"

    def __init__(self, path: Path, levels: list[list[Any]], mpp: float | None, channels: int) -> None:
        # levels: for each level one tifffile.TiffPage, or one for each channel
        first = [pages[0] for pages in levels]
        base = (first[0].imagewidth, first[0].imagelength)
        sizes = [(page.imagewidth, page.imagelength) for page in first]
        super().__init__(
            path,
            tuple(Level(w, h, downsample_between(base, (w, h))) for w, h in sizes),
            tuple(_block_px(page) for page in first),
            mpp,
            channels,
        )
        # tifffile makes these on first use, which would be a race between threads.
        self._decoders = [
            [(p.decode, p.jpegtables, p.dataoffsets, p.databytecounts) for p in pages] for pages in levels
        ]
        self._handle = path.open("rb", buffering=0)

    def _decode(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        index = row * -(-self.levels[level].width // self.block_px[level][0]) + column
        planes = []
        for decode, tables, offsets, counts in self._decoders[level]:
            with self._lock:
                self._handle.seek(offsets[index])
                data = self._handle.read(counts[index])
            check_claim(data, math.prod(self.block_px[level]))
            planes.append(decode(data, index, jpegtables=tables)[0][0])
        return self._check(np.concatenate(planes, axis=2), level, row, column)

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def takes_colors(channels: int) -> bool:
    """Whether a model of so many channels takes RGB or grey, one of which is made of the other."""
    return channels in (1, 3)


def open_for_channels(path: Path, channels: int, names: Sequence[str] = ()) -> SlideReader:
    """Open a slide with the channels that a model takes.

    Parameters
    ----------
    path
        The slide.
    channels, names
        Number of the model's channels, and their names; empty: they are numbered.

    Raises
    ------
    SlideError
        If it cannot be opened, or does not have these channels.
    """
    if takes_colors(channels):
        return open_slide(path)
    return open_channels(path, tuple(names) or numbered(channels))


def numbered(channels: int) -> tuple[str, ...]:
    """Return names for channels that have none."""
    return tuple(f"channel {i + 1}" for i in range(channels))


def open_channels(path: Path, channels: tuple[str, ...]) -> ChannelReader:
    """Open a TIFF or OME-TIFF file of 8 bits that has as many channels as a model takes.

    Parameters
    ----------
    path
        The file. Its channels are taken in their order.
    channels
        The names of the model's channels, for errors.

    Raises
    ------
    SlideError
        If it is not such a file, or has another number of channels.
    """
    wanted = f"the model takes {len(channels)} channels ({', '.join(channels)})"
    if not is_tiff(path):
        raise SlideError(f"{path}: {wanted}, which are read from TIFF and OME-TIFF only; convert the slide")
    check_tiff(path)
    import tifffile

    try:
        with tifffile.TiffFile(path, _multifile=False) as file:
            series = file.series[0]
            levels, found = _pages_of_levels(series)
            if found != len(channels):
                names = channel_names(file.ome_metadata if file.is_ome else None)
                listed = f" ({', '.join(names)})" if names else ""
                raise SlideError(f"{path}: it has {found} channels{listed}, {wanted}; use a model for its channels")
            for page in (page for pages in levels for page in pages):
                if page.bitspersample != 8 or page.sampleformat != 1:
                    raise SlideError(
                        f"{path}: its pixels are {page.dtype}, the model takes 8 bits; scale each channel to 0..255 as "
                        "the training images were"
                    )
                if 0 in page.databytecounts:
                    raise SlideError(f"{path}: some of its tiles are missing; write it again with all tiles")
            return ChannelReader(path, levels, slide_mpp(path, file, levels[0][0]), found)
    except (HistoError, MemoryError):
        raise
    except Exception as error:  # tifffile raises errors of any kind where tags contradict each other
        raise SlideError(f"{path}: cannot be read ({reason(error)}); write it again as OME-TIFF") from error


def refuse_channels(path: Path) -> None:
    """Refuse a TIFF file whose channels are no colours, for readers that would take a channel for transparency.

    Raises
    ------
    SlideError
        If it has several channels of grey values, and does not say that the last one is alpha.
    """
    if not is_tiff(path):
        return
    import tifffile

    with tifffile.TiffFile(path, _multifile=False) as file:
        page = file.pages.first
        count, alpha = int(page.samplesperpixel), page.extrasamples[-1:]
        if page.photometric != GREY or count == 1 or (alpha and int(alpha[0]) in ALPHA):
            return
        names = channel_names(file.ome_metadata if file.is_ome else None)
    listed = f" ({', '.join(names)})" if names else ""
    raise SlideError(
        f"{path}: it has {count} channels{listed}, which are not colours: use a model for {count} channels, or export "
        "an RGB or grey image from it"
    )


def channel_names(ome_xml: str | None) -> list[str]:
    """Return the names of the channels in OME-XML; empty without all of them."""
    try:
        entries = ET.fromstring(ome_xml or "").findall(".//{*}Pixels/{*}Channel")
    except ET.ParseError:
        return []
    names = [entry.get("Name", "") for entry in entries]
    return names if all(names) else []


def _pages_of_levels(series: Any) -> tuple[list[list[Any]], int]:
    """Return the pages of each level, finest first, and the number of channels.

    Raises
    ------
    ValueError
        If the axes are others than rows, columns and channels.
    """
    if series.axes in SINGLE:
        return [[level.pages[0]] for level in series.levels], 1
    if series.axes in INTERLEAVED:
        return [[level.pages[0]] for level in series.levels], int(series.shape[2])
    if series.axes in PLANES and len(series.pages) == series.shape[0]:
        return [[page.aspage() for page in level.pages] for level in series.levels], int(series.shape[0])
    raise ValueError(f"its axes are {series.axes}: rows, columns and channels are needed, no stack and no time")


def _block_px(page: Any) -> tuple[int, int]:
    """Return (width, height) of the tiles of a page, or of its strips."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)

"""Read TIFF images of any number of channels, for models whose input is neither RGB nor grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import HistoError, SlideError, printable, reason
from histostream.wsi.slides.bands import PLANES, channel_names
from histostream.wsi.slides.image_header import check_claim
from histostream.wsi.slides.pixel_size import PixelSize, tiff_pixel_size
from histostream.wsi.slides.reader import (
    BlockReader,
    Level,
    PositionedFile,
    SlideReader,
    downsample_between,
    open_slide,
)
from histostream.wsi.slides.tiff_check import check_tiff, is_tiff
from histostream.wsi.slides.tiff_images import missing_tiles, piece_px

INTERLEAVED, SINGLE = ("YXS",), ("YX",)  # tifffile's axes of what is read, beside PLANES
DARK = 0  # of blocks that a file does not hold: channels of fluorescence are dark where nothing is


class ChannelReader(BlockReader):
    """Reads blocks of some channels of a TIFF file, interleaved or one plane for each; see `SlideReader`."""

    name = "channels"

    def __init__(
        self, path: Path, levels: list[list[Any]], pixel_size: PixelSize | None, picked: Sequence[int]
    ) -> None:
        # levels: for each level one tifffile.TiffPage, or one for each channel
        first = [pages[0] for pages in levels]
        base = (first[0].imagewidth, first[0].imagelength)
        sizes = [(page.imagewidth, page.imagelength) for page in first]
        super().__init__(
            path,
            tuple(Level(w, h, downsample_between(base, (w, h))) for w, h in sizes),
            tuple(piece_px(page) for page in first),
            pixel_size,
            len(picked),
        )
        self.missing = tuple(missing_tiles(pages) for pages in levels)
        self._picked = list(picked)
        self._planes = len(levels[0]) > 1
        # tifffile makes these on first use, which would be a race between threads.
        self._decoders = [
            [(p.decode, p.jpegtables, p.dataoffsets, p.databytecounts) for p in pages] for pages in levels
        ]
        self._file = PositionedFile(path)

    def _decode(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        (width, height), size = self.block_px[level], self.levels[level]
        index = row * -(-size.width // width) + column
        decoders = self._decoders[level]
        if self._planes:
            planes = [self._decode_plane(*decoders[i], index, width * height) for i in self._picked]
        else:
            plane = self._decode_plane(*decoders[0], index, width * height)
            planes = [None if plane is None else plane[..., self._picked]]
        channels = self.channels // len(planes)
        shape = min(height, size.height - row * height), min(width, size.width - column * width)
        blocks = [
            np.full((*shape, channels), DARK, np.uint8) if p is None else p[: shape[0], : shape[1]] for p in planes
        ]
        return self._check(np.concatenate(blocks, axis=2), level, row, column)

    def _decode_plane(
        self, decode: Any, tables: Any, offsets: Any, counts: Any, index: int, max_px: int
    ) -> NDArray[np.uint8] | None:
        """Decode one block of a page, (H, W, C); None if the file does not hold it."""
        if not counts[index]:
            return None
        data = self._file.read(offsets[index], counts[index])
        check_claim(data, max_px)
        pixels: NDArray[np.uint8] = decode(data, index, jpegtables=tables)[0][0]
        return pixels

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def takes_colors(channels: int) -> bool:
    """Whether a model of so many channels takes RGB or grey, one of which is made of the other."""
    return channels in (1, 3)


def open_for_channels(
    path: Path, channels: int, names: Sequence[str] = (), picked: Sequence[int] | None = None
) -> SlideReader:
    """Open a slide with the channels that a model takes.

    Parameters
    ----------
    path
        The slide.
    channels, names
        Number of the model's channels, and their names; empty: they are numbered.
    picked
        For each of the model's channels the index of the slide's channel; None: colours, or all in their order.

    Raises
    ------
    SlideError
        If it cannot be opened, or does not have these channels.
    """
    if takes_colors(channels) and picked is None:
        return open_slide(path)
    return open_channels(path, tuple(names) or numbered(channels), picked)


def numbered(channels: int) -> tuple[str, ...]:
    """Return names for channels that have none."""
    return tuple(f"channel {i + 1}" for i in range(channels))


def open_channels(path: Path, channels: tuple[str, ...], picked: Sequence[int] | None = None) -> ChannelReader:
    """Open a TIFF or OME-TIFF file of 8 bits that has the channels that a model takes.

    Parameters
    ----------
    path
        The file.
    channels
        The names of the model's channels, for errors.
    picked
        For each of them the index of the file's channel, from 0; None: the file has as many, in their order.

    Raises
    ------
    SlideError
        If it is not such a file, or does not have these channels.
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
            names = channel_names(file.ome_metadata if file.is_ome else None)
            listed = f" ({', '.join(map(printable, names))})" if names else ""
            if picked is None and found != len(channels):
                raise SlideError(
                    f"{path}: it has {found} channels{listed}, {wanted}; use a model for its channels, or pick one for "
                    "each channel of the model with --channels"
                )
            if picked is not None and max(picked) >= found:
                raise SlideError(
                    f"{path}: --channels picks channel {max(picked)}, and it has {found}{listed}; "
                    f"pick from 0 to {found - 1}"
                )
            for page in (page for pages in levels for page in pages):
                if page.bitspersample != 8 or page.sampleformat != 1:
                    raise SlideError(
                        f"{path}: its pixels are {page.dtype}, the model takes 8 bits; scale each channel to 0..255 as "
                        "the training images were"
                    )
            pixel_size = tiff_pixel_size(path, file, levels[0][0])
            return ChannelReader(path, levels, pixel_size, range(found) if picked is None else picked)
    except (HistoError, MemoryError):
        raise
    except Exception as error:  # tifffile raises errors of any kind where tags contradict each other
        raise SlideError(f"{path}: cannot be read ({reason(error)}); write it again as OME-TIFF") from error


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

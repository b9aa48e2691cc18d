"""View a slide at a physical resolution: choose the stored level to read, and resample it.

The pixels of a view do not depend on the region that is read: pixel i always covers the source
interval [i * scale, (i + 1) * scale), counted from the slide's corner. Strips, tiles and the whole
image therefore agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.slides.reader import SlideReader, mpp_source

MIN_MPP, MAX_MPP = 0.001, 50.0  # um; electron micrographs are 0.005, a macro camera about 25
LIGHT_MPP = 0.05  # um; finer pixels come from an electron microscope: 100x oil is 0.1
SAME_MPP = 0.02  # relative; less than scanners of one model differ by, and not worth a resampling
MAX_UPSAMPLING = 2.02  # 2x, within the same tolerance of 1 %
DOUBTED_UPSAMPLING = 8.0  # beyond it, a wrong resolution in the file is more likely than so coarse a scan
BAND_BYTES = 64 << 20  # source pixels held at once while a thumbnail is made


@dataclass(frozen=True, slots=True)
class SlideView:
    """The pixels of a slide at one resolution. Make one with `at_mpp`.

    Attributes
    ----------
    slide
        Where the pixels come from.
    level
        The stored level that is read.
    scale
        Pixels of that level per pixel of the view, along one side; 1.0 means as stored.
    mpp
        Micrometres per pixel of the view; None if neither the slide nor the caller gives it.
    """

    slide: SlideReader
    level: int
    scale: float
    mpp: float | None

    @property
    def width(self) -> int:
        """Width in pixels of the view."""
        return max(1, int(self.slide.levels[self.level].width / self.scale + 0.5))

    @property
    def height(self) -> int:
        """Height in pixels of the view."""
        return max(1, int(self.slide.levels[self.level].height / self.scale + 0.5))

    @property
    def channels(self) -> int:
        """3 (RGB) or 1 (grey)."""
        return self.slide.channels

    @property
    def bounds(self) -> Box | None:
        """The box that was scanned, in pixels of OpenSlide's level 0; see `SlideReader`."""
        return getattr(self.slide, "bounds", None)  # readers of other packages may not have it

    @property
    def downsample(self) -> float:
        """Pixels of the slide's level 0 per pixel of the view, along one side."""
        return self.slide.levels[self.level].downsample * self.scale

    def source_columns(self, x0: int, x1: int) -> tuple[int, int]:
        """Return the columns [first, last) of the level that the view's columns x0:x1 need."""
        return _span(x0, x1, self.scale, self.slide.levels[self.level].width)

    def source_rows(self, y0: int, y1: int) -> tuple[int, int]:
        """Return the rows [first, last) of the level that the view's rows y0:y1 need."""
        return _span(y0, y1, self.scale, self.slide.levels[self.level].height)

    def read(self, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a box, given in pixels of the view; it must lie inside the view.

        Returns
        -------
        (height, width, channels) uint8.

        Raises
        ------
        SlideError
            If the file is damaged there.
        ValueError
            If the box does not lie inside the view.
        """
        if not (0 <= x < x + width <= self.width and 0 <= y < y + height <= self.height):
            raise ValueError(
                f"box x={x} y={y} {width}x{height} does not lie inside a view of {self.width}x{self.height} px"
            )
        left, right = self.source_columns(x, x + width)
        top, bottom = self.source_rows(y, y + height)
        source = self.slide.read(self.level, left, top, right - left, bottom - top)
        return self.resample(source, x, y, width, height)

    def resample(self, source: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Resample pixels of the level to pixels of the view.

        An exact area average if the view is coarser, bilinear with half-pixel centres if it is finer;
        at the slide's border only the part inside of the slide counts.

        Parameters
        ----------
        source
            (H, W, C) pixels of the level: ``source_rows(y, y + height)`` x
            ``source_columns(x, x + width)``.
        x, y, width, height
            Box of the view.

        Returns
        -------
        (height, width, C) uint8; ``source`` itself if the scale is 1.
        """
        if self.scale == 1:
            return source
        level = self.slide.levels[self.level]
        rows = _taps(y, y + height, self.scale, level.height)
        columns = _taps(x, x + width, self.scale, level.width)
        averaged = _weighted_rows(source, *rows)
        return _weighted_columns(averaged, *columns, channels=source.shape[2])


def at_mpp(slide: SlideReader, mpp: float | None, *, slide_mpp: float | None = None, force: bool = False) -> SlideView:
    """View a slide at ``mpp`` micrometres per pixel.

    The coarsest stored level that is not coarser than ``mpp`` is read and averaged. A level within
    2 % of ``mpp`` is not resampled; the view then has the level's own mpp.

    Parameters
    ----------
    slide
        An open slide.
    mpp
        Resolution of the view; None takes level 0 as it is.
    slide_mpp
        Resolution of level 0, instead of the one in the file.
    force
        Allow upsampling by more than 2x.

    Raises
    ------
    SlideError
        If the slide's resolution is unknown or impossible, or the slide is too coarse.

    Examples
    --------
    >>> from histostream.wsi import open_slide
    >>> with open_slide("slide.svs") as slide:  # 0.5 um per pixel
    ...     view = at_mpp(slide, 2.0)
    ...     print(view.width, view.height, view.read(0, 0, 10, 10).shape)
    175 150 (10, 10, 3)
    """
    own = slide_mpp if slide_mpp is not None else slide.mpp
    if mpp is None:
        known = own is not None and MIN_MPP <= own <= MAX_MPP
        return SlideView(slide, 0, 1.0, own if known else None)
    if not MIN_MPP <= mpp <= MAX_MPP:
        raise SlideError(f"{slide.path}: {mpp:g} um per pixel is requested; use {MIN_MPP:g} to {MAX_MPP:g}")
    own = _checked_mpp(slide, own)
    fine = [i for i, level in enumerate(slide.levels) if own * level.downsample <= mpp * 1.02]
    level = max(fine, key=lambda i: slide.levels[i].downsample) if fine else 0
    level_mpp = own * slide.levels[level].downsample
    if abs(level_mpp / mpp - 1) <= SAME_MPP + 1e-9:
        return SlideView(slide, level, 1.0, level_mpp)
    if level_mpp / mpp > MAX_UPSAMPLING and not force:
        source = "--mpp" if slide_mpp is not None else mpp_source(slide)
        by = f" by {source}" if source else ""
        doubt = "if it was scanned finer, pass --mpp with the true resolution; otherwise "
        raise SlideError(
            f"{slide.path}: it has {level_mpp:.4g} um per pixel{by}, {mpp:g} is requested, which invents "
            f"{level_mpp / mpp:.1f} pixels from one; "
            f"{doubt if level_mpp / mpp > DOUBTED_UPSAMPLING else ''}pass --force-upsampling to do it anyway"
        )
    return SlideView(slide, level, mpp / level_mpp, mpp)


def resampled(pixels: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Resample a whole image like a view of a slide.

    Parameters
    ----------
    pixels
        (H, W, C).
    scale
        Pixels of the image per pixel of the result, along one side; above 1 the result is smaller.

    Returns
    -------
    (H / scale, W / scale, C) uint8, both sides rounded to nearest.
    """
    rows, columns = (_taps(0, max(1, int(side / scale + 0.5)), scale, side) for side in pixels.shape[:2])
    averaged = _weighted_rows(pixels, *rows)
    return _weighted_columns(averaged, *columns, channels=pixels.shape[2])


def thumbnail(slide_or_view: SlideReader | SlideView, max_px: int) -> NDArray[np.uint8]:
    """Read the whole slide as a small image, in bands, from the coarsest level that is fine enough.

    Column i covers the view's columns [i * f, (i + 1) * f) with f = view.width / thumbnail width, and
    rows likewise (the two factors differ by less than a pixel over the thumbnail's whole length).

    Parameters
    ----------
    slide_or_view
        The thumbnail is not finer than it.
    max_px
        Longest side of the thumbnail.

    Returns
    -------
    (H, W, C) uint8, max(H, W) <= max_px.

    Examples
    --------
    >>> from histostream.wsi import open_slide
    >>> with open_slide("slide.svs") as slide:
    ...     print(thumbnail(slide, 100).shape)
    (86, 100, 3)
    """
    if not isinstance(slide_or_view, SlideView):
        slide_or_view = SlideView(slide_or_view, 0, 1.0, None)
    small = _overview(slide_or_view, max_px)
    level = small.slide.levels[small.level]
    row_bytes = level.width * small.channels * max(1.0, small.scale)
    # Blocks at the borders of bands are decoded twice, so a band is several blocks high.
    blocks_high = 8 * small.slide.block_px[small.level][1] / small.scale
    band = max(1, min(int(BAND_BYTES / row_bytes), int(blocks_high)))
    out = np.empty((small.height, small.width, small.channels), np.uint8)
    for y in range(0, small.height, band):
        height = min(band, small.height - y)
        out[y : y + height] = small.read(0, y, small.width, height)
    return out


def _overview(view: SlideView, max_px: int) -> SlideView:
    """Return the view whose longest side is ``max_px``, or that of the view if it is smaller."""
    slide = view.slide
    longest_px = min(max_px, max(view.width, view.height))
    longest = [max(level.width, level.height) for level in slide.levels]
    level = max(i for i, px in enumerate(longest) if px >= longest_px or i == 0)
    return SlideView(slide, level, longest[level] / longest_px, None)


def _checked_mpp(slide: SlideReader, mpp: float | None) -> float:
    if mpp is None:
        raise SlideError(f"{slide.path}: no resolution in the file; pass --mpp (20x is usually 0.5, 40x 0.25)")
    if not MIN_MPP <= mpp <= MAX_MPP:
        raise SlideError(
            f"{slide.path}: {mpp:.4g} um per pixel cannot be true; pass --mpp (20x is usually 0.5, 40x 0.25)"
        )
    return mpp


def _taps(start: int, stop: int, scale: float, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the source pixels of the pixels start:stop of one axis, and their weights.

    Returns
    -------
    (N, taps) index into the source, and (N, taps) weight; each row of weights sums to 1, and an index
    of weight 0 may lie outside of the source.
    """
    i = np.arange(start, stop, dtype=np.float64)[:, None]
    if scale >= 1:
        low, high = i * scale, np.minimum((i + 1) * scale, size)
        index = np.floor(low) + np.arange(int(np.ceil(scale)) + 1)
        weight = np.minimum(index + 1, high) - np.maximum(index, low)
        weight = np.maximum(weight, 0)
        weight /= weight.sum(axis=1, keepdims=True)
    else:
        centre = (i + 0.5) * scale - 0.5
        index = np.floor(centre) + np.arange(2)
        weight = 1 - np.abs(index - centre)
        index = np.clip(index, 0, size - 1)
    return index.astype(np.int64), weight.astype(np.float32)


def _span(start: int, stop: int, scale: float, size: int) -> tuple[int, int]:
    """Return the source pixels [first, last) of the pixels start:stop of one axis."""
    if scale == 1:
        return start, stop
    index, weight = _taps(start, start + 1, scale, size)
    first = int(index[weight > 0].min())
    index, weight = _taps(stop - 1, stop, scale, size)
    return first, int(index[weight > 0].max()) + 1


# Both passes add one tap after the other for all pixels, so that the order of the additions, and every
# bit of the sums, is the same for any region. A matrix product would not guarantee that.


def _weighted_rows(
    source: NDArray[np.uint8], index: NDArray[np.int64], weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(H, W, C) uint8 -> (N, W * C) float32."""
    flat = source.reshape(len(source), -1)
    index = np.clip(index - index[0][weight[0] > 0].min(), 0, len(flat) - 1)
    total = np.zeros((len(index), flat.shape[1]), np.float32)
    product = np.empty(flat.shape[1], np.float32)
    for row, taps, shares in zip(total, index, weight, strict=True):
        for i, share in zip(taps, shares, strict=True):
            if share:
                product[...] = flat[i]
                product *= share
                row += product
    return total


def _weighted_columns(
    source: NDArray[np.float32],
    index: NDArray[np.int64],
    weight: NDArray[np.float32],
    channels: int,
) -> NDArray[np.uint8]:
    """(H, W * C) float32 -> (H, N, C) uint8, rounded to nearest, halves up."""
    index = index - index[0][weight[0] > 0].min()
    used = weight.any(axis=0)
    # Per tap, where each value of a row of N * C values comes from, and its weight.
    values = (index.T[used, :, None] * channels + np.arange(channels)).reshape(used.sum(), -1)
    values = np.clip(values, 0, source.shape[1] - 1)
    shares = np.repeat(weight.T[used], channels, axis=1)
    out = np.empty((len(source), len(index) * channels), np.uint8)
    total, product = np.empty((2, len(index) * channels), np.float32)
    for row, result in zip(source, out, strict=True):
        total.fill(0.5)
        for columns, share in zip(values, shares, strict=True):
            # With mode="clip" numpy writes into `out` without a copy; there is nothing to clip.
            np.take(row, columns, out=product, mode="clip")
            product *= share
            total += product
        result[...] = total
    return out.reshape(len(out), len(index), channels)

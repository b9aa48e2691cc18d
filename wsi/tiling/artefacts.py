"""Find pen ink by its colour, and tissue out of focus by its lack of sharpness."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from histostream.wsi.runs import Runs
from histostream.wsi.slides.resolution import SlideView, at_mpp
from histostream.wsi.tiling.cells import dilated
from histostream.wsi.tiling.tissue import BLUR_PX, TissueMask, reduced

MIN_PEN_UM2 = 10_000.0  # strokes are half a millimetre wide; smaller pieces are pigment, or debris
PEN_MARGIN_UM = 24.0  # around ink: its border is paler
# Ink on an overview of 8 um per pixel: hue in degrees (from, to), least saturation, and brightness of 255 (from, to).
# Haematoxylin is at hues of 235 and more, eosin at 310 to 350, DAB at 10 to 40, blood near 0 with less saturation.
INKS = {
    "green": ((70, 190), 0.25, (0, 235)),
    "blue": ((190, 232), 0.45, (0, 255)),
    "blue on tissue": ((190, 256), 0.66, (0, 255)),
    "red": ((350, 372), 0.75, (90, 255)),
    "black": ((0, 360), 0.0, (0, 60)),
}
SHARPNESS_MPP = 1.0  # um; sharpness is judged here, and at two and four times as much,
BLOCK_UM = 64.0  # in blocks of this side
BLURRED = 0.42  # blur effect above which a block is out of focus; the sharp blocks that were tried have at most 0.41
MIN_TISSUE = 0.75  # share of a block that has to be tissue, or it is not judged
FILTER_PX = 9
BAND_BLOCKS = 8  # rows of blocks that are read at a time


@dataclass(frozen=True, slots=True)
class Artefacts:
    """What a slide has of ink and blur.

    Attributes
    ----------
    pen
        (h, w) bool on the overview of the tissue.
    blurred
        (h, w) bool, blocks of 64 um; None where the slide is too coarse to judge sharpness.
    """

    pen: NDArray[np.bool_]
    blurred: NDArray[np.bool_] | None

    @property
    def masks(self) -> list[NDArray[np.bool_]]:
        """What is to be left out."""
        return [self.pen] if self.blurred is None else [self.pen, self.blurred]


def find_artefacts(view: SlideView, preview: NDArray[np.uint8] | None, tissue: TissueMask) -> Artefacts:
    """Find ink and tissue out of focus on a slide with a light ground.

    Ink is found by hue, saturation and brightness on the overview, and so are dyes of these colours. Sharpness is
    the blur effect of Crete et al. 2007, "The blur effect: perception and estimation with a new no-reference
    perceptual blur metric": an image is blurred once more, and the less its gradients change by it, the less sharp
    it was. It does not depend on stain or contrast. Blocks without detail count as blurred.

    Parameters
    ----------
    view
        The slide; its ``mpp`` is known.
    preview
        (h, w, C) uint8, an overview that was read before; used if it is fine enough.
    tissue
        The tissue.
    """
    overview = reduced(view, max(tissue.mask.shape), preview)
    if overview.shape[2] < 3 or tissue.dark_ground:
        return Artefacts(np.zeros_like(tissue.mask), None)
    pen = _pen(overview, tissue)
    return Artefacts(pen, _blurred(view, tissue.mask & ~pen))


def blur_effect(grey: NDArray[np.float32], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the blur effect of each block of an image, 0 (sharp) to 1; the larger of both directions.

    Parameters
    ----------
    grey
        (H, W).
    rows, columns
        Where the blocks begin.
    """
    effect = np.zeros((len(rows), len(columns)), np.float32)
    for axis in (0, 1):
        change = np.abs(np.diff(grey, axis=axis, prepend=np.take(grey, [0], axis)))
        smooth = _averaged(grey, axis)
        smooth_change = np.abs(np.diff(smooth, axis=axis, prepend=np.take(smooth, [0], axis)))
        total = _sums(change, rows, columns)
        lost = _sums(np.maximum(change - smooth_change, 0), rows, columns)
        flat = total <= 0
        effect = np.maximum(effect, np.where(flat, 1, (total - lost) / np.where(flat, 1, total)))
    return effect


def _pen(overview: NDArray[np.uint8], tissue: TissueMask) -> NDArray[np.bool_]:
    """Return (h, w) bool: ink on an overview, with a margin."""
    smooth = np.asarray(Image.fromarray(overview).filter(ImageFilter.BoxBlur(BLUR_PX))).astype(np.float32)
    red, green, blue = np.moveaxis(smooth, 2, 0)
    most, spread = smooth.max(axis=2), np.ptp(smooth, axis=2)
    safe = np.maximum(spread, 1e-6)
    hue = np.where(
        most == red,
        ((green - blue) / safe) % 6,
        np.where(most == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue, saturation = 60 * hue, spread / np.maximum(most, 1)
    ink = np.zeros(most.shape, np.bool_)
    for (low, high), least, (dark, bright) in INKS.values():
        of_hue = ((hue - low) % 360) <= high - low
        ink |= of_hue & (saturation >= least) & (most >= dark) & (most <= bright)
    runs = Runs((ink & tissue.mask).view(np.uint8), corners=True)
    area = np.bincount(runs.component, weights=runs.end - runs.start, minlength=runs.components)
    kept = runs.painted(area * tissue.mpp**2 >= MIN_PEN_UM2)
    pen = dilated(kept, max(1, round(PEN_MARGIN_UM / tissue.mpp))) & tissue.mask
    return pen | _slivers(pen, tissue)


def _slivers(pen: NDArray[np.bool_], tissue: TissueMask) -> NDArray[np.bool_]:
    """Return (h, w) bool: what ink cuts off from the tissue, if it is no larger than a mark."""
    runs = Runs((tissue.mask & ~pen).view(np.uint8), corners=True)
    area = np.bincount(runs.component, weights=runs.end - runs.start, minlength=runs.components)
    number = runs.painted(np.arange(1, runs.components + 1))
    beside = np.isin(np.arange(1, runs.components + 1), number[dilated(pen, 1)])
    return runs.painted(beside & (area * tissue.mpp**2 < MIN_PEN_UM2))


def _blurred(view: SlideView, tissue: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Return (rows, columns) bool: the blocks of a slide with tissue out of focus; None if it is too coarse."""
    assert view.mpp is not None
    if view.mpp / view.downsample > SHARPNESS_MPP * 1.02:
        return None
    fine = at_mpp(view.slide, SHARPNESS_MPP, slide_mpp=view.mpp / view.downsample)
    side = BLOCK_UM / SHARPNESS_MPP
    edges_y, edges_x = (np.rint(np.linspace(0, px, max(1, round(px / side)) + 1)) for px in (fine.height, fine.width))
    ys, xs = edges_y.astype(np.int64), edges_x.astype(np.int64)
    share = _shares(tissue, len(ys) - 1, len(xs) - 1)
    judged, blurred = share >= MIN_TISSUE, np.zeros(share.shape, np.bool_)
    for top in range(0, len(ys) - 1, BAND_BLOCKS):
        bottom = min(top + BAND_BLOCKS, len(ys) - 1)
        for left, right in _runs(np.logical_or.reduce(judged[top:bottom])):
            pixels = fine.read(xs[left], ys[top], xs[right] - xs[left], ys[bottom] - ys[top])
            effect = _at_scales(pixels, ys[top:bottom] - ys[top], xs[left:right] - xs[left])
            blurred[top:bottom, left:right] = effect > BLURRED
    return blurred & judged


def _at_scales(pixels: NDArray[np.uint8], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the largest blur effect of blocks, at 1, 2 and 4 um per pixel: noise hides strong blur at the finest."""
    grey = pixels.min(axis=2).astype(np.float32)
    effect = blur_effect(grey, rows, columns)
    for factor in (2, 4):
        if min(grey.shape) < 2 * factor:
            break
        height, width = (size // 2 * 2 for size in grey.shape)
        grey = grey[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
        effect = np.maximum(effect, blur_effect(grey, rows // factor, columns // factor))
    return effect


def _averaged(grey: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Average over `FILTER_PX` pixels along one axis; the border is repeated."""
    pad = [(0, 0), (0, 0)]
    pad[axis] = (FILTER_PX // 2 + 1, FILTER_PX // 2)
    sums = np.pad(grey, pad, mode="edge").cumsum(axis=axis, dtype=np.float64)
    size = grey.shape[axis]
    ends, starts = (np.take(sums, np.arange(size) + shift, axis) for shift in (FILTER_PX, 0))
    averaged: NDArray[np.float32] = ((ends - starts) / FILTER_PX).astype(np.float32)
    return averaged


def _sums(values: NDArray[np.float32], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    sums: NDArray[np.float32] = np.add.reduceat(np.add.reduceat(values, rows, axis=0), columns, axis=1)
    return sums


def _shares(mask: NDArray[np.bool_], rows: int, columns: int) -> NDArray[np.float32]:
    """Return (rows, columns): the share of a mask that is marked, in equal blocks."""
    image = Image.fromarray(mask.view(np.uint8) * np.uint8(255)).resize((columns, rows), Image.Resampling.BOX)
    return np.asarray(image).astype(np.float32) / np.float32(255)


def _runs(marked: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return [first, last) of each run of marked entries."""
    edges = np.flatnonzero(np.diff(marked.view(np.int8), prepend=0, append=0))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]

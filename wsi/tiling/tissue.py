"""Find the tissue of a slide on an overview."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from histostream.wsi.geometry import Box
from histostream.wsi.runs import Runs
from histostream.wsi.slides.resolution import LIGHT_MPP, SlideView, thumbnail
from histostream.wsi.tiling.cells import Cells, dilated, tile_spans
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.unscanned import Filling, channel_range, counts, find_fillings

MASK_MPP = 8.0  # um, at least: single cells are not resolved on the overview
MASK_PX = 4096  # longest side of the overview; 16 um per pixel on the largest slides, of 65 mm
NEARLY = 0.8  # a stored level of at least this share of the wanted size is taken as it is: a finer one costs 16 times
GUESSED_MPP = 0.5  # um of level 0, for the sizes here only, if a slide has no resolution: 20x
MIN_AREA_UM2 = 10_000.0  # 100 um x 100 um: smaller than a biopsy's fragments, larger than dust
CELL_UM2 = 100.0  # where no piece is as large, none is smaller than a cell,
FEWER = 10.0  # nor than a tenth of the largest
BLUR_PX = 1  # radius; suppresses JPEG noise
MARGIN_UM = 16.0  # tissue is widened by it, in whole pixels of the overview, so that faint borders are kept
# Of 255, in the colour channel that a pixel absorbs most. On the slides tried glass varied by +-5, and
# pale grey-blue tissue, which a threshold on saturation misses, began at +40.
ABSORBED = 20  # more than glass
MAX_GLASS = 48  # glass is never darker; if even the lightest pixels are, there is no glass
GLASS_PERCENTILE = 5
FILLED = 2  # absorption of the pure white with which scanners fill areas that they skip
DARK_GROUND = 64  # a median brightness below it means fluorescence, not a stained slide
RIM_PX = 2  # pixels of the overview beside an unscanned area are mixed with it, and are no tissue
# Limits of Otsu's threshold on slides with a dark ground: it may fall between dim and bright cells, and
# the dim ones count too.
MIN_BRIGHTNESS, MAX_BRIGHTNESS = 8, 20


@dataclass(frozen=True, slots=True)
class TissueMask:
    """The tissue on an overview of the whole slide.

    Attributes
    ----------
    mask
        (H, W) bool: tissue and its margin.
    unscanned
        (H, W) bool: areas that the scanner filled with one colour; None: none was looked for.
    mpp
        Micrometres per pixel of the overview.
    margin_px
        By how many pixels tissue was widened.
    dark_ground
        Whether the slide is dark, and tissue bright, as with fluorescence.
    """

    mask: NDArray[np.bool_]
    unscanned: NDArray[np.bool_] | None = None
    mpp: float = MASK_MPP
    margin_px: int = 0
    dark_ground: bool = False

    def tiles(self, grid: TileGrid) -> NDArray[np.bool_]:
        """Return (rows, columns) bool: the tiles whose write box touches tissue."""
        return Cells.of_picture(self.mask, grid.width, grid.height).touches(*tile_spans(grid))


def find_tissue(
    view: SlideView,
    *,
    min_area_um2: float = MIN_AREA_UM2,
    max_px: int = MASK_PX,
    preview: NDArray[np.uint8] | None = None,
    damaged: Sequence[Box] = (),
) -> TissueMask:
    """Find the tissue on an overview of a slide, of 8 um per pixel where ``max_px`` allows it.

    Tissue, stained or not, absorbs more than glass in some colour channel. On a dark ground
    (fluorescence) it is brighter than Otsu's threshold. Doubtful pixels are kept: a tile too many
    costs milliseconds, a tile too few is lost. So gaps smaller than ``min_area_um2`` count as tissue, and
    it is widened by a margin. Pen marks count as tissue. Areas that the scanner filled with one neutral
    colour do not. An electron micrograph (level 0 finer than 0.05 um per pixel) is tissue everywhere: it
    shows a few cells and no glass.

    Parameters
    ----------
    view
        The slide.
    min_area_um2
        Smaller pieces of tissue are dropped, unless all are smaller (cells of a smear, a needle biopsy, a patch).
        Then the largest ones are kept, down to a tenth of the largest.
    max_px
        Longest side of the overview.
    preview
        (H, W, C) uint8, an overview that was read before; used if it is fine enough.
    damaged
        Boxes of level 0 that cannot be decoded. They are grey on the overview, and not unscanned.

    Examples
    --------
    >>> from histostream.wsi import TileGrid, at_mpp, open_slide
    >>> with open_slide("slide.svs") as slide:
    ...     view = at_mpp(slide, 0.5)
    ...     tissue = find_tissue(view)
    >>> grid = TileGrid.cover(view.width, view.height, tile_px=128, overlap_px=0)
    >>> kept = grid.where(tissue.tiles(grid))
    >>> len(grid), len(kept)
    (30, 17)
    """
    mpp = view.mpp or GUESSED_MPP * view.downsample
    overview = reduced(view, mask_px(view, max_px), preview)
    height, width = overview.shape[:2]
    mask_mpp = mpp * max(view.width, view.height) / max(width, height)
    if mpp / view.downsample < LIGHT_MPP:
        return TissueMask(np.ones((height, width), np.bool_), None, mask_mpp)
    um2 = mpp**2 * (view.width / width) * (view.height / height)
    tissue, unscanned, dark_ground = _is_tissue(overview, um2, _drawn(damaged, view, overview))
    tissue = _without_gaps(_pieces(tissue, min_area_um2 / um2, CELL_UM2 / um2), unscanned, min_area_um2 / um2)
    margin_px = max(1, round(MARGIN_UM / mask_mpp))
    tissue = dilated(tissue, margin_px) & ~dilated(unscanned, 1)  # part of the pixels beside it was not scanned
    return TissueMask(tissue, unscanned, mask_mpp, margin_px, dark_ground)


def mask_px(view: SlideView, max_px: int = MASK_PX) -> int:
    """Return the longest side of the overview that tissue is found on."""
    mpp = view.mpp or GUESSED_MPP * view.downsample
    longest_px = max(view.width, view.height)
    wanted = max(1, min(max_px, round(longest_px * mpp / MASK_MPP)))
    stored = [max(level.width, level.height) for level in view.slide.levels]
    return max((px for px in stored if NEARLY * wanted <= px <= min(wanted, longest_px)), default=wanted)


def reduced(view: SlideView, longest_px: int, preview: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """Return the whole slide at ``longest_px`` on its longest side, from ``preview`` if it is fine enough."""
    if preview is None or max(preview.shape[:2]) < longest_px:
        return thumbnail(view, longest_px)
    scale = longest_px / max(preview.shape[:2])
    height, width = (max(1, round(side * scale)) for side in preview.shape[:2])
    image = Image.fromarray(preview[..., 0] if preview.shape[2] == 1 else preview)
    smaller = np.asarray(image.resize((width, height), Image.Resampling.BOX))
    return smaller.reshape(height, width, preview.shape[2])


def _is_tissue(
    overview: NDArray[np.uint8], um2: float, damaged: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], bool]:
    """Return (H, W) bool each: the tissue on an overview, the areas that were not scanned; and if its ground is dark.

    Parameters
    ----------
    overview
        (H, W, C) uint8, the whole slide.
    um2
        Area of its pixels.
    damaged
        (H, W) bool, pixels that are not unscanned.
    """
    fillings = find_fillings(overview, um2, damaged)
    image = Image.fromarray(overview[..., 0] if overview.shape[2] == 1 else overview)
    blurred = np.asarray(image.filter(ImageFilter.BoxBlur(BLUR_PX))).reshape(overview.shape)
    darkest, brightness = channel_range(blurred)
    absorption = 255 - darkest
    scanned = ~_joined([f for f in fillings if f.absorption > MAX_GLASS + ABSORBED], brightness)  # others may be glass
    if scanned.any() and _percentile(brightness[scanned], 50) < DARK_GROUND:
        bright: NDArray[np.bool_] = brightness > _otsu(brightness)
        return bright, np.zeros_like(bright), True
    signal = absorption[scanned & (absorption > FILLED)]
    glass = min(_percentile(signal, GLASS_PERCENTILE), MAX_GLASS) if len(signal) else 0
    # A lighter filling looks like glass, and is no tissue anyway.
    unscanned = _joined([filling for filling in fillings if filling.absorption > glass + ABSORBED], brightness)
    absorbing: NDArray[np.bool_] = absorption > glass + ABSORBED
    return absorbing & ~dilated(unscanned, RIM_PX), unscanned, False


def _joined(fillings: Sequence[Filling], like: NDArray[np.uint8]) -> NDArray[np.bool_]:
    joined = np.zeros(like.shape, np.bool_)
    for filling in fillings:
        joined |= filling.mask
    return joined


def _percentile(signal: NDArray[np.uint8], percent: float) -> float:
    """Return what `numpy.percentile` returns, in a tenth of its time."""
    upto = counts(signal).cumsum()
    position = (len(signal) - 1) * percent / 100
    low, high = np.searchsorted(upto, [np.floor(position), np.ceil(position)], side="right")
    return float(low + (high - low) * (position % 1))


def _otsu(signal: NDArray[np.uint8]) -> int:
    """Return the t for which the variance between <= t and > t is largest (Otsu 1979), within limits."""
    count = counts(signal.ravel()).astype(float)
    below = np.cumsum(count)
    above = below[-1] - below
    total = np.cumsum(count * np.arange(256))
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = total / below - (total[-1] - total) / above
        between = below * above * gap**2
    best = int(np.nan_to_num(between).argmax())
    return min(max(best, MIN_BRIGHTNESS), MAX_BRIGHTNESS)


def _pieces(mask: NDArray[np.bool_], min_px: float, cell_px: float) -> NDArray[np.bool_]:
    """Drop the 8-connected pieces of fewer than ``min_px`` pixels; if all are, keep the largest."""
    runs = Runs(mask.view(np.uint8), corners=True)
    area = np.bincount(runs.component, weights=runs.end - runs.start, minlength=runs.components)
    largest = area.max(initial=0)
    return runs.painted(area >= (min_px if largest >= min_px else max(largest / FEWER, cell_px)))


def _without_gaps(mask: NDArray[np.bool_], unscanned: NDArray[np.bool_], min_px: float) -> NDArray[np.bool_]:
    """Fill the gaps of tissue that have fewer than ``min_px`` pixels: lumina, vessels, fat."""
    runs = Runs((~mask & ~unscanned).view(np.uint8))
    area = np.bincount(runs.component, weights=runs.end - runs.start, minlength=runs.components)
    return mask | runs.painted(area < min_px)


def _drawn(boxes: Sequence[Box], view: SlideView, overview: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return (H, W) bool: the pixels of an overview that boxes of level 0 touch."""
    drawn = np.zeros(overview.shape[:2], np.bool_)
    base = view.slide.levels[0]
    scale_y, scale_x = overview.shape[0] / base.height, overview.shape[1] / base.width
    for box in boxes:
        rows = slice(int(box.y * scale_y), int(np.ceil(box.bottom * scale_y)))
        drawn[rows, int(box.x * scale_x) : int(np.ceil(box.right * scale_x))] = True
    return drawn

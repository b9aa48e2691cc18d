"""The area of a slide that is analysed: tissue, inside of regions, on blocks that the file holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.geometry import Box
from histostream.wsi.outputs.label_rows import NOT_ANALYSED
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.tiling.cells import Cells, tile_spans
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.polygons import RegionOfInterest

COARSE_PX = 2048  # longest side of `AnalysedArea.mask` where no mask has a resolution of its own


@dataclass(frozen=True, slots=True)
class AnalysedArea:
    """The pixels of a view that are analysed: those that every part keeps.

    Whether a pixel is analysed does not depend on the box that it is asked with, so labels are the same for
    any division into column bands and rows.

    Attributes
    ----------
    masks
        Masks over the view: tissue, a mask of the user, blocks that the file holds.
    regions
        Polygons; their outlines are followed pixel by pixel.
    mask
        (h, w) bool, all of them on an overview of the whole view: the pixels in which anything is analysed.
    """

    masks: tuple[Cells, ...]
    regions: tuple[RegionOfInterest, ...]
    mask: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        view: SlideView,
        masks: Sequence[NDArray[np.bool_]] = (),
        regions: Sequence[RegionOfInterest] = (),
    ) -> AnalysedArea:
        """Join what is to be analysed of a view.

        Parameters
        ----------
        view
            The slide. Blocks that its file does not hold are left out.
        masks
            (h, w) bool each, of any size: masks of the whole view. The first one decides the resolution of ``mask``.
        regions
            Polygons.
        """
        width, height = view.width, view.height
        cells = [Cells.of_picture(mask, width, height) for mask in masks]
        blocks = _blocks(view)
        everything = [*cells, *blocks, *(region.cells(width, height) for region in regions)]
        if not everything:
            return cls((), (), np.ones((1, 1), np.bool_))
        first = cells[0] if cells else Cells.of_picture(np.ones(_coarse(width, height), np.bool_), width, height)
        joined = first.keep.copy()
        for part in everything[bool(cells) :]:
            joined &= part.touches(first.xs, first.ys)
        return cls((*cells, *blocks), tuple(regions), joined)

    @property
    def is_whole(self) -> bool:
        """Whether everything is analysed."""
        return not self.masks and not self.regions

    def tiles(self, grid: TileGrid) -> NDArray[np.bool_]:
        """Return (rows, columns) bool: the tiles whose write box touches the area."""
        return Cells.of_picture(self.mask, grid.width, grid.height).touches(*tile_spans(grid))

    def leave_out(self, box: Box, labels: NDArray[np.uint8], scores: NDArray[np.uint16] | None = None) -> None:
        """Set what lies outside of the area to `NOT_ANALYSED`, and its scores to 0.

        Parameters
        ----------
        box
            The pixels, in the view.
        labels, scores
            (H, W) and (H, W, K); they are changed.
        """
        for mask in self.masks:
            for part in mask.left_out(box):
                labels[part] = NOT_ANALYSED
                if scores is not None:
                    scores[part] = 0
        for region in self.regions:
            outside = ~region.inside(box)
            labels[outside] = NOT_ANALYSED
            if scores is not None:
                scores[outside] = 0


def missing_blocks(view: SlideView) -> NDArray[np.bool_] | None:
    """Return (rows, columns) bool: the blocks of a view's level that the file does not hold; None if it holds all."""
    # Readers of other packages may be older than the attribute.
    missing = getattr(view.slide, "missing", None) or ()
    return missing[view.level] if view.level < len(missing) else None


def _blocks(view: SlideView) -> list[Cells]:
    """Return which blocks of the view's level the file holds; nothing where it holds all."""
    absent = missing_blocks(view)
    if absent is None or not absent.any():
        return []
    return [Cells.of_blocks(~absent, view.slide.block_px[view.level], view.scale, view.width, view.height)]


def _coarse(width: int, height: int) -> tuple[int, int]:
    scale = max(1.0, max(width, height) / COARSE_PX)
    return max(1, round(height / scale)), max(1, round(width / scale))

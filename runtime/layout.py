"""Where a slide is read and which tiles are run: level, tissue, region of interest, overlap."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.crf.params import CrfError
from histostream.runtime.options import Options
from histostream.runtime.stream.blend import aligned_overlap_px, check_blend, exact_overlap_px
from histostream.wsi.errors import SlideError
from histostream.wsi.outputs.sinks.overview import overview_size
from histostream.wsi.slides.channels import open_for_channels, takes_colors
from histostream.wsi.slides.coordinates import origin_px
from histostream.wsi.slides.damage import Damage, Undamaged
from histostream.wsi.slides.reader import SlideReader
from histostream.wsi.slides.resolution import SlideView, at_mpp, thumbnail
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.tissue import RegionOfInterest, find_tissue, read_roi

DEFAULT_OVERLAP_PX = 64
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SlideLayout:
    """A slide at the model's resolution, and the tiles that are run.

    Attributes
    ----------
    view
        The slide.
    grid
        Its tiles; those on glass or outside the region are left out.
    roi
        The region of interest, if the options have one.
    overview
        (h, w, C) uint8, the slide at the size of ``overview.png``.
    """

    view: SlideView
    grid: TileGrid
    roi: RegionOfInterest | None
    overview: NDArray[np.uint8]


def open_for_model(path: Path, card: ModelCard, options: Options) -> SlideReader:
    """Open a slide with the channels that a model takes, or that the options pick for it.

    Raises
    ------
    SlideError
        If it cannot be opened, or does not have these channels.
    """
    return open_for_channels(path, card.channels, card.channel_names, options.channels)


def lay_out(slide: SlideReader, card: ModelCard, options: Options, damage: Damage | None = None) -> SlideLayout:
    """Choose the level of a slide that is read, and the tiles that are run.

    Parameters
    ----------
    slide
        The open slide.
    card, options
        The model, and how to run it.
    damage
        Undecodable blocks of the overview are added to it, and are grey; None: they are errors.

    Raises
    ------
    BlendError
        If the overlap or the blending does not fit the model.
    SlideError
        If the slide cannot be read or has no resolution, or the region of interest holds no tissue.
    CrfError
        If a CRF is requested for a model of other channels than RGB or grey.
    """
    if options.crf is not None and not takes_colors(card.channels):
        taken = ", ".join(card.channel_names) or f"{card.channels} channels"
        raise CrfError(f"--crf compares colours, and this model takes {taken}; leave --crf out")
    view = at_mpp(slide, card.mpp, slide_mpp=options.mpp, force=options.force_upsampling)
    readable = view if damage is None else replace(view, slide=Undamaged(slide, damage))
    overview = thumbnail(readable, max(overview_size(view.width, view.height)))
    grid, roi = plan_grid(view, card, options, overview)
    return SlideLayout(view, grid, roi, overview)


def plan_grid(
    view: SlideView,
    card: ModelCard,
    options: Options,
    picture: NDArray[np.uint8] | None = None,
) -> tuple[TileGrid, RegionOfInterest | None]:
    """Lay tiles over a slide and choose those to run.

    Parameters
    ----------
    view
        The slide at the model's resolution.
    card, options
        The model, and how to run it.
    picture
        An overview (H, W, C) of the slide, to find tissue in; None: it is read from the slide.

    Returns
    -------
    The grid, and the region of interest where one was given.

    Raises
    ------
    BlendError
        If the overlap or the blending does not fit the model.
    SlideError
        If there is no tissue in the region of interest.
    """
    grid = lay_tiles(view.width, view.height, card, options)
    origin = origin_px(view.bounds, options.coordinates)
    roi = None if options.roi is None else read_roi(options.roi, view, origin)
    keep = None if roi is None else roi.tiles(grid)
    if options.tissue and takes_colors(card.channels):  # tissue is found by its colour
        tissue = find_tissue(view, preview=picture).tiles(grid)
        keep = tissue if keep is None else keep & tissue
    if keep is None:
        return grid, roi
    if roi is not None and not keep.any():
        raise SlideError(
            f"{options.roi}: no tissue inside the region of interest; "
            "check the polygons, or pass --no-tissue to analyse glass too"
        )
    if not keep.any():
        log.warning(
            "%s: no tissue found, nothing is analysed; pass --no-tissue to analyse glass too",
            view.slide.path,
        )
    return grid.where(keep), roi


def lay_tiles(width: int, height: int, card: ModelCard, options: Options) -> TileGrid:
    """Cover an image with tiles.

    Raises
    ------
    BlendError
        If the overlap or the blending does not fit the model.
    """
    blend, overlap_px = options.for_model(card).blend, _overlap_px(card, options)
    check_blend(blend, card, overlap_px)
    return TileGrid.cover(width, height, tile_px=card.tile_px, overlap_px=overlap_px, align_px=card.align_px)


def _overlap_px(card: ModelCard, options: Options) -> int:
    """Return the overlap that is asked for, or the default one, as the tiles can have it.

    Tiles begin at multiples of the alignment. So an overlap is rounded up, or down where it would then be too much.
    """
    exact = options.for_model(card).blend == "exact" and not card.tile_statistics
    wanted = options.overlap_px
    if wanted is None:
        if exact:
            return exact_overlap_px(card)
        wanted = max(min(DEFAULT_OVERLAP_PX, card.tile_px // 4), 2 * card.border_px)
    most = card.tile_px - 1 if exact or card.border_px else card.tile_px // 2
    rounded = aligned_overlap_px(card, wanted)
    if wanted > most:
        return wanted  # `check_blend` says what is possible
    return rounded if rounded <= most or rounded < card.align_px else rounded - card.align_px

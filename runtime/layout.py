"""Where a slide is read and what of it is analysed: level, tissue, region of interest, mask, tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.crf.params import CrfError
from histostream.runtime.options import OptionError, Options
from histostream.runtime.record import AreaRecord
from histostream.runtime.stream.blend import aligned_overlap_px, check_blend, exact_overlap_px
from histostream.wsi.errors import SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.outputs.sinks.overview import Mark, overview_size
from histostream.wsi.slides.channels import open_for_channels, takes_colors
from histostream.wsi.slides.coordinates import origin_px
from histostream.wsi.slides.damage import Damage, Undamaged
from histostream.wsi.slides.reader import SlideReader
from histostream.wsi.slides.resolution import SlideView, at_mpp, thumbnail
from histostream.wsi.tiling.area import AnalysedArea, missing_blocks
from histostream.wsi.tiling.artefacts import Artefacts, find_artefacts
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.polygons import RegionOfInterest, read_roi
from histostream.wsi.tiling.tissue import TissueMask, find_tissue, mask_px, reduced
from histostream.wsi.tiling.user_mask import UserMask, read_mask

DEFAULT_OVERLAP_PX = 64
HATCHED = (("pen ink", (255, 128, 0)), ("out of focus", (0, 160, 160)))  # artefacts on the overview, and their colours


@dataclass(frozen=True, slots=True)
class SlideLayout:
    """A slide at the model's resolution, and the tiles that are run.

    Attributes
    ----------
    view
        The slide.
    grid
        Its tiles; those that do not touch the analysed area are left out.
    area
        What is analysed.
    tissue, artefacts
        The tissue, and what of it is left out; None where they were not looked for.
    overview
        (h, w, C) uint8, the slide at the size of ``overview.png``.
    """

    view: SlideView
    grid: TileGrid
    area: AnalysedArea
    tissue: TissueMask | None
    artefacts: Artefacts | None
    overview: NDArray[np.uint8]

    def record(self, slide_mm2: float) -> AreaRecord:
        """Return what run.json records of the area; ``slide_mm2`` is that of the slide."""
        view, tissue, artefacts = self.view, self.tissue, self.artefacts

        def mm2(mask: NDArray[np.bool_] | None) -> float | None:
            return None if mask is None else round(float(mask.mean()) * slide_mm2, 6)

        absent = mm2(missing_blocks(view))
        if tissue is None:
            return AreaRecord(absent_mm2=absent)
        return AreaRecord(
            round(tissue.mpp, 4),
            round(tissue.margin_px * tissue.mpp, 2),
            mm2(tissue.mask),
            mm2(tissue.unscanned),
            absent,
            None if artefacts is None else mm2(artefacts.pen),
            None if artefacts is None else mm2(artefacts.blurred),
        )

    def marks(self) -> list[Mark]:
        """Return what is marked on ``overview.png``: the analysed area, and the artefacts that are left out."""
        marks = [] if self.area.is_whole else [Mark("analysed area", self.area.mask)]
        masks = [] if self.artefacts is None else self.artefacts.masks
        marks += [Mark(f"{name}: left out", mask, color) for (name, color), mask in zip(HATCHED, masks, strict=False)]
        return marks


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
        If the slide cannot be read or has no resolution, or a region or mask leaves no tissue.
    OptionError
        If artefacts are to be found for such a model.
    CrfError
        If a CRF is requested for a model of other channels than RGB or grey.
    """
    if options.crf is not None and not takes_colors(card.channels):
        taken = ", ".join(card.channel_names) or f"{card.channels} channels"
        raise CrfError(f"--crf compares colours, and this model takes {taken}; leave --crf out")
    view = at_mpp(slide, card.mpp, slide_mpp=options.mpp, force=options.force_upsampling)
    grid = lay_tiles(view.width, view.height, card, options)
    looks_for_tissue = options.tissue and takes_colors(card.channels)  # tissue is found by its colour
    if options.artefacts and not looks_for_tissue:
        raise OptionError("--artefacts judges colours, and this model takes other channels; leave --artefacts out")
    regions, masks = _given(view, options)  # bad ones are refused before the slide is read
    readable = view if damage is None else replace(view, slide=Undamaged(slide, damage))
    overview_px = max(overview_size(view.width, view.height))
    picture = thumbnail(readable, max(overview_px, mask_px(view)) if looks_for_tissue else overview_px)
    tissue = find_tissue(view, preview=picture, damaged=_damaged(damage)) if looks_for_tissue else None
    artefacts = find_artefacts(readable, picture, tissue) if tissue is not None and options.artefacts else None
    if tissue is not None:
        left_out = [] if artefacts is None else artefacts.masks
        masks = [tissue.mask, *(~mask for mask in left_out), *masks]
    area = AnalysedArea.of(view, masks, regions)
    if not area.mask.any():
        _refuse_empty(options, looks_for_tissue)
    grid = grid if area.is_whole else grid.where(area.tiles(grid))
    return SlideLayout(view, grid, area, tissue, artefacts, reduced(view, overview_px, picture))


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


def _given(view: SlideView, options: Options) -> tuple[list[RegionOfInterest], list[NDArray[np.bool_]]]:
    """Read the region of interest and the mask that the options name."""
    origin = origin_px(view.bounds, options.coordinates)
    mask = UserMask() if options.mask is None else read_mask(options.mask, view, origin)
    roi = [] if options.roi is None else [read_roi(options.roi, view, origin)]
    return [*roi, *mask.regions], list(mask.masks)


def _damaged(damage: Damage | None) -> list[Box]:
    """Return the damaged blocks of the overview as boxes of level 0."""
    entries = [] if damage is None else damage.record()
    return [Box(entry["x"], entry["y"], entry["width"], entry["height"]) for entry in entries]


def _refuse_empty(options: Options, looks_for_tissue: bool) -> None:
    """Raise SlideError if a region or mask of the user leaves nothing to analyse."""
    given = [path for path in (options.roi, options.mask) if path is not None]
    if not given:
        return
    where = "inside the region of interest" if given == [options.roi] else "in what is to be analysed"
    if looks_for_tissue:
        raise SlideError(
            f"{given[-1]}: no tissue {where}; check that it belongs to the slide, or pass --no-tissue to analyse "
            "glass too"
        )
    raise SlideError(f"{given[-1]}: nothing of the slide lies {where}; check that it belongs to the slide")


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

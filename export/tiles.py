"""The tiles that an export is calibrated and judged on: real ones where the user has them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.engines.base import to_channels
from histostream.training.data import DataError
from histostream.training.datasets.folder import read_folder
from histostream.training.image_files import read_image
from histostream.wsi.errors import HistoError, SlideError
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.synthetic import CLASSES, SyntheticSlide
from histostream.wsi.tiling.grid import Strip, TileGrid
from histostream.wsi.tiling.strips import cut
from histostream.wsi.tiling.tissue import find_tissue

CANDIDATES = 4  # tiles looked at for each tile taken, so that dark and pale ones are among them
PLAIN_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
GLASS_STD = 10.0  # grey values; below it a tile of the synthetic slide has no tissue
DEMO_PX = 4096  # side of the synthetic slide

Pixels = NDArray[np.uint8]
log = logging.getLogger(__name__)


class TilesError(HistoError, ValueError):
    """No tile can be had from what was named for calibration."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles for one export; those it is judged on are not those it is calibrated on.

    Attributes
    ----------
    source
        Where they come from, for the card.
    gate
        (N, H, W, C) uint8, to compare on.
    calibration
        (M, H, W, C) uint8, to find the ranges of activations on.
    truth
        (N, H, W) uint8, the true class of each pixel of ``gate``, where it is known.
    """

    source: str
    gate: Pixels
    calibration: Pixels
    truth: Pixels | None


@dataclass(frozen=True, slots=True)
class _Cut:
    pixels: Pixels
    truth: Pixels | None


def collect_tiles(
    source: Path | None,
    *,
    tile_px: int,
    channels: int,
    mpp: float,
    classes: tuple[str, ...],
    count: int,
) -> Tiles:
    """Cut ``count`` tiles to judge on and as many to calibrate on.

    From the darkest to the palest of a larger sample, in turn for either use: INT8 ranges and
    iMEMS's thin margins are decided in the dark.

    Parameters
    ----------
    source
        A slide; a folder of slides and images, which are taken to be at the model's resolution
        where they do not say otherwise; a folder with ``images/`` and ``labels/`` as for
        histo-train, whose labels then serve as truth; None takes the synthetic demo slide.
    tile_px, channels, mpp
        What the network takes.
    classes
        Names of its classes; the truth of the demo slide is used where they are its classes.
    count
        Tiles for either use; a small source gives fewer.

    Raises
    ------
    TilesError
        If the source has no tile.
    SlideError, DataError
        If a file of it cannot be read.
    """
    if source is None:
        pool = list(_demo_tiles(tile_px, mpp, 2 * count, classes))
        name = "synthetic slide"
    elif (source / "images").is_dir():
        pool, name = list(_labelled_tiles(source, tile_px, count)), source.name
    elif source.is_dir():
        pool, name = list(_folder_tiles(source, tile_px, mpp, count)), source.name
    else:
        pool, name = list(_slide_tiles(source, tile_px, mpp, 2 * count)), source.name
    if not pool:
        raise TilesError(f"{source}: no tile in it; name a slide, or a folder of slides or images")
    pool.sort(key=lambda tile: float(tile.pixels.mean()))
    chosen = [pool[i] for i in _spread(len(pool), 2 * count)]
    gate, calibration = chosen[1::2] or chosen, chosen[::2]
    truths = [tile.truth for tile in gate if tile.truth is not None]
    return Tiles(
        source=name,
        gate=np.stack([to_channels(tile.pixels, channels) for tile in gate]),
        calibration=np.stack([to_channels(tile.pixels, channels) for tile in calibration]),
        truth=np.stack(truths) if len(truths) == len(gate) else None,
    )


def _demo_tiles(tile_px: int, mpp: float, count: int, classes: tuple[str, ...]) -> Iterator[_Cut]:
    """Tiles on a lattice over the synthetic slide, bare glass left out."""
    side = max(DEMO_PX, 2 * tile_px)
    slide = SyntheticSlide(side, side, mpp=min(max(mpp, 0.1), 4), seed=0)
    known = classes == tuple(c.name for c in CLASSES)
    lattice = int(np.ceil(np.sqrt(CANDIDATES * count)))
    starts = np.linspace(0, side - tile_px, lattice + 2).astype(int)[1:-1]
    for y, x in product(starts, starts):
        pixels, truth = slide.region(int(x), int(y), tile_px, tile_px)
        if pixels.std() > GLASS_STD:
            yield _Cut(pixels, truth if known else None)


def _slide_tiles(path: Path, tile_px: int, mpp: float, count: int) -> Iterator[_Cut]:
    """Tissue tiles of a slide, evenly spread over it; all of an image without resolution."""
    if path.suffix.lower() in PLAIN_SUFFIXES:
        yield from (_Cut(pixels, None) for pixels in _mirrored_tiles(read_image(path), tile_px))
        return
    with open_slide(path) as slide:
        plain = slide.mpp is None and path.suffix.lower() in (".tif", ".tiff")
        view = at_mpp(slide, mpp, slide_mpp=mpp if plain else None)
        if view.width < tile_px or view.height < tile_px:
            pixels = view.read(0, 0, view.width, view.height)
            yield from (_Cut(p, None) for p in _mirrored_tiles(pixels, tile_px))
            return
        grid = TileGrid.cover(view.width, view.height, tile_px=tile_px, overlap_px=0, align_px=1)
        tissue = grid.where(find_tissue(view).tiles(grid))
        tiles = list(tissue) or list(grid)
        for i in _spread(len(tiles), CANDIDATES * count):
            box = tiles[i].read
            yield _Cut(view.read(box.x, box.y, box.width, box.height), None)


def _folder_tiles(folder: Path, tile_px: int, mpp: float, count: int) -> Iterator[_Cut]:
    """Tiles of every slide and image in a folder; what is neither is passed over."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    share = -(-2 * count // max(len(files), 1))
    for i in _spread(len(files), CANDIDATES * count):
        try:
            yield from _slide_tiles(files[i], tile_px, mpp, share)
        except (SlideError, DataError) as error:
            log.warning("passed over: %s", error)


def _labelled_tiles(folder: Path, tile_px: int, count: int) -> Iterator[_Cut]:
    samples = read_folder(folder)
    for i in _spread(len(samples), CANDIDATES * count):
        pixels = _mirrored_tiles(samples[i].image, tile_px)
        truths = _mirrored_tiles(samples[i].labels[..., None], tile_px)
        for tile, truth in zip(pixels, truths, strict=True):
            yield _Cut(tile, truth[..., 0])


def _mirrored_tiles(pixels: Pixels, tile_px: int) -> list[Pixels]:
    """Cover a whole image with tiles; what sticks out is mirrored."""
    height, width = pixels.shape[:2]
    grid = TileGrid.cover(width, height, tile_px=tile_px, overlap_px=0, align_px=1)
    whole = Strip(0, 0, pixels)
    return [cut(whole, tile, width=width, height=height) for tile in grid]


def _spread(available: int, wanted: int) -> list[int]:
    """At most ``wanted`` indices, evenly spread."""
    if available <= wanted:
        return list(range(available))
    return [int(i) for i in np.linspace(0, available - 1, wanted)]

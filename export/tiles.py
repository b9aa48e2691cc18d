"""Collect the tiles that an export is calibrated and checked on: the user's own, or synthetic ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.engines.base import to_channels
from histostream.training.data import DataError
from histostream.training.datasets.folder import read_folder
from histostream.training.image_files import read_image
from histostream.wsi.errors import HistoError, SlideError
from histostream.wsi.slides.channels import open_for_channels, takes_colors
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.synthetic import CLASSES, SyntheticSlide
from histostream.wsi.tiling.grid import Strip, TileGrid
from histostream.wsi.tiling.strips import cut
from histostream.wsi.tiling.tissue import find_tissue

CANDIDATES = 4  # tiles read for each tile used, so that there are dark and pale ones to choose from
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MIN_TISSUE_STD = 10.0  # grey values; a tile of the synthetic slide with less has no tissue
DEMO_PX = 4096  # side of the synthetic slide

Pixels = NDArray[np.uint8]
log = logging.getLogger(__name__)


class TilesError(HistoError, ValueError):
    """The source for calibration has no tile."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles for one export; parity is checked on other tiles than those for calibration.

    Attributes
    ----------
    source
        Where the tiles come from, for the card.
    gate
        Tiles to check parity on, (N, H, W, C) uint8.
    calibration
        Tiles to find the ranges of activations on, (M, H, W, C) uint8.
    truth
        True class of each pixel of ``gate``, (N, H, W) uint8; None if it is not known.
    """

    source: str
    gate: Pixels
    calibration: Pixels
    truth: Pixels | None


@dataclass(frozen=True, slots=True)
class _LabelledTile:
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
    """Cut ``count`` tiles to check parity on and as many to calibrate on.

    A larger sample is sorted from dark to pale, and tiles spread over it go to either use in turn, because INT8 ranges
    and the thin margins of iMEMS are decided in dark tiles.

    Parameters
    ----------
    source
        A slide; a folder of slides and images, which are assumed to have the model's resolution if they do not state
        one; a folder with ``images/`` and ``labels/`` as for histo-train, whose labels are the truth; None: the
        synthetic slide.
    tile_px, channels, mpp
        Input of the network.
    classes
        Names of its classes; the truth of the synthetic slide is used if these are its classes.
    count
        Number of tiles for either use; a small source gives fewer.

    Raises
    ------
    TilesError
        If the source has no tile.
    SlideError, DataError
        If a file of the source cannot be read.
    """
    if source is None:
        pool = list(_demo_tiles(tile_px, mpp, 2 * count, classes))
        if not takes_colors(channels):  # its colours in turn
            pool = [replace(t, pixels=t.pixels[..., np.arange(channels) % t.pixels.shape[-1]]) for t in pool]
        name = "synthetic slide"
    elif (source / "images").is_dir():
        pool, name = list(_labelled_tiles(source, tile_px, count)), source.name
    elif source.is_dir():
        pool, name = list(_folder_tiles(source, tile_px, channels, mpp, count)), source.name
    else:
        pool, name = list(_slide_tiles(source, tile_px, channels, mpp, 2 * count)), source.name
    if not pool:
        raise TilesError(f"{source}: has no tile; pass a slide, or a folder of slides or images")
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


def _demo_tiles(tile_px: int, mpp: float, count: int, classes: tuple[str, ...]) -> Iterator[_LabelledTile]:
    """Yield tiles with tissue, on a lattice over the synthetic slide."""
    side = max(DEMO_PX, 2 * tile_px)
    slide = SyntheticSlide(side, side, mpp=min(max(mpp, 0.1), 4), seed=0)
    known = classes == tuple(c.name for c in CLASSES)
    lattice = int(np.ceil(np.sqrt(CANDIDATES * count)))
    starts = np.linspace(0, side - tile_px, lattice + 2).astype(int)[1:-1]
    for y, x in product(starts, starts):
        pixels, truth = slide.region(int(x), int(y), tile_px, tile_px)
        if pixels.std() > MIN_TISSUE_STD:
            yield _LabelledTile(pixels, truth if known else None)


def _slide_tiles(path: Path, tile_px: int, channels: int, mpp: float, count: int) -> Iterator[_LabelledTile]:
    """Yield tissue tiles of a slide, evenly spread over it, or all tiles of an image without resolution."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        yield from (_LabelledTile(pixels, None) for pixels in _mirrored_tiles(read_image(path), tile_px))
        return
    with open_for_channels(path, channels) as slide:
        is_image = slide.mpp is None and path.suffix.lower() in (".tif", ".tiff")
        view = at_mpp(slide, mpp, slide_mpp=mpp if is_image else None)
        if view.width < tile_px or view.height < tile_px:
            pixels = view.read(0, 0, view.width, view.height)
            yield from (_LabelledTile(p, None) for p in _mirrored_tiles(pixels, tile_px))
            return
        grid = TileGrid.cover(view.width, view.height, tile_px=tile_px, overlap_px=0, align_px=1)
        tissue = grid.where(find_tissue(view).tiles(grid)) if takes_colors(channels) else ()
        tiles = list(tissue) or list(grid)
        for i in _spread(len(tiles), CANDIDATES * count):
            box = tiles[i].read
            yield _LabelledTile(view.read(box.x, box.y, box.width, box.height), None)


def _folder_tiles(folder: Path, tile_px: int, channels: int, mpp: float, count: int) -> Iterator[_LabelledTile]:
    """Yield tiles of every slide and image in a folder; other files are skipped with a warning."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    share = -(-2 * count // max(len(files), 1))
    for i in _spread(len(files), CANDIDATES * count):
        try:
            yield from _slide_tiles(files[i], tile_px, channels, mpp, share)
        except (SlideError, DataError) as error:
            log.warning("skipped: %s", error)


def _labelled_tiles(folder: Path, tile_px: int, count: int) -> Iterator[_LabelledTile]:
    samples = read_folder(folder)
    for i in _spread(len(samples), CANDIDATES * count):
        pixels = _mirrored_tiles(samples[i].image, tile_px)
        truths = _mirrored_tiles(samples[i].labels[..., None], tile_px)
        for tile, truth in zip(pixels, truths, strict=True):
            yield _LabelledTile(tile, truth[..., 0])


def _mirrored_tiles(pixels: Pixels, tile_px: int) -> list[Pixels]:
    """Cover an image with tiles; the image is mirrored beyond its border."""
    height, width = pixels.shape[:2]
    grid = TileGrid.cover(width, height, tile_px=tile_px, overlap_px=0, align_px=1)
    strip = Strip(0, 0, pixels)
    return [cut(strip, tile, width=width, height=height) for tile in grid]


def _spread(available: int, wanted: int) -> list[int]:
    """Return at most ``wanted`` indices below ``available``, evenly spread."""
    if available <= wanted:
        return list(range(available))
    return [int(i) for i in np.linspace(0, available - 1, wanted)]

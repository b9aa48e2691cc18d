"""Make a synthetic H&E slide of any size with known nuclei.

Everything depends on the position and the seed alone: noise on hashed lattices makes tissue, stroma and
glands, and each cell of a coarse grid may hold one nucleus. The slide is made in fixed blocks, so that
the pixels of a region do not depend on how it was cut.

    python -m histostream.wsi.synthetic OUT.tif --size 4096x4096 --labels LABELS.tif

The same seed gives the same nuclei on every machine; pixels may differ by one grey value, since matrix
products are rounded differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import HistoError
from histostream.wsi.files import writing
from histostream.wsi.geometry import Box
from histostream.wsi.outputs.label_rows import ClassInfo, SlideInfo
from histostream.wsi.outputs.pyramid import PyramidLayout, PyramidWriter, deflate_codec, jpeg_codec, mean
from histostream.wsi.outputs.sinks.tiff import label_pyramid
from histostream.wsi.slides.reader import read_from_blocks

Pixels = NDArray[np.uint8]
Field = NDArray[np.float32]

CLASSES = (ClassInfo("background", (255, 255, 255)), ClassInfo("nucleus", (60, 40, 170)))
BLOCK_PX = 512  # the slide is made in blocks of this
PIECE_PX = 64  # noise is made in pieces of this
CELL_UM = 7.5  # at most one nucleus in each square of this: 17 800 per mm2 where crowded
MAX_UM = 11.0  # nuclei are 6 to 11 um long

# Optical density per unit of stain, in R, G, B; fitted by eye to CMU-1-Small-Region.svs.
HEMATOXYLIN = np.array([0.84, 1.02, 0.56], np.float32)
EOSIN = np.array([0.13, 0.80, 0.38], np.float32)
GLASS = np.array([243.0, 243.0, 242.0], np.float32)


@dataclass(frozen=True, slots=True)
class SyntheticSlide:
    """An H&E-like slide.

    Attributes
    ----------
    width, height
        Pixels.
    mpp
        Side of a pixel, in um; 0.5 is 20x.
    seed
        Another seed is another slide.
    """

    width: int
    height: int
    mpp: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"{self.width} x {self.height} px has no pixels")
        if not 0.1 <= self.mpp <= 4:
            raise ValueError(f"mpp={self.mpp!r}: nuclei can be drawn at 0.1 to 4 um per pixel")

    def region(self, x: int, y: int, w: int, h: int) -> tuple[Pixels, Pixels]:
        """Return pixels (h, w, 3) and labels (h, w), both uint8; 0 is background and 1 nucleus."""
        if w < 1 or h < 1 or x < 0 or y < 0 or x + w > self.width or y + h > self.height:
            raise ValueError(f"region x={x} y={y} {w} x {h} does not lie in {self.width} x {self.height} px")
        both = read_from_blocks(Box(x, y, w, h), (BLOCK_PX, BLOCK_PX), 4, lambda row, column: _block(self, column, row))
        return np.ascontiguousarray(both[..., :3]), np.ascontiguousarray(both[..., 3])

    def is_tissue(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether points, (n,) each in pixels, lie in tissue."""
        layer = _tissue_layer(self)
        return _sample_at(layer, self.seed, x * self.mpp, y * self.mpp) > TISSUE_LEVEL

    def nuclei(self, x: int, y: int, w: int, h: int) -> NDArray[np.float64]:
        """Return the nuclei whose centre lies in a box.

        Returns
        -------
        (n, 5) float64: centre x, centre y, long axis, short axis (full lengths in px), and angle of
        the long axis in radians from x to y. Pixel i lies between i and i + 1.
        """
        nuclei = _nuclei(self, x, y, w, h)
        return np.stack([nuclei[name] for name in ("x", "y", "major", "minor", "angle")], axis=1)

    def write(
        self,
        path: Path,
        *,
        tile_px: int = 256,
        quality: int = 85,
        pyramid: bool = True,
        compression: str = "jpeg",
        labels: Path | None = None,
    ) -> None:
        """Write the slide as a tiled BigTIFF, in memory that does not grow with its size.

        Parameters
        ----------
        tile_px
            Side of the file's tiles; a divisor or multiple of 512 is fastest.
        quality
            JPEG quality, 1 to 100.
        pyramid
            Whether to add the reduced levels.
        compression
            "jpeg", or "deflate" for pixels that equal `region`.
        labels
            File of the label map, always with its pyramid; None writes none.
        """
        if compression not in {"jpeg", "deflate"}:
            raise ValueError(f"compression {compression!r}: use 'jpeg' or 'deflate'")
        jpeg = compression == "jpeg"
        codec = jpeg_codec(quality) if jpeg else deflate_codec({"photometric": "rgb"})
        smallest_px = tile_px if pyramid else max(self.width, self.height)
        description = f"synthetic H&E, seed {self.seed}, {self.mpp} um per pixel"
        layout = PyramidLayout(self.width, self.height, 3, self.mpp, mean, tile_px, smallest_px, description)
        with ExitStack() as cleanup:
            slide_file = PyramidWriter(path, layout, codec)
            cleanup.callback(slide_file.abort)
            files = [slide_file]
            if labels is not None:
                info = SlideInfo(path.stem, self.width, self.height, self.mpp, CLASSES)
                files.append(label_pyramid(labels, info, tile_px))
                cleanup.callback(files[-1].abort)
            self._fill(files, tile_px)
            for temporary, final in [file.finish() for file in files]:
                with writing(final):
                    temporary.replace(final)

    def _fill(self, files: Sequence[PyramidWriter], tile_px: int) -> None:
        side = max(tile_px, BLOCK_PX // tile_px * tile_px)
        for y, x in product(range(0, self.height, side), range(0, self.width, side)):
            w, h = min(side, self.width - x), min(side, self.height - y)
            parts = self.region(x, y, w, h)
            for top, left in product(range(0, h, tile_px), range(0, w, tile_px)):
                for file, part in zip(files, parts, strict=False):
                    tile = part[top : top + tile_px, left : left + tile_px]
                    file.put((y + top) // tile_px, (x + left) // tile_px, tile)


# ----------------------------------------------------------------------------- tissue


@dataclass(frozen=True, slots=True)
class _Layer:
    """A sum of smooth noises: the size of their features in um, and their weights."""

    scales: tuple[float, ...]
    weights: tuple[float, ...]
    salt: int


_DENSITY = _Layer((180.0, 60.0), (1.0, 0.6), 11)  # of nuclei
_GLAND = _Layer((260.0, 110.0, 45.0, 14.0), (1.0, 0.55, 0.2, 0.05), 23)
_FLOW = _Layer((420.0, 130.0, 45.0, 16.0), (30.0, 9.0, 2.2, 0.6), 37)  # phase of the fibres, in turns
_FIBRE = _Layer((40.0, 9.0, 3.2), (0.6, 0.7, 0.45), 41)  # strength of the fibres
_GRAIN = _Layer((2.6, 1.3), (0.8, 0.7), 53)
_WOBBLE = _Layer((4.5,), (1.0,), 59)  # of the outlines of nuclei
_LIGHT = _Layer((2500.0,), (1.0,), 67)


def _tissue_layer(slide: SyntheticSlide) -> _Layer:
    """Return the layer of tissue: islands a third of the slide's short side, up to 3 mm, with rough borders."""
    largest = min(max(min(slide.width, slide.height) * slide.mpp / 3, 150.0), 3000.0)
    scales, weights = [largest], [1.0]
    while scales[-1] > 12:
        scales.append(scales[-1] / 2.1)
        weights.append(weights[-1] * 0.52)
    return _Layer(tuple(scales), tuple(weights), 5)


TISSUE_LEVEL = -0.02  # of the tissue layer: about 45 % of the slide lies above it and is tissue
EPITHELIUM_LEVEL, LUMEN_LEVEL = 0.22, 0.85  # of the gland layer


# The cache (1 MiB a block) saves much time if regions are not cut along blocks.
@lru_cache(maxsize=32)
def _block(slide: SyntheticSlide, column: int, row: int) -> Pixels:
    """Return one block, (512, 512, 4): red, green, blue and label."""
    window = _Window(slide.seed, column * BLOCK_PX, row * BLOCK_PX, BLOCK_PX, slide.mpp)
    light = 1.0 + 0.008 * window.sample(_LIGHT)
    tissue = window.sample(_tissue_layer(slide)) - TISSUE_LEVEL
    if tissue.max() < 0:
        block = np.zeros((*light.shape, 4), np.uint8)
        for channel in range(3):
            block[..., channel] = light * GLASS[channel] + np.float32(0.5)
        return block
    present = _smoothstep(tissue, 0.0, 0.03)
    hematoxylin, eosin, space = _stains(window)
    grain = window.sample(_GRAIN)
    nuclei, cover = _draw_nuclei(slide, window)
    body = (1 - space) * present
    nuclear = nuclei * (1 + 0.22 * grain)
    hematoxylin = np.maximum((hematoxylin * (1 + 0.18 * grain)) * body, nuclear)
    eosin = eosin * (1 + 0.10 * grain) * np.maximum(body, 0.6 * cover) * (1 - 0.45 * cover)
    return np.dstack([_photograph(window, hematoxylin, eosin, light, present), cover >= 0.5])


def _stains(window: _Window) -> tuple[Field, Field, Field]:
    """Return hematoxylin and eosin of the tissue between nuclei, and the share of gaps in it (0 to 1)."""
    gland, strength = window.sample(_GLAND), window.sample(_FIBRE)
    epithelium = _smoothstep(gland, EPITHELIUM_LEVEL, EPITHELIUM_LEVEL + 0.06)
    lumen = _smoothstep(gland, LUMEN_LEVEL, LUMEN_LEVEL + 0.03)
    wave: Field = np.cos(np.float32(2 * np.pi) * window.sample(_FLOW))
    fibre = 0.6 * wave + 0.8 * strength
    slit = _smoothstep(-fibre, 0.60, 1.30)
    stroma_eosin = 0.64 + 0.34 * fibre
    eosin = stroma_eosin + epithelium * (0.62 - stroma_eosin)
    hematoxylin = np.float32(0.06) + epithelium * (np.float32(0.34) + np.float32(0.07) * strength)
    # Loose tissue between bundles is pale, not empty.
    space: Field = np.maximum(lumen, 0.75 * slit * (1 - epithelium))
    return hematoxylin, np.maximum(eosin, np.float32(0.05)), space


def _photograph(window: _Window, hematoxylin: Field, eosin: Field, light: Field, present: Field) -> Pixels:
    """Return RGB by the Beer-Lambert law, with sensor noise; glass has none and compresses well."""
    noise = window.white_noise() * (2.2 * present)
    pixels = np.empty((*light.shape, 3), np.uint8)
    for channel in range(3):
        density = hematoxylin * -HEMATOXYLIN[channel] - eosin * EOSIN[channel]
        value = GLASS[channel] * light * np.exp(density) + noise
        pixels[..., channel] = np.clip(value + 0.5, 0, 255)
    return pixels


# ----------------------------------------------------------------------------- nuclei


_NUCLEUS = ("x", "y", "major", "minor", "angle", "stain", "rim")


def _nuclei(slide: SyntheticSlide, x: int, y: int, w: int, h: int) -> NDArray[np.void]:
    """Return the nuclei centred in a box, in the order of their cells."""
    cell = CELL_UM / slide.mpp
    columns = np.arange(int(np.floor(x / cell)) - 1, int(np.floor((x + w) / cell)) + 2)
    rows = np.arange(int(np.floor(y / cell)) - 1, int(np.floor((y + h) / cell)) + 2)
    ix, iy = (grid.ravel() for grid in np.meshgrid(columns, rows))
    salt = slide.seed * 131 + 1009
    jitter_x, jitter_y = (_unit(_hash(ix, iy, salt + k)) - 0.5 for k in range(2))
    cx, cy = (ix + 0.5 + 0.7 * jitter_x) * cell, (iy + 0.5 + 0.7 * jitter_y) * cell
    inside = (cx >= x) & (cx < x + w) & (cy >= y) & (cy < y + h)
    # Without tissue there is no nucleus, which excludes most cells of a slide.
    at = np.flatnonzero(inside)
    tissue = _sample_at(_tissue_layer(slide), slide.seed, cx[at] * slide.mpp, cy[at] * slide.mpp)
    at = at[tissue > TISSUE_LEVEL + 0.05]
    chance = [_unit(_hash(ix[at], iy[at], salt + k)) for k in range(2, 8)]
    return _nuclei_at(slide, cx[at], cy[at], chance)


def _nuclei_at(
    slide: SyntheticSlide, cx: NDArray[np.float64], cy: NDArray[np.float64], chance: list[NDArray[np.float64]]
) -> NDArray[np.void]:
    """Choose which points in tissue have a nucleus, and its kind.

    Epithelial nuclei are large, oval and pale, immune cells small, round and dark, those of the
    stroma thin and along the fibres.
    """
    gland = _sample_at(_GLAND, slide.seed, cx * slide.mpp, cy * slide.mpp)
    crowd = _sample_at(_DENSITY, slide.seed, cx * slide.mpp, cy * slide.mpp)
    epithelial = gland > EPITHELIUM_LEVEL + 0.03
    immune = ~epithelial & (crowd > 0.85)
    odds = np.where(epithelial, 0.66, np.where(immune, 0.72, 0.13 + 0.12 * crowd))
    lives = (chance[0] < odds) & (gland < LUMEN_LEVEL - 0.03)
    cx, cy, epithelial, immune = cx[lives], cy[lives], epithelial[lives], immune[lives]
    length, ratio, turn, stain, rim = (values[lives] for values in chance[1:])

    nuclei = np.zeros(len(cx), [(name, np.float64) for name in _NUCLEUS])
    nuclei["x"], nuclei["y"] = cx, cy
    low, high = np.where(immune, 6.0, 6.5), np.where(immune, 7.5, MAX_UM)
    nuclei["major"] = (low + (high - low) * length) / slide.mpp
    thin = np.where(immune, 0.74, np.where(epithelial, 0.55, 0.26))
    nuclei["minor"] = nuclei["major"] * (thin + np.where(immune, 0.24, 0.22) * ratio)
    nuclei["angle"] = np.pi * turn
    stroma = np.flatnonzero(~epithelial & ~immune)
    along = _fibre_angle(slide, cx[stroma] * slide.mpp, cy[stroma] * slide.mpp)
    nuclei["angle"][stroma] = np.mod(along + 0.5 * (turn[stroma] - 0.5), np.pi)
    nuclei["stain"] = np.where(immune, 1.60, np.where(epithelial, 1.35, 1.60)) * (0.72 + 0.5 * stain)
    nuclei["rim"] = np.where(epithelial, 0.30, 0.15) * (0.5 + rim)
    return nuclei


def _fibre_angle(slide: SyntheticSlide, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the direction of the fibres, which is perpendicular to the slope of their phase."""
    step = 3.0
    here = _sample_at(_FLOW, slide.seed, x_um, y_um)
    along_x = _sample_at(_FLOW, slide.seed, x_um + step, y_um) - here
    along_y = _sample_at(_FLOW, slide.seed, x_um, y_um + step) - here
    return np.mod(np.arctan2(along_x, -along_y), np.pi)


def _draw_nuclei(slide: SyntheticSlide, window: _Window) -> tuple[Field, Field]:
    """Return hematoxylin of the nuclei, and the share of each pixel that a nucleus covers (0 to 1)."""
    margin = int(MAX_UM / slide.mpp / 2) + 4
    side = 2 * margin
    nuclei = _nuclei(slide, window.x - margin, window.y - margin, window.size + side, window.size + side)
    depth = np.full((window.size + 2 * side,) * 2, -9, np.float32)
    strength, rim = np.zeros_like(depth), np.zeros_like(depth)
    # Each nucleus is drawn in a square around the pixel of its centre.
    left, top = np.floor(nuclei["x"]).astype(int), np.floor(nuclei["y"]).astype(int)
    for group in np.array_split(np.arange(len(nuclei)), len(nuclei) // 128 + 1):
        depths = _depths(nuclei[group], left[group], top[group], margin)
        xs, ys = left[group] - window.x + margin, top[group] - window.y + margin
        for i, (x, y) in enumerate(zip(xs.tolist(), ys.tolist(), strict=True)):
            square = slice(y, y + side), slice(x, x + side)
            nearer = depths[i] > depth[square]
            np.copyto(depth[square], depths[i], where=nearer)
            np.copyto(strength[square], nuclei["stain"][group[i]], where=nearer, casting="same_kind")
            np.copyto(rim[square], nuclei["rim"][group[i]], where=nearer, casting="same_kind")
    inner = slice(side, side + window.size), slice(side, side + window.size)
    depth, strength, rim = depth[inner], strength[inner], rim[inner]
    # In um, so that nuclei look the same at every mpp.
    depth += np.float32(0.45 / slide.mpp) * window.sample(_WOBBLE)
    cover = np.clip(0.5 + depth * np.float32(0.6), 0, 1)
    ring = np.clip(1 - np.abs(depth * np.float32(2 * slide.mpp) - 1) * np.float32(0.6), 0, 1)
    return cover * strength * (1 + rim * (ring - np.float32(0.5))), cover


def _depths(nuclei: NDArray[np.void], left: NDArray[np.int64], top: NDArray[np.int64], margin: int) -> Field:
    """Return the depth below the border of n nuclei in px, negative outside; (n, side, side)."""
    grid = np.arange(-margin, margin, dtype=np.float32) + np.float32(0.5)
    dx = grid - (nuclei["x"] - left).astype(np.float32)[:, None]
    dy = grid - (nuclei["y"] - top).astype(np.float32)[:, None]
    cos, sin = (f(nuclei["angle"]).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    a, b = ((nuclei[name] / 2).astype(np.float32)[:, None] for name in ("major", "minor"))
    u = (dx * cos / a)[:, None, :] + (dy * sin / a)[:, :, None]
    v = (dx * -sin / b)[:, None, :] + (dy * cos / b)[:, :, None]
    radius = np.sqrt(u * u + v * v)
    # Along the radius, scaled by the mean of both axes, which is accurate near the border.
    depth: Field = (1 - radius) * (2 * a * b / (a + b))[:, :, None]
    return depth


# ----------------------------------------------------------------------------- noise


@dataclass(frozen=True)
class _Window:
    """A square of pixels that noise is sampled on; x and y are its top left pixel."""

    seed: int
    x: int
    y: int
    size: int
    mpp: float

    def sample(self, layer: _Layer) -> Field:
        """Return the layer at every pixel, (size, size) float32.

        Interpolation is separable: A L B with the lattice L of each scale, and the sum over all
        scales is one matrix product. It is made in pieces of `PIECE_PX`, on which few knots matter.
        They are too small for the threads of OpenBLAS, which wait for each other on a busy machine:
        the slide then takes four times as long.
        """
        left, right = [], []
        for k, (scale, weight) in enumerate(zip(layer.scales, layer.weights, strict=True)):
            rows, row_weights = self._spline(self.y, scale)
            columns, column_weights = self._spline(self.x, scale)
            lattice = _lattice(
                np.arange(columns[0, 0], columns[-1, -1] + 1)[None, :],
                np.arange(rows[0, 0], rows[-1, -1] + 1)[:, None],
                self.seed,
                layer.salt + k,
            )
            lattice = (weight * lattice).astype(np.float32)
            pieces = lattice[(rows - rows[0, 0])[:, None, :, None], (columns - columns[0, 0])[None, :, None, :]]
            left.append(row_weights[:, None] @ pieces)
            right.append(column_weights)
        knots_last = np.concatenate(right, axis=2).swapaxes(1, 2)
        field: Field = np.concatenate(left, axis=3) @ knots_last
        return field.swapaxes(1, 2).reshape(self.size, self.size)

    def white_noise(self) -> Field:
        """Return independent noise of variance about 1 for every pixel."""
        xs = np.arange(self.x, self.x + self.size)[None, :]
        ys = np.arange(self.y, self.y + self.size)[:, None]
        bits = _hash(xs, ys, self.seed * 131 + 7)
        total = (bits & 1023) + ((bits >> 10) & 1023) + (bits >> 22)
        noise: Field = (total.astype(np.float32) - np.float32(1534.5)) * np.float32(1 / 512)
        return noise

    def _spline(self, start: int, scale_um: float) -> tuple[NDArray[np.int64], Field]:
        """Return knots (pieces, n) and weights (pieces, PIECE_PX, n) of a cubic B-spline along one axis."""
        at = (np.arange(start, start + self.size) + 0.5) * (self.mpp / scale_um)
        at = at.reshape(-1, PIECE_PX)
        knot = np.floor(at).astype(np.int64)
        first = knot[:, :1]
        count = int((knot[:, -1:] - first).max()) + 4
        weights = np.zeros((*at.shape, count), np.float32)
        index = (knot - first)[..., None] + np.arange(4)
        np.put_along_axis(weights, index, _cubic(at - knot).astype(np.float32), axis=2)
        return first - 1 + np.arange(count), weights


def _sample_at(layer: _Layer, seed: int, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the layer at points, (n,) each."""
    total = np.zeros(len(x_um))
    for k, (scale, weight) in enumerate(zip(layer.scales, layer.weights, strict=True)):
        at_x, at_y = x_um / scale, y_um / scale
        ix, iy = np.floor(at_x).astype(np.int64), np.floor(at_y).astype(np.int64)
        steps = np.arange(-1, 3)
        knots = _lattice(ix[:, None, None] + steps, iy[:, None, None] + steps[:, None], seed, layer.salt + k)
        wx, wy = _cubic(at_x - ix), _cubic(at_y - iy)
        # Not einsum, whose order of addition may depend on the number of points.
        for i, j in product(range(4), range(4)):
            total += weight * wy[:, i] * wx[:, j] * knots[:, i, j]
    return total


def _cubic(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights of the 4 knots around points, (..., 4), times 1.8 to compensate the smoothing."""
    s = 1 - t
    weights = np.stack([s * s * s, 4 - 3 * t * t * (2 - t), 4 - 3 * s * s * (2 - s), t * t * t], axis=-1)
    return weights * (1.8 / 6)


def _lattice(ix: NDArray[np.int64], iy: NDArray[np.int64], seed: int, salt: int) -> NDArray[np.float64]:
    """Return random values in [-1, 1) at knots."""
    return 2 * _unit(_hash(ix, iy, seed * 131 + salt)) - 1


def _hash(ix: NDArray[np.int64], iy: NDArray[np.int64], salt: int) -> NDArray[np.uint32]:
    """Hash a position and a salt to 32 bits (the finaliser is lowbias32 of Wellons, 2018)."""
    start = np.uint32((salt * 0x9E3779B9) & 0xFFFFFFFF)
    h = ix.astype(np.uint32) * np.uint32(0x85EBCA6B) ^ start
    h ^= h >> np.uint32(15)
    h = h * np.uint32(0xC2B2AE35) + iy.astype(np.uint32) * np.uint32(0x27D4EB2F)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    return h


def _unit(bits: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Return bits as numbers in [0, 1)."""
    return bits.astype(np.float64) / 2**32


def _smoothstep(values: Field, low: float, high: float) -> Field:
    t = np.clip((values - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    step: Field = t * t * (3 - 2 * t)
    return step


# ----------------------------------------------------------------------------- command


def read_size(_: click.Context, __: click.Parameter, text: str) -> tuple[int, int]:
    """Return (width, height) of an option's text like "4096x4096"."""
    try:
        width, height = map(int, text.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a size: write 4096x4096") from None
    return width, height


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--size", default="4096x4096", callback=read_size, help="Width x height in pixels.")
@click.option("--mpp", default=0.5, show_default=True, help="Side of a pixel, um.")
@click.option("--seed", default=0, show_default=True, help="Another seed makes another slide.")
@click.option("--tile-px", default=256, show_default=True, help="Side of the file's tiles.")
@click.option("--quality", default=85, show_default=True, help="JPEG quality, 1 to 100.")
@click.option("--labels", type=click.Path(path_type=Path, dir_okay=False), help="File of the label map.")
def main(
    out: Path,
    size: tuple[int, int],
    mpp: float,
    seed: int,
    tile_px: int,
    quality: int,
    labels: Path | None,
) -> None:
    """Write a synthetic H&E slide to OUT, a pyramidal TIFF."""
    try:
        slide = SyntheticSlide(*size, mpp, seed)
        slide.write(out, tile_px=tile_px, quality=quality, labels=labels)
    except (HistoError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {size[0]} x {size[1]} px, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

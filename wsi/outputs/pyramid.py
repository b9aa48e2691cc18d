"""A tiled pyramid, written tile by tile in any order and in little memory.

Tiles are compressed as they come, into a scratch file; the lower levels are made from those at the
end, four tiles at a time, and an ``Assembler`` puts the compressed bytes in order: tifffile those
of a BigTIFF. Memory does not grow with the slide: an index of 24 bytes a tile is all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from histostream.wsi.files import remove, temporary_name, writing
from histostream.wsi.outputs.label_rows import is_one_value

Pixels = NDArray[np.uint8]
_ABSENT = -1
MIN_PX = 512  # the coarsest level has no longer side
# libdeflate, label maps: 200 Mpx/s, and within 4 % of level 6, which does 140.
DEFLATE_LEVEL = 5


@dataclass(frozen=True, slots=True)
class TileCodec:
    """How a tile becomes bytes, and what the file says about it.

    Attributes
    ----------
    encode, decode
        (tile_px, tile_px[, C]) uint8 to bytes, and back to that shape.
    tags
        Arguments of ``tifffile.TiffWriter.write`` that describe the encoded tiles.
    """

    encode: Callable[[Pixels], bytes]
    decode: Callable[[bytes, tuple[int, ...]], Pixels]
    tags: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PyramidLayout:
    """Shape of the image in a file and how its levels follow from each other.

    Attributes
    ----------
    width, height, samples
        Pixels of level 0, and values per pixel.
    mpp
        Side of a pixel of level 0, in um.
    halve
        (2H, 2W[, C]) uint8 to (H, W[, C]): `nearest` or `mean`.
    tile_px
        Side of a tile.
    smallest_px
        Levels halve until neither side is longer.
    description
        Text of the first page, ASCII.
    """

    width: int
    height: int
    samples: int
    mpp: float
    halve: Callable[[Pixels], Pixels]
    tile_px: int = 512
    smallest_px: int = MIN_PX
    description: str = ""

    def __post_init__(self) -> None:
        if self.tile_px < 16 or self.tile_px % 16:
            raise ValueError(f"tile_px={self.tile_px}: TIFF tiles are multiples of 16")

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each level; halves are rounded up."""
        return level_sizes(self.width, self.height, self.smallest_px)

    def grid(self, level: int) -> tuple[int, int]:
        """(rows, columns) of tiles of a level."""
        width, height = self.level_sizes[level]
        return -(-height // self.tile_px), -(-width // self.tile_px)


def level_sizes(width: int, height: int, smallest_px: int = MIN_PX) -> list[tuple[int, int]]:
    """(width, height) of each level, finest first, until neither side is longer than the smallest.

    Halves are rounded up.
    """
    sizes = [(width, height)]
    while max(sizes[-1]) > smallest_px:
        width, height = sizes[-1]
        sizes.append((-(-width // 2), -(-height // 2)))
    return sizes


def nearest(pixels: Pixels) -> Pixels:
    """Keep one pixel of each 2 x 2: labels stay labels, and shares of area unbiased."""
    return pixels[::2, ::2]


def mean(pixels: Pixels) -> Pixels:
    """Average each 2 x 2, halves rounded up."""
    wide = pixels.astype(np.uint16)
    rows = wide[::2] + wide[1::2]
    return ((rows[:, ::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)


@dataclass
class _Index:
    """Where each tile of one level lies in the scratch file."""

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    constant: NDArray[np.bool_]

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> _Index:
        return cls(np.full(shape, _ABSENT), np.zeros(shape, np.int64), np.zeros(shape, np.bool_))


@dataclass
class _Band:
    """A column band that is being received: where it is, and rows that fill no tile yet."""

    x: int
    width: int
    y: int = 0
    waiting: list[Pixels] = field(default_factory=list)

    @property
    def waiting_rows(self) -> int:
        return sum(len(rows) for rows in self.waiting)


class PyramidWriter:
    """Write one pyramid: a TIFF, or what else is made of tiles.

    Parameters
    ----------
    path
        Final name; nothing is written under it, see `finish`.
    layout, codec
        What is written, and how.
    assemble
        Makes the file, or folder, of the finished tiles; see `write_tiff`, the default.
    """

    def __init__(
        self,
        path: Path,
        layout: PyramidLayout,
        codec: TileCodec,
        assemble: Assembler | None = None,
    ) -> None:
        self.path, self.layout, self.codec = path, layout, codec
        self._assemble = assemble or partial(write_tiff, subifds=False)
        self._temporary = temporary_name(path)
        self._scratch_path = temporary_name(path, "tiles")
        self._levels = [_Index.empty(layout.grid(0))]
        self._same: dict[bytes, tuple[int, int]] = {}
        self._band: _Band | None = None
        self._end = 0
        with writing(path):
            self._scratch = self._scratch_path.open("w+b")

    def write(self, x: int, y: int, pixels: Pixels) -> None:
        """Take the next rows of a column band; see `histostream.wsi.outputs.folder.Sink` for the order.

        Parameters
        ----------
        pixels
            (H, W) or (H, W, C) uint8.

        Raises
        ------
        ValueError
            If rows are missing, or come twice, or do not fit the image.
        OutputError
            If the disk is full or refuses.
        """
        band = self._advance(x, y, pixels)
        band.waiting.append(pixels)
        band.y += len(pixels)
        tile_px, done = self.layout.tile_px, band.y == self.layout.height
        if band.waiting_rows < tile_px and not done:
            # The caller may reuse its buffer.
            band.waiting[-1] = _kept(pixels)
            return
        rows = _joined(band.waiting)
        first = band.y - len(rows)
        whole = len(rows) if done else len(rows) // tile_px * tile_px
        for top in range(0, whole, tile_px):
            self._put_row(band, first + top, rows[top : min(top + tile_px, whole)])
        band.waiting = [_kept(rows[whole:])] if whole < len(rows) else []

    def put(self, row: int, column: int, tile: Pixels) -> None:
        """Take one tile of level 0, in any order.

        Parameters
        ----------
        row, column
            Its place, in tiles.
        tile
            (H, W[, C]) uint8; less than tile_px only at the right and bottom border.
        """
        with writing(self.path):
            self._put(self._levels[0], row, column, tile)

    def finish(self) -> tuple[Path, Path]:
        """Make the lower levels and complete the file; return its temporary and final name.

        Raises
        ------
        ValueError
            If tiles are missing.
        """
        missing = int((self._levels[0].offsets == _ABSENT).sum())
        if missing:
            raise ValueError(f"{self.path.name}: {missing} tiles were never written: write all rows")
        with writing(self.path):
            for level in range(1, len(self.layout.level_sizes)):
                self._levels.append(self._halved(level))
            self._scratch.flush()
            self._assemble(self, self._temporary)
            self._scratch.close()
        remove([self._scratch_path])
        return self._temporary, self.path

    def tiles(self, level: int) -> Iterator[bytes]:
        """Yield the encoded tiles of a level, row by row; for an ``Assembler``."""
        index = self._levels[level]
        for row, column in product(*map(range, index.offsets.shape)):
            yield self._read(index, row, column)

    def tile_bytes(self, level: int) -> NDArray[np.int64]:
        """Return how long each of `tiles` is, (rows, columns)."""
        return self._levels[level].sizes

    def abort(self) -> None:
        """Remove what was written."""
        with suppress(OSError):  # closing flushes, and the disk may be full
            self._scratch.close()
        remove([self._scratch_path, self._temporary])

    def _advance(self, x: int, y: int, pixels: Pixels) -> _Band:
        height, width = pixels.shape[:2]
        band, layout = self._band, self.layout
        if band is None or (y == 0 and band.y == layout.height):
            band = self._band = _Band(x, width)
        ends = {layout.width} if (x + width) % layout.tile_px else {x + width}
        if (x, y, width) != (band.x, band.y, band.width):
            raise ValueError(
                f"{self.path.name}: rows at x={x} y={y} width={width} do not continue the band "
                f"x={band.x} y={band.y} width={band.width}: hand over rows in order"
            )
        if x % layout.tile_px or x + width not in ends or y + height > layout.height:
            raise ValueError(
                f"{self.path.name}: band x={x} width={width} rows {y} to {y + height} does not fit "
                f"{layout.width} x {layout.height} px in tiles of {layout.tile_px}"
            )
        return band

    def _put_row(self, band: _Band, y: int, rows: Pixels) -> None:
        tile_px = self.layout.tile_px
        if is_one_value(rows):
            row, first = y // tile_px, band.x // tile_px
            with writing(self.path):
                place = slice(first, first + -(-band.width // tile_px))
                self._put_same(self._levels[0], row, place, rows[0, 0])
            return
        for left in range(0, band.width, tile_px):
            tile = rows[:, left : left + tile_px]
            self.put(y // tile_px, (band.x + left) // tile_px, tile)

    def _put(self, index: _Index, row: int, column: int, tile: Pixels) -> None:
        # Edges are repeated into the padding, which keeps JPEG's ringing out of the image.
        full = _pad(tile, self.layout.tile_px)
        # The first row alone rules out most tiles, at once.
        if (full[0] == full[0, 0]).all() and (full == full[0]).all():
            self._put_same(index, row, slice(column, column + 1), full[0, 0])
            return
        index.offsets[row, column], index.sizes[row, column] = self._append(self.codec.encode(full))

    def _put_same(self, index: _Index, row: int, columns: slice, pixel: Pixels) -> None:
        """Put tiles of one value, all of them the same bytes."""
        key = pixel.tobytes()
        if key not in self._same:
            px = self.layout.tile_px
            tile = np.full((px, px, *pixel.shape), pixel, np.uint8)
            self._same[key] = self._append(self.codec.encode(tile))
        index.offsets[row, columns], index.sizes[row, columns] = self._same[key]
        index.constant[row, columns] = True

    def _append(self, data: bytes) -> tuple[int, int]:
        self._scratch.seek(self._end)
        self._scratch.write(data)
        self._end += len(data)
        return self._end - len(data), len(data)

    def _read(self, index: _Index, row: int, column: int) -> bytes:
        self._scratch.seek(int(index.offsets[row, column]))
        return self._scratch.read(int(index.sizes[row, column]))

    def _halved(self, level: int) -> _Index:
        above, index = self._levels[level - 1], _Index.empty(self.layout.grid(level))
        for row, column in product(*map(range, index.offsets.shape)):
            four = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
            offsets = above.offsets[four]
            if above.constant[four].all() and (offsets == offsets[0, 0]).all():
                index.offsets[row, column] = offsets[0, 0]
                index.sizes[row, column] = above.sizes[2 * row, 2 * column]
                index.constant[row, column] = True
            else:
                tile = self.layout.halve(self._four(level - 1, row, column))
                self._put(index, row, column, tile)
        return index

    def _four(self, level: int, row: int, column: int) -> Pixels:
        """Up to 2 x 2 tiles of ``level`` as one image, padded to whole tiles."""
        px, index = self.layout.tile_px, self._levels[level]
        rows, columns = index.offsets[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].shape
        samples = () if self.layout.samples == 1 else (self.layout.samples,)
        canvas = np.empty((rows * px, columns * px, *samples), np.uint8)
        for r, c in product(range(rows), range(columns)):
            data = self._read(index, 2 * row + r, 2 * column + c)
            tile = self.codec.decode(data, (px, px, *samples))
            canvas[r * px : (r + 1) * px, c * px : (c + 1) * px] = tile
        # Tiles are padded with their edge already, so an odd last pixel averages with itself.
        return canvas


Assembler = Callable[[PyramidWriter, Path], None]


def write_tiff(pyramid: PyramidWriter, path: Path, *, subifds: bool) -> None:
    """Put the tiles of a pyramid in a BigTIFF.

    Parameters
    ----------
    pyramid
        With all its levels.
    path
        The file.
    subifds
        Whether the reduced images are SubIFDs of the first page, where OME-TIFF has them, or
        pages of their own (both of subfile type 1): OpenSlide sees only those.
    """
    layout = pyramid.layout
    sizes = layout.level_sizes
    samples = () if layout.samples == 1 else (layout.samples,)
    with tifffile.TiffWriter(path, bigtiff=True, ome=False) as file:
        for level, (width, height) in enumerate(sizes):
            per_cm = 1e4 / (layout.mpp * 2**level)
            file.write(
                pyramid.tiles(level),
                shape=(height, width, *samples),
                dtype=np.uint8,
                tile=(layout.tile_px, layout.tile_px),
                subfiletype=int(level > 0),
                subifds=len(sizes) - 1 if subifds and level == 0 else None,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                description=layout.description if level == 0 and layout.description else None,
                metadata=None,
                software="HistoStream",
                **pyramid.codec.tags,
            )


def deflate_codec(tags: dict[str, Any]) -> TileCodec:
    """Lossless; ``tags`` say what the values mean."""

    def encode(tile: Pixels) -> bytes:
        return bytes(imagecodecs.deflate_encode(tile.tobytes(), level=DEFLATE_LEVEL))

    def decode(data: bytes, shape: tuple[int, ...]) -> Pixels:
        # Told the size, it decodes twice as fast.
        values = imagecodecs.deflate_decode(data, out=prod(shape))
        return np.frombuffer(values, np.uint8).reshape(shape)

    return TileCodec(encode, decode, {"compression": "adobe_deflate", **tags})


def jpeg_codec(quality: int) -> TileCodec:
    """Colour photographs: YCbCr with halved colour, as slide scanners write them."""

    def encode(tile: Pixels) -> bytes:
        return bytes(
            imagecodecs.jpeg8_encode(
                np.ascontiguousarray(tile),
                level=quality,
                colorspace="RGB",
                outcolorspace="YCBCR",
                subsampling="420",
            )
        )

    def decode(data: bytes, _: tuple[int, ...]) -> Pixels:
        rgb: Pixels = imagecodecs.jpeg8_decode(data, colorspace="YCBCR", outcolorspace="RGB")
        return rgb

    tags = {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)}
    return TileCodec(encode, decode, tags)


def _kept(pixels: Pixels) -> Pixels:
    """Copy pixels (H, W[, C]); of one value that is broadcast only that."""
    if is_one_value(pixels):
        return np.broadcast_to(pixels[:1, :1].copy(), pixels.shape)
    return pixels.copy()


def _joined(parts: list[Pixels]) -> Pixels:
    """Put rows below each other; one value stays broadcast."""
    first = parts[0]
    if all(is_one_value(part) and (part[0, 0] == first[0, 0]).all() for part in parts):
        return np.broadcast_to(first[:1, :1], (sum(map(len, parts)), *first.shape[1:]))
    return np.concatenate(parts) if len(parts) > 1 else first


def _pad(tile: Pixels, tile_px: int) -> Pixels:
    height, width = tile.shape[:2]
    if (height, width) == (tile_px, tile_px):
        return tile
    edges = ((0, tile_px - height), (0, tile_px - width), *[(0, 0)] * (tile.ndim - 2))
    return np.pad(tile, edges, mode="edge")

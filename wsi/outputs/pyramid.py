"""Write a tiled pyramid, tile by tile in any order and in little memory.

Tiles are compressed as they come, into a scratch file. At the end the lower levels are made of them,
four tiles at a time, and an ``Assembler`` writes the compressed tiles in order, for a BigTIFF with
tifffile. Only an index of 16 bytes for each tile is kept in memory.
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
from numpy.typing import DTypeLike, NDArray

from histostream.wsi.files import remove, temporary_name, writing
from histostream.wsi.outputs.label_rows import is_one_value

Pixels = NDArray[Any]  # uint8, or uint16 for scores
_ABSENT = -1
MIN_PX = 512  # the coarsest level has no longer side
DEFLATE_LEVEL = 5  # libdeflate, label maps: 200 Mpx/s, 4 % larger than level 6 with 140 Mpx/s


@dataclass(frozen=True, slots=True)
class TileCodec:
    """Compression of tiles, and the TIFF tags that describe it.

    Attributes
    ----------
    encode, decode
        (tile_px, tile_px[, C]) to bytes, and back to that shape.
    tags
        Arguments of ``tifffile.TiffWriter.write`` that describe the encoded tiles.
    """

    encode: Callable[[Pixels], bytes]
    decode: Callable[[bytes, tuple[int, ...]], Pixels]
    tags: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PyramidLayout:
    """Size of an image, of its tiles and of its levels.

    Attributes
    ----------
    width, height, samples
        Pixels of level 0, and values per pixel.
    mpp
        Side of a pixel of level 0, in um.
    halve
        Makes the next level: (2H, 2W[, C]) to (H, W[, C]), `nearest` or `mean`.
    tile_px
        Side of a tile.
    smallest_px
        Levels are added until neither side is longer.
    description
        Text of the first page, ASCII.
    dtype
        Type of a value: uint8 or uint16.
    """

    width: int
    height: int
    samples: int
    mpp: float
    halve: Callable[[Pixels], Pixels]
    tile_px: int = 512
    smallest_px: int = MIN_PX
    description: str = ""
    dtype: DTypeLike = np.uint8

    def __post_init__(self) -> None:
        if self.tile_px < 16 or self.tile_px % 16:
            raise ValueError(f"tile_px={self.tile_px}: TIFF tiles are multiples of 16")

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each level, finest first."""
        return level_sizes(self.width, self.height, self.smallest_px)

    def grid(self, level: int) -> tuple[int, int]:
        """(rows, columns) of tiles of a level."""
        width, height = self.level_sizes[level]
        return -(-height // self.tile_px), -(-width // self.tile_px)


def level_sizes(width: int, height: int, smallest_px: int = MIN_PX) -> list[tuple[int, int]]:
    """Return (width, height) of each level, finest first, until neither side exceeds ``smallest_px``.

    Halves are rounded up.
    """
    sizes = [(width, height)]
    while max(sizes[-1]) > smallest_px:
        width, height = sizes[-1]
        sizes.append((-(-width // 2), -(-height // 2)))
    return sizes


def nearest(pixels: Pixels) -> Pixels:
    """Keep one pixel of each 2 x 2, so that labels stay labels."""
    return pixels[::2, ::2]


def mean(pixels: Pixels) -> Pixels:
    """Average each 2 x 2, halves rounded up."""
    wide: Pixels = pixels.astype(np.uint16 if pixels.dtype == np.uint8 else np.uint32)
    rows = wide[::2] + wide[1::2]
    means: Pixels = ((rows[:, ::2] + rows[:, 1::2] + 2) >> 2).astype(pixels.dtype)
    return means


@dataclass
class _Band:
    """The column band that is being written, and its rows that do not fill a tile yet."""

    x: int
    width: int
    y: int = 0
    waiting: list[Pixels] = field(default_factory=list)


class PyramidWriter:
    """Writes one pyramid, as a TIFF or another format that is made of tiles.

    Parameters
    ----------
    path
        Final name; the file is completed under a temporary name, see `finish`.
    layout, codec
        Size and compression.
    assemble
        Makes the file, or folder, of the compressed tiles; the default is `write_tiff`.
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
        # For each level (rows, columns, 2): offset and size of each tile in the scratch file.
        self._levels = [np.full((*layout.grid(0), 2), _ABSENT)]
        self._constant: dict[bytes, tuple[int, int]] = {}  # of tiles of one value, by that value
        self._band: _Band | None = None
        self._end = 0
        with writing(path):
            self._scratch = self._scratch_path.open("w+b")

    def write(self, x: int, y: int, pixels: Pixels) -> None:
        """Take the next rows of a column band, (H, W[, C]); see `label_rows.Sink` for the order.

        Raises
        ------
        ValueError
            If rows are missing, come twice, or do not fit the image.
        OutputError
            If the file cannot be written.
        """
        band = self._advance(x, y, pixels)
        band.waiting.append(pixels)
        band.y += len(pixels)
        tile_px, done = self.layout.tile_px, band.y == self.layout.height
        if sum(map(len, band.waiting)) < tile_px and not done:
            band.waiting[-1] = _copied(pixels)  # the caller may reuse its buffer
            return
        rows = _joined(band.waiting)
        first = band.y - len(rows)
        end = len(rows) if done else len(rows) // tile_px * tile_px
        for top in range(0, end, tile_px):
            self._put_row(band, first + top, rows[top : min(top + tile_px, end)])
        band.waiting = [_copied(rows[end:])] if end < len(rows) else []

    def put(self, row: int, column: int, tile: Pixels) -> None:
        """Take one tile of level 0, in any order.

        Parameters
        ----------
        row, column
            Position in the grid of tiles.
        tile
            (H, W[, C]); smaller than a tile only at the right and bottom border.
        """
        with writing(self.path):
            self._put(self._levels[0], row, column, tile)

    def finish(self) -> tuple[Path, Path]:
        """Make the lower levels and the file; return its temporary and its final name.

        Raises
        ------
        ValueError
            If tiles are missing.
        """
        missing = int((self._levels[0][..., 0] == _ABSENT).sum())
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
        for row, column in product(*map(range, self.layout.grid(level))):
            yield self._read(level, row, column)

    def tile_bytes(self, level: int) -> NDArray[np.int64]:
        """Return the size in bytes of each of `tiles`, (rows, columns)."""
        return self._levels[level][..., 1]

    def abort(self) -> None:
        """Remove the scratch file and the temporary file."""
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
            first = band.x // tile_px
            with writing(self.path):
                columns = slice(first, first + -(-band.width // tile_px))
                self._levels[0][y // tile_px, columns] = self._append_constant(rows[0, 0])
            return
        for left in range(0, band.width, tile_px):
            tile = rows[:, left : left + tile_px]
            self.put(y // tile_px, (band.x + left) // tile_px, tile)

    def _put(self, index: NDArray[np.int64], row: int, column: int, tile: Pixels) -> None:
        # Edges are repeated into the padding, which keeps JPEG's ringing out of the image.
        padded = _pad(tile, self.layout.tile_px)
        # Most tiles that are not constant differ in their first row already, which is tested first.
        if (padded[0] == padded[0, 0]).all() and (padded == padded[0]).all():
            index[row, column] = self._append_constant(padded[0, 0])
        else:
            index[row, column] = self._append(self.codec.encode(padded))

    def _append_constant(self, pixel: Pixels) -> tuple[int, int]:
        """Return offset and size of a tile of one value; it is stored once."""
        key = pixel.tobytes()
        if key not in self._constant:
            side = self.layout.tile_px
            self._constant[key] = self._append(
                self.codec.encode(np.full((side, side, *pixel.shape), pixel, pixel.dtype))
            )
        return self._constant[key]

    def _append(self, data: bytes) -> tuple[int, int]:
        self._scratch.seek(self._end)
        self._scratch.write(data)
        self._end += len(data)
        return self._end - len(data), len(data)

    def _read(self, level: int, row: int, column: int) -> bytes:
        offset, size = self._levels[level][row, column].tolist()
        self._scratch.seek(offset)
        return self._scratch.read(size)

    def _halved(self, level: int) -> NDArray[np.int64]:
        above, index = self._levels[level - 1], np.full((*self.layout.grid(level), 2), _ABSENT)
        constant = {offset for offset, _ in self._constant.values()}
        for row, column in product(*map(range, self.layout.grid(level))):
            four = above[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            if int(four[0, 0, 0]) in constant and (four == four[0, 0]).all():
                index[row, column] = four[0, 0]
            else:
                self._put(index, row, column, self.layout.halve(self._four(level - 1, row, column)))
        return index

    def _four(self, level: int, row: int, column: int) -> Pixels:
        """Return up to 2 x 2 tiles of ``level`` as one image, padded to whole tiles."""
        side = self.layout.tile_px
        rows, columns = self._levels[level][2 * row : 2 * row + 2, 2 * column : 2 * column + 2].shape[:2]
        samples = () if self.layout.samples == 1 else (self.layout.samples,)
        canvas = np.empty((rows * side, columns * side, *samples), self.layout.dtype)
        for r, c in product(range(rows), range(columns)):
            data = self._read(level, 2 * row + r, 2 * column + c)
            tile = self.codec.decode(data, (side, side, *samples))
            canvas[r * side : (r + 1) * side, c * side : (c + 1) * side] = tile
        # Tiles are padded with their edge already, so an odd last pixel averages with itself.
        return canvas


Assembler = Callable[[PyramidWriter, Path], None]


def write_tiff(pyramid: PyramidWriter, path: Path, *, subifds: bool) -> None:
    """Write the tiles of a finished pyramid to a BigTIFF.

    Parameters
    ----------
    pyramid
        The pyramid with all its levels.
    path
        The file.
    subifds
        Whether the reduced images are SubIFDs of the first page, as in OME-TIFF, or pages of their
        own, which OpenSlide needs. Both are of subfile type 1.
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
                dtype=layout.dtype,
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


def deflate_codec(tags: dict[str, Any], dtype: DTypeLike = np.uint8) -> TileCodec:
    """Return a lossless codec of values of a type; ``tags`` describe their meaning."""
    item_bytes = np.dtype(dtype).itemsize

    def encode(tile: Pixels) -> bytes:
        return bytes(imagecodecs.deflate_encode(tile.tobytes(), level=DEFLATE_LEVEL))

    def decode(data: bytes, shape: tuple[int, ...]) -> Pixels:
        # With a known size it decodes twice as fast.
        values = imagecodecs.deflate_decode(data, out=prod(shape) * item_bytes)
        tile: Pixels = np.frombuffer(values, dtype).reshape(shape)
        return tile

    return TileCodec(encode, decode, {"compression": "adobe_deflate", **tags})


def jpeg_codec(quality: int) -> TileCodec:
    """Return a codec for RGB images: JPEG in YCbCr with halved colour, as slide scanners write it."""

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


def _copied(pixels: Pixels) -> Pixels:
    """Copy pixels (H, W[, C]); one value that is broadcast stays broadcast."""
    if is_one_value(pixels):
        return np.broadcast_to(pixels[:1, :1].copy(), pixels.shape)
    return pixels.copy()


def _joined(parts: list[Pixels]) -> Pixels:
    """Join rows below each other; one value that is broadcast stays broadcast."""
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

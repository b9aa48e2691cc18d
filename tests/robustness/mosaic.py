"""Write a synthetic slide of any size in seconds: it has few different tiles, each stored once.

A TIFF stores the position of the bytes of every tile, so many tiles can share the same bytes. All glass is one tile,
and tissue consists of a few patches of a `SyntheticSlide`; a lower level has one tile for each different group of four
tiles above it. A file of 200 000 x 200 000 pixels therefore takes a few MB, but every reader sees ordinary tiles and
has to decode each.

    python -m tests.robustness.mosaic OUT.tif --size 200000x200000 --tissue 0.01
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO

import click
import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import HistoError
from histostream.wsi.files import remove, temporary_name, writing
from histostream.wsi.outputs.pyramid import PyramidLayout, TileCodec, jpeg_codec, mean
from histostream.wsi.synthetic import GLASS, SyntheticSlide, read_size

Pixels = NDArray[np.uint8]

PATCH_PX = 2048  # side of the patches of tissue, at level 0
PATCHES = 6  # number of different patches
PROBE_PX = 64  # a patch is tissue if it is tissue at points this far apart
SOURCE_PX = 1 << 18  # side of the synthetic slide that patches are cut from
ISLANDS = 5  # pieces of tissue, some of which touch
GLASS_TILE = 0  # number of the tile of glass, on every level
ASCII, SHORT, LONG, RATIONAL, LONG8 = 2, 3, 4, 5, 16  # kinds of values in a TIFF's directory
VALUE_BYTES = {ASCII: 1, SHORT: 2, LONG: 4, RATIONAL: 8, LONG8: 8}
RATIONAL_UNITS = 1000  # denominator of the resolution

Tag = tuple[int, int, int, bytes]  # number, kind, count, values


@dataclass(frozen=True, slots=True)
class Mosaic:
    """A large slide of tissue and glass.

    Attributes
    ----------
    width, height
        Pixels.
    tissue
        Share of the area that is tissue, 0 to 1, to within a patch of `PATCH_PX`.
    mpp
        Side of a pixel, in um.
    seed
        Seed of the arrangement and the content.
    """

    width: int
    height: int
    tissue: float = 1.0
    mpp: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"{self.width} x {self.height} px has no pixels")
        if not 0 <= self.tissue <= 1:
            raise ValueError(f"tissue={self.tissue!r} is not a share of the area: use 0 to 1")

    def patches(self) -> NDArray[np.int64]:
        """Return the number of the patch at each position, (rows, columns); -1 is glass."""
        shape = -(-self.height // PATCH_PX), -(-self.width // PATCH_PX)
        random = np.random.default_rng(self.seed)
        which = random.integers(0, PATCHES, shape)
        centres, radii = random.random((ISLANDS, 2)), random.uniform(0.3, 1, ISLANDS)
        ys, xs = (np.arange(n)[:, None] + 0.5 for n in shape)
        apart = np.hypot(ys[:, None] - centres[:, 0] * shape[0], xs[None] - centres[:, 1] * shape[1])
        nearest = np.argsort((apart / radii).min(axis=2), axis=None, kind="stable")
        which.ravel()[nearest[round(self.tissue * which.size) :]] = -1
        return which

    def write(self, path: Path, *, tile_px: int = 512, quality: int = 85) -> None:
        """Write the slide as a pyramidal BigTIFF of JPEG tiles.

        Each lower level is the average of 2 x 2 pixels of the tiles above it. Tiles at the right
        and the bottom border continue beyond it, so the last pixel of a level may average pixels outside the slide.

        Parameters
        ----------
        path
            File to write.
        tile_px
            Side of the file's tiles: 16 to `PATCH_PX`, a power of two.
        quality
            Quality of JPEG, 1 to 100.

        Raises
        ------
        ValueError
            If the tiles cannot be so large.
        OutputError
            If the file cannot be written.
        """
        if tile_px < 16 or PATCH_PX % tile_px:
            raise ValueError(f"tile_px={tile_px}: use a power of two from 16 to {PATCH_PX}")
        layout = PyramidLayout(
            self.width,
            self.height,
            3,
            self.mpp,
            mean,
            tile_px,
            tile_px,
            description=f"synthetic H&E mosaic, seed {self.seed}, {self.mpp} um per pixel",
        )
        temporary = temporary_name(path)
        with writing(path):
            try:
                with temporary.open("w+b") as file:
                    _write(file, self, layout, jpeg_codec(quality))
                temporary.replace(path)
            except BaseException:
                remove([temporary])
                raise

    def cut_patches(self) -> list[Pixels]:
        """Return the different patches, each (PATCH_PX, PATCH_PX, 3) and tissue all over."""
        slide = SyntheticSlide(SOURCE_PX, SOURCE_PX, self.mpp, self.seed)
        random = np.random.default_rng(self.seed)
        probes = (np.arange(PATCH_PX // PROBE_PX) + 0.5) * PROBE_PX
        found: list[Pixels] = []
        while len(found) < PATCHES:
            x, y = (int(n) * PATCH_PX for n in random.integers(0, SOURCE_PX // PATCH_PX, 2))
            xs, ys = (grid.ravel() for grid in np.meshgrid(x + probes, y + probes))
            if slide.is_tissue(xs, ys).all():
                found.append(slide.region(x, y, PATCH_PX, PATCH_PX)[0])
        return found


class _TileStore:
    """The different tiles of one level in a file: where the bytes of each are."""

    def __init__(self, file: BinaryIO, codec: TileCodec, tile_px: int) -> None:
        self._file, self._codec, self._shape = file, codec, (tile_px, tile_px, 3)
        self._places: list[tuple[int, int]] = []

    def add(self, tile: Pixels) -> None:
        """Append a tile (tile_px, tile_px, 3); its number is how many there were."""
        data = self._codec.encode(tile)
        self._places.append((self._file.seek(0, 2), len(data)))
        self._file.write(data)

    def get(self, number: int) -> Pixels:
        """Decode a tile."""
        offset, size = self._places[number]
        self._file.seek(offset)
        return self._codec.decode(self._file.read(size), self._shape)

    def places(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Offsets and sizes of tiles."""
        found = np.array(self._places, np.int64)[numbers.ravel()]
        return found[:, 0], found[:, 1]


def _write(file: BinaryIO, mosaic: Mosaic, layout: PyramidLayout, codec: TileCodec) -> None:
    file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
    link = file.tell() - 8  # where the place of the next directory goes
    store = _TileStore(file, codec, layout.tile_px)
    numbers = _level_0(mosaic, layout, store)
    for level in range(len(layout.level_sizes)):
        if level:
            numbers, store = _halved(numbers, store, _TileStore(file, codec, layout.tile_px))
        rows, columns = layout.grid(level)
        tags = _tags(layout, level, *store.places(numbers[:rows, :columns]))
        link = _write_directory(file, tags, link)


def _level_0(mosaic: Mosaic, layout: PyramidLayout, store: _TileStore) -> NDArray[np.int64]:
    """Store the tiles of level 0; returns the number of each place's, whole patches of them."""
    px, side = layout.tile_px, PATCH_PX // layout.tile_px
    store.add(np.broadcast_to(GLASS.astype(np.uint8), (px, px, 3)))
    patches = mosaic.patches()
    if (patches >= 0).any():
        for patch in mosaic.cut_patches():
            for y, x in product(range(0, PATCH_PX, px), repeat=2):
                store.add(patch[y : y + px, x : x + px])
    inside = np.arange(side * side).reshape(side, side)
    numbers = 1 + patches[:, None, :, None] * side * side + inside[:, None, :]
    glass = np.broadcast_to(patches[:, None, :, None] < 0, numbers.shape)
    shape = patches.shape[0] * side, patches.shape[1] * side
    return np.where(glass, GLASS_TILE, numbers).reshape(shape)


def _halved(numbers: NDArray[np.int64], above: _TileStore, store: _TileStore) -> tuple[NDArray[np.int64], _TileStore]:
    """Store one tile for each different four of the level above; returns where they lie, and it."""
    rows, columns = numbers.shape
    even = np.full((rows + rows % 2, columns + columns % 2), GLASS_TILE, np.int64)
    even[:rows, :columns] = numbers
    fours = even.reshape(len(even) // 2, 2, -1, 2).swapaxes(1, 2).reshape(-1, 4)
    # Glass, the smallest number, comes first in a sorted list; where there is none it is added.
    different, which = np.unique(np.concatenate([np.full((1, 4), GLASS_TILE), fours]), axis=0, return_inverse=True)
    for four in different.tolist():
        a, b, c, d = (above.get(number) for number in four)
        store.add(mean(np.block([[[a], [b]], [[c], [d]]])))
    return which.reshape(-1)[1:].reshape(len(even) // 2, -1), store


def _tags(layout: PyramidLayout, level: int, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[Tag]:
    """Directory of one level, in the order of the numbers that the format wants."""
    width, height = layout.level_sizes[level]
    per_cm = round(RATIONAL_UNITS * 1e4 / (layout.mpp * 2**level))
    resolution = struct.pack("<LL", per_cm, RATIONAL_UNITS)
    text = layout.description.encode() + b"\0"
    return [
        (254, LONG, 1, struct.pack("<L", int(level > 0))),  # whether this is a reduced image
        (256, LONG, 1, struct.pack("<L", width)),
        (257, LONG, 1, struct.pack("<L", height)),
        (258, SHORT, 3, struct.pack("<HHH", 8, 8, 8)),  # bits
        (259, SHORT, 1, struct.pack("<H", 7)),  # JPEG
        (262, SHORT, 1, struct.pack("<H", 6)),  # YCbCr
        *([(270, ASCII, len(text), text)] if level == 0 else []),
        (277, SHORT, 1, struct.pack("<H", 3)),  # channels
        (282, RATIONAL, 1, resolution),
        (283, RATIONAL, 1, resolution),
        (284, SHORT, 1, struct.pack("<H", 1)),  # interleaved
        (296, SHORT, 1, struct.pack("<H", 3)),  # centimetres
        (322, LONG, 1, struct.pack("<L", layout.tile_px)),
        (323, LONG, 1, struct.pack("<L", layout.tile_px)),
        (324, LONG8, len(offsets), offsets.astype("<u8").tobytes()),
        (325, LONG, len(sizes), sizes.astype("<u4").tobytes()),
        (530, SHORT, 2, struct.pack("<HH", 2, 2)),  # colours are halved
    ]


def _write_directory(file: BinaryIO, tags: list[Tag], link: int) -> int:
    """Append a directory, point ``link`` at it, and return where it points at the next one."""
    entries = []
    for number, kind, count, values in tags:
        assert len(values) == count * VALUE_BYTES[kind]
        if len(values) > 8:
            at = file.seek(0, 2)
            file.write(values)
            values = struct.pack("<Q", at)
        entries.append(struct.pack("<HHQ8s", number, kind, count, values))
    start = file.seek(0, 2)
    file.write(struct.pack("<Q", len(entries)) + b"".join(entries) + struct.pack("<Q", 0))
    file.seek(link)
    file.write(struct.pack("<Q", start))
    return file.seek(0, 2) - 8


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--size", default="100000x100000", callback=read_size, help="Width x height, px.")
@click.option("--tissue", default=1.0, show_default=True, help="Share of the area, 0 to 1.")
@click.option("--mpp", default=0.5, show_default=True, help="Side of a pixel, um.")
@click.option("--seed", default=0, show_default=True, help="Another seed is another slide.")
@click.option("--tile-px", default=512, show_default=True, help="Side of the file's tiles.")
@click.option("--quality", default=85, show_default=True, help="Of JPEG, 1 to 100.")
def main(
    out: Path,
    size: tuple[int, int],
    tissue: float,
    mpp: float,
    seed: int,
    tile_px: int,
    quality: int,
) -> None:
    """Write a large synthetic slide to OUT, a pyramidal TIFF."""
    try:
        Mosaic(*size, tissue, mpp, seed).write(out, tile_px=tile_px, quality=quality)
    except (HistoError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {size[0]} x {size[1]} px, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

"""The directories of a TIFF file, read without trust before any library reads them.

Libraries follow what a file says: they allocate the sizes that it claims, walk directories that
form a loop, and open files that its XML names. What cannot be true is refused here, by name, and
so is a file that was cut off. Nothing is allocated by what the file claims.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import SlideError

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and Big TIFF, both byte orders
MAX_DIRECTORIES = 4096  # a slide has about ten; a z-stack some hundred
MAX_DEPTH = 4  # directories within directories; pyramids have one level of them
MAX_ENTRIES = 1000  # of a directory; the standard knows about 300 tags
MIB = 1024 * 1024
MAX_OVERLAP = 4  # times a file's size that its values may add up to: some writers share a few
MAX_SIDE_PX = 1 << 24  # 8 m of slide at 0.5 um per pixel
MAX_TILE_PX = 1 << 26  # 8192 x 8192; two threads then hold 400 MB of RGB
MAX_CHANNELS = 256
# Bytes that one byte of a tile can become, by compression. Deflate's limit is 1032. LZW's longest
# string has 3836 bytes in a code of 12 bits. JPEG takes a bit for each block of 8 x 8, in every
# channel that is not subsampled: 512 pixels of 3 or 4 bytes.
MAX_EXPANSION = {1: 1, 5: 2560, 7: 2048, 8: 1032, 32946: 1032}

SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}  # bytes of one value, by type
COUNTING = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}  # types of whole numbers
WIDTH, LENGTH, BITS, COMPRESSION, DESCRIPTION, SAMPLES = 256, 257, 258, 259, 270, 277
ROWS, PLANAR = 278, 284
STRIPS, STRIP_BYTES, TILES, TILE_BYTES = 273, 279, 324, 325
TILE_WIDTH, TILE_LENGTH, SUB_DIRECTORIES, DEPTH, NDPI = 322, 323, 330, 32997, 65420

DECIDING = {
    WIDTH,
    LENGTH,
    BITS,
    COMPRESSION,
    SAMPLES,
    ROWS,
    PLANAR,
    STRIPS,
    STRIP_BYTES,
    TILES,
    TILE_BYTES,
    TILE_WIDTH,
    TILE_LENGTH,
    SUB_DIRECTORIES,
    DEPTH,
}

# No slide's XML defines entities: they are for files that multiply, or read others.
ENTITIES = re.compile(rb"<!\s*(ENTITY|DOCTYPE)", re.IGNORECASE)
FILE_ELSEWHERE = re.compile(rb"<[^<\s]*UUID\s[^<]*FileName\s*=\s*[\"'][^\"']*[/\\&]")  # of OME
OME_PIXELS = re.compile(rb"<[^<\s]*Pixels\s([^<]*)")
# Of more digits, the first: enough to be too many.
OME_SIZES = re.compile(rb"\bSize[ZCT]\s*=\s*[\"']\s*\+?([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a directory says of one tag; the values lie at ``place``."""

    tag: int
    type: int
    count: int
    place: int

    @property
    def nbytes(self) -> int:
        return self.count * SIZES.get(self.type, 0)


def is_tiff(path: Path) -> bool:
    """Whether a path is a file that begins as a TIFF."""
    if not path.is_file():
        return False
    with path.open("rb") as head:
        return head.read(4) in MAGIC


def check_tiff(path: Path) -> None:
    """Refuse a TIFF that was cut off, or that says what cannot be true; other files pass.

    Raises
    ------
    SlideError
        Naming what is wrong.
    """
    if not is_tiff(path):
        return
    with path.open("rb") as file:
        _Directories(path, file).check()


class _Directories:
    """A walk over all directories of a file, each visited once."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self._checked: set[int] = set()
        self._listed = 0  # bytes of all values so far
        head = self._read(0, 8)
        self._endian: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
        self._big = head[2:4] in (b"+\0", b"\0+")
        self._word = 8 if self._big else 4
        self._ndpi = False

    def check(self) -> None:
        """Visit and check every directory."""
        self._chain(self._number(8 if self._big else 4, self._word), ())

    def _chain(self, at: int, above: tuple[int, ...]) -> None:
        """Follow the links from one directory; ``above`` are those that it is part of."""
        inside: set[int] = set()
        while at:
            if at in inside or at in above:
                self._refuse(f"its directories form a loop at byte {at}")
            inside.add(at)
            if at in self._checked:  # some both list and link those below another
                return
            self._checked.add(at)
            if len(self._checked) > MAX_DIRECTORIES or len(above) > MAX_DEPTH:
                self._refuse(f"it has more than {MAX_DIRECTORIES} directories, or nests them")
            entries, after = self._directory(at)
            self._check_image(entries)
            for below in self._sub_directories(entries):
                self._chain(below, (*above, at))
            at = after

    def _directory(self, at: int) -> tuple[dict[int, _Entry], int]:
        """Return the entries of a directory by tag, the first of each, and the next directory."""
        head, size = (8, 20) if self._big else (2, 12)
        count = self._number(at, head)
        if not 0 < count <= MAX_ENTRIES:
            self._refuse(f"the directory at byte {at} has {count} entries")
        content = self._read(at + head, count * size)
        entries: dict[int, _Entry] = {}
        for i in range(count):
            entry = self._entry(at + head + i * size, content[i * size : (i + 1) * size])
            if entry.tag in entries and entry.tag in DECIDING:  # readers differ in which they take
                self._refuse(f"a directory has tag {entry.tag} twice")
            entries.setdefault(entry.tag, entry)
        link = at + head + count * size
        self._ndpi |= NDPI in entries
        if self._ndpi and not self._big:  # NDPI has links, and parts of offsets, beyond 4 GB
            entries = {tag: self._far(e, link + 8 + 4 * i) for i, (tag, e) in enumerate(entries.items())}
            return entries, self._number(link, 8)
        return entries, self._number(link, self._word)

    def _entry(self, at: int, content: bytes) -> _Entry:
        numbers = (
            content[:2],
            content[2:4],
            content[4 : 4 + self._word],
            content[4 + self._word :],
        )
        tag, kind, count, place = (int.from_bytes(part, self._endian) for part in numbers)
        entry = _Entry(tag, kind, count, place)
        if entry.nbytes <= self._word:
            return _Entry(tag, kind, count, at + 4 + self._word)
        self._need(place + entry.nbytes)
        self._listed += entry.nbytes
        if self._listed > MAX_OVERLAP * self._size + MIB:
            self._refuse("the values of its tags overlap")
        return entry

    def _far(self, entry: _Entry, at: int) -> _Entry:
        if entry.nbytes <= self._word or self._size < 2**32:
            return entry
        place = entry.place + (self._number(at, 4) << 32)
        return _Entry(entry.tag, entry.type, entry.count, place)

    def _sub_directories(self, entries: dict[int, _Entry]) -> list[int]:
        if SUB_DIRECTORIES not in entries:
            return []
        return [int(at) for at in self._values(entries[SUB_DIRECTORIES])]

    def _check_image(self, entries: dict[int, _Entry]) -> None:
        """Check the sizes of one image, and that its tiles or strips are all there."""
        if DESCRIPTION in entries:
            self._check_text(entries[DESCRIPTION])
        if WIDTH not in entries and LENGTH not in entries:
            return
        width, height = self._one(entries, WIDTH), self._one(entries, LENGTH)
        samples = self._one(entries, SAMPLES, 1)
        for side in (width, height):
            if not 0 < side <= MAX_SIDE_PX:
                self._refuse(f"it says that an image has {width} x {height} px")
        if not 0 < samples <= MAX_CHANNELS:
            self._refuse(f"it says that an image has {samples} channels")
        tiled = TILE_WIDTH in entries or TILES in entries
        if tiled:
            piece_w, piece_h = self._one(entries, TILE_WIDTH), self._one(entries, TILE_LENGTH)
            if piece_w < 1 or piece_h < 1 or piece_w * piece_h > MAX_TILE_PX:
                self._refuse(f"it says that a tile has {piece_w} x {piece_h} px")
        else:
            piece_w, piece_h = width, min(self._one(entries, ROWS, height), height)
            if piece_h < 1:
                self._refuse("it says that a strip has no rows")
        wanted = -(-width // piece_w) * -(-height // piece_h) * self._one(entries, DEPTH, 1)
        if self._one(entries, PLANAR, 1) == 2:
            wanted *= samples
            samples = 1
        self._check_pieces(entries, tiled, wanted, piece_w * piece_h * samples)

    def _check_pieces(self, entries: dict[int, _Entry], tiled: bool, wanted: int, values: int) -> None:
        """Check the lists of offsets and sizes of tiles or strips, of ``values`` values each."""
        tags = (TILES, TILE_BYTES) if tiled else (STRIPS, STRIP_BYTES)
        name = "tiles" if tiled else "strips"
        if tags[0] not in entries:  # some write tiles under the tags of strips
            tags = (STRIPS, STRIP_BYTES)
        if not all(tag in entries for tag in tags):
            self._refuse(f"it does not say where its {name} are")
        offsets, counts = (entries[tag] for tag in tags)
        if offsets.count != counts.count or offsets.count < wanted:
            self._refuse(f"an image of {wanted} {name} lists {offsets.count} places and {counts.count} sizes")
        if tiled and offsets.count != wanted:
            self._refuse(f"an image of {wanted} tiles lists {offsets.count}")
        sizes = self._values(counts).astype(np.float64)
        # In floating point, since sums of hostile numbers do not fit 64 bits.
        ends = self._values(offsets).astype(np.float64) + sizes
        self._need(int(ends[sizes > 0].max(initial=0)))
        largest = int(sizes.max(initial=0))
        expansion = MAX_EXPANSION.get(self._one(entries, COMPRESSION, 1))
        needed = values * self._one(entries, BITS, 1) // 8
        if largest and expansion and needed > expansion * largest:
            self._refuse(f"{name} of {needed} bytes cannot come out of {largest}")

    def _check_text(self, entry: _Entry) -> None:
        text = self._read(entry.place, min(entry.nbytes, self._size))
        if ENTITIES.search(text):
            self._refuse("its XML defines entities, which no slide needs")
        if FILE_ELSEWHERE.search(text):
            self._refuse("its XML names a file in another folder")
        for pixels in OME_PIXELS.findall(text):
            planes = math.prod(int(size) for size in OME_SIZES.findall(pixels))
            if planes > MAX_DIRECTORIES:
                self._refuse(f"its XML says that it has {planes:.6g} planes")

    def _one(self, entries: dict[int, _Entry], tag: int, default: int | None = None) -> int:
        if tag not in entries and default is not None:
            return default
        if tag not in entries:
            self._refuse(f"it lacks tag {tag}")
        entry = entries[tag]
        if not entry.count:
            self._refuse(f"its tag {tag} has no value")
        return int(self._values(_Entry(tag, entry.type, 1, entry.place))[0])

    def _values(self, entry: _Entry) -> NDArray[np.uint64]:
        if entry.type not in COUNTING:
            self._refuse(f"its tag {entry.tag} is of type {entry.type}, not a whole number")
        kind = ("<" if self._endian == "little" else ">") + COUNTING[entry.type]
        content = self._read(entry.place, entry.nbytes)
        return np.frombuffer(content, kind).astype(np.uint64)

    def _number(self, at: int, size: int) -> int:
        return int.from_bytes(self._read(at, size), self._endian)

    def _read(self, at: int, size: int) -> bytes:
        self._need(at + size)
        self._file.seek(at)
        return self._file.read(size)

    def _need(self, end: int) -> None:
        if end > self._size:
            raise SlideError(
                f"{self._path}: the file was cut off (it has {self._size} bytes and refers to "
                f"byte {end}); copy it again"
            )

    def _refuse(self, what: str) -> NoReturn:
        raise SlideError(f"{self._path}: the file is damaged: {what}; copy it again")

"""Check the directories of a TIFF file before any library reads them.

Libraries trust a file: they allocate the sizes that it claims, follow directories that form a loop,
and open files that its XML names. Claims that cannot be true are refused here, and so is a file that
was cut off. Nothing of the size that a file claims is allocated.
"""

from __future__ import annotations

import math
import os
import re
import struct
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import SlideError

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and Big TIFF, both byte orders
MAX_DIRECTORIES = 4096  # a slide has about ten, a z-stack some hundred
MAX_DEPTH = 4  # directories within directories; pyramids have one level of them
MAX_ENTRIES = 1000  # of a directory; the standard knows about 300 tags
MIB = 1024 * 1024
MAX_OVERLAP = 4  # times a file's size: sum of the sizes of all values; some writers share a few values
MAX_SIDE_PX = 1 << 24  # 8 m of slide at 0.5 um per pixel
MAX_TILE_PX = 1 << 26  # 8192 x 8192; two threads then hold 400 MB of RGB
MAX_CHANNELS = 256
# Bytes that one byte of a compressed tile can expand to, by compression. Deflate's limit is 1032. LZW's longest
# string has 3836 bytes in a code of 12 bits. JPEG takes a bit for each block of 8 x 8, in every
# channel that is not subsampled: 512 pixels of 3 or 4 bytes.
MAX_EXPANSION = {1: 1, 5: 2560, 7: 2048, 8: 1032, 32946: 1032}

# Bytes of one value, by TIFF type, and the numpy types of those that are whole numbers.
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
WHOLE_NUMBERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}

WIDTH, LENGTH, BITS, COMPRESSION, DESCRIPTION, SAMPLES = 256, 257, 258, 259, 270, 277
ROWS, PLANAR = 278, 284
STRIPS, STRIP_BYTES, TILES, TILE_BYTES = 273, 279, 324, 325
TILE_WIDTH, TILE_LENGTH, SUB_DIRECTORIES, DEPTH, NDPI = 322, 323, 330, 32997, 65420
# Tags that decide what is decoded; readers differ in which of two entries they take.
UNIQUE_TAGS = {WIDTH, LENGTH, BITS, COMPRESSION, SAMPLES, ROWS, PLANAR, STRIPS, STRIP_BYTES, TILES, TILE_BYTES}
UNIQUE_TAGS |= {TILE_WIDTH, TILE_LENGTH, SUB_DIRECTORIES, DEPTH}

# No slide's XML defines entities, which can multiply its size or read other files.
ENTITIES = re.compile(rb"<!\s*(ENTITY|DOCTYPE)", re.IGNORECASE)
OTHER_FOLDER = re.compile(rb"<[^<\s]*UUID\s[^<]*FileName\s*=\s*[\"'][^\"']*[/\\&]")  # of OME-XML
OME_PIXELS = re.compile(rb"<[^<\s]*Pixels\s([^<]*)")
# At most 18 digits, which are more than enough to exceed every limit.
OME_SIZES = re.compile(rb"\bSize[ZCT]\s*=\s*[\"']\s*\+?([0-9]{1,18})")


class _Entry(NamedTuple):
    """An entry of a directory: its values start at byte ``offset``."""

    tag: int
    type: int
    number: int  # of values
    offset: int

    @property
    def nbytes(self) -> int:
        return self.number * SIZES.get(self.type, 0)


def is_tiff(path: Path) -> bool:
    """Whether a path is a file that begins as a TIFF."""
    if not path.is_file():
        return False
    with path.open("rb") as head:
        return head.read(4) in MAGIC


def check_tiff(path: Path) -> None:
    """Check a TIFF file; other files pass.

    Raises
    ------
    SlideError
        If the file was cut off, or claims what cannot be true.
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
        self._format = struct.Struct(("<" if self._endian == "little" else ">") + ("HHQQ" if self._big else "HHII"))
        self._ndpi = False

    def check(self) -> None:
        """Visit and check every directory."""
        self._chain(self._number(8 if self._big else 4, self._word), ())

    def _chain(self, at: int, above: tuple[int, ...]) -> None:
        """Check a directory and those that it links to; ``above`` are the directories that contain it."""
        inside: set[int] = set()
        while at:
            if at in inside or at in above:
                self._refuse(f"its directories form a loop at byte {at}")
            inside.add(at)
            if at in self._checked:  # some writers both list and link sub-directories
                return
            self._checked.add(at)
            if len(self._checked) > MAX_DIRECTORIES or len(above) > MAX_DEPTH:
                self._refuse(f"it has more than {MAX_DIRECTORIES} directories, or nests them")
            entries, after = self._directory(at)
            self._check_image(entries)
            if SUB_DIRECTORIES in entries:
                for below in self._values(entries[SUB_DIRECTORIES]).tolist():
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
        for i, entry in enumerate(map(_Entry._make, self._format.iter_unpack(content))):
            if entry.nbytes <= self._word:  # the values lie in the entry itself
                entry = entry._replace(offset=at + head + i * size + 4 + self._word)
            else:
                self._need(entry.offset + entry.nbytes)
                self._listed += entry.nbytes
                if self._listed > MAX_OVERLAP * self._size + MIB:
                    self._refuse("the values of its tags overlap")
            if entry.tag in entries and entry.tag in UNIQUE_TAGS:
                self._refuse(f"a directory has tag {entry.tag} twice")
            entries.setdefault(entry.tag, entry)
        link = at + head + count * size
        self._ndpi |= NDPI in entries
        if self._ndpi and not self._big:  # NDPI has links, and the upper parts of offsets, beyond 4 GB
            entries = {tag: self._far(e, link + 8 + 4 * i) for i, (tag, e) in enumerate(entries.items())}
            return entries, self._number(link, 8)
        return entries, self._number(link, self._word)

    def _far(self, entry: _Entry, at: int) -> _Entry:
        if entry.nbytes <= self._word or self._size < 2**32:
            return entry
        return entry._replace(offset=entry.offset + (self._number(at, 4) << 32))

    def _check_image(self, entries: dict[int, _Entry]) -> None:
        """Check the sizes of one image, and that all its tiles or strips are in the file."""
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
        needed_pieces = -(-width // piece_w) * -(-height // piece_h) * self._one(entries, DEPTH, 1)
        if self._one(entries, PLANAR, 1) == 2:
            needed_pieces *= samples
            samples = 1
        self._check_pieces(entries, tiled, needed_pieces, piece_w * piece_h * samples)

    def _check_pieces(self, entries: dict[int, _Entry], tiled: bool, needed_pieces: int, values: int) -> None:
        """Check the lists of offsets and sizes of tiles or strips, of ``values`` values each."""
        tags = (TILES, TILE_BYTES) if tiled else (STRIPS, STRIP_BYTES)
        name = "tiles" if tiled else "strips"
        if tags[0] not in entries:  # some writers list tiles under the tags of strips
            tags = (STRIPS, STRIP_BYTES)
        if not all(tag in entries for tag in tags):
            self._refuse(f"it does not say where its {name} are")
        offsets, counts = (entries[tag] for tag in tags)
        if offsets.number != counts.number or offsets.number < needed_pieces:
            self._refuse(f"an image of {needed_pieces} {name} lists {offsets.number} places and {counts.number} sizes")
        if tiled and offsets.number != needed_pieces:
            self._refuse(f"an image of {needed_pieces} tiles lists {offsets.number}")
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
        text = self._read(entry.offset, min(entry.nbytes, self._size))
        if ENTITIES.search(text):
            self._refuse("its XML defines entities, which no slide needs")
        if OTHER_FOLDER.search(text):
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
        if not entry.number:
            self._refuse(f"its tag {tag} has no value")
        return int(self._values(entry._replace(number=1))[0])

    def _values(self, entry: _Entry) -> NDArray[np.uint64]:
        if entry.type not in WHOLE_NUMBERS:
            self._refuse(f"its tag {entry.tag} is of type {entry.type}, not a whole number")
        kind = ("<" if self._endian == "little" else ">") + WHOLE_NUMBERS[entry.type]
        content = self._read(entry.offset, entry.nbytes)
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

    def _refuse(self, problem: str) -> NoReturn:
        raise SlideError(f"{self._path}: the file is damaged: {problem}; copy it again")

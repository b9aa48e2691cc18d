"""Ways to damage bytes, and a TIFF file whose numbers can be edited in place."""

from __future__ import annotations

import functools
import random
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

# Numbers that are likely to break what reads them: small ones, limits, and what is beyond.
WORDS = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    15,
    16,
    17,
    63,
    64,
    255,
    256,
    257,
    32767,
    32768,
    65535,
    65536,
    99999,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**48,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def flip_bits(data: bytes, rng: random.Random, *, end: int | None = None) -> tuple[str, bytes]:
    """Flip a few bits, before ``end`` if it is given."""
    changed = bytearray(data)
    places = [rng.randrange(min(end or len(data), len(data))) for _ in range(rng.randint(1, 12))]
    for place in places:
        changed[place] ^= 1 << rng.randrange(8)
    return f"bits flipped at {places}", bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Overwrite a run of bytes with zeros, ones or noise."""
    start, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64, 1024))
    filler = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))
    return f"{length} bytes overwritten at {start}", data[:start] + filler + data[start + length :]


def cut(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Cut the end off, or a piece out."""
    start = rng.randrange(len(data))
    if rng.random() < 0.5:
        return f"cut off at {start}", data[:start]
    length = rng.choice((1, 2, 100))
    return f"{length} bytes removed at {start}", data[:start] + data[start + length :]


def repeat(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Repeat a piece, or append noise."""
    start, length = rng.randrange(len(data)), rng.choice((1, 4, 100, 1000))
    piece = rng.choice((data[start : start + length], rng.randbytes(length)))
    where = rng.choice((start, len(data)))
    return f"{len(piece)} bytes put in at {where}", data[:where] + piece + data[where:]


def some_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage some bytes in one of these ways."""
    return rng.choice((flip_bits, overwrite, cut, repeat))(data, rng)


@functools.cache
def bomb() -> bytes:
    """64 MiB of zeros in 64 KiB."""
    return zlib.compress(bytes(64 << 20), 9)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a directory: where it is, and what it says.

    Attributes
    ----------
    offset
        Of the entry in the file.
    tag, type, count
        As in the file.
    place
        Where its values are.
    """

    offset: int
    tag: int
    type: int
    count: int
    place: int


class Tiff:
    """A TIFF file's bytes, and where its parts are; knows no more of TIFF than that."""

    SIZES: ClassVar[dict[int, int]] = {
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
    }

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.order = "<" if data[:2] == b"II" else ">"
        self.big = data[2:4] in (b"+\0", b"\0+")
        self.word = 8 if self.big else 4
        self.links: list[int] = []  # where the offset of each directory is, the last one's 0 too
        self.pages: list[list[Entry]] = []
        self._walk()

    def _walk(self) -> None:
        link = 8 if self.big else 4
        while True:
            self.links.append(link)
            at = self.get(link, self.word)
            if at == 0 or at + 8 > len(self.data) or len(self.pages) > 9:
                return
            head, size = (8, 20) if self.big else (2, 12)
            count = self.get(at, head)
            self.pages.append([self._entry(at + head + i * size) for i in range(count)])
            link = at + head + count * size

    def _entry(self, at: int) -> Entry:
        tag, kind, count = self.get(at, 2), self.get(at + 2, 2), self.get(at + 4, self.word)
        place = at + 4 + self.word
        if self.SIZES.get(kind, 1) * count > self.word:
            place = self.get(place, self.word)
        return Entry(at, tag, kind, count, place)

    def get(self, at: int, size: int) -> int:
        """Read a number."""
        return int.from_bytes(self.data[at : at + size], self._order())

    def put(self, at: int, size: int, value: int) -> None:
        """Write a number; what does not fit is cut off."""
        self.data[at : at + size] = (value % 256**size).to_bytes(size, self._order())

    def _order(self) -> Any:
        return "little" if self.order == "<" else "big"

    def append(self, content: bytes) -> int:
        """Put bytes at the end; returns where."""
        self.data += b"\0" * (len(self.data) % 2)
        self.data += content
        return len(self.data) - len(content)

    def find(self, tag: int, page: int = 0) -> Entry:
        """Return the entry of a tag."""
        return next(entry for entry in self.pages[page] if entry.tag == tag)

    def set_value(self, entry: Entry, value: int) -> None:
        """Set the first value of an entry."""
        self.set_element(entry, 0, value)

    def set_element(self, entry: Entry, index: int, value: int) -> None:
        """Set one of the values of an entry."""
        size = self.SIZES.get(entry.type, 4)
        self.put(entry.place + index * size, size, value)

    def set_count(self, entry: Entry, count: int) -> None:
        """Set how many values an entry says it has."""
        self.put(entry.offset + 4, self.word, count)

    def set_text(self, entry: Entry, text: bytes) -> None:
        """Let an entry point at other text."""
        place = self.append(text + b"\0")
        self.put(entry.offset + 2, 2, 2)
        self.set_count(entry, len(text) + 1)
        self.put(entry.offset + 4 + self.word, self.word, place)

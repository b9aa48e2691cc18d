"""Damaged TIFF files: their headers, directories, sizes, offsets, texts and tiles."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.robustness.hostile.case import Case, slide_case
from tests.robustness.hostile.edit import WORDS, Tiff, bomb, cut, flip_bits, overwrite, some_bytes
from tests.robustness.hostile.seeds import MPP, seed_slides


def _number(rng: random.Random, old: int, size: int) -> int:
    """Return a number that is likely to break what reads it."""
    near = (old + 1, old - 1, old * 2, old // 2, old * 1000, -old, old ^ (1 << rng.randrange(16)))
    return rng.choice((rng.choice(WORDS), rng.choice(near), size + rng.randint(-2, 2)))


def _tiff_value(file: Tiff, rng: random.Random) -> str:
    entry = rng.choice(rng.choice(file.pages))
    index = rng.randrange(min(entry.count, 64) or 1)
    old = file.get(entry.place, file.SIZES.get(entry.type, 4))
    value = _number(rng, old, len(file.data))
    file.set_element(entry, index, value)
    return f"tag {entry.tag}[{index}] := {value}"


def _tiff_all_values(file: Tiff, rng: random.Random) -> str:
    entry = rng.choice([e for e in rng.choice(file.pages) if e.count > 1 and e.type != 2])
    value = _number(rng, file.get(entry.place, file.SIZES.get(entry.type, 4)), len(file.data))
    for index in range(entry.count):
        file.set_element(entry, index, value)
    return f"all of tag {entry.tag} := {value}"


def _tiff_shape(file: Tiff, rng: random.Random) -> str:
    said = []
    for tag in rng.sample((256, 257, 258, 259, 262, 277, 284, 317, 322, 323, 338, 339), 2):
        page = rng.randrange(len(file.pages))
        for entry in (e for e in file.pages[page] if e.tag == tag):
            value = _number(rng, file.get(entry.place, 2), len(file.data))
            file.set_value(entry, value)
            said.append(f"tag {tag} of page {page} := {value}")
    return ", ".join(said)


def _tiff_count(file: Tiff, rng: random.Random) -> str:
    entry = rng.choice(rng.choice(file.pages))
    count = _number(rng, entry.count, len(file.data))
    file.set_count(entry, count)
    return f"count of tag {entry.tag} := {count}"


def _tiff_type(file: Tiff, rng: random.Random) -> str:
    entry = rng.choice(rng.choice(file.pages))
    kind = rng.choice((*range(20), 255, 65535))
    file.put(entry.offset + 2, 2, kind)
    return f"type of tag {entry.tag} := {kind}"


def _tiff_tag(file: Tiff, rng: random.Random) -> str:
    entry = rng.choice(rng.choice(file.pages))
    tag = rng.choice((0, 65535, 254, 256, 273, 279, 324, 325, 330, 347, 700, 34665, 34853, 65420, 42112, 50839))
    file.put(entry.offset, 2, tag)
    return f"tag {entry.tag} becomes {tag}"


def _tiff_place(file: Tiff, rng: random.Random) -> str:
    entry = rng.choice(rng.choice(file.pages))
    place = _number(rng, entry.place, len(file.data))
    file.put(entry.offset + 4 + file.word, file.word, place)
    return f"values of tag {entry.tag} at {place}"


def _tiff_chain(file: Tiff, rng: random.Random) -> str:
    link = rng.choice(file.links)
    directories = [file.get(at, file.word) for at in file.links]
    target = rng.choice(
        (
            *directories,
            link,
            1,
            7,
            8,
            len(file.data),
            len(file.data) - 3,
            rng.randrange(len(file.data)),
            2**31,
            2**32 - 1,
        )
    )
    file.put(link, file.word, target)
    return f"directory link at {link} := {target}"


def _tiff_entries(file: Tiff, rng: random.Random) -> str:
    at = file.get(rng.choice(file.links[: len(file.pages)]), file.word)
    count = rng.choice((0, 1, 2, 255, 4096, 65535))
    file.put(at, 8 if file.big else 2, count)
    return f"directory at {at} of {count} entries"


def _tiff_header(file: Tiff, rng: random.Random) -> str:
    head = rng.choice((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"IIU\0", b"II\x2b\0\4\0\0\0"))
    file.data[: len(head)] = head
    return f"header := {head!r}"


def _tiff_tile(file: Tiff, rng: random.Random) -> str:
    """Damage the bytes of a tile, or exchange them for something else."""
    page = rng.choice(file.pages)
    offsets = [e for e in page if e.tag in (273, 324)]
    counts = [e for e in page if e.tag in (279, 325)]
    if not offsets or not counts or not offsets[0].count:
        return _tiff_value(file, rng)
    index = rng.randrange(offsets[0].count)
    place = file.get(offsets[0].place + index * file.SIZES[offsets[0].type], file.SIZES[offsets[0].type])
    length = file.get(counts[0].place + index * file.SIZES[counts[0].type], file.SIZES[counts[0].type])
    data = bytes(file.data[place : place + length])
    what = rng.choice(sorted(TILES))
    new = TILES[what](data, rng)
    file.set_element(offsets[0], index, file.append(new))
    file.set_element(counts[0], index, len(new))
    return f"tile {index}: {what}"


def jpeg_of(width: int, height: int, **options: Any) -> bytes:
    """Write a JPEG of one colour; options are Pillow's."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(file, format="JPEG", **options)
    return file.getvalue()


def jpeg_sized(data: bytes, width: int, height: int) -> bytes:
    """Let a JPEG's first frame header claim another size."""
    for marker in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"):
        at = data.find(marker)
        if at >= 0:
            return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]
    return data


def _jpeg_claim(data: bytes, rng: random.Random) -> bytes:
    sides = [rng.choice((0, 1, 8, 63, 65, 1000, 5000, 65500, 65535)) for _ in range(2)]
    return jpeg_sized(data, *sides)


def _jpeg2000_claim(data: bytes, rng: random.Random) -> bytes:
    at = data.find(b"\xff\x51")
    if at < 0:
        return flip_bits(data, rng)[1]
    field = at + 6 + 4 * rng.randrange(8)
    return data[:field] + struct.pack(">I", rng.choice(WORDS) % 2**32) + data[field + 4 :]


TILES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits": lambda data, rng: flip_bits(data, rng)[1] if data else b"",
    "overwritten": lambda data, rng: overwrite(data, rng)[1] if data else b"",
    "cut": lambda data, rng: cut(data, rng)[1] if data else b"",
    "nothing": lambda data, rng: b"",
    "zeros": lambda data, rng: b"\0" * len(data),
    "noise": lambda data, rng: rng.randbytes(len(data)),
    "deflate bomb": lambda data, rng: bomb(),
    "small jpeg": lambda data, rng: jpeg_of(8, 8),
    "large jpeg": lambda data, rng: jpeg_of(1500, 1400),
    "progressive jpeg": lambda data, rng: jpeg_of(64, 64, progressive=True),
    "jpeg claim": _jpeg_claim,
    "jpeg 2000 claim": _jpeg2000_claim,
}


def _tiff_text(file: Tiff, rng: random.Random) -> str:
    texts = [e for page in file.pages for e in page if e.tag in (270, 305, 306, 271, 272)]
    entry = rng.choice(texts) if texts else rng.choice(file.pages[0])
    text = rng.choice(TEXTS)
    file.set_text(entry, text)
    return f"text of tag {entry.tag}: {text[:60]!r}"


def _tiff_resolution(file: Tiff, rng: random.Random) -> str:
    said = []
    for entry in (e for page in file.pages for e in page if e.tag in (282, 283)):
        parts = [rng.choice((0, 1, 2, 10_000, 2**31, 2**32 - 1)) for _ in range(2)]
        for i, part in enumerate(parts):
            file.put(entry.place + 4 * i, 4, part)
        said.append(f"{parts[0]}/{parts[1]}")
    return f"resolutions {said}"


def _tiff_bytes_changed(file: Tiff, rng: random.Random) -> str:
    what, file.data[:] = some_bytes(bytes(file.data), rng)
    return what


APERIO = b"Aperio Image Library v11.2.1 \n200x150 (64x64)|AppMag = 20|MPP = "
OME = (
    b'<?xml version="1.0" encoding="UTF-8"?>%s<OME xmlns="http://www.openmicroscopy.org/Schemas/'
    b'OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" '
    b'SizeX="%s" SizeY="150" SizeC="3" SizeZ="%s" SizeT="1" PhysicalSizeX="%s" PhysicalSizeY="0.5"'
    b'><Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1">%s'
    b"</TiffData></Pixels></Image></OME>"
)
LAUGHS = (
    b'<!DOCTYPE OME [<!ENTITY a0 "haha">'
    + b"".join(b'<!ENTITY a%d "%s">' % (i, b"&a%d;" % (i - 1) * 10) for i in range(1, 12))
    + b"]>"
)
STRANGER = b'<!DOCTYPE OME [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
TEXTS: tuple[bytes, ...] = (
    *(
        APERIO + mpp
        for mpp in (
            b"1.2.3",
            b"...",
            b".",
            b"nan",
            b"-0.5",
            b"1e999",
            b"0",
            b"0.5|MPP = 0.25",
            b"9" * 400,
            b"0." + b"0" * 400 + b"1",
            b"0x1p3",
            "½".encode(),
            b"0.5\n" * 1000,
            b"\0",
            b"|" * 5000,
        )
    ),
    APERIO + b"0.5|AppMag = 1e999|Left = nan|OriginalWidth = -5|OffsetX = x",
    b"Aperio\xff\xfe\xfa|MPP = 0.5",
    b"Aperio",
    b"\xff" * 100,
    b"",
    b"\0" * 64,
    b"x" * 100_000,
    OME % (b"", b"200", b"1", b"0.5", b""),
    OME % (LAUGHS, b"200", b"1", b"0.5", b"&a11;"),
    OME % (STRANGER, b"200", b"1", b"0.5", b"&x;"),
    OME % (b"", b"99999999999", b"1", b"0.5", b""),
    OME % (b"", b"-1", b"0", b"nan", b""),
    OME % (b"", b"200", b"1000000000", b"1e999", b""),
    OME % (b"", b"x", b"y", b"1.2.3", b""),
    OME % (b"", b"200", b"1", b"0.5", b'<UUID FileName="/dev/zero">urn:uuid:1</UUID>'),
    OME % (b"", b"200", b"1", b"0.5", b'<UUID FileName="../bundle/model.onnx">urn:uuid:1</UUID>'),
    (OME % (b"", b"200", b"1", b"0.5", b""))[:300],
    b"<?xml version='1.0'?>" + b"<OME>" * 50_000,
    b'<?xml version="1.0"?><Philips><Attribute Name="x">' + b"1" * 1000,
    b'{"shape": [9999999, 9999999, 3], "axes": "YXS"}',
    b'{"shape": "x"}',
    b'{"shape": [[[[',
    b"ImageJ=1.11a\nimages=99999999\nframes=-1\nhyperstack=true",
    b"ImageJ=\nimages=x",
    b"SCANIMAGE.x = eval(1)",
    b"StackSize 99999",
    b"<MicroManager>" + b"{" * 1000,
    b"DICOM=1",
    b"Leica;" * 100,
    b"<scn><collection sizeX='x'/></scn>",
    b"iScan|ScanRes=1.2.3",
    b"<EncodeInfo/>",
    b"IndicaLabs",
    b"\xef\xbb\xbf{}",
    b"tif:" + b"[" * 3000,
)

TIFF_CHANGES: tuple[Callable[[Tiff, random.Random], str], ...] = (
    _tiff_value,
    _tiff_value,
    _tiff_all_values,
    _tiff_shape,
    _tiff_shape,
    _tiff_count,
    _tiff_type,
    _tiff_tag,
    _tiff_place,
    _tiff_chain,
    _tiff_entries,
    _tiff_header,
    *[_tiff_tile] * 6,
    _tiff_text,
    _tiff_text,
    _tiff_resolution,
    _tiff_bytes_changed,
)


def make_tiff(rng: random.Random) -> Case:
    """Damage a TIFF where its structure is."""
    base = rng.choice(sorted(seed_slides()))
    name = rng.choice(("slide.tif", "slide.tif", "slide.svs", "slide.ndpi", "slide.scn"))
    what, content = damage_tiff(seed_slides()[base], rng)
    case = slide_case("tiff", f"{base} {name}: {what}", name, content)
    if rng.random() < 0.3:  # with the file's own resolution
        case = replace(case, args=tuple(a for a in case.args if a not in ("--mpp", str(MPP))))
    return case


def damage_tiff(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Change a TIFF in up to three places."""
    file = Tiff(content)
    said = [rng.choice(TIFF_CHANGES)(file, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return "; ".join(said), bytes(file.data)

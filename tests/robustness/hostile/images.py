"""Damaged plain images and DICOM files, and seed slides with strange names."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib

from tests.robustness.hostile.case import Case, slide_case
from tests.robustness.hostile.edit import WORDS, bomb, flip_bits, some_bytes
from tests.robustness.hostile.seeds import picture, seed_images, seed_slides
from tests.robustness.hostile.tiff import jpeg_sized


def png_chunk(name: bytes, content: bytes) -> bytes:
    """Write one chunk of a PNG with a true checksum."""
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def png(width: int, height: int, *chunks: bytes, depth: int = 8, kind: int = 2) -> bytes:
    """Write a PNG that says a size, with these chunks."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + png_chunk(b"IEND", b"")


def _png_claim(rng: random.Random) -> tuple[str, str, bytes]:
    width, height = (rng.choice((0, 1, 200, 30_000, 65_535, 2**31 - 1, 2**32 - 1)) for _ in "wh")
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(200 * 601)))
    text = png_chunk(b"zTXt", b"Comment\0\0" + bomb())
    icc = png_chunk(b"iCCP", b"icc\0\0" + bomb())
    chunks = rng.choice(((pixels,), (), (text, pixels), (icc, pixels), (png_chunk(b"IDAT", bomb()),)))
    depth, kind = rng.choice((1, 8, 16, 99)), rng.choice((0, 2, 3, 4, 6, 7))
    data = png(width, height, *chunks, depth=depth, kind=kind)
    return f"says {width} x {height}, depth {depth}, kind {kind}", "image.png", data


def _jpeg_image_claim(rng: random.Random) -> tuple[str, str, bytes]:
    width, height = (rng.choice((0, 1, 199, 8000, 30_000, 65_500, 65_535)) for _ in "wh")
    data = seed_images()[rng.choice(("jpg", "jpeg"))]
    return f"says {width} x {height}", "image.jpg", jpeg_sized(data, width, height)


POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 200 150\n%%EndComments\n"
    b"(/tmp/canary) (w) file closefile\nshowpage\n%%EOF\n"
)
STRANGE_IMAGES: dict[str, bytes] = {
    "image.eps": POSTSCRIPT,
    "image.png": POSTSCRIPT,
    "image.ppm": b"P6\n60000 60000\n255\n",
    "image.pgm": b"P5 99999999 99999999 65535 ",
    "image.bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 60_000, -60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "image.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";",
    "image.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "image.yaml": b"sources:\n - path: /etc/passwd\n",
    "image.json": b'{"sources": [{"path": "/etc/passwd"}]}',
    "image.vms": b"[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\n"
    b"ImageFile=../../../etc/passwd\nMapFile=x.jpg\n",
    "image.mrxs": b"seed_images",
    "image.zarr": b"{}",
    "image.pdf": b"%PDF-1.4\n%%EOF",
    "image.html": b"<html></html>",
    "image.pkl": b"cos\nsystem\n(S'touch /tmp/canary'\ntR.",
    "image.npy": b"\x93NUMPY\x01\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    + b" " * 50
    + b"\ncos\nsystem\n(S'touch /tmp/canary'\ntR.",
}


def make_image(rng: random.Random) -> Case:
    """Damage a plain image, or make one that claims too much."""
    way = rng.randrange(5)
    if way == 0:
        what, name, data = _png_claim(rng)
    elif way == 1:
        what, name, data = _jpeg_image_claim(rng)
    elif way == 2:
        name = rng.choice(sorted(STRANGE_IMAGES))
        what, data = "strange", STRANGE_IMAGES[name]
        if rng.random() < 0.5:
            what, data = some_bytes(data, rng)
    else:
        extension = rng.choice(sorted(seed_images()))
        what, data = some_bytes(seed_images()[extension], rng)
        name = f"image.{rng.choice((extension, extension, 'png', 'tif', 'svs'))}"
    return slide_case("image", f"{name}: {what}", name, data)


DICOM_TAGS = (
    (0x0028, 0x0010),
    (0x0028, 0x0011),
    (0x0028, 0x0008),
    (0x0048, 0x0006),
    (0x0048, 0x0007),
    (0x0028, 0x0002),
    (0x0028, 0x0100),
    (0x0028, 0x0004),
    (0x0028, 0x0030),
    (0x0018, 0x0050),
    (0x0020, 0x9311),
    (0x0048, 0x0001),
    (0x0002, 0x0010),
    (0x0008, 0x0016),
    (0x0020, 0x000D),
    (0x7FE0, 0x0010),
    (0x5200, 0x9229),
    (0x0048, 0x0200),
)


def make_dicom(rng: random.Random, data: bytes | None = None) -> Case:
    """Damage a DICOM file: one element, or bytes of the header, or of the pixels."""
    data = data or _bare_dicom()
    way = rng.randrange(4)
    if way == 0:
        what, data = some_bytes(data, rng)
    elif way == 1:
        what, data = flip_bits(data, rng, end=4096)
    else:
        group, element = rng.choice(DICOM_TAGS)
        at = data.find(struct.pack("<HH", group, element))
        size = rng.choice((2, 4))
        value = rng.choice(WORDS) % 256**size
        at = at + rng.choice((4, 6, 8, 12)) if at >= 0 else rng.randrange(len(data))
        data = data[:at] + value.to_bytes(size, "little") + data[at + size :]
        what = f"({group:04x},{element:04x}) at {at} := {value}"
    name = rng.choice(("slide.dcm", "slide.dcm", "slide"))
    return slide_case("dicom", what, name, data)


@functools.cache
def _bare_dicom() -> bytes:
    """Write a DICOM header without a slide's fields: what is left where no real file is here."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.77.1.6")
    meta.MediaStorageSOPInstanceUID = meta.ImplementationClassUID = UID("1.2.3")
    meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1")
    said = pydicom.Dataset()
    said.file_meta = meta
    said.SOPClassUID, said.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    said.StudyInstanceUID, said.SeriesInstanceUID = "1.2.4", "1.2.5"
    said.Modality, said.ImageType = "SM", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    said.Rows = said.Columns = 64
    said.TotalPixelMatrixColumns = said.TotalPixelMatrixRows = 64
    said.SamplesPerPixel, said.PhotometricInterpretation = 3, "RGB"
    said.PlanarConfiguration = said.PixelRepresentation = 0
    said.BitsAllocated = said.BitsStored = 8
    said.HighBit, said.NumberOfFrames = 7, 1
    said.PixelData = picture(64, 64).tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, said, enforce_file_format=True)
    return file.getvalue()


NAMES = (
    ".svs",
    "..svs",
    "...svs",
    "....tif",
    "a\nb.tif",
    "a\rb.tif",
    "[/x].tif",
    "[red]x.tif",
    "a\x1b[2J.tif",
    ":skull:.tif",
    "-rf.tif",
    "--out.tif",
    " .tif",
    ". .tif",
    "é組織.tif",
    "\udcff\udcfe.tif",
    "x" * 200 + ".tif",
    "run.json.tif",
    "labels.tif",
    "out.tif",
    "%s%n.tif",
    "a\\..\\b.tif",
    "~.tif",
    "$HOME.tif",
    "\u202egpj.tif",
    "CON.tif",
    "a;b|c&d.tif",
    "'\".tif",
    "deep/er/slide.tif",
    "x" * 240 + ".tif",
    "{x}.tif",
    "\x7f.tif",
    "no-extension",
)


def make_name(rng: random.Random) -> Case:
    """Give a seed slide a hostile name."""
    name = rng.choice(NAMES)
    if rng.random() < 0.5:
        letters = [rng.choice("./\\~[]{}%:;|&$*?'\" \n\t\x07éß組😐\udc80-_aA0") for _ in range(8)]
        name = "".join(letters).replace("/", "").replace("\0", "") + ".tif"
    data = seed_slides()[rng.choice(("jpeg", "svs"))]
    return slide_case("name", repr(name), name, data)

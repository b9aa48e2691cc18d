"""Read the size in an encoded image's header, and refuse sizes that cannot be true.

Decoders allocate the size that the header claims, which may be 12 GB for a file of 20 bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from histostream.wsi.errors import SlideError

FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of JPEG that begin a frame
ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
SCAN, END = 0xDA, 0xD9
SCAN_MARKER = b"\xff\xda"
MAX_SCANS = 200  # of a progressive JPEG; each goes over the whole image, and encoders make about ten
CODESTREAM = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 codestream
# Formats that Pillow decodes itself; for others, as EPS, it starts a program (Ghostscript).
PLAIN_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "WEBP", "JPEG2000", "PPM", "TGA", "TIFF")
# Pixels that one byte of a file can hold: JPEG needs a bit for a block of 8 x 8, PNG expands a byte to
# 1032 bytes of 8 pixels, runs in BMP and TGA are shorter than 256 and 129 pixels, a code of GIF has 12
# bits for at most 4096 pixels, and a pixel of PPM has at least one bit.
MAX_PX_PER_BYTE = {"JPEG": 512, "MPO": 512, "PNG": 8256, "BMP": 256, "TGA": 128, "GIF": 4096, "PPM": 8}


def declared_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) in the header of a JPEG or JPEG 2000 codestream; None if there is none."""
    if data[:2] == b"\xff\xd8":
        return max(_jpeg_sizes(data), key=lambda size: size[0] * size[1], default=None)
    at = data[:4096].find(CODESTREAM)  # alone, or in the boxes of a JP2 file
    if at < 0 or len(data) < at + 24:
        return None
    right, bottom, left, top = (int.from_bytes(data[at + 8 + 4 * i : at + 12 + 4 * i], "big") for i in range(4))
    return max(right - left, 0), max(bottom - top, 0)


def check_claim(data: bytes, max_px: int) -> None:
    """Refuse an encoded image that would take much more to decode than expected.

    Raises
    ------
    ValueError
        If its header has more than ``max_px`` pixels, or it has more scans than any encoder makes.
    """
    size = declared_size(data)
    if size is not None and size[0] * size[1] > max_px:
        raise ValueError(f"it says that it has {size[0]} x {size[1]} px")
    if data[:2] == b"\xff\xd8" and data.count(SCAN_MARKER) > MAX_SCANS:
        raise ValueError(f"it has {data.count(SCAN_MARKER)} scans")


def check_plain_image(path: Path) -> None:
    """Check a PNG, JPEG or similar image; other files pass.

    Raises
    ------
    SlideError
        If it claims more pixels than its bytes can hold, or the decoder of its format starts programs.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that nobody reads here
        try:
            with Image.open(path) as image:
                kind, (width, height) = image.format, image.size
        except Exception:  # Pillow raises errors of any kind; files that it does not know are checked by readers
            return
    if kind not in PLAIN_FORMATS:
        raise SlideError(f"{path}: {kind} is no format for slides; save it as PNG or TIFF")
    max_px_per_byte = MAX_PX_PER_BYTE.get(str(kind))
    if kind in ("JPEG", "MPO") and path.read_bytes().count(SCAN_MARKER) > MAX_SCANS:
        raise SlideError(f"{path}: a JPEG of more than {MAX_SCANS} scans; save it again")
    if max_px_per_byte and width * height > max_px_per_byte * path.stat().st_size:
        raise SlideError(
            f"{path}: it says that it has {width} x {height} px, which its {path.stat().st_size} "
            "bytes cannot hold; copy it again"
        )


def _jpeg_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the size in each frame header before the first scan."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 9 <= len(data):
        marker = data[at + 1]
        if marker in FRAMES:
            height, width = (int.from_bytes(data[i : i + 2], "big") for i in (at + 5, at + 7))
            yield width, height
        if marker in (SCAN, END):
            return
        if marker in (0, 0xFF) or marker in ALONE:
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")

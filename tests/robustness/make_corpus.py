"""Write the corpus: one small file for each input that once broke histo-infer.

    python -m tests.robustness.make_corpus

The files are committed, so that they do not change; this module documents how they were made.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from tests.robustness.hostile.edit import Tiff
from tests.robustness.hostile.graphs import put_laughs, put_loop, put_side
from tests.robustness.hostile.images import png, png_chunk
from tests.robustness.hostile.seeds import MPP, seed_card, seed_graph, seed_model
from tests.robustness.hostile.tiff import LAUGHS, OME, STRANGER, jpeg_of, jpeg_sized

CORPUS = Path(__file__).parent / "corpus"


def small_tiff(levels: int = 1, **options: Any) -> Tiff:
    """Return a pyramid of 48 x 40 px in tiles of 16, all of one colour."""
    file, pixels = io.BytesIO(), np.full((40, 48, 3), 90, np.uint8)
    always = {
        "tile": (16, 16),
        "photometric": "rgb",
        "compression": "zlib",
        "metadata": None,
        "resolution": (1e4 / MPP, 1e4 / MPP),
        "resolutionunit": "CENTIMETER",
        "software": "x",
    }
    with tifffile.TiffWriter(file) as writer:
        for level in range(levels):
            step = 2**level
            writer.write(pixels[::step, ::step], subfiletype=int(level > 0), **{**always, **options})
    return Tiff(file.getvalue())


def edited(tag: int, value: int, **options: Any) -> bytes:
    """Return a small TIFF in which a tag says something else."""
    file = small_tiff(**options)
    file.set_value(file.find(tag), value)
    return bytes(file.data)


def described(text: bytes) -> bytes:
    """Return a small TIFF of a description."""
    file = small_tiff(description="x" * 8)
    file.set_text(file.find(270), text)
    return bytes(file.data)


def tile_exchanged(tile: bytes, **options: Any) -> bytes:
    """Return a small TIFF with another first tile."""
    file = small_tiff(**options)
    file.set_element(file.find(324), 0, file.append(tile))
    file.set_element(file.find(325), 0, len(tile))
    return bytes(file.data)


def looped() -> bytes:
    """Let the last directory of two be followed by the first."""
    file = small_tiff(levels=2)
    file.put(file.links[-1], 4, file.get(4, 4))
    return bytes(file.data)


def sub_directory_looped() -> bytes:
    """Let a directory be below itself."""
    file = small_tiff()
    entry = file.find(305)
    at = file.get(4, 4)
    for offset, size, value in ((0, 2, 330), (2, 2, 4), (4, 4, 1), (8, 4, at)):
        file.put(entry.offset + offset, size, value)
    return bytes(file.data)


def listed_twice() -> bytes:
    """Say the width twice: readers differ in which they take."""
    file = small_tiff()
    file.put(file.find(305).offset, 2, 256)
    return bytes(file.data)


def counted(tag: int, count: int) -> bytes:
    """Let a tag have another number of values."""
    file = small_tiff()
    file.set_count(file.find(tag), count)
    return bytes(file.data)


def huge_jpeg() -> bytes:
    """Let a small JPEG claim 4 gigapixels."""
    return jpeg_sized(jpeg_of(16, 16), 65500, 65500)


def strip_bomb() -> bytes:
    """Let a file of one strip claim 30 000 x 40 000 px: fallback readers decode it whole."""
    file = Tiff(edited(256, 30_000, tile=None, rowsperstrip=40, compression="lzw"))
    file.set_value(file.find(257), 40_000)
    file.set_value(file.find(278), 40_000)
    return bytes(file.data)


def many_scans() -> bytes:
    """Repeat the last scan of a progressive JPEG, each over the whole tile."""
    data = jpeg_of(16, 16, progressive=True)
    at = data.rfind(b"\xff\xda")
    return data[:at] + data[at:-2] * 1000 + data[-2:]


JPEG = {"compression": "jpeg", "photometric": "ycbcr"}
APERIO = b"Aperio Image Library v11\n48x40|AppMag = 20|MPP = "


def resolution_of_nothing() -> bytes:
    """Say that there are 0 / 0 pixels to the centimetre."""
    file = small_tiff()
    for tag in (282, 283):
        file.put(file.find(tag).place, 8, 0)
    return bytes(file.data)


SLIDES: dict[str, Callable[[], bytes]] = {
    "loop.tif": looped,
    "sub-loop.tif": sub_directory_looped,
    "width-twice.tif": listed_twice,
    "width-2-to-24.tif": lambda: edited(256, 2**24),
    "width-0.tif": lambda: edited(256, 0),
    "width-halved.tif": lambda: edited(256, 24),
    "length-absurd.tif": lambda: edited(257, 2**32 - 1),
    "tile-width-0.tif": lambda: edited(322, 0),
    "tile-absurd.tif": lambda: edited(323, 60_000),
    "tile-bomb.tif": lambda: edited(322, 4096, tile=(48, 48)),
    "channels-absurd.tif": lambda: edited(277, 65535),
    "offset-outside.tif": lambda: edited(324, 2**31),
    "few-offsets.tif": lambda: counted(324, 2),
    "values-outside.tif": lambda: counted(324, 2**30),
    "no-values.tif": lambda: counted(256, 0),
    "mpp-1.2.3.svs": lambda: described(APERIO + b"1.2.3"),
    "mpp-of-dots.svs": lambda: described(APERIO + b"..."),
    "mpp-huge.svs": lambda: described(APERIO + b"9" * 400),
    "resolution-0-0.tif": resolution_of_nothing,
    "ome-laughs.ome.tif": lambda: described(OME % (LAUGHS, b"48", b"1", b"0.5", b"&a11;")),
    "ome-entity.ome.tif": lambda: described(OME % (STRANGER, b"48", b"1", b"0.5", b"&x;")),
    "ome-planes.ome.tif": lambda: described(OME % (b"", b"48", b"1000000000", b"0.5", b"")),
    "ome-file-elsewhere.ome.tif": lambda: described(
        OME % (b"", b"48", b"1", b"0.5", b'<UUID FileName="/dev/zero">urn:uuid:1</UUID>')
    ),
    "ome-size-of-letters.ome.tif": lambda: described(OME % (b"", b"x", b"y", b"1.2.3", b"")),
    "shape-of-brackets.tif": lambda: described(b'{"shape": [[[['),
    "jpeg-claims-65500.tif": lambda: tile_exchanged(huge_jpeg(), **JPEG),
    "jpeg-small.tif": lambda: tile_exchanged(jpeg_of(8, 8), **JPEG),
    "jpeg-scans.tif": lambda: tile_exchanged(many_scans(), **JPEG),
    "jpeg-noise.tif": lambda: tile_exchanged(bytes(range(256)), **JPEG),
    "deflate-bomb.tif": lambda: tile_exchanged(zlib.compress(bytes(4 << 20), 9)),
    "tile-of-nothing.tif": lambda: edited(325, 0),
    "strip-decoder.tif": lambda: edited(278, 2, tile=None, rowsperstrip=40, compression="lzw"),
    "strip-bomb.tif": strip_bomb,
    "claims-65500.jpg": lambda: huge_jpeg(),
    "claims-30000.png": lambda: png(30_000, 30_000, png_chunk(b"IDAT", zlib.compress(bytes(999)))),
    "cut.png": lambda: png(48, 40, png_chunk(b"IDAT", zlib.compress(bytes(999))[:20])),
    "postscript.png": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\n%%EndComments\n",
    "claims-60000.ppm": lambda: b"P6\n60000 60000\n255\n",
    "pickle.npy": lambda: b"cos\nsystem\n(S'touch canary'\ntR.",
    "claims-60000.bmp": lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 60_000, -60_000, 1, 24, *[0] * 6),
}

SQUARE = [[5, 5], [40, 5], [40, 30], [5, 30], [5, 5]]


def polygon(*rings: object) -> bytes:
    """Return one polygon as GeoJSON, in which inf and nan are written as Python does."""
    return json.dumps({"type": "Polygon", "coordinates": rings}).encode()


REGIONS: dict[str, Callable[[], bytes]] = {
    "deep.geojson": lambda: b"[" * 3000,
    "corner-of-one.geojson": lambda: polygon([[1], [2], [3]]),
    "nan.geojson": lambda: polygon([[float("nan"), 1], [40, 5], [40, 30]]),
    "infinite.geojson": lambda: polygon([[123, 1], [2, 3], [4, 5]]).replace(b"123", b"1e999"),
    "far.geojson": lambda: polygon([[-1e300, -1e300], [1e300, -1e300], [5, 1e300]]),
    "far-hole.geojson": lambda: polygon(SQUARE, [[1e12, 1], [2, -1e12], [3, 3]]),
    "not-utf-8.geojson": lambda: b'{"type": "\xff"}',
    "long-number.geojson": lambda: b"[" + b"9" * 5000 + b"]",
    "long-text.geojson": lambda: polygon([["x" * 5000]]),
    "crosses-itself.geojson": lambda: polygon([[5, 5], [40, 30], [40, 5], [5, 30], [5, 5]]),
}


def card(**entries: object) -> bytes:
    """Return a card with some entries changed."""
    return json.dumps({**seed_card(seed_graph()), **entries}, indent=1).encode()


def named(name: str) -> bytes:
    """Return a card with a class of this name."""
    return card(classes=[{"name": name, "color": [0, 0, 0]}, {"name": "b", "color": [1, 1, 1]}])


CARDS: dict[str, Callable[[], bytes]] = {
    "deep.json": lambda: b'{"a":' * 3000,
    "mpp-of-400-digits.json": lambda: card(mpp=10**400),
    "tile-of-5000-digits.json": lambda: card(tile_px=12321).replace(b"12321", b"9" * 5000),
    "tile-absurd.json": lambda: card(tile_px=2**31),
    "color-infinite.json": lambda: named("a").replace(b"[\n    0", b"[\n    1e999"),
    "name-control.json": lambda: named("\n\x1b[2J"),
    "name-surrogate.json": lambda: named("\ud800"),
    "name-markup.json": lambda: named("[/b]"),
    "name-long.json": lambda: named("x" * 3000),
    "method-long.json": lambda: card(method="x" * 3000),
    "checksum-of-no-text.json": lambda: card(files={"model.onnx": 1}),
    "file-above.json": lambda: card(files={"../model.onnx": "0" * 64}),
    "file-absolute.json": lambda: card(files={"/etc/passwd": "0" * 64}),
    "file-of-engines-above.json": lambda: card(files={"engines/../../x": "0" * 64}),
    "crf-huge.json": lambda: card(crf={"theta_alpha": 1e308}),
    "crf-endless.json": lambda: card(crf={"n_iter": 10**9}),
    "crf-of-400-digits.json": lambda: card(crf={"w1": 10**400}),
}


def external(place: str) -> bytes:
    """Return the graph with its weights in another file."""
    model = seed_model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", place
    content: bytes = model.SerializeToString()
    return content


def changed(change: Callable[[Any], object]) -> bytes:
    """Return the graph after a change."""
    model = seed_model()
    change(model)
    content: bytes = model.SerializeToString()
    return content


def without_rank(model: Any) -> None:
    """Let the graph say nothing of the shape of the scores."""
    del model.graph.output[0].type.tensor_type.shape.dim[:]


def of_domain(model: Any) -> None:
    """Let a node be an operator that nobody has."""
    model.graph.node[2].domain = "evil.custom"


GRAPHS: dict[str, Callable[[], bytes]] = {
    "external-absolute.onnx": lambda: external("/etc/passwd"),
    "external-above.onnx": lambda: external("../outside.bin"),
    "external-beside.onnx": lambda: external("slide.tif"),
    "loop.onnx": lambda: changed(put_loop),
    "laughs.onnx": lambda: changed(lambda model: put_laughs(model, 30)),
    "smaller-scores.onnx": lambda: changed(lambda model: put_side(model, 63)),
    "no-rank.onnx": lambda: changed(without_rank),
    "custom-operator.onnx": lambda: changed(of_domain),
    "cut.onnx": lambda: seed_graph()[:200],
    "noise.onnx": lambda: bytes(range(256)),
}


def main() -> None:
    """Write every file anew."""
    parts = {"slides": SLIDES, "regions": REGIONS, "cards": CARDS, "graphs": GRAPHS}
    for folder, makers in parts.items():
        (CORPUS / folder).mkdir(parents=True, exist_ok=True)
        for name, make in makers.items():
            (CORPUS / folder / name).write_bytes(make())


if __name__ == "__main__":
    main()

"""Small input that is accepted, to begin from: slides, images, a graph and its card."""

from __future__ import annotations

import functools
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.robustness.hostile.edit import Tiff

SIDE_PX = 64  # of the model's tiles
MPP = 0.5
GRAPH = "model.onnx"


def picture(width: int = 200, height: int = 150) -> NDArray[np.uint8]:
    """Return something with structure, (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / a) * np.cos(y / b) for a, b in ((7, 11), (13, 9), (23, 5))]
    return np.stack(waves, axis=-1).astype(np.uint8)


@functools.cache
def seed_slides() -> dict[str, bytes]:
    """Small files that are accepted, by what is special about them."""
    jpeg: dict[str, Any] = {"compression": "jpeg", "compressionargs": {"level": 80}}
    aperio = "Aperio Image Library v11.2.1 \n200x150 [0,0 200x150] (64x64)|AppMag = 20|MPP = 0.5"
    return {
        "jpeg": tiff_bytes(**jpeg),
        "svs": tiff_bytes(**jpeg, description=aperio, metadata=None),
        "deflate": tiff_bytes(compression="zlib", predictor=True),
        "lzw": tiff_bytes(compression="lzw"),
        "plain": tiff_bytes(bigtiff=True),
        "big-endian": tiff_bytes(byteorder=">", compression="zlib"),
        "jpeg2000": tiff_bytes(compression="aperio_jp2000_rgb"),
        "ome": tiff_bytes(
            levels=1, ome=True, compression="zlib", metadata={"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
        ),
        "strips": tiff_bytes(tile=None, rowsperstrip=16, compression="lzw"),
        "planar": tiff_bytes(planarconfig="separate", compression="zlib"),
        "deep": tiff_bytes(dtype=np.uint16, compression="zlib"),
        "webp": tiff_bytes(compression="webp"),
    }


def tiff_bytes(*, levels: int = 2, dtype: Any = np.uint8, ome: bool = False, **options: Any) -> bytes:
    """Write a small pyramid; options are tifffile's."""
    import tifffile

    if options.get("compression") == "aperio_jp2000_rgb":
        return _jpeg2000_tiff()
    shape = {"bigtiff": options.pop("bigtiff", False), "byteorder": options.pop("byteorder", "<")}
    per_cm = 1e4 / MPP
    always = {"photometric": "rgb", "tile": (64, 64), "resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
    file = io.BytesIO()
    with tifffile.TiffWriter(file, ome=ome, **shape) as writer:
        for level in range(levels):
            pixels = picture()[:: 2**level, :: 2**level].astype(dtype)
            if options.get("planarconfig"):
                pixels = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
            writer.write(pixels, subfiletype=int(level > 0), **{**always, **options})
    return file.getvalue()


def _jpeg2000_tiff() -> bytes:
    """Write one page as Aperio does, with the compression that tifffile only reads."""
    import imagecodecs

    data = tiff_bytes(levels=1)
    pixels = np.zeros((192, 256, 3), np.uint8)
    pixels[:150, :200] = picture()
    tiles = [
        imagecodecs.jpeg2k_encode(pixels[y : y + 64, x : x + 64].copy(), codecformat=0)
        for y in range(0, 192, 64)
        for x in range(0, 256, 64)
    ]
    file = Tiff(data)
    for i, tile in enumerate(tiles):
        place = file.append(bytes(tile))
        file.set_element(file.find(324), i, place)
        file.set_element(file.find(325), i, len(tile))
    file.set_value(file.find(259), 33005)
    return bytes(file.data)


@functools.cache
def seed_images() -> dict[str, bytes]:
    """Small plain images, by extension."""
    from PIL import Image

    image = Image.fromarray(picture())
    found = {}
    for extension, kind, options in (
        ("png", "PNG", {}),
        ("jpg", "JPEG", {}),
        ("bmp", "BMP", {}),
        ("gif", "GIF", {}),
        ("webp", "WEBP", {}),
        ("jp2", "JPEG2000", {}),
        ("ppm", "PPM", {}),
        ("tga", "TGA", {}),
        ("eps", "EPS", {}),
        ("ico", "ICO", {}),
        ("pcx", "PCX", {}),
        ("sgi", "SGI", {}),
        ("dds", "DDS", {}),
        ("jpeg", "JPEG", {"progressive": True}),
    ):
        file = io.BytesIO()
        image.save(file, format=kind, **options)
        found[extension] = file.getvalue()
    return found


@functools.cache
def seed_graph() -> bytes:
    """One 1 x 1 convolution behind the tile contract."""
    bytes_of: bytes = seed_model().SerializeToString()
    return bytes_of


def seed_card(graph: bytes) -> dict[str, Any]:
    """Return a card for a graph, as JSON has it."""
    return {
        "schema": 1,
        "method": "tiny",
        "mpp": MPP,
        "channels": 3,
        "tile_px": SIDE_PX,
        "align_px": 1,
        "halo_px": 0,
        "tile_statistics": False,
        "score_kind": "probability",
        "files": {GRAPH: hashlib.sha256(graph).hexdigest()},
        "opset": 18,
        "parity": {},
        "precision": {},
        "training": {},
        "note": "",
        "crf": {},
        "classes": [{"name": "background", "color": [255, 255, 255]}, {"name": "nucleus", "color": [60, 40, 170]}],
    }


def seed_model() -> Any:
    """Build the seed graph as an ``onnx.ModelProto``."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.array([[1, 0, 0], [0, 1, 0]], np.float32).reshape(2, 3, 1, 1)
    node = helper.make_node
    nodes = [
        node("Cast", ["tiles"], ["float"], to=TensorProto.FLOAT),
        node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        node("Conv", ["planes", "weight"], ["mixed"], kernel_shape=[1, 1]),
        node("Clip", ["mixed", "low", "high"], ["clipped"]),
        node("Cast", ["clipped"], ["scores"], to=TensorProto.UINT8),
    ]
    info = helper.make_tensor_value_info
    side = SIDE_PX
    graph = helper.make_graph(
        nodes,
        "tiny",
        [info("tiles", TensorProto.UINT8, ["N", side, side, 3])],
        [info("scores", TensorProto.UINT8, ["N", 2, side, side])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array(0, np.float32), "low"),
            numpy_helper.from_array(np.array(255, np.float32), "high"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def real_files(data: Path | None) -> dict[str, bytes]:
    """Return the small real slides that are here, by name; DICOM is only damaged where one is."""
    folder = data / "wsi-slides" if data else None
    if folder is None or not folder.is_dir():
        return {}
    names = ("camelyon_jpeg.dcm", "OS-1-detail.ome.tif")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}

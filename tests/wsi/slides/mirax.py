"""Write a MIRAX slide: tiles of a grid, of which only those with something on them are in the file."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VERSION = "01.02"  # of Index.dat
SLIDE_ID = "0123456789ABCDEF0123456789ABCDEF"
WHITE = 0xFFFFFF


def write_mirax(
    path: Path,
    pixels: NDArray[np.uint8],
    *,
    grid: tuple[int, int],
    first: tuple[int, int],
    tile_px: int = 256,
    zooms: int = 4,
    mpp: float = 0.5,
    absent: tuple[tuple[int, int], ...] = (),
) -> Path:
    """Write a MIRAX slide whose scanned area lies somewhere in its grid.

    The layout is that which OpenSlide's documentation of the format describes: ``Slidedat.ini`` names the
    zoom levels, ``Index.dat`` has a list of tiles for each, and the tiles are in ``Data0000.dat``, here as PNG. There
    is no table of camera positions and no overlap, so a tile lies where its number says.

    Parameters
    ----------
    path
        Name of the slide, ending with ``.mrxs``; the folder beside it has the rest.
    pixels
        (H, W, 3) uint8, the scanned area; sides are multiples of ``tile_px``.
    grid
        (columns, rows) of tiles of the whole slide.
    first
        (column, row) of the tile where the scanned area begins.
    tile_px
        Side of a tile.
    zooms
        Number of levels, each half as fine as the one before.
    mpp
        Micrometres per pixel of level 0.
    absent
        (column, row) in the grid of tiles of the scanned area that the file does not hold.

    Returns
    -------
    ``path``.
    """
    whole = np.full((grid[1] * tile_px, grid[0] * tile_px, 3), 255, np.uint8)
    y, x = first[1] * tile_px, first[0] * tile_px
    whole[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    there = np.zeros((grid[1], grid[0]), bool)
    there[first[1] : first[1] + pixels.shape[0] // tile_px, first[0] : first[0] + pixels.shape[1] // tile_px] = True
    for column, row in absent:
        there[row, column] = False
    folder = path.with_suffix("")
    folder.mkdir()
    data, pages = bytearray(SLIDE_ID.encode()), []
    for zoom in range(zooms):
        step = 2**zoom
        entries = []
        for row in range(0, grid[1], step):
            for column in range(0, grid[0], step):
                if there[row : row + step, column : column + step].any():
                    tile = _tile(whole, column, row, step, tile_px)
                    entries.append((row * grid[0] + column, len(data), len(tile), 0))
                    data += tile
        pages.append(entries)
    (folder / "Data0000.dat").write_bytes(data)
    (folder / "Index.dat").write_bytes(_index(pages))
    (folder / "Slidedat.ini").write_text(_slidedat(grid, tile_px, zooms, mpp), encoding="utf-8-sig")
    Image.fromarray(whole[::16, ::16]).save(path, format="JPEG")
    return path


def _tile(whole: NDArray[np.uint8], column: int, row: int, step: int, tile_px: int) -> bytes:
    """Return a tile of a zoom level as PNG: the mean of step x step pixels, white outside of the grid."""
    side = step * tile_px
    part = whole[row * tile_px : row * tile_px + side, column * tile_px : column * tile_px + side]
    padded = np.full((side, side, 3), 255, np.uint8)
    padded[: part.shape[0], : part.shape[1]] = part
    mean = padded.reshape(tile_px, step, tile_px, step, 3).mean((1, 3)).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(mean).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _index(pages: list[list[tuple[int, int, int, int]]]) -> bytes:
    """Return Index.dat: pointers to the levels, and for each level one page with its tiles."""
    head = len(VERSION) + len(SLIDE_ID)
    table = head + 8  # after the two roots
    at = table + 4 * len(pages)
    pointers, lists = [], b""
    for entries in pages:
        pointers.append(at + len(lists))
        page = at + len(lists) + 8
        lists += struct.pack("<2i", 0, page) + struct.pack("<2i", len(entries), 0)
        lists += b"".join(struct.pack("<4i", *entry) for entry in entries)
    roots = struct.pack("<2i", table, 0)  # of the levels, and of other data: none
    return (VERSION + SLIDE_ID).encode() + roots + struct.pack(f"<{len(pointers)}i", *pointers) + lists


def _slidedat(grid: tuple[int, int], tile_px: int, zooms: int, mpp: float) -> str:
    sections = {
        "GENERAL": {
            "SLIDE_VERSION": VERSION,
            "SLIDE_ID": SLIDE_ID,
            "IMAGENUMBER_X": grid[0],
            "IMAGENUMBER_Y": grid[1],
            "OBJECTIVE_MAGNIFICATION": 20,
            "CameraImageDivisionsPerSide": 1,
        },
        "HIERARCHICAL": {
            "HIER_COUNT": 1,
            "NONHIER_COUNT": 0,
            "INDEXFILE": "Index.dat",
            "HIER_0_NAME": "Slide zoom level",
            "HIER_0_COUNT": zooms,
            **{f"HIER_0_VAL_{zoom}_SECTION": f"LAYER_0_LEVEL_{zoom}_SECTION" for zoom in range(zooms)},
        },
        "DATAFILE": {"FILE_COUNT": 1, "FILE_0": "Data0000.dat"},
    }
    for zoom in range(zooms):
        sections[f"LAYER_0_LEVEL_{zoom}_SECTION"] = {
            "IMAGE_CONCAT_FACTOR": min(zoom, 1),
            "OVERLAP_X": 0,
            "OVERLAP_Y": 0,
            "MICROMETER_PER_PIXEL_X": mpp * 2**zoom,
            "MICROMETER_PER_PIXEL_Y": mpp * 2**zoom,
            "IMAGE_FORMAT": "PNG",
            "IMAGE_FILL_COLOR_BGR": WHITE,
            "DIGITIZER_WIDTH": tile_px,
            "DIGITIZER_HEIGHT": tile_px,
        }
    lines = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {value}" for key, value in values.items()), ""]
    return "\n".join(lines)

"""The kernels compile for every GPU, and compute what blend.py and strips.cut compute.

Here they run on the host, compiled by g++ from the same source (host_device.py). A GPU test runs
the same laws on a GPU in test_devices.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from histostream.runtime.bundle.card import Scores
from histostream.runtime.choices import WINDOWS
from histostream.runtime.cuda.base import DeviceError
from histostream.runtime.cuda.kernels import compile_cubin, kernel_signatures, kernel_source
from histostream.runtime.stream.blend import Blender
from histostream.runtime.stream.device import DeviceStream
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, ClassInfo
from histostream.wsi.tiling.grid import Strip, TileGrid
from histostream.wsi.tiling.strips import cut
from tests.runtime.conftest import CARD
from tests.runtime.host_device import HostDevice, HostDeviceEngine, run_kernel

Bytes = NDArray[np.uint8]
BLOCK = (32, 1, 1)


class ScoresFromTiles:
    """Scores that are random, but the same whenever a tile has the same pixels."""

    name, batch = "random", 4

    def __init__(self, classes: int, tile_px: int) -> None:
        names = tuple(ClassInfo(f"c{k}", (k, k, k)) for k in range(classes))
        self.card = replace(CARD, classes=names, tile_px=tile_px)

    def infer(self, tiles: Bytes) -> Scores:
        scores: Scores = np.stack([self.one(tile) for tile in tiles])
        return scores

    def one(self, tile: Bytes) -> NDArray[np.float16]:
        side = self.card.tile_px
        rng = np.random.default_rng(int(tile.astype(np.int64).sum()))
        # Few values, so that ties happen; and the extremes.
        values = np.array([0, 2**-24, 3e-5, 0.4999, 0.5, 0.9995, 1], np.float16)
        return rng.choice(values, (len(self.card.classes), side, side))

    def close(self) -> None:
        pass


def parts(grid: TileGrid, slide: Bytes, mode: str, engine: ScoresFromTiles, **how: int) -> Bytes:
    """Labels and shares of a grid through the kernels, stacked."""
    device = HostDevice(how.get("seed", 0), shuffled=bool(how.get("shuffled", 0)))
    wrapped = HostDeviceEngine(engine, device)
    stream = DeviceStream(wrapped, grid, mode, channels=3, batch=how.get("batch", 4), probabilities=True)
    found = []
    for row in range(len(grid.ys)):
        tiles = grid.row(row)
        if tiles:
            top, bottom = tiles[0].read.y, min(tiles[0].read.bottom, grid.height)
            left, right = tiles[0].read.x, min(tiles[-1].read.right, grid.width)
            strip = Strip(left, top, slide[top:bottom, left:right])
            for _ in stream.feed(strip, tiles):
                pass
        found += stream.finish_row(row)
    found += stream.drain()
    stream.close()
    wrapped.close()
    return _stacked(found)


def wanted(grid: TileGrid, slide: Bytes, mode: str, engine: ScoresFromTiles) -> Bytes:
    blender = Blender(grid, len(engine.card.classes), mode, probabilities=True)
    found = []
    whole = Strip(0, 0, slide)
    for row in range(len(grid.ys)):
        for tile in grid.row(row):
            pixels = cut(whole, tile, width=grid.width, height=grid.height)
            blender.add(tile, engine.one(pixels))
        found.append(blender.finish_row(row))
    return _stacked(found)


def _stacked(found: list) -> Bytes:
    labels = np.concatenate([part.labels for part in found])
    shares = np.concatenate([part.probabilities for part in found])
    return np.concatenate([labels[..., None], shares], axis=-1)


def random_grid(rng: np.random.Generator, mode: str) -> TileGrid:
    tile_px = int(rng.choice([8, 15, 16, 24]))
    most = tile_px - 1 if mode in ("crop", "exact") else tile_px // 2
    width, height = (int(n) for n in rng.integers(1, 110, 2))
    grid = TileGrid.cover(width, height, tile_px=tile_px, overlap_px=int(rng.integers(0, most + 1)))
    if rng.random() < 0.5:
        x0 = int(rng.integers(0, width))
        grid = grid.band(x0, int(rng.integers(x0, width)) + 1)
    if rng.random() < 0.5:
        grid = grid.where(rng.random((len(grid.ys), len(grid.xs))) < 0.6)
    return grid


@pytest.mark.parametrize("mode", WINDOWS)
def test_random_grids_blend_as_the_blender_does(mode: str) -> None:
    """Bands, missing tiles, last tiles that are shifted in, 2 to 6 classes, any batch."""
    rng = np.random.default_rng(len(mode))
    for classes, batch in itertools.product(range(2, 7), (1, 3, 16)):
        grid = random_grid(rng, mode)
        slide = rng.integers(0, 256, (grid.height, grid.width, 3), dtype=np.uint8)
        engine = ScoresFromTiles(classes, grid.tile_px)
        found = parts(grid, slide, mode, engine, batch=batch, seed=classes)
        np.testing.assert_array_equal(found, wanted(grid, slide, mode, engine), err_msg=str(grid))


@pytest.mark.parametrize("mode", ["hann", "crop"])
def test_the_order_of_threads_changes_nothing(mode: str) -> None:
    rng = np.random.default_rng(5)
    for seed in range(6):
        grid = random_grid(rng, mode)
        slide = rng.integers(0, 256, (grid.height, grid.width, 3), dtype=np.uint8)
        engine = ScoresFromTiles(3, grid.tile_px)
        found = parts(grid, slide, mode, engine, shuffled=1, seed=seed)
        np.testing.assert_array_equal(found, wanted(grid, slide, mode, engine), err_msg=str(grid))


@pytest.mark.parametrize(("channels", "out_channels"), [(3, 3), (1, 3), (1, 1), (4, 4)])
def test_tiles_are_cut_as_on_the_host(channels: int, out_channels: int) -> None:
    rng = np.random.default_rng(channels)
    for width, height, align_px in ((1, 1, 1), (5, 40, 16), (47, 3, 4), (65, 49, 16), (70, 33, 1)):
        grid = TileGrid.cover(width, height, tile_px=16, overlap_px=0, align_px=align_px)
        slide = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        for row in range(len(grid.ys)):
            tiles = grid.row(row)
            xs = np.array([tile.read.x for tile in tiles], np.int32)
            found = np.zeros((len(tiles), 16, 16, out_channels), np.uint8)
            run_kernel(
                "cut_tiles",
                (1, 16, len(tiles)),
                BLOCK,
                (
                    slide.ctypes.data,
                    xs.ctypes.data,
                    found.ctypes.data,
                    0,
                    0,
                    width,
                    channels,
                    tiles[0].read.y,
                    width,
                    height,
                    16,
                    out_channels,
                ),
            )
            for tile, pixels in zip(tiles, found, strict=True):
                host = cut(Strip(0, 0, slide), tile, width=width, height=height)
                np.testing.assert_array_equal(pixels, np.broadcast_to(host, pixels.shape))


def test_pixels_without_weight_are_outside_and_their_share_is_nothing() -> None:
    grid = TileGrid.cover(40, 16, tile_px=16, overlap_px=4)
    keep = np.zeros((1, len(grid.xs)), np.bool_)
    keep[0, 0] = True
    slide = np.full((16, 40, 3), 9, np.uint8)
    found = parts(grid.where(keep), slide, "hann", ScoresFromTiles(3, 16))
    assert (found[:, 16:, 0] == NOT_ANALYSED).all()
    assert not found[:, 16:, 1:].any()
    assert (found[:, :16, 0] != NOT_ANALYSED).all()


@pytest.mark.parametrize("sm", ["sm80", "sm90", "sm120"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(sm: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-python is not installed")
    code = compile_cubin(kernel_source(), sm)
    assert code.startswith(b"\x7fELF")
    for name in kernel_signatures():
        assert name.encode() in code


def test_a_gpu_newer_than_the_compiler_gets_ptx() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-python is not installed")
    code = compile_cubin(kernel_source(), "sm999")
    assert b".target sm_" in code
    assert code.endswith(b"\0")  # the driver reads it up to there


def test_source_that_does_not_compile_is_an_error_with_the_compilers_words() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-python is not installed")
    with pytest.raises(DeviceError, match=r"kernels\.cu does not compile for sm90: .*nonsense"):
        compile_cubin("nonsense", "sm90")


def test_every_kernels_parameters_are_pointers_then_numbers() -> None:
    signatures = kernel_signatures()
    assert set(signatures) == {"cut_tiles", "add_scores", "finish_rows"}
    for signature in signatures.values():
        assert signature == "P" * signature.count("P") + "i" * signature.count("i")
    source = "__global__ void f(const int* a, // not, a\n int b,\n u8* c)"
    assert kernel_signatures(source) == {"f": "PiP"}

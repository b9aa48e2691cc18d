"""The stream over a device gives what the host gives, bit for bit, in any order of its queues."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from histostream.runtime import layout, slide_run
from histostream.runtime.bundle.card import Scores
from histostream.runtime.choices import WINDOWS
from histostream.runtime.cuda.base import DeviceMemoryError
from histostream.runtime.engines.base import Engine
from histostream.runtime.engines.device_engine import DeviceEngine
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.options import Options
from histostream.runtime.slide_run import segment_slide
from histostream.runtime.stream import column_band as band
from histostream.runtime.stream import device as device_stream
from histostream.runtime.stream.column_band import HostStream, open_stream
from histostream.runtime.stream.context import StageSeconds
from histostream.runtime.stream.device import DeviceStream, plan_band
from histostream.wsi.errors import SlideError
from histostream.wsi.outputs.label_rows import ClassInfo
from histostream.wsi.records import to_json
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.strips import read_strips
from tests.runtime.conftest import (
    CARD,
    IdentityEngine,
    PlaceDependentEngine,
    as_scores,
    as_shares,
    random_pixels,
    write_slide,
)
from tests.runtime.host_device import HostDevice, HostDeviceEngine

ALL = Options(tissue=False, overlap_px=16, probabilities=True)
Both = tuple[NDArray[np.uint8], NDArray[np.uint8] | NDArray[np.uint16]]


class ManyClasses(PlaceDependentEngine):
    """As many classes as wanted, of any number of channels; scores disagree between tiles."""

    def __init__(self, classes: int = 3, channels: int = 3, align_px: int = 1) -> None:
        names = tuple(ClassInfo(f"c{k}", (k, k, k)) for k in range(classes))
        super().__init__(replace(CARD, classes=names, channels=channels, align_px=align_px))

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        side = self.card.tile_px
        planes = [tiles[..., k % tiles.shape[-1]] // (2 + k // 3) for k in range(len(self.card.classes))]
        pattern = (np.add.outer(7 * np.arange(side), 13 * np.arange(side)) % 97).astype(np.uint8)
        return as_scores(np.stack(planes, 1) + pattern, self.card)


def results(folder: Path, probabilities: bool = True) -> Both:
    labels = np.asarray(tifffile.imread(folder / "labels.tif", level=0))
    if not probabilities:
        return labels, labels
    return labels, np.asarray(tifffile.imread(folder / "probabilities.tif", level=0))


def assert_same(one: Both, other: Both) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def on_both(path: Path, engine: Engine, out: Path, options: Options, seed: int = 1) -> Any:
    """Run a slide on the host and on the stand-in for a device; they have to agree."""
    host = segment_slide(path, engine, out / "host", options)
    device = HostDevice(seed)
    other = HostDeviceEngine(engine, device)
    run = segment_slide(path, other, out / "device", options)
    other.close()
    assert_same(results(host.folder, options.probabilities), results(run.folder, options.probabilities))
    assert "device" not in to_json(host.run)
    return to_json(run.run)


@pytest.fixture
def engine() -> Iterator[HostDeviceEngine]:
    opened = HostDeviceEngine(PlaceDependentEngine(), HostDevice())
    yield opened
    opened.close()


@pytest.mark.parametrize("mode", WINDOWS)
def test_identity_gives_the_slide_back(tmp_path: Path, mode: str) -> None:
    pixels = random_pixels(301, 217)
    path = write_slide(tmp_path / "noise.tif", pixels)
    on_device = HostDeviceEngine(IdentityEngine(), HostDevice(3))
    assert isinstance(on_device, DeviceEngine)
    options = replace(ALL, blend=mode)
    labels, shares = results(segment_slide(path, on_device, tmp_path, options).folder)
    on_device.close()
    np.testing.assert_array_equal(shares, as_shares(pixels))
    np.testing.assert_array_equal(labels, pixels.argmax(axis=-1))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 16])
def test_the_host_and_the_device_agree_for_every_batch(tmp_path: Path, batch: int) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(330, 250))
    on_both(path, PlaceDependentEngine(), tmp_path, replace(ALL, batch=batch), seed=batch)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (33, 300), (64, 64), (129, 65), (65, 70), (300, 40)])
@pytest.mark.parametrize("align_px", [1, 16, 64])
def test_they_agree_where_tiles_stick_out(tmp_path: Path, width: int, height: int, align_px: int) -> None:
    path = write_slide(tmp_path / "odd.tif", random_pixels(width, height))
    overlap_px = 0 if align_px == 64 else 16
    on_both(path, ManyClasses(align_px=align_px), tmp_path, replace(ALL, overlap_px=overlap_px))


@pytest.mark.parametrize("classes", [2, 4, 6])
@pytest.mark.parametrize("probabilities", [True, False])
def test_they_agree_for_any_number_of_classes(tmp_path: Path, classes: int, probabilities: bool) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(200, 150))
    on_both(path, ManyClasses(classes), tmp_path, replace(ALL, probabilities=probabilities))


def test_they_agree_where_glass_is_left_out(tmp_path: Path) -> None:
    pixels = np.full((900, 1100, 3), 243, np.uint8)
    stain = np.array([120, 30, 110], np.uint8)
    pixels[200:500, 300:600] = random_pixels(300, 300) // 3 + stain
    pixels[700:860, 60:200] = random_pixels(140, 160) // 3 + stain
    path = write_slide(tmp_path / "islands.tif", pixels)
    run = on_both(path, PlaceDependentEngine(), tmp_path, replace(ALL, tissue=True))
    assert run["grid"]["tiles_inferred"] < run["grid"]["tiles"] / 2
    on_both(path, PlaceDependentEngine(), tmp_path / "b", Options(overlap_px=16, blend="crop"))


def test_rows_without_tiles_are_not_computed(tmp_path: Path) -> None:
    pixels = np.full((900, 300, 3), 243, np.uint8)
    pixels[400:620, 40:260] = random_pixels(220, 220) // 3
    path = write_slide(tmp_path / "glass.tif", pixels)
    device = HostDevice()
    engine = HostDeviceEngine(PlaceDependentEngine(), device)
    run = to_json(segment_slide(path, engine, tmp_path / "out", replace(ALL, tissue=True)).run)
    engine.close()
    rows = -(-(900 - 16) // (64 - 16))
    assert 0 < run["grid"]["tiles_inferred"] < run["grid"]["tiles"]
    assert 0 < device.launches["finish_rows"] <= rows // 2


def test_rows_that_the_last_strip_left_white_are_uploaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both strips reach from the first column of tiles to the last; only the second is whole."""
    grid = TileGrid.cover(400, 112, tile_px=64, overlap_px=16)
    keep = np.ones((len(grid.ys), len(grid.xs)), np.bool_)
    keep[0, 2:6] = False
    monkeypatch.setattr(layout, "lay_tiles", lambda *_: grid.where(keep))
    path = write_slide(tmp_path / "slide.tif", random_pixels(400, 112))
    run = on_both(path, PlaceDependentEngine(), tmp_path, ALL)
    assert run["device"]["bytes_uploaded"] == 2 * 64 * 400 * 3


def test_a_slide_of_glass_needs_no_tile(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "glass.tif", np.full((300, 200, 3), 243, np.uint8))
    run = on_both(path, PlaceDependentEngine(), tmp_path, replace(ALL, tissue=True))
    assert run["device"]["bytes_uploaded"] == 0


def test_they_agree_in_a_region_of_interest(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(301, 217))
    roi = tmp_path / "roi.geojson"
    triangle = [[20, 10], [220, 10], [20, 190], [20, 10]]
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [triangle]}))
    on_both(path, PlaceDependentEngine(), tmp_path, replace(ALL, roi=roi))


def test_they_agree_in_column_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_slide(tmp_path / "wide.tif", random_pixels(1700, 90))
    bands = [(0, 512), (512, 1536), (1536, 1700)]
    whole = segment_slide(path, PlaceDependentEngine(), tmp_path / "whole", ALL)
    monkeypatch.setattr(slide_run, "plan_bands", lambda *_, **__: bands)
    run = on_both(path, PlaceDependentEngine(), tmp_path, ALL)
    assert_same(results(whole.folder), results(tmp_path / "device" / "wide"))
    assert run["device"]["bytes_uploaded"] > 1700 * 90 * 3  # the tiles that reach into two bands


@pytest.mark.parametrize(("pixels", "model"), [(1, 3), (1, 1), (3, 1)])
def test_they_agree_on_grey_and_colour(tmp_path: Path, pixels: int, model: int) -> None:
    path = tmp_path / "slide.tif"
    noise = random_pixels(190, 130)
    if pixels == 1:
        tifffile.imwrite(path, noise[..., 0], tile=(64, 64), photometric="minisblack")
    else:
        write_slide(path, noise)
    run = on_both(path, ManyClasses(3, model), tmp_path, replace(ALL, mpp=0.5))
    assert run["device"]["bytes_uploaded"] == 190 * 130 * min(pixels, model)


@pytest.mark.parametrize("seed", range(8))
def test_no_order_that_the_events_allow_changes_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(device_stream, "CHUNK_BYTES", 3000)  # many copies in flight
    path = write_slide(tmp_path / "slide.tif", random_pixels(200, 333, seed))
    on_both(path, PlaceDependentEngine(), tmp_path, replace(ALL, batch=2), seed=seed)


@pytest.mark.parametrize("stream", [0, 2], ids=["compute", "download"])
def test_a_wait_that_is_missing_is_noticed(tmp_path: Path, stream: int) -> None:
    """Prove the stand-in: with a mistake planted, some order gives another result."""
    path = write_slide(tmp_path / "slide.tif", random_pixels(200, 333))
    host = segment_slide(path, PlaceDependentEngine(), tmp_path / "host", ALL)
    wrong = 0
    for seed in range(5):
        device = HostDevice(seed, careless=stream, junk=0)
        careless = HostDeviceEngine(PlaceDependentEngine(), device)
        run = segment_slide(path, careless, tmp_path / "device", ALL)
        wrong += bool((results(run.folder)[0] != results(host.folder)[0]).any())
    assert wrong


def test_a_real_slide_and_a_real_network_agree(tmp_path: Path, wsi_slides: Path, tiny_bundle: Path) -> None:
    with open_slide(wsi_slides / "CMU-1-Small-Region.svs") as slide:
        pixels = slide.read(0, 700, 900, 500, 420)
    path = write_slide(tmp_path / "crop.tif", pixels[..., :3])
    engine = open_engine(tiny_bundle, backend="cpu", threads=1)
    options = Options(tissue=False, overlap_px=32, probabilities=True)
    for batch in (1, 3, 8):
        run = on_both(path, engine, tmp_path / str(batch), replace(options, batch=batch))
    assert run["device"]["batch"] == 8


def test_rows_are_uploaded_once(tmp_path: Path, engine: HostDeviceEngine) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(301, 217))
    run = to_json(segment_slide(path, engine, tmp_path, ALL).run)
    assert run["device"]["bytes_uploaded"] == 301 * 217 * 3
    device = engine.device
    assert isinstance(device, HostDevice)
    tiles, batches = run["grid"]["tiles_inferred"], run["grid"]["tiles_inferred"]
    assert device.launches["cut_tiles"] == device.launches["add_scores"] <= batches
    assert tiles == sum(engine.batches) - run["device"]["batch"]  # the warm-up


def test_reading_is_ahead_of_writing_by_one_row(tmp_path: Path, engine: HostDeviceEngine) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(150, 300))
    grid = TileGrid.cover(150, 300, tile_px=64, overlap_px=16)
    with open_slide(path) as slide:
        stream = open_stream(engine, grid, ALL, StageSeconds(), channels=3)
        assert isinstance(stream, DeviceStream)
        starts = []
        for row, (tiles, strip) in enumerate(read_strips(at_mpp(slide, 0.5), grid)):
            assert [tile for some in stream.feed(strip, tiles) for tile in some] == tiles
            starts.append([part.y for part in stream.finish_row(row)])
        starts.append([part.y for part in stream.drain()])
        stream.close()
        stream.close()
    assert starts == [[], *([y] for y in grid.ys)]


def test_the_memory_that_is_planned_is_the_memory_that_is_taken(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(301, 217))
    for probabilities in (False, True):
        engine = HostDeviceEngine(PlaceDependentEngine(), HostDevice())
        options = replace(ALL, probabilities=probabilities)
        run = to_json(segment_slide(path, engine, tmp_path, options).run)["device"]
        assert isinstance(engine.device, HostDevice)
        assert run["bytes_planned"] == engine.device.most
        engine.close()


def test_memory_does_not_grow_with_the_height_but_for_the_weights() -> None:
    plans = [
        plan_band(
            TileGrid.cover(3000, height, tile_px=64, overlap_px=16), CARD, channels=3, batch=4, probabilities=True
        )
        for height in (64 + 20 * 48, 64 + 200 * 48)
    ]
    assert replace(plans[0], windows=0) == replace(plans[1], windows=0)


def test_a_smaller_batch_is_run_where_memory_does_not_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(301, 217))
    host = segment_slide(path, PlaceDependentEngine(), tmp_path / "host", ALL)
    engine = HostDeviceEngine(PlaceDependentEngine(), HostDevice(), room=3)
    with caplog.at_level(logging.WARNING):
        run = segment_slide(path, engine, tmp_path / "device", replace(ALL, batch=16))
    engine.close()
    assert to_json(run.run)["device"]["batch"] == 2
    assert "16 tiles at once do not fit on the device, running 8" in caplog.text
    assert_same(results(host.folder), results(run.folder))


def test_more_tiles_than_the_engine_takes_are_not_asked_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, engine: HostDeviceEngine
) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(301, 217))
    run = segment_slide(path, engine, tmp_path, replace(ALL, batch=100))
    assert to_json(run.run)["device"]["batch"] == max(engine.batches) == 16
    assert "takes 16 tiles at once, not 100" in caplog.text


def test_a_device_that_is_too_small_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(301, 217))
    for total_bytes in (100_000, 400_000, 500_000):
        engine = HostDeviceEngine(PlaceDependentEngine(), HostDevice(total_bytes=total_bytes))
        with pytest.raises(DeviceMemoryError, match="bytes"):
            segment_slide(path, engine, tmp_path / "out", ALL)
        assert not (tmp_path / "out").exists()
        engine.close()  # finds memory that was not given back


def test_a_slide_that_breaks_midway_leaves_no_memory_behind(
    tmp_path: Path, engine: HostDeviceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(301, 217))

    def breaking(*_: Any, **__: Any) -> Iterator[Any]:
        with open_slide(path) as slide:
            grid = TileGrid.cover(301, 217, tile_px=64, overlap_px=16)
            yield from itertools.islice(read_strips(at_mpp(slide, 0.5), grid), 2)
        raise SlideError("planted")

    monkeypatch.setattr(band, "read_strips", breaking)
    with pytest.raises(SlideError, match="planted"):
        segment_slide(path, engine, tmp_path / "out", ALL)


def test_arrays_of_the_host_run_too(engine: HostDeviceEngine) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (11, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(engine.infer(tiles), PlaceDependentEngine().infer(tiles))
    with pytest.raises(ValueError, match="this model takes"):
        engine.infer(tiles[:, :32])


def test_an_engine_without_a_device_streams_through_the_host() -> None:
    grid = TileGrid.cover(100, 100, tile_px=64, overlap_px=16)
    stream = open_stream(IdentityEngine(), grid, ALL, StageSeconds(), channels=3)
    assert isinstance(stream, HostStream)

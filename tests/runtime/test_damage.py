"""Damaged blocks: left as background and listed, or the end of the slide with --strict."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from histostream.runtime.bundle.card import Scores
from histostream.runtime.options import Options
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.errors import DamagedError, SlideError
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, ClassInfo
from histostream.wsi.records import to_json
from histostream.wsi.slides.reader import open_slide
from tests.runtime.conftest import CARD, IdentityEngine, as_shares, random_pixels

ALL = Options(tissue=False, overlap_px=16, probabilities=True)
CLASSES = tuple(ClassInfo(n, (9, 9, 9)) for n in ("tumour", "background", "stroma"))
NAMED = replace(CARD, classes=CLASSES)


def write_compressed(path: Path, pixels: NDArray[np.uint8]) -> Path:
    tifffile.imwrite(
        path,
        pixels,
        tile=(64, 64),
        photometric="rgb",
        compression="zlib",
        resolution=(2e4, 2e4),
        resolutionunit="CENTIMETER",
    )
    return path


def damage(path: Path, tiles: Iterable[int]) -> None:
    """Overwrite tiles of level 0 with what no decoder takes."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        places = [(page.dataoffsets[i], page.databytecounts[i]) for i in tiles]
    with path.open("r+b") as handle:
        for offset, count in places:
            handle.seek(offset)
            handle.write(b"\xff" * count)


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return random_pixels(400, 300)


@pytest.fixture
def damaged(tmp_path: Path, pixels: NDArray[np.uint8]) -> Path:
    """Return a slide of 7 x 5 tiles; the tile in row 2 and column 3 is damaged."""
    path = write_compressed(tmp_path / "slide.tif", pixels)
    damage(path, [2 * 7 + 3])
    return path


def test_a_damaged_block_is_background_and_listed(
    damaged: Path, pixels: NDArray[np.uint8], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = segment_slide(damaged, IdentityEngine(NAMED), tmp_path / "out", ALL)
    labels = tifffile.imread(result.folder / "labels.tif", level=0)
    scores = tifffile.imread(result.folder / "probabilities.tif", level=0)
    hole = np.zeros(labels.shape, bool)
    hole[128:192, 192:256] = True
    assert (labels[hole] == 1).all()
    np.testing.assert_array_equal(labels[~hole], pixels.argmax(axis=-1)[~hole])
    np.testing.assert_array_equal(scores[~hole], as_shares(pixels[~hole]))
    np.testing.assert_array_equal(scores[hole], np.tile((0, 65535, 0), (64 * 64, 1)))
    box = {"level": 0, "x": 192, "y": 128, "width": 64, "height": 64}
    assert to_json(result.run)["damaged"] == [box]
    assert json.loads((result.folder / "run.json").read_text())["damaged"] == [box]
    assert "slide.tif" in caplog.text
    assert "run.json lists all such blocks" in caplog.text


def test_without_a_background_class_it_is_not_analysed(damaged: Path, tmp_path: Path) -> None:
    result = segment_slide(damaged, IdentityEngine(), tmp_path / "out", ALL)
    labels = tifffile.imread(result.folder / "labels.tif", level=0)
    assert (labels == NOT_ANALYSED).sum() == 64 * 64


def test_strict_stops_at_it(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"slide\.tif: block 3, 2 .* cannot be decoded"):
        segment_slide(damaged, IdentityEngine(), tmp_path / "out", replace(ALL, strict=True))
    assert not (tmp_path / "out").exists()


def test_a_coarser_view_leaves_out_what_the_block_touches(damaged: Path, tmp_path: Path) -> None:
    engine = IdentityEngine(replace(NAMED, mpp=1.5))
    result = segment_slide(damaged, engine, tmp_path / "out", ALL)
    labels = tifffile.imread(result.folder / "labels.tif", level=0)
    assert labels.shape == (100, 133)
    assert (labels[42:64, 64:86] == 1).all()  # 128/3 to 192/3, 192/3 to 256/3, outwards
    assert to_json(result.run)["damaged"][0]["x"] == 192


def test_damage_is_remembered_by_a_run_that_goes_on(damaged: Path, tmp_path: Path) -> None:
    class Failing(IdentityEngine):
        def infer(self, tiles: NDArray[np.uint8]) -> Scores:
            if self.tiles > 42:  # after the damaged row
                raise SlideError("planted")
            return super().infer(tiles)

    with pytest.raises(SlideError, match="planted"):
        segment_slide(damaged, Failing(NAMED), tmp_path / "broken", replace(ALL, batch=1))
    broken = segment_slide(damaged, IdentityEngine(NAMED), tmp_path / "broken", ALL)
    whole = segment_slide(damaged, IdentityEngine(NAMED), tmp_path / "whole", ALL)
    assert "resumed" in to_json(broken.run)
    assert to_json(broken.run)["damaged"] == to_json(whole.run)["damaged"]
    for name in ("labels.tif", "probabilities.tif"):
        assert (broken.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_slide_that_is_mostly_damaged_fails(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    path = write_compressed(tmp_path / "slide.tif", pixels)
    damage(path, range(30))
    with pytest.raises(SlideError, match="most of it cannot be decoded"):
        segment_slide(path, IdentityEngine(), tmp_path / "out", ALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["tiff", "large_image"])
def test_blocks_beside_a_damaged_one_are_still_read(damaged: Path, reader: str) -> None:
    with open_slide(damaged, reader=reader) as slide:
        width, height = slide.block_px[0]
        bad = good = 0
        for _ in range(2):
            for y in range(0, 300, height):
                for x in range(0, 400, width):
                    try:
                        slide.read(0, x, y, min(width, 400 - x), min(height, 300 - y))
                        good += 1
                    except DamagedError:
                        bad += 1
        assert bad == 2
        assert good == 2 * (-(-300 // height) * -(-400 // width) - 1)


def test_openslide_goes_on_after_a_damaged_block(wsi_slides: Path, tmp_path: Path) -> None:
    """OpenSlide refuses every block once one was damaged; threads share its handle."""
    from concurrent.futures import ThreadPoolExecutor

    source = wsi_slides / "CMU-1-Small-Region.svs"
    path = tmp_path / source.name
    path.write_bytes(source.read_bytes())
    damage(path, [20, 45, 70])
    with open_slide(path, reader="large_image") as slide:
        width, height = slide.block_px[0]
        level = slide.levels[0]
        places = [
            (x, y, min(width, level.width - x), min(height, level.height - y))
            for y in range(0, level.height, height)
            for x in range(0, level.width, width)
        ]

        def undamaged(place: tuple[int, int, int, int]) -> bool:
            try:
                slide.read(0, *place)
            except DamagedError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(undamaged, places))
    assert found.count(False) == 3


def test_a_file_that_vanishes_is_not_taken_for_damage(
    tmp_path: Path, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_compressed(tmp_path / "slide.tif", pixels)
    with open_slide(path, reader="large_image") as slide:
        damage(path, [0])
        path.unlink()
        with pytest.raises(SlideError, match="cannot be read any more") as caught:
            slide.read(0, 0, 0, 64, 64)
        assert not isinstance(caught.value, DamagedError)
    path = write_compressed(tmp_path / "slide.tif", pixels)
    with open_slide(path, reader="tiff") as slide:

        def stale(*_: object) -> bytes:
            raise OSError(errno.ESTALE, "Stale file handle")

        monkeypatch.setattr(os, "pread", stale)
        with pytest.raises(SlideError, match="cannot be read any more") as gone:
            slide.read(0, 0, 0, 64, 64)
        assert not isinstance(gone.value, DamagedError)


def test_the_exit_status_says_that_a_slide_has_damaged_places(damaged: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        line = [
            sys.executable,
            "-m",
            "histostream.runtime.cli",
            str(damaged),
            "--model",
            str(tiny_bundle),
            "--out",
            str(tmp_path / "out"),
            "--no-tissue",
            *more,
        ]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 3, done.stderr
    assert "1 damaged block, left as background; run.json lists them" in done.stderr
    assert (tmp_path / "out" / "slide" / "labels.tif").exists()
    again = run()
    assert again.returncode == 3
    assert "done before, with 1 damaged block, left as background" in again.stdout
    strict = run("--strict", "--restart")
    assert strict.returncode == 1
    assert "cannot be decoded" in strict.stderr
    assert "Traceback" not in done.stderr + strict.stderr

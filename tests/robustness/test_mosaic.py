"""The mosaic: an ordinary slide for every reader, and next to nothing on the disk."""

from __future__ import annotations

import itertools
from pathlib import Path

import large_image
import numpy as np
import openslide
import pytest
import tifffile
from click.testing import CliRunner

from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.tissue import find_tissue
from tests.robustness.mosaic import PATCH_PX, PATCHES, Mosaic, main

SIZE = (9000, 5000)  # not whole tiles, nor whole patches


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mosaic") / "mosaic.tif"
    Mosaic(*SIZE, tissue=0.4, seed=3).write(path, tile_px=256)
    return path


@pytest.mark.full
def test_every_reader_sees_the_same_slide(slide: Path) -> None:
    with open_slide(slide, reader="tiff") as ours, openslide.OpenSlide(slide) as theirs:
        assert [(v.width, v.height) for v in ours.levels] == list(theirs.level_dimensions)
        assert ours.levels[0].width == SIZE[0]
        assert max(theirs.level_dimensions[-1]) <= 256
        assert ours.mpp == pytest.approx(0.5)
        assert float(theirs.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        for level, (width, height) in enumerate(theirs.level_dimensions):
            size = min(width, 700), min(height, 700)
            x, y = (a - b for a, b in zip((width, height), size, strict=True))
            place = x << level, y << level
            seen = np.asarray(theirs.read_region(place, level, size))[..., :3]
            np.testing.assert_array_equal(ours.read(level, x, y, *size), seen)
    assert large_image.open(str(slide)).getMetadata()["sizeX"] == SIZE[0]


@pytest.mark.full
def test_a_lower_level_is_the_average_of_the_one_above(slide: Path) -> None:
    with tifffile.TiffFile(slide) as file:
        levels = [page.asarray().astype(np.float32) for page in file.pages]
    for above, below in itertools.pairwise(levels):
        height, width = (side // 2 for side in above.shape[:2])
        means = above[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
        # Both sides are as JPEG left them.
        assert np.abs(below[:height, :width] - means).mean() < 4


@pytest.mark.full
def test_tissue_lies_where_the_patches_are(slide: Path) -> None:
    patches = Mosaic(*SIZE, tissue=0.4, seed=3).patches()
    assert patches.shape == (3, 5)
    assert (patches >= 0).sum() == 6
    assert patches.max() < PATCHES
    with open_slide(slide) as opened:
        for (row, column), patch in np.ndenumerate(patches):
            box = opened.read(0, column * PATCH_PX, row * PATCH_PX, 512, 512)
            assert (box.min() < 150) == (patch >= 0)
            assert patch >= 0 or np.ptp(box, axis=(0, 1)).max() == 0


@pytest.mark.full
def test_a_slide_can_be_all_tissue(tmp_path: Path) -> None:
    path = tmp_path / "tissue.tif"
    Mosaic(5000, 2500).write(path)
    with open_slide(path) as opened:
        view = at_mpp(opened, 0.5)
        grid = TileGrid.cover(view.width, view.height, tile_px=512, overlap_px=64)
        assert find_tissue(view).tiles(grid).all()


@pytest.mark.parametrize("size", [(1, 1), (257, 40), (300, 5000)])
def test_small_and_odd_slides_can_be_read(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "odd.tif"
    Mosaic(*size, tissue=0).write(path, tile_px=256)
    with open_slide(path) as opened:
        for level, found in enumerate(opened.levels):
            assert np.ptp(opened.read(level, 0, 0, found.width, found.height), (0, 1)).max() == 0
        assert (opened.levels[0].width, opened.levels[0].height) == size


def test_tiles_that_are_the_same_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    Mosaic(100_000, 100_000, tissue=0).write(path)
    with tifffile.TiffFile(path) as file:
        places = [set(page.aspage().dataoffsets) for page in file.pages]
        assert len(file.pages[0].aspage().dataoffsets) == 196**2
    assert all(len(place) == 1 for place in places)
    assert path.stat().st_size < 1_000_000


@pytest.mark.full
def test_a_slide_follows_from_its_seed(slide: Path, tmp_path: Path) -> None:
    again, other = (Mosaic(*SIZE, tissue=0.4, seed=seed) for seed in (3, 4))
    again.write(tmp_path / "again.tif", tile_px=256)
    assert (tmp_path / "again.tif").read_bytes() == slide.read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "again.tif"]
    assert (again.patches() != other.patches()).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tissue", "2"], "tissue=2.0 is not a share of the area: use 0 to 1"),
        (["--size", "0x5"], "0 x 5 px has no pixels"),
        (["--size", "big"], "'big' is not a size"),
        (["--tile-px", "300"], "tile_px=300: use a power of two"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(main, [str(tmp_path / "x.tif"), *arguments])
    assert done.exit_code != 0
    assert words in done.output
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    done = CliRunner().invoke(main, [str(path), "--size", "3000x2000", "--tissue", "0"])
    assert done.output.startswith(f"{path}: 3000 x 2000 px, ")

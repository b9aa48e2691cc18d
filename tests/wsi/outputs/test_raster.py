"""A raster on disk is indexed as the array that was written."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from histostream.wsi.errors import SlideError
from histostream.wsi.outputs.folder import OutputFolder
from histostream.wsi.outputs.label_rows import ClassInfo, LabelRows, SlideInfo
from histostream.wsi.outputs.raster import Raster
from histostream.wsi.outputs.sinks.tiff import LabelTiff, ProbabilityTiff
from histostream.wsi.synthetic import SyntheticSlide

HEIGHT, WIDTH = 1501, 2203
CLASSES = tuple(ClassInfo(name, (9, 9, i)) for i, name in enumerate("abc"))
RNG = np.random.default_rng(0)
LABELS = np.kron(RNG.integers(0, 3, (-(-HEIGHT // 5), -(-WIDTH // 5)), np.uint8), np.ones((5, 5), np.uint8))[
    :HEIGHT, :WIDTH
]
SCORES = RNG.integers(0, 65536, (HEIGHT, WIDTH, 3), np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    info = SlideInfo("slide", WIDTH, HEIGHT, 0.5, CLASSES)
    with OutputFolder(tmp_path_factory.mktemp("raster"), "slide") as out:
        out.add(LabelTiff(out.path / "labels.tif", info))
        out.add(ProbabilityTiff(out.path / "probabilities.tif", info))
        out.write(LabelRows(0, 0, LABELS, SCORES))
    return out.path


@pytest.fixture(scope="module")
def labels(folder: Path) -> Iterator[Raster]:
    with Raster(folder / "labels.tif") as raster:
        yield raster


@pytest.fixture(scope="module")
def scores(folder: Path) -> Iterator[Raster]:
    with Raster(folder / "probabilities.tif") as raster:
        yield raster


def places(size: int) -> st.SearchStrategy[int | slice]:
    edge = st.none() | st.integers(-size - 9, size + 9)
    step = st.none() | st.sampled_from([1, 2, 3, 4, 6, 8, 64, 4096])
    return st.builds(slice, edge, edge, step) | st.integers(-size, size - 1)


@settings(max_examples=80, deadline=None)
@given(places(HEIGHT), places(WIDTH))
def test_labels_are_indexed_as_an_array(labels: Raster, rows: int | slice, columns: int | slice) -> None:
    np.testing.assert_array_equal(labels[rows, columns], LABELS[rows, columns])


@settings(max_examples=40, deadline=None)
@given(places(HEIGHT), places(WIDTH), places(3))
def test_scores_are_indexed_as_an_array(
    scores: Raster, rows: int | slice, columns: int | slice, classes: int | slice
) -> None:
    np.testing.assert_array_equal(scores[rows, columns, classes], SCORES[rows, columns, classes])


def test_the_whole_is_an_array(labels: Raster, scores: Raster) -> None:
    np.testing.assert_array_equal(np.asarray(labels), LABELS)
    np.testing.assert_array_equal(np.asarray(scores), SCORES)
    assert (labels.shape, labels.ndim, len(labels)) == (LABELS.shape, 2, HEIGHT)
    assert (scores.shape, scores.ndim) == (SCORES.shape, 3)
    assert scores.dtype == SCORES.dtype
    assert labels.mpp == pytest.approx(0.5)
    assert labels.levels == ((1501, 2203), (751, 1102), (376, 551), (188, 276))
    assert (np.asarray(labels, np.float32) == LABELS).all()
    np.testing.assert_array_equal(labels[7], LABELS[7])


def test_a_few_pixels_read_a_few_tiles(folder: Path) -> None:
    with Raster(folder / "labels.tif") as labels:
        labels[600:700, 600:700]
        assert labels._reader.decoded_blocks == 1
        labels[::8, ::8]
        assert labels._reader.decoded_blocks == 2


def test_threads_may_share_it(labels: Raster) -> None:
    rows = range(0, HEIGHT, 50)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda y: labels[y : y + 50], rows)
    np.testing.assert_array_equal(np.concatenate(list(found)), LABELS)


@pytest.mark.parametrize("index", [HEIGHT, -HEIGHT - 1, (0, WIDTH), (0, 0, 0), slice(None, None, -1)])
def test_places_that_are_not_there_are_refused(labels: Raster, index: int) -> None:
    with pytest.raises(IndexError):
        labels[index]


def test_other_files_are_refused(tmp_path: Path) -> None:
    SyntheticSlide(600, 600, seed=1).write(tmp_path / "slide.tif")
    (tmp_path / "text.tif").write_text("none")
    for name, said in {
        "slide.tif": "no label map or scores",
        "text.tif": "not a TIFF",
        "none.tif": "check its name",
    }.items():
        with pytest.raises(SlideError, match=said):
            Raster(tmp_path / name)


def test_scores_of_versions_before_0_2_are_bytes(tmp_path: Path) -> None:
    scores = (SCORES[:600, :700] >> 8).astype(np.uint8)
    path = tmp_path / "probabilities.tif"
    tags: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": [0, 0]}
    tifffile.imwrite(path, scores, tile=(512, 512), compression="adobe_deflate", **tags)
    with Raster(path) as raster:
        assert raster.dtype == np.uint8
        np.testing.assert_array_equal(raster[:], scores)

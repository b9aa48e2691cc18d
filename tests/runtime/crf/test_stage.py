"""Laws of the CRF in the stream: its labels are those of the whole slide at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from histostream.runtime import slide_run as infer
from histostream.runtime.crf import CrfError, CrfParams, dense_crf
from histostream.runtime.crf import options as crf_options
from histostream.runtime.crf.options import CrfOptions, check_memory, read_params
from histostream.runtime.crf.stage import to_probabilities
from histostream.runtime.options import Options
from histostream.runtime.process_memory import MemoryLimitError
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.outputs.label_rows import NOT_ANALYSED
from histostream.wsi.records import to_json
from tests.runtime.conftest import as_shares, identity_engine, write_slide
from tests.runtime.test_cli import infer as run_infer
from tests.runtime.test_cli import one_clear_line

pytestmark = pytest.mark.full

pytest.importorskip("numba", reason="numba is not installed")

PARAMS = CrfParams(w1=4.0, theta_alpha=6.0, theta_beta=20.0, w2=1.0, theta_gamma=2.0)
CRF = CrfOptions(PARAMS)
PLAIN = Options(tissue=False, overlap_px=16)


def tissue_like(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth regions of three colours with grain; they are the scores too."""
    rng = np.random.default_rng(seed)
    smooth = np.stack([gaussian_filter(rng.normal(size=(height, width)), 7) for _ in range(3)], -1)
    pixels = 128 + 60 * smooth / smooth.std() + rng.normal(0, 25, smooth.shape)
    return np.asarray(np.clip(pixels, 0, 255), np.uint8)


def whole(pixels: NDArray[np.uint8], params: CrfParams = PARAMS) -> NDArray[np.intp]:
    """Return what the CRF says of a slide at once; the identity's scores are the pixels."""
    p = to_probabilities(as_shares(pixels), np.zeros(pixels.shape[:2], bool))
    return np.asarray(dense_crf(pixels, p, params).argmax(axis=0))


def labels_of(folder: Path) -> NDArray[np.uint8]:
    return np.asarray(tifffile.imread(folder / "labels.tif", level=0))


@pytest.fixture
def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crf_options, "MIN_CELL_PX", 128)
    monkeypatch.setattr(crf_options, "CELL_ALIGN_PX", 64)


@pytest.mark.usefixtures("small_cells")
def test_the_stream_is_the_whole_slide_at_once(tmp_path: Path) -> None:
    pixels = tissue_like(330, 270)
    path = write_slide(tmp_path / "slide.tif", pixels)
    options = replace(PLAIN, crf=CRF, probabilities=True)
    result = segment_slide(path, identity_engine(), tmp_path / "out", options)
    found, wanted = labels_of(result.folder), whole(pixels)
    assert CRF.cell_px == 128
    assert (found == wanted).mean() >= 0.9999
    borders = np.zeros(found.shape, bool)
    for edge in range(128, 330, 128):
        borders[max(edge - 2, 0) : edge + 2] = True
        borders[:, edge - 2 : edge + 2] = True
    assert (found == wanted)[borders].mean() >= 0.9999
    assert (wanted != pixels.argmax(axis=-1)).mean() > 0.02  # it does something
    scores = tifffile.imread(result.folder / "probabilities.tif", level=0)
    np.testing.assert_array_equal(scores, as_shares(pixels))  # the network's own
    said = to_json(result.run)["crf"]
    assert said == {"halo_px": 30, "cell_px": 128, "cells": 9, "cells_skipped": 0}
    assert to_json(result.run)["options"]["crf"]["params"]["theta_alpha"] == 6.0
    assert to_json(result.run)["seconds"]["crf"] > 0
    json.dumps(to_json(result.run))


@pytest.mark.usefixtures("small_cells")
def test_cells_without_a_halo_differ_from_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law above can fail."""
    pixels = tissue_like(330, 270)
    path = write_slide(tmp_path / "slide.tif", pixels)
    monkeypatch.setattr(CrfOptions, "halo_px", 0)
    result = segment_slide(path, identity_engine(), tmp_path / "out", replace(PLAIN, crf=CRF))
    assert (labels_of(result.folder) == whole(pixels)).mean() < 0.9999


@pytest.mark.usefixtures("small_cells")
def test_labels_do_not_depend_on_bands_batch_or_rows_of_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = tissue_like(1100, 150, seed=1)
    path = write_slide(tmp_path / "wide.tif", pixels)
    options = replace(PLAIN, crf=CRF)
    plain = segment_slide(path, identity_engine(), tmp_path / "plain", options)
    bands = [(0, 512), (512, 1024), (1024, 1100)]
    monkeypatch.setattr(infer, "plan_bands", lambda *_, **__: bands)
    banded = segment_slide(path, identity_engine(tile_px=96), tmp_path / "banded", replace(options, batch=1))
    assert to_json(banded.run)["grid"]["column_bands"] == 3
    np.testing.assert_array_equal(labels_of(banded.folder), labels_of(plain.folder))


@pytest.mark.usefixtures("small_cells")
def test_a_bound_on_memory_makes_bands_of_whole_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = tissue_like(1300, 200, seed=2)
    path = write_slide(tmp_path / "wide.tif", pixels)
    monkeypatch.setattr(crf_options, "CELL_ALIGN_PX", 512)
    engine = identity_engine()
    needs = CRF.needs(3, 3, engine.card.tile_px)
    assert (needs.align_px, needs.margin_px) == (512, 30)
    seen = {}

    def planned(*given: object, **how: object) -> list[tuple[int, int]]:
        seen.update(how)
        return [(0, 512), (512, 1300)]

    monkeypatch.setattr(infer, "plan_bands", planned)
    segment_slide(path, engine, tmp_path / "out", replace(PLAIN, crf=CRF, max_memory_mib=4000))
    assert seen["needs"] == needs
    assert seen["probabilities"]  # they wait for their halo


@pytest.mark.usefixtures("small_cells")
def test_only_uncertain_pixels_change_and_sure_cells_are_skipped(tmp_path: Path) -> None:
    pixels = tissue_like(300, 300, seed=3)
    pixels[:, :140] = (250, 5, 5)  # as sure as can be
    path = write_slide(tmp_path / "slide.tif", pixels)
    options = replace(PLAIN, crf=CrfOptions(PARAMS, uncertain=0.2))
    result = segment_slide(path, identity_engine(), tmp_path / "out", options)
    found, before, wanted = labels_of(result.folder), pixels.argmax(axis=-1), whole(pixels)
    best = np.sort(pixels.astype(int), axis=-1)
    free = best[..., 2] - best[..., 1] < 0.2 * 256
    np.testing.assert_array_equal(found[~free], before[~free])
    assert (found[free] == wanted[free]).mean() >= 0.9999
    assert (wanted[~free] != before[~free]).any()  # some would have changed
    assert to_json(result.run)["crf"]["cells_skipped"] == 3
    assert to_json(result.run)["crf"]["cells"] == 6


@pytest.mark.usefixtures("small_cells")
def test_glass_stays_outside_and_its_cells_are_not_run(tmp_path: Path) -> None:
    pixels = tissue_like(600, 300, seed=4)
    pixels[..., 1] //= 3  # purple
    pixels[:, 250:] = 245
    path = write_slide(tmp_path / "slide.tif", pixels)
    bare = segment_slide(path, identity_engine(), tmp_path / "bare", Options(overlap_px=16))
    crf = segment_slide(path, identity_engine(), tmp_path / "crf", Options(overlap_px=16, crf=CRF))
    outside = labels_of(bare.folder) == NOT_ANALYSED
    assert 0.2 < outside.mean() < 0.8
    np.testing.assert_array_equal(labels_of(crf.folder) == NOT_ANALYSED, outside)
    assert to_json(crf.run)["crf"]["cells_skipped"] > 0
    assert to_json(crf.run)["crf"]["cells"] > 0


def test_scores_become_probabilities() -> None:
    scores = np.array([[[65535, 0], [0, 0], [30000, 10000], [1, 1]]], np.uint16)
    outside = np.array([[False, False, False, True]])
    p = to_probabilities(scores, outside)
    np.testing.assert_allclose(p[:, 0], [[1, 0.5, 0.75, 0.5], [0, 0.5, 0.25, 0.5]])


# ----------------------------------------------------------------------------- options


def test_parameters_are_read_over_those_of_the_card() -> None:
    assert read_params("", {}, mpp=0.5) == CrfParams()
    stored = {"w1": 2.5, "theta_alpha": 12.0, "n_iter": 3}
    assert read_params("", stored, mpp=0.5) == CrfParams(w1=2.5, theta_alpha=12.0, n_iter=3)
    given = read_params("w1=7, theta_alpha=10um,theta_gamma=4px,n_iter=2", stored, mpp=0.5)
    assert given == CrfParams(w1=7.0, theta_alpha=20.0, theta_gamma=4.0, n_iter=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("theta_alfa=3", "no parameter 'theta_alfa'; did you mean theta_alpha"),
        ("zzz=3", "no parameter 'zzz'; use w1, theta_alpha"),
        ("w1", "'w1': write w1=VALUE"),
        ("w1=much", "w1='much': give a number"),
        ("theta_beta=3um", "theta_beta='3um': give a number"),
        ("theta_alpha=3mm", "theta_alpha='3mm': give a number, optionally with px or um"),
        ("theta_alpha=-1", "theta_alpha=-1.0"),
        ("w1=nan", "w1=nan"),
        ("n_iter=0", "n_iter=0"),
        ("n_iter=2.5", "n_iter=2.5"),
    ],
)
def test_a_wrong_parameter_is_named(text: str, said: str) -> None:
    with pytest.raises(CrfError, match=said):
        read_params(text, {}, mpp=0.5)


@pytest.mark.parametrize("stored", [{"w3": 1.0}, {"w1": "5"}, {"w1": True}, {"theta_beta": None}])
def test_a_card_is_not_trusted(stored: dict[str, object]) -> None:
    with pytest.raises(CrfError, match="card: crf"):
        read_params("", stored, mpp=0.5)


def test_a_halo_that_does_not_fit_in_memory_is_refused() -> None:
    wide = CrfOptions(replace(PARAMS, theta_alpha=1000.0))
    with pytest.raises(MemoryLimitError, match="theta of 1000 px needs a halo of 5000 px"):
        check_memory(wide, 3, 4000)
    check_memory(CRF, 3, 4000)
    with pytest.raises(CrfError, match=r"--crf-uncertain 0\.0: use more than 0"):
        CrfOptions(uncertain=0.0)


def test_the_command_refines_a_slide(tmp_path: Path, tiny_bundle: Path) -> None:
    path = write_slide(tmp_path / "slide.tif", tissue_like(300, 280, seed=5))
    plain = run_infer(path, "--model", tiny_bundle, "--out", tmp_path / "a", "--no-tissue")
    assert plain.returncode == 0, plain.stderr
    given = [path, "--model", tiny_bundle, "--no-tissue", "--crf"]
    done = run_infer(*given, "--out", tmp_path / "b", "--crf-params", "w1=6,theta_alpha=2um,theta_beta=30")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "b" / "slide" / "run.json").read_text())
    assert run["options"]["crf"]["params"]["theta_alpha"] == 4.0  # 2 um at 0.5 um/px
    labels = [labels_of(tmp_path / name / "slide") for name in "ab"]
    assert (labels[0] != labels[1]).any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--crf", "--crf-params", "theta_alpha=-3"], "theta_alpha=-3.0"),
        (["--crf", "--crf-uncertain", "2"], "--crf-uncertain 2.0"),
        (["--crf-params", "w1=3"], "have no effect without --crf: add --crf"),
        (["--crf", "--crf-params", "theta_alpha=100000"], "use a smaller theta"),
    ],
)
def test_a_wrong_option_stops_before_any_work(tmp_path: Path, tiny_bundle: Path, options: list[str], said: str) -> None:
    path = write_slide(tmp_path / "slide.tif", tissue_like(90, 80))
    given = [path, "--model", tiny_bundle, "--out", tmp_path / "out", "--no-tissue"]
    done = run_infer(*given, *options)
    assert said in one_clear_line(done)
    assert not list((tmp_path / "out").glob("*/labels.tif"))

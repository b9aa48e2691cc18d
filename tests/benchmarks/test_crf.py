from __future__ import annotations

import numpy as np
import pytest

from histostream.benchmarks.crf import TILE_PX, TISSUE, make_input, run_reference, run_uncertain, uncertain_tiles
from histostream.runtime.crf import CrfParams, dense_crf

pytestmark = pytest.mark.full

SIDE = 3 * TILE_PX


def test_only_tiles_that_the_network_is_unsure_of_are_run() -> None:
    pytest.importorskip("numba", reason="the lattice needs numba")
    image, scores = make_input(TISSUE, SIDE, 2, 0)
    assert list(uncertain_tiles(scores)) == []
    params = CrfParams(theta_alpha=8)
    np.testing.assert_array_equal(run_uncertain(image, scores, params), scores)

    box = np.s_[TILE_PX : 2 * TILE_PX, 2 * TILE_PX : SIDE]
    scores[:, *box] = make_input(TISSUE, SIDE, 2, 1.5)[1][:, *box]
    assert list(uncertain_tiles(scores)) == [(TILE_PX, 2 * TILE_PX)]
    found = run_uncertain(image, scores, params)
    whole = dense_crf(image, scores, params, backend="lattice")
    assert (found[:, *box].argmax(0) == whole[:, *box].argmax(0)).mean() >= 0.9999
    found[:, *box] = scores[:, *box]
    np.testing.assert_array_equal(found, scores)


def test_the_reference_runs_the_same_model() -> None:
    pytest.importorskip("pydensecrf.densecrf", reason="pip install pydensecrf2")
    image, scores = make_input(TISSUE, 48, 3, 1.5)
    params = CrfParams(theta_alpha=20)
    wanted = dense_crf(image, scores, params, backend="exact")
    found = run_reference(image, scores, params)
    assert (found.argmax(0) == wanted.argmax(0)).mean() >= 0.985
    assert (scores.argmax(0) == wanted.argmax(0)).mean() < 0.97

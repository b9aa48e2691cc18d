"""The dense CRF: laws of the model, and every backend against all pairs of pixels.

The images are synthetic tissue; on real slides the backends may differ more, or less.
Not asserted: that the CRF improves a segmentation (a matter of the network and the weights).
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from histostream.runtime.crf import CrfError, CrfParams, dense_crf, exact
from histostream.runtime.crf.gaussian import Smoothness
from histostream.runtime.crf.softmax import softmax
from histostream.wsi.errors import HistoError
from histostream.wsi.optional import install_command
from histostream.wsi.synthetic import SyntheticSlide

SLIDE = SyntheticSlide(4096, 4096, seed=1)
CASES = [
    (2, CrfParams(w1=10, theta_alpha=60)),
    (3, CrfParams(w1=4, theta_alpha=10)),
    (3, CrfParams(w1=10, theta_alpha=20, theta_beta=20)),
]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@pytest.fixture(autouse=True)
def lattice_or_skip(request: pytest.FixtureRequest) -> None:
    if "lattice" in request.node.name:
        pytest.importorskip("numba", reason="the lattice needs numba, of the extra crf")


def tissue(height: int, width: int, classes: int, *, x: int = 3500, y: int = 300) -> tuple[Bytes, Floats]:
    """Synthetic tissue, and probabilities of its nuclei (and grey levels) under noise."""
    image, nuclei = SLIDE.region(x, y, width, height)
    labels = np.minimum(nuclei + (image[..., 0] // 64 if classes > 2 else 0), classes - 1)
    noise = np.random.default_rng(0).normal(0, 1.5, (classes, height, width))
    logits = 1.5 * np.eye(classes)[labels].transpose(2, 0, 1) + noise
    return image, np.ascontiguousarray(softmax(logits, axis=0), np.float32)


def energies(scores: Floats) -> Floats:
    return np.asarray(np.log(np.clip(scores, 1e-5, 1)), np.float32)


def agreement(a: Floats, b: Floats) -> float:
    return float((a.argmax(axis=0) == b.argmax(axis=0)).mean())


# ----------------------------------------------------------------------------- against all pairs


@pytest.mark.parametrize(("classes", "params"), CASES)
def test_the_lattice_is_near_all_pairs(classes: int, params: CrfParams) -> None:
    image, scores = tissue(40, 40, classes)
    wanted = dense_crf(image, scores, params, backend="exact")
    assert agreement(wanted, scores) < 0.97  # the CRF has something to do
    found = dense_crf(image, scores, params, backend="lattice")
    assert np.abs(found - wanted).mean() < 0.01
    assert agreement(found, wanted) >= 0.985


@pytest.mark.parametrize(("classes", "params"), CASES)
def test_the_separable_smoothness_kernel_is_that_of_all_pairs(classes: int, params: CrfParams) -> None:
    image, scores = tissue(40, 40, classes)
    only = replace(params, w1=0)
    found, wanted = (dense_crf(image, scores, only, backend=b) for b in ("auto", "exact"))
    assert np.abs(found - wanted).max() < 1e-3
    # And beside the appearance kernel, of all pairs in both.
    planes = energies(scores)
    appearance = exact.pair_kernels(image, replace(params, w2=0))[0]
    smoothness = Smoothness(params.theta_gamma, (40, 40))
    q = softmax(planes, axis=0)
    for _ in range(params.n_iter):
        near = appearance(q.reshape(classes, -1).T.astype(np.float64)).T.reshape(q.shape)
        q = softmax(planes + near + params.w2 * smoothness.filter(q), axis=0)
    assert np.abs(q - dense_crf(image, scores, params, backend="exact")).max() < 1e-3


def test_the_lattice_has_one_distance_between_levels_of_grey() -> None:
    image, scores = tissue(40, 40, 2)
    grey = np.ascontiguousarray(image[..., 1:2])
    params = CrfParams(w1=8, theta_alpha=15)
    wanted = dense_crf(grey, scores, params, backend="exact")
    assert agreement(dense_crf(grey, scores, params, backend="lattice"), wanted) >= 0.985
    # Three equal channels are farther apart: this would not be the same.
    colour = np.repeat(grey, 3, axis=2)
    assert np.abs(dense_crf(colour, scores, params, backend="exact") - wanted).max() > 0.01


# At theta_alpha = 10 some rows lie on borders of simplices, where the reference's float32 places
# fall to either side, and make vertices of weight 0 that ours do not: 1 value in 1000 differs.
@pytest.mark.parametrize(("theta_alpha", "classes"), [(13.7, 3), (60, 2), (60, 3)])
def test_the_lattice_is_that_of_the_reference_code(theta_alpha: float, classes: int) -> None:
    densecrf = pytest.importorskip(
        "pydensecrf.densecrf", reason="the reference code is not here: pip install pydensecrf2"
    )
    image, scores = tissue(90, 140, classes)
    # The reference smooths on a lattice too, which is less exact: so the appearance kernel alone.
    params = CrfParams(w1=8, theta_alpha=theta_alpha, w2=0)
    reference = densecrf.DenseCRF2D(140, 90, classes)
    reference.setUnaryEnergy(np.ascontiguousarray(-energies(scores).reshape(classes, -1)))
    reference.addPairwiseBilateral(
        sxy=theta_alpha, srgb=params.theta_beta, rgbim=np.ascontiguousarray(image), compat=params.w1
    )
    wanted = np.array(reference.inference(params.n_iter)).reshape(scores.shape)
    found = dense_crf(image, scores, params, backend="lattice")
    assert np.abs(found - wanted).max() < 1e-3
    assert agreement(found, scores) < 0.97


# ----------------------------------------------------------------------------- analytic laws


@pytest.mark.parametrize("backend", ["exact", "lattice"])
def test_without_weights_the_probabilities_come_back(backend: str) -> None:
    image, scores = tissue(20, 30, 3)
    found = dense_crf(image, scores, CrfParams(w1=0, w2=0), backend=backend)
    np.testing.assert_allclose(found, scores, atol=2e-5)


@pytest.mark.parametrize("backend", ["exact", "lattice"])
def test_equal_probabilities_stay_equal(backend: str) -> None:
    image, _ = tissue(30, 30, 3)
    found = dense_crf(image, np.full((3, 30, 30), 1 / 3), CrfParams(), backend=backend)
    np.testing.assert_allclose(found, 1 / 3, atol=2e-5)


@pytest.mark.parametrize("backend", ["exact", "lattice"])
def test_a_plain_image_is_filtered_by_place_alone(backend: str) -> None:
    _, scores = tissue(40, 40, 2)
    image = np.full((40, 40, 3), 97, np.uint8)
    params = CrfParams(w1=2, theta_alpha=6, w2=0, n_iter=1)
    planes = energies(scores)
    message = 2 * Smoothness(6, (40, 40)).filter(softmax(planes, axis=0))
    wanted = softmax(planes + message, axis=0)
    found = dense_crf(image, scores, params, backend=backend)
    # The lattice's Gaussian is a piecewise linear one.
    assert np.abs(found - wanted).max() < (0.03 if backend == "lattice" else 2e-3)


@pytest.mark.parametrize("backend", ["exact", "lattice"])
def test_probabilities_sum_to_one(backend: str) -> None:
    image, scores = tissue(37, 70, 3)
    scores = (255 * scores).astype(np.uint8)
    found = dense_crf(image, scores, CrfParams(), backend=backend)
    assert found.dtype == np.float32
    assert found.shape == scores.shape
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("backend", ["exact", "lattice"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 130), (129, 1), (64, 65)])
def test_any_size_of_image_will_do(backend: str, shape: tuple[int, int]) -> None:
    image, scores = tissue(*shape, 2)
    params = CrfParams(w1=2, theta_alpha=20, theta_beta=40, theta_gamma=40)
    found = dense_crf(image, scores, params, backend=backend)
    np.testing.assert_allclose(found, dense_crf(image, scores, params, backend="exact"), atol=0.15)


@pytest.mark.parametrize("backend", ["exact", "lattice"])
def test_classes_may_come_in_any_order(backend: str) -> None:
    image, scores = tissue(24, 31, 3)
    params, order = CrfParams(w1=8, theta_alpha=15), [2, 0, 1]
    found = dense_crf(image, scores[order], params, backend=backend)
    wanted = dense_crf(image, scores, params, backend=backend)[order]
    np.testing.assert_allclose(found, wanted, atol=1e-6 if backend == "exact" else 1e-4)


@pytest.mark.parametrize("turn", [np.s_[:, ::-1], np.s_[::-1]], ids=["left-right", "top-bottom"])
def test_a_flipped_image_has_the_flipped_result(turn: Any) -> None:
    image, scores = tissue(24, 31, 2)
    params = CrfParams(w1=8, theta_alpha=15)
    flipped = np.stack([plane[turn] for plane in scores])
    found = dense_crf(np.ascontiguousarray(image[turn]), flipped, params, backend="exact")
    wanted = dense_crf(image, scores, params, backend="exact")
    np.testing.assert_allclose(found, np.stack([plane[turn] for plane in wanted]), atol=1e-6)


@pytest.mark.parametrize("backend", ["exact", "lattice"])
def test_a_lone_pixel_vanishes_and_a_square_stays(backend: str) -> None:
    image = np.full((40, 40, 3), (225, 180, 205), np.uint8)
    image[20:30, 20:30] = (90, 60, 140)
    nucleus = np.full((40, 40), 0.2)
    nucleus[8, 8] = nucleus[20:30, 20:30] = 0.8
    params = CrfParams(w1=5, theta_alpha=15)
    found = dense_crf(image, np.stack([1 - nucleus, nucleus]), params, backend=backend)[1] > 0.5
    assert not found[8, 8]
    assert found[20:30, 20:30].mean() >= 0.95


# ----------------------------------------------------------------------------- operators


def lattice_filter(image: Bytes, theta_alpha: float) -> Any:
    from histostream.runtime.crf import lattice, permutohedral

    built = lattice.build(image, CrfParams(theta_alpha=theta_alpha), (0, 0))
    lattice.normalise(built)

    def run(plane: NDArray[Any]) -> NDArray[Any]:
        """Filter by weights that carry the plane: splat_ones adds weight times one."""
        carried = built.weights.copy()
        permutohedral.scale(carried, plane.astype(np.float32))
        splat = permutohedral.splat_ones(carried, built.slots, built.starts, built.shape)
        values, spare = (lattice._vertex_values(built, 1) for _ in range(2))
        out = np.empty(built.shape, np.float32)
        permutohedral.slice_ones(
            lattice._blurred(built, splat, values, spare),
            built.vertex_of,
            built.weights,
            built.slots,
            built.starts,
            out,
        )
        return out * permutohedral.ALPHA

    return run


def exact_filter(image: Bytes, theta_alpha: float) -> Any:
    (kernel,) = exact.pair_kernels(image, CrfParams(w1=1, theta_alpha=theta_alpha, w2=0))
    return lambda plane: kernel(plane.reshape(-1, 1)).reshape(plane.shape)


# The lattice's blurs along its axes do not commute where vertices are missing.
@pytest.mark.parametrize(
    ("make", "tolerance"),
    [(exact_filter, 1e-12), (lattice_filter, 1e-2)],
)
@pytest.mark.parametrize("theta_alpha", [10, 30])
def test_the_appearance_filter_is_symmetric_and_never_negative(make: Any, tolerance: float, theta_alpha: float) -> None:
    run = make(tissue(40, 33, 2)[0], theta_alpha)
    rng = np.random.default_rng(3)
    for _ in range(5):
        u, v = rng.normal(size=(2, 40, 33))
        norm = np.linalg.norm(u) * np.linalg.norm(v)
        assert abs((run(u) * v).sum() - (u * run(v)).sum()) <= tolerance * norm
        assert (u * run(u)).sum() > -tolerance * norm


# ----------------------------------------------------------------------------- tiles of a slide


def tiles_agreement(*, local: bool) -> tuple[float, float]:
    """Share of labels, and worst class score, in which tiles are the whole image."""
    params = CrfParams(w1=8, theta_alpha=10)
    top, left, side, tile = 1013, 3007, 320, 107  # no multiples of anything
    image, scores = tissue(side, side, 2, x=left, y=top)
    whole = dense_crf(image, scores, params, origin=(top, left), backend="lattice")
    joined = np.empty_like(whole)
    for y in range(0, side, tile):
        for x in range(0, side, tile):
            y0, x0 = max(y - params.halo_px, 0), max(x - params.halo_px, 0)
            rows, columns = (
                slice(y0, y + tile + params.halo_px),
                slice(x0, x + tile + params.halo_px),
            )
            origin = (0, 0) if local else (top + y0, left + x0)
            found = dense_crf(image[rows, columns], scores[:, rows, columns], params, origin=origin, backend="lattice")
            part = found[:, y - y0 :, x - x0 :][:, :tile, :tile]
            joined[:, y : y + tile, x : x + tile] = part
    return agreement(joined, whole), float(np.abs(joined - whole).max())


def test_lattice_tiles_with_a_halo_are_the_whole_image() -> None:
    agree, worst = tiles_agreement(local=False)
    assert agree >= 0.9999
    assert worst < 0.1


def test_lattice_tiles_that_do_not_say_where_they_lie_are_not() -> None:
    agree, worst = tiles_agreement(local=True)
    assert agree < 0.9999
    assert worst > 0.1


@pytest.mark.parametrize("offset", [(0, 2**18 - 48), (2**18 - 48, 2**18), (2**18 + 31, 12345)])
def test_far_places_of_a_slide_are_as_exact_as_its_corner_on_the_lattice(offset: tuple[int, int]) -> None:
    image, scores = tissue(48, 64, 2)
    params = CrfParams(w1=6, theta_alpha=10)
    wanted = dense_crf(image, scores, params, backend="exact")
    found = dense_crf(image, scores, params, backend="lattice", origin=offset)
    assert agreement(found, wanted) >= 0.985
    assert np.abs(found - wanted).mean() < 0.01


def test_lattice_weights_do_not_depend_on_the_tile() -> None:
    from histostream.runtime.crf import lattice

    image, _ = tissue(64, 64, 2)
    params, y, x = CrfParams(theta_alpha=7), 2**18 - 9, 2**18 + 5
    whole = lattice.build(image, params, (y, x)).weights.reshape(64, 64, 6)
    part = lattice.build(image[13:60, 22:64], params, (y + 13, x + 22)).weights
    np.testing.assert_array_equal(part.reshape(47, 42, 6), whole[13:60, 22:64])


# ----------------------------------------------------------------------------- determinism


def test_the_lattice_gives_the_same_bits_on_one_thread_and_two() -> None:
    numba = pytest.importorskip("numba")
    most = numba.get_num_threads()
    if most < 2:
        pytest.skip("numba has one thread on this machine")
    image, scores = tissue(150, 130, 3)
    results = []
    try:
        for threads in (1, 2, 1, 2):
            numba.set_num_threads(threads)
            results.append(dense_crf(image, scores, CrfParams(theta_alpha=8), backend="lattice"))
    finally:
        numba.set_num_threads(most)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta_alpha": 0}, "theta_alpha=0 is no width"),
        ({"theta_beta": -3.0}, "theta_beta=-3.0 is no width"),
        ({"theta_gamma": 0.0}, "theta_gamma=0.0 is no width"),
        ({"w1": -1}, "w1=-1 is negative"),
        ({"w2": -0.5}, "w2=-0.5 is negative"),
        ({"w1": float("nan")}, "w1=nan is not a number"),
        ({"theta_alpha": float("inf")}, "theta_alpha=inf is not a number"),
        ({"n_iter": 0}, "n_iter=0: use a whole number"),
        ({"n_iter": 2.5}, "n_iter=2.5: use a whole number"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CrfError, match=message):
        CrfParams(**options)


IMAGE, SCORES = np.zeros((4, 6, 3), np.uint8), np.full((2, 4, 6), 0.5, np.float32)


@pytest.mark.parametrize(
    ("image", "scores", "options", "message"),
    [
        (IMAGE, SCORES * np.nan, {}, "from nan to nan"),
        (IMAGE, SCORES + np.inf, {}, "from inf to inf"),
        (IMAGE, SCORES * 3, {}, "from 1.5 to 1.5"),
        (IMAGE, SCORES - 1, {}, "from -0.5 to -0.5"),
        (IMAGE, SCORES.astype(np.int32), {}, "scores of int32"),
        (IMAGE, SCORES[:1], {}, "scores of 1 classes"),
        (IMAGE, SCORES[:, :, :5], {}, r"scores of shape \(2, 4, 5\)"),
        (IMAGE, SCORES[0], {}, r"scores of shape \(4, 6\)"),
        (IMAGE / 255, SCORES, {}, "image of float64"),
        (IMAGE[..., :2], SCORES, {}, r"image of shape \(4, 6, 2\)"),
        (IMAGE[..., 0], SCORES, {}, r"image of shape \(4, 6\)"),
        (IMAGE, SCORES, {"backend": "gpu"}, "no CRF backend is called 'gpu'"),
        (IMAGE, SCORES, {"origin": (0.5, 0)}, "whole pixels"),
        (IMAGE, SCORES, {"origin": (1, 2, 3)}, "whole pixels"),
    ],
)
def test_bad_input_is_refused(image: Any, scores: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CrfError, match=message) as caught:
        dense_crf(image, scores, **options)
    assert isinstance(caught.value, HistoError)
    assert isinstance(caught.value, ValueError)


def test_all_pairs_of_a_large_image_are_refused() -> None:
    image, scores = np.zeros((200, 100, 3), np.uint8), np.full((2, 200, 100), 0.5)
    with pytest.raises(CrfError, match="an image of 100 x 200 px has too many pairs"):
        dense_crf(image, scores, backend="exact")


def test_a_lattice_too_large_for_its_keys_is_refused() -> None:
    image, scores = tissue(64, 64, 2)
    with pytest.raises(CrfError, match="too large for these kernels"):
        dense_crf(image, scores, CrfParams(theta_alpha=1e-3, theta_beta=1e-3), backend="lattice")


def test_importing_the_crf_does_not_import_numba_and_its_absence_is_an_error_with_the_command() -> None:
    code = """
import sys
import histostream.runtime, histostream.runtime.crf as crf
assert "numba" not in sys.modules
sys.modules["numba"] = None  # as if it were not installed
import numpy as np
image, scores = np.zeros((4, 6, 3), np.uint8), np.full((2, 4, 6), 0.5)
crf.dense_crf(image, scores, backend="exact")
try:
    crf.dense_crf(image, scores)
except crf.CrfError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"the CRF needs numba: {install_command('crf')}"

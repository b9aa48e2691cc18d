"""A dense CRF: probabilities of classes, sharpened along what the image shows.

Fully connected conditional random field with Gaussian kernels, Kraehenbuehl and Koltun, "Efficient
Inference in Fully Connected CRFs with Gaussian Edge Potentials" (2011), as used after the network
in paper 001 (equations 10 to 13; equation 11 repeats 10). Mean field::

    Q_0 = softmax(-U),   U = -log P
    Q   = softmax(-U + sum_m w_m D_m^-1/2 K_m D_m^-1/2 Q)

with the kernels of equation 13, the appearance kernel (places and colours) and the smoothness
kernel (places), Potts compatibility, D the sums of K's rows. As in the authors' code, and unlike
the paper, a pixel's own term stays in the sums.

Every backend computes this, to a different accuracy:

``exact``
    All pairs of pixels. Small images only; the others are tested against it.
``lattice``
    The permutohedral lattice, as the authors' code; needs numba, the extra ``crf``.
``factorised``
    Landmark colours and a coarse grid: matrix products alone, which ``export/crf.py`` puts into an
    ONNX graph for the GPU.
"""

from __future__ import annotations

import importlib.util
import logging
import operator

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.crf.gaussian import Smoothness
from histostream.runtime.crf.params import CrfError, CrfParams
from histostream.runtime.crf.softmax import softmax
from histostream.wsi.optional import install_command

__all__ = ["BACKENDS", "CrfError", "CrfParams", "dense_crf"]

BACKENDS = ("auto", "exact", "lattice", "factorised")
# A class that the network rules out keeps this probability: pixels around may still overrule it.
MIN_PROBABILITY = 1e-5
LEVELS = 255  # uint8 scores are probabilities times this

log = logging.getLogger(__name__)


def dense_crf(
    image: NDArray[np.uint8],
    scores: NDArray[np.floating] | NDArray[np.uint8],
    params: CrfParams | None = None,
    *,
    origin: tuple[int, int] = (0, 0),
    backend: str = "auto",
    landmarks: NDArray[np.floating] | None = None,
) -> NDArray[np.float32]:
    """Sharpen probabilities along what the image shows.

    Parameters
    ----------
    image
        (H, W, 3) uint8, or (H, W, 1) for grey.
    scores
        (K, H, W), K >= 2: probabilities of the classes, floating point in 0..1, or uint8 in
        0..255. They need not sum to 1.
    params
        Weights and widths of the kernels; None: the defaults of `CrfParams`.
    origin
        Row and column of the image's first pixel in the slide, in px. Lattice and grid are fixed
        to the slide: tiles that are read with `CrfParams.halo_px` around them agree where they
        overlap only if each says where it lies.
    backend
        One of `BACKENDS`; "auto": "lattice" where numba is installed, else "factorised".
    landmarks
        For "factorised": colours (L, 3) or (L, 1) in 0..255, as `find_landmarks` of the slide
        returns them; None: those of this image.

    Returns
    -------
    (K, H, W) float32, probabilities that sum to 1.

    Raises
    ------
    CrfError
        If the image, scores or origin are not as said here, or do not fit the backend; or numba has
        no place for what it compiles.
    ImportError
        If the backend needs numba, and it is not installed.
    """
    params = params or CrfParams()
    if backend not in BACKENDS:
        raise CrfError(f"no CRF backend is called {backend!r}: use {', '.join(BACKENDS)}")
    _check_image(image)
    energies = _log_probabilities(scores, image)
    origin = _whole(origin)
    if backend == "auto":
        backend = "lattice" if importlib.util.find_spec("numba") else "factorised"
    if backend == "exact":
        from histostream.runtime.crf import exact

        return exact.mean_field(image, energies, params)
    if params.w1 == 0:
        return _smoothness_alone(energies, params)
    if backend == "factorised":
        from histostream.runtime.crf import factorised

        if landmarks is None:
            landmarks = factorised.find_landmarks(image, params.theta_beta)
        psi = factorised.embed(image, landmarks, params.theta_beta)
        far = float((factorised.missed(psi) > factorised.FAR).mean())
        if far <= factorised.MAX_FAR:
            return factorised.mean_field(energies, params, origin, psi)
        log.warning(
            "%.2f %% of the pixels have a colour far from all %d landmarks (at most %.2f %% may): "
            "the CRF of this image runs on the lattice",
            100 * far,
            len(landmarks),
            100 * factorised.MAX_FAR,
        )
    return _on_the_lattice(image, energies, params, origin)


def _on_the_lattice(
    image: NDArray[np.uint8],
    energies: NDArray[np.float32],
    params: CrfParams,
    origin: tuple[int, int],
) -> NDArray[np.float32]:
    try:
        from histostream.runtime.crf import lattice
    except ImportError as error:
        if error.name is None or error.name.startswith("histostream"):
            raise
        raise ImportError(
            f"the CRF's lattice needs {error.name}, which is not installed: "
            f"{install_command('crf')}, or use the backend 'factorised'",
            name=error.name,
        ) from error
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        raise CrfError(
            "numba can keep what it compiles neither beside the package nor in the home folder: "
            "set NUMBA_CACHE_DIR to a folder that can be written"
        ) from error
    if image.shape[2] == 1:
        # The lattice has three axes of colour; two that never change change no distance.
        image = np.concatenate([image, np.zeros((*image.shape[:2], 2), np.uint8)], axis=2)
    return lattice.mean_field(image, energies, params, origin)


def _check_image(image: NDArray[np.uint8]) -> None:
    if image.dtype != np.uint8:
        raise CrfError(f"image of {image.dtype}: give uint8, 0..255")
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise CrfError(f"image of shape {image.shape}: give (H, W, 3), or (H, W, 1) for grey")


def _log_probabilities(
    scores: NDArray[np.floating] | NDArray[np.uint8], image: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """-U, C-contiguous."""
    if scores.ndim != 3 or scores.shape[1:] != image.shape[:2]:
        raise CrfError(
            f"scores of shape {scores.shape} for an image of {image.shape[:2]} px: "
            f"give (K, {image.shape[0]}, {image.shape[1]})"
        )
    if len(scores) < 2:
        raise CrfError(
            f"scores of {len(scores)} classes: a CRF chooses among two or more; for one probability p give (1 - p, p)"
        )
    if scores.dtype == np.uint8:
        probabilities = scores.astype(np.float32) / LEVELS
    elif np.issubdtype(scores.dtype, np.floating):
        low, high = float(scores.min()), float(scores.max())
        if not (low >= 0 and high <= 1):
            raise CrfError(f"scores from {low:g} to {high:g}: give probabilities in 0..1, all of them finite")
        probabilities = scores.astype(np.float32)
    else:
        raise CrfError(f"scores of {scores.dtype}: give floating point in 0..1, or uint8")
    return np.ascontiguousarray(np.log(np.clip(probabilities, MIN_PROBABILITY, 1)))


def _whole(origin: tuple[int, int]) -> tuple[int, int]:
    try:
        y, x = (operator.index(value) for value in origin)
    except (TypeError, ValueError) as error:
        raise CrfError(f"origin={origin!r}: give a row and a column in whole pixels") from error
    return y, x


def _smoothness_alone(energies: NDArray[np.float32], params: CrfParams) -> NDArray[np.float32]:
    q = softmax(energies, axis=0)
    if params.w2:
        smoothness = Smoothness(params.theta_gamma, energies.shape[1:])
        for _ in range(params.n_iter):
            q = softmax(energies + np.float32(params.w2) * smoothness.filter(q), axis=0)
    return q

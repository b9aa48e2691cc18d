"""The fully connected CRF with Gaussian kernels, and the choice of how it is computed.

Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials"
(2011), as used after the network in paper 001 (equations 10 to 13; equation 11 repeats 10). Mean
field::

    Q_0 = softmax(-U),   U = -log P
    Q   = softmax(-U + sum_m w_m D_m^-1/2 K_m D_m^-1/2 Q)

with the two kernels of equation 13, the appearance kernel (position and colour) and the smoothness
kernel (position), Potts compatibility, and D the row sums of K. As in the authors' code, and unlike
the paper, the sums include the pixel itself.
"""

from __future__ import annotations

import operator

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.crf.gaussian import Smoothness
from histostream.runtime.crf.params import CrfError, CrfParams
from histostream.runtime.crf.softmax import softmax
from histostream.wsi.optional import require

BACKENDS = ("auto", "lattice", "exact")
MIN_PROBABILITY = 1e-5  # a class that the network rules out keeps this much, so that neighbours can overrule it
UINT8_SCALE = 255  # uint8 scores are probabilities times this


def dense_crf(
    image: NDArray[np.uint8],
    scores: NDArray[np.floating] | NDArray[np.uint8],
    params: CrfParams | None = None,
    *,
    origin: tuple[int, int] = (0, 0),
    backend: str = "auto",
) -> NDArray[np.float32]:
    """Sharpen class probabilities along the edges that the image shows.

    Parameters
    ----------
    image
        (H, W, 3) uint8, or (H, W, 1) for grey.
    scores
        (K, H, W), K >= 2: class probabilities, floating point in 0..1, or uint8 in 0..255. They
        need not sum to 1.
    params
        Weights and widths of the kernels; None: the defaults of `CrfParams`.
    origin
        Row and column of the image's first pixel in the slide, in px. The lattice is anchored to
        the slide: tiles read with a halo of `CrfParams.halo_px` agree where they overlap if each
        gives its own origin.
    backend
        "lattice": the permutohedral lattice of the authors' code, which needs numba (the extra
        ``crf``). "exact": all pairs of pixels, for small images. "auto": "lattice".

    Returns
    -------
    (K, H, W) float32, probabilities that sum to 1.

    Raises
    ------
    CrfError
        If the image, the scores or the origin have a wrong shape, type or range, the image does not
        fit the backend, numba is not installed, or numba finds no folder for its compiled code.
    """
    params = params or CrfParams()
    if backend not in BACKENDS:
        raise CrfError(f"no CRF backend is called {backend!r}: use {', '.join(BACKENDS)}")
    _check_image(image)
    energies = _log_probabilities(scores, image)
    origin = _integer_origin(origin)
    if backend == "exact":
        from histostream.runtime.crf import exact

        return exact.mean_field(image, energies, params)
    if params.w1 == 0:
        return _smoothness_only(energies, params)
    return _on_lattice(image, energies, params, origin)


def _on_lattice(
    image: NDArray[np.uint8],
    energies: NDArray[np.float32],
    params: CrfParams,
    origin: tuple[int, int],
) -> NDArray[np.float32]:
    require("numba", "the CRF needs", "crf", CrfError)
    try:
        from histostream.runtime.crf import lattice
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        raise CrfError(
            "numba can store its compiled code neither beside the package nor in the home folder: "
            "set NUMBA_CACHE_DIR to a writable folder"
        ) from error
    if image.shape[2] == 1:
        # The lattice has three colour axes; two constant ones change no distance.
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
        probabilities = scores.astype(np.float32) / UINT8_SCALE
    elif np.issubdtype(scores.dtype, np.floating):
        low, high = float(scores.min()), float(scores.max())
        if not (low >= 0 and high <= 1):
            raise CrfError(f"scores from {low:g} to {high:g}: give probabilities in 0..1, all of them finite")
        probabilities = scores.astype(np.float32)
    else:
        raise CrfError(f"scores of {scores.dtype}: give floating point in 0..1, or uint8")
    return np.ascontiguousarray(np.log(np.clip(probabilities, MIN_PROBABILITY, 1)))


def _integer_origin(origin: tuple[int, int]) -> tuple[int, int]:
    try:
        y, x = (operator.index(value) for value in origin)
    except (TypeError, ValueError) as error:
        raise CrfError(f"origin={origin!r}: give a row and a column in whole pixels") from error
    return y, x


def _smoothness_only(energies: NDArray[np.float32], params: CrfParams) -> NDArray[np.float32]:
    q = softmax(energies, axis=0)
    if params.w2:
        smoothness = Smoothness(params.theta_gamma, energies.shape[1:])
        for _ in range(params.n_iter):
            q = softmax(energies + np.float32(params.w2) * smoothness.filter(q), axis=0)
    return q

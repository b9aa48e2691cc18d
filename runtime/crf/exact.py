"""The CRF over all pairs of pixels, in float64, as the reference for small images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.crf.params import CrfError, CrfParams
from histostream.runtime.crf.softmax import softmax

LIMIT_PX = 128 * 128  # 270 million pairs; minutes
CHUNK_PAIRS = 1 << 23  # computed at a time; 64 MiB

Doubles = NDArray[np.float64]


def mean_field(image: NDArray[np.uint8], energies: NDArray[np.float32], params: CrfParams) -> NDArray[np.float32]:
    """Run mean field with sums over all pairs of pixels.

    Parameters
    ----------
    image
        (H, W, C).
    energies
        (K, H, W), log probabilities.
    params
        As in `dense_crf`.

    Returns
    -------
    (K, H, W) float32.

    Raises
    ------
    CrfError
        If the image has more than `LIMIT_PX` pixels.
    """
    classes, height, width = energies.shape
    if height * width > LIMIT_PX:
        raise CrfError(
            f"an image of {width} x {height} px has too many pairs of pixels for the backend "
            f"'exact', which takes {LIMIT_PX} px: use 'lattice'"
        )
    unary = energies.reshape(classes, -1).T.astype(np.float64)
    kernels = pair_kernels(image, params)
    q = softmax(unary, axis=1)
    for _ in range(params.n_iter):
        q = softmax(unary + sum(kernel(q) for kernel in kernels), axis=1)
    return q.T.reshape(energies.shape).astype(np.float32)


def pair_kernels(image: NDArray[np.uint8], params: CrfParams) -> list[PairKernel]:
    """Return the kernels of equation 13 with a weight above 0, for an image (H, W, C)."""
    height, width, channels = image.shape
    positions = np.moveaxis(np.indices((height, width), np.float64), 0, -1).reshape(-1, 2)
    colours = image.reshape(-1, channels).astype(np.float64)
    appearance = np.hstack([positions / params.theta_alpha, colours / params.theta_beta])
    pairs = (params.w1, appearance), (params.w2, positions / params.theta_gamma)
    return [PairKernel(weight, features) for weight, features in pairs if weight]


class PairKernel:
    """w D^-1/2 K D^-1/2 for a Gaussian kernel K between the rows of ``features``, (N, F)."""

    def __init__(self, weight: float, features: Doubles) -> None:
        self._features = features
        self._scale = np.ones((len(features), 1))
        self._scale = np.sqrt(weight / self(self._scale))

    def __call__(self, values: Doubles) -> Doubles:
        """Filter values (N, K)."""
        features, scaled = self._features, self._scale * values
        out = np.empty_like(scaled)
        squares = 0.5 * (features**2).sum(axis=1)
        rows = max(CHUNK_PAIRS // len(features), 1)
        for start in range(0, len(features), rows):
            part = slice(start, start + rows)
            exponents = features[part] @ features.T
            exponents -= squares
            exponents -= squares[part, None]
            out[part] = np.exp(exponents, out=exponents) @ scaled
        return self._scale * out

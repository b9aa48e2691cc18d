"""The CRF with a factorised appearance kernel: landmark colours and a coarse grid.

The appearance kernel is a Gaussian of colours times one of places. Of the colours, Nystrom's method
(Williams and Seeger, "Using the Nystrom Method to Speed Up Kernel Machines", 2000) keeps the part
that L landmarks c span::

    k(I, J) ~ psi(I) . psi(J),   psi(I) = k(I, c) k(c, c)^-1/2

so that filtering is a sum over L spatial Gaussians, K q = sum_l psi_l G (psi_l q). Those are wide:
they are computed between the nodes of a grid of `stride_px` at multiples of it in the slide, and
pixels are joined to the nodes around them by hat functions (linear interpolation). Each of the two
steps widens the Gaussian by the hat's variance, which that between the nodes leaves out.

What the landmarks miss of a pixel's own term, ``1 - |psi|^2``, is added back: a colour unlike all
landmarks is then a colour of its own, linked to no other pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.crf.gaussian import Smoothness
from histostream.runtime.crf.params import CrfError, CrfParams
from histostream.runtime.crf.softmax import softmax

Floats = NDArray[np.float32]

LANDMARKS = 64
SAMPLE_PX = 16384  # that landmarks are sought among
ROUNDS = 12  # of k-means
STRIDES = 3  # of the grid in theta_alpha
SMALLEST_EIGENVALUE = 1e-6  # of k(c, c), relative: below it is rounding
GRID_REACH = 5.5  # deviations; beyond, a Gaussian is less than float32's rounding of its height
NODES = 64  # that a step of the blur works on
FAR = 0.5  # 1 - |psi|^2 above which the landmarks miss most of a pixel
MOST_FAR = 0.01  # share of pixels that may be far


def find_landmarks(
    image: NDArray[np.uint8], theta_beta: float, count: int = LANDMARKS, *, seed: int = 0
) -> NDArray[np.float64]:
    """Find colours that stand for those of an image, from a sample of its pixels.

    The first half by k-means, which serves the many pixels; the rest one by one, each the colour
    that those before miss most, which serves the rare ones. (Against all pairs on synthetic tissue,
    64 colours: worst error of a probability 0.65 with k-means alone, 0.14 so; mean error alike.)

    Parameters
    ----------
    image
        (..., C) uint8: an image, or pixels of a whole slide.
    theta_beta
        Width of the kernel of colours, grey levels.
    count
        How many; fewer come back where the image has fewer colours.
    seed
        Of the sample, and of the colours that k-means starts from.

    Returns
    -------
    (L, C) float64 in 0..255.
    """
    rng = np.random.default_rng(seed)
    pixels = image.reshape(-1, image.shape[-1])
    if len(pixels) > SAMPLE_PX:
        pixels = pixels[np.sort(rng.choice(len(pixels), SAMPLE_PX, replace=False))]
    distinct, weights = np.unique(pixels, axis=0, return_counts=True)
    colours = distinct.astype(np.float64)
    if len(colours) <= count:
        return colours
    centres = _cluster(colours, weights, (count + 1) // 2, rng)
    return _complete(centres, colours, weights, theta_beta, count)


def _cluster(
    colours: NDArray[np.float64], weights: NDArray[np.int64], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Weighted k-means."""
    centres = _spread(colours, weights, count, rng)
    for _ in range(ROUNDS):
        nearest = _squares(colours, centres).argmin(axis=1)
        sizes = np.bincount(nearest, weights, count)
        for channel in range(colours.shape[1]):
            sums = np.bincount(nearest, weights * colours[:, channel], count)
            np.divide(sums, sizes, out=centres[:, channel], where=sizes > 0)
    return centres


def _complete(
    centres: NDArray[np.float64],
    colours: NDArray[np.float64],
    weights: NDArray[np.int64],
    theta_beta: float,
    count: int,
) -> NDArray[np.float64]:
    """Add the colours that the landmarks miss most: the pivots of a Cholesky factorisation."""
    points = np.concatenate([centres, colours])
    importance = np.sqrt(np.concatenate([np.zeros(len(centres)), weights]))
    factor, residual = np.zeros((len(points), count)), np.ones(len(points))
    chosen: list[int] = []
    for k in range(count):
        chosen.append(k if k < len(centres) else int((residual * importance).argmax()))
        pivot = chosen[-1]
        column = np.exp(-0.5 * _squares(points, points[pivot, None])[:, 0] / theta_beta**2)
        column -= factor[:, :k] @ factor[pivot, :k]
        if residual[pivot] > SMALLEST_EIGENVALUE:
            factor[:, k] = column / np.sqrt(residual[pivot])
            residual = np.maximum(residual - factor[:, k] ** 2, 0)
    return points[chosen]


def _spread(
    colours: NDArray[np.float64], weights: NDArray[np.int64], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """First centres as k-means++: each drawn by its squared distance from those there are."""
    chosen = [int(rng.choice(len(colours), p=weights / weights.sum()))]
    distances = _squares(colours, colours[chosen])[:, 0]
    for _ in range(count - 1):
        odds = distances * weights
        chosen.append(int(rng.choice(len(colours), p=odds / odds.sum())))
        distances = np.minimum(distances, _squares(colours, colours[chosen[-1:]])[:, 0])
    return colours[chosen].copy()


def _squares(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances (len(a), len(b))."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.maximum(squares, 0))


def whiten(landmarks: NDArray[np.floating], theta_beta: float) -> Floats:
    """k(c, c)^-1/2 of landmarks (L, C): (L, L)."""
    centres = landmarks.astype(np.float64) / theta_beta
    values, vectors = np.linalg.eigh(np.exp(-0.5 * _squares(centres, centres)))
    kept = values > SMALLEST_EIGENVALUE * values[-1]
    roots = np.where(kept, 1 / np.sqrt(np.where(kept, values, 1)), 0)
    return np.asarray((vectors * roots) @ vectors.T, np.float32)


def embed(image: NDArray[np.uint8], landmarks: NDArray[np.floating], theta_beta: float) -> Floats:
    """Psi of each pixel: (H, W, L).

    Raises
    ------
    CrfError
        If the landmarks are no colours of the image's channels.
    """
    height, width, channels = image.shape
    if landmarks.ndim != 2 or landmarks.shape[1] != channels or not len(landmarks):
        raise CrfError(
            f"landmarks of shape {landmarks.shape} for an image of {channels} channels: "
            f"give (L, {channels})"
        )
    if not np.isfinite(landmarks).all():
        raise CrfError("landmarks that are not finite: give colours in 0..255")
    exponents = np.zeros((height * width, len(landmarks)), np.float32)
    for channel, centres in enumerate(np.asarray(landmarks.T, np.float32)):
        distances = image[..., channel].reshape(-1, 1) - centres
        exponents -= np.square(distances, out=distances)
    exponents *= np.float32(0.5 / theta_beta**2)
    near = np.exp(exponents, out=exponents)
    return (near @ whiten(landmarks, theta_beta)).reshape(height, width, -1)


def missed(psi: Floats) -> Floats:
    """``1 - |psi|^2``: what the landmarks miss of each pixel, 0..1."""
    return np.asarray(np.maximum(1 - np.einsum("...l,...l->...", psi, psi), 0))


def mean_field(energies: Floats, params: CrfParams, origin: tuple[int, int], psi: Floats) -> Floats:
    """Run mean field with the factorised appearance kernel.

    The classes' messages sum to that of ones, so only the first K - 1 are filtered.

    Parameters
    ----------
    energies
        (K, H, W), log probabilities.
    params, origin
        As `dense_crf`.
    psi
        (H, W, L), of `embed`.

    Returns
    -------
    (K, H, W) float32.
    """
    appearance = Appearance(psi, params.theta_alpha, origin)
    smoothness = Smoothness(params.theta_gamma, appearance.shape)
    w1, w2 = np.float32(params.w1), np.float32(params.w2)
    ones = w1 * appearance.filter(np.ones((1, *appearance.shape), np.float32))
    ones += w2 * smoothness.ones
    q = softmax(energies, axis=0)
    for _ in range(params.n_iter):
        messages = w1 * appearance.filter(q[:-1])
        if params.w2:
            messages += w2 * smoothness.filter(q[:-1])
        last = ones - messages.sum(axis=0, keepdims=True)
        q = softmax(energies + np.concatenate([messages, last]), axis=0)
    return q


@dataclass(frozen=True, slots=True)
class Grid:
    """Nodes of the coarse grid along one axis, and the Gaussian between them.

    Attributes
    ----------
    before
        Pixels from the first node to the first pixel.
    cells
        Gaps between nodes; there is one node more.
    hats
        (stride, 2) float32: weights of the nodes before and after a pixel.
    blur
        (cells + 1, cells + 1) float32.
    reach
        Nodes from which on ``blur`` is 0 to float32.
    """

    before: int
    cells: int
    hats: Floats
    blur: Floats
    reach: int


def stride_px(theta_alpha: float) -> int:
    """Whole pixels between nodes."""
    return max(math.floor(theta_alpha / STRIDES), 1)


def make_grid(start: int, size: int, theta_alpha: float) -> Grid:
    """Lay the grid over places start, start + 1, ... px along an axis of the slide."""
    stride = stride_px(theta_alpha)
    before = start % stride
    cells = -(-(before + size) // stride)
    after = np.arange(stride) / stride
    # The mean over whole places of a hat's variance is (stride^2 - 1) / 6, and there are two.
    variance = theta_alpha**2 - (stride**2 - 1) / 3
    places = np.arange(cells + 1) * stride
    blur = np.exp(-0.5 * np.subtract.outer(places, places) ** 2 / variance)
    # The hats take from the Gaussian's height what they add to its width.
    blur *= theta_alpha / math.sqrt(variance)
    return Grid(
        before,
        cells,
        np.stack([1 - after, after], axis=1).astype(np.float32),
        blur.astype(np.float32),
        math.ceil(GRID_REACH * math.sqrt(variance) / stride),
    )


class Appearance:
    """D^-1/2 K D^-1/2 of the factorised appearance kernel on an image.

    Parameters
    ----------
    psi
        (H, W, L), of `embed`.
    theta_alpha
        Width of the spatial Gaussian, px.
    origin
        Row and column of the first pixel in the slide.
    """

    def __init__(self, psi: Floats, theta_alpha: float, origin: tuple[int, int]) -> None:
        self.shape = psi.shape[:2]
        self._rows, self._columns = (
            make_grid(start, size, theta_alpha)
            for start, size in zip(origin, self.shape, strict=True)
        )
        hats = self._rows.hats[:, None, :, None] * self._columns.hats[:, None, :]
        self._hats = hats.reshape(-1, 1, 4)  # of a cell's pixels and corners
        self._psi = self._to_cells(psi)
        self._own = missed(psi)
        # A pixel's own term is 1, so no sum is less; approximated ones may be.
        sums = np.maximum(self.filter(np.ones((1, *self.shape), np.float32))[0], 1)
        scale = 1 / np.sqrt(sums)
        self._psi *= self._to_cells(scale[..., None])
        self._own *= scale**2

    def filter(self, planes: Floats) -> Floats:
        """Filter planes (C, H, W)."""
        nodes = self._splat(self._to_cells(np.moveaxis(planes, 0, -1)))
        nodes = _blur(nodes, self._rows)
        nodes = _blur(nodes.swapaxes(0, 1), self._columns).swapaxes(0, 1)
        return self._slice(nodes) + self._own * planes

    def _to_cells(self, pixels: Floats) -> Floats:
        """Cut pixels (H, W, C) into cells of the grid: (rows, columns, stride^2, C)."""
        rows, columns, stride = self._rows, self._columns, len(self._rows.hats)
        height, width, channels = pixels.shape
        padded = np.zeros((rows.cells * stride, columns.cells * stride, channels), np.float32)
        padded[rows.before :, columns.before :][:height, :width] = pixels
        cells = padded.reshape(rows.cells, stride, columns.cells, stride, channels).swapaxes(1, 2)
        return cells.reshape(rows.cells, columns.cells, stride**2, channels)

    def _splat(self, cells: Floats) -> Floats:
        """Add psi times the cells' values to the nodes: (nodes, nodes, L * C)."""
        rows, columns = self._rows.cells, self._columns.cells
        landmarks, channels = self._psi.shape[-1], cells.shape[-1]
        nodes = np.zeros((rows + 1, columns + 1, landmarks, channels), np.float32)
        for row, (psi, values) in enumerate(zip(self._psi, cells, strict=True)):
            shares = (values[..., None] * self._hats).reshape(columns, -1, channels * 4)
            sums = (psi.swapaxes(1, 2) @ shares).reshape(columns, landmarks, channels, 4)
            for corner in range(4):
                down, right = divmod(corner, 2)
                nodes[row + down, right : right + columns] += sums[..., corner]
        return nodes.reshape(rows + 1, columns + 1, -1)

    def _slice(self, nodes: Floats) -> Floats:
        """Interpolate psi times the nodes' values: planes (C, H, W)."""
        rows, columns = self._rows, self._columns
        stride, landmarks = len(rows.hats), self._psi.shape[-1]
        nodes = nodes.reshape(*nodes.shape[:2], landmarks, -1)
        channels = nodes.shape[-1]
        out = np.empty((rows.cells * stride, columns.cells * stride, channels), np.float32)
        for row, psi in enumerate(self._psi):
            corners = [
                nodes[row + down, right : right + columns.cells]
                for down in range(2)
                for right in range(2)
            ]
            around = np.stack(corners, axis=-1).reshape(columns.cells, landmarks, -1)
            values = (psi @ around).reshape(columns.cells, -1, channels, 4)
            values = np.einsum("xpck,pk->xpc", values, self._hats[:, 0])
            cells = values.reshape(columns.cells, stride, stride, channels).swapaxes(0, 1)
            out[row * stride : (row + 1) * stride] = cells.reshape(stride, -1, channels)
        height, width = self.shape
        return np.moveaxis(out[rows.before :, columns.before :][:height, :width], -1, 0)


def _blur(nodes: Floats, grid: Grid) -> Floats:
    """Multiply the first axis by the grid's matrix, which is 0 far from its diagonal."""
    out = np.empty(nodes.shape, np.float32)
    count = len(nodes)
    flat = nodes.reshape(count, -1)
    for start in range(0, count, NODES):
        some = slice(start, min(start + NODES, count))
        near = slice(max(start - grid.reach, 0), some.stop + grid.reach)
        out[some] = (grid.blur[some, near] @ flat[near]).reshape(-1, *nodes.shape[1:])
    return out

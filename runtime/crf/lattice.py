"""The CRF on the permutohedral lattice; importing this module needs numba."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.crf import iteration, permutohedral
from histostream.runtime.crf.gaussian import Smoothness
from histostream.runtime.crf.params import CrfError, CrfParams

Floats = NDArray[np.float32]
PERIOD = 6  # of the lattice, in each of its six coordinates
# Feature j is elevated by (1, ..., 1, -j - 1, 0, ...) times this scale, which makes the blur a
# Gaussian of standard deviation 1. Adams et al. 2010, section 3.1.
ELEVATION = tuple(np.sqrt(2 / 3) * PERIOD / np.sqrt((j + 1.0) * (j + 2.0)) for j in range(5))
MIN_SUM = 1e-20  # added under the square root of a norm, as in the reference code
# Two Python threads must not enter numba's simplest thread pool at the same time.
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Lattice:
    """The lattice of one image.

    Attributes
    ----------
    shape
        (H, W).
    weights, slots
        (H*W, 6) float32 and uint16: weight and slot of each corner of each pixel's simplex, block by
        block.
    firsts, starts
        (blocks,) and (blocks + 1,) int64: first pixel of each block, and its first slot.
    vertex_of
        (S,) int32: vertex of each slot.
    order, vertex_starts
        (S,) int64 and (V + 1,) int32: slots of each vertex.
    neighbours
        (6, 2, V) int32: the vertices before and behind each vertex, along each axis.
    """

    shape: tuple[int, int]
    weights: Floats
    slots: NDArray[np.uint16]
    firsts: NDArray[np.int64]
    starts: NDArray[np.int64]
    vertex_of: NDArray[np.int32]
    order: NDArray[np.int64]
    vertex_starts: NDArray[np.int32]
    neighbours: NDArray[np.int32]


def mean_field(image: NDArray[np.uint8], energies: Floats, params: CrfParams, origin: tuple[int, int]) -> Floats:
    """Run mean field with the appearance kernel on the lattice.

    Parameters
    ----------
    image
        (H, W, 3).
    energies
        (K, H, W), log probabilities.
    params, origin
        As in `dense_crf`.

    Returns
    -------
    (K, H, W) float32.

    Raises
    ------
    CrfError
        If the image is too large for the kernels' widths.
    """
    with _lock:
        return _mean_field(image, energies, params, origin)


def build(image: NDArray[np.uint8], params: CrfParams, origin: tuple[int, int]) -> Lattice:
    """Build the lattice of an image (H, W, 3); its weights are not normalised yet."""
    shape = height, width = image.shape[:2]
    rows, row_periods = axis_table(origin[0], height, params.theta_alpha, ELEVATION[1])
    columns, column_periods = axis_table(origin[1], width, params.theta_alpha, ELEVATION[0])
    levels = np.arange(256) / params.theta_beta
    colours = np.stack([levels * scale for scale in ELEVATION[2:]]).astype(np.float32)
    steps = strides(int(column_periods[-1]), int(row_periods[-1]), colours[:, -1])
    weights = np.empty((height * width, PERIOD), np.float32)
    slots = np.empty(weights.shape, np.uint16)
    keys = np.empty(weights.size, np.int64)
    counts = permutohedral.embed(
        np.ascontiguousarray(image),
        columns,
        rows,
        PERIOD * column_periods * (steps[0] - steps[1]),
        PERIOD * row_periods * (steps[0] + steps[1] - 2 * steps[2]),
        colours,
        steps,
        weights,
        slots,
        keys,
    )
    firsts = np.array(
        [
            y * width + x * (min(y + permutohedral.BLOCK_PX, height) - y)
            for y in range(0, height, permutohedral.BLOCK_PX)
            for x in range(0, width, permutohedral.BLOCK_PX)
        ]
    )
    starts = np.concatenate([[0], np.cumsum(counts)])
    keys = permutohedral.gather_keys(keys, firsts, starts)
    order = np.argsort(keys)
    vertices, vertex_of, vertex_starts = permutohedral.number_vertices(keys, order)
    # A step along an axis adds 1 to all coordinates and subtracts 6 from the axis's own.
    neighbours = permutohedral.find_neighbours(vertices, steps.sum() - PERIOD * steps)
    return Lattice(shape, weights, slots, firsts, starts, vertex_of, order, vertex_starts, neighbours)


def axis_table(start: int, size: int, theta: float, scale: float) -> tuple[Floats, NDArray[Any]]:
    """Split the elevated positions start, start + 1, ... px of an axis into whole periods and a rest.

    Periods count from that of the first position, because the lattice is the same after a shift by
    whole periods.

    Returns
    -------
    The rests (size,) float32 in -3..3, and the periods (size,) int64.
    """
    positions = (start + np.arange(size)) / theta * scale
    periods = np.rint(positions / PERIOD)
    return (positions - PERIOD * periods).astype(np.float32), (periods - periods[0]).astype(np.int64)


def strides(column_periods: int, row_periods: int, max_colours: Floats) -> NDArray[np.int64]:
    """Choose the stride of each of the six coordinates in a vertex's key; that of the sixth is 0.

    Parameters
    ----------
    column_periods, row_periods
        Periods of the last column and row.
    max_colours
        (3,) float32: the largest elevated value of each colour.

    Raises
    ------
    CrfError
        If a key would need more than 62 bits.
    """
    r, g, b = (float(value) for value in max_colours)
    x, y = PERIOD * column_periods, PERIOD * row_periods
    # Bounds of the coordinates, including the outermost vertices and their neighbours.
    margin = 4 * PERIOD
    low_high = [(0, x + y + r + g + b), (-x, y + r + g + b), (-2 * y, r + g + b), (-3 * r, g + b), (-4 * g, b)]
    extents = [int(high - low) + 2 * margin for low, high in low_high]
    steps = np.zeros(6, np.int64)
    step = 1
    # Positions have the largest strides, so that vertices near in the image are near in memory.
    for coordinate in (4, 3, 1, 0, 2):
        steps[coordinate] = step
        step *= extents[coordinate]
        if step > 2**62:
            raise CrfError(
                "the image is too large for these kernels, because theta_alpha and theta_beta are small; "
                "cut it into tiles, or use wider kernels"
            )
    return steps


def normalise(lattice: Lattice) -> Floats:
    """Scale the lattice's weights so that its filter is D^-1/2 K D^-1/2.

    Returns
    -------
    The filtered image of ones, (H, W).
    """
    root = 1 / np.sqrt(_filter_ones(lattice) + MIN_SUM)
    permutohedral.scale(lattice.weights, root)
    return _filter_ones(lattice)


def _filter_ones(lattice: Lattice) -> Floats:
    corners = lattice.weights, lattice.slots, lattice.starts
    values, spare = _vertex_values(lattice, 1), _vertex_values(lattice, 1)
    values = _blurred(lattice, permutohedral.splat_ones(*corners, lattice.shape), values, spare)
    ones = np.empty(lattice.shape, np.float32)
    permutohedral.slice_ones(values, lattice.vertex_of, *corners, ones)
    return ones * np.float32(permutohedral.ALPHA)


def _vertex_values(lattice: Lattice, channels: int) -> Floats:
    """Allocate the values of all vertices, and zeros behind them for missing neighbours."""
    return np.zeros((len(lattice.vertex_starts), channels), np.float32)


def _blurred(lattice: Lattice, slot_values: Floats, values: Floats, spare: Floats) -> Floats:
    """Sum the slots of each vertex, and blur along all axes; returns one of the two buffers (V + 1, C)."""
    permutohedral.collect(slot_values, lattice.order, lattice.vertex_starts, values)
    for neighbours in lattice.neighbours:
        permutohedral.blur(values, neighbours, spare)
        values, spare = spare, values
    return values


def _mean_field(image: NDArray[np.uint8], energies: Floats, params: CrfParams, origin: tuple[int, int]) -> Floats:
    filtered = tuple(range(len(energies) - 1))
    lattice = build(image, params, origin)
    ones = normalise(lattice)
    corners = lattice.weights, lattice.slots, lattice.starts, lattice.vertex_of
    smoothness = Smoothness(params.theta_gamma, lattice.shape)

    values, spare = (_vertex_values(lattice, len(filtered)) for _ in range(2))
    slot_values = np.empty((len(lattice.vertex_of), len(filtered)), np.float32)
    q, smooth = np.empty_like(energies), np.zeros_like(energies[:-1])

    # An update without messages is the softmax that mean field starts from.
    energies = energies.copy()
    zero, w1, w2 = (np.float32(w) for w in (0, params.w1 * permutohedral.ALPHA, params.w2))
    iteration.iterate(filtered, energies, *corners, values, smooth, zero, zero, q, slot_values)
    energies[-1] += params.w1 * ones + params.w2 * smoothness.ones
    for _ in range(params.n_iter):
        if params.w2:
            iteration.smooth(q, smoothness.taps, smoothness.scale_y, smoothness.scale_x, smooth)
        blurred = _blurred(lattice, slot_values, values, spare)
        iteration.iterate(filtered, energies, *corners, blurred, smooth, w1, w2, q, slot_values)
    return q

"""The iteration of mean field on the permutohedral lattice, in numba."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from histostream.runtime.crf.permutohedral import (
    BLOCK_PX,
    CORNERS,
    HALF,
    ONE,
    ZERO,
    Floats,
    Ints,
    Longs,
    Slots,
    block_of,
)

WIDTH_PX, HEIGHT_PX = 4096, 32  # of the part of a plane that one task smooths
E3, E4, E5, E6 = (np.float32(1 / math.factorial(n)) for n in (3, 4, 5, 6))
LOG2_E = np.float32(1 / math.log(2))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # their sum is ln 2
MIN_EXPONENT = np.float32(-40)  # e^-40 changes no float32 sum, and products with it are no denormals


@njit(parallel=True, cache=True)
def iterate(
    filtered: tuple[int, ...],
    energies: Floats,
    weights: Floats,
    slots: Slots,
    starts: Longs,
    vertex_of: Ints,
    values: Floats,
    smooth: Floats,
    w1: np.float32,
    w2: np.float32,
    q: Floats,
    slot_values: Floats,
) -> None:
    """Update the probabilities of mean field once, and splat the result.

    The messages of all classes sum to the message of ones, so only the first C = K - 1 classes are
    filtered.

    Parameters
    ----------
    filtered
        A tuple of C numbers, so that the compiler unrolls the loops over classes.
    energies
        (K, H, W) float32: log probabilities; those of the last class plus the message of ones.
    weights, slots, starts, vertex_of
        The lattice, with normalised weights; see `Lattice`.
    values
        (V + 1, C) float32: the blurred vertices.
    smooth
        (C, H, W) float32: message of the smoothness kernel.
    w1, w2
        Weights of the kernels.
    q
        Written: (K, H, W) float32, probabilities.
    slot_values
        Written: (S, C) float32, the splatted probabilities.
    """
    channels = len(filtered)
    height, width = q.shape[1:]
    across = (width + BLOCK_PX - 1) // BLOCK_PX
    flat, splatted = values.reshape(values.size), slot_values.reshape(slot_values.size)
    for block in prange(len(starts) - 1):
        y0, y1, x0, x1, first = block_of(block, across, height, width)
        count = (y1 - y0) * (x1 - x0)
        splat = splatted[starts[block] * channels : starts[block + 1] * channels]
        iterate_block(
            filtered,
            energies[:, y0:y1, x0:x1],
            weights[first : first + count],
            slots[first : first + count],
            vertex_of[starts[block] : starts[block + 1]],
            flat,
            smooth[:, y0:y1, x0:x1],
            w1,
            w2,
            q[:, y0:y1, x0:x1],
            splat,
        )


@njit(cache=True)
def iterate_block(
    filtered: tuple[int, ...],
    energies: Floats,
    weights: Floats,
    slots: Slots,
    vertices: Ints,
    values: Floats,
    smooth: Floats,
    w1: np.float32,
    w2: np.float32,
    q: Floats,
    splat: Floats,
) -> None:
    """Update one block; ``values`` and ``splat`` are flat, with C values for each vertex or slot."""
    channels = len(filtered)
    local = np.empty(len(vertices) * channels, np.float32)
    for slot in range(len(vertices)):
        for c in range(channels):
            local[slot * channels + c] = values[vertices[slot] * channels + c]
    for at in range(len(splat)):
        splat[at] = 0
    height, width = q.shape[1:]
    rows = np.empty((channels + 1, width), np.float32)
    top, bits = np.empty(width, np.float32), np.empty(width, np.int32)
    for y in range(height):
        pixels = slice(y * width, (y + 1) * width)
        slice_row(filtered, weights[pixels], slots[pixels], local, rows)
        last, energy = rows[channels], energies[channels, y]
        for x in range(width):
            last[x] = energy[x]
        for c in range(channels):
            row, energy, smoothed = rows[c], energies[c, y], smooth[c, y]
            for x in range(width):
                message = w1 * row[x] + w2 * smoothed[x]
                row[x] = energy[x] + message
                last[x] -= message
        softmax(rows, top, bits)
        for c in range(channels + 1):
            row, target = rows[c], q[c, y]
            for x in range(width):
                target[x] = row[x]
        splat_row(filtered, weights[pixels], slots[pixels], rows, splat)


@njit(cache=True)
def slice_row(filtered: tuple[int, ...], weights: Floats, slots: Slots, local: Floats, rows: Floats) -> None:
    """Interpolate the pixels of a row, (W, 6), into the first C of ``rows``, (K, W)."""
    channels = len(filtered)
    for x in range(len(weights)):
        for c in range(channels):
            message = ZERO
            for corner in range(CORNERS):
                message += weights[x, corner] * local[slots[x, corner] * channels + c]
            rows[c, x] = message


@njit(cache=True)
def splat_row(filtered: tuple[int, ...], weights: Floats, slots: Slots, rows: Floats, splat: Floats) -> None:
    """Add the first C of ``rows``, (K, W), to the slots of their pixels."""
    channels = len(filtered)
    for x in range(len(weights)):
        for corner in range(CORNERS):
            weight, at = weights[x, corner], slots[x, corner] * channels
            for c in range(channels):
                splat[at + c] += weight * rows[c, x]


@njit(cache=True)
def softmax(rows: Floats, top: Floats, bits: Ints) -> None:
    """Compute the softmax over the first axis, in place.

    The exponential is 2^n e^r with ``|r| <= ln(2) / 2``: e^r is its series up to the sixth power
    (error 1e-7), 2^n is written as the exponent of a float32.

    Parameters
    ----------
    rows
        (K, W) float32.
    top, bits
        Buffers (W,), float32 and int32.
    """
    count = len(top)
    powers = bits.view(np.float32)
    top[:] = rows[0]
    for c in range(1, len(rows)):
        row = rows[c]
        for x in range(count):
            top[x] = max(top[x], row[x])
    for c in range(len(rows)):
        row = rows[c]
        for x in range(count):
            value = max(row[x] - top[x], MIN_EXPONENT)
            n = np.floor(value * LOG2_E + HALF)
            r = (value - n * LN2_HIGH) - n * LN2_LOW
            bits[x] = (np.int32(n) + np.int32(127)) << np.int32(23)
            row[x] = ONE + r * (ONE + r * (HALF + r * (E3 + r * (E4 + r * (E5 + r * E6)))))
        for x in range(count):
            row[x] *= powers[x]
    top[:] = 0
    for c in range(len(rows)):
        row = rows[c]
        for x in range(count):
            top[x] += row[x]
    for c in range(len(rows)):
        row = rows[c]
        for x in range(count):
            row[x] /= top[x]


@njit(parallel=True, cache=True)
def smooth(planes: Floats, taps: Floats, scale_y: Floats, scale_x: Floats, out: Floats) -> None:
    """Filter planes with a separable symmetric filter, with zeros outside.

    Parameters
    ----------
    planes
        (K, H, W) float32; the first C are filtered.
    taps
        (r + 1,) float32: the filter at 0 to r pixels.
    scale_y, scale_x
        (H,) and (W,) float32: their product scales the image before and after the filter.
    out
        Written: (C, H, W) float32.
    """
    channels, height, width = out.shape
    across = (width + WIDTH_PX - 1) // WIDTH_PX
    down = (height + HEIGHT_PX - 1) // HEIGHT_PX
    for task in prange(channels * down * across):
        plane, part = task // (down * across), task % (down * across)
        y0, x0 = part // across * HEIGHT_PX, part % across * WIDTH_PX
        y1, x1 = min(y0 + HEIGHT_PX, height), min(x0 + WIDTH_PX, width)
        smooth_part(planes[plane], taps, scale_y, scale_x, out[plane], y0, y1, x0, x1)


@njit(cache=True)
def smooth_part(
    source: Floats,
    taps: Floats,
    scale_y: Floats,
    scale_x: Floats,
    target: Floats,
    y0: int,
    y1: int,
    x0: int,
    x1: int,
) -> None:
    """Filter rows y0 to y1 and columns x0 to x1 of a plane: along y into a buffer, then along x."""
    height, width = source.shape
    radius = len(taps) - 1
    # With a margin for the pass along x, within the image.
    left, right = max(x0 - radius, 0), min(x1 + radius, width)
    column = np.zeros(x1 - x0 + 2 * radius, np.float32)
    buffer = column[left - x0 + radius : right - x0 + radius]
    row = np.empty(x1 - x0, np.float32)
    for y in range(y0, y1):
        weight, center = taps[0] * scale_y[y], source[y, left:right]
        for x in range(len(buffer)):
            buffer[x] = weight * center[x]
        for k in range(1, radius + 1):
            high, low = max(y - k, 0), min(y + k, height - 1)
            a = taps[k] * scale_y[high] if y >= k else ZERO
            b = taps[k] * scale_y[low] if y + k < height else ZERO
            above, below = source[high, left:right], source[low, left:right]
            for x in range(len(buffer)):
                buffer[x] += a * above[x] + b * below[x]
        scales = scale_x[left:right]
        for x in range(len(buffer)):
            buffer[x] *= scales[x]
        weight, middle = taps[0], column[radius:]
        for x in range(len(row)):
            row[x] = weight * middle[x]
        for k in range(1, radius + 1):
            weight, before, after = taps[k], column[radius - k :], column[radius + k :]
            for x in range(len(row)):
                row[x] += weight * (before[x] + after[x])
        weight, scales, finished = scale_y[y], scale_x[x0:x1], target[y, x0:x1]
        for x in range(len(row)):
            finished[x] = weight * scales[x] * row[x]

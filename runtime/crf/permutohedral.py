"""The permutohedral lattice of five dimensions, in numba.

Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (2010), as
in the code of Kraehenbuehl and Koltun: pixels are splatted onto the corners of the simplex that they
lie in, the lattice is blurred along its six axes, and pixels are interpolated from it (sliced).
Their sums run over a hash table. Here every sum runs in a fixed order, so that a result has the
same bits for any number of threads:

* The image is divided into blocks of `BLOCK_PX`. Each block has its own list of vertices (slots),
  small enough for the cache. Splatting sums within the block's slots first, and then, for each
  vertex, over the slots of all blocks.
* Vertices are sorted by their packed key. The key of a neighbour along an axis differs by a
  constant, so neighbours are found by merging two sorted lists, and blurring reads memory in order.
* The position of a pixel is split, in float64, into multiples of the lattice's period and a rest
  (`lattice.axis_table`). The weights of a pixel therefore depend, to the last bit, only on its
  position in the slide and its colour, and not on the tile.

A vertex has six coordinates with sum zero, all equal modulo six; the sixth is not stored. The other
five are packed into one int64 (`lattice.strides`).
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

DIMENSIONS = 5
CORNERS = 6  # of a simplex, and axes to blur along
BLOCK_PX = 64  # at most CORNERS * BLOCK_PX^2 slots, which fit into uint16
TABLE_SIZE = 1 << 15  # of a block's hash table; more than its slots
CHUNK = 4096  # vertices of one task
HASH = 0x9E3779B1  # Knuth's multiplicative constant, 2^32 / golden ratio
ALPHA = 1.0 / (1.0 + 2.0**-DIMENSIONS)  # inverse gain of the blur, as in the reference code


# Python numbers would turn sums of float32 into float64.
ZERO, HALF, ONE, TWO, THREE = (np.float32(n) for n in (0, 0.5, 1, 2, 3))
FOUR, FIVE, SIX, SIXTH = (np.float32(n) for n in (4, 5, 6, 1 / 6))

Bytes = NDArray[np.uint8]
Slots = NDArray[np.uint16]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float32]


@njit(parallel=True, cache=True)
def embed(
    image: Bytes,
    columns: Floats,
    rows: Floats,
    column_keys: Longs,
    row_keys: Longs,
    colours: Floats,
    strides: Longs,
    weights: Floats,
    slots: Slots,
    keys: Longs,
) -> Longs:
    """Find the simplex of every pixel, with a list of vertices for each block.

    Parameters
    ----------
    image
        (H, W, 3) uint8.
    columns, rows
        (W,) and (H,) float32: the rest of each elevated position.
    column_keys, row_keys
        (W,) and (H,) int64: the whole periods of each position, as a part of the key.
    colours
        (3, 256) float32: the elevated levels of each colour.
    strides
        (6,) int64: stride of each coordinate in the key; the last is 0.
    weights, slots
        Written: (H*W, 6) float32 and uint16, in the order of `block_of`.
    keys
        Written: (H*W*6,) int64; the vertices of a block begin at 6 times its first pixel.

    Returns
    -------
    (blocks,) int64: number of vertices of each block.
    """
    height, width = image.shape[:2]
    across = (width + BLOCK_PX - 1) // BLOCK_PX
    blocks = across * ((height + BLOCK_PX - 1) // BLOCK_PX)
    counts = np.empty(blocks, np.int64)
    for block in prange(blocks):
        y0, y1, x0, x1, first = block_of(block, across, height, width)
        last = first + (y1 - y0) * (x1 - x0)
        counts[block] = embed_block(
            image[y0:y1, x0:x1],
            columns[x0:x1],
            rows[y0:y1],
            column_keys[x0:x1],
            row_keys[y0:y1],
            colours,
            strides,
            weights[first:last],
            slots[first:last],
            keys[CORNERS * first : CORNERS * last],
        )
    return counts


@njit(cache=True)
def embed_block(
    image: Bytes,
    columns: Floats,
    rows: Floats,
    column_keys: Longs,
    row_keys: Longs,
    colours: Floats,
    strides: Longs,
    weights: Floats,
    slots: Slots,
    keys: Longs,
) -> int:
    """Find the simplices of one block's pixels, and return the number of their vertices."""
    table = np.full(TABLE_SIZE, -1, np.int32)
    elevated = np.empty(CORNERS, np.float32)
    share = np.empty(CORNERS, np.float32)
    rank, by_rank = np.empty(CORNERS, np.int64), np.empty(CORNERS, np.int64)
    step = strides.sum()
    count = pixel = 0
    for y in range(len(rows)):
        for x in range(len(columns)):
            elevate(columns[x], rows[y], image[y, x], colours, elevated)
            key = column_keys[x] + row_keys[y] + locate(elevated, strides, share, rank, by_rank)
            for corner in range(CORNERS):
                at = ((key * HASH) >> 15) & (TABLE_SIZE - 1)
                while table[at] >= 0 and keys[table[at]] != key:
                    at = (at + 1) & (TABLE_SIZE - 1)
                if table[at] < 0:
                    table[at] = count
                    keys[count] = key
                    count += 1
                weights[pixel, corner] = share[corner]
                slots[pixel, corner] = table[at]
                # The next corner: 1 more in all coordinates, 6 less in the next one by rank.
                key += step - CORNERS * strides[by_rank[DIMENSIONS - corner]]
            pixel += 1
    return count


@njit(cache=True)
def elevate(u: np.float32, v: np.float32, colour: Bytes, colours: Floats, elevated: Floats) -> None:
    """Elevate a pixel to the plane of sum zero; ``u`` and ``v`` are the rests of its column and row."""
    r, g, b = colours[0, colour[0]], colours[1, colour[1]], colours[2, colour[2]]
    rgb = r + g + b
    elevated[0] = u + v + rgb
    elevated[1] = v + rgb - u
    elevated[2] = rgb - TWO * v
    elevated[3] = g + b - THREE * r
    elevated[4] = b - FOUR * g
    elevated[5] = -FIVE * b


@njit(cache=True)
def locate(elevated: Floats, strides: Longs, share: Floats, rank: Longs, by_rank: Longs) -> int:
    """Find the simplex that a point of the plane lies in; Adams et al. 2010, section 3.2.

    Parameters
    ----------
    elevated
        (6,) float32, the point; overwritten.
    strides
        (6,) int64, as in `embed`.
    share
        Written: (6,) float32, barycentric coordinates of the corners.
    rank, by_rank
        Written: (6,) int64, rank of each coordinate in descending order of the point's offset from
        corner 0, and the coordinate of each rank.

    Returns
    -------
    The key of corner 0, whose coordinates are multiples of six.
    """
    key = excess = 0
    for i in range(CORNERS):
        period = np.floor(elevated[i] * SIXTH + HALF)
        elevated[i] -= period * SIX
        excess += int(period)
        key += CORNERS * int(period) * strides[i]
    for i in range(CORNERS):
        rank[i] = excess
    for i in range(DIMENSIONS):
        for j in range(i + 1, CORNERS):
            ahead = elevated[i] >= elevated[j]
            rank[i] += not ahead
            rank[j] += ahead
    for i in range(CORNERS):
        # Back onto the plane of sum zero.
        if rank[i] < 0:
            rank[i] += CORNERS
            elevated[i] -= SIX
            key += CORNERS * strides[i]
        elif rank[i] > DIMENSIONS:
            rank[i] -= CORNERS
            elevated[i] += SIX
            key -= CORNERS * strides[i]
        by_rank[rank[i]] = i
    share[0] = ONE + (elevated[by_rank[5]] - elevated[by_rank[0]]) * SIXTH
    for corner in range(1, CORNERS):
        before, after = by_rank[DIMENSIONS - corner], by_rank[CORNERS - corner]
        share[corner] = (elevated[before] - elevated[after]) * SIXTH
    return key


@njit(cache=True, inline="always")
def block_of(block: int, across: int, height: int, width: int) -> tuple[int, int, int, int, int]:
    """Return the rows, columns and first pixel of a block, with pixels counted block by block."""
    y0, x0 = block // across * BLOCK_PX, block % across * BLOCK_PX
    y1, x1 = min(y0 + BLOCK_PX, height), min(x0 + BLOCK_PX, width)
    return y0, y1, x0, x1, y0 * width + x0 * (y1 - y0)


@njit(parallel=True, cache=True)
def gather_keys(keys: Longs, firsts: Longs, starts: Longs) -> Longs:
    """Collect the keys of all slots, block after block; ``firsts`` are the blocks' first pixels."""
    gathered = np.empty(starts[-1], np.int64)
    for block in prange(len(firsts)):
        count = starts[block + 1] - starts[block]
        at = CORNERS * firsts[block]
        gathered[starts[block] : starts[block + 1]] = keys[at : at + count]
    return gathered


@njit(cache=True)
def number_vertices(keys: Longs, order: Longs) -> tuple[Longs, Ints, Ints]:
    """Give the vertices numbers in the order of their keys.

    ``order`` sorts the slots by key; here it also becomes ascending within each vertex.

    Returns
    -------
    The keys (V,) int64, ascending; the vertex of each slot (S,) int32; and where the slots of each
    vertex begin in ``order`` (V + 1,) int32.
    """
    slots = len(keys)
    vertices = np.empty(slots, np.int64)
    vertex_of = np.empty(slots, np.int32)
    starts = np.empty(slots + 1, np.int32)
    count = 0
    for place in range(slots):
        key = keys[order[place]]
        if count == 0 or vertices[count - 1] != key:
            vertices[count] = key
            starts[count] = place
            count += 1
        vertex_of[order[place]] = count - 1
        # The sort leaves equal keys in any order; sums need a fixed one.
        at, slot = place, order[place]
        while at > starts[count - 1] and order[at - 1] > slot:
            order[at] = order[at - 1]
            at -= 1
        order[at] = slot
    starts[count] = slots
    return vertices[:count].copy(), vertex_of, starts[: count + 1].copy()


@njit(parallel=True, cache=True)
def find_neighbours(keys: Longs, steps: Longs) -> Ints:
    """Find the vertices one step backwards and forwards along each axis; V stands for none.

    ``steps`` (6,) int64 are the steps along the axes in the key.

    Returns
    -------
    (6, 2, V) int32.
    """
    count = len(keys)
    neighbours = np.full((CORNERS, 2, count), count, np.int32)
    for axis in prange(CORNERS):
        at = 0
        for vertex in range(count):
            wanted = keys[vertex] + steps[axis]
            while at < count and keys[at] < wanted:
                at += 1
            if at < count and keys[at] == wanted:
                neighbours[axis, 1, vertex] = at
                neighbours[axis, 0, at] = vertex
    return neighbours


@njit(parallel=True, cache=True)
def collect(slot_values: Floats, order: Longs, starts: Ints, values: Floats) -> None:
    """Sum the slots of each vertex."""
    count = len(starts) - 1
    for chunk in prange((count + CHUNK - 1) // CHUNK):
        collect_part(slot_values, order, starts, values, chunk * CHUNK, min((chunk + 1) * CHUNK, count))


@njit(cache=True)
def collect_part(slot_values: Floats, order: Longs, starts: Ints, values: Floats, start: int, stop: int) -> None:
    """Sum the slots of vertices ``start`` to ``stop``."""
    channels = slot_values.shape[1]
    for vertex in range(start, stop):
        for c in range(channels):
            values[vertex, c] = 0
        for place in range(starts[vertex], starts[vertex + 1]):
            slot = order[place]
            for c in range(channels):
                values[vertex, c] += slot_values[slot, c]


@njit(parallel=True, cache=True)
def blur(values: Floats, neighbours: Ints, out: Floats) -> None:
    """Blur along one axis with (1/2, 1, 1/2); ``neighbours`` is (2, V)."""
    count = neighbours.shape[1]
    for chunk in prange((count + CHUNK - 1) // CHUNK):
        blur_part(values, neighbours, out, chunk * CHUNK, min((chunk + 1) * CHUNK, count))


@njit(cache=True)
def blur_part(values: Floats, neighbours: Ints, out: Floats, start: int, stop: int) -> None:
    """Blur vertices ``start`` to ``stop``."""
    for vertex in range(start, stop):
        before, after = neighbours[0, vertex], neighbours[1, vertex]
        for c in range(values.shape[1]):
            neighbour_sum = values[before, c] + values[after, c]
            out[vertex, c] = values[vertex, c] + HALF * neighbour_sum


@njit(parallel=True, cache=True)
def splat_ones(weights: Floats, slots: Slots, starts: Longs, shape: tuple[int, int]) -> Floats:
    """Splat an image of ones; returns one value per slot, (S, 1) float32."""
    height, width = shape
    across = (width + BLOCK_PX - 1) // BLOCK_PX
    slot_values = np.zeros((starts[-1], 1), np.float32)
    for block in prange(len(starts) - 1):
        y0, y1, x0, x1, first = block_of(block, across, height, width)
        local = slot_values[starts[block] : starts[block + 1]]
        for pixel in range(first, first + (y1 - y0) * (x1 - x0)):
            for corner in range(CORNERS):
                local[slots[pixel, corner], 0] += weights[pixel, corner]
    return slot_values


@njit(parallel=True, cache=True)
def slice_ones(values: Floats, vertex_of: Ints, weights: Floats, slots: Slots, starts: Longs, out: Floats) -> None:
    """Interpolate the pixels of one channel, into ``out`` (H, W) float32."""
    height, width = out.shape
    across = (width + BLOCK_PX - 1) // BLOCK_PX
    for block in prange(len(starts) - 1):
        y0, y1, x0, x1, pixel = block_of(block, across, height, width)
        local = vertex_of[starts[block] : starts[block + 1]]
        for y in range(y0, y1):
            for x in range(x0, x1):
                total = np.float32(0)
                for corner in range(CORNERS):
                    total += weights[pixel, corner] * values[local[slots[pixel, corner]], 0]
                out[y, x] = total
                pixel += 1


@njit(parallel=True, cache=True)
def scale(weights: Floats, factors: Floats) -> None:
    """Multiply the weights of each pixel by the pixel's factor, (H, W) float32."""
    height, width = factors.shape
    across = (width + BLOCK_PX - 1) // BLOCK_PX
    for block in prange(across * ((height + BLOCK_PX - 1) // BLOCK_PX)):
        y0, y1, x0, x1, pixel = block_of(block, across, height, width)
        for y in range(y0, y1):
            for x in range(x0, x1):
                for corner in range(CORNERS):
                    weights[pixel, corner] *= factors[y, x]
                pixel += 1

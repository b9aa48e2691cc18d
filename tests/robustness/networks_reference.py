"""The labels of a slide by a program of its own: OpenSlide, ONNX Runtime and NumPy, in double precision.

It shares no code with HistoStream, whose labels `tests.robustness.networks` compares with these.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE_PX = 512
NOT_ANALYSED = 255
Pixels = NDArray[np.uint8]
Labels = NDArray[np.uint8]
Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Format:
    """What a network takes and gives.

    Attributes
    ----------
    mean, std, scale
        Its input is (pixel * scale - mean) / std.
    channels_last
        Whether input and output are NHWC, not NCHW.
    probabilities
        Whether it gives probabilities, not logits.
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 1 / 255
    channels_last: bool = False
    probabilities: bool = False


def read_pixels(slide: Path) -> Pixels:
    """Read a whole slide at level 0, as OpenSlide's users do."""
    import openslide

    with openslide.OpenSlide(slide) as reader:
        image = reader.read_region((0, 0), 0, reader.dimensions)
    pixels: Pixels = np.asarray(image)[..., :3]
    return pixels


class Reference:
    """A network as its library exported it, run by ONNX Runtime, tile by tile.

    Parameters
    ----------
    file
        The exported file.
    form
        What it takes and gives.
    """

    def __init__(self, file: Path, form: Format) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._form = form

    def scores(self, tile: Pixels) -> Scores:
        """Return the probabilities (K, side, side) of a tile (side, side, 3)."""
        form = self._form
        x = (tile.astype(np.float64) * form.scale - np.array(form.mean)) / np.array(form.std)
        x = x if form.channels_last else x.transpose(2, 0, 1)
        (name,) = (source.name for source in self._session.get_inputs())
        output = self._session.run(None, {name: np.ascontiguousarray(x[None], np.float32)})[0][0].astype(np.float64)
        y: Scores = output.transpose(2, 0, 1) if form.channels_last else output
        if y.shape[1:] != tile.shape[:2]:
            y = enlarge(y, tile.shape[0])
        if form.probabilities:
            return y
        e = np.exp(y - y.max(axis=0))
        return np.asarray(e / e.sum(axis=0), np.float64)


def enlarge(planes: Scores, side: int) -> Scores:
    """Enlarge planes (K, h, w) to (K, side, side), linearly between the centres of pixels, as torch does."""
    import torch

    y = torch.nn.functional.interpolate(
        torch.from_numpy(planes)[None], size=(side, side), mode="bilinear", align_corners=False
    )
    enlarged: Scores = y[0].numpy()
    return enlarged


def starts_of(size: int, overlap: int, align: int) -> list[int]:
    """Return where tiles begin along an axis: even steps, the last one moved to the border, a multiple of align."""
    last = max(-(-size // align) * align - TILE_PX, 0)
    return [*range(0, last, TILE_PX - overlap), last]


def ramps(starts: list[int], number: int, overlap: int) -> Scores:
    """Return the weights of a tile along an axis: they rise and fall as a Hann window where it meets a neighbour."""
    weights: Scores = np.ones(TILE_PX)
    rise: Scores = np.sin(np.pi * (np.arange(overlap) + 0.5) / (2 * overlap)) ** 2
    if number > 0:
        weights[:overlap] = rise
    if number + 1 < len(starts):
        weights[TILE_PX - overlap :] = rise[::-1]
    return weights


def nearest(starts: list[int], number: int, size: int) -> slice:
    """Return the pixels of an axis that are nearer to this tile's centre than to any other's."""
    middle = [start + TILE_PX / 2 for start in starts]
    first = 0 if number == 0 else int(np.ceil((middle[number - 1] + middle[number]) / 2))
    stop = size if number + 1 == len(starts) else int(np.ceil((middle[number] + middle[number + 1]) / 2))
    return slice(first, stop)


def reference_labels(
    pixels: Pixels, reference: Reference, analysed: NDArray[np.bool_], overlap: int, align: int, tiles: int
) -> tuple[Labels, Labels]:
    """Label a slide twice: by blending with Hann windows, and by each pixel's nearest tile.

    Parameters
    ----------
    pixels
        (H, W, 3), the slide.
    reference
        The network.
    analysed
        (H, W), where ``histo-infer`` has labels: a tile with a pixel of none was left out, as glass.
    overlap, align
        Of the grid of tiles, in pixels.
    tiles
        How many tiles were inferred.
    """
    height, width = pixels.shape[:2]
    ys, xs = starts_of(height, overlap, align), starts_of(width, overlap, align)
    beyond = [(0, max(starts[-1] + TILE_PX - size, 0)) for starts, size in ((ys, height), (xs, width))]
    padded = np.pad(pixels, (*beyond, (0, 0)), mode="reflect")
    sums: Scores | None = None
    alone = np.full((height, width), NOT_ANALYSED, np.uint8)
    count = 0
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            if not analysed[y : y + TILE_PX, x : x + TILE_PX].all():
                continue
            count += 1
            scores = reference.scores(padded[y : y + TILE_PX, x : x + TILE_PX])
            if sums is None:
                sums = np.zeros((len(scores), *padded.shape[:2]))
            window = np.outer(ramps(ys, i, overlap), ramps(xs, j, overlap))
            sums[:, y : y + TILE_PX, x : x + TILE_PX] += scores * window
            rows, columns = nearest(ys, i, height), nearest(xs, j, width)
            inside = scores[:, rows.start - y : rows.stop - y, columns.start - x : columns.stop - x]
            alone[rows, columns] = inside.argmax(axis=0)
    if sums is None or count != tiles:
        raise ValueError(f"{count} tiles of the slide have labels everywhere, but {tiles} were inferred")
    return np.asarray(sums[:, :height, :width].argmax(axis=0), np.uint8), alone


def agreement(labels: Labels, expected: Labels) -> dict[str, Any]:
    """Compare two label maps where both have a label."""
    both = (labels != NOT_ANALYSED) & (expected != NOT_ANALYSED)
    same = labels[both] == expected[both]
    shares = np.bincount(expected[both], minlength=1) / both.sum()
    return {
        "pixels": int(both.sum()),
        "differing": int((~same).sum()),
        "agreement": float(same.mean()),
        "shares": [round(float(share), 4) for share in shares],
    }

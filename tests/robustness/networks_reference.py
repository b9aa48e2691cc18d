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
    output
        What it gives: "logits", "probabilities", "foreground" (the probability of the second of two classes), or
        "sigmoids" (of classes none of which is the background: below 0.5 in all of them is background).
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 1 / 255
    channels_last: bool = False
    output: str = "logits"


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
        if form.output == "foreground":
            return np.concatenate([1 - y, y])
        if form.output == "sigmoids":
            return np.concatenate([np.full_like(y[:1], 0.5), y])
        if form.output == "probabilities":
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


def starts_of(size: int, tile: int, overlap: int, align: int) -> list[int]:
    """Return where tiles begin along an axis: even steps, the last one moved to the border, a multiple of align."""
    last = max(-(-size // align) * align - tile, 0)
    return [*range(0, last, tile - overlap), last]


def ramps(starts: list[int], number: int, tile: int, overlap: int) -> Scores:
    """Return the weights of a tile along an axis: they rise and fall as a Hann window where it meets a neighbour."""
    weights: Scores = np.ones(tile)
    rise: Scores = np.sin(np.pi * (np.arange(overlap) + 0.5) / (2 * overlap)) ** 2
    if number > 0:
        weights[:overlap] = rise
    if number + 1 < len(starts):
        weights[tile - overlap :] = rise[::-1]
    return weights


def nearest(starts: list[int], number: int, tile: int, size: int) -> slice:
    """Return the pixels of an axis that are nearer to this tile's centre than to any other's."""
    middle = [start + tile / 2 for start in starts]
    first = 0 if number == 0 else int(np.ceil((middle[number - 1] + middle[number]) / 2))
    stop = size if number + 1 == len(starts) else int(np.ceil((middle[number] + middle[number + 1]) / 2))
    return slice(first, stop)


def reference_labels(
    pixels: Pixels, reference: Reference, analysed: NDArray[np.bool_], grid: dict[str, int], align: int
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
    grid
        Side and overlap of the tiles in pixels, and how many were inferred, as ``run.json`` has them.
    align
        Tiles begin at multiples of it, in pixels.
    """
    height, width = pixels.shape[:2]
    tile, overlap, tiles = grid["tile_px"], grid["overlap_px"], grid["tiles_inferred"]
    ys, xs = starts_of(height, tile, overlap, align), starts_of(width, tile, overlap, align)
    beyond = [(0, max(starts[-1] + tile - size, 0)) for starts, size in ((ys, height), (xs, width))]
    padded = np.pad(pixels, (*beyond, (0, 0)), mode="reflect")
    sums: Scores | None = None
    alone = np.full((height, width), NOT_ANALYSED, np.uint8)
    count = 0
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            if not analysed[y : y + tile, x : x + tile].all():
                continue
            count += 1
            scores = reference.scores(padded[y : y + tile, x : x + tile])
            if sums is None:
                sums = np.zeros((len(scores), *padded.shape[:2]))
            window = np.outer(ramps(ys, i, tile, overlap), ramps(xs, j, tile, overlap))
            sums[:, y : y + tile, x : x + tile] += scores * window
            rows, columns = nearest(ys, i, tile, height), nearest(xs, j, tile, width)
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

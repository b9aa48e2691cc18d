r"""Run the comparisons of the two papers on generative models on available data.

::

    python -m histostream.benchmarks.accuracy.generative --data ../shared/data --table glas \
        --size quarter --runs runs/table --out benchmarks/results

Pyramid GAN (paper 002): ``glas`` is its table 2; ``glas-20`` to ``glas-80`` are the columns of its tables 4 to 7,
with labels for that percentage of the images; ``glas-painted`` is its table 1; ``cue`` is a drawn set in which
distant pixels decide the class (docs/methods.md, 3.13.2). Image-to-image translation (paper 003): ``mnist-simple``,
``mnist-hard`` and ``mnist-large`` are columns of its table 1. ``--size quarter`` (of the paper's side) and ``small``
take some hours on two CPU cores; ``--size paper`` is the shipped recipes, for a GPU. The tables are in
``generative.toml``.

Object scores of two references without a network are added: "everything is gland", and the true binary mask, in which
touching glands are one object.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from histostream.benchmarks.accuracy.cells import Cell, Plain, fill_table, options
from histostream.benchmarks.accuracy.experiments import cell_name, read_tables
from histostream.benchmarks.accuracy.image_metrics import (
    MS_SSIM_MIN_PX,
    frechet_inception_distance,
    ms_ssim,
    ms_ssim_among,
    nuclei_encoder,
)
from histostream.benchmarks.accuracy.score import Predict, score
from histostream.export.trained import config_of, find_checkpoint
from histostream.training import checkpoint, datasets, synthetic
from histostream.training.data import DataSet, Sample, StoredPicture
from histostream.training.methods.pyramid_gan import sample
from histostream.training.methods.translation import method as translation

TABLES = read_tables("generative")
TRANSDUCTIVE = ", transductive"  # algorithms for which the test images are among those without labels
CUE_MPP = 1.0  # drawn images have no resolution


def cell(name: str, size_name: str, algorithm: str, number: int, data: Path = Path()) -> Cell:
    """Return a cell; cells of one table and size differ in the algorithm, and the seed."""
    table = TABLES[name]
    size = table.sizes[size_name]

    def open_data() -> DataSet:
        if name == "cue":
            return dataclasses.replace(synthetic.long_range_cue(1000, 100, seed=number), mpp=CUE_MPP)
        data_set = datasets.open_dataset(table.source.format(data=data, seed=number) + size.query)
        return transductive(data_set) if algorithm.endswith(TRANSDUCTIVE) else data_set

    further: Callable[[Path, Sequence[Sample]], Plain] | None = None
    if table.method == "translation":
        further = digit_scores
    elif name == "glas-painted":
        further = painted_scores
    recipe = table.recipe(size, algorithm, number)
    key = cell_name(name, size_name, algorithm, number)
    return Cell(key, algorithm, number, recipe, functools.cache(open_data), further)


def references(data_set: DataSet) -> Plain:
    """Score two references without a network on the test images: a floor, and the ceiling of a binary mask.

    Returns
    -------
    Scores as of `score`, by name: of labels that are all class 1, and of the true labels, in which touching objects are
    one. Empty if the set has no objects.
    """
    if len(data_set.classes) != 2 or any(s.instances is None for s in data_set.test):
        return {}
    classes = [name for name, _ in data_set.classes]
    predictors: dict[str, Predict] = {
        f"everything is {classes[1]}": lambda sample: np.ones_like(sample.labels),
        "perfect binary mask": lambda sample: sample.labels,
    }
    scored = {name: score(data_set.test, predict, classes) for name, predict in predictors.items()}
    for one in scored.values():
        del one["each_image"]
    return scored


def transductive(data_set: DataSet) -> DataSet:
    """Add the test images, without labels, to the images to train on."""
    test_images = [StoredPicture(f"test/{s.name}", s.group, s.image) for s in data_set.test]
    pools = {**data_set.pools, "unlabelled": (*data_set.pools.get("unlabelled", ()), *test_images)}
    return dataclasses.replace(data_set, pools=pools)


def digit_scores(run: Path, samples: Sequence[Sample]) -> Plain:
    """Score the probabilities of the second class, and the residual.

    Returns
    -------
    ``soft_dice``: Dice of the probabilities, pooled, smoothed by 1, as the paper measures it. For a model that
    translates, ``residual``: mean absolute residual on the digit, divided by that outside it.
    """
    folder = find_checkpoint(run)
    saved = checkpoint.read(folder)
    state = translation.build(config_of(folder, saved), len(saved.classes), saved.channels)
    checkpoint.load(folder, state)
    intersection, total = 0.0, 0.0
    sums, counts = np.zeros(2), np.zeros(2)
    for one in samples:
        image = _nchw(one.image)
        p = translation.probabilities(state, image)[0, 0].numpy().astype(np.float64)
        intersection += p[one.labels == 1].sum()
        total += p.sum() + (one.labels == 1).sum()
        if state.config.objective == "translation":
            # Grey 127.5 is no residual.
            off = np.abs(translation.paint(state, image)["residual"][0, 0].numpy() - 127.5)
            for k in (0, 1):
                sums[k] += off[one.labels == k].sum()
                counts[k] += (one.labels == k).sum()
    scores: Plain = {"soft_dice": round(float((2 * intersection + 1) / (total + 1)), 5)}
    if counts.all():
        scores["residual"] = round(float((sums[1] / counts[1]) / (sums[0] / counts[0])), 2)
    return scores


def painted_scores(run: Path, samples: Sequence[Sample], *, count: int = 10) -> Plain:
    """Score the images that a run paints from label maps against the true images.

    Returns
    -------
    ``fid``: Fréchet distance of the painted images to the true ones, and between two halves of the true ones.
    ``ms_ssim``: of ``count`` images painted from the first label map, to the true image and among each other; None if
    the images are too small.
    """
    painter = sample.open_painter(run)
    real = [_nchw(s.image) for s in samples]
    painted = [_nchw(sample.paint(painter, s.labels, (i,))) for i, s in enumerate(samples)]
    extractor = nuclei_encoder()
    to_real = frechet_inception_distance(real, painted, extractor)
    halves = frechet_inception_distance(real[::2], real[1::2], extractor)
    similar = None
    if min(samples[0].labels.shape) >= MS_SSIM_MIN_PX:
        several = torch.cat([_nchw(sample.paint(painter, samples[0].labels, (0, k))) for k in range(count)])
        similar = {
            "to_true": round(float(ms_ssim(several, real[0].expand_as(several)).mean()), 4),
            "among": round(ms_ssim_among(several), 4),
        }
    return {
        "fid": {
            "painted": round(to_real.distance, 5),
            "real_halves": round(halves.distance, 5),
            "extractor": extractor.name,
            "images": len(samples),
        },
        "ms_ssim": similar,
    }


def _nchw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1)[None].copy())


def references_of(source: str) -> Plain:
    """Open a data set and score its references."""
    return references(datasets.open_dataset(source))


@click.command()
@click.option("--table", "name", type=click.Choice(list(TABLES)), required=True)
@options
def main(name: str, **values: Any) -> None:
    """Run the cells of a table that are not in its result file yet."""
    table = TABLES[name]
    scores = None
    if name.startswith("glas") and name != "glas-painted":
        source = table.source.format(data=values["data_dir"])
        scores = functools.partial(references_of, source)
    fill_table(cell, name, table, f"accuracy-{name}", references=scores, **values)


if __name__ == "__main__":
    main()

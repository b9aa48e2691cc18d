r"""The comparisons of the two generative papers, on data at hand.

::

    python -m histostream.benchmarks.accuracy.generative --data ../shared/data --table glas \
        --size quarter --runs runs/table --out benchmarks/results

Of the pyramid GAN (paper 002): ``glas`` is its table 2, ``glas-20`` to ``glas-80`` a column each of
its tables 4 to 7, with labels for so many per cent of the images, ``glas-painted`` its table 1;
``cue`` is the drawn set whose classes are told by what is far away (methods.md 3.13.2). Of
image-to-image translation (paper 003): ``mnist-simple``, ``mnist-hard`` and ``mnist-large`` are
columns of its table 1. ``--size quarter`` (of the paper's side) and ``small`` are what two CPU
cores do in some hours; ``--size paper`` is for a GPU, and is the shipped recipes as they are.

Beside object scores stand those of no network at all: "everything is gland", and the true binary
mask, whose touching glands are one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from histostream.benchmarks.accuracy.cells import Cell, Plain, fill_table, options, settings_of
from histostream.benchmarks.accuracy.image_metrics import (
    MS_SSIM_MIN_PX,
    frechet_inception_distance,
    ms_ssim,
    ms_ssim_among,
    nuclei_encoder,
)
from histostream.benchmarks.accuracy.score import Predict, score
from histostream.export.trained import config_of, find_checkpoint
from histostream.training import checkpoint, datasets, methods, synthetic
from histostream.training.data import DataSet, Sample, StoredPicture
from histostream.training.methods.pyramid_gan import sample
from histostream.training.methods.translation import method as translation
from histostream.training.recipe import read_recipe

PYRAMID, TRANSLATION = "pyramid_gan", "translation"
# Name in the paper, and the shipped recipes that make it (none: the method as it is).
SUPERVISED: dict[str, tuple[str, ...]] = {
    "m-FCDenseNet": ("pyramid-m-fcdensenet",),
    "m-FCDenseNet + pyramid": ("pyramid-segmenters",),
    "full": (),
}
FEWER_LABELS: dict[str, tuple[str, ...]] = {
    "m-FCDenseNet": ("pyramid-m-fcdensenet",),
    "m-FCDenseNet + pyramid": ("pyramid-segmenters",),
    "consistency": ("pyramid-consistency",),
    "consistency, transductive": ("pyramid-consistency",),
    "semi-supervised": ("pyramid-semi",),
    "semi-supervised, transductive": ("pyramid-semi",),
}
TRANSDUCTIVE = ", transductive"  # the test images are among those without labels
PAINTERS: dict[str, tuple[str, ...]] = {
    "pix2pix": ("pyramid-pix2pix",),
    "pix2pixHD": ("pyramid-pix2pixhd",),
    "pyramid GAN": (),
}
DIGITS: dict[str, tuple[str, ...]] = {
    "segmentation only": ("translation-segmentation-only",),
    "AE baseline": ("translation-autoencoder",),
    "proposed": (),
    "proposed, separate decoder": ("translation-separate",),
    "proposed, skips concatenated": ("translation-skip-concat",),
    "proposed, skips summed": ("translation-skip-sum",),
    "proposed, no skips": ("translation-skip-none",),
}


@dataclass(frozen=True, slots=True)
class Size:
    """How a table is trained, on top of its recipes.

    Attributes
    ----------
    mpp
        Resolution, um per pixel.
    recipes
        Shipped recipes that come before those of the algorithm.
    settings
        Tables of a recipe, by name, after all recipes; they are the same for all algorithms.
    own
        Settings of a single algorithm.
    level_steps
        Steps of each level of a pyramid; 0: as the recipes and settings say.
    query
        More options of the set.
    """

    mpp: float
    recipes: tuple[str, ...]
    settings: dict[str, dict[str, Any]]
    own: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    level_steps: int = 0
    query: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its method, algorithms, images and sizes.

    Attributes
    ----------
    source
        The set; "{data}" and "{seed}" are filled in. Or what draws one of a seed.
    labelled
        Share of the images that keep their labels.
    """

    method: str
    algorithms: dict[str, tuple[str, ...]]
    source: str | Callable[[int], DataSet]
    sizes: dict[str, Size]
    labelled: float = 1.0


# What pix2pix and pix2pixHD take of 128 px; the first has one image a step in its paper.
GLAS_QUARTER = Size(
    2.4802,
    ("pyramid-paper", "pyramid-recommended", "pyramid-quarter"),
    {"schedule": {"batch": 4, "crop_px": 128, "validate_every": 250}},
    {
        "pix2pix": {"method": {"g_width": 16, "g_downs": 6}},
        "pix2pixHD": {"method": {"g_width": 16, "g_downs": 3, "g_blocks": 4}},
    },
    level_steps=1500,
)
GLAS_SIZES = {"quarter": GLAS_QUARTER, "paper": Size(0.62005, ("pyramid-paper",), {})}
GLAS = "glas:{data}/glands-glas"
# Segmentation and reconstruction weigh alike in every row, as in the paper's AE baseline (its
# proposed model has 0.01 : 50). D learns ten times as fast as G, as printed.
DIGITS_SMALL = Size(
    1.0,
    ("translation-paper",),
    {
        "method": {
            "width": 8,
            "unique_channels": 32,
            "mlp_width": 64,
            "discriminator_width": 16,
            "learning_rate": 1e-3,
            "discriminator_learning_rate": 1e-2,
            "lambda_rec": 50.0,
            "lambda_seg": 50.0,
            "labelled_share": 0.25,
        },
        "schedule": {"steps": 8000, "batch": 8, "validate_every": 500},
    },
)


def _digits(variant: str, *further: str) -> Table:
    source = f"mnist:{{data}}/mnist?variant={variant}&count=59500&labelled=0.01&seed={{seed}}"
    paper = Size(1.0, ("translation-paper", *further), {}, query="&test=10000")
    sizes = {"paper": paper, "reduced": _reduced(paper)}
    if variant == "hard":  # the paper's gaps: .13 and .08; "simple": .14 and .04
        sizes["small"] = DIGITS_SMALL
    return Table(TRANSLATION, DIGITS, source, sizes)


def _reduced(paper: Size) -> Size:
    """Return the run of 40,000 steps (methods.md 4.11.3), of all algorithms alike."""
    recipe = read_recipe(TRANSLATION, methods.load_method(TRANSLATION), (*paper.recipes, "translation-reduced"))
    steps = {"steps": recipe.schedule.steps, "validate_every": recipe.schedule.validate_every}
    return dataclasses.replace(paper, settings={"schedule": steps})


def _cues(seed: int) -> DataSet:
    return dataclasses.replace(synthetic.long_range_cue(1000, 100, seed=seed), mpp=CUE_MPP)


CUE_MPP = 1.0  # drawn images have no size
# Networks whose reach is 40 px, on images of 128 px; three levels, the coarsest of 32 px.
CUE_SMALL = Size(
    CUE_MPP,
    (),
    {
        "method": {
            "level_batches": "",
            "first_width": 8,
            "growth": 6,
            "layers": 2,
            "poolings": 2,
            "dropout": 0.0,
            "segmenter_noise": 0.0,
            "segmenter_learning_rate": 5e-3,
            "beta1": 0.9,
        },
        "schedule": {"batch": 8, "crop_px": 128, "validation": 0.0, "select": "last", "validate_every": 500},
    },
    {"m-FCDenseNet + pyramid": {"method": {"levels": 3}}},
    level_steps=400,
)
TABLES = {
    "cue": Table(PYRAMID, {k: v for k, v in SUPERVISED.items() if v}, _cues, {"small": CUE_SMALL}),
    "glas": Table(PYRAMID, SUPERVISED, GLAS, GLAS_SIZES),
    **{
        f"glas-{percent}": Table(PYRAMID, FEWER_LABELS, GLAS, GLAS_SIZES, percent / 100) for percent in (20, 40, 60, 80)
    },
    "glas-painted": Table(PYRAMID, PAINTERS, GLAS, GLAS_SIZES),
    "mnist-simple": _digits("simple"),
    "mnist-hard": _digits("hard"),
    "mnist-large": _digits("large", "translation-128"),
}


def cell(table: str, size: str, algorithm: str, number: int, data: Path = Path()) -> Cell:
    """Return a cell; cells of one table and size differ in the algorithm, and the seed."""
    of = TABLES[table]
    how = of.sizes[size]
    method, configs = methods.load_method(of.method), (*how.recipes, *of.algorithms[algorithm])
    tables = [how.settings, how.own.get(algorithm, {}), {"schedule": {"seed": number}}]
    if of.labelled < 1:
        tables.append({"schedule": {"labelled": of.labelled}})
    recipe = read_recipe(of.method, method, configs, settings_of(*tables), mpp=how.mpp)
    if how.level_steps:
        steps = how.level_steps * recipe.config.levels
        schedule = dataclasses.replace(recipe.schedule, steps=steps)
        recipe = dataclasses.replace(recipe, schedule=schedule)
    name = f"{table}-{size}-{algorithm}-{number}".lower().replace(" ", "-").replace(",", "")

    def opened() -> DataSet:
        if callable(of.source):
            return of.source(number)
        found = datasets.open_dataset(of.source.format(data=data, seed=number) + how.query)
        return transductive(found) if algorithm.endswith(TRANSDUCTIVE) else found

    further: Callable[[Path, Sequence[Sample]], Plain] | None = None
    if of.method == TRANSLATION:
        further = digit_scores
    elif table == "glas-painted":
        further = painted_scores
    return Cell(name, algorithm, number, recipe, functools.cache(opened), further)


def references(found: DataSet) -> Plain:
    """Score what needs no network on the test images: a floor, and the ceiling of a binary mask.

    Returns
    -------
    By name, as of `score`: that all is of class 1, and the true labels, in which objects that touch
    are one. Nothing where the set has no objects.
    """
    if len(found.classes) != 2 or any(s.instances is None for s in found.test):
        return {}
    classes = [name for name, _ in found.classes]
    made: dict[str, Predict] = {
        f"everything is {classes[1]}": lambda sample: np.ones_like(sample.labels),
        "perfect binary mask": lambda sample: sample.labels,
    }
    scored = {name: score(found.test, predict, classes) for name, predict in made.items()}
    for one in scored.values():
        del one["each_image"]
    return scored


def transductive(found: DataSet) -> DataSet:
    """Put the test images among those without labels."""
    shown = [StoredPicture(f"test/{s.name}", s.group, s.image) for s in found.test]
    pools = {**found.pools, "unlabelled": (*found.pools.get("unlabelled", ()), *shown)}
    return dataclasses.replace(found, pools=pools)


def digit_scores(run: Path, samples: Sequence[Sample]) -> Plain:
    """Score the probabilities of the second class, and where the residual is.

    Returns
    -------
    ``soft_dice``: Dice of the probabilities, pooled, smoothed by 1: the paper's measure. Of a model
    that translates ``residual``: mean absolute residual on the digit, over that elsewhere.
    """
    folder = find_checkpoint(run)
    said = checkpoint.read(folder)
    state = translation.build(config_of(folder, said), len(said.classes), said.channels)
    checkpoint.load(folder, state)
    both, either = 0.0, 0.0
    sums, counts = np.zeros(2), np.zeros(2)
    for one in samples:
        image = _nchw(one.image)
        p = translation.probabilities(state, image)[0, 0].numpy().astype(np.float64)
        both += p[one.labels == 1].sum()
        either += p.sum() + (one.labels == 1).sum()
        if state.config.objective == "translation":
            # Grey 127.5 is no residual.
            off = np.abs(translation.paint(state, image)["residual"][0, 0].numpy() - 127.5)
            for k in (0, 1):
                sums[k] += off[one.labels == k].sum()
                counts[k] += (one.labels == k).sum()
    found: Plain = {"soft_dice": round(float((2 * both + 1) / (either + 1)), 5)}
    if counts.all():
        found["residual"] = round(float((sums[1] / counts[1]) / (sums[0] / counts[0])), 2)
    return found


def painted_scores(run: Path, samples: Sequence[Sample], *, each: int = 10) -> Plain:
    """Score what a run paints of label maps against the images that belong to them.

    Returns
    -------
    ``fid``: Fréchet distance of the painted images to the true ones, and of the halves of the true
    ones to each other. ``ms_ssim``: of ``each`` images of the first label map, to the true image
    and among each other; None where images are too small for it.
    """
    painter = sample.open_painter(run)
    real = [_nchw(s.image) for s in samples]
    painted = [_nchw(sample.paint(painter, s.labels, (i,))) for i, s in enumerate(samples)]
    extractor = nuclei_encoder()
    to_real = frechet_inception_distance(real, painted, extractor)
    halves = frechet_inception_distance(real[::2], real[1::2], extractor)
    similar = None
    if min(samples[0].labels.shape) >= MS_SSIM_MIN_PX:
        several = torch.cat([_nchw(sample.paint(painter, samples[0].labels, (0, k))) for k in range(each)])
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


@click.command()
@click.option("--table", type=click.Choice(list(TABLES)), required=True)
@options
def main(table: str, **how: Any) -> None:
    """Make the cells of a table that are not there yet."""
    of = TABLES[table]
    scores = None
    if of.source == GLAS and of.algorithms is not PAINTERS:
        source = GLAS.format(data=how["data_dir"])
        scores = functools.partial(_references_of, source)
    fill_table(
        cell,
        table,
        algorithms=of.algorithms,
        sizes=of.sizes,
        repeats=3,
        name=f"accuracy-{table}",
        references=scores,
        **how,
    )


def _references_of(source: str) -> Plain:
    return references(datasets.open_dataset(source))


if __name__ == "__main__":
    main()

r"""Run the comparisons of the two papers on domain adaptation on available data.

::

    python -m histostream.benchmarks.accuracy.adaptation --data ../shared/data --pair tnbc-kirc \
        --size short --runs runs/table --out benchmarks/results

========== ================================ ==================================================
pair       method                           source -> target
========== ================================ ==================================================
tnbc-kirc  self-ensembling (paper 001)      TNBC -> the kidney clear-cell images of MoNuSeg; three
                                            of them: each is the test image of one fold
tnbc-other self-ensembling                  TNBC -> the other organs of MoNuSeg
other-tnbc self-ensembling                  the other organs of MoNuSeg -> TNBC, by patients
epfl-vnc   APMA-Net (paper 004, its pair)   hippocampus -> ventral nerve cord, split along x
nuclei     self-ensembling                  drawn nuclei -> the same in other colours and blurred
em         APMA-Net                         drawn mitochondria -> the same in inverted contrast
========== ================================ ==================================================

Rows train on target images without their labels; other target images are scored. The oracle trains on the same images
with their labels. Rows and sizes are in ``adaptation.toml``.

**UDA.** Every row measures its batch statistics again on the target's training images. Short runs score the last
checkpoint, so that no target label chooses it; the paper's recipe scores the one chosen by labelled validation images
of the target, as the cited code does. The last checkpoint with the running statistics of its training is scored as
well; "source + target forward" is its control. Each is scored without and with the dense CRF, whose parameters are
fixed.

**APMA-Net.** For each seed, one source model is trained to convergence and chosen by source validation. Every row
starts from it, "no adaptation" and the oracle too. Two checkpoints are scored: the one with the best Jaccard index on
labelled validation images of the target, and the last.

The result files of size "small" are of earlier recipes, which did not follow these rules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from histostream.benchmarks.accuracy.cells import Cell, fill_table, options
from histostream.benchmarks.accuracy.experiments import cell_name, read_tables
from histostream.runtime.crf import CrfParams
from histostream.training import datasets, splits, synthetic
from histostream.training.data import DataSet, Sample, StoredSample

PAIRS = read_tables("adaptation")
ORACLE = "oracle"
DRAWN_MPP = 0.5  # of drawn images, which have no resolution
HOLD_OUT = 5  # one of so many target images validates if target labels choose the checkpoint
CRF_MPP = 0.25  # the lengths of the CRF's parameters are in pixels at 40x (docs/methods.md, 2.6)


@dataclass(frozen=True, slots=True)
class Domains:
    """The images of one fold or seed of a pair.

    Attributes
    ----------
    source
        Labelled images to train on.
    target, validation
        Images to adapt to, and images whose labels may choose a checkpoint.
    test
        Images that are scored.
    """

    source: DataSet
    target: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]

    def data(self, *, oracle: bool, choosing: bool) -> DataSet:
        """Return the data set of an algorithm.

        Parameters
        ----------
        oracle
            Train on the target's images with their labels.
        choosing
            The target's validation images choose the checkpoint; otherwise they join the images to adapt to, without
            their labels.
        """
        target = tuple(self.target) if choosing else (*self.target, *self.validation)
        return replace(
            self.source,
            train=target if oracle else self.source.train,
            validation=tuple(self.validation) if choosing else (),
            test=tuple(self.test),
            pools={"target": target},
        )


def tnbc_kirc(root: Path, number: int) -> Domains:
    """Test on kidney image number ``number``, adapt to the other two, or to one (one validates)."""
    kidney = datasets.open_dataset(f"monuseg:{root}/nuclei-monuseg?organ=kirc").train
    test = number % len(kidney)
    rest = [s for i, s in enumerate(kidney) if i != test]
    source = datasets.open_dataset(f"tnbc:{root}/nuclei-tnbc")
    return Domains(source, rest[:1], rest[1:], kidney[test : test + 1])


def _organs(root: Path) -> DataSet:
    data_set = datasets.open_dataset(f"monuseg:{root}/nuclei-monuseg?organ=other")
    return replace(data_set, train=(*data_set.train, *data_set.test), test=())


def tnbc_other(root: Path, number: int) -> Domains:
    """Adapt to two thirds, by patient, of the organs but kidney; test on the other third."""
    return Domains(datasets.open_dataset(f"tnbc:{root}/nuclei-tnbc"), *_divided(_organs(root), number))


def other_tnbc(root: Path, number: int) -> Domains:
    """Adapt to two thirds of the patients of TNBC, test on the other third."""
    return Domains(_organs(root), *_divided(datasets.open_dataset(f"tnbc:{root}/nuclei-tnbc"), number))


def _divided(data_set: DataSet, number: int) -> tuple[list[Sample], list[Sample], list[Sample]]:
    split = splits.fold(data_set.train, folds=3, fold=number % 3, validation=0.1, seed=0)
    target, validation, test = (
        [data_set.train[i] for i in part] for part in (split.train, split.validation, split.test)
    )
    return target, validation, test


def _held_out(target: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Divide target images: every fifth one validates."""
    middle = HOLD_OUT // 2
    rest = [s for i, s in enumerate(target) if i % HOLD_OUT != middle]
    return rest, [s for i, s in enumerate(target) if i % HOLD_OUT == middle]


def epfl_vnc(root: Path, number: int) -> Domains:
    """Train on all labelled slices of the source; ``number`` is a seed only."""
    del number
    source = datasets.open_dataset(f"epfl:{root}/em-epfl-hippocampus")
    source = replace(source, train=(*source.train, *source.test), test=())
    assert source.mpp is not None
    target = datasets.open_dataset(f"vnc:{root}/em-vnc-sstem").at_mpp(source.mpp)
    return Domains(source, *_held_out(target.train), target.test)


def _drawn(data_set: DataSet) -> Domains:
    source = replace(data_set, mpp=DRAWN_MPP, pools={})
    labelled = [p for p in data_set.pools["target"] if isinstance(p, StoredSample)]
    return Domains(source, *_held_out(labelled), data_set.test)


def drawn_nuclei(root: Path, number: int) -> Domains:
    """Return `synthetic.nuclei_pair`; the number is its seed, too."""
    del root
    return _drawn(synthetic.nuclei_pair(64, 64, 32, seed=number))


def drawn_em(root: Path, number: int) -> Domains:
    """Return `synthetic.em_pair`; the number is its seed, too."""
    del root
    return _drawn(synthetic.em_pair(48, 24, seed=number))


# How the images of a pair are divided; a function of the data folder and the fold or seed.
DOMAINS: dict[str, Callable[[Path, int], Domains]] = {
    "tnbc-kirc": tnbc_kirc,
    "tnbc-other": tnbc_other,
    "other-tnbc": other_tnbc,
    "epfl-vnc": epfl_vnc,
    "nuclei": drawn_nuclei,
    "em": drawn_em,
}


def cell(pair: str, size_name: str, algorithm: str, number: int, root: Path = Path()) -> Cell:
    """Return a cell; the number is the fold and the seed."""
    table = PAIRS[pair]
    size = table.sizes[size_name]
    recipe = table.recipe(size, algorithm, number)
    choosing = recipe.schedule.select not in ("last", "loss")

    def open_data() -> DataSet:
        return DOMAINS[pair](root, number).data(oracle=algorithm == ORACLE, choosing=choosing)

    def open_source() -> DataSet:
        return replace(DOMAINS[pair](root, number).source, validation=(), test=(), pools={})

    crf = None
    if table.method == "uda_self_ensembling":
        usual, scale = CrfParams(), CRF_MPP / size.mpp
        crf = replace(usual, theta_alpha=usual.theta_alpha * scale, theta_gamma=usual.theta_gamma * scale)
    start = None
    if size.source_recipes:
        start = Cell(
            f"{pair}-{size.source_name}-source-model-{number}",
            "source model",
            number,
            table.source_recipe(size, number),
            functools.cache(open_source),
        )
    return Cell(
        cell_name(pair, size_name, algorithm, number),
        algorithm,
        number,
        recipe,
        functools.cache(open_data),
        start=start,
        judged=table.judged,
        crf=crf,
    )


@click.command()
@click.option("--pair", type=click.Choice(list(PAIRS)), required=True)
@options
def main(pair: str, **values: Any) -> None:
    """Run the cells of a pair that are not in its result file yet."""
    fill_table(cell, pair, PAIRS[pair], f"accuracy-{pair}", **values)


if __name__ == "__main__":
    main()

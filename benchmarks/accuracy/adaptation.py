r"""The comparisons of the two domain-adaptation papers on data at hand.

::

    python -m histostream.benchmarks.accuracy.adaptation --data ../shared/data --pair tnbc-kirc \
        --size small --runs runs/table --out benchmarks/results

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

Target images that train, without their labels, are others than those that are scored; the oracle
trains on them with their labels. No target label chooses a checkpoint: the last one is scored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from histostream.benchmarks.accuracy.cells import Cell, fill_table, options, settings_of
from histostream.training import command, data, methods, sets, synthetic
from histostream.training.data import DataSet, Sample, StoredSample
from histostream.training.schedule import Schedule

ORACLE = "oracle"
DRAWN_MPP = 0.5  # of drawn images, which have no size of their own
# All normalise target images by the target's own mean and deviation, as the cited code does.
UDA: dict[str, tuple[str, ...]] = {
    "source only": ("uda-source-only",),
    "source only, batch statistics of the target": ("uda-source-only", "uda-recalibrate"),
    "DA-ADV": ("uda-da-adv",),
    "CBST": ("uda-cbst",),
    "CellSegUDA": ("uda-cellseguda",),
    "without entropy": ("uda-recommended", "uda-no-entropy"),
    "without self-ensembling": ("uda-recommended", "uda-no-self-ensembling"),
    "self-ensembling, as printed": ("uda-paper",),
    "self-ensembling": ("uda-recommended",),
    ORACLE: ("uda-source-only",),
}
APMA: dict[str, tuple[str, ...]] = {
    "no adaptation": ("apma-none",),
    "Roels (EN)": ("apma-roels",),
    "Ganin": ("apma-ganin",),
    "DE feat": ("apma-de-feat",),
    "DE pred": ("apma-de-pred",),
    "EN + DE feat": ("apma-en-de-feat",),
    "APMA-Net": (),
    ORACLE: ("apma-oracle",),
}


@dataclass(frozen=True, slots=True)
class Domains:
    """Where a pair's images come from: one fold or seed of it."""

    source: DataSet
    target: Sequence[Sample]
    test: Sequence[Sample]

    def data(self, *, oracle: bool) -> DataSet:
        """Return the set that an algorithm trains and is scored on."""
        train = self.target if oracle else self.source.train
        return replace(
            self.source,
            train=tuple(train),
            validation=(),
            test=tuple(self.test),
            pools={"target": tuple(self.target)},
        )


def tnbc_kirc(root: Path, number: int) -> Domains:
    """Test on kidney image number ``number``, adapt to the other two."""
    kidney = sets.open_set(f"monuseg:{root}/nuclei-monuseg?organ=kirc").train
    test = number % len(kidney)
    rest = [s for i, s in enumerate(kidney) if i != test]
    return Domains(sets.open_set(f"tnbc:{root}/nuclei-tnbc"), rest, kidney[test : test + 1])


def _organs(root: Path) -> DataSet:
    found = sets.open_set(f"monuseg:{root}/nuclei-monuseg?organ=other")
    return replace(found, train=(*found.train, *found.test), test=())


def tnbc_other(root: Path, number: int) -> Domains:
    """Adapt to two thirds, by patient, of the organs but kidney; test on the other third."""
    return Domains(sets.open_set(f"tnbc:{root}/nuclei-tnbc"), *_divided(_organs(root), number))


def other_tnbc(root: Path, number: int) -> Domains:
    """Adapt to two thirds of the patients of TNBC, test on the other third."""
    return Domains(_organs(root), *_divided(sets.open_set(f"tnbc:{root}/nuclei-tnbc"), number))


def _divided(found: DataSet, number: int) -> tuple[list[Sample], list[Sample]]:
    split = data.fold(found.train, folds=3, fold=number % 3, validation=0.1, seed=0)
    target = sorted((*split.train, *split.validation))
    return [found.train[i] for i in target], [found.train[i] for i in split.test]


def epfl_vnc(root: Path, number: int) -> Domains:
    """Train on all labelled slices of the source; ``number`` is a seed only."""
    del number
    source = sets.open_set(f"epfl:{root}/em-epfl-hippocampus")
    source = replace(source, train=(*source.train, *source.test), test=())
    assert source.mpp is not None
    target = sets.open_set(f"vnc:{root}/em-vnc-sstem").at_mpp(source.mpp)
    return Domains(source, target.train, target.test)


def _drawn(found: DataSet) -> Domains:
    source = replace(found, mpp=DRAWN_MPP, pools={})
    labelled = [p for p in found.pools["target"] if isinstance(p, StoredSample)]
    return Domains(source, labelled, found.test)


def drawn_nuclei(root: Path, number: int) -> Domains:
    """Return `synthetic.nuclei_pair`; the number is its seed, too."""
    del root
    return _drawn(synthetic.nuclei_pair(64, 64, 32, seed=number))


def drawn_em(root: Path, number: int) -> Domains:
    """Return `synthetic.em_pair`; the number is its seed, too."""
    del root
    return _drawn(synthetic.em_pair(48, 24, seed=number))


@dataclass(frozen=True, slots=True)
class Pair:
    """How a pair is made, and trained in each size: resolution, method settings, schedule."""

    method: str
    algorithms: dict[str, tuple[str, ...]]
    domains: Callable[[Path, int], Domains]
    sizes: dict[str, tuple[float, dict[str, Any], Schedule]]


UDA_SMALL = Schedule(
    steps=1200, batch=4, crop_px=96, validate_every=300, validation=0.1, select="last",
    decay="cosine",
)  # fmt: skip
UDA_PAPER = Schedule(epochs=500, batch=2, crop_px=512, validation=0.1, select="last")
UDA_NET = {"base_width": 8, "discriminator_width": 16, "learning_rate": 1e-3}
UDA_SIZES = {"small": (0.5, UDA_NET, UDA_SMALL), "paper": (0.25, {}, UDA_PAPER)}
APMA_SMALL = Schedule(
    steps=1500, batch=4, crop_px=128, validate_every=300, validation=0.1, select="last",
    decay="poly",
)  # fmt: skip
APMA_PAPER = Schedule(
    steps=40_000, batch=2, crop_px=512, validation=0.1, select="last", decay="poly"
)
APMA_NET = {
    "base_width": 8, "discriminator_width": 16, "learning_rate": 1e-3,
    # The paper's 1e-3 adapt less in so short a run: on "em" mean F 69, not 76, from 60 without.
    "lambda_feat": 0.1, "lambda_pred": 0.1, "discriminator_learning_rate": 1e-3,
}  # fmt: skip
APMA_SIZES = {
    "small": (0.02, {**APMA_NET, "feat_crop": APMA_SMALL.crop_px}, APMA_SMALL),
    "paper": (0.005, {}, APMA_PAPER),
}
DRAWN_NUCLEI = replace(UDA_SMALL, steps=2400, crop_px=64)  # 150 epochs
DRAWN_EM = replace(APMA_SMALL, steps=840, crop_px=64)
PAIRS = {
    "tnbc-kirc": Pair("uda_self_ensembling", UDA, tnbc_kirc, UDA_SIZES),
    "tnbc-other": Pair("uda_self_ensembling", UDA, tnbc_other, UDA_SIZES),
    "other-tnbc": Pair("uda_self_ensembling", UDA, other_tnbc, UDA_SIZES),
    "epfl-vnc": Pair("apma_net", APMA, epfl_vnc, APMA_SIZES),
    "nuclei": Pair(
        "uda_self_ensembling", UDA, drawn_nuclei,
        {"small": (DRAWN_MPP, {**UDA_NET, "base_width": 16}, DRAWN_NUCLEI)},
    ),
    "em": Pair(
        "apma_net", APMA, drawn_em,
        {"small": (DRAWN_MPP, {**APMA_NET, "feat_crop": DRAWN_EM.crop_px}, DRAWN_EM)},
    ),
}  # fmt: skip


def cell(pair: str, size: str, algorithm: str, number: int, root: Path = Path()) -> Cell:
    """Return a cell; the number is the fold, and the seed."""
    of = PAIRS[pair]
    mpp, method, schedule = of.sizes[size]
    tables = {
        "method": method,
        "schedule": {**asdict(schedule), "seed": number},
        "augmentation": {"flips": True},
    }
    recipe = command.read_recipe(
        of.method, methods.load(of.method), of.algorithms[algorithm], settings_of(tables), mpp=mpp
    )
    name = f"{pair}-{size}-{algorithm}-{number}".lower().replace(" ", "-").replace(",", "")

    def opened() -> DataSet:
        return of.domains(root, number).data(oracle=algorithm == ORACLE)

    return Cell(name, algorithm, number, recipe, functools.cache(opened))


@click.command()
@click.option("--pair", type=click.Choice(list(PAIRS)), required=True)
@options
def main(pair: str, **how: Any) -> None:
    """Make the cells of a pair that are not there yet."""
    fill_table(
        cell, pair, algorithms=PAIRS[pair].algorithms, sizes=PAIRS[pair].sizes, repeats=3,
        name=f"accuracy-{pair}", **how,
    )  # fmt: skip


if __name__ == "__main__":
    main()

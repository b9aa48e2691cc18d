r"""The comparisons of the two domain-adaptation papers on data at hand.

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

Target images that train, without their labels, are others than those that are scored; the oracle
trains on them with their labels.

**UDA.** Every row measures its batch statistics anew on the target's training images. In short runs
the last checkpoint is scored, and no target label chooses it; with the paper's recipe the one that
labelled validation images of the target choose, as the cited code has it. Beside it stands the last
checkpoint with the running statistics of its training, where "source + target forward" is the
control. Each is scored without and with the dense CRF, whose parameters are fixed.

**APMA-Net.** One source model of each seed is trained to convergence and chosen by source
validation, and every row starts from it, "no adaptation" and the oracle too. Both checkpoints are
scored: the one with the best Jaccard index on labelled validation images of the target, and the
last.

The result files of size "small" are of earlier recipes, without these rules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from histostream.benchmarks.accuracy.cells import Cell, fill_table, options, settings_of
from histostream.runtime.crf import CrfParams
from histostream.training import datasets, methods, splits, synthetic
from histostream.training.data import DataSet, Sample, StoredSample
from histostream.training.recipe import Recipe, read_recipe
from histostream.training.schedule import Schedule

ORACLE = "oracle"
DRAWN_MPP = 0.5  # of drawn images, which have no size of their own
# All normalise target images by the target's own mean and deviation, as the cited code does.
UDA: dict[str, tuple[str, ...]] = {
    "source only": ("uda-source-only",),
    "source + target forward": ("uda-target-seen",),
    "DA-ADV": ("uda-da-adv",),
    "CBST": ("uda-cbst",),
    "CellSegUDA": ("uda-cellseguda",),
    "without entropy": ("uda-recommended", "uda-no-entropy"),
    "without self-ensembling": ("uda-recommended", "uda-no-self-ensembling"),
    "self-ensembling, as printed": (),
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
HOLD_OUT = 5  # of so many target images that train, one validates where target labels choose
CRF_MPP = 0.25  # of methods.md 2.6, whose lengths are those of 40x


@dataclass(frozen=True, slots=True)
class Domains:
    """Where a pair's images come from: one fold or seed of it.

    Attributes
    ----------
    source
        Labelled images to train on.
    target, validation
        Images to adapt to; those of them whose labels may choose a checkpoint.
    test
        Images that are scored.
    """

    source: DataSet
    target: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]

    def data(self, *, oracle: bool, choosing: bool) -> DataSet:
        """Return the set that an algorithm trains and is scored on.

        Parameters
        ----------
        oracle
            Train on the target's images with their labels.
        choosing
            The target's validation images choose the checkpoint; else their labels serve nothing,
            and they join the images to adapt to.
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
    found = datasets.open_dataset(f"monuseg:{root}/nuclei-monuseg?organ=other")
    return replace(found, train=(*found.train, *found.test), test=())


def tnbc_other(root: Path, number: int) -> Domains:
    """Adapt to two thirds, by patient, of the organs but kidney; test on the other third."""
    return Domains(datasets.open_dataset(f"tnbc:{root}/nuclei-tnbc"), *_divided(_organs(root), number))


def other_tnbc(root: Path, number: int) -> Domains:
    """Adapt to two thirds of the patients of TNBC, test on the other third."""
    return Domains(_organs(root), *_divided(datasets.open_dataset(f"tnbc:{root}/nuclei-tnbc"), number))


def _divided(found: DataSet, number: int) -> tuple[list[Sample], list[Sample], list[Sample]]:
    split = splits.fold(found.train, folds=3, fold=number % 3, validation=0.1, seed=0)
    target, validation, test = ([found.train[i] for i in part] for part in (split.train, split.validation, split.test))
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


def _drawn(found: DataSet) -> Domains:
    source = replace(found, mpp=DRAWN_MPP, pools={})
    labelled = [p for p in found.pools["target"] if isinstance(p, StoredSample)]
    return Domains(source, *_held_out(labelled), found.test)


def drawn_nuclei(root: Path, number: int) -> Domains:
    """Return `synthetic.nuclei_pair`; the number is its seed, too."""
    del root
    return _drawn(synthetic.nuclei_pair(64, 64, 32, seed=number))


def drawn_em(root: Path, number: int) -> Domains:
    """Return `synthetic.em_pair`; the number is its seed, too."""
    del root
    return _drawn(synthetic.em_pair(48, 24, seed=number))


@dataclass(frozen=True, slots=True)
class Size:
    """How a pair is trained.

    Attributes
    ----------
    mpp
        Resolution.
    recipes
        That ship, under the algorithm's own.
    rule
        That ship, above the algorithm's own: what holds for all rows.
    settings
        Tables above all recipes.
    source_recipes, source_settings
        Of the source model that every row starts from; none: rows start from scratch.
    source_name
        Key of that model; sizes that differ in the rows' settings alone share it.
    """

    mpp: float
    recipes: tuple[str, ...] = ()
    rule: tuple[str, ...] = ()
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_recipes: tuple[str, ...] = ()
    source_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_name: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """What a pair is: its method, its rows, its images, the checkpoints that are scored."""

    method: str
    algorithms: dict[str, tuple[str, ...]]
    domains: Callable[[Path, int], Domains]
    judged: dict[str, str]
    sizes: dict[str, Size]


UDA_SMALL = Schedule(steps=1200, batch=4, crop_px=96, validate_every=300, validation=0.1, select="last", decay="cosine")
UDA_NET = {"base_width": 8, "discriminator_width": 16, "learning_rate": 1e-3}
UDA_RULE = ("uda-recalibrate",)
UDA_JUDGED = {"statistics of the target": "best", "running statistics": "last"}


def uda_sizes(mpp: float, schedule: Schedule, *, paper: bool, **net: Any) -> dict[str, Size]:
    """Return a short size, and the paper's recipe as a whole."""
    tables = {"method": {**UDA_NET, **net}, "schedule": asdict(schedule), "augmentation": {"flips": True}}
    sizes = {"short": Size(mpp, (), UDA_RULE, tables)}
    if paper:
        sizes["paper"] = Size(0.25, ("uda-paper",), UDA_RULE)
    return sizes


APMA_SOURCE = Schedule(
    steps=3000, batch=4, crop_px=128, validate_every=200, validation=0.1, select="loss", decay="poly"
)
APMA_JOINT = replace(APMA_SOURCE, steps=1000, validate_every=50, select="jaccard")
APMA_NET = {"base_width": 8, "discriminator_width": 16, "learning_rate": 1e-3}
APMA_ROWS = {  # above `APMA_NET`, from a model that has converged
    "learning_rate": 2e-4,
    "discriminator_learning_rate": 1e-3,
    "source_only_steps": 0.0,
}
APMA_JUDGED = {"chosen on the target": "best", "last": "last"}
# What the paper leaves open, or a short run may need otherwise: methods.md 11.6.
SWEEP: dict[str, dict[str, Any]] = {
    "": {},
    "-lambda-0.01": {"lambda_feat": 0.01, "lambda_pred": 0.01},
    "-lambda-0.1": {"lambda_feat": 0.1, "lambda_pred": 0.1},
    "-reconstruction-1": {"lambda_rec": 1.0},
    "-reconstruction-sum": {"reconstruction_reduction": "sum"},
}


def apma_sizes(mpp: float, source: Schedule, joint: Schedule, *, paper: bool) -> dict[str, Size]:
    """Return a short size with the paper's weights, with others, and the paper's recipe."""
    flips = {"flips": True}
    crop = {"feat_crop": joint.crop_px}
    start = {"method": {**APMA_NET, **crop}, "schedule": asdict(source), "augmentation": flips}
    sizes = {}
    for name, weights in SWEEP.items():
        method = {**APMA_NET, **APMA_ROWS, **crop, **weights}
        tables = {"method": method, "schedule": asdict(joint), "augmentation": flips}
        sizes[f"short{name}"] = Size(mpp, (), (), tables, ("apma-source",), start, "short")
    if paper:
        shipped = ("apma-paper", "apma-from-source"), ("apma-paper", "apma-source")
        sizes["paper"] = Size(0.005, shipped[0], (), {}, shipped[1], {}, "paper")
    return sizes


DRAWN_NUCLEI = replace(UDA_SMALL, steps=2400, crop_px=64)  # 150 epochs
UDA_SIZES = uda_sizes(0.5, UDA_SMALL, paper=True)
PAIRS = {
    "tnbc-kirc": Pair("uda_self_ensembling", UDA, tnbc_kirc, UDA_JUDGED, UDA_SIZES),
    "tnbc-other": Pair("uda_self_ensembling", UDA, tnbc_other, UDA_JUDGED, UDA_SIZES),
    "other-tnbc": Pair("uda_self_ensembling", UDA, other_tnbc, UDA_JUDGED, UDA_SIZES),
    "epfl-vnc": Pair("apma_net", APMA, epfl_vnc, APMA_JUDGED, apma_sizes(0.02, APMA_SOURCE, APMA_JOINT, paper=True)),
    "nuclei": Pair(
        "uda_self_ensembling",
        UDA,
        drawn_nuclei,
        UDA_JUDGED,
        uda_sizes(DRAWN_MPP, DRAWN_NUCLEI, paper=False, base_width=16),
    ),
    "em": Pair(
        "apma_net",
        APMA,
        drawn_em,
        APMA_JUDGED,
        apma_sizes(
            DRAWN_MPP,
            replace(APMA_SOURCE, steps=400, crop_px=64),
            replace(APMA_JOINT, steps=600, crop_px=64),
            paper=False,
        ),
    ),
}


def cell(pair: str, size: str, algorithm: str, number: int, root: Path = Path()) -> Cell:
    """Return a cell; the number is the fold, and the seed."""
    of = PAIRS[pair]
    how = of.sizes[size]
    recipe = _recipe(of, how, (*how.recipes, *of.algorithms[algorithm], *how.rule), how.settings, number)
    choosing = recipe.schedule.select not in ("last", "loss")

    def opened() -> DataSet:
        return of.domains(root, number).data(oracle=algorithm == ORACLE, choosing=choosing)

    crf = None
    if of.method == "uda_self_ensembling":
        usual, px = CrfParams(), CRF_MPP / how.mpp
        crf = replace(usual, theta_alpha=usual.theta_alpha * px, theta_gamma=usual.theta_gamma * px)
    name = f"{pair}-{size}-{algorithm}-{number}".lower().replace(" ", "-").replace(",", "")
    return Cell(
        name,
        algorithm,
        number,
        recipe,
        functools.cache(opened),
        start=_source_model(pair, how, number, root) if how.source_recipes else None,
        judged=of.judged,
        crf=crf,
    )


def _source_model(pair: str, how: Size, number: int, root: Path) -> Cell:
    """Return the run that every row of a seed starts from: the source alone, until it converges."""
    of = PAIRS[pair]

    def opened() -> DataSet:
        return replace(of.domains(root, number).source, validation=(), test=(), pools={})

    recipe = _recipe(of, how, how.source_recipes, how.source_settings, number)
    name = f"{pair}-{how.source_name}-source-model-{number}"
    return Cell(name, "source model", number, recipe, functools.cache(opened))


def _recipe(of: Pair, how: Size, recipes: tuple[str, ...], settings: dict[str, dict[str, Any]], seed: int) -> Recipe:
    return read_recipe(
        of.method,
        methods.load_method(of.method),
        recipes,
        settings_of(settings, {"schedule": {"seed": seed}}),
        mpp=how.mpp,
    )


@click.command()
@click.option("--pair", type=click.Choice(list(PAIRS)), required=True)
@options
def main(pair: str, **how: Any) -> None:
    """Make the cells of a pair that are not there yet."""
    fill_table(
        cell,
        pair,
        algorithms=PAIRS[pair].algorithms,
        sizes=PAIRS[pair].sizes,
        repeats=3,
        name=f"accuracy-{pair}",
        **how,
    )


if __name__ == "__main__":
    main()

r"""The comparison of the iMEMS paper (Table 1) on data at hand: six algorithms, seeds or folds.

::

    python -m histostream.benchmarks.accuracy.imems --data ../shared/data --table glas \
        --size short --runs runs/table --out benchmarks/results

``--size short`` is what two CPU cores do in hours; ``--size paper`` is the recipe that ships,
``imems-paper``, as a whole, for a GPU. The result files of size "small" are of
an earlier recipe: L1 for cGAN-C, and two tasks that chose their checkpoint by one of them.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from histostream.benchmarks.accuracy.cells import Cell, fill_table, options, settings_of
from histostream.training import datasets
from histostream.training.methods.imems import method as imems
from histostream.training.recipe import read_recipe
from histostream.training.schedule import Schedule

# Name in the paper, and the shipped recipe that makes it (none: iMEMS as it is).
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "iMEMS": (),
    "UNet-C-single": ("unet-c-single",),
    "cGAN-C-single": ("cgan-c-single",),
    "UNet-R-single": ("unet-r-single",),
    "UNet-C-multi": ("unet-c-multi",),
    "UNet-C-multi-int": ("unet-c-multi-int",),
}
INVERTED = {  # is it equation 1's weight of dark nuclei that costs?
    "iMEMS, grey inverted": ("imems-inverted",),
    "UNet-R-single, grey inverted": ("unet-r-single", "imems-inverted"),
}


@dataclass(frozen=True, slots=True)
class Size:
    """How a table is trained: resolution, recipes under the algorithm's own, settings above it."""

    mpp: float
    recipes: tuple[str, ...] = ()
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Table:
    """Where the images come from, how many seeds or folds are run, the rows, and the sizes."""

    source: str
    algorithms: dict[str, tuple[str, ...]]
    repeats: int
    folds: int  # 0: seeds
    sizes: dict[str, Size]


SMALL_NET = {"base_width": 12, "discriminator_width": 8, "learning_rate": 1e-3}
SMALL = Schedule(batch=4, crop_px=112, validate_every=200, decay="cosine", warmup=50)
PAPER = ("imems-paper",)


def _small(steps: int) -> dict[str, dict[str, Any]]:
    schedule = asdict(replace(SMALL, steps=steps))
    return {"method": SMALL_NET, "schedule": schedule, "augmentation": {"flips": True}}


TABLES = {
    "glas": Table(
        "glas:{data}/glands-glas",
        ALGORITHMS,
        3,
        0,
        {"short": Size(2.5, (), _small(2400)), "paper": Size(0.62005, PAPER)},
    ),
    "nuclei": Table(
        "dsb2018:{data}/nuclei-dsb2018",
        {**ALGORITHMS, **INVERTED},
        2,
        5,
        {"short": Size(0.5, (), _small(1000)), "paper": Size(0.5, PAPER)},
    ),
}


def cell(table: str, size: str, algorithm: str, number: int, data: Path = Path()) -> Cell:
    """Return a cell; cells of one table and size differ in the algorithm, and the seed or fold."""
    of = TABLES[table]
    how = of.sizes[size]
    drawn = {"folds": of.folds, "fold": number} if of.folds else {"seed": number}
    recipe = read_recipe(
        "imems",
        imems,
        (*how.recipes, *of.algorithms[algorithm]),
        settings_of(how.settings, {"schedule": drawn}),
        mpp=how.mpp,
    )
    return Cell(
        f"{table}-{size}-{algorithm}-{number}".lower().replace(", ", "-").replace(" ", "-"),
        algorithm,
        number,
        recipe,
        functools.partial(datasets.open_dataset, of.source.format(data=data)),
    )


@click.command()
@click.option("--table", type=click.Choice(list(TABLES)), required=True)
@options
def main(table: str, **how: Any) -> None:
    """Make the cells of a table that are not there yet."""
    fill_table(
        cell,
        table,
        algorithms=TABLES[table].algorithms,
        sizes=TABLES[table].sizes,
        repeats=TABLES[table].repeats,
        name=f"accuracy-imems-{table}",
        **how,
    )


if __name__ == "__main__":
    main()

r"""The comparison of the iMEMS paper (Table 1) on data at hand: six algorithms, seeds or folds.

::

    python -m histostream.benchmarks.accuracy.imems --data ../shared/data --table glas \
        --size small --runs runs/table --out benchmarks/results

``--size small`` is what two CPU cores do in hours; ``--size paper`` is the paper's network and
schedule, for a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from histostream.benchmarks.accuracy.cells import Cell, fill_table, options, settings_of
from histostream.training import command, sets
from histostream.training.methods import imems
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


@dataclass(frozen=True, slots=True)
class Size:
    """How a table is trained: resolution, the method's settings, schedule, and flips."""

    mpp: float
    method: dict[str, Any]
    schedule: Schedule
    flips: bool


@dataclass(frozen=True, slots=True)
class Table:
    """Where the images come from, how many seeds or folds are run, and the sizes."""

    source: str
    repeats: int
    sizes: dict[str, Size]


SMALL_NET = {"base_width": 12, "discriminator_width": 8, "learning_rate": 1e-3}
SMALL = Schedule(batch=4, crop_px=112, validate_every=200, decay="cosine", warmup=50)
PAPER = Schedule(epochs=300, batch=1, crop_px=0)
TABLES = {
    "glas": Table(
        "glas:{data}/glands-glas", 3,
        {
            "small": Size(2.5, SMALL_NET, replace(SMALL, steps=2400), True),
            "paper": Size(0.62005, {}, PAPER, False),
        },
    ),
    "nuclei": Table(
        "dsb2018:{data}/nuclei-dsb2018", 2,
        {
            "small": Size(0.5, SMALL_NET, replace(SMALL, steps=1000, folds=5), True),
            "paper": Size(0.5, {}, replace(PAPER, folds=5), False),
        },
    ),
}  # fmt: skip


def cell(table: str, size: str, algorithm: str, number: int, data: Path = Path()) -> Cell:
    """Return a cell; cells of one table and size differ in the algorithm, and the seed or fold."""
    how = TABLES[table].sizes[size]
    kind = "fold" if how.schedule.folds else "seed"
    tables = {
        "method": how.method,
        "schedule": {**asdict(how.schedule), kind: number},
        "augmentation": {"flips": how.flips},
    }
    return Cell(
        f"{table}-{size}-{algorithm}-{number}".lower(),
        algorithm,
        number,
        command.read_recipe(
            "imems", imems, ALGORITHMS[algorithm], settings_of(tables), mpp=how.mpp
        ),
        functools.partial(sets.open_set, TABLES[table].source.format(data=data)),
    )


@click.command()
@click.option("--table", type=click.Choice(list(TABLES)), required=True)
@options
def main(table: str, **how: Any) -> None:
    """Make the cells of a table that are not there yet."""
    fill_table(
        cell, table, algorithms=ALGORITHMS, sizes=TABLES[table].sizes,
        repeats=TABLES[table].repeats, name=f"accuracy-imems-{table}", **how,
    )  # fmt: skip


if __name__ == "__main__":
    main()

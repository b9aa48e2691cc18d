r"""Run the comparison of the iMEMS paper (Table 1) on available data: six algorithms, several seeds or folds.

::

    python -m histostream.benchmarks.accuracy.imems --data ../shared/data --table glas \
        --size short --runs runs/table --out benchmarks/results

``--size short`` takes hours on two CPU cores; ``--size paper`` is the shipped recipe ``imems-paper``, for a GPU. The
result files of size "small" are of an earlier recipe, which used L1 for cGAN-C and let one of two tasks choose the
checkpoint. The tables are in ``imems.toml``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from histostream.benchmarks.accuracy.cells import Cell, fill_table, options
from histostream.benchmarks.accuracy.experiments import cell_name, read_tables
from histostream.training import datasets

TABLES = read_tables("imems")


def cell(name: str, size: str, algorithm: str, number: int, data: Path = Path()) -> Cell:
    """Return a cell; cells of one table and size differ in the algorithm, and the seed or fold."""
    table = TABLES[name]
    return Cell(
        cell_name(name, size, algorithm, number),
        algorithm,
        number,
        table.recipe(table.sizes[size], algorithm, number),
        functools.partial(datasets.open_dataset, table.source.format(data=data)),
    )


@click.command()
@click.option("--table", "name", type=click.Choice(list(TABLES)), required=True)
@options
def main(name: str, **values: Any) -> None:
    """Run the cells of a table that are not in its result file yet."""
    fill_table(cell, name, TABLES[name], f"accuracy-imems-{name}", **values)


if __name__ == "__main__":
    main()

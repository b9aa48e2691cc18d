r"""The paper's comparison (iMEMS, Table 1) on data at hand: six algorithms, several seeds or folds.

::

    python -m histostream.benchmarks.accuracy.imems --data ../shared/data --table glas \
        --size small --runs runs/table-imems --out benchmarks/results

Every cell is one training run, its export, and its score on the held-out images. A cell that is in
the result file is not run again, and one that was stopped goes on from its last checkpoint, so the
table can be made in pieces, on several machines one after the other.

``--size small`` is what two CPU cores do in an hour or so; ``--size paper`` is the paper's network
and schedule, for a GPU.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from histostream.benchmarks.accuracy.score import choose, predicting, score
from histostream.benchmarks.hardware import hardware
from histostream.training import cli, loop, sets
from histostream.training.compute import PRECISIONS, Compute
from histostream.training.loop import Recipe
from histostream.training.methods import imems
from histostream.training.schedule import Schedule
from histostream.wsi.errors import HistoError
from histostream.wsi.sink import json_text

# Name in the paper, and the shipped recipe that makes it (none: iMEMS as it is).
ALGORITHMS = {
    "iMEMS": (),
    "UNet-C-single": ("unet-c-single",),
    "cGAN-C-single": ("cgan-c-single",),
    "UNet-R-single": ("unet-r-single",),
    "UNet-C-multi": ("unet-c-multi",),
    "UNet-C-multi-int": ("unet-c-multi-int",),
}


@dataclass(frozen=True, slots=True)
class Table:
    """Where a table's images come from, and how it is trained in each size."""

    source: str
    mpp: float
    folds: int
    repeats: int
    sizes: dict[str, tuple[dict[str, Any], Schedule]]


SMALL = {"base_width": 12, "discriminator_width": 8, "learning_rate": 1e-3}
PAPER = Schedule(epochs=300, batch=1, crop_px=0, validation=0.2)
TABLES = {
    "glas": Table(
        "glas:{data}/glands-glas", 2.5, 0, 3,
        {
            "small": (SMALL, Schedule(
                steps=2400, batch=4, crop_px=112, validate_every=200, validation=0.2,
                decay="cosine", warmup=50,
            )),
            "paper": ({}, PAPER),
        },
    ),
    "nuclei": Table(
        "dsb2018:{data}/nuclei-dsb2018", 0.5, 5, 2,
        {
            "small": (SMALL, Schedule(
                steps=1000, batch=4, crop_px=112, validate_every=200, validation=0.2,
                decay="cosine", warmup=50, folds=5,
            )),
            "paper": ({}, Schedule(epochs=300, batch=1, crop_px=0, validation=0.2, folds=5)),
        },
    ),
}  # fmt: skip
PAPER_MPP = {"glas": 0.62005, "nuclei": 0.5}  # the full table is trained at the images' own


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of the table: an algorithm, and a seed or a fold."""

    table: str
    size: str
    algorithm: str
    number: int

    @property
    def name(self) -> str:
        """Key of the cell in the result file, and name of its run."""
        return f"{self.table}-{self.size}-{self.algorithm}-{self.number}".lower()


def recipe(cell: Cell) -> Recipe:
    """Return how a cell is trained: alike in everything but what the algorithm is."""
    table = TABLES[cell.table]
    method, schedule = table.sizes[cell.size]
    settings = [f"method.{k}={v}" for k, v in method.items()]
    settings += [f"schedule.{k}={json.dumps(v)}" for k, v in asdict(schedule).items()]
    kind = "fold" if table.folds else "seed"
    settings += [f"schedule.{kind}={cell.number}"]
    if cell.size == "small":  # the paper names no augmentation
        settings += ["augmentation.flips=true"]
    mpp = PAPER_MPP[cell.table] if cell.size == "paper" else table.mpp
    return cli.read_recipe("imems", imems, ALGORITHMS[cell.algorithm], tuple(settings), mpp=mpp)


def run(cell: Cell, data: Path, runs: Path, how: Compute) -> dict[str, Any]:
    """Train, export and score one cell."""
    found = sets.open_set(TABLES[cell.table].source.format(data=data))
    wanted = recipe(cell)
    start = time.time()
    folder = runs / cell.name
    best = loop.train(
        wanted, imems, found, folder, how=how, record={"commit": cli.commit()},
        report=lambda p: click.echo(f"{cell.name} {p.step}/{p.steps} {p.losses}")
        if p.validation_loss is not None else None,
    )  # fmt: skip
    samples = choose(found, "test", wanted.schedule)
    with predicting(run=folder, mpp=found.mpp, backend="cpu") as (predict, _):
        scores = score(samples, predict, [name for name, _ in found.classes])
    del scores["each_image"]
    record = best.record
    return {
        "scores": scores,
        "best_step": best.step,
        "steps": wanted.schedule.total_steps(record["images"]["train"]),
        "images": record["images"],
        "config": best.config,
        "schedule": asdict(wanted.schedule),
        "augmentation": asdict(wanted.augmentation),
        "mpp": wanted.mpp,
        "data_sha256": record["data_sha256"],
        "commit": record.get("commit"),
        "precision": record["precision"],
        "machine": record["machine"],
        "training_seconds": round(checkpoint_seconds(folder)),
        "seconds": round(time.time() - start),
    }


def checkpoint_seconds(folder: Path) -> float:
    """Seconds that a run trained, in all its pieces."""
    from histostream.training import checkpoint

    return float(checkpoint.read(folder / "last").record["seconds"])


@contextmanager
def result_file(path: Path) -> Iterator[dict[str, Any]]:
    """Hold a result file, which several processes fill, and write it when it is changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = json.loads(path.read_text()) if path.exists() else {}
        yield said
        part = path.with_name(f".{path.name}.part")
        part.write_text(json_text(said))
        part.replace(path)


@click.command()
@click.option("--data", "data_dir", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--table", type=click.Choice(list(TABLES)), required=True)
@click.option("--size", type=click.Choice(["small", "paper"]), default="small", show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(ALGORITHMS)), help="Algorithms.")
@click.option("--number", "numbers", multiple=True, type=int, help="Seeds, or folds.")
@click.option("--runs", required=True, type=click.Path(path_type=Path), help="Folder for runs.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Of the result file.")
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), default="bf16", show_default=True)
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(
    data_dir: Path, table: str, size: str, only: tuple[str, ...], numbers: tuple[int, ...],
    runs: Path, out: Path, device: str, precision: str, threads: int,
) -> None:  # fmt: skip
    """Make the cells of a table that are not there yet."""
    torch.set_num_threads(threads)
    how = Compute(device, precision)
    path = out / f"accuracy-imems-{table}-{size}.json"
    for number in numbers or range(TABLES[table].repeats):
        for algorithm in only or ALGORITHMS:
            cell = Cell(table, size, algorithm, number)
            with result_file(path) as said:
                said.setdefault("hardware", hardware())
                if cell.name in said.setdefault("cells", {}):
                    continue
            try:
                found = run(cell, data_dir, runs, how)
            except HistoError as error:
                raise click.ClickException(f"{cell.name}: {error}") from error
            with result_file(path) as said:
                said["cells"][cell.name] = {"algorithm": algorithm, "number": number, **found}
            pooled = found["scores"]["pooled"]
            click.echo(f"{cell.name}: mean F {pooled['mean_f']}, accuracy {pooled['accuracy']}")


if __name__ == "__main__":
    main()

"""Fill result files with the scores of training runs.

Every cell is one training run, its export, and its scores on the held-out images. A cell that is in the result file is
not run again, and a stopped one continues from its last checkpoint, so that several processes, or several machines one
after the other, can fill a table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from histostream.benchmarks.accuracy.experiments import Table
from histostream.benchmarks.accuracy.score import choose, engine_for, predictor, score
from histostream.runtime.crf import CrfParams
from histostream.runtime.hardware import hardware
from histostream.training import checkpoint, command, loop, methods
from histostream.training.checkpoint import Checkpoint
from histostream.training.choices import PRECISIONS
from histostream.training.data import DataSet, Sample
from histostream.training.device import Compute
from histostream.training.loop import Progress
from histostream.training.recipe import Recipe
from histostream.wsi.errors import HistoError
from histostream.wsi.files import locked, write_json

Plain = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run of a table.

    Attributes
    ----------
    name
        Key in the result file, and name of the run's folder.
    algorithm, number
        Row of the table, and seed or fold.
    recipe
        How the run is trained.
    data
        Opens the data set that it is trained on; the test part is scored.
    further
        Computes further scores from the run's folder and the scored images, at the run's resolution.
    start
        The run whose best checkpoint this one starts from; it is trained once if several cells share it.
    judged
        Checkpoints that are scored, by their names in the result file. The scores of the first are the cell's
        ``scores``, those of the others its ``variants``.
    crf
        Dense CRF with which each checkpoint is scored once more, as "NAME, CRF".
    """

    name: str
    algorithm: str
    number: int
    recipe: Recipe
    data: Callable[[], DataSet]
    further: Callable[[Path, Sequence[Sample]], Plain] | None = None
    start: Cell | None = None
    judged: Mapping[str, str] = field(default_factory=lambda: {"best": "best"})
    crf: CrfParams | None = None


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command for a table has."""
    folder = click.Path(path_type=Path)
    for option in reversed(
        (
            click.option("--data", "data_dir", required=True, type=click.Path(path_type=Path, exists=True)),
            click.option("--size", required=True, help="small, short, quarter, paper, ..."),
            click.option("--only", multiple=True, help="Algorithms; default: all."),
            click.option("--number", "numbers", multiple=True, type=int, help="Seeds or folds; default: all."),
            click.option("--runs", required=True, type=folder, help="Folder for runs."),
            click.option("--out", required=True, type=folder, help="Of the result file."),
            click.option("--device", default="auto", show_default=True),
            click.option("--precision", type=click.Choice(PRECISIONS), default="bf16", show_default=True),
            click.option("--threads", default=1, show_default=True, help="CPU threads."),
        )
    ):
        command = option(command)
    return command


def fill_table(
    cell: Callable[[str, str, str, int, Path], Cell],
    name: str,
    table: Table,
    result_name: str,
    *,
    references: Callable[[], Plain] | None = None,
    data_dir: Path,
    size: str,
    only: tuple[str, ...],
    numbers: tuple[int, ...],
    runs: Path,
    out: Path,
    device: str,
    precision: str,
    threads: int,
) -> None:
    """Run the cells of a table that are not in its result file yet.

    Parameters
    ----------
    cell
        Makes a cell from the table's name, size, algorithm, number and data folder.
    name, table
        The table.
    result_name
        Name of the result file, without its size.
    references
        Computes scores to add beside the cells, once.
    data_dir, size, only, numbers, runs, out, device, precision, threads
        As in `options`.
    """
    if size not in table.sizes:
        raise click.BadParameter(f"{name} has no size {size!r}: use {', '.join(table.sizes)}")
    if unknown := [algorithm for algorithm in only if algorithm not in table.algorithms]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(table.algorithms)}; use one of them")
    torch.set_num_threads(threads)
    cells = [
        cell(name, size, algorithm, number, data_dir)
        for number in numbers or range(table.repeats)
        for algorithm in only or table.algorithms
    ]
    path = out / f"{result_name}-{size}.json"
    fill(path, cells, runs, Compute(device, precision))
    if references is not None:
        add_references(path, references)


def fill(path: Path, cells: Sequence[Cell], runs: Path, compute: Compute) -> None:
    """Run the cells that are not in the result file yet, one after the other."""
    for cell in cells:
        with _locked(path) as results:
            results.setdefault("hardware", hardware())
            if cell.name in results.setdefault("cells", {}):
                continue
        try:
            record = _run(cell, runs, compute)
        except HistoError as error:
            raise click.ClickException(f"{cell.name}: {error}") from error
        with _locked(path) as results:
            results["cells"][cell.name] = {"algorithm": cell.algorithm, "number": cell.number, **record}
        pooled = record["scores"]["pooled"]
        click.echo(f"{cell.name}: mean F {pooled['mean_f']}, accuracy {pooled['accuracy']}")


def add_references(path: Path, scores: Callable[[], Plain]) -> None:
    """Add reference scores to a result file that does not have them yet."""
    with _locked(path) as results:
        if "references" not in results:
            results["references"] = scores()


def train(cell: Cell, data_set: DataSet, runs: Path, compute: Compute) -> Checkpoint:
    """Train a cell, after the run that it starts from, in folders of ``runs``."""
    begin = None
    if cell.start is not None:
        begin = runs / cell.start.name
        runs.mkdir(parents=True, exist_ok=True)
        with locked(runs / cell.start.name):  # cells of other processes start from it, too
            train(cell.start, cell.start.data(), runs, compute)

    def report(progress: Progress) -> None:
        if progress.validation_loss is not None:
            click.echo(
                f"{cell.name} {progress.step}/{progress.steps}: loss "
                f"{progress.validation_loss:.4f}, Dice {progress.validation_dice:.4f}"
            )

    return loop.train(
        cell.recipe,
        methods.load_method(cell.recipe.method),
        data_set,
        runs / cell.name,
        compute=compute,
        start=begin,
        report=report,
        record={"commit": command.commit()},
    )


def judge(cell: Cell, data_set: DataSet, folder: Path) -> dict[str, Plain]:
    """Score the checkpoints of a cell's run without and, if it has one, with its CRF."""
    scores = {}
    samples = choose(data_set, "test", cell.recipe.schedule)
    classes = [name for name, _ in data_set.classes]
    for name, which in cell.judged.items():
        with engine_for(samples, data_set.mpp, run=folder / which, backend="cpu") as engine:
            scores[name] = score(samples, predictor(engine, data_set.mpp), classes)
            if cell.crf is not None:
                refined = predictor(engine, data_set.mpp, cell.crf)
                scores[f"{name}, CRF"] = score(samples, refined, classes)
    for one in scores.values():
        del one["each_image"]
    return scores


def _run(cell: Cell, runs: Path, compute: Compute) -> Plain:
    """Train, export and score one cell."""
    start = time.monotonic()
    data_set, recipe, folder = cell.data(), cell.recipe, runs / cell.name
    best = train(cell, data_set, runs, compute)
    judged = judge(cell, data_set, folder)
    headline = next(iter(judged))
    scores = judged.pop(headline)
    if cell.further is not None:
        scores |= cell.further(folder, choose(data_set.at_mpp(recipe.mpp), "test", recipe.schedule))
    record = best.record
    return {
        "scores": scores,
        "judged": headline,
        "variants": judged,
        **({"crf": asdict(cell.crf)} if cell.crf else {}),
        **({"start": record["start"]} if "start" in record else {}),
        "best_step": best.step,
        "steps": recipe.schedule.total_steps(record["images"]["train"]),
        "images": record["images"],
        "config": best.config,
        "schedule": asdict(recipe.schedule),
        "augmentation": asdict(recipe.augmentation),
        "mpp": recipe.mpp,
        "data_sha256": record["data_sha256"],
        "commit": record.get("commit"),
        "precision": record["precision"],
        "machine": record["machine"],
        "training_seconds": round(checkpoint.read(folder / "last").record["seconds"]),
        "seconds": round(time.monotonic() - start),
    }


@contextmanager
def _locked(path: Path) -> Iterator[Plain]:
    """Lock a result file that several processes fill; write it when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        results = json.loads(path.read_text()) if path.exists() else {}
        yield results
        write_json(path, results)

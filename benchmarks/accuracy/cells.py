"""Result tables made of training runs, in pieces.

Every cell is one training run, its export, and its score on the held-out images. A cell that is in
the result file is not run again, and one that was stopped goes on from its last checkpoint, so that
a table can be made bit by bit, by several processes, on several machines one after the other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

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
    """One run of a table.

    Attributes
    ----------
    name
        Key in the result file, and name of the run's folder.
    algorithm, number
        Row of the table, and which seed or fold.
    recipe
        How it is trained.
    data
        Opens what it is trained and scored on; its test part is scored.
    further
        More scores, of the run's folder and the images that are scored, at the run's resolution.
    start
        The run whose best checkpoint this one starts from; several cells may share it, and it is
        trained once.
    judged
        Checkpoints of the run that are scored, by what to call them; the first one's are the
        cell's ``scores``, all others are its ``variants``.
    crf
        Dense CRF with which each of them is scored once more, as "NAME, CRF".
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


def settings_of(*tables: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Write the tables of a recipe as the settings of `command.read_recipe`; later ones win."""
    return tuple(
        f"{name}.{key}={json.dumps(value)}"
        for table in tables
        for name, keys in table.items()
        for key, value in keys.items()
    )


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command has which fills a table."""
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
    table: str,
    *,
    algorithms: Collection[str],
    sizes: Collection[str],
    repeats: int,
    name: str,
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
    """Make the cells of a table that are not there yet.

    Parameters
    ----------
    cell
        Makes one of table, size, algorithm, number and data folder.
    table, algorithms, sizes
        Which table, and what there is of it.
    repeats
        Seeds or folds, where none are named.
    name
        Of the result file, before its size.
    references
        Scores that stand beside the cells, by name; made once.
    data_dir, size, only, numbers, runs, out, device, precision, threads
        As of `options`.
    """
    if size not in sizes:
        raise click.BadParameter(f"{table} has no size {size!r}: use {', '.join(sizes)}")
    if unknown := [one for one in only if one not in algorithms]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(algorithms)}; use one of them")
    torch.set_num_threads(threads)
    cells = [
        cell(table, size, algorithm, number, data_dir)
        for number in numbers or range(repeats)
        for algorithm in only or algorithms
    ]
    path = out / f"{name}-{size}.json"
    fill(path, cells, runs, Compute(device, precision))
    if references is not None:
        refer(path, references)


def fill(path: Path, cells: Sequence[Cell], runs: Path, how: Compute) -> None:
    """Run the cells that are not in the result file yet, one after the other."""
    for cell in cells:
        with _held(path) as said:
            said.setdefault("hardware", hardware())
            if cell.name in said.setdefault("cells", {}):
                continue
        try:
            found = _run(cell, runs, how)
        except HistoError as error:
            raise click.ClickException(f"{cell.name}: {error}") from error
        with _held(path) as said:
            said["cells"][cell.name] = {"algorithm": cell.algorithm, "number": cell.number, **found}
        pooled = found["scores"]["pooled"]
        click.echo(f"{cell.name}: mean F {pooled['mean_f']}, accuracy {pooled['accuracy']}")


def refer(path: Path, scores: Callable[[], Plain]) -> None:
    """Put what stands beside the cells into a result file, by name, where it is not there yet."""
    with _held(path) as said:
        if "references" not in said:
            said["references"] = scores()


def train(cell: Cell, found: DataSet, runs: Path, how: Compute) -> Checkpoint:
    """Train a cell on its data, and first what it starts from, in their folders of ``runs``."""
    begin = None
    if cell.start is not None:
        begin = runs / cell.start.name
        runs.mkdir(parents=True, exist_ok=True)
        with locked(runs / cell.start.name):  # other processes' cells start from it, too
            train(cell.start, cell.start.data(), runs, how)

    def report(progress: Progress) -> None:
        if progress.validation_loss is not None:
            click.echo(
                f"{cell.name} {progress.step}/{progress.steps}: loss "
                f"{progress.validation_loss:.4f}, Dice {progress.validation_dice:.4f}"
            )

    return loop.train(
        cell.recipe,
        methods.load_method(cell.recipe.method),
        found,
        runs / cell.name,
        compute=how,
        start=begin,
        report=report,
        record={"commit": command.commit()},
    )


def judge(cell: Cell, found: DataSet, folder: Path) -> dict[str, Plain]:
    """Score the checkpoints of a cell's run, each as it is, and with the CRF where there is one."""
    scores = {}
    samples = choose(found, "test", cell.recipe.schedule)
    classes = [name for name, _ in found.classes]
    for name, which in cell.judged.items():
        with engine_for(samples, found.mpp, run=folder / which, backend="cpu") as engine:
            scores[name] = score(samples, predictor(engine, found.mpp), classes)
            if cell.crf is not None:
                refined = predictor(engine, found.mpp, cell.crf)
                scores[f"{name}, CRF"] = score(samples, refined, classes)
    for one in scores.values():
        del one["each_image"]
    return scores


def _run(cell: Cell, runs: Path, how: Compute) -> Plain:
    """Train, export and score one cell."""
    start = time.monotonic()
    found, recipe, folder = cell.data(), cell.recipe, runs / cell.name
    best = train(cell, found, runs, how)
    judged = judge(cell, found, folder)
    headline = next(iter(judged))
    scores = judged.pop(headline)
    if cell.further is not None:
        scores |= cell.further(folder, choose(found.at_mpp(recipe.mpp), "test", recipe.schedule))
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
def _held(path: Path) -> Iterator[Plain]:
    """Hold a result file, which several processes fill, and write it anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        said = json.loads(path.read_text()) if path.exists() else {}
        yield said
        write_json(path, said)

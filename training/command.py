"""What ``histo-train`` does once its options are parsed: recipe, data sets, and the run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from histostream.training import datasets, device, loop
from histostream.training.checkpoint import Checkpoint
from histostream.training.data import DataError, DataSet, Picture, Sample, StoredSample, kind_of
from histostream.training.device import Compute
from histostream.training.methods import load_method
from histostream.training.preflight import check_settings
from histostream.training.recipe import Recipe, RecipeError, read_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options of ``histo-train``, as its ``--help`` describes them.

    Attributes
    ----------
    method, data, out
        Name of the method, the data set, and the folder of the run.
    pools
        Pools of images without labels, each as ``NAME=SET``.
    validation, test
        Data sets whose images choose the checkpoint, and score it; None: those of ``data``.
    configs, settings
        Recipes, and ``KEY=VALUE`` settings after them.
    mpp
        Resolution to train at; None: that of the recipe, else of the data.
    compute
        Device, precision and the like.
    processes
        Processes that share each batch.
    """

    method: str
    data: str
    out: Path
    pools: tuple[str, ...] = ()
    validation: str | None = None
    test: str | None = None
    configs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    mpp: float | None = None
    compute: Compute = dataclasses.field(default_factory=Compute)
    processes: int = 1


def run_training(options: RunOptions) -> None:
    """Train a method, or go on with a run, and print its scores."""
    method = load_method(options.method)
    check_settings(options.method, method, options.configs, options.settings)
    data = datasets.open_dataset(options.data)
    recipe = read_recipe(options.method, method, options.configs, options.settings, mpp=options.mpp, own_mpp=data.mpp)
    data = with_pools(data, options.pools, recipe.mpp)
    data = with_parts(data, options.validation, options.test, recipe.mpp)
    if options.processes > 1 and "WORLD_SIZE" not in os.environ:
        sys.exit(_run_with_torchrun(options.processes))
    best = _train(recipe, method, data, options.out, options.compute)
    if device.rank() == 0:
        _print_scores(best, options.out)
    device.close_device()


def with_pools(data: DataSet, pools: tuple[str, ...], mpp: float) -> DataSet:
    """Add pools of images without labels, each given as ``NAME=SET``, to a data set.

    SET is what `datasets.open_pool` reads; ``mpp`` is the resolution of data that has none of its own.

    Raises
    ------
    RecipeError
        If the text is not ``NAME=SET``.
    DataError
        If the images cannot be used.
    """
    pools_by_name = dict(data.pools)
    for text in pools:
        name, equals, source = text.partition("=")
        if not (equals and name and source):
            raise RecipeError(f"--pool {text!r}: write NAME=SET, as target=monuseg:PATH")
        pools_by_name[name] = datasets.open_pool(source, name, data.mpp or mpp)
        _check_channels(data, pools_by_name[name], source)
    return dataclasses.replace(data, pools=pools_by_name)


def with_parts(data: DataSet, validation: str | None, test: str | None, mpp: float) -> DataSet:
    """Take the validation or the test images from other data sets, as from the target of an adaptation.

    They are named as for `datasets.open_dataset`; ``mpp`` is the resolution of data that has none of
    its own.

    Raises
    ------
    RecipeError
        If the other data set has other classes.
    DataError
        If a data set cannot be used.
    """
    if validation is not None:
        other = _open_similar(data, validation, mpp)
        data = dataclasses.replace(data, validation=_prefixed(other.validation or other.train, other.name))
    if test is not None:
        other = _open_similar(data, test, mpp)
        samples = other.test or (*other.train, *other.validation)
        data = dataclasses.replace(data, test=_prefixed(samples, f"{other.name}-test"))
    return data


def _open_similar(data: DataSet, source: str, mpp: float) -> DataSet:
    """Open a data set of the same classes and channels, at the same resolution."""
    other = datasets.open_dataset(source)
    if len(other.classes) != len(data.classes):
        raise RecipeError(f"{source}: has classes {_class_names(other)}, the training set {_class_names(data)}")
    _check_channels(data, other.train or other.test, source)
    return other.at_mpp(data.mpp or mpp)


def _check_channels(data: DataSet, pictures: Sequence[Picture], source: str) -> None:
    if pictures and (channels := pictures[0].image.shape[2]) != data.channels:
        raise DataError(
            f"{source}: its images are {kind_of(channels)}, those of {data.name} "
            f"{kind_of(data.channels)}; convert them to one kind"
        )


def _class_names(data: DataSet) -> str:
    return ", ".join(name for name, _ in data.classes) or "unnamed"


def _prefixed(samples: tuple[Sample, ...], prefix: str) -> tuple[Sample, ...]:
    """Put a prefix before names and groups, so that those of two data sets differ."""
    return tuple(
        StoredSample(f"{prefix}/{s.name}", f"{prefix}/{s.group}", s.image, s.labels, s.instances, s.object_px)
        for s in samples
    )


def _run_with_torchrun(processes: int) -> int:
    """Run this command again in several processes, by torchrun; returns the exit status."""
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *("-m", "histostream.training.cli", *sys.argv[1:]),
    ]
    with subprocess.Popen(command) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue  # the signal reached the child too, which saves its last step


def _train(recipe: Recipe, method: ModuleType, data: DataSet, run: Path, compute: Compute) -> Checkpoint:
    """Train, with a progress bar in the first process."""
    record = {"histostream": metadata.version("histostream"), "commit": commit()}
    if int(os.environ.get("RANK", "0")) > 0:
        return loop.train(recipe, method, data, run, compute=compute, record=record)
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, transient=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None, losses="")

        def report(progress: loop.Progress) -> None:
            text = "  ".join(f"{k} {v:.3f}" for k, v in progress.losses.items())
            bar.update(task, completed=progress.step, total=progress.steps, losses=text)
            if progress.validation_loss is not None:
                bar.console.print(
                    f"step {progress.step}: validation loss {progress.validation_loss:.4f}, "
                    f"Dice {progress.validation_dice:.3f}, {progress.seconds:.0f} s",
                    soft_wrap=True,
                )

        return loop.train(recipe, method, data, run, compute=compute, report=report, record=record)


def _print_scores(best: Checkpoint, run: Path) -> None:
    for part, score in best.record["scores"].items():
        by_class = zip(best.classes, score["f_score"], strict=True)
        text = ", ".join(f"{name} {f_score:.3f}" for (name, _), f_score in by_class)
        click.echo(f"{part} ({score['images']} images): F-score {text}")
    click.echo(f"best checkpoint (step {best.step}): {run / 'best'}")


def commit() -> str | None:
    """Return the commit of the code where it runs from a checkout, with "+changes" where files differ."""
    folder = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changes else head

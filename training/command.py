"""What ``histo-train`` does once its options are parsed: recipe, data sets, and the run."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import click

from histostream.training import checkpoint, datasets, device, loop
from histostream.training.checkpoint import Checkpoint, CheckpointError
from histostream.training.data import DataError, DataSet, Picture, Sample, StoredSample, kind_of
from histostream.training.device import Compute
from histostream.training.events import check_events
from histostream.training.methods import load_method
from histostream.training.preflight import check_settings
from histostream.training.recipe import Recipe, RecipeError, read_recipe
from histostream.training.report.run import REPORT
from histostream.training.watching import Watch

NAME = "histo-train"


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
    start
        A run, a checkpoint, or a method whose weights ship, from whose weights the run starts.
    tensorboard
        Write event files for TensorBoard.
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
    start: Path | None = None
    tensorboard: bool = False


def run_training(options: RunOptions) -> None:
    """Train a method, or go on with a run, and print its scores.

    Raises
    ------
    HistoError
        If an option, the data or the run in ``out`` cannot be used.
    KeyboardInterrupt
        If it was stopped, with the command that continues it.
    """
    try:
        _run_training(options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(options.out)) from None


def _run_training(options: RunOptions) -> None:
    if options.tensorboard:
        check_events()
    if options.start is not None:
        checkpoint.read(checkpoint.find_start(options.start))
    method = load_method(options.method)
    check_settings(options.method, method, options.configs, options.settings)
    data = datasets.open_dataset(options.data)
    recipe = read_recipe(options.method, method, options.configs, options.settings, mpp=options.mpp, own_mpp=data.mpp)
    data = with_pools(data, options.pools, recipe.mpp)
    data = with_parts(data, options.validation, options.test, recipe.mpp)
    if options.processes > 1 and "WORLD_SIZE" not in os.environ:
        sys.exit(_run_with_torchrun(options.processes))
    best = _train(recipe, method, data, options)
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


def _train(recipe: Recipe, method: ModuleType, data: DataSet, options: RunOptions) -> Checkpoint:
    """Train; the first process shows it."""
    record = {"histostream": metadata.version("histostream"), "commit": commit()}
    train = functools.partial(
        loop.train,
        recipe,
        method,
        data,
        options.out,
        compute=options.compute,
        start=options.start,
        tensorboard=options.tensorboard,
        record=record,
    )
    if int(os.environ.get("RANK", "0")) > 0:
        return train()
    with Watch(options.data, _own_command()) as watch:
        return train(announce=watch.announce, report=watch.report, answer=watch.answer)


def _own_command() -> str:
    """Return the command line of this process, which continues its run, as a shell here understands it."""
    program, found = Path(sys.argv[0]), shutil.which(NAME)
    if program.stem != NAME:
        words = [sys.executable, "-m", "histostream.training.cli"]
    elif found is not None and program.exists() and Path(found).samefile(program):
        words = [NAME]
    else:
        words = [str(program)]
    return shlex.join([*words, *sys.argv[1:]])


def _how_to_go_on(run: Path) -> str:
    """Say what a stopped run has saved, and the command that continues it."""
    try:
        saved = checkpoint.read(run / "last")
    except CheckpointError:
        return f"nothing was saved; to begin again: {_own_command()}"
    return f"step {saved.step} is saved; to go on: {_own_command()}"


def _print_scores(best: Checkpoint, run: Path) -> None:
    for part, score in best.record["scores"].items():
        by_class = zip(best.classes, score["f_score"], strict=True)
        text = ", ".join(f"{name} {f_score:.3f}" for (name, _), f_score in by_class)
        click.echo(f"{part} ({score['images']} images): F-score {text}")
    click.echo(f"best checkpoint (step {best.step}): {run / 'best'}; curves: {run / REPORT}")


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

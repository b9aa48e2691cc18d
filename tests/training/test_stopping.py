"""Ctrl-C: answered at once wherever the run is, and the run that goes on is the one that was not stopped."""

from __future__ import annotations

import csv
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from histostream.training import checkpoint, loop
from histostream.training.command import _own_command
from histostream.training.data import DataSet, StoredSample
from histostream.training.methods.imems import method as imems
from histostream.training.state import State
from histostream.training.stopping import stop_signals
from tests.training.resuming import logged, weights_of
from tests.training.test_running import command, environment, finish, method_that, recipe, start, wait_for

AT_ONCE_S = 1.0


@pytest.fixture(scope="module")
def unbroken(found: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    loop.train(recipe(), imems, found, run)
    return run


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def stopped_after_signal(train: Callable[[], Any], sent: list[float]) -> float:
    """Return the seconds between the last signal and the end of a run that it stops."""
    with pytest.raises(KeyboardInterrupt):
        train()
    return time.perf_counter() - sent[-1]


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between two runs: weights, logged steps, final scores."""
    found = []
    for name in ("last", "best"):
        a, b = weights_of(one, name), weights_of(other, name)
        found += [f"{name}: {key}" for key in a | b if key not in a or key not in b or not torch.equal(a[key], b[key])]
    none: dict[str, str] = {}
    for row, other_row in zip_longest(logged(one), logged(other), fillvalue=none):
        if {**row, "seconds": ""} != {**other_row, "seconds": ""}:
            found.append(f"log: {row} {other_row}")
    scores, other_scores = (checkpoint.read(run / "best").record["scores"] for run in (one, other))
    return found if scores == other_scores else [*found, f"scores: {scores} {other_scores}"]


@pytest.mark.parametrize("step", [2, 4], ids=["in the middle", "at the end"])
def test_a_validation_that_is_interrupted_is_made_by_the_run_that_goes_on(
    found: DataSet, unbroken: Path, tmp_path: Path, step: int
) -> None:
    sent: list[float] = []
    steps: list[int] = []

    def count(state: State, batch: Any) -> dict[str, torch.Tensor]:
        steps.append(batch.step + 1)
        return imems.step(state, batch)

    def validate(state: State, images: torch.Tensor, labels: torch.Tensor) -> Any:
        if steps[-1] == step and not sent:
            sent.append(time.perf_counter())
            interrupt()
            time.sleep(20)
        return imems.validate(state, images, labels)

    method = method_that(count, validate=validate)
    assert stopped_after_signal(lambda: loop.train(recipe(), method, found, tmp_path), sent) < AT_ONCE_S
    saved = checkpoint.read(tmp_path / "last")
    assert saved.step == step
    assert saved.record["due"]
    assert logged(tmp_path)[-1]["validation_loss"] == ""
    assert "was stopped after step" in (tmp_path / "report.html").read_text()
    loop.train(recipe(), imems, found, tmp_path)
    assert not differences(tmp_path, unbroken)


def test_a_signal_during_the_final_scores_leaves_them_to_the_run_that_goes_on(
    found: DataSet, unbroken: Path, tmp_path: Path
) -> None:
    sent: list[float] = []

    def finish_slowly(state: State, parts: Any) -> None:
        sent.append(time.perf_counter())
        interrupt()
        time.sleep(20)

    method = method_that(imems.step, finish=finish_slowly)
    assert stopped_after_signal(lambda: loop.train(recipe(), method, found, tmp_path), sent) < AT_ONCE_S
    assert "scores" not in checkpoint.read(tmp_path / "best").record
    loop.train(recipe(), imems, found, tmp_path)
    assert not differences(tmp_path, unbroken)


@dataclass(frozen=True, slots=True, eq=False)
class SlowSample:
    """A sample whose pixels come from a slow disk, once ``slow`` is set."""

    sample: StoredSample
    slow: threading.Event

    @property
    def name(self) -> str:
        return self.sample.name

    @property
    def group(self) -> str:
        return self.sample.group

    @property
    def shape(self) -> tuple[int, int]:
        return self.sample.shape

    @property
    def image(self) -> NDArray[np.uint8]:
        if self.slow.is_set():
            time.sleep(3)
        return self.sample.image

    @property
    def labels(self) -> NDArray[np.uint8]:
        return self.sample.labels

    @property
    def instances(self) -> NDArray[np.int32] | None:
        return self.sample.instances

    @property
    def object_px(self) -> float:
        return self.sample.object_px

    def digest(self) -> bytes:
        return self.sample.digest()


def test_a_signal_while_the_run_waits_for_images_stops_it_and_saves_the_step_before(
    found: DataSet, unbroken: Path, tmp_path: Path
) -> None:
    sent: list[float] = []
    slow = threading.Event()
    samples = tuple(SlowSample(sample, slow) for sample in found.train if isinstance(sample, StoredSample))

    def interrupt_while_it_waits(progress: loop.Progress) -> None:
        slow.set()
        if progress.step == 3:  # the two batches that were drawn ahead are used up

            def send() -> None:
                time.sleep(0.3)
                sent.append(time.perf_counter())
                interrupt()

            threading.Thread(target=send).start()

    data = replace(found, train=samples)

    def train() -> None:
        loop.train(recipe(validate_every=1000), imems, data, tmp_path, report=interrupt_while_it_waits)

    assert stopped_after_signal(train, sent) < AT_ONCE_S
    assert checkpoint.read(tmp_path / "last").step == 3
    slow.clear()
    best = loop.train(recipe(validate_every=1000), imems, data, tmp_path)
    assert best.step == 4
    assert all(torch.equal(a, weights_of(tmp_path, "last")[k]) for k, a in weights_of(unbroken, "last").items())


def test_a_signal_is_answered_while_the_main_thread_is_inside_one_long_operation() -> None:
    """A backward pass is one operation; so is this hash, which lets other threads run too."""
    answered: list[tuple[int, float]] = []
    with stop_signals(lambda count: answered.append((count, time.perf_counter()))) as stop:
        threading.Timer(0.2, interrupt).start()
        hashlib.pbkdf2_hmac("sha256", b"word", b"salt", 1_500_000)
        ended = time.perf_counter()
        assert stop.requested
    ((count, when),) = answered
    assert count == 1
    assert when < ended - 0.1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_stops_a_step_and_saves_nothing_of_it(found: DataSet, unbroken: Path, tmp_path: Path) -> None:
    def step(state: State, batch: Any) -> dict[str, torch.Tensor]:
        if batch.step == 2:
            imems.step(state, batch)  # half of the work is done
            interrupt()
            interrupt()
            time.sleep(20)
        return imems.step(state, batch)

    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe(), method_that(step), found, tmp_path)
    assert checkpoint.read(tmp_path / "last").step == 2
    loop.train(recipe(), imems, found, tmp_path)
    assert not differences(tmp_path, unbroken)


@pytest.mark.parametrize("name", ["best", "last"])
@pytest.mark.parametrize("after", [False, True], ids=["before it is saved", "after it is saved"])
def test_a_run_that_is_killed_around_a_checkpoint_logs_each_step_once(
    found: DataSet, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: bool
) -> None:
    class Killed(Exception):
        pass

    save = checkpoint.save

    def killed(folder: Path, saved: Any, state: State, *, optimizers: bool = True) -> None:
        dies = folder.name == name and saved.step == 4
        if not dies or after:
            save(folder, saved, state, optimizers=optimizers)
        if dies:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(Killed):
        loop.train(recipe(), imems, found, tmp_path)
    monkeypatch.undo()
    loop.train(recipe(), imems, found, tmp_path)
    assert not differences(tmp_path, unbroken)


@pytest.mark.full
@pytest.mark.xdist_group("running")
def test_the_command_that_a_stopped_run_names_goes_on_with_it(nuclei_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my images"  # a name that has to be quoted
    folder.symlink_to(nuclei_folder)
    more = ("--set", "schedule.steps=120", "--set", "schedule.validate_every=1000")
    child = start(command(folder, tmp_path / "run", *more))
    wait_for(tmp_path / "run" / "log.csv", child)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate()
    assert child.returncode == 130, error
    line = error.splitlines()[-1]  # before it, what is unusual in the images
    saved = checkpoint.read(tmp_path / "run" / "last").step
    assert line.startswith(
        f"histo-train: stopped; step {saved} is saved; to go on: {sys.executable} -m histostream.training.cli "
    )
    typed = line.partition("to go on: ")[2]
    done = subprocess.run(typed, shell=True, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"goes on after step {saved} of 120 steps" in done.stdout
    finish(command(folder, tmp_path / "whole", *more))  # a process of its own too: like is compared with like
    assert not differences(tmp_path / "run", tmp_path / "whole")
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(i + 1) for i in range(120)]


def test_the_program_is_named_as_this_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("found", "other place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "histo-train").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "found"))
    for name, shown in (("found", "histo-train"), ("other place", str(tmp_path / "other place" / "histo-train"))):
        monkeypatch.setattr(sys, "argv", [str(tmp_path / name / "histo-train"), "--data", "my images"])
        assert shlex.split(_own_command()) == [shown, "--data", "my images"]

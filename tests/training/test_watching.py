"""What the terminal shows: the plan before the first step, the total from the start, and the time that is left."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from histostream.training import loop
from histostream.training.batches import divide
from histostream.training.cli import main
from histostream.training.data import DataSet
from histostream.training.loop import Progress
from histostream.training.methods.imems import method as imems
from histostream.training.plan import Plan
from histostream.training.schedule import Schedule
from histostream.training.watching import Watch
from tests.commands import call
from tests.training.test_running import TINY, recipe


def test_the_plan_is_printed_before_the_first_step(nuclei_folder: Path, found: DataSet, tmp_path: Path) -> None:
    settings = [word for s in TINY for word in ("--set", s)]
    done = call(main, "--data", nuclei_folder, "--out", tmp_path, "--mpp", 0.5, "--device", "cpu", *settings)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    told = dict(line.split(maxsplit=1) for line in lines[:6])
    assert list(told) == ["data", "classes", "parts", "networks", "device", "training"]
    assert told["data"] == f"{nuclei_folder}: 8 images, RGB, 80 x 80 px, trained at 0.5 um per pixel"
    parts = divide(found, Schedule()).split
    labels = np.concatenate([found.train[i].labels.ravel() for i in parts.train])
    shares = [float(x) / 100 for x in re.findall(r"([\d.]+) %", told["classes"])]
    assert shares == pytest.approx([(labels == k).mean() for k in (0, 1)], abs=6e-4)
    assert told["parts"].startswith(f"{len(parts.train)} training, {len(parts.validation)} validation: drawn by seed 0")
    state = imems.build(imems.Config(base_width=4, depth=2, discriminator_width=4), 2)
    count = sum(p.numel() for p in state.modules["generator"].parameters())
    assert f"generator {count / 1000:.3g} k" in told["networks"]
    assert told["device"].startswith("cpu (")
    assert told["training"] == "12 steps, a batch of 2 crops of 32 px, 3 validations"
    assert lines[6].startswith("step 4: validation loss")


def test_the_total_is_known_before_the_first_step(found: DataSet, tmp_path: Path) -> None:
    totals: list[float | None] = []

    def announce(plan: Plan) -> None:
        watch.announce(plan)
        totals.append(watch._bar.tasks[0].total)
        raise StopIteration

    with Watch("data", "command") as watch, pytest.raises(StopIteration):
        loop.train(recipe(steps=7), imems, found, tmp_path, announce=announce)
    assert totals == [7]


PLAN = Plan(
    images=8,
    channels=3,
    sizes=((80, 80), (80, 80)),
    mpp=0.5,
    shares={"[bold]ground": 0.9, "nucleus": 0.1},
    counted=6,
    weights=(),
    parts={"training": 6, "validation": 2, "test": 0},
    pools={},
    division="drawn",
    parameters={"generator": 10},
    deployed=("generator",),
    machine="cpu",
    start=0,
    steps=101,
    batch=2,
    crop_px=0,
    validations=2,
)


def test_the_time_is_told_as_soon_as_it_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step takes 30 s, each further one 2 s, and the validation after step 51 takes 10 s."""
    now = [0.0]
    monkeypatch.setattr("histostream.training.watching.time.perf_counter", lambda: now[0])
    with Watch("my data", "command") as watch:
        watch.announce(PLAN)
        for step in range(1, 52):
            now[0] += 30 if step == 1 else 2
            judged = step == 51
            now[0] += 10 if judged else 0
            loss = 0.5 if judged else None
            watch.report(Progress(step, 101, {"l1": 1.0}, loss, loss, now[0], {}, {}, 10.0 if judged else None))
    lines = capsys.readouterr().out.splitlines()
    assert "classes   [bold]ground 90.0 %, nucleus 10.0 % of the pixels of 6 training images" in lines
    # 5 steps of 2 s were measured after the first one: 95 steps are left.
    (told,) = [line for line in lines if line.startswith("time")]
    assert told == "time      2 s a step: about 3 min for 95 steps, without validations"
    # 50 steps of 2 s, and one validation of 10 s.
    (validation,) = [line for line in lines if line.startswith("step 51")]
    assert validation == "step 51: validation loss 0.5000, Dice 0.500, 140 s, about 2 min left"


def test_a_signal_is_answered_with_what_happens_next(capsys: pytest.CaptureFixture[str]) -> None:
    with Watch("my data", "command") as watch:
        watch.answer(1)
        watch.announce(replace(PLAN, start=40))
        watch.answer(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stopping"
    assert lines[-1].strip() or lines[-2].strip()
    assert any("saves step 41 when it is done" in line and "checkpoint of step 40" in line for line in lines)


def test_a_run_that_ends_early_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with Watch("my data", "command") as watch:
        watch.announce(replace(PLAN, patience=2))
        for step, waited in ((10, 0), (20, 1), (30, 2)):
            watch.report(Progress(step, 101, {}, 0.5, 0.5, 1.0, waited=waited))
    lines = capsys.readouterr().out.splitlines()
    assert "(the run ends after 2 in a row that are not better)" in lines[5]
    ended = [i for i, line in enumerate(lines) if line.startswith("ends early: 2 validations in a row")]
    assert [lines[i - 1].split(":")[0] for i in ended] == ["step 30"]


@pytest.mark.parametrize(
    ("start", "text"),
    [
        (0, "101 steps, a batch of 2 whole images, 2 validations"),
        (40, "goes on after step 40 of 101 steps, a batch of 2 whole images, 2 validations to come"),
        (101, "is finished: 101 steps, a batch of 2 whole images"),
    ],
)
def test_the_plan_says_where_the_run_is(start: int, text: str) -> None:
    assert replace(PLAN, start=start).lines("data")[5] == f"training  {text}"

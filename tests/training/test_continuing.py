"""Runs that get more steps, end early, or are refused because they are another run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from histostream.training import checkpoint, loop
from histostream.training.checkpoint import CheckpointError
from histostream.training.data import DataSet
from histostream.training.methods import hook
from histostream.training.methods.apma_net import method as apma_net
from histostream.training.methods.imems import method as imems
from histostream.training.methods.pyramid_gan import method as pyramid_gan
from histostream.training.methods.uda_self_ensembling import method as uda
from histostream.training.plan import Plan
from histostream.training.schedule import Schedule
from histostream.training.state import State
from tests.training.resuming import logged, weights_of
from tests.training.test_running import method_that, recipe


def test_a_finished_run_that_gets_more_steps_is_the_run_that_had_them_from_the_beginning(
    found: DataSet, tmp_path: Path
) -> None:
    plans: list[Plan] = []
    loop.train(recipe(steps=4), imems, found, tmp_path / "grown")
    loop.train(recipe(steps=8), imems, found, tmp_path / "grown", announce=plans.append)
    loop.train(recipe(steps=8), imems, found, tmp_path / "whole")
    for name in ("last", "best"):
        one, other = weights_of(tmp_path / "grown", name), weights_of(tmp_path / "whole", name)
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert [row["step"] for row in logged(tmp_path / "grown")] == [str(i) for i in range(1, 9)]
    assert plans[0].start == 4
    assert plans[0].notes == ("the run gets 8 steps in place of 4",)


def test_a_falling_learning_rate_of_a_run_that_gets_more_steps_is_told(found: DataSet, tmp_path: Path) -> None:
    """Half a cosine: of 4 steps the last rate is that of step 3; step 4 of 16 has (1 + cos(pi / 4)) / 2."""
    plans: list[Plan] = []
    loop.train(recipe(steps=4, decay="cosine"), imems, found, tmp_path)
    loop.train(recipe(steps=16, decay="cosine"), imems, found, tmp_path, announce=plans.append)
    assert "from 0.146 to 0.854 of its first value, and to 0 at step 16" in plans[0].notes[1]
    rates = [float(row["rate_generator"]) for row in logged(tmp_path)]
    assert rates[3] == pytest.approx(2e-4 * 0.146447, rel=1e-4)
    assert rates[4] == pytest.approx(2e-4 * 0.853553, rel=1e-4)


def test_fewer_steps_or_another_recipe_are_refused_by_name(found: DataSet, tmp_path: Path) -> None:
    loop.train(recipe(steps=4), imems, found, tmp_path)
    with pytest.raises(CheckpointError, match="holds a run of 4 steps, and 3 are fewer"):
        loop.train(recipe(steps=3), imems, found, tmp_path)
    with pytest.raises(CheckpointError, match=r"\(schedule\.batch is 2 there and 1 here\)"):
        loop.train(recipe(steps=8, batch=1), imems, found, tmp_path)
    wider = replace(recipe(), config=replace(recipe().config, base_width=6))
    with pytest.raises(CheckpointError, match=r"method\.base_width is 4 there and 6 here"):
        loop.train(wider, imems, found, tmp_path)
    with pytest.raises(CheckpointError, match=r"schedule\.epochs is 0 there and 3 here"):
        loop.train(recipe(epochs=3), imems, found, tmp_path)


def test_epochs_may_grow_too(found: DataSet, tmp_path: Path) -> None:
    loop.train(recipe(epochs=1), imems, found, tmp_path)
    steps = recipe(epochs=2).schedule.total_steps(6)
    assert loop.train(recipe(epochs=2, select="last"), imems, found, tmp_path / "other").step == steps
    loop.train(recipe(epochs=2), imems, found, tmp_path)
    assert len(logged(tmp_path)) == steps


def test_a_run_of_an_older_version_goes_on(found: DataSet, tmp_path: Path) -> None:
    """Whose recipe has no setting of today's, and whose checkpoint does not say which was best."""
    loop.train(recipe(steps=4), imems, found, tmp_path)
    for name in ("last", "best"):
        file = tmp_path / name / "checkpoint.safetensors"
        header = json.loads((tmp_path / name / "checkpoint.json").read_text())
        del header["record"]["recipe"]["class_weights"], header["record"]["recipe"]["schedule"]["patience"]
        for key in ("best", "waited", "due"):
            header["record"].pop(key, None)
        save_file(load_file(file), file, metadata={"checkpoint": json.dumps(header)})
    loop.train(recipe(steps=6), imems, found, tmp_path)
    assert len(logged(tmp_path)) == 6


@pytest.mark.parametrize(
    ("method", "config", "done", "steps", "more", "can"),
    [
        (imems, {}, 900, 900, 1800, True),
        # Four levels of 225 steps, then of 450: step 900 would be in the second one again.
        (pyramid_gan, {}, 900, 900, 1800, False),
        (pyramid_gan, {}, 200, 900, 1800, True),  # still in the coarsest level
        (pyramid_gan, {"levels": 1}, 900, 900, 1800, True),
        # A quarter on the source alone: 225 steps, then 450.
        (apma_net, {}, 400, 900, 1800, False),
        (apma_net, {}, 900, 900, 1800, True),
        (apma_net, {}, 100, 900, 1800, True),
        (uda, {}, 900, 900, 1800, True),
        (uda, {"self_training": True}, 900, 900, 1800, False),
    ],
)
def test_a_method_whose_phases_are_shares_of_the_steps_says_so(
    method: ModuleType, config: dict[str, Any], done: int, steps: int, more: int, can: bool
) -> None:
    cause = hook(method, "can_extend")(method.Config(**config), done, steps, more)
    assert (cause == "") is can


def test_a_run_that_cannot_get_more_steps_names_what_works(found: DataSet, tmp_path: Path) -> None:
    method = method_that(imems.step, can_extend=lambda config, done, steps, more: "its levels are shares of all steps")
    loop.train(recipe(steps=4), method, found, tmp_path / "run")
    with pytest.raises(CheckpointError, match="its levels are shares of all steps") as refused:
        loop.train(recipe(steps=8), method, found, tmp_path / "run")
    assert str(refused.value).endswith(f"with --from {tmp_path / 'run'}")
    loop.train(recipe(steps=8), method, found, tmp_path / "other", start=tmp_path / "run")


# Validation losses of validations 1, 2, ...; the run ends with the third in a row that is not better.
LOSSES = (5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 3.1, 1.0, 1.0, 1.0, 1.0, 1.0)


def made_up(calls: list[int]) -> ModuleType:
    def validate(state: State, images: torch.Tensor, labels: torch.Tensor) -> Any:
        return LOSSES[calls[-1] - 1], torch.zeros_like(labels)

    def settle(state: State, parts: Any) -> None:
        calls.append((calls[-1] if calls else 0) + 1)

    return method_that(imems.step, validate=validate, settle=settle)


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_ends_after_so_many_validations_without_a_better_one(
    found: DataSet, tmp_path: Path, killed: bool
) -> None:
    calls: list[int] = []
    method, patient = made_up(calls), recipe(steps=24, patience=3)
    if killed:  # the number of vain validations is not forgotten

        class Killed(Exception):
            pass

        def kill(progress: loop.Progress) -> None:
            if progress.step == 11:
                raise Killed

        with pytest.raises(Killed):
            loop.train(patient, method, found, tmp_path, report=kill)
    best = loop.train(patient, method, found, tmp_path)
    assert calls == [1, 2, 3, 4, 5, 6, 7]
    assert best.step == 8
    assert len(logged(tmp_path)) == 14
    assert (
        "The run ended early: 3 validations in a row were not better than that of step 8"
        in (tmp_path / "report.html").read_text()
    )
    loop.train(patient, method, found, tmp_path)
    assert len(logged(tmp_path)) == 14, "a run that has ended goes on"
    more = loop.train(recipe(steps=24, patience=4), method, found, tmp_path)
    assert more.step == 16
    assert len(logged(tmp_path)) == 24


def test_without_patience_a_run_takes_all_its_steps(found: DataSet, tmp_path: Path) -> None:
    loop.train(recipe(steps=24), made_up([]), found, tmp_path)
    assert len(logged(tmp_path)) == 24
    with pytest.raises(ValueError, match="no checkpoint is better than a later one"):
        Schedule(patience=2, select="last")
    with pytest.raises(ValueError, match="patience=-1"):
        Schedule(patience=-1)


def test_a_run_that_is_finished_is_not_scored_again(found: DataSet, tmp_path: Path) -> None:
    loop.train(recipe(), imems, found, tmp_path)
    before = (tmp_path / "best" / "checkpoint.safetensors").stat().st_mtime_ns
    best = loop.train(recipe(), imems, found, tmp_path)
    assert (tmp_path / "best" / "checkpoint.safetensors").stat().st_mtime_ns == before
    assert best.record["scores"] == checkpoint.read(tmp_path / "best").record["scores"]

"""Runs that start from the weights of others: what fits is taken, what does not is said, the rest is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from histostream.runtime.bundle.card import default_bundle
from histostream.training import checkpoint, loop
from histostream.training.checkpoint import CheckpointError
from histostream.training.cli import main
from histostream.training.data import DataSet, StoredSample
from histostream.training.methods.imems import method as imems
from histostream.training.plan import Plan
from tests.commands import call
from tests.training.resuming import weights_of
from tests.training.test_running import TINY, recipe


@pytest.fixture(scope="module")
def first(found: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "first"
    loop.train(recipe(), imems, found, run)
    return run


def still() -> imems.Config:
    """Return a configuration that learns so slowly that the weights stay what they were."""
    config: imems.Config = replace(recipe().config, adversarial=False, learning_rate=1e-12, dropout=0)
    return config


def test_other_classes_take_all_but_the_head(found: DataSet, first: Path, tmp_path: Path) -> None:
    """Two classes there, three here: the last convolution and its bias are of another shape."""

    def third(sample: StoredSample) -> StoredSample:
        labels = sample.labels.copy()
        labels[:8, :8] = 2
        return replace(sample, labels=labels)

    samples = tuple(third(s) for s in found.train if isinstance(s, StoredSample))
    plans: list[Plan] = []
    mine = replace(recipe(), config=still())
    loop.train(mine, imems, replace(found, train=samples), tmp_path / "run", start=first, announce=plans.append)
    before, after = weights_of(first, "best"), weights_of(tmp_path / "run", "last")
    names = [name for name in after if name.startswith("generator.")]
    same = {n for n in names if before[n].shape == after[n].shape and torch.allclose(before[n], after[n], atol=1e-6)}
    head = set(names) - same
    assert {before[name].shape[0] for name in head} == {2}
    assert {after[name].shape[0] for name in head} == {3}
    assert len(head) == 2
    taken, left = plans[0].notes
    assert taken == f"starts from {first / 'best'} (imems, step 4): {len(same)} tensors loaded"
    for name in head:
        here, there = (" x ".join(map(str, tensors[name].shape)) for tensors in (after, before))
        assert f"{name} {there}, here {here}" in left
    assert set(checkpoint.read(tmp_path / "run" / "best").record["start"]["left"]) == head


def test_another_resolution_of_the_start_is_told(found: DataSet, first: Path, tmp_path: Path) -> None:
    plans: list[Plan] = []
    loop.train(replace(recipe(), mpp=0.25), imems, found, tmp_path, start=first, announce=plans.append)
    assert plans[0].notes[1] == "it was trained at 0.5 um per pixel, this run is at 0.25"


def test_a_checkpoint_is_found_by_run_folder_and_file(first: Path, tmp_path: Path) -> None:
    last = first / "last"
    assert checkpoint.find_start(first) == first / "best"
    assert checkpoint.find_start(last) == last
    assert checkpoint.find_start(last / "checkpoint.safetensors") == last
    assert checkpoint.read(checkpoint.find_start(Path("imems"))).method == "imems"  # which ships


def test_what_is_no_checkpoint_is_refused_with_the_cause(first: Path, tmp_path: Path) -> None:
    bundle = default_bundle()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pth")
    (tmp_path / "empty").mkdir()
    damaged = shutil.copytree(first / "last", tmp_path / "damaged")
    (damaged / "checkpoint.safetensors").write_bytes(b"\x00" * 100)
    for start, words in (
        (bundle, "is a bundle, whose graphs cannot be trained; name the run or the checkpoint"),
        (tmp_path / "model.pth", "is no checkpoint of HistoStream"),
        (tmp_path / "empty", "no checkpoint in it"),
        (damaged, "damaged or not a checkpoint"),
        (tmp_path / "nothing", r"there is no such folder; name a run, a checkpoint, or a method whose weights ship \("),
    ):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.read(checkpoint.find_start(start))
        # The command says so before it reads the data.
        done = call(main, "--data", tmp_path / "no data", "--out", tmp_path / "run", "--from", start)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert str(start) in done.stderr
    assert not (tmp_path / "run").exists()


def test_networks_of_another_width_are_refused_with_the_settings_that_fit(
    nuclei_folder: Path, first: Path, tmp_path: Path
) -> None:
    base = ["--data", nuclei_folder, "--mpp", 0.5, "--device", "cpu"]
    settings = [word for s in TINY if "width" not in s for word in ("--set", s)]
    wide = ["--set", "method.base_width=6", "--set", "method.discriminator_width=6"]
    done = call(main, *base, *settings, *wide, "--out", tmp_path / "run", "--from", first)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "none of its weights fits the networks" in line
    advised = line.partition("or pass ")[2].split()
    assert "method.base_width=4" in advised
    assert not (tmp_path / "run").exists()
    done = call(main, *base, *settings, *wide, *advised, "--out", tmp_path / "run", "--from", first)
    assert done.returncode == 0, done.stderr
    assert f"note      starts from {first / 'best'} (imems, step 4)" in done.stdout


def test_a_run_that_has_begun_names_what_it_started_from(found: DataSet, first: Path, tmp_path: Path) -> None:
    loop.train(recipe(), imems, found, tmp_path / "run", start=first)
    with pytest.raises(CheckpointError, match="started from other weights") as refused:
        loop.train(recipe(), imems, found, tmp_path / "run")
    advised = str(refused.value).rpartition("--from ")[2]
    loop.train(recipe(), imems, found, tmp_path / "run", start=Path(advised))
    loop.train(recipe(), imems, found, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="or leave out --from"):
        loop.train(recipe(), imems, found, tmp_path / "plain", start=first)


def test_a_start_helps(found: DataSet, tmp_path: Path) -> None:
    """Sixteen steps on the same images, then as many more: better than the first sixteen alone."""
    config = replace(recipe().config, adversarial=False, learning_rate=3e-3)
    mine = replace(recipe(steps=16, validate_every=16), config=config)
    losses = []
    loop.train(mine, imems, found, tmp_path / "one", report=lambda p: losses.append(p.validation_loss))
    first = losses[-1]
    loop.train(
        mine, imems, found, tmp_path / "two", start=tmp_path / "one", report=lambda p: losses.append(p.validation_loss)
    )
    assert first is not None
    assert losses[-1] is not None
    assert losses[-1] < first
    assert np.isfinite(losses[-1])

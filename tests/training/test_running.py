"""Runs that are killed, stopped, shared by processes, or cannot go on."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from histostream.training import checkpoint, compute, loop, sets
from histostream.training.augment import Augmentation, warp
from histostream.training.batches import Batches, divide
from histostream.training.compute import Compute, ComputeError
from histostream.training.data import DataError, DataSet
from histostream.training.loop import Recipe, TrainError
from histostream.training.methods import State, imems
from histostream.training.methods.imems import Config
from histostream.training.schedule import Schedule

STEPS = 12
TINY = (
    "schedule.batch=2", "schedule.crop_px=32", "schedule.validate_every=4", "method.depth=2",
    "method.base_width=4", "method.discriminator_width=4", f"schedule.steps={STEPS}",
)  # fmt: skip


def recipe(**schedule: Any) -> Recipe:
    common: dict[str, Any] = {"steps": 4, "batch": 2, "crop_px": 32, "validate_every": 2}
    config = Config(base_width=4, depth=2, discriminator_width=4)
    return Recipe("imems", config, 0.5, Schedule(**{**common, **schedule}))


@pytest.fixture(scope="module")
def found(nuclei_folder: Path) -> DataSet:
    return sets.open_set(str(nuclei_folder))


def command(folder: Path, run: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "histostream.training.cli", "--data", str(folder)]
    settings = [word for s in TINY for word in ("--set", s)]
    return [*words, "--out", str(run), "--mpp", "0.5", "--device", "cpu", *settings, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(words: list[str]) -> str:
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(run / name / "checkpoint.safetensors")
    return tensors


def same(one: Path, other: Path, name: str = "last") -> bool:
    a, b = weights(one, name), weights(other, name)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def unbroken(nuclei_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    finish(command(nuclei_folder, run))
    return run


def wait_for(path: Path, child: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


@pytest.mark.xdist_group("running")
def test_kill_9_and_the_same_command_again_give_the_unbroken_run(
    nuclei_folder: Path, unbroken: Path, tmp_path: Path
) -> None:
    words = command(nuclei_folder, tmp_path / "run")
    child = start(words)
    wait_for(tmp_path / "run" / "last" / "checkpoint.safetensors", child)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    finish(words)
    for name in ("last", "best"):
        assert same(tmp_path / "run", unbroken, name)
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        assert [r["step"] for r in csv.DictReader(file)] == [str(i + 1) for i in range(STEPS)]


@pytest.mark.xdist_group("running")
def test_ctrl_c_saves_the_step_in_hand(nuclei_folder: Path, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(nuclei_folder, run, "--set", "schedule.validate_every=1000")
    wanted = command(nuclei_folder, tmp_path / "wanted", "--set", "schedule.validate_every=1000")
    child = start(words)
    wait_for(run / "log.csv", child)
    while not (run / "log.csv").read_text().count("\n") >= 3:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    error = child.communicate()[1]
    if child.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert child.returncode == 130, error
    assert "goes on where it was" in error
    assert 2 <= checkpoint.read(run / "last").step < STEPS
    finish(words)
    finish(wanted)
    assert same(run, tmp_path / "wanted")


@pytest.mark.xdist_group("running")
def test_two_processes_train_as_one(nuclei_folder: Path, tmp_path: Path) -> None:
    """Each takes half of the crops of a batch; without dropout the weights are those of one."""
    more = ("--set", "method.dropout=0", "--set", "method.learning_rate=1e-3")
    one, two = tmp_path / "one", tmp_path / "two"
    finish(command(nuclei_folder, one, *more))
    said = finish(command(nuclei_folder, two, *more, "--processes", "2"))
    assert said.count("best checkpoint") == 1
    assert checkpoint.read(two / "best").record["processes"] == 2
    a, b = weights(one), weights(two)
    names = [k for k in a if not k.startswith("optimizer:")]
    for name in names:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-4)
    moved = load_moved(nuclei_folder, a)
    assert moved > 20 * max(float((a[k] - b[k]).abs().max()) for k in names)


def load_moved(folder: Path, trained: dict[str, torch.Tensor]) -> float:
    """How far training moved the weights at most, so that agreement means something."""
    torch.manual_seed(0)
    del folder
    config = Config(base_width=4, depth=2, discriminator_width=4, dropout=0)
    fresh = imems.build(config, 2).modules["generator"].state_dict()
    return max(float((trained[f"generator.{k}"] - v).abs().max()) for k, v in fresh.items())


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(found: DataSet) -> None:
    parts = divide(found, Schedule(batch=3))
    with pytest.raises(DataError, match="batch=3 is not a multiple of 2 processes"):
        Batches(parts, Schedule(batch=3), Augmentation(), (), align_px=4, processes=2)


def test_processes_share_the_crops_of_one_batch(found: DataSet) -> None:
    schedule = Schedule(batch=4, crop_px=32, steps=2)
    parts = divide(found, schedule)

    def drawn(rank: int, processes: int) -> list[np.ndarray]:
        draw = Batches(parts, schedule, Augmentation(flips=True), (), align_px=4, rank=rank,
                       processes=processes)  # fmt: skip
        return [batch.images.numpy() for batch in draw(0, 2)]

    for whole, even, odd in zip(drawn(0, 1), drawn(0, 2), drawn(1, 2), strict=True):
        np.testing.assert_array_equal(whole[0::2], even)
        np.testing.assert_array_equal(whole[1::2], odd)


def test_bfloat16_trains_and_resumes(found: DataSet, tmp_path: Path) -> None:
    how = Compute("cpu", "bf16")
    loop.train(recipe(), imems, found, tmp_path / "whole", how=how)

    class Stop(Exception):
        pass

    def stop(progress: loop.Progress) -> None:
        if progress.step == 3:
            raise Stop

    with pytest.raises(Stop):
        loop.train(recipe(), imems, found, tmp_path / "broken", how=how, report=stop)
    loop.train(recipe(), imems, found, tmp_path / "broken", how=how)
    assert same(tmp_path / "whole", tmp_path / "broken")
    assert checkpoint.read(tmp_path / "whole" / "best").record["precision"] == "bf16"
    loop.train(recipe(), imems, found, tmp_path / "fp32", how=Compute("cpu"))
    assert not same(tmp_path / "whole", tmp_path / "fp32")
    assert all(t.dtype != torch.bfloat16 for t in weights(tmp_path / "whole").values())


def test_whole_images_and_epochs(found: DataSet, tmp_path: Path) -> None:
    """80 px images are a multiple of 16: a step sees each of them as it is."""
    schedule = Schedule(epochs=2, batch=2, crop_px=0, validate_every=100, validation=0.25)
    parts = divide(found, schedule)
    assert schedule.total_steps(len(parts.split.train)) == 6
    draw = Batches(parts, schedule, Augmentation(), (), align_px=16)
    first = next(iter(draw(0, 1))).images[0].movedim(0, -1).numpy()
    assert any(np.array_equal(first, s.image) for s in found.train)
    whole = replace(recipe(), schedule=schedule)
    best = loop.train(whole, imems, found, tmp_path)
    assert best.step == 6


def test_the_checkpoint_can_be_chosen_by_dice_or_be_the_last(
    found: DataSet, tmp_path: Path
) -> None:
    rows: list[loop.Progress] = []
    dice = recipe(steps=10, select="dice")
    best = loop.train(dice, imems, found, tmp_path / "dice", report=rows.append)
    scores = {r.step: r.validation_dice for r in rows if r.validation_dice is not None}
    assert best.step == max(scores, key=lambda step: (scores[step], -step))
    last = loop.train(recipe(steps=5, select="last"), imems, found, tmp_path / "last")
    assert last.step == 5


def test_every_validation_leaves_a_sheet_of_pictures(found: DataSet, tmp_path: Path) -> None:
    loop.train(recipe(), imems, found, tmp_path)
    sheets = sorted((tmp_path / "samples").glob("*.png"))
    assert [s.name for s in sheets] == ["step-000002.png", "step-000004.png"]
    page = Image.open(sheets[0])
    columns = 4  # image, true, predicted, grey
    assert page.width == columns * 80 + 3 * 4
    pixels = np.asarray(page)
    rows = divide(found, recipe().schedule).split.validation
    np.testing.assert_array_equal(pixels[14:94, :80], found.train[rows[0]].image)


@pytest.mark.parametrize("name", ["none", "cosine", "poly"])
def test_learning_rates_fall_as_named(name: str) -> None:
    schedule = Schedule(decay=name, warmup=5)
    rates = [schedule.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2, rel=0.02)
    assert all(a >= b for a, b in pairwise(rates[5:]))
    middle = {"none": 1.0, "cosine": 0.5, "poly": 0.5**0.9}[name]
    assert rates[50] == pytest.approx(middle)


def method_that(step: Any, pools: tuple[str, ...] = ()) -> ModuleType:
    """iMEMS with another step."""
    names = ("build", "validate", "paint", "align_px", "deployed", "score_kind", "Config",
             "before_step", "finish")  # fmt: skip
    kept = {name: getattr(imems, name) for name in names}
    return cast(ModuleType, SimpleNamespace(**kept, step=step, pools=lambda _: pools))


def test_out_of_memory_names_batch_and_crop(found: DataSet, tmp_path: Path) -> None:
    def step(state: State, batch: Any) -> dict[str, torch.Tensor]:
        return {"l1": torch.empty(10**15)}

    with pytest.raises(TrainError, match=r"step 1: batch=2, crop_px=32; set schedule\.batch"):
        loop.train(recipe(), method_that(step), found, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(found: DataSet, tmp_path: Path) -> None:
    def step(state: State, batch: Any) -> dict[str, torch.Tensor]:
        return {"l1": torch.tensor(float("nan") if batch.step == 2 else 1.0)}

    with pytest.raises(TrainError, match="step 3: a loss is no number"):
        loop.train(recipe(), method_that(step), found, tmp_path)


def test_a_pool_that_a_method_needs_is_drawn_or_missed(found: DataSet, tmp_path: Path) -> None:
    seen: list[Any] = []

    def step(state: State, batch: Any) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return {"l1": torch.zeros(())}

    needy = method_that(step, ("target",))
    with pytest.raises(DataError, match="--pool target=SET"):
        loop.train(recipe(), needy, found, tmp_path)
    with_pool = replace(found, pools={"target": found.train[:3]})
    loop.train(recipe(), needy, with_pool, tmp_path)
    assert [b.step for b in seen] == [0, 1, 2, 3]
    assert seen[0].pools["target"].shape == (2, 3, 32, 32)
    assert not torch.equal(seen[0].pools["target"], seen[1].pools["target"])


def test_the_deterministic_mode_trains_every_algorithm(found: DataSet, tmp_path: Path) -> None:
    """On a CPU this shows only that no operation is refused that is refused everywhere."""
    try:
        for i, second in enumerate(("none", "image+features")):
            config = replace(
                recipe().config, target="labels", adversarial=False, second_task=second
            )
            mine = replace(recipe(), config=config)
            how = Compute("cpu", deterministic=True)
            loop.train(mine, imems, found, tmp_path / str(i), how=how)
    finally:
        torch.use_deterministic_algorithms(False)


def test_devices_that_are_not_here_are_refused() -> None:
    with pytest.raises(ComputeError, match="'fp8'"):
        Compute(precision="fp8")
    with pytest.raises(ComputeError, match="use auto, cpu"):
        compute.open_device(Compute(device="abacus"))
    if not torch.cuda.is_available():
        with pytest.raises(ComputeError, match="sees no GPU here"):
            compute.open_device(Compute(device="cuda"))


@pytest.mark.parametrize("channels", [3, 1])
def test_warps_move_labels_with_images_and_repeat_by_seed(channels: int) -> None:
    """The image is painted from the labels, so what moves one alone shows."""
    y, x = np.mgrid[:96, :96]
    disc = ((y - 40) ** 2 + (x - 55) ** 2 < 24**2).astype(np.int64)
    labels = torch.from_numpy(disc)[None].repeat(4, 1, 1)
    images = (labels * 200).to(torch.uint8)[:, None].repeat(1, channels, 1, 1)
    geometry = Augmentation(rotate=40, elastic=6)

    def warped(seed: int, how: Augmentation) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        return warp(images, labels, how)

    moved, maps = warped(0, geometry)
    assert moved.dtype == torch.uint8
    assert maps.dtype == torch.int64
    assert set(maps.unique().tolist()) == {0, 1}
    assert ((moved[:, 0] > 100).long() == maps).float().mean() > 0.98
    assert (maps != labels).float().mean() > 0.005
    again = warped(0, geometry)
    assert torch.equal(moved, again[0])
    assert not torch.equal(moved, warped(1, geometry)[0])
    recolored, still = warped(0, Augmentation(color_jitter=0.4, motion_blur=7))
    assert torch.equal(still, labels)
    assert not torch.equal(recolored, images)
    assert warp(images, labels, Augmentation(flips=True))[0] is images

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

from histostream.training import checkpoint, loop
from histostream.training import device as compute
from histostream.training.augment import Augmentation, warp
from histostream.training.batches import Batches, divide
from histostream.training.checkpoint import CheckpointError
from histostream.training.data import DataError, DataSet
from histostream.training.device import Compute, ComputeError
from histostream.training.loop import TrainError
from histostream.training.methods.imems import method as imems
from histostream.training.methods.imems.method import Config
from histostream.training.recipe import Recipe
from histostream.training.schedule import Decay, Schedule
from histostream.training.state import State

STEPS = 12
TINY = (
    "schedule.batch=2",
    "schedule.crop_px=32",
    "schedule.validate_every=4",
    "method.depth=2",
    "method.base_width=4",
    "method.discriminator_width=4",
    f"schedule.steps={STEPS}",
)


def recipe(**schedule: Any) -> Recipe:
    common: dict[str, Any] = {"steps": 4, "batch": 2, "crop_px": 32, "validate_every": 2}
    config = Config(base_width=4, depth=2, discriminator_width=4)
    return Recipe("imems", config, 0.5, Schedule(**{**common, **schedule}))


def command(folder: Path, run: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "histostream.training.cli", "--data", str(folder)]
    settings = [word for s in TINY for word in ("--set", s)]
    return [*words, "--out", str(run), "--mpp", "0.5", "--device", "cpu", *settings, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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


@pytest.mark.full
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


@pytest.mark.full
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
        draw = Batches(parts, schedule, Augmentation(flips=True), (), align_px=4, rank=rank, processes=processes)
        return [batch.images.numpy() for batch in draw(0, 2)]

    for whole, even, odd in zip(drawn(0, 1), drawn(0, 2), drawn(1, 2), strict=True):
        np.testing.assert_array_equal(whole[0::2], even)
        np.testing.assert_array_equal(whole[1::2], odd)


def test_bfloat16_trains_and_resumes(found: DataSet, tmp_path: Path) -> None:
    settings = Compute("cpu", "bf16")
    loop.train(recipe(), imems, found, tmp_path / "whole", compute=settings)

    class Stop(Exception):
        pass

    def stop(progress: loop.Progress) -> None:
        if progress.step == 3:
            raise Stop

    with pytest.raises(Stop):
        loop.train(recipe(), imems, found, tmp_path / "broken", compute=settings, report=stop)
    loop.train(recipe(), imems, found, tmp_path / "broken", compute=settings)
    assert same(tmp_path / "whole", tmp_path / "broken")
    assert checkpoint.read(tmp_path / "whole" / "best").record["precision"] == "bf16"
    loop.train(recipe(), imems, found, tmp_path / "fp32", compute=Compute("cpu"))
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


def batch_contents(draw: Batches, steps: int, pool: str = "") -> list[bytes]:
    """Pixels of each image of each batch, in order."""
    batches = list(draw(0, steps))
    images = [image for b in batches for image in (b.pools[pool] if pool else b.images)]
    return [image.numpy().tobytes() for image in images]


def test_an_epoch_draws_every_image_once(found: DataSet) -> None:
    """Six images in batches of four, three epochs: whole passes, each in an order of its own."""
    schedule = Schedule(epochs=3, batch=4, crop_px=0, validation=0.25)
    parts = divide(replace(found, pools={"target": found.train[:5]}), schedule)
    steps = schedule.total_steps(len(parts.split.train))
    assert steps == 5  # 18 images and two more that fill the last batch
    draw = Batches(parts, schedule, Augmentation(), ("target",), align_px=16)
    order = batch_contents(draw, steps)
    every = {parts.samples[i].image.transpose(2, 0, 1).tobytes() for i in parts.split.train}
    passes = [order[i : i + 6] for i in (0, 6, 12)]
    assert all(set(one) == every for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert order == batch_contents(draw, steps)
    other = replace(schedule, seed=1)
    drawn = Batches(parts, other, Augmentation(), ("target",), align_px=16)
    assert order != batch_contents(drawn, steps)
    pooled = batch_contents(draw, steps, "target")
    assert all(len(set(pooled[i : i + 5])) == 5 for i in (0, 5, 10, 15))


def test_processes_share_the_batches_of_one(found: DataSet) -> None:
    schedule = Schedule(epochs=2, batch=4, crop_px=0, validation=0.25)
    parts = divide(found, schedule)
    whole = batch_contents(Batches(parts, schedule, Augmentation(), (), align_px=16), 3)
    shares = [
        batch_contents(Batches(parts, schedule, Augmentation(), (), align_px=16, rank=rank, processes=2), 3)
        for rank in (0, 1)
    ]
    assert shares == [whole[0::2], whole[1::2]]


def test_a_schedule_in_epochs_validates_after_each(found: DataSet, tmp_path: Path) -> None:
    """Six images, four a step: the epochs end in steps 2, 3, 5 (6, 12 and 18 images)."""

    def validated(run: str, every: int = 0) -> list[int]:
        schedule = Schedule(epochs=3, batch=4, crop_px=32, validation=0.25, validate_every=every)
        rows: list[loop.Progress] = []
        whole = replace(recipe(), schedule=schedule)
        loop.train(whole, imems, found, tmp_path / run, report=rows.append)
        return [row.step for row in rows if row.validation_loss is not None]

    assert validated("each") == [2, 3, 5]
    assert validated("every", 4) == [4, 5]
    steps = Schedule(steps=2000)
    assert [s for s in range(1, 2001) if steps.validates(s, 6)] == [500, 1000, 1500, 2000]


def test_the_checkpoint_with_the_best_jaccard_of_the_things_is_kept(found: DataSet, tmp_path: Path) -> None:
    """A method whose answers are made up: the ground's score must not choose."""
    answers = iter((0.2, 0.9, 0.5))

    def validate(state: State, images: torch.Tensor, labels: torch.Tensor) -> Any:
        del state
        things = labels.flatten().nonzero()[:, 0]
        predicted = torch.zeros_like(labels).flatten()
        predicted[things[: round(shares[-1] * len(things))]] = 1
        return 0.0, predicted.view_as(labels)

    shares: list[float] = []

    def settle(state: State, parts: Any) -> None:
        del state, parts
        shares.append(next(answers))

    steps = recipe(steps=6, select="jaccard")
    method = method_that(imems.step, validate=validate, settle=settle)
    assert loop.train(steps, method, found, tmp_path).step == 4


def test_what_is_judged_is_settled_and_kept_and_training_goes_on_with_its_own(found: DataSet, tmp_path: Path) -> None:
    """Buffers: the checkpoint that ships has the settled ones, the run its own."""
    judged: list[float] = []

    def build(config: Any, classes: int, channels: int) -> State:
        state = imems.build(config, classes, channels)
        state.modules["generator"].register_buffer("seen", torch.zeros(()))
        return state

    def step(state: State, batch: Any) -> dict[str, torch.Tensor]:
        state.modules["generator"].get_buffer("seen").add_(1)
        return imems.step(state, batch)

    def settle(state: State, parts: Any) -> None:
        del parts
        state.modules["generator"].get_buffer("seen").add_(100)

    def validate(state: State, images: torch.Tensor, labels: torch.Tensor) -> Any:
        judged.append(float(state.modules["generator"].get_buffer("seen")))
        return imems.validate(state, images, labels)

    method = method_that(step, build=build, settle=settle, validate=validate)
    loop.train(recipe(steps=4, select="last"), method, found, tmp_path)
    seen = {name: load_file(tmp_path / name / "checkpoint.safetensors")["generator.seen"] for name in ("best", "last")}
    assert seen == {"best": 104, "last": 4}
    assert set(judged) == {102, 104}


def test_a_run_starts_from_what_fits_of_another(found: DataSet, tmp_path: Path) -> None:
    loop.train(recipe(), imems, found, tmp_path / "first")
    still = replace(recipe().config, adversarial=False, learning_rate=1e-9)
    plain = replace(recipe(), config=still)
    best = loop.train(plain, imems, found, tmp_path / "second", start=tmp_path / "first")
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    names = [name for name in after if name.startswith("generator.")]
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in names)
    assert best.record["start"]["left"] == []
    assert best.record["start"]["loaded"] == len(names)
    # Back again there is no discriminator to start from, and a wider network takes nothing.
    other = loop.train(recipe(), imems, found, tmp_path / "third", start=tmp_path / "second")
    assert other.record["start"]["left"] == ["discriminator"]
    assert other.record["start"]["step"] == best.step
    wider = replace(recipe().config, base_width=6, discriminator_width=6)
    wide = replace(recipe(), config=wider)
    with pytest.raises(CheckpointError, match="none of its weights fits"):
        loop.train(wide, imems, found, tmp_path / "wide", start=tmp_path / "second" / "last")


def test_a_run_goes_on_with_the_start_it_had_only(found: DataSet, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        loop.train(recipe(seed=seed), imems, found, tmp_path / name)
    loop.train(recipe(), imems, found, tmp_path / "run", start=tmp_path / "one")
    loop.train(recipe(), imems, found, tmp_path / "run", start=tmp_path / "one")
    for start in (None, tmp_path / "two"):
        with pytest.raises(CheckpointError, match="started from other weights"):
            loop.train(recipe(), imems, found, tmp_path / "run", start=start)


@pytest.mark.full
def test_the_checkpoint_can_be_chosen_by_dice_or_be_the_last(found: DataSet, tmp_path: Path) -> None:
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
def test_learning_rates_fall_as_named(name: Decay) -> None:
    schedule = Schedule(decay=name, warmup=5)
    rates = [schedule.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2, rel=0.02)
    assert all(a >= b for a, b in pairwise(rates[5:]))
    middle = {"none": 1.0, "cosine": 0.5, "poly": 0.5**0.9}[name]
    assert rates[50] == pytest.approx(middle)


def method_that(step: Any, pools: tuple[str, ...] = (), **more: Any) -> ModuleType:
    """iMEMS with another step, and maybe other functions."""
    names = ("build", "validate", "paint", "align_px", "deployed", "score_kind", "Config")
    kept = {name: getattr(imems, name) for name in names}
    mine = {**kept, "step": step, "pools": lambda _: pools, **more}
    return cast(ModuleType, SimpleNamespace(**mine))


def test_out_of_memory_names_batch_and_crop(found: DataSet, tmp_path: Path) -> None:
    def step(state: State, batch: Any) -> dict[str, torch.Tensor]:
        return {"l1": torch.empty(10**15)}

    with pytest.raises(TrainError, match=r"step 1: batch=2, crop_px=32; set schedule\.batch"):
        loop.train(recipe(), method_that(step), found, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(found: DataSet, tmp_path: Path) -> None:
    def step(state: State, batch: Any) -> dict[str, torch.Tensor]:
        return {"l1": torch.tensor(float("nan") if batch.step == 2 else 1.0)}

    with pytest.raises(TrainError, match="step 3: a loss is not finite"):
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
            config = replace(recipe().config, target="labels", adversarial=False, second_task=second)
            mine = replace(recipe(), config=config)
            settings = Compute("cpu", deterministic=True)
            loop.train(mine, imems, found, tmp_path / str(i), compute=settings)
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

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from histostream.training import checkpoint, data, datasets, loop, methods
from histostream.training.augment import Augmentation, draw_crop
from histostream.training.checkpoint import CheckpointError
from histostream.training.cli import main
from histostream.training.datasets.folder import read_folder
from histostream.training.methods.imems import method as imems
from histostream.training.methods.imems.method import Config
from histostream.training.recipe import Recipe
from histostream.training.schedule import Schedule
from tests.commands import call
from tests.training.resuming import killed_and_resumed, logged

ALL_ON = Augmentation(
    flips=True, object_px=9.0, zoom=1.3, stain=0.2, restain=0.5, light=0.2, focus=1.0, noise=4.0, jpeg=0.3
)


def recipe(steps: int = 6, **more: object) -> Recipe:
    return Recipe(
        method="imems",
        config=Config(base_width=4, depth=2, discriminator_width=4, learning_rate=2e-3),
        mpp=0.5,
        schedule=Schedule(
            steps=steps,
            batch=2,
            crop_px=32,
            validate_every=3,
            validation=0.25,
            test=0.25,
            decay="cosine",
            **more,  # type: ignore[arg-type]
        ),
        augmentation=ALL_ON,
        classes=(("background", (255, 255, 255)), ("nucleus", (30, 100, 220))),
    )


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"target": "labels", "adversarial": False},
        {"target": "labels"},
        {"adversarial": False},
        {"target": "labels", "adversarial": False, "second_task": "image"},
        {"target": "labels", "adversarial": False, "second_task": "image+features"},
    ],
    ids=["imems", "c-single", "cgan-c-single", "r-single", "c-multi", "c-multi-int"],
)
def test_a_killed_run_goes_on_as_if_it_never_stopped(
    algorithm: dict[str, object], nuclei_folder: Path, tmp_path: Path
) -> None:
    found = datasets.open_dataset(str(nuclei_folder))
    mine = replace(recipe(), config=replace(recipe().config, **algorithm))
    whole, resumed = killed_and_resumed(mine, imems, found, tmp_path, step=5)
    assert resumed.record["scores"] == whole.record["scores"]
    steps = [row["step"] for row in logged(tmp_path / "broken")]
    assert steps == [str(i) for i in range(1, 7)]


def test_a_run_of_another_recipe_or_other_data_is_not_continued(nuclei_folder: Path, tmp_path: Path) -> None:
    found = datasets.open_dataset(str(nuclei_folder))
    loop.train(recipe(3), imems, found, tmp_path)
    with pytest.raises(CheckpointError, match="another recipe"):
        loop.train(recipe(3, seed=5), imems, found, tmp_path)
    with pytest.raises(CheckpointError, match="another data"):
        loop.train(recipe(3), imems, replace(found, train=found.train[::-1]), tmp_path)


def test_the_record_tells_what_was_trained_on_what(nuclei_folder: Path, tmp_path: Path) -> None:
    found = datasets.open_dataset(str(nuclei_folder))
    best = loop.train(recipe(3), imems, found, tmp_path)
    record = checkpoint.read(tmp_path / "best").record
    assert record == best.record
    assert record["images"] == {"train": 4, "validation": 2, "test": 2}
    assert len(record["test_images"]) == 2
    assert record["data_sha256"] == data.checksum(found.train)
    assert record["recipe"]["augmentation"]["jpeg"] == 0.3
    for part in ("validation", "test"):
        assert 0 <= record["scores"][part]["pixel_accuracy"] <= 1
    assert json.loads((tmp_path / "best" / "checkpoint.json").read_text())["method"] == "imems"


@pytest.mark.full
def test_training_lowers_the_loss(nuclei_folder: Path, tmp_path: Path) -> None:
    found = datasets.open_dataset(str(nuclei_folder))
    plain = replace(recipe(60), augmentation=Augmentation())
    losses: list[float] = []
    loop.train(plain, imems, found, tmp_path, report=lambda p: losses.append(p.losses["l1"]))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_a_crop_keeps_pixels_and_labels_together(nuclei_folder: Path) -> None:
    """Pixels are made from the labels, so that any step that moves one but not the other shows."""
    (sample, *_) = read_folder(nuclei_folder)
    assert isinstance(sample, data.StoredSample)
    painted = replace(sample, image=np.repeat(sample.labels[..., None] * np.uint8(200), 3, axis=-1))
    geometry = Augmentation(flips=True, object_px=9.0, zoom=1.4)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pixels, labels = draw_crop(painted, 48, geometry, 10.0, rng)
        assert pixels.shape == (48, 48, 3)
        assert ((pixels[..., 0] > 100) == (labels > 0)).mean() > 0.97
        whole = draw_crop(sample, 48, ALL_ON, 10.0, np.random.default_rng(seed))
        again = draw_crop(sample, 48, ALL_ON, 10.0, np.random.default_rng(seed))
        np.testing.assert_array_equal(whole[0], again[0])
        assert whole[0].dtype == np.uint8


def test_a_damaged_checkpoint_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    file = copy / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read(copy)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.read(tmp_path)


def test_weights_that_do_not_fit_are_refused(tiny_checkpoint: Path) -> None:
    state = imems.build(Config(base_width=8, depth=2, discriminator_width=4), 3)
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoint.load(tiny_checkpoint, state)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(methods.MethodError, match="did you mean 'imems'"):
        methods.load_method("imem")
    assert "imems" in methods.METHODS.names()


def train(*arguments: object) -> subprocess.CompletedProcess[str]:
    return call(main, *arguments)


def test_the_command_trains_and_scores(nuclei_folder: Path, tmp_path: Path) -> None:
    settings = [
        "schedule.steps=2",
        "schedule.batch=1",
        "schedule.crop_px=32",
        "method.depth=2",
        "method.base_width=4",
        "method.discriminator_width=4",
    ]
    arguments = ["--data", nuclei_folder, "--out", tmp_path / "run", "--config", "nuclei"]
    done = train(*arguments, *(word for s in settings for word in ("--set", s)))
    assert done.returncode == 0, done.stderr
    assert "F-score background" in done.stdout
    assert checkpoint.read(tmp_path / "run" / "best").mpp == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nuclei", "--set", "method.width=3"], "method.width"),
        (["--config", "nuclei", "--set", "schedule.steps=many"], "schedule.steps='many'"),
        (["--config", "nuclei", "--set", "steps"], "write key=value"),
        (["--config", "nuclei", "--set", "colour=3"], "unknown key 'colour'"),
        (["--config", "nowhere"], "nowhere"),
        (["--method", "imem", "--config", "nuclei"], "did you mean 'imems'"),
        ([], "--mpp"),
    ],
)
def test_a_wrong_option_is_one_clear_line(
    nuclei_folder: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = train("--data", nuclei_folder, "--out", tmp_path / "run", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_broken_training_set_is_one_clear_line(nuclei_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(nuclei_folder, tmp_path / "set")
    (folder / "images" / "3.png").write_bytes(b"no picture")
    done = train("--data", folder, "--out", tmp_path / "run", "--config", "nuclei")
    assert done.returncode == 1
    assert "3.png" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    (folder / "images" / "3.png").unlink()
    (folder / "labels_instance" / "5.png").unlink()
    with pytest.raises(data.DataError, match=r"5\.png: no label file"):
        read_folder(folder)
    with pytest.raises(data.DataError, match="no folder 'images'"):
        read_folder(tmp_path)

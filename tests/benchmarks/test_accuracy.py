"""``histo-bench accuracy`` and the table of the iMEMS paper, on small sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from histostream.benchmarks.accuracy import imems as table
from histostream.benchmarks.accuracy.cells import Cell, fill
from histostream.benchmarks.accuracy.score import ScoreError, choose, score
from histostream.benchmarks.cli import main
from histostream.benchmarks.tables import accuracy_imems
from histostream.training import checkpoint, datasets, loop
from histostream.training.data import DataSet, StoredSample
from histostream.training.device import Compute
from histostream.training.methods.imems import method as imems
from histostream.training.recipe import read_recipe
from histostream.training.schedule import Schedule

TOML = """
name = "blobs"
mpp = 0.5
[[classes]]
name = "ground"
color = [255, 255, 255]
[[classes]]
name = "blob"
color = [9, 9, 200]
[splits]
test = ["b4", "b5"]
"""


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of dark discs; the last two are the official test part."""
    folder = tmp_path_factory.mktemp("blobs")
    for name in ("images", "labels_instance"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96]
    for i in range(6):
        instances = np.zeros((96, 96), np.uint16)
        for k, (cy, cx) in enumerate([(24, 24), (70, 30), (50, 74)], start=1):
            r = rng.uniform(9, 14)
            instances[(y - cy) ** 2 + (x - cx) ** 2 < r**2] = k
        image = np.where(instances[..., None] > 0, (90, 60, 130), (225, 190, 215))
        noisy = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "images" / f"b{i}.png")
        Image.fromarray(instances).save(folder / "labels_instance" / f"b{i}.png")
    (folder / "dataset.toml").write_text(TOML)
    return folder


@pytest.fixture(scope="module")
def run(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net that has learnt the discs."""
    settings = (
        "method.base_width=6",
        "method.depth=2",
        "method.learning_rate=5e-3",
        "schedule.steps=60",
        "schedule.batch=4",
        "schedule.crop_px=64",
        "schedule.validate_every=30",
        "method.dropout=0",
    )
    recipe = read_recipe("imems", imems, ("unet-c-single",), settings, mpp=0.5)
    folder = tmp_path_factory.mktemp("runs") / "blobs"
    loop.train(recipe, imems, datasets.open_dataset(str(blobs)), folder)
    return folder


def accuracy(*words: object) -> Result:
    return CliRunner().invoke(main, ["accuracy", *map(str, words)], catch_exceptions=False)


@pytest.mark.full
def test_a_run_is_scored_on_what_it_held_back(blobs: Path, run: Path, tmp_path: Path) -> None:
    done = accuracy("--data", blobs, "--checkpoint", run, "--out", tmp_path, "--backend", "cpu")
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "accuracy.json").read_text())
    assert said["part"] == "test, as the run divided the set"
    assert list(said["each_image"]) == ["b4.png", "b5.png"]
    assert said["pooled"]["f"]["blob"] > 0.9
    assert said["objects"]["f1_pooled"] == 1.0
    assert np.sum(said["confusion"]) == 2 * 96 * 96
    record = checkpoint.read(run / "best").record["scores"]["test"]
    assert said["pooled"]["f"]["blob"] == pytest.approx(record["f_score"][1], abs=0.01)
    assert "F1 1.0000 pooled" in (tmp_path / "accuracy.md").read_text()
    matrix = np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB"))
    assert min(matrix.shape[:2]) > 200
    assert len(np.unique(matrix.reshape(-1, 3), axis=0)) > 50


def test_a_folder_of_label_maps_is_scored(blobs: Path, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    for i in range(6):
        truth = np.asarray(Image.open(blobs / "labels_instance" / f"b{i}.png"))
        Image.fromarray((truth > 0).astype(np.uint8)).save(maps / f"b{i}.png")
    done = accuracy("--data", blobs, "--labels", maps, "--part", "all", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert said["images"] == 6
    assert said["pooled"]["accuracy"] == 1.0
    assert said["objects"]["hausdorff_px_per_image_mean"] == 0
    not_analysed = np.full((96, 96), 255, np.uint8)
    Image.fromarray(not_analysed).save(maps / "b0.png")
    accuracy("--data", blobs, "--labels", maps, "--part", "all", "--out", tmp_path / "out")
    missed = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert missed["each_image"]["b0.png"]["f_blob"] == 0  # glass where there is tissue costs


def flat(side: int, label: int) -> Image.Image:
    return Image.fromarray(np.full((side, side), label, np.uint8))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda maps: (maps / "b5.png").unlink(), "no label map b5.png"),
        (lambda maps: flat(9, 0).save(maps / "b5.png"), "(9, 9)"),
        (lambda maps: flat(96, 7).save(maps / "b5.png"), "label 7"),
        (lambda maps: shutil.rmtree(maps), "no such folder"),
    ],
)
def test_label_maps_that_do_not_fit_are_one_clear_line(blobs: Path, tmp_path: Path, spoil: object, words: str) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    for i in range(6):
        Image.fromarray(np.zeros((96, 96), np.uint8)).save(maps / f"b{i}.png")
    spoil(maps)  # type: ignore[operator]
    done = accuracy("--data", blobs, "--labels", maps, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()[-1:]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_two_things_at_once_or_other_classes_are_refused(blobs: Path, tiny_bundle: Path, run: Path) -> None:
    both = accuracy("--data", blobs, "--model", tiny_bundle, "--checkpoint", run)
    assert both.exit_code == 1
    assert "give one of" in both.stderr
    classes = accuracy("--data", blobs, "--model", tiny_bundle)
    assert classes.exit_code == 1
    assert "ground, gland, nucleus, blobs ground, blob: they do not go together" in classes.stderr


def samples(count: int) -> tuple[StoredSample, ...]:
    image = np.zeros((20, 20, 3), np.uint8)
    labels = np.zeros((20, 20), np.uint8)
    return tuple(StoredSample(f"s{i}", f"s{i}", image, labels) for i in range(count))


def test_parts_are_those_of_the_set_or_of_the_run() -> None:
    every = samples(10)
    found = DataSet("set", (), None, every[:6], (), every[6:])
    assert choose(found, "auto") == every[6:]
    assert choose(found, "all") == every
    plain = DataSet("set", (), None, every)
    assert choose(plain, "auto") == every
    with pytest.raises(ScoreError, match="no test part"):
        choose(plain, "test")
    folds = [choose(plain, "auto", Schedule(folds=5, fold=i)) for i in range(5)]
    assert sorted(s.name for fold in folds for s in fold) == sorted(s.name for s in every)


def test_scores_pool_or_average_as_they_say() -> None:
    """Two images of one class-1 region each: one found whole, one missed."""
    image = np.zeros((40, 40, 3), np.uint8)
    big, small = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    big[:30, :30], small[:10, :10] = 1, 1
    both = [
        StoredSample(n, n, image, labels, labels.astype(np.int32)) for n, labels in (("big", big), ("small", small))
    ]

    def found(sample: object) -> np.ndarray:
        return np.where(sample.name == "big", sample.labels, 0).astype(np.uint8)  # type: ignore[attr-defined]

    said = score(both, found, ["ground", "blob"])
    assert said["pooled"]["f"]["blob"] == pytest.approx(2 * 900 / (900 + 1000), abs=1e-5)
    assert said["per_image_mean"]["f"]["blob"] == 0.5
    assert said["objects"]["f1_pooled"] == pytest.approx(2 / 3, abs=1e-5)
    assert said["objects"]["hausdorff_capped_images"] == 1


def test_the_tables_cells_differ_in_the_algorithm_alone() -> None:
    recipes = [table.cell("glas", "short", name, 1).recipe for name in table.TABLES["glas"].algorithms]
    assert len({repr(r.config) for r in recipes}) == len(table.TABLES["glas"].algorithms)
    assert len({repr((r.schedule, r.augmentation, r.mpp)) for r in recipes}) == 1
    assert recipes[0].schedule.seed == 1
    shipped = read_recipe("imems", imems, ("imems-paper",), mpp=0.62005)
    assert table.cell("glas", "paper", "iMEMS", 0).recipe == shipped
    paper = table.cell("glas", "paper", "iMEMS", 0).recipe
    assert (paper.config.base_width, paper.schedule.epochs, paper.schedule.batch) == (64, 300, 1)
    assert table.cell("nuclei", "short", "iMEMS", 3).recipe.schedule.fold == 3


@pytest.mark.full
def test_cells_fill_a_result_file_once(blobs: Path, run: Path, tmp_path: Path) -> None:
    said = checkpoint.read(run / "best").record["recipe"]["schedule"]
    settings = [f"schedule.{k}={json.dumps(v)}" for k, v in said.items()]
    settings += ["schedule.steps=4", "schedule.validate_every=2", "method.base_width=4"]
    recipe = read_recipe("imems", imems, ("unet-c-single",), (*settings, "method.depth=2"), mpp=0.5)
    opened: list[int] = []

    def data() -> DataSet:
        opened.append(1)
        return datasets.open_dataset(str(blobs))

    cells = [Cell(f"blobs-{i}", "UNet", i, recipe, data) for i in range(2)]
    path = tmp_path / "results" / "table.json"
    fill(path, cells[:1], tmp_path / "runs", Compute("cpu"))
    fill(path, cells, tmp_path / "runs", Compute("cpu"))
    assert len(opened) == 2  # the first cell was there
    found = json.loads(path.read_text())["cells"]
    assert list(found) == ["blobs-0", "blobs-1"]
    assert found["blobs-0"]["scores"] == found["blobs-1"]["scores"]  # same seed, same bits
    assert (found["blobs-0"]["judged"], found["blobs-0"]["variants"]) == ("best", {})
    assert found["blobs-0"]["images"] == {"train": 3, "validation": 1, "test": 2}
    rows = list(accuracy_imems({"cells": found}))
    assert rows[0][1:3] == ["F ground", "F blob"]
    assert rows[1][0] == "UNet"
    assert rows[1][-1] == "2"
    assert rows[1][1].endswith("± 0.00")

"""The cells of the generative tables: what they share, whose labels they see, that they run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from histostream.benchmarks.accuracy import generative
from histostream.benchmarks.accuracy.cells import Cell, fill
from histostream.benchmarks.accuracy.generative import TABLES, cell
from histostream.export.trained import find_checkpoint
from histostream.training import batches, checkpoint, synthetic
from histostream.training.compute import Compute
from histostream.training.data import DataSet, StoredPicture, StoredSample
from histostream.training.methods import translation


@pytest.mark.parametrize("table", TABLES)
def test_the_cells_of_a_table_differ_in_the_algorithm_alone(table: str) -> None:
    of = TABLES[table]
    for size in of.sizes:
        cells = {name: cell(table, size, name, 2) for name in of.algorithms}
        recipes = {name: one.recipe for name, one in cells.items()}
        assert len({one.name for one in cells.values()}) == len(cells)
        assert {r.schedule.seed for r in recipes.values()} == {2}
        assert {r.schedule.labelled for r in recipes.values()} == {of.labelled}
        assert len({repr((r.augmentation, r.mpp)) for r in recipes.values()}) == 1
        configs = {n: repr(r.config) for n, r in recipes.items() if "transductive" not in n}
        assert len(set(configs.values())) == len(configs)
        if size == "paper" and of.method == "pyramid_gan":
            levels = {n: r.config.levels for n, r in recipes.items()}
            # The finest level, the only one of some, passes 200 times over about 500 tiles.
            for name, recipe in recipes.items():
                finest = recipe.schedule.steps * recipe.config.shares[-1]
                batch = (recipe.config.batches or (recipe.schedule.batch,))[-1]
                assert finest * batch == pytest.approx(100_000, rel=1e-3), (name, levels)
        if size == "small" and of.method == "pyramid_gan":
            steps = {n: r.schedule.steps / r.config.levels for n, r in recipes.items()}
            assert set(steps.values()) == {of.sizes["small"].level_steps}


@pytest.mark.parametrize("algorithm", ["consistency", "consistency, transductive"])
def test_the_labels_that_are_left_out_are_of_whole_images(algorithm: str, data_dir: Path) -> None:
    if not (data_dir / "glands-glas").is_dir():
        pytest.skip(f"{data_dir / 'glands-glas'} is not there")
    one = cell("glas-20", "small", algorithm, 1, data_dir)
    found = one.data()
    parts = batches.divide(found, one.recipe.schedule)
    train = {parts.samples[i].name for i in parts.split.train}
    pool = {p.name for p in parts.pools["unlabelled"]}
    tests = {f"test/{s.name}" for s in found.test}
    held = {parts.samples[i].name for i in (*parts.split.validation, *parts.split.test)}
    assert not train & (pool | held)
    assert not pool & held
    assert (pool & tests) == (tests if algorithm.endswith("transductive") else set())
    count = len(train) + len(pool - tests)
    assert len(train) / count == pytest.approx(0.2, abs=0.03)


def digits() -> DataSet:
    rng = np.random.default_rng(0)

    def drawn(name: str, *, digit: bool) -> StoredSample:
        image = rng.integers(0, 20, (48, 48, 1), np.uint8)
        labels = np.zeros((48, 48), np.uint8)
        if digit:
            labels[10:30, 20:26] = 1
            image[labels > 0] = 230
        return StoredSample(name, name, image, labels)

    def pool(name: str, *, digit: bool) -> tuple[StoredPicture, ...]:
        some = [drawn(f"{name}{i}", digit=digit) for i in range(4)]
        return tuple(StoredPicture(s.name, s.group, s.image) for s in some)

    classes = (("background", (0, 0, 0)), ("digit", (255, 200, 60)))
    return DataSet(
        "drawn", classes, None,
        tuple(drawn(f"t{i}", digit=True) for i in range(4)),
        (drawn("v", digit=True),),
        (drawn("e", digit=True), drawn("f", digit=True)),
        {"presence": pool("p", digit=True), "absence": pool("a", digit=False)},
    )  # fmt: skip


def short(one: Cell, found: DataSet, **config: object) -> Cell:
    steps = 2 * getattr(one.recipe.config, "levels", 1)
    schedule = dataclasses.replace(
        one.recipe.schedule, steps=steps, batch=2, validate_every=steps, validation=0.2
    )
    recipe = dataclasses.replace(
        one.recipe, schedule=schedule, config=dataclasses.replace(one.recipe.config, **config)
    )
    return dataclasses.replace(one, recipe=recipe, data=lambda: found)


def test_a_translation_is_scored_by_its_probabilities_too(tmp_path: Path) -> None:
    one = short(cell("mnist-simple", "small", "AE baseline", 0), digits(), width=4,
                unique_channels=16)  # fmt: skip
    fill(tmp_path / "out.json", [one], tmp_path / "runs", Compute("cpu"))
    scores = json.loads((tmp_path / "out.json").read_text())["cells"][one.name]["scores"]
    assert 0 < scores["soft_dice"] < 1
    assert scores["soft_dice"] != scores["pooled"]["f"]["digit"]
    assert "residual" not in scores


def test_a_residual_is_measured_on_the_digit_and_elsewhere(tmp_path: Path) -> None:
    found = digits()
    one = short(cell("mnist-simple", "small", "proposed", 0), found, width=4, unique_channels=16,
                discriminator_width=4)  # fmt: skip
    fill(tmp_path / "out.json", [one], tmp_path / "runs", Compute("cpu"))
    scores = json.loads((tmp_path / "out.json").read_text())["cells"][one.name]["scores"]
    folder = find_checkpoint(tmp_path / "runs" / one.name)
    state = translation.build(one.recipe.config, 2, 1)
    checkpoint.load(folder, state)
    images = torch.from_numpy(np.stack([s.image for s in found.test])).permute(0, 3, 1, 2)
    truth = np.stack([s.labels for s in found.test])
    with torch.no_grad():
        for module in state.modules.values():
            module.eval()
        code, maps = state.modules["encoder"](translation.scaled(images, state.config))
        residual = state.modules["residual"](code, maps).abs()[:, 0].numpy()
    wanted = residual[truth > 0].mean() / residual[truth == 0].mean()
    assert scores["residual"] == pytest.approx(wanted, rel=0.1)  # the picture is rounded


def test_a_drawn_set_is_another_with_another_seed() -> None:
    first, second = (cell("cue", "small", "m-FCDenseNet", seed).data().train[0] for seed in (1, 2))
    assert first.image.shape == (128, 128, 3)
    assert (first.image != second.image).any()


def test_what_is_painted_is_compared_with_the_true_images(tmp_path: Path) -> None:
    found = synthetic.colored_regions(6, 4, side_px=192, seed=1)
    one = short(cell("glas-painted", "small", "pyramid GAN", 0), found, levels=2, g_width=4,
                d_width=2, d_scales=1, first_width=4, growth=2, layers=1)  # fmt: skip
    fill(tmp_path / "out.json", [one], tmp_path / "runs", Compute("cpu"))
    scores = json.loads((tmp_path / "out.json").read_text())["cells"][one.name]["scores"]
    assert scores["fid"]["painted"] > 0
    assert scores["fid"]["images"] == 4
    assert scores["fid"]["extractor"].startswith("histostream-nuclei-encoder-")
    assert 0 <= scores["ms_ssim"]["to_true"] <= scores["ms_ssim"]["among"] + 0.5 <= 1.5


def test_a_table_refuses_what_it_does_not_have(tmp_path: Path) -> None:
    given = ["--data", str(tmp_path), "--runs", str(tmp_path), "--out", str(tmp_path)]
    done = CliRunner().invoke(generative.main, [*given, "--table", "glas", "--only", "U-Net"])
    assert "'U-Net' is none of m-FCDenseNet" in done.output
    done = CliRunner().invoke(
        generative.main, [*given, "--table", "mnist-large", "--size", "small"]
    )
    assert "mnist-large has no size 'small': use paper, reduced" in done.output

"""The cells of the generative tables: what they share, whose labels they see, that they run."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from histostream.benchmarks.accuracy import cells, generative
from histostream.benchmarks.accuracy.cells import Cell, add_references, fill
from histostream.benchmarks.accuracy.generative import TABLES, cell
from histostream.export.trained import find_checkpoint
from histostream.training import batches, checkpoint
from histostream.training.data import DataSet, StoredPicture, StoredSample
from histostream.training.device import Compute
from histostream.training.methods.translation import method as translation
from tests.commands import call
from tests.training.regions import colored_regions


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
        if of.sizes[size].level_steps:
            steps = {n: r.schedule.steps / r.config.levels for n, r in recipes.items()}
            assert set(steps.values()) == {of.sizes[size].level_steps}


def small_cells() -> list[Cell]:
    return [
        cell(table, size, algorithm, 0)
        for table, of in TABLES.items()
        for size in set(of.sizes) - {"paper", "reduced"}
        for algorithm in of.algorithms
    ]


@pytest.mark.parametrize("table", TABLES)
def test_the_papers_size_is_the_shipped_recipes_as_they_are(table: str) -> None:
    """Nothing but the seed, the share of labels and the resolution is the benchmark's own."""
    of = TABLES[table]
    if "paper" not in of.sizes:
        assert table == "cue"  # drawn, it is in no paper
        return
    shipped = resources.files(f"histostream.training.methods.{of.method}")
    paper = "pyramid-paper" if of.method == "pyramid_gan" else "translation-paper"
    larger = ["translation-128"] if table == "mnist-large" else []
    for algorithm, recipes in of.algorithms.items():
        wanted: dict[str, dict[str, object]] = {"method": {}, "schedule": {}, "augmentation": {}}
        for name in (paper, *larger, *recipes):
            for key, values in tomllib.loads(shipped.joinpath(f"{name}.toml").read_text()).items():
                if key in wanted:
                    wanted[key] |= values
        wanted["schedule"] |= {"seed": 3, "labelled": of.labelled}
        recipe = cell(table, "paper", algorithm, 3).recipe
        parts = {"method": recipe.config, "schedule": recipe.schedule, "augmentation": recipe.augmentation}
        for key, part in parts.items():
            assert part == type(part)(**wanted[key]), (algorithm, key)


def test_the_coarsest_level_of_a_small_pyramid_is_32_px_and_nothing_is_held_back_for_nothing() -> None:
    for one in small_cells():
        config, schedule = one.recipe.config, one.recipe.schedule
        if one.recipe.method == "pyramid_gan":
            assert schedule.crop_px >> (config.levels - 1) >= 32, one.name
        assert (schedule.validation == 0) == (schedule.select == "last"), one.name


def test_rows_of_the_small_digits_weigh_segmentation_and_reconstruction_alike() -> None:
    assert [name for name in TABLES if name.startswith("mnist") and "small" in TABLES[name].sizes] == ["mnist-hard"]
    configs = [c.recipe.config for c in small_cells() if c.recipe.method == "translation"]
    assert len(configs) == len(TABLES["mnist-hard"].algorithms)
    assert {c.lambda_seg / c.lambda_rec for c in configs} == {1}
    assert {c.discriminator_learning_rate / c.learning_rate for c in configs} == {10}  # as printed
    assert {c.hinge for c in configs} == {"mean_first"}


def test_a_floor_and_a_ceiling_are_scored_without_a_network() -> None:
    """Two touching objects of 200 px in an image of 800 px, worked out by hand.

    All as one object: it has the first as its partner, whose other is missed: F1 2/3, Dice
    400 / 1000. The true mask, one object of 400 px: F1 2/3, Dice 400 / 600.
    """
    instances = np.zeros((20, 40), np.int32)
    instances[:, :10], instances[:, 10:20] = 1, 2
    image = np.zeros((20, 40, 3), np.uint8)
    one = StoredSample("one", "one", image, (instances > 0).astype(np.uint8), instances)
    classes = (("stroma", (0, 0, 0)), ("gland", (255, 0, 0)))
    found = DataSet("drawn", classes, 1.0, (one,), (), (dataclasses.replace(one, name="two"),))
    scores = generative.references(found)
    assert list(scores) == ["everything is gland", "perfect binary mask"]
    floor, ceiling = (s["objects"] for s in scores.values())
    assert (floor["f1_pooled"], floor["dice_per_image_mean"]) == (0.66667, 0.4)
    assert (ceiling["f1_pooled"], ceiling["dice_per_image_mean"]) == (0.66667, 0.66667)
    assert [s["pooled"]["accuracy"] for s in scores.values()] == [0.5, 1]
    assert generative.references(digits()) == {}


def test_what_stands_beside_the_cells_is_scored_once(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    add_references(path, lambda: {"floor": 1})
    add_references(path, lambda: {"floor": 2})
    assert json.loads(path.read_text()) == {"references": {"floor": 1}}


@pytest.mark.full
@pytest.mark.parametrize("algorithm", ["consistency", "consistency, transductive"])
def test_the_labels_that_are_left_out_are_of_whole_images(algorithm: str, data_dir: Path) -> None:
    if not (data_dir / "glands-glas").is_dir():
        pytest.skip(f"{data_dir / 'glands-glas'} is not there")
    one = cell("glas-20", "quarter", algorithm, 1, data_dir)
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
        "drawn",
        classes,
        None,
        tuple(drawn(f"t{i}", digit=True) for i in range(4)),
        (drawn("v", digit=True),),
        (drawn("e", digit=True), drawn("f", digit=True)),
        {"presence": pool("p", digit=True), "absence": pool("a", digit=False)},
    )


def short(one: Cell, found: DataSet, **config: object) -> Cell:
    steps = 2 * getattr(one.recipe.config, "levels", 1)
    schedule = dataclasses.replace(one.recipe.schedule, steps=steps, batch=2, validate_every=steps, validation=0.2)
    recipe = dataclasses.replace(one.recipe, schedule=schedule, config=dataclasses.replace(one.recipe.config, **config))
    return dataclasses.replace(one, recipe=recipe, data=lambda: found)


@pytest.mark.full
def test_a_translation_is_scored_by_its_probabilities_too(tmp_path: Path) -> None:
    one = short(cell("mnist-hard", "small", "AE baseline", 0), digits(), width=4, unique_channels=16)
    fill(tmp_path / "out.json", [one], tmp_path / "runs", Compute("cpu"))
    scores = json.loads((tmp_path / "out.json").read_text())["cells"][one.name]["scores"]
    assert 0 < scores["soft_dice"] < 1
    assert scores["soft_dice"] != scores["pooled"]["f"]["digit"]
    assert "residual" not in scores


@pytest.mark.full
def test_a_residual_is_measured_on_the_digit_and_elsewhere(tmp_path: Path) -> None:
    found = digits()
    one = short(cell("mnist-hard", "small", "proposed", 0), found, width=4, unique_channels=16, discriminator_width=4)
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


@pytest.mark.full
def test_a_drawn_set_is_another_with_another_seed() -> None:
    first, second = (cell("cue", "small", "m-FCDenseNet", seed).data().train[0] for seed in (1, 2))
    assert first.image.shape == (128, 128, 3)
    assert (first.image != second.image).any()


@pytest.mark.full
def test_what_is_painted_is_compared_with_the_true_images(tmp_path: Path) -> None:
    found = colored_regions(6, 4, side_px=192, seed=1)
    one = short(
        cell("glas-painted", "quarter", "pyramid GAN", 0),
        found,
        levels=2,
        g_width=4,
        d_width=2,
        d_scales=1,
        first_width=4,
        growth=2,
        layers=1,
    )
    fill(tmp_path / "out.json", [one], tmp_path / "runs", Compute("cpu"))
    scores = json.loads((tmp_path / "out.json").read_text())["cells"][one.name]["scores"]
    assert scores["fid"]["painted"] > 0
    assert scores["fid"]["images"] == 4
    assert scores["fid"]["extractor"].startswith("histostream-nuclei-encoder-")
    assert 0 <= scores["ms_ssim"]["to_true"] <= scores["ms_ssim"]["among"] + 0.5 <= 1.5


def test_a_table_refuses_what_it_does_not_have(tmp_path: Path) -> None:
    given = ["--data", str(tmp_path), "--runs", str(tmp_path), "--out", str(tmp_path)]
    done = CliRunner().invoke(generative.main, [*given, "--table", "glas", "--size", "quarter", "--only", "U-Net"])
    assert "'U-Net' is none of m-FCDenseNet" in done.output
    done = CliRunner().invoke(generative.main, [*given, "--table", "mnist-large", "--size", "small"])
    assert "mnist-large has no size 'small': use paper, reduced" in done.output


def test_floors_are_in_the_file_of_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the training, which other tests do; the command itself makes the file's name."""
    monkeypatch.setattr(generative, "references_of", lambda source: {"floor": {"source": source}})
    monkeypatch.setattr(cells, "_run", lambda *_: {"scores": {"pooled": {"mean_f": 0, "accuracy": 0}}})
    arguments = ["--table", "glas", "--size", "quarter", "--only", "full", "--number", "0"]
    folders = ["--data", tmp_path, "--runs", tmp_path / "runs", "--out", tmp_path / "out"]
    done = call(generative.main, *arguments, *folders)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "out").glob("*.json")] == ["accuracy-glas-quarter.json"]
    written = json.loads((tmp_path / "out" / "accuracy-glas-quarter.json").read_text())
    assert written["references"]["floor"]["source"] == f"glas:{tmp_path}/glands-glas"
    assert list(written["cells"]) == ["glas-quarter-full-0"]
    assert call(generative.main, *arguments[:2], *folders).returncode == 2  # no size was named

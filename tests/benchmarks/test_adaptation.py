"""The cells of the adaptation tables: what they share, whose labels they see, that they run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from histostream.benchmarks.accuracy import adaptation
from histostream.benchmarks.accuracy.adaptation import ORACLE, PAIRS, cell
from histostream.benchmarks.accuracy.cells import fill
from histostream.training.compute import Compute
from histostream.training.data import DataSet


def opened(pair: str, algorithm: str, number: int, root: Path) -> DataSet:
    return cell(pair, "small", algorithm, number, root).data()


def names(found: DataSet, part: str) -> set[str]:
    return {s.name for s in (found.pools["target"] if part == "pool" else getattr(found, part))}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_cells_of_a_pair_differ_in_the_algorithm_alone(pair: str) -> None:
    for size in PAIRS[pair].sizes:
        recipes = {name: cell(pair, size, name, 2).recipe for name in PAIRS[pair].algorithms}
        assert len({repr((r.schedule, r.augmentation, r.mpp)) for r in recipes.values()}) == 1
        configs = {name: repr(r.config) for name, r in recipes.items() if name != ORACLE}
        assert len(set(configs.values())) == len(configs)
        assert {r.schedule.seed for r in recipes.values()} == {2}
        assert {r.schedule.select for r in recipes.values()} == {"last"}  # no label of the target
        files = {cell(pair, size, name, 2).name for name in recipes}
        assert len(files) == len(recipes)
        for recipe in recipes.values():
            fixed = getattr(recipe.config, "feat_disc", "fcn") != "fcn"
            assert not fixed or recipe.config.feat_crop == recipe.schedule.crop_px


@pytest.mark.parametrize(
    ("pair", "folder"),
    [
        ("tnbc-kirc", "nuclei-monuseg"),
        ("tnbc-other", "nuclei-monuseg"),
        ("other-tnbc", "nuclei-tnbc"),
        ("epfl-vnc", "em-vnc-sstem"),
        ("nuclei", ""),
        ("em", ""),
    ],
)
def test_images_that_are_scored_are_never_trained_on(
    pair: str, folder: str, data_dir: Path
) -> None:
    if not (data_dir / folder).is_dir():
        pytest.skip(f"{data_dir / folder} is not there")
    method = next(name for name in PAIRS[pair].algorithms if name != ORACLE)
    folds = [opened(pair, method, number, data_dir) for number in range(3)]
    for found in folds:
        assert min(len(found.train), len(found.pools["target"]), len(found.test)) > 0
        assert not names(found, "pool") & names(found, "test")
        assert not names(found, "train") & (names(found, "pool") | names(found, "test"))
    tests = [names(found, "test") for found in folds]
    if pair in ("tnbc-kirc", "tnbc-other", "other-tnbc"):
        assert not tests[0] & tests[1] | tests[1] & tests[2] | tests[0] & tests[2]
        assert set.union(*tests) == names(folds[0], "pool") | tests[0]
    oracle = opened(pair, ORACLE, 0, data_dir)
    assert names(oracle, "train") == names(folds[0], "pool")
    assert names(oracle, "test") == tests[0]


def test_a_method_and_its_oracle_fill_a_result_file(tmp_path: Path) -> None:
    cells = []
    for name in ("self-ensembling", ORACLE):
        full = cell("nuclei", "small", name, 0)
        schedule = replace(full.recipe.schedule, steps=2, validate_every=2)
        config = replace(full.recipe.config, base_width=4)
        cells.append(replace(full, recipe=replace(full.recipe, schedule=schedule, config=config)))
    fill(tmp_path / "table.json", cells, tmp_path / "runs", Compute("cpu"))
    found = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert list(found) == ["nuclei-small-self-ensembling-0", "nuclei-small-oracle-0"]
    for said in found.values():
        assert said["best_step"] == said["steps"] == 2
        assert 0 <= said["scores"]["pooled"]["mean_f"] <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pair", "em", "--size", "paper"), "em has no size 'paper': use small"),
        (("--pair", "em", "--only", "CBST"), "'CBST' is none of no adaptation, Roels"),
    ],
)
def test_what_a_pair_does_not_have_is_named(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    where = ("--data", tmp_path, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    done = CliRunner().invoke(adaptation.main, [*arguments, *map(str, where)])
    assert done.exit_code == 2
    assert said in done.output
    assert not (tmp_path / "out").exists()

"""The cells of the adaptation tables: what they share, whose labels they see, that they run."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from histostream.benchmarks.accuracy import adaptation
from histostream.benchmarks.accuracy.adaptation import ORACLE, PAIRS, cell
from histostream.benchmarks.accuracy.cells import Cell, fill, train
from histostream.benchmarks.tables import accuracy_variants
from histostream.training import methods
from histostream.training.data import DataSet
from histostream.training.device import Compute
from histostream.training.recipe import read_recipe


def opened(pair: str, algorithm: str, number: int, root: Path) -> DataSet:
    return cell(pair, "short", algorithm, number, root).data()


def names(found: DataSet, part: str) -> set[str]:
    return {s.name for s in (found.pools["target"] if part == "pool" else getattr(found, part))}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_cells_of_a_pair_differ_in_the_algorithm_alone(pair: str) -> None:
    for size in PAIRS[pair].sizes:
        cells = {name: cell(pair, size, name, 2) for name in PAIRS[pair].algorithms}
        recipes = {name: one.recipe for name, one in cells.items()}
        assert len({repr((r.schedule, r.augmentation, r.mpp)) for r in recipes.values()}) == 1
        configs = {name: repr(r.config) for name, r in recipes.items() if name != ORACLE}
        assert len(set(configs.values())) == len(configs)
        assert {r.schedule.seed for r in recipes.values()} == {2}
        assert len({one.name for one in cells.values()}) == len(recipes)
        assert len({repr((one.judged, one.crf)) for one in cells.values()}) == 1
        for recipe in recipes.values():
            fixed = getattr(recipe.config, "feat_disc", "fcn") != "fcn"
            assert not fixed or recipe.config.feat_crop == recipe.schedule.crop_px


@pytest.mark.parametrize("pair", [p for p, of in PAIRS.items() if "uda" in of.method])
def test_every_row_of_a_uda_table_has_one_rule_of_batch_statistics(pair: str) -> None:
    """Measured anew on the target; beside it the running ones, with the control; CRF of 2.6."""
    for size in PAIRS[pair].sizes:
        for name in PAIRS[pair].algorithms:
            one = cell(pair, size, name, 0)
            assert one.recipe.config.bn_recalibrate
            assert set(one.judged.values()) == {"best", "last"}
            assert one.crf is not None
            assert one.crf.theta_alpha * one.recipe.mpp == pytest.approx(7.5)  # um: 30 px at 40x
            assert (one.crf.w1, one.crf.theta_beta, one.crf.w2, one.crf.n_iter) == (5, 10, 3, 5)
        control = cell(pair, size, "source + target forward", 0).recipe.config
        floor = cell(pair, size, "source only", 0).recipe.config
        assert replace(floor, forward_target=True) == control
    assert cell(pair, "short", "self-ensembling", 0).recipe.schedule.select == "last"


@pytest.mark.parametrize("pair", [p for p, of in PAIRS.items() if "apma" in of.method])
def test_every_row_of_an_apma_table_starts_from_one_source_model(pair: str) -> None:
    for size in PAIRS[pair].sizes:
        starts = [cell(pair, size, name, 1).start for name in PAIRS[pair].algorithms]
        assert None not in starts
        assert len({(s.name, repr(s.recipe)) for s in starts if s}) == 1
        assert starts[0] is not None
        source = starts[0].recipe
        assert not source.config.adapts
        assert (source.schedule.seed, source.schedule.select) == (1, "loss")
        other = cell(pair, size, "APMA-Net", 0).start
        assert other is not None
        assert other.name != starts[0].name
        full = cell(pair, size, "APMA-Net", 1).recipe
        assert full.config.source_only_steps == 0
        assert full.config.base_width == source.config.base_width
        assert full.schedule.select == "jaccard"
    short = cell(pair, "short", "APMA-Net", 0).recipe.config
    assert (short.lambda_rec, short.lambda_feat, short.lambda_pred) == (1e-3, 1e-3, 1e-3)


@pytest.mark.parametrize(
    ("pair", "base", "rule"),
    [
        ("tnbc-kirc", ("uda-paper",), ("uda-recalibrate",)),
        ("epfl-vnc", ("apma-paper", "apma-from-source"), ()),
    ],
)
def test_the_papers_size_is_the_recipe_that_ships(pair: str, base: tuple[str, ...], rule: tuple[str, ...]) -> None:
    of = PAIRS[pair]
    for name, own in of.algorithms.items():
        mine = cell(pair, "paper", name, 3)
        shipped = read_recipe(
            of.method, methods.load_method(of.method), (*base, *own, *rule), ("schedule.seed=3",), mpp=mine.recipe.mpp
        )
        assert mine.recipe == shipped


@pytest.mark.full
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
def test_images_that_are_scored_are_never_trained_on(pair: str, folder: str, data_dir: Path) -> None:
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
    choosing = "apma" in PAIRS[pair].method or "paper" in PAIRS[pair].sizes
    if choosing:
        size = "short" if "apma" in PAIRS[pair].method else "paper"
        found = cell(pair, size, method, 0, data_dir).data()
        validation = names(found, "validation")
        assert validation
        assert not validation & (names(found, "pool") | names(found, "test"))
        assert not validation & names(found, "train")
    oracle = opened(pair, ORACLE, 0, data_dir)
    assert names(oracle, "train") == names(folds[0], "pool")
    assert names(oracle, "test") == tests[0]


def shortened(one: Cell, steps: int) -> Cell:
    """Fewer steps of a narrower network, scored on two images."""

    def opened() -> DataSet:
        found = one.data()
        return replace(found, test=found.test[:2])

    schedule = replace(one.recipe.schedule, steps=steps, validate_every=steps)
    config = replace(one.recipe.config, base_width=4)
    recipe = replace(one.recipe, schedule=schedule, config=config)
    start = shortened(one.start, steps) if one.start else None
    return replace(one, recipe=recipe, start=start, data=functools.cache(opened))


@pytest.mark.full
def test_a_method_and_its_oracle_fill_a_result_file(tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="the dense CRF's fast backend")
    one, oracle = (shortened(cell("nuclei", "short", name, 0), 2) for name in ("self-ensembling", ORACLE))
    cells = [one, replace(oracle, crf=None, judged={"statistics of the target": "best"})]
    fill(tmp_path / "table.json", cells, tmp_path / "runs", Compute("cpu"))
    found = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert list(found) == ["nuclei-short-self-ensembling-0", "nuclei-short-oracle-0"]
    for said in found.values():
        assert said["best_step"] == said["steps"] == 2
        assert 0 <= said["scores"]["pooled"]["mean_f"] <= 1
        assert said["judged"] == "statistics of the target"
    first, second = found.values()
    assert list(first["variants"]) == ["statistics of the target, CRF", "running statistics", "running statistics, CRF"]
    assert first["crf"]["theta_alpha"] == 15
    assert (second["variants"], "crf" in second) == ({}, False)
    del found["nuclei-short-oracle-0"]
    head, row = accuracy_variants("per_image_mean", {"cells": found})
    assert (len(head), len(row)) == (10, 10)
    assert head[3] == "statistics of the target, CRF: Dice"


@pytest.mark.full
def test_rows_share_the_source_model_that_is_trained_once(tmp_path: Path) -> None:
    none, full = (
        train(one, one.data(), tmp_path, Compute("cpu")).record
        for one in (shortened(cell("em", "short", name, 0), 2) for name in ("no adaptation", "APMA-Net"))
    )
    assert none["start"]["sha256"] == full["start"]["sha256"]
    assert none["start"]["left"] == []
    assert full["start"]["left"] == ["reconstructor", "discriminator_feat", "discriminator_pred"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        "em-short-apma-net-0",
        "em-short-no-adaptation-0",
        "em-short-source-model-0",
    ]
    assert cell("em", "short", "APMA-Net", 0).judged == {"chosen on the target": "best", "last": "last"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pair", "em", "--size", "paper"), "em has no size 'paper': use short"),
        (
            ("--pair", "em", "--size", "short", "--only", "CBST"),
            "'CBST' is none of no adaptation, Roels",
        ),
    ],
)
def test_what_a_pair_does_not_have_is_named(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    where = ("--data", tmp_path, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    done = CliRunner().invoke(adaptation.main, [*arguments, *map(str, where)])
    assert done.exit_code == 2
    assert said in done.output
    assert not (tmp_path / "out").exists()

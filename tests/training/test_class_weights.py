"""Weights of classes in losses per pixel: against torch's own loss, shares counted by hand, and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from histostream.training import checkpoint, datasets, loop
from histostream.training.class_weights import ClassWeightsError, count_pixels, read_class_weights, weights_of
from histostream.training.cli import main
from histostream.training.data import DataSet, StoredSample
from histostream.training.losses import annotated_mean, cross_entropy
from histostream.training.methods import METHODS, hook, load_method
from histostream.training.methods.apma_net import method as apma_net
from histostream.training.methods.imems import method as imems
from histostream.training.methods.pyramid_gan import method as pyramid_gan
from histostream.training.recipe import read_recipe
from histostream.training.state import Batch
from tests.commands import call
from tests.training.test_running import recipe

CLASSES = (("ground", (0, 0, 0)), ("gland", (9, 9, 9)), ("rare", (5, 5, 5)))


def labels_of(*counts: int) -> np.ndarray:
    """Return a label map of one row, with so many pixels of class 0, 1, ..."""
    return np.repeat(np.arange(len(counts), dtype=np.uint8), counts)[None]


def samples(*maps: np.ndarray) -> list[StoredSample]:
    return [StoredSample(str(i), str(i), np.zeros((*m.shape, 3), np.uint8), m) for i, m in enumerate(maps)]


def test_the_weighted_loss_is_torchs_where_all_pixels_are_annotated() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(3, (2, 5, 7))
    weights = torch.tensor([0.2, 1.0, 7.0], dtype=torch.float64)
    mine, theirs = cross_entropy(scores, labels, weights), F.cross_entropy(scores, labels, weights)
    torch.testing.assert_close(mine, theirs)
    gradients = [torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (mine, theirs)]
    torch.testing.assert_close(*gradients)
    labels[0, 0] = 255
    torch.testing.assert_close(
        cross_entropy(scores, labels, weights), F.cross_entropy(scores, labels, weights, ignore_index=255)
    )


def test_pixels_that_all_have_the_weight_0_give_no_loss() -> None:
    values = torch.ones(1, 1, 1, 4)
    assert float(annotated_mean(values, torch.tensor([[[0, 0, 255, 0]]]), torch.tensor([0.0, 1.0]))) == 0


def test_balanced_weights_are_as_counted_by_hand() -> None:
    """60, 30 and 10 pixels of 100: 100 / (3 * 60), 100 / (3 * 30) and 100 / (3 * 10)."""
    counted = count_pixels(samples(labels_of(40, 30, 0), labels_of(20, 0, 10), np.full((1, 50), 255, np.uint8)), 3)
    assert counted.pixels.tolist() == [60, 30, 10]
    assert counted.shares.tolist() == [0.6, 0.3, 0.1]
    weights = weights_of("balanced", CLASSES, counted)
    assert weights == pytest.approx((5 / 9, 10 / 9, 10 / 3))
    # Each class has the same part in the loss.
    parts = [weight * pixels for weight, pixels in zip(weights, counted.pixels, strict=True)]
    assert parts == pytest.approx([parts[0]] * 3)
    # A class without a pixel has none, and does not change the others' parts.
    absent = weights_of("balanced", CLASSES, count_pixels(samples(labels_of(75, 25)), 3))
    assert absent == pytest.approx((100 / 150, 100 / 50, 0))


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        (("class_weights.gland=3",), (1, 3, 1)),
        (("class_weights.2=0.5", "class_weights.ground=0"), (0, 1, 0.5)),
        (("class_weights={gland=2, 2=8}",), (1, 2, 8)),
        ((), ()),
    ],
)
def test_weights_are_set_by_name_or_number(settings: Sequence[str], weights: tuple[float, ...]) -> None:
    mine = read_recipe("imems", imems, (), tuple(settings), mpp=0.5)
    assert weights_of(mine.class_weights, CLASSES, count_pixels(samples(labels_of(1, 1, 1)), 3)) == weights


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("even", "write class_weights=balanced, or class_weights.NAME=WEIGHT"),
        (3, "write class_weights=balanced"),
        ([1, 2], "write class_weights=balanced"),
        ({}, "write class_weights=balanced"),
        ({"gland": -1}, "class_weights.gland=-1: a weight is a number from 0 to 1000000"),
        ({"gland": float("nan")}, "a weight is a number"),
        ({"gland": True}, "a weight is a number"),
        ({"gland": "high"}, "class_weights.gland='high'"),
    ],
)
def test_what_is_no_weight_is_refused(value: Any, words: str) -> None:
    with pytest.raises(ClassWeightsError) as refused:
        read_class_weights(value)
    assert words in str(refused.value)


def test_weights_that_do_not_fit_the_classes_are_refused() -> None:
    counted = count_pixels(samples(labels_of(1, 1, 1)), 3)
    with pytest.raises(ClassWeightsError, match="'tumour' is no class of the data; name one of ground, gland, rare"):
        weights_of((("tumour", 2.0),), CLASSES, counted)
    with pytest.raises(ClassWeightsError, match="'3' is no class of the data"):
        weights_of((("3", 2.0),), CLASSES, counted)
    with pytest.raises(ClassWeightsError, match="all are 0"):
        weights_of(tuple((str(i), 0.0) for i in range(3)), CLASSES, counted)


TINY: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "imems": (imems, {"target": "labels", "adversarial": False, "base_width": 4, "depth": 2}),
    "imems multi": (
        imems,
        {"target": "labels", "adversarial": False, "second_task": "image", "base_width": 4, "depth": 2},
    ),
    "apma_net": (
        apma_net,
        {"adapt_features": "none", "adapt_predictions": False, "reconstruct": False, "base_width": 32},
    ),
    "pyramid_gan": (
        pyramid_gan,
        {"levels": 1, "g_arch": "none", "judge_segmenter": False, "first_width": 4, "growth": 2, "layers": 1},
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_a_step_and_a_validation_weigh_the_classes(name: str) -> None:
    """With the weight of one class alone, the other's pixels change nothing."""
    method, settings = TINY[name]
    config = method.Config(**settings)
    assert hook(method, "takes_class_weights")(config) == ""
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    labels[:, :16] = 1

    def losses(weights: tuple[float, float] | None, truth: torch.Tensor) -> tuple[float, float]:
        torch.manual_seed(0)
        state = method.build(config, 2, 3)
        if weights:
            state = replace(state, class_weights=torch.tensor(weights))
        hook(method, "before_step")(state, None, 1, 2)
        validated = method.validate(state, images, truth)[0]
        torch.manual_seed(1)
        found = method.step(state, Batch(images, truth, {}, 1, 2))
        return float(next(found[n] for n in ("cross_entropy", "segmentation") if n in found)), validated

    ignored = labels.clone()
    ignored[labels == 0] = 255
    for one, other in zip(losses((0.0, 1.0), labels), losses(None, ignored), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert losses((1.0, 1.0), labels) == pytest.approx(losses(None, labels), rel=1e-5)
    assert losses((1.0, 9.0), labels)[0] != pytest.approx(losses(None, labels)[0], rel=1e-5)


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_that_cannot_take_weights_says_why(name: str) -> None:
    method = load_method(name)
    cause = hook(method, "takes_class_weights")(method.Config())
    assert (cause == "") is (name in ("apma_net", "pyramid_gan"))
    assert cause == "" or ": " in cause, "what to do is missing"


@pytest.fixture(scope="module")
def grey_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images that show nothing; 4 % of their pixels are of the class "dot"."""
    folder = tmp_path_factory.mktemp("grey")
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for i in range(8):
        labels = rng.permutation(np.repeat(np.array([0, 1], np.uint8), (2400, 100))).reshape(50, 50)
        Image.fromarray(np.full((50, 50, 3), 150 + i, np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{i}.png")
    (folder / "dataset.toml").write_text('mpp = 0.5\n[[classes]]\nname = "ground"\n[[classes]]\nname = "dot"\n')
    return folder


def test_a_run_weighs_its_classes_and_records_it(grey_folder: Path, tmp_path: Path) -> None:
    """Where images tell nothing, a network learns the weighted shares: its loss is their entropy.

    Of 4 % it is 0.168; of two balanced classes ln 2, with the weights 1 / 1.92 and 1 / 0.08.
    """
    found: DataSet = datasets.open_dataset(str(grey_folder))
    config = imems.Config(target="labels", adversarial=False, base_width=4, depth=1, dropout=0, learning_rate=1e-2)
    plain = replace(recipe(steps=60, validate_every=60, crop_px=48), config=config)
    for weights, entropy in (("", -0.04 * np.log(0.04) - 0.96 * np.log(0.96)), ("balanced", np.log(2))):
        run = tmp_path / f"run {weights}"
        best = loop.train(replace(plain, class_weights=weights), imems, found, run)
        assert best.record["validation_loss"] == pytest.approx(entropy, abs=0.02)
    record = checkpoint.read(tmp_path / "run balanced" / "best").record
    assert record["class_weights"] == pytest.approx([1 / 1.92, 12.5])
    assert "class_weights" not in checkpoint.read(tmp_path / "run " / "best").record


def test_the_command_refuses_weights_before_it_reads_the_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = call(main, "--data", tmp_path / "empty", "--out", tmp_path / "run", "--set", "class_weights=balanced")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith('does not take them: it paints an image of the classes by L1: set method.target="labels"')
    assert not (tmp_path / "run").exists()

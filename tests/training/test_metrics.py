from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from histostream.training.metrics import Confusion, PerImage


def random_maps(classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (40, 30))
    return np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, classes, (40, 30))), truth


def counted(predicted: Any, truth: Any, classes: int = 2) -> Confusion:
    confusion = Confusion(classes)
    confusion.add(np.asarray(predicted), np.asarray(truth))
    return confusion


def test_scores_of_a_map_counted_by_hand() -> None:
    truth = np.array([[0, 0, 1, 1, 1, 2]])
    predicted = np.array([[0, 1, 1, 1, 0, 2]])
    confusion = Confusion(4)
    confusion.add(predicted, truth)
    confusion.add(predicted, truth)
    assert confusion.accuracy() == pytest.approx(4 / 6)
    assert confusion.dice() == pytest.approx([2 / 4, 4 / 6, 1.0, math.nan], nan_ok=True)
    assert confusion.jaccard() == pytest.approx([1 / 3, 2 / 4, 1.0, math.nan], nan_ok=True)
    assert confusion.class_accuracies() == pytest.approx([1 / 2, 2 / 3, 1.0, math.nan], nan_ok=True)
    # the absent fourth class is left out of the means
    assert confusion.mean_dice() == pytest.approx((2 / 4 + 4 / 6 + 1) / 3)
    assert confusion.mean_jaccard() == pytest.approx((1 / 3 + 2 / 4 + 1) / 3)
    assert confusion.mean_class_accuracy() == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)


def test_a_class_that_is_only_predicted_scores_0_and_has_no_accuracy() -> None:
    confusion = counted([0, 1, 0, 0], [0, 0, 0, 0])
    assert confusion.dice()[1] == 0
    assert confusion.jaccard()[1] == 0
    assert np.isnan(confusion.class_accuracies()[1])
    assert confusion.mean_class_accuracy() == 3 / 4


def test_with_nothing_counted_every_score_is_nan() -> None:
    confusion = Confusion(2)
    assert np.isnan(confusion.accuracy())
    assert np.isnan(confusion.dice()).all()
    assert np.isnan([confusion.mean_dice(), confusion.mean_jaccard()]).all()
    assert np.isnan(confusion.mean_class_accuracy())


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_dice_is_2j_over_1_plus_j(classes: int, seed: int) -> None:
    confusion = counted(*random_maps(classes, seed), classes)
    jaccard = confusion.jaccard()
    np.testing.assert_allclose(confusion.dice(), 2 * jaccard / (1 + jaccard), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_sets_of_pixels(seed: int) -> None:
    predicted, truth = random_maps(4, seed)
    confusion = counted(predicted, truth, 4)
    for label in range(4):
        a, b = predicted == label, truth == label
        assert confusion.jaccard()[label] == pytest.approx((a & b).sum() / (a | b).sum())
        assert confusion.dice()[label] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert confusion.class_accuracies()[label] == pytest.approx((a & b).sum() / b.sum())
    assert confusion.accuracy() == pytest.approx((predicted == truth).mean())


def test_mean_dice_is_the_plain_mean_whatever_the_areas() -> None:
    # As in table 1 of the iMEMS paper, where the average of the colon rows is that of the columns.
    truth = np.repeat(np.arange(5), [1000, 400, 60, 30, 10])
    predicted = truth.copy()
    predicted[[5, 1005, 1405, 1465, 1495]] = [1, 2, 3, 4, 0]
    confusion = counted(predicted, truth, 5)
    pairs = [  # 2TP, FP + FN
        (2 * 999, 2),
        (2 * 399, 2),
        (2 * 59, 2),
        (2 * 29, 2),
        (2 * 9, 2),
    ]
    assert confusion.mean_dice() == pytest.approx(sum(a / (a + b) for a, b in pairs) / 5)


def test_counts_of_parts_add_up() -> None:
    (p1, t1), (p2, t2) = random_maps(3, 1), random_maps(3, 2)
    merged = counted(p1, t1, 3)
    merged += counted(p2, t2, 3)
    whole = counted(np.stack([p1, p2]), np.stack([t1, t2]), 3)
    np.testing.assert_array_equal(merged.counts, whole.counts)
    with pytest.raises(ValueError, match="2 classes, here 3"):
        merged += Confusion(2)


def test_maps_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        Confusion(2).add(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_pixels_that_nobody_annotated_are_left_out(dtype: str) -> None:
    truth = np.array([0, 255, 1, 255, 255]).astype(dtype)
    predicted = np.array([0, 255, 0, 1, 77]).astype(dtype)
    assert counted(predicted, truth).counts.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        ([0, 2], [0, 1], "predicted has label 2 on 1 pixels: 2 classes are 0..1"),
        ([-1, -1], [0, 1], "predicted has label -1 on 2"),
        ([0, 255], [0, 1], "predicted has label 255"),
        ([0, 1], [0, 2], "truth has label 2"),
        ([0, 1], [-1, 0], "truth has label -1"),
    ],
)
def test_labels_that_are_no_class_are_refused(predicted: Any, truth: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counted(predicted, truth)


@pytest.mark.parametrize("classes", [0, 256])
@pytest.mark.parametrize("kind", [Confusion, PerImage])
def test_the_number_of_classes_is_1_to_255(kind: Any, classes: int) -> None:
    with pytest.raises(ValueError, match=f"{classes} classes"):
        kind(classes)


def test_pooled_and_per_image_mean_differ_and_are_named() -> None:
    scores = PerImage(2)
    scores.add(np.array([1] * 8), np.array([1] * 8))
    scores.add(np.array([1, 0]), np.array([0, 1]))
    assert scores.reduce(Confusion.accuracy, "pooled") == 8 / 10
    assert scores.reduce(Confusion.accuracy, "per_image_mean") == 1 / 2
    # class 0 is in the second image only, so its mean is over that image
    assert scores.reduce(Confusion.dice, "pooled").tolist() == [0, 16 / 18]
    assert scores.reduce(Confusion.dice, "per_image_mean").tolist() == [0, 1 / 2]
    assert scores.reduce(Confusion.mean_dice, "per_image_mean") == (1 + 0) / 2
    with pytest.raises(ValueError, match="'mean': use 'pooled' or 'per_image_mean'"):
        scores.reduce(Confusion.accuracy, "mean")  # type: ignore[arg-type]


def test_per_image_scores_of_no_image_are_nan() -> None:
    for reduction in ("pooled", "per_image_mean"):
        assert np.isnan(PerImage(3).reduce(Confusion.accuracy, reduction))
        assert np.isnan(PerImage(3).reduce(Confusion.dice, reduction)).tolist() == [True] * 3

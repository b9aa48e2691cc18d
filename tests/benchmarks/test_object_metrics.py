from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import cdist, directed_hausdorff

from histostream.benchmarks.accuracy.object_metrics import ObjectScores, instances_from_labels, score_objects


def square(y: int, x: int, side: int = 10, shape: tuple[int, int] = (40, 50)) -> np.ndarray:
    labels = np.zeros(shape, np.int32)
    labels[y : y + side, x : x + side] = 1
    return labels


def scattered(shape: tuple[int, int], objects: int, seed: int, largest: int = 9) -> np.ndarray:
    """Rectangles over one another under odd, unordered numbers; some in more than one piece."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    for number in rng.permutation(np.arange(1, 4 * objects))[:objects]:
        y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        h, w = rng.integers(1, largest, 2)
        labels[y : y + h, x : x + w] = number
    return labels


# The rules, written from their words and without any hurry.


def oracle_partner(own: np.ndarray, other: np.ndarray, number: int, *, nearest: bool) -> tuple[int, int]:
    shared = [int(v) for v in other[own == number] if v != 0]
    if shared:
        most = max(Counter(shared).values())
        return min(v for v, n in Counter(shared).items() if n == most), most
    if nearest:
        numbers = [int(v) for v in np.unique(other) if v != 0]
        return min(numbers, key=lambda v: oracle_hausdorff(own == number, other == v)), 0
    return 0, 0


def oracle_hausdorff(a: np.ndarray, b: np.ndarray) -> float:
    distances = cdist(np.argwhere(a), np.argwhere(b))
    return float(max(distances.min(axis=0).max(), distances.min(axis=1).max()))


def oracle(predicted: np.ndarray, truth: np.ndarray) -> tuple[int, int, int, float, float]:
    s = [int(v) for v in np.unique(predicted) if v != 0]
    g = [int(v) for v in np.unique(truth) if v != 0]
    hits = 0
    for number in s:
        partner, overlap = oracle_partner(predicted, truth, number, nearest=False)
        hits += partner != 0 and overlap / (truth == partner).sum() > 0.5
    dice = hausdorff = 0.0
    for own, other, numbers in ((predicted, truth, s), (truth, predicted, g)):
        for number in numbers:
            a = own == number
            weight = a.sum() / (own > 0).sum() / 2
            partner, overlap = oracle_partner(own, other, number, nearest=False)
            if partner:
                dice += weight * 2 * overlap / (a.sum() + (other == partner).sum())
            partner, _ = oracle_partner(own, other, number, nearest=True)
            hausdorff += weight * oracle_hausdorff(a, other == partner)
    return hits, len(s) - hits, len(g) - hits, dice, hausdorff


def agrees(predicted: np.ndarray, truth: np.ndarray) -> None:
    score = score_objects(predicted, truth)
    found = (score.true_positives, score.false_positives, score.false_negatives)
    *counts, dice, hausdorff = oracle(predicted, truth)
    assert found == tuple(counts)
    assert score.dice == pytest.approx(dice, abs=1e-12)
    assert score.hausdorff_px == pytest.approx(hausdorff, abs=1e-9)
    assert not score.capped


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("objects", [1, 3, 12])
def test_random_maps_score_as_the_rules_say(objects: int, seed: int) -> None:
    agrees(scattered((37, 53), objects, seed), scattered((37, 53), objects + seed % 3, seed + 99))


@pytest.mark.parametrize("seed", range(5))
def test_objects_that_hardly_meet_score_as_the_rules_say(seed: int) -> None:
    predicted = scattered((37, 160), 8, seed)
    truth = scattered((37, 160), 8, seed + 99)
    predicted[:, 60:], truth[:, :70] = 0, 0  # nothing overlaps: all partners are the nearest
    if not predicted.any() or not truth.any():
        pytest.fail("the seed gives an empty map")
    agrees(predicted, truth)


@pytest.mark.full
def test_more_than_255_objects_score_as_the_rules_say() -> None:
    predicted = scattered((60, 70), 330, 1, largest=4)
    truth = scattered((60, 70), 320, 2, largest=4)
    assert len(np.unique(predicted)) > 257
    assert len(np.unique(truth)) > 257
    agrees(predicted, truth)


def test_numbers_above_255_do_not_wrap() -> None:
    predicted, truth = 256 * square(5, 5), 512 * square(5, 5)
    score = score_objects(predicted, truth)  # as uint8 both maps would be empty
    assert (score.true_positives, score.dice) == (1, 1.0)


def test_how_objects_are_numbered_and_stored_does_not_matter() -> None:
    predicted, truth = scattered((37, 53), 9, 3), scattered((37, 53), 9, 4)
    expected = score_objects(predicted, truth)
    assert score_objects(predicted.astype(np.uint16), truth.astype(np.int64) * 1000) == expected


def test_a_map_against_itself_is_perfect() -> None:
    labels = scattered((60, 70), 15, 5)
    score = score_objects(labels, labels)
    assert (score.f1, score.dice, score.hausdorff_px) == (1.0, 1.0, 0.0)


def test_a_10_px_square_shifted_by_5() -> None:
    score = score_objects(square(10, 15), square(10, 10))
    assert score.dice == pytest.approx(0.5)
    assert score.hausdorff_px == 5.0
    assert score.f1 == 0.0  # half is not more than half
    assert score_objects(square(10, 14), square(10, 10)).f1 == 1.0


def test_overlap_is_judged_by_the_true_area_alone() -> None:
    # Ten times too large a prediction finds the object.
    score = score_objects(square(0, 0, 30), square(5, 5, 9))
    assert (score.true_positives, score.false_positives, score.false_negatives) == (1, 0, 0)


def test_background_is_nobodys_partner() -> None:
    truth, predicted = square(0, 0, 3), square(0, 0, 20)
    assert score_objects(predicted, truth).dice == pytest.approx(2 * 9 / (9 + 400))


def test_of_equal_overlaps_the_smaller_number_is_the_partner() -> None:
    truth = np.zeros((10, 40), np.int32)
    truth[:, :10], truth[:, 10:25] = 7, 3
    predicted = np.zeros_like(truth)
    predicted[:, 5:15] = 1  # 50 px of each
    agrees(predicted, truth)
    assert score_objects(predicted, truth).dice == pytest.approx(
        # S takes 3 (150 px); both true objects take S
        (2 * 50 / 250 + (0.4 * 2 * 50 / 200 + 0.6 * 2 * 50 / 250)) / 2
    )


def test_two_predictions_of_one_object_are_a_hit_and_a_false_positive() -> None:
    predicted = square(0, 0)
    predicted[:3][predicted[:3] == 1] = 2
    score = score_objects(predicted, square(0, 0))
    assert (score.true_positives, score.false_positives, score.false_negatives) == (1, 1, 0)
    assert score.f1 == pytest.approx(2 / 3)


def test_without_overlap_the_partner_is_the_nearest_by_hausdorff_distance() -> None:
    # The long object begins nearer to the prediction, and ends further from it.
    truth = np.zeros((40, 100), np.int32)
    truth[20:22, 12:90], truth[0:2, 0:2] = 1, 2
    predicted = np.zeros_like(truth)
    predicted[20:22, 8:10] = 5
    agrees(predicted, truth)
    away = score_objects(predicted, np.where(truth == 2, 2, 0)).hausdorff_px
    assert away == pytest.approx(math.hypot(20, 8))
    both = score_objects(predicted, truth).hausdorff_px
    long_px, short_px = 2 * 78, 4
    own_part = (long_px * 80 + short_px * away) / (long_px + short_px)
    assert both == pytest.approx((away + own_part) / 2)


def test_hausdorff_is_over_all_pixels_not_over_boundaries() -> None:
    # The pixel of a disc that is furthest from the ring around it is its centre: no boundary pixel.
    y, x = np.mgrid[:61, :61] - 30
    radius = np.hypot(y, x)
    ring = np.where((radius > 25) & (radius < 29), 1, 0)
    disc = np.where(radius < 29, 1, 0)
    assert score_objects(disc, ring).hausdorff_px == pytest.approx(radius[ring == 1].min())


@pytest.mark.parametrize("seed", range(10))
def test_distances_are_scipys(seed: int) -> None:
    a, b = scattered((50, 60), 1, seed, largest=30), scattered((50, 60), 1, seed + 50, largest=30)
    points = np.argwhere(a), np.argwhere(b)
    expected = max(directed_hausdorff(*points)[0], directed_hausdorff(*points[::-1])[0])
    assert score_objects(a, b).hausdorff_px == pytest.approx(expected)


def test_two_empty_maps_agree() -> None:
    empty = np.zeros((30, 40), np.int32)
    score = score_objects(empty, empty)
    assert (score.f1, score.dice, score.hausdorff_px, score.capped) == (1.0, 1.0, 0.0, False)


@pytest.mark.parametrize("predicted_is_empty", [True, False])
def test_one_empty_map_is_infinitely_far_and_capped(predicted_is_empty: bool) -> None:
    maps = [np.zeros((30, 40), np.int32), square(3, 3, shape=(30, 40))]
    score = score_objects(*(maps if predicted_is_empty else maps[::-1]))
    assert (score.f1, score.dice, score.hausdorff_px, score.capped) == (0.0, 0.0, 50.0, True)
    assert (score.false_negatives, score.false_positives) == ((1, 0) if predicted_is_empty else (0, 1))


def test_a_map_without_background_is_scored() -> None:
    labels = np.ones((8, 9), np.int32)
    labels[:, 4:] = 2
    agrees(labels, labels[::-1, ::-1].copy())


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"\(2, 3\)"),
        (np.zeros((1, 2, 3), int), np.zeros((1, 2, 3), int), r"give \(H, W\)"),
        (np.zeros((2, 3)), np.zeros((2, 3), int), "predicted is float64"),
        (np.zeros((2, 3), int), np.full((2, 3), -1), "truth has the negative"),
    ],
)
def test_what_is_no_pair_of_instance_maps_is_refused(predicted: np.ndarray, truth: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_objects(predicted, truth)


def test_scores_of_a_set() -> None:
    empty = np.zeros((30, 40), np.int32)
    small = square(3, 3, shape=(30, 40))
    two = small.copy()
    two[20:25, 20:25] = 2
    scores = ObjectScores()
    scores.add(small, small)  # F1 1
    scores.add(small, two)  # one missed: F1 2/3
    scores.add(empty, small)  # F1 0, capped at the diagonal of 50 px
    rest = ObjectScores()
    rest.add(empty, empty)  # F1 1
    scores += rest
    assert scores.f1_per_image_mean() == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert scores.f1_pooled() == pytest.approx(2 * 2 / (2 * 2 + 0 + 2))
    second = scores.images[1]
    assert scores.dice_per_image_mean() == pytest.approx((1 + second.dice + 0 + 1) / 4)
    assert scores.hausdorff_px_per_image_mean() == pytest.approx((second.hausdorff_px + 50) / 4)
    assert second.hausdorff_px > 0
    assert scores.capped() == 1


def test_scores_of_no_image_are_nan() -> None:
    none = ObjectScores()
    values = (
        none.f1_pooled(),
        none.f1_per_image_mean(),
        none.dice_per_image_mean(),
        none.hausdorff_px_per_image_mean(),
    )
    assert all(math.isnan(value) for value in values)
    assert none.capped() == 0


def test_components_are_8_connected_and_of_one_class() -> None:
    labels = np.array([[1, 0, 2, 2], [0, 1, 0, 0], [0, 0, 0, 1]])
    numbers = instances_from_labels(labels, 1, min_px=1)
    assert numbers.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 2]]
    assert numbers.dtype == np.int32


def test_holes_are_filled_but_not_bays() -> None:
    labels = square(5, 5, 20)
    labels[10:14, 10:14] = 0  # a hole
    labels[11:13, 11:13] = 1  # with an island, which becomes a part of the object
    labels[5:8, 20:22] = 0  # a bay
    expected = square(5, 5, 20)
    expected[5:8, 20:22] = 0
    np.testing.assert_array_equal(instances_from_labels(labels, 1), expected)
    kept = instances_from_labels(labels, 1, fill_holes=False, min_px=1)
    np.testing.assert_array_equal(kept > 0, labels == 1)
    assert kept.max() == 2


def test_a_ring_closed_by_corners_has_a_hole() -> None:
    labels = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert instances_from_labels(labels, 1, min_px=1)[1, 1] == 1


def test_small_objects_are_dropped_after_filling_and_the_rest_renumbered() -> None:
    labels = np.zeros((40, 60), np.uint8)
    labels[0:9, 0:11] = 1  # 99 px
    labels[0:10, 20:30] = 1  # 100 px with its hole
    labels[4:6, 24:26] = 0
    labels[20:40, 20:40] = 1
    numbers = instances_from_labels(labels, 1)
    assert np.bincount(numbers.ravel())[1:].tolist() == [100, 400]


def test_a_class_that_is_absent_gives_an_empty_map() -> None:
    assert not instances_from_labels(np.zeros((5, 6), np.uint8), 1).any()
    with pytest.raises(ValueError, match=r"give \(H, W\)"):
        instances_from_labels(np.zeros((1, 5, 6), np.uint8), 1)


def glands(count: int, shift: int) -> np.ndarray:
    """Discs of GlaS's number and size on its image of 522 x 775 px."""
    y, x = np.mgrid[:522, :775]
    labels = np.zeros(y.shape, np.int32)
    for i in range(count):
        cy, cx = 50 + 100 * (i // 6), 60 + 125 * (i % 6) + shift
        labels[np.hypot(y - cy, x - cx) < 40] = i + 1
    return labels


@pytest.mark.parametrize("shift", [10, 85], ids=["overlapping", "apart"])
def test_a_gland_image_takes_less_than_a_second(shift: int) -> None:
    truth = glands(30, 0)
    predicted = np.where(truth > 0, 0, glands(30, shift)) if shift > 80 else glands(30, shift)
    start = time.process_time()  # so that what else runs here does not count
    score = score_objects(predicted, truth)
    assert time.process_time() - start < 1.0
    assert score.f1 == (1.0 if shift == 10 else 0.0)


def test_real_annotations_against_themselves_and_against_a_worse_map(data_dir: Path) -> None:
    folder = data_dir / "glands-glas" / "testB"
    if not folder.is_dir():
        pytest.skip(f"no GlaS annotations: {folder} does not exist")
    scores, worse = ObjectScores(), ObjectScores()
    for path in sorted(folder.glob("*_anno.png"))[::4]:
        truth = np.asarray(Image.open(path))
        scores.add(truth, truth)
        worse.add(np.roll(truth, 8, axis=1), truth)
    assert len(scores.images) == 5
    assert (scores.f1_pooled(), scores.f1_per_image_mean()) == (1.0, 1.0)
    assert scores.dice_per_image_mean() == pytest.approx(1.0)
    assert (scores.hausdorff_px_per_image_mean(), scores.capped()) == (0.0, 0)
    assert 0.7 < worse.dice_per_image_mean() < 1
    assert worse.hausdorff_px_per_image_mean() >= 8

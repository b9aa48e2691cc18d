from __future__ import annotations

import numpy as np
import pytest

from histostream.training.metrics import Confusion


def test_scores_of_a_map_counted_by_hand() -> None:
    truth = np.array([[0, 0, 1, 1, 1, 2]])
    predicted = np.array([[0, 1, 1, 1, 0, 2]])
    confusion = Confusion(4)
    confusion.add(predicted, truth)
    confusion.add(predicted, truth)
    assert confusion.accuracy() == pytest.approx(4 / 6)
    dice = confusion.dice()
    assert dice[:3] == pytest.approx([2 / 4, 4 / 6, 1.0])
    assert np.isnan(dice[3])


def test_maps_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        Confusion(2).add(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))

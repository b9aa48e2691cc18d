"""How the share of touching objects is judged, and what the shipped result says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from histostream.benchmarks.accuracy import touching
from histostream.benchmarks.accuracy.touching import judge, score
from histostream.wsi.outputs.label_rows import ClassInfo, SlideInfo
from histostream.wsi.outputs.object_rule import NUCLEI
from histostream.wsi.outputs.objects.counting import CONCAVE, LARGE
from tests.conftest import REPOSITORY

RESULT = Path(touching.__file__).parents[1] / "results" / "accuracy-touching.json"
CLASSES = (ClassInfo("background", (255, 255, 255)), ClassInfo("nucleus", (0, 0, 255), rule=NUCLEI))


def test_an_object_has_the_nuclei_of_which_it_holds_half() -> None:
    y, x = np.mgrid[:120, :200] + 0.5
    centers = [(20, 20), (60, 20), (100, 20), (20, 80), (37, 80), (100, 80)]
    instances = np.zeros((120, 200), np.int32)
    for number, (cx, cy) in enumerate(centers, 1):
        instances[np.hypot(x - cx, y - cy) < 9] = number
    labels = (instances > 0).astype(np.uint8)
    labels[instances == 6] = 0  # missed
    labels[90:110, 150:170] = 1  # no nucleus
    found = judge(labels, instances, SlideInfo("image", 200, 120, 0.5, CLASSES))
    assert sorted(found.nuclei.tolist()) == [0, 1, 1, 1, 2]
    np.testing.assert_array_equal(found.said, found.nuclei == 2)
    assert found.annotated == 6
    said = score([found] * 5)  # fewer objects than are needed to judge the share of an image
    assert (said["objects"], said["nuclei"], said["precision"], said["recall"]) == (25, 30, 1.0, 1.0)


def test_the_page_says_what_was_measured() -> None:
    result = json.loads(RESULT.read_text())
    assert (result["large"], result["concave"]) == (LARGE, CONCAVE)
    page = (REPOSITORY / "docs" / "objects.md").read_text(encoding="utf-8")
    names = {"tnbc": "TNBC", "monuseg": "MoNuSeg"}
    for name, kinds in result["sets"].items():
        for kind, said in kinds.items():
            labels = {"model": "model", "annotation": "annotated"}[kind]
            pattern = rf"\| {names[name]}, {said['images']} \| {labels} \| (.*) \|"
            cells = re.search(pattern, page)
            assert cells is not None
            numbers = [float(number) for number in re.findall(r"[\d.]+", cells[1])]
            shares = [100 * said[key] for key in ("true_share", "reported_share", "error_absolute_mean", "error_worst")]
            expected = [said["nuclei"], said["objects"], *shares, said["nuclei_per_touching_object"]]
            assert numbers == pytest.approx(expected, abs=0.051)

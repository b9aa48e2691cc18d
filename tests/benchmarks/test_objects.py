"""How objects are compared with the nuclei that were drawn, and what the shipped result says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from histostream.benchmarks import objects
from histostream.benchmarks.objects import Case, centers, discs, export, groups, match

RESULT = Path(objects.__file__).parent / "results" / "objects-cpu.json"


def test_points_are_matched_one_to_one() -> None:
    known = np.array([(0.0, 0.0), (10.0, 0.0), (50.0, 50.0), (90.0, 90.0)])
    found = np.array([(0.5, 0.0), (1.0, 0.0), (10.0, 2.9), (50.0, 53.1)])
    said = match(found, known, within=3.0)
    assert (said["matched"], said["precision"], said["recall"], said["f1"]) == (2, 0.5, 0.5, 0.5)


def test_nuclei_that_touch_are_one() -> None:
    nuclei = np.array([(0, 0, 10, 4, 0), (9, 0, 10, 4, 0), (9, 8, 10, 4, 0), (40, 0, 10, 4, 0.5)])
    group = groups(nuclei.astype(float), 0)
    assert group.tolist() == [0, 0, 2, 3]
    np.testing.assert_allclose(centers(nuclei.astype(float), group), [(4.5, 0), (9, 8), (40, 0)])
    assert groups(nuclei.astype(float), 5).tolist() == [0, 0, 0, 3]


@pytest.mark.parametrize(("inverse", "count"), [(False, 36), (True, 1)])
def test_discs_are_counted(tmp_path: Path, inverse: bool, count: int) -> None:
    raw = tmp_path / "labels"
    raw.write_bytes(b"".join(rows.tobytes() for rows in discs(144, 144, inverse=inverse)))
    found = export(raw, (144, 144), Case("any", ("csv",)), tmp_path / "out")
    assert found["objects"] == count


@pytest.mark.skipif(not RESULT.exists(), reason="objects-cpu.json was not measured yet")
def test_the_shipped_result_says_that_objects_take_less_than_inference() -> None:
    said = json.loads(RESULT.read_text())
    nuclei = said["runs"]["synthetic, geojson and csv"]
    assert nuclei["objects"] > 100_000
    assert max(run["share_of_inference"] for run in said["runs"].values()) < 1
    whole, half = (said["runs"][f"{name}, geojson"] for name in ("crowded", "half as high"))
    assert whole["seconds"] < 3 * half["seconds"]
    assert whole["peak_mib"] < 1.2 * half["peak_mib"]
    assert said["true_labels"]["nuclei_alone"]["f1"] > 0.95

"""The benchmark of large slides, on a small one: it has to see what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from histostream.runtime.engines.opener import open_engine
from tests.robustness import mosaic, size
from tests.robustness.mosaic import Mosaic
from tests.robustness.size import Case, height_problems, identity_bundle, run_case, watch

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return identity_bundle(tmp_path_factory.mktemp("bundle"))


def test_the_identity_gives_the_pixels_back(bundle: Path) -> None:
    engine = open_engine(bundle, backend="cpu")
    tiles = np.random.default_rng(0).integers(0, 256, (2, 512, 512, 3), np.uint8)
    np.testing.assert_array_equal(engine.infer(tiles) * 256, tiles.transpose(0, 3, 1, 2))
    engine.close()


def test_a_process_is_watched_to_its_end() -> None:
    code = "import time; a = bytearray(b'x') * (200 << 20); time.sleep(1); del a; time.sleep(1)"
    seen = watch([sys.executable, "-c", f"{code}; raise SystemExit(3)"])
    assert seen.status == 3
    assert 200 < seen.peak_mib < 300
    assert seen.resident_mib[-1][1] < 100


@pytest.mark.full
def test_a_wide_slide_keeps_a_bound_in_column_bands(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end: the bound needs bands here, the process keeps it, and every label is right."""
    monkeypatch.setattr(size, "MAX_MEMORY", "320MiB")
    monkeypatch.setattr(size, "MAX_MEMORY_MIB", 320)
    monkeypatch.setattr(mosaic, "PATCHES", 2)  # quicker to make
    slide = Mosaic(14_000, 1000)
    found = run_case(Case(slide, "identity"), bundle, tmp_path)
    assert found["problems"] == []
    assert found["column_bands"] > 1
    assert 100 < found["peak_mib"] <= 320
    # The check of the labels sees what is wrong.
    monkeypatch.setattr(size, "PRIMARIES", size.PRIMARIES[::-1])
    labels = tmp_path / "out" / "slide" / "labels.tif"
    assert size._wrong_labels(tmp_path / "slide.tif", labels, slide) > 1000


def test_a_bound_that_is_not_kept_is_told(tmp_path: Path) -> None:
    said = {"peak_mib": 1024.5, "peak_memory_mib": 1000.0}
    assert size._memory_problems(said) == ["peak_mib is 1024.5 MiB, the bound 1024"]
    assert size._memory_problems({name: 900.0 for name in said}) == []


def test_tissue_that_is_missed_and_glass_that_is_not_are_counted() -> None:
    tissue = np.zeros((4, 5), np.bool_)
    tissue[1, 1] = True
    side = 8
    found = np.kron(tissue, np.ones((side, side), np.bool_))
    assert size._misplaced(found, tissue, side) == (0, 0)
    assert size._misplaced(~found, tissue, side) == (1, 11)  # of 19, 8 lie beside the tissue
    # Where the last patches stick out of the slide, their middles are not on it.
    assert size._misplaced(found[:-side], tissue, side) == (0, 0)


def test_memory_that_grows_with_the_height_is_told() -> None:
    def runs(*peaks: float) -> dict[str, dict[str, object]]:
        return {f"height-{i}": {"height": i, "peak_mib": peak} for i, peak in enumerate(peaks)}

    assert height_problems(runs(400, 430, 405)) == []
    assert height_problems({}) == []
    (problem,) = height_problems(runs(400, 410, 500))
    assert "not flat in height" in problem


def test_the_shipped_result_kept_its_bounds() -> None:
    path = Path(size.__file__).parent / "results" / "size-cpu.json"
    runs = json.loads(path.read_text())["runs"]
    assert {name for name, case in size.CASES.items() if case.by_default} <= set(runs)
    assert all(said["problems"] == [] for said in runs.values())
    assert height_problems(runs) == []

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from histostream.benchmarks.tables import (
    MARKED,
    accuracy_adaptation,
    accuracy_digits,
    accuracy_objects,
    accuracy_painted,
    filled,
)

Table = Callable[[dict[str, Any]], Iterator[list[str]]]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_the_tables_of_the_documents_are_those_of_the_result_files(path: Path) -> None:
    text = path.read_text()
    assert filled(text, ROOT) == text


def test_a_table_is_made_from_a_result_file(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "accuracy-nuclei.json").write_text(
        '{"scores": {"fp32": {"tnbc": {"dice_pooled": 0.5}, "monuseg-test": {"dice_pooled": 1}}}}'
    )
    start = "a\n<!-- table: benchmarks/results/accuracy-nuclei.json -->\n"
    text = filled(f"{start}stale\n<!-- end of table -->\nb", tmp_path)
    assert "stale" not in text
    assert "| fp32 | 0.5000 | 1.0000 |\n<!-- end of table -->\nb" in text
    assert filled(text, tmp_path) == text
    assert MARKED.search(text)


def test_adaptation_tables_score_the_last_class_over_the_runs_of_an_algorithm() -> None:
    def run(algorithm: str, dice: float) -> dict[str, object]:
        of = {"f": {"rest": 0.9, "thing": dice}, "jaccard": {"rest": 0.8, "thing": dice / 2}}
        scores = {"classes": ["rest", "thing"], "pooled": of, "per_image_mean": of}
        return {"algorithm": algorithm, "scores": scores}

    rows = accuracy_adaptation({"cells": {"a": run("x", 0.5), "b": run("y", 0), "c": run("x", 0.7)}})
    assert [*rows][1:] == [
        ["x", "60.0 ± 14.1", "30.0 ± 7.1", "60.0 ± 14.1", "30.0 ± 7.1", "2"],
        ["y", "0.0", "0.0", "0.0", "0.0", "1"],
    ]


def test_generative_tables_have_a_row_for_each_algorithm() -> None:
    def table(make: Table, *scores: dict[str, Any]) -> list[list[str]]:
        cells = {str(i): {"algorithm": "x", "scores": s} for i, s in enumerate(scores)}
        return [*make({"cells": cells})][1:]

    objects = {
        "objects": {"dice_per_image_mean": 0.5, "f1_pooled": 0.25, "hausdorff_px_per_image_mean": 99.0},
        "pooled": {"mean_iou": 0.75, "accuracy": 0.875},
    }
    assert table(accuracy_objects, objects) == [["x", "0.500", "0.250", "99.0", "75.0", "87.5", "1"]]
    floor = {"cells": {"0": {"algorithm": "x", "scores": objects}}, "references": {"all": objects}}
    assert [*accuracy_objects(floor)][2:] == [["all", "0.500", "0.250", "99.0", "75.0", "87.5", ""]]
    digits = {"classes": ["rest", "digit"], "pooled": {"f": {"digit": 0.5}}}
    assert table(accuracy_digits, {**digits, "soft_dice": 0.4}, {**digits, "soft_dice": 0.6}) == [
        ["x", "0.500 ± 0.141", "0.500 ± 0.000", "2"]
    ]
    painted = {"fid": {"painted": 2.0, "real_halves": 0.5}}
    assert table(accuracy_painted, painted) == [
        ["x", "2.0000", "1"],
        ["halves of the true images", "0.5000", ""],
    ]

from __future__ import annotations

from pathlib import Path

import pytest

from histostream.benchmarks.tables import MARKED, accuracy_adaptation, filled

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_the_tables_of_the_documents_are_those_of_the_result_files(path: Path) -> None:
    text = path.read_text()
    assert filled(text, ROOT / "benchmarks" / "results") == text


def test_a_table_is_made_from_a_result_file(tmp_path: Path) -> None:
    (tmp_path / "accuracy-nuclei.json").write_text(
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

    rows = accuracy_adaptation(
        {"cells": {"a": run("x", 0.5), "b": run("y", 0), "c": run("x", 0.7)}}
    )
    assert [*rows][1:] == [
        ["x", "60.0 ± 14.1", "30.0 ± 7.1", "60.0 ± 14.1", "30.0 ± 7.1", "2"],
        ["y", "0.0", "0.0", "0.0", "0.0", "1"],
    ]

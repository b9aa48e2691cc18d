"""The log of a run: every step once, whatever was killed when."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from histostream.training.log import Log
from histostream.wsi import files
from histostream.wsi.errors import OutputError


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, first: int, last: int, start: int = 0) -> None:
    with Log(path, start) as log:
        for step in range(first, last + 1):
            log.write({"step": step, "seconds": step / 3, "l1": 1 / step, "rate_g": 2e-7, "dice": None})


def test_rows_behind_the_checkpoint_are_cut_and_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write(path, 1, 7)
    write(path, 5, 9, start=4)
    found = rows(path)
    assert [row["step"] for row in found] == [str(i) for i in range(1, 10)]
    assert found[4] == {"step": "5", "seconds": "1.7", "l1": "0.2", "rate_g": "2e-07", "dice": ""}


def test_a_row_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    """Of step 12 is left "1", which is a step before the checkpoint."""
    path = tmp_path / "log.csv"
    write(path, 1, 11)
    whole = path.read_bytes()
    path.write_bytes(whole + b"1")
    write(path, 12, 12, start=11)
    assert [row["step"] for row in rows(path)] == [str(i) for i in range(1, 13)]
    path.write_bytes(whole[:-3])  # the last row that counts is damaged: all before it stay
    write(path, 12, 12, start=11)
    assert [row["step"] for row in rows(path)] == [*(str(i) for i in range(1, 11)), "12"]


def test_a_column_that_comes_later_is_empty_before(tmp_path: Path) -> None:
    """As in a run that an older version began."""
    path = tmp_path / "log.csv"
    path.write_text('step,seconds,l1,"a, b"\r\n1,0.5,0.25,3\r\n')
    with Log(path, 1) as log:
        log.write({"step": 2, "seconds": 1.0, "l1": 0.125, "dice_x": 0.5})
        log.write({"step": 3, "seconds": 1.0, "l1": 0.125, "dice_x": None})
    assert rows(path) == [
        {"step": "1", "seconds": "0.5", "l1": "0.25", "a, b": "3", "dice_x": ""},
        {"step": "2", "seconds": "1.0", "l1": "0.125", "a, b": "", "dice_x": "0.5"},
        {"step": "3", "seconds": "1.0", "l1": "0.125", "a, b": "", "dice_x": ""},
    ]


def test_the_last_row_can_be_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with Log(path, 0) as log:
        assert log.take_last() == {}
        log.write({"step": 1, "seconds": 0.0, "l1": 2.0, "dice": None})
        assert log.take_last() == {"step": 1, "seconds": 0, "l1": 2}
        log.write({"step": 1, "seconds": 0.0, "l1": 2.0, "dice": 0.5})
        assert [math.isnan(v) for v in log.columns["dice"]] == [False]
    assert [row["dice"] for row in rows(path)] == ["0.5"]


def test_a_log_is_rewritten_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    write(path, 1, 5)
    before = path.read_bytes()

    def full(handle: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OutputError, match="no room to write"):
        write(path, 4, 4, start=3)
    assert path.read_bytes() == before

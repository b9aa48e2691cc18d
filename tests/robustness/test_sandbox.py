"""The judge sees every way of failing that it looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.hostile.case import Case
from tests.robustness.sandbox import RESULTS, Sandbox, judge

CLEAR = "histo-infer: slide.tif: the file is empty; copy it again\n"


def answer(**said: Any) -> dict[str, Any]:
    return {
        "status": 1,
        "seconds": 0.1,
        "peak_mib": 90.0,
        "address_mib": 600.0,
        "timed_out": False,
        "stderr": CLEAR,
        "events": [],
        **said,
    }


def results(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("{}")


def test_one_clear_line_is_a_refusal(tmp_path: Path) -> None:
    assert judge(answer(), tmp_path, {}, {}).verdict == "refused"
    found = judge(answer(stderr="histo-infer: x: out of memory; stop\n"), tmp_path, {}, {})
    assert found.out_of_memory


def test_whole_results_are_accepted(tmp_path: Path) -> None:
    results(tmp_path / "out" / "slide", "run.json", *RESULTS)
    assert judge(answer(status=0, stderr=""), tmp_path, {}, {}).verdict == "accepted"


@pytest.mark.parametrize(
    ("said", "failure"),
    [
        ({"status": -11}, "ended by SIGSEGV"),
        ({"timed_out": True, "status": -9}, "still running"),
        (
            {"stderr": "Traceback (most recent call last):\nValueError: x\n"},
            "traceback: ValueError",
        ),
        ({"stderr": ""}, "no clear message"),
        ({"stderr": "histo-infer: \n"}, "no clear message"),
        ({"stderr": "Segmentation fault\n"}, "no clear message"),
        ({"stderr": "histo-infer: " + "x" * 5000}, "a line of 5013 characters"),
        ({"events": ["subprocess.Popen 'gs'"]}, "did subprocess.Popen 'gs'"),
        ({"status": 0}, "status 0 and 0 folders"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failure_is_seen(tmp_path: Path, said: dict[str, Any], failure: str) -> None:
    found = judge(answer(**said), tmp_path, {}, {})
    assert found.verdict == "failed"
    assert failure in found.message


def test_results_in_part_are_seen(tmp_path: Path) -> None:
    results(tmp_path / "out" / "slide", "run.json", *RESULTS[1:])
    assert "results without ['labels.tif']" in judge(answer(), tmp_path, {}, {}).message


def test_a_leftover_is_seen(tmp_path: Path) -> None:
    results(tmp_path / "out" / "slide", "run.json", *RESULTS, ".labels.tif.part")
    found = judge(answer(status=0, stderr=""), tmp_path, {}, {})
    assert "left ['.labels.tif.part']" in found.message


def test_a_change_outside_of_the_output_folder_is_seen(tmp_path: Path) -> None:
    before, after = {"case/a": b"1"}, {"case/a": b"2", "b": None}
    assert "['b', 'case/a']" in judge(answer(), tmp_path, before, after).message


def test_a_sandbox_sees_what_the_command_does(sandbox: Sandbox) -> None:
    # An output folder above the case is what no input may lead to, and what a user may ask for.
    case = Case("", "", {"slide.tif": b"x"}, ("--out", "../elsewhere", "slide.tif", "--threads", "0"))
    assert sandbox.run(case).verdict == "refused"
    bundle = json.dumps({"schema": 1}).encode()
    case = Case("", "", {"b/card.json": bundle}, ("--model", "b", "--nonsense", "slide.tif"))
    found = sandbox.run(case)
    assert found.verdict == "failed"  # click's usage message is not our one line
    assert "no clear message" in found.message

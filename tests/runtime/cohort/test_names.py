"""Names of output folders: no two slides share one, and each keeps the one that it has."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from histostream.runtime.cohort.inputs import find_inputs
from histostream.runtime.cohort.worker import LocalExecutor
from histostream.runtime.options import Options
from histostream.runtime.slide_job import SlideInput, SlideJob
from tests.runtime.conftest import IdentityEngine, random_pixels, run_cohort, write_slide

OPTIONS = Options(tissue=False, overlap_px=16)


def names(top: Path, *paths: str, out: Path | None = None) -> list[str]:
    return [slide.name for slide in find_inputs([str(top / path) for path in paths], out)]


def finished(out: Path, name: str, slide: Path) -> None:
    """Leave what a finished run of a slide records of it."""
    info = slide.stat()
    (out / name).mkdir(parents=True)
    record = {"source": str(slide), "bytes": info.st_size, "modified": str(info.st_mtime_ns)}
    (out / name / "run.json").write_text(json.dumps({"slide": record}))


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a/slide.svs", "b/slide.svs", "c/other.svs"], ["a_slide", "b_slide", "other"]),
        (["p1/s/x.svs", "p2/s/x.svs", "y.svs"], ["p1_s_x", "p2_s_x", "y"]),
        (["p1/s/t/x.svs", "p2/s/t/x.svs"], ["p1_s_t_x", "p2_s_t_x"]),
        (["a/x.svs", "a/x.ndpi"], ["a_x.svs", "a_x.ndpi"]),
        (["a/x.svs", "a/x.ndpi", "b/x.svs"], ["a_x.svs", "a_x.ndpi", "b_x"]),
        (["A/Case.svs", "b/case.svs"], ["A_Case", "b_case"]),
        (["a/x.svs", "b/x.svs", "c/a_x.svs"], ["a_x.svs", "b_x", "a_x"]),
        (["a/e\u0301.svs", "b/\u00e9.svs"], ["a_e\u0301", "b_\u00e9"]),
        (["a/x/1.dcm", "b/x/1.dcm"], ["a_x_1", "b_x_1"]),
    ],
)
def test_slides_of_one_name_are_told_apart_by_their_folders_in_any_order(
    tmp_path: Path, paths: list[str], expected: list[str]
) -> None:
    for order in itertools.permutations(range(len(paths))):
        assert names(tmp_path, *(paths[i] for i in order)) == [expected[i] for i in order]


@pytest.mark.parametrize(
    "paths",
    [
        [f"{p}/a/b/c/d/e/x.svs" for p in "123"],
        ["a/x.svs", "a/X.SVS", "a/x.Svs"],
        [f"{p * 200}/x.svs" for p in "ab"],
        [f"{'n' * 240}{p}/{'m' * 200}.svs" for p in "ab"],
    ],
    ids=["deep", "case", "long folder", "long name"],
)
def test_what_folders_do_not_tell_apart_a_digest_does(tmp_path: Path, paths: list[str]) -> None:
    found = names(tmp_path, *paths)
    assert len({name.casefold() for name in found}) == len(paths)
    assert names(tmp_path, *reversed(paths)) == found[::-1]
    assert all(len(os.fsencode(name)) < 230 for name in found)


def test_remote_slides_are_told_apart_by_their_folders_too() -> None:
    found = find_inputs(["s3://bucket/a/x.svs", "s3://bucket/b/x.svs", "gs://other/b/x.svs", "https://h/c/x.svs"])
    assert [slide.name for slide in found] == ["a_x", "bucket_b_x", "other_b_x", "c_x"]


def test_slides_that_are_added_later_rename_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.svs").write_bytes(folder.encode() * 9)
    assert names(tmp_path, "a/x.svs", out=out) == ["x"]
    finished(out, "x", tmp_path / "a" / "x.svs")
    assert names(tmp_path, "b/x.svs", "a/x.svs", out=out) == ["b_x", "x"]
    finished(out, "b_x", tmp_path / "b" / "x.svs")
    assert names(tmp_path, "b/x.svs", out=out) == ["b_x"], "alone it has the folder that it had in company"
    assert names(tmp_path, "a/x.svs", out=out) == ["x"]


def test_an_interrupted_run_keeps_its_folder_too(tmp_path: Path) -> None:
    out, slides = tmp_path / "out", [tmp_path / folder / "x.tif" for folder in "ab"]
    for seed, path in enumerate(slides):
        path.parent.mkdir()
        write_slide(path, random_pixels(300, 300, seed))
    executor = LocalExecutor(IdentityEngine)
    job = SlideJob(find_inputs([str(slides[0])], out)[0], out, OPTIONS)
    asked: list[bool] = []

    def stopping() -> bool:  # after the first strips
        asked.append(True)
        return len(asked) > 3

    found = run_cohort([job], executor, stopping=stopping)
    executor.close()
    assert found[0].status == "stopped"
    assert (out / "x" / ".journal").is_dir()
    assert names(tmp_path, "b/x.tif", "a/x.tif", out=out) == ["b_x", "x"]
    assert names(tmp_path, "b/x.tif", out=out) == ["b_x"], "the first slide is still to be continued"


def test_the_folder_of_another_slide_is_not_used_while_that_slide_exists(tmp_path: Path) -> None:
    out, slide = tmp_path / "out", tmp_path / "a" / "x.svs"
    slide.parent.mkdir()
    slide.write_bytes(b"one")
    finished(out, "x", slide)
    (tmp_path / "b").mkdir()
    slide.rename(tmp_path / "b" / "x.svs")
    assert names(tmp_path, "b/x.svs", out=out) == ["x"], "a slide that was moved keeps its result"
    slide.write_bytes(b"another")
    assert names(tmp_path, "a/x.svs", out=out) == ["x"], "the path is that of the result"
    (tmp_path / "b" / "x.svs").write_bytes(b"a third")
    assert names(tmp_path, "b/x.svs", out=out) == ["b_x"]


def test_names_that_a_user_gave_are_kept_and_shared_ones_are_refused_each(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("path,name\na/x.svs,x\nb/x.svs,\nc.svs,same\nd.svs,Same\ne.svs,\n")
    found = find_inputs([str(path)])
    assert [(slide.name, bool(slide.problem)) for slide in found] == [
        ("x", False),
        ("b_x", False),
        ("same", True),
        ("Same", True),
        ("e", False),
    ]
    assert "c.svs: another slide has the name same too; give one of them another name" in found[2].problem


def test_a_cohort_of_slides_of_one_name_is_run_and_says_the_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = [tmp_path / folder / "slide.tif" for folder in ("site-a", "site-b")]
    for seed, path in enumerate(slides):
        path.parent.mkdir()
        write_slide(path, random_pixels(200, 100, seed))
    out = tmp_path / "out"

    def outcomes(*paths: Path) -> list[tuple[str, str]]:
        jobs = [SlideJob(slide, out, OPTIONS) for slide in find_inputs(list(map(str, paths)), out)]
        executor = LocalExecutor(IdentityEngine)
        found = run_cohort(jobs, executor, record=out)
        executor.close()
        return [(jobs[i].slide.name, found[i].status) for i in range(len(jobs))]

    assert outcomes(slides[0]) == [("slide", "done")]
    both = [("slide", "unchanged"), ("site-b_slide", "done")]
    assert outcomes(*slides) == both
    assert outcomes(*reversed(slides)) == [("site-b_slide", "unchanged"), ("slide", "unchanged")]
    lines = json.loads((out / "cohort.json").read_text())["slides"]
    assert "its folder is site-b_slide, because another slide has the name slide too" in lines[0]["reason"]
    record = json.loads((out / "site-b_slide" / "run.json").read_text())
    assert record["slide"]["source"] == str(slides[1])


def test_a_slide_with_a_problem_is_one_failed_line_of_the_cohort(tmp_path: Path) -> None:
    good = write_slide(tmp_path / "good.tif", random_pixels(100, 100))
    inputs = [SlideInput("x", "x", problem="x: has no path"), SlideInput(str(good), "good")]
    executor = LocalExecutor(IdentityEngine)
    jobs = [SlideJob(slide, tmp_path / "out", OPTIONS) for slide in inputs]
    found = run_cohort(jobs, executor, record=tmp_path / "out")
    executor.close()
    assert [(found[i].status, found[i].reason) for i in (0, 1)] == [("failed", "x: has no path"), ("done", "")]
    assert not (tmp_path / "out" / "x").exists()

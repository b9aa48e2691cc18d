"""Windows paths in lists: taken for what they name here, else one line with the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from histostream.runtime.cohort import windows_paths
from histostream.runtime.cohort.inputs import InputError, find_inputs
from histostream.runtime.slide_job import SlideInput

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows paths are paths there")


def listed(folder: Path, *paths: str, column: str = "path") -> list[SlideInput]:
    (folder / "list.csv").write_text("\n".join([column, *paths]) + "\n")
    return find_inputs([str(folder / "list.csv")])


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("path", "file"),
    [
        (r"slides\a.svs", "slides/a.svs"),
        (r"C:\study\slides\a.svs", "slides/a.svs"),
        (r"c:\a.svs", "a.svs"),
        ("D:/study/slides/a.svs", "study/slides/a.svs"),
        (r"\\server\share\slides\a.svs", "slides/a.svs"),
        (r"\\server\share\slides\a.svs", "share/slides/a.svs"),
        (r".\a.svs", "a.svs"),
        (r"slides\größe b.svs", "slides/größe b.svs"),
        (r"C:\study\series", "series/1.dcm"),
    ],
)
def test_a_windows_path_is_looked_for_below_the_list(tmp_path: Path, path: str, file: str) -> None:
    touch(tmp_path, file)
    (slide,) = listed(tmp_path, path)
    expected = tmp_path / file if file.endswith(".svs") else (tmp_path / file).parent
    assert Path(slide.source) == expected
    assert slide.name == expected.stem
    assert slide.note == f"{path} was taken to be {slide.source}"


def test_the_longest_part_of_a_windows_path_that_names_something_counts(tmp_path: Path) -> None:
    touch(tmp_path, "study/a.svs", "a.svs")
    assert listed(tmp_path, r"C:\study\a.svs")[0].source == str(tmp_path / "study" / "a.svs")


def test_a_drive_is_looked_for_where_the_subsystem_for_linux_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "mnt/c/study/a.svs")
    monkeypatch.setattr(windows_paths, "MOUNTS", tmp_path / "mnt")
    assert listed(tmp_path, r"C:\study\a.svs")[0].source == str(tmp_path / "mnt" / "c" / "study" / "a.svs")


def test_a_file_whose_name_has_a_backslash_is_that_file(tmp_path: Path) -> None:
    touch(tmp_path, r"a\b.svs", "a/b.svs", "b.svs")
    (tmp_path / "list.csv").write_text("path,name\na\\b.svs,x\n")
    (slide,) = find_inputs([str(tmp_path / "list.csv")])
    assert (slide.source, slide.note) == (str(tmp_path / r"a\b.svs"), "")


def test_a_windows_path_that_names_nothing_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    touch(tmp_path, "b.svs")
    with pytest.raises(InputError) as caught:
        listed(tmp_path, r"C:\study\a.svs")
    message = str(caught.value)
    assert (
        rf"list.csv, line 2: C:\study\a.svs: a Windows path, and there is no study/a.svs nor a.svs in {tmp_path};"
        in message
    )
    assert "write the path that the slide has on this computer" in message
    first, second = listed(tmp_path, r"C:\study\a.svs", "b.svs")
    assert (bool(first.problem), bool(second.problem)) == (True, False)
    touch(tmp_path, "a.svs")  # the remedy: the slides below the list's folder
    assert not any(slide.problem for slide in listed(tmp_path, r"C:\study\a.svs", "b.svs"))


def test_two_windows_paths_are_not_taken_for_one_file(tmp_path: Path) -> None:
    touch(tmp_path, "slide.svs", "other.svs")
    found = listed(tmp_path, r"C:\case 1\slide.svs", r"C:\case 2\slide.svs", "other.svs")
    assert ["which another line of the list names too" in slide.problem for slide in found] == [True, True, False]


def test_no_parent_folder_is_searched_for_a_windows_path(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "lists/x")
    with pytest.raises(InputError, match=r"a Windows path, and there is no a\.svs in "):
        listed(tmp_path / "lists", r"..\a.svs")


def test_regions_of_a_list_may_have_windows_paths_too(tmp_path: Path) -> None:
    touch(tmp_path, "regions/a.geojson", "a.svs")
    (slide,) = listed(tmp_path, r"a.svs,C:\x\regions\a.geojson", column="path,roi")
    assert slide.roi == str(tmp_path / "regions" / "a.geojson")


def test_an_argument_may_be_a_windows_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "slides/a.svs", "slides/b.svs")
    monkeypatch.chdir(tmp_path)
    assert [slide.name for slide in find_inputs([r"C:\study\slides"])] == ["a", "b"]
    assert [slide.source for slide in find_inputs([r"slides\a.svs"])] == ["slides/a.svs"]

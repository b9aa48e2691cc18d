"""Inputs: what arguments stand for, in which order and under which names; what is refused."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from histostream.runtime.cohort.inputs import InputError, find_inputs
from histostream.runtime.slide_job import SlideInput, stem_of
from histostream.wsi.errors import SlideError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_in(folder: Path, *arguments: str | Path) -> list[str]:
    """Return what is found, relative to a folder."""
    return [os.path.relpath(s.source, folder) for s in find_inputs([str(a) for a in arguments])]


def listed(folder: Path, text: str | bytes) -> list[SlideInput]:
    path = folder / "cohort.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return find_inputs([str(path)])


def test_files_are_taken_as_they_are_named_even_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "b.odd").touch()
    arguments = [str(tmp_path / name) for name in ("b.odd", "missing.svs", "OS-1.ome.tif")]
    found = find_inputs(arguments)
    assert [slide.source for slide in found] == arguments
    assert [slide.name for slide in found] == ["b", "missing", "OS-1.ome"]


def test_a_folder_stands_for_the_slides_below_it(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b.SVS",
        "a/z.ndpi",
        "a/thumbnail.jpg",
        "a/notes.txt",
        "größe 組織.tif",
        ".hidden.svs",
        ".cache/x.svs",
        "._b.svs",
        "m.mrxs",
        "m/Data0001.dat",
    )
    assert names_in(tmp_path, tmp_path) == ["b.SVS", "größe 組織.tif", "m.mrxs", "a/z.ndpi"]


@pytest.mark.parametrize("mark", ["run.json", ".journal"])
def test_results_of_earlier_runs_are_no_slides(tmp_path: Path, mark: str) -> None:
    touch(tmp_path, "a.svs", "out/a/labels.tif", f"out/a/{mark}", "out/a/deeper/b.tif")
    assert names_in(tmp_path, tmp_path) == ["a.svs"]
    assert names_in(tmp_path, f"{tmp_path}/*.svs", f"{tmp_path}/*") == ["a.svs"]
    with pytest.raises(InputError, match="results of earlier runs are left out"):
        find_inputs([f"{tmp_path}/out/*/labels.tif"])


def test_a_dicom_folder_is_one_slide(tmp_path: Path) -> None:
    touch(tmp_path, "1.2.840.1/a.dcm", "1.2.840.1/b.dcm", "deep/1.2.840.2/a.dcm")
    (series, below) = find_inputs([str(tmp_path)])
    assert (series.name, below.name) == ("1.2.840.1", "1.2.840.2")
    assert find_inputs([series.source]) == [series]
    assert find_inputs([f"{tmp_path}/**/*.dcm"]) == [series, below]


def test_a_folder_of_dicom_and_other_slides_is_ambiguous(tmp_path: Path) -> None:
    touch(tmp_path, "a.dcm", "b.svs")
    with pytest.raises(InputError, match=r"holds DICOM files and other slides \(b\.svs\)"):
        find_inputs([str(tmp_path)])
    assert [bool(slide.problem) for slide in find_inputs([str(tmp_path), "other.svs"])] == [True, False]
    assert names_in(tmp_path, f"{tmp_path}/*") == ["a.dcm", "b.svs"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "data/real/a.svs")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "batch").symlink_to(tmp_path / "data" / "real")
    (tmp_path / "cohort" / "one.svs").symlink_to(tmp_path / "data" / "real" / "a.svs")
    assert names_in(tmp_path, tmp_path / "data") == ["data/real/a.svs"]
    found = names_in(tmp_path, tmp_path / "cohort")
    assert found == ["cohort/one.svs", "cohort/batch/a.svs"]


def test_a_pattern_is_what_no_file_is_called(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].svs", "a1.svs", "deep/er/b.svs", "deep/c.png", "deep/d.txt")
    assert names_in(tmp_path, f"{tmp_path}/a[1].svs") == ["a[1].svs"]
    assert names_in(tmp_path, f"{tmp_path}/a[0-9].svs") == ["a1.svs"]
    assert names_in(tmp_path, f"{tmp_path}/**/*.svs") == ["a1.svs", "a[1].svs", "deep/er/b.svs"]
    assert names_in(tmp_path, f"{tmp_path}/deep/*") == ["deep/c.png", "deep/er/b.svs"]


@pytest.mark.parametrize("argument", ["*.svs", "empty", "empty/**"])
def test_a_pattern_or_folder_without_slides_is_an_error(tmp_path: Path, argument: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no slide found"):
        find_inputs([str(tmp_path / argument)])


def test_a_folder_that_cannot_be_listed_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.svs", "closed/b.svs", "z/c.svs")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if os.fspath(path).endswith("closed"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = find_inputs([str(tmp_path)])
    assert [(slide.name, bool(slide.problem)) for slide in found] == [
        ("a", False),
        (f"{tmp_path}/closed".strip("/").replace("/", "_"), True),
        ("c", False),
    ]
    assert "closed: the folder cannot be listed (Stale file handle)" in found[1].problem
    with pytest.raises(InputError, match="closed: the folder cannot be listed"):
        find_inputs([f"{tmp_path}/closed"])


@pytest.mark.parametrize(
    ("slides", "closed", "expected"),
    [
        (["a.svs"], "notes", [("a.svs", False)]),
        (["a.svs"], "b.dcm", [("a.svs", False), ("b.dcm", True)]),
        ([], "notes", [("", True)]),
        ([], "b.dcm", [("", True)]),
    ],
)
def test_a_file_that_cannot_be_read_does_not_hide_the_slides_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slides: list[str], closed: str, expected: list[tuple[str, bool]]
) -> None:
    touch(tmp_path, "in/" + closed, *(f"in/{name}" for name in slides), "other.svs")
    opened = io.open

    def refusing(file: object, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith(closed):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened(file, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", refusing)
    *found, other = find_inputs([str(tmp_path / "in"), str(tmp_path / "other.svs")])
    assert [(slide.source, bool(slide.problem)) for slide in found] == [
        (str(tmp_path / "in" / name).rstrip("/"), problem) for name, problem in expected
    ]
    assert not other.problem
    assert all("Permission denied" in slide.problem and closed in slide.problem for slide in found if slide.problem)


def test_the_same_slide_is_taken_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "b.svs")
    twice = [str(tmp_path), f"{tmp_path}/a.svs", f"{tmp_path}/./x/../a.svs", f"{tmp_path}/*.svs"]
    assert [slide.name for slide in find_inputs(twice)] == ["a", "b"]


def test_a_slide_named_twice_has_to_be_meant_the_same(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs")
    assert len(listed(tmp_path, "path,mpp\na.svs,0.5\na.svs,.50\n")) == 1
    assert len(listed(tmp_path, "path,roi,name\na.svs,1.json,a1\na.svs,2.json,a2\n")) == 2
    with pytest.raises(InputError, match=r"a\.svs is named twice"):
        listed(tmp_path, "path,mask\na.svs,1.png\na.svs,2.png\n")
    with pytest.raises(InputError, match=r"a\.svs is named twice"):
        listed(tmp_path, "path,mpp\na.svs,0.5\na.svs,0.25\n")
    several = listed(tmp_path, "path,mpp\na.svs,0.5\nb.svs,\na.svs,0.25\n")
    assert ["named twice" in slide.problem for slide in several] == [True, False]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_list_gives_each_slide_its_settings(tmp_path: Path, delimiter: str, encoding: str, newline: str) -> None:
    rows = [
        ["Path", "mpp", "roi", "name", "patient", "größe", "mask"],
        ['"sub/a, b; c.svs"', "0.25", "a.geojson", "first", "7", "groß", "m.png"],
        [],
        ["/abs/b.svs", "", "/abs/b.geojson", "", "", ""],
        ["s3://bucket/c.svs"],
    ]
    text = newline.join(delimiter.join(row) for row in rows)
    assert listed(tmp_path, text.encode(encoding)) == [
        SlideInput(
            f"{tmp_path}/sub/a, b; c.svs",
            "first",
            0.25,
            f"{tmp_path}/a.geojson",
            {"patient": "7", "größe": "groß"},
            mask=f"{tmp_path}/m.png",
        ),
        SlideInput("/abs/b.svs", "b", None, "/abs/b.geojson", {"patient": "", "größe": ""}),
        SlideInput("s3://bucket/c.svs", "c", None, None, {"patient": "", "größe": ""}),
    ]


def test_a_list_of_paths_alone_needs_no_delimiter(tmp_path: Path) -> None:
    assert [s.name for s in listed(tmp_path, "path\na b.svs\n\nc.svs")] == ["a b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: no column `path` \(found: nothing\)"),
        ("slide,mpp\na.svs,1", r"line 1: no column `path` \(found: slide, mpp\)"),
        ("path,path\na,b", "line 1: two columns 'path'"),
        ("path,mpp\n\n", "no slides after the header"),
        ("path,mpp\n,0.5", "line 2: no path of a slide"),
        ("path,mpp\nb\0.svs,", "line 2: no path of a slide"),
        ("path\na,b.svs", "line 2: a cell without a column"),
        ("path,mpp,\na.svs,0.5,x", "line 2: a cell without a column"),
        ("path;mpp\na.svs;0,25", "line 2: mpp '0,25' is not a number from 0.05 to 50"),
        ("path,mpp\na.svs,nan", "line 2: mpp 'nan' is not"),
        ("path,mpp\na.svs,1e999", "line 2: mpp '1e999' is not"),
        ("path,mpp\na.svs,0.04", "line 2: mpp '0.04' is not"),
        ("path,roi\na.svs,https://x/y.json", "line 2: roi 'https://x/y.json' is not a local file"),
        ("path,mask\na.svs,s3://x/y.png", "line 2: mask 's3://x/y.png' is not a local file"),
        ('path\n"a.svs', r"line 2: not a \.csv \(.*\); check the quotes"),
        (b"path\na\nM\xfcller.svs", "line 3: not UTF-8"),
        ("path\na.svs".encode("utf-16"), "line 1: not UTF-8"),
        ("path,name\na.svs,x/y", "line 2: .*'x/y' cannot be the name of a folder of results"),
        ("path,name\na.svs,..", r"line 2: .*'\.\.' cannot be the name"),
        ("path,name\na.svs,.x", r"line 2: .*'\.x' cannot be the name"),
        ("path,name\na.svs,x\\y", r"line 2: .* cannot be the name"),
        ("path,name\na.svs,x\x1by", r"line 2: .*'x\\x1by' cannot be the name"),
    ],
)
def test_a_bad_list_is_refused_by_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"cohort\.csv(, |: ){message}"):
        listed(tmp_path, text)


@pytest.mark.parametrize("row", [",x", "b\0.svs,", "b.svs,x/y", ".svs,", "ftp://host/b.svs,", "https://host/,"])
def test_a_nameless_slide_of_a_list_does_not_stop_the_others(tmp_path: Path, row: str) -> None:
    found = listed(tmp_path, f"path,name\na.svs,\n{row}\nc.svs,\n")
    assert [bool(slide.problem) for slide in found] == [False, True, False]
    assert found[1].name
    assert "\n" not in found[1].problem
    assert [found[0].name, found[2].name] == ["a", "c"]


@pytest.mark.parametrize("name", ["none.csv", "https://host/list.csv"])
def test_a_missing_list_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match=r"\.csv: there is no such local file"):
        find_inputs([name])


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/a/CMU-1.svs?signature=x/y.svs", "CMU-1"),
        ("http://host/gr%C3%B6%C3%9Fe%20b.svs", "größe b"),
        ("s3://bucket/a/OS-1.ome.tif", "OS-1.ome"),
        ("gs://bucket/100%25.svs", "100%25"),
        ("s3://bucket/1.2.840.10008/", "1.2.840.10008"),
    ],
)
def test_a_url_is_named_by_its_last_part(url: str, name: str) -> None:
    assert stem_of(url) == name
    if not url.endswith("/"):
        assert find_inputs([url]) == [SlideInput(url, name)]


@pytest.mark.parametrize(
    "url",
    [
        "https://host/..%2F..",
        "https://host/..%2Fx.svs",
        "https://host/a%00.svs",
        "https://host/%2e%2e",
        "https://host/..%5Cx.svs",
        "https://host/",
        "https://host",
        "s3://bucket/..",
        "ftp://host/a.svs",
    ],
)
def test_a_url_that_ends_with_no_plain_name_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"not a plain file name|no such kind of source"):
        find_inputs([url])


def test_signatures_are_not_shown() -> None:
    first, second = find_inputs(["https://me:pass@h/a/x.svs?key=secret", "https://h/b/x.svs?key=secret"])
    assert (first.name, second.name) == ("a_x", "b_x")
    bad = find_inputs(["https://me:pass@h/?key=secret", "b.svs"])[0]
    assert "secret" not in first.note + second.note + bad.problem + bad.name
    assert bad.problem


def test_a_bucket_that_cannot_be_listed_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> list[str]:
        raise SlideError(f"{url}: no credentials")

    monkeypatch.setattr("histostream.runtime.cohort.inputs.list_files", refuse)
    found = find_inputs(["s3://bucket/", "a.svs"])
    assert [slide.problem for slide in found] == ["s3://bucket/: no credentials", ""]
    with pytest.raises(InputError, match="no credentials"):
        find_inputs(["s3://bucket/"])


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give what a bucket lists; tests/wsi/slides/test_staging.py asks a real server."""
    files: list[str] = []
    monkeypatch.setattr("histostream.runtime.cohort.inputs.list_files", lambda url: files)
    return files


def test_a_folder_of_a_bucket_is_searched_like_a_local_one(bucket: list[str]) -> None:
    names = [
        "a.svs",
        "b/thumbnail.png",
        "b/c.tif",
        "out/a/labels.tif",
        "out/a/run.json",
        "series/1.dcm",
        "series/2.dcm",
        ".x/d.svs",
    ]
    bucket += [f"s3://bucket/{name}" for name in names]
    found = find_inputs(["s3://bucket/"])
    assert [s.source for s in found] == [f"s3://bucket/{n}" for n in ("a.svs", "b/c.tif", "series/")]
    assert [slide.name for slide in found] == ["a", "c", "series"]

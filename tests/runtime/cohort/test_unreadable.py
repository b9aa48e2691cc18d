"""Slides that the system does not give out: one line each, whatever is wrong and where, and the others go on."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from histostream.runtime.cohort.inputs import find_inputs
from histostream.runtime.cohort.worker import LocalExecutor
from histostream.runtime.dry_run import plan_slides
from histostream.runtime.options import Options
from histostream.runtime.outcome import Outcome
from histostream.runtime.slide_job import SlideJob
from histostream.wsi.errors import SlideError
from histostream.wsi.slides.reader import open_slide
from tests.runtime.conftest import IdentityEngine, random_pixels, run_cohort, write_slide

OPTIONS = Options(tissue=False, overlap_px=16)
NUMBERS = [errno.EACCES, errno.EIO, errno.ESTALE]


def run(folder: Path, *names: str) -> list[Outcome]:
    """Run slides of a folder as a cohort."""
    out = folder / "out"
    jobs = [SlideJob(slide, out, OPTIONS) for slide in find_inputs([str(folder / name) for name in names], out)]
    executor = LocalExecutor(IdentityEngine)
    found = run_cohort(jobs, executor, record=out)
    executor.close()
    plans = list(plan_slides(jobs, IdentityEngine()))
    assert [bool(plan.problem) for plan in plans] == [found[i].status == "failed" for i in range(len(jobs))]
    return [found[i] for i in range(len(jobs))]


def check(bad: Outcome, name: str, message: str) -> None:
    assert bad.status == "failed"
    assert "\n" not in bad.reason
    assert "Traceback" not in bad.reason
    assert name in bad.reason
    assert message in bad.reason


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_slide(tmp_path / "good.tif", random_pixels(100, 100))
    write_slide(tmp_path / "bad.tif", random_pixels(300, 200))
    return tmp_path


def refuse(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, error: Callable[[str], OSError | None]) -> None:
    """Let a function of the system fail for the files for which ``error`` returns one."""
    original = getattr(place, name)

    def failing(file: Any, *args: Any, **kwargs: Any) -> Any:
        path = str(Path(f"/proc/self/fd/{file}").readlink()) if isinstance(file, int) and file > 2 else str(file)
        found = error(path)
        if found is not None:
            raise found
        return original(file, *args, **kwargs)

    monkeypatch.setattr(place, name, failing)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are read from /proc")  # noqa: PTH112
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("place", ["stat", "open", "read"])
def test_a_slide_that_fails_at_any_place_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    def error(path: str) -> OSError | None:
        return OSError(number, os.strerror(number), path) if path.endswith("bad.tif") else None

    if place == "stat":
        refuse(monkeypatch, os, "stat", error)
    elif place == "open":
        refuse(monkeypatch, io, "open", error)
        refuse(monkeypatch, builtins, "open", error)
    else:
        refuse(monkeypatch, os, "pread", error)
    good, bad = run(folder, "good.tif", "bad.tif")
    assert good.status == "done"
    check(bad, "bad.tif", os.strerror(number))


@pytest.mark.parametrize("number", NUMBERS)
def test_an_error_of_the_system_anywhere_in_a_run_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(path: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("histostream.runtime.slide_run.open_for_model", failing)
    monkeypatch.setattr("histostream.runtime.dry_run.open_for_model", failing)
    (bad,) = run(folder, "bad.tif")
    check(bad, "bad.tif", f"cannot be read ({os.strerror(number)}); check its permissions")


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and links with names")
@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("pipe.svs", os.mkfifo, "a pipe or device, not a file"),
        ("device.svs", lambda path: Path(path).symlink_to("/dev/zero"), "a pipe or device, not a file"),
        ("broken.svs", lambda path: Path(path).symlink_to("nothing"), "there is no such file"),
        ("loop.svs", lambda path: Path(path).symlink_to(path), os.strerror(errno.ELOOP)),
        ("folder.svs", os.mkdir, "no slide found"),
        ("empty.svs", lambda path: Path(path).touch(), "the file is empty"),
        ("good.tif/inside.svs", lambda path: None, "there is no such file"),
        (f"{'n' * 300}.svs", lambda path: None, os.strerror(errno.ENAMETOOLONG)),
    ],
)
def test_what_is_no_file_is_named_as_what_it_is(
    folder: Path, name: str, make: Callable[[str], object], message: str
) -> None:
    make(str(folder / name))
    good, bad = run(folder, "good.tif", name)
    assert good.status == "done"
    check(bad, name, message)
    with pytest.raises(SlideError):
        open_slide(folder / name)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_entered_is_named(folder: Path) -> None:
    (folder / "closed").mkdir()
    shutil.move(folder / "bad.tif", folder / "closed" / "bad.tif")
    (folder / "closed").chmod(0)
    good, bad = run(folder, "good.tif", "closed/bad.tif")
    (folder / "closed").chmod(0o700)
    assert good.status == "done"
    check(bad, "bad.tif", os.strerror(errno.EACCES))


@pytest.mark.parametrize("suffix", [".mrxs", ".vms"])
def test_a_companion_that_cannot_be_read_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    (folder / f"bad{suffix}").write_text("ImageFile=bad.dat\n")
    (folder / "bad").mkdir()
    (folder / "bad" / "Slidedat.ini").write_text("[GENERAL]\n")
    (folder / "bad.dat").write_bytes(b"x")

    def error(path: str) -> OSError | None:
        stale = path.endswith(("/bad", "bad.dat", "Slidedat.ini"))
        return OSError(errno.ESTALE, os.strerror(errno.ESTALE), path) if stale else None

    refuse(monkeypatch, os, "stat", error)
    good, bad = run(folder, "good.tif", f"bad{suffix}")
    assert good.status == "done"
    check(bad, f"bad{suffix}", os.strerror(errno.ESTALE))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_reader_that_declines_for_the_drive_is_not_taken_for_an_unknown_format(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("histostream.wsi.slides.readers.large_image.open_source", failing)
    (folder / "x.svs").write_bytes(b"some content that no reader knows")
    with pytest.raises(SlideError, match=rf"x\.svs: cannot be read \({os.strerror(number)}\)"):
        open_slide(folder / "x.svs")

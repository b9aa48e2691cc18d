"""Slides on a Ray cluster: here one of this machine, of two workers and one that comes and goes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from histostream.runtime.bundle.card import CardError
from histostream.runtime.cohort import ray as ray_module
from histostream.runtime.cohort.ray import RayExecutor, RayWorker
from histostream.runtime.cohort.worker import LocalExecutor, Worker
from histostream.runtime.engines.base import EngineError, open_engine
from histostream.runtime.options import Options
from histostream.runtime.outcome import Outcome
from histostream.runtime.slide_job import SlideInput, SlideJob
from histostream.wsi.outputs.folder import LOCK_FILE
from histostream.wsi.outputs.lock import Holder, Lock, LockedError
from histostream.wsi.synthetic import SyntheticSlide
from tests.runtime.conftest import PlaceDependentEngine, random_pixels, write_slide

ray_module._keep_to_this_machine()  # Ray reads how when it is imported
ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.full, pytest.mark.xdist_group("ray")]

OPTIONS = Options(tissue=False, batch=1)
SAME = ("labels.tif", "summary.csv", "overview.png")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Start a Ray with three CPU slots, however many CPUs there are."""
    folder = ray_module._short_folder()
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        object_store_memory=ray_module.STORE_BYTES,
        _temp_dir=str(folder / "r"),
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def crew(cluster: None, tiny_bundle: Path) -> Iterator[RayExecutor]:
    found = RayExecutor(tiny_bundle, "local", workers=2)
    yield found
    found.close()


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a slide that takes seconds, and two that do not."""
    folder = tmp_path_factory.mktemp("slides")
    sizes = {"large": (1300, 4000), "small": (700, 600), "wide": (1300, 500)}
    for i, (name, size) in enumerate(sizes.items()):
        SyntheticSlide(*size, mpp=0.5, seed=i).write(folder / f"{name}.tif")
    return [folder / f"{name}.tif" for name in sizes]


@pytest.fixture(scope="module")
def expected(slides: list[Path], tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of one worker in this process."""
    out = tmp_path_factory.mktemp("expected")
    crew = LocalExecutor(lambda: open_engine(tiny_bundle, backend="cpu"))
    assert {o.status for o in all_of(crew, tasks(slides, out)).values()} == {"done"}
    crew.close()
    return out


def tasks(slides: list[Path], out: Path) -> list[SlideJob]:
    return [SlideJob(SlideInput(str(path), path.stem), out, OPTIONS) for path in slides]


def all_of(
    crew: RayExecutor | LocalExecutor, wanted: list[SlideJob], stopping: Callable[[], bool] = lambda: False
) -> dict[int, Outcome]:
    return dict(crew.segment_all(wanted, report=lambda i: lambda done, total: None, stopping=stopping))


def assert_same(out: Path, expected: Path, slides: list[Path]) -> None:
    for path in slides:
        for name in SAME:
            one, other = out / path.stem / name, expected / path.stem / name
            assert one.read_bytes() == other.read_bytes(), one
        assert not list((out / path.stem).glob(".*"))


def processes_of(crew: RayExecutor) -> set[int]:
    """Return the process numbers of the workers that are there."""
    return {member.pid for member in crew._members}


def strips_in(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob(".journal/*.strips"))


def holder_of(folder: Path) -> int | None:
    """Return which process is at work in a slide's folder."""
    try:
        return int(json.loads((folder / LOCK_FILE).read_text())["pid"])
    except (FileNotFoundError, ValueError):
        return None


# ------------------------------------------------------------------------------ the same bits


def test_two_workers_write_the_same_bytes_as_one_in_this_process(
    crew: RayExecutor, slides: list[Path], expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(slides[0].parent)
    relative = [Path(path.name) for path in slides]
    out = Path(os.path.relpath(tmp_path))
    seen: list[tuple[int, int]] = []
    found = dict(
        crew.segment_all(
            tasks(relative, out),
            stopping=lambda: False,
            report=lambda i: lambda done, total: seen.append((done, total)),
        )
    )
    assert [found[i].status for i in range(3)] == ["done"] * 3, found
    assert_same(tmp_path, expected, slides)
    assert any(0 < done < total for done, total in seen)
    assert " x 2 on Ray (" in crew.name
    assert crew.name.startswith(crew.engine_name)
    assert len(processes_of(crew)) == 2


def test_what_is_done_is_not_done_again(crew: RayExecutor, slides: list[Path], tmp_path: Path) -> None:
    wanted = tasks(slides[1:2], tmp_path)
    assert [all_of(crew, wanted)[0].status for _ in range(2)] == ["done", "unchanged"]


def test_a_slide_that_fails_fails_alone(crew: RayExecutor, slides: list[Path], expected: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"no slide")
    found = all_of(crew, tasks([broken, *slides[1:]], tmp_path / "out"))
    assert [found[i].status for i in range(3)] == ["failed", "done", "done"]
    assert str(broken) in found[0].reason
    assert_same(tmp_path / "out", expected, slides[1:])


def test_a_stop_keeps_what_is_finished_and_the_crew_goes_on_from_there(
    crew: RayExecutor, slides: list[Path], expected: Path, tmp_path: Path
) -> None:
    wanted = tasks(slides[:1], tmp_path)
    found = all_of(crew, wanted, lambda: strips_in(tmp_path / "large") > 0)
    assert found[0].status == "stopped"
    assert strips_in(tmp_path / "large") > 0
    assert all_of(crew, wanted, lambda: True) == {}
    assert all_of(crew, wanted)[0].status == "done"
    assert json.loads((tmp_path / "large" / "run.json").read_text())["resumed"]["runs"] == 2
    assert_same(tmp_path, expected, slides[:1])


# --------------------------------------------------------------------------------- lost workers


def test_the_slides_of_a_killed_worker_are_gone_on_with_and_it_is_started_again(
    crew: RayExecutor, slides: list[Path], expected: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_in_the_middle() -> bool:
        pid = holder_of(tmp_path / "large")
        if not killed and pid is not None and strips_in(tmp_path / "large") > 0:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return False

    before = processes_of(crew)
    found = all_of(crew, tasks(slides, tmp_path), kill_in_the_middle)
    assert [found[i].status for i in range(3)] == ["done"] * 3, found
    assert set(killed) < before
    assert json.loads((tmp_path / "large" / "run.json").read_text())["resumed"]["runs"] == 2
    assert_same(tmp_path, expected, slides)
    for i in range(20):  # until the one in its place is there
        if len(processes_of(crew)) == 2:
            break
        assert all_of(crew, tasks(slides[1:], tmp_path / str(i)))[0].status == "done"
    after = processes_of(crew)
    assert len(after) == 2
    assert after.isdisjoint(killed)


def test_a_slide_that_takes_two_workers_along_is_given_up(
    crew: RayExecutor, slides: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed: set[int] = set()

    def kill() -> bool:
        pid = holder_of(tmp_path / "large")
        if pid is not None and pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return False

    found = all_of(crew, tasks(slides[:2], tmp_path), kill)
    assert [found[i].status for i in (0, 1)] == ["failed", "done"]
    assert "was lost, as was one before it" in found[0].reason
    assert "\n" not in found[0].reason
    assert len(killed) == 2
    assert "was lost" in caplog.text


def test_slides_that_nobody_is_left_for_have_failed(
    crew: RayExecutor, slides: list[Path], tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = RayExecutor(tiny_bundle, "local", workers=1)
    monkeypatch.setattr(ray_module, "START_S", -1.0)  # nobody comes in its place in time
    os.kill(processes_of(one).pop(), signal.SIGKILL)
    found = all_of(one, tasks(slides[1:], tmp_path))
    one.close()
    assert [found[i].status for i in (0, 1)] == ["failed"] * 2
    assert "no worker is left on the cluster" in found[0].reason


def test_a_cluster_that_is_lost_is_one_clear_line(
    crew: RayExecutor, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(refs: list) -> list:
        raise ray.exceptions.RaySystemError("long story\nconnection closed.")

    monkeypatch.setattr(crew, "_wait", wait)
    with pytest.raises(EngineError, match=r"was lost \(.*connection closed\); .* repeat the command"):
        all_of(crew, tasks(slides[1:2], tmp_path))


def test_what_a_worker_warns_of_reaches_the_user() -> None:
    ours = logging.getLogger("histostream")
    before = list(ours.handlers)
    try:
        worker = RayWorker()
        logging.getLogger("histostream.runtime.engines.base").warning("a %s is here", "GPU")
        assert worker.status(False).warnings == ["a GPU is here"]
        assert worker.status(False).warnings == []
    finally:
        ours.handlers = before


def test_a_lock_is_taken_over_from_a_process_of_another_host_that_is_known_to_be_gone(
    tmp_path: Path,
) -> None:
    elsewhere = replace(Holder.here(), host="elsewhere", machine="another boot", token="t")
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({k: getattr(elsewhere, k) for k in elsewhere.__slots__}))
    with pytest.raises(LockedError, match="elsewhere"), Lock(path):
        pass
    other = (elsewhere.machine, elsewhere.pid, elsewhere.started + 1)  # its number used again
    with pytest.raises(LockedError), Lock(path, (other,)):
        pass
    with Lock(path, (elsewhere.process,)):
        assert json.loads(path.read_text())["host"] != "elsewhere"


def test_a_task_carries_who_is_gone_to_the_lock(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "slide.tif", random_pixels(300, 200))
    elsewhere = replace(Holder.here(), host="elsewhere", machine="another boot", token="t")
    (tmp_path / "out" / "slide").mkdir(parents=True)
    path = tmp_path / "out" / "slide" / LOCK_FILE
    path.write_text(json.dumps({k: getattr(elsewhere, k) for k in elsewhere.__slots__}))
    worker = Worker(PlaceDependentEngine)
    (task,) = tasks([slide], tmp_path / "out")
    assert worker.segment(task).status == "elsewhere"
    assert worker.segment(replace(task, dead_processes=(elsewhere.process,))).status == "done"
    worker.close()


# ------------------------------------------------------------------------- what cannot be had


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"backend": "cuda"},
            r"no room for 1 worker of 1 GPU: it has no GPUs \(.+\); use --back",
        ),
        ({"backend": "tensorrt", "workers": 2}, r"2 workers of 1 GPU: it has no GPUs"),
        ({"workers": 4}, r"no room for 4 workers of 1 CPU: it has 3 CPUs \(.+\); use --workers 3"),
        ({"workers": 2, "threads": 2}, r"2 workers of 2 CPU: it has 3 CPUs .*--workers 1 or few"),
        ({"threads": 99}, r"1 worker of 99 CPU: it has 3 CPUs .*; use fewer --threads"),
        ({"workers": 0}, "--workers 0: use 1 or more"),
    ],
)
def test_more_than_the_cluster_has_is_refused_at_once(cluster: None, tiny_bundle: Path, how: dict, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(EngineError, match=words) as caught:
        RayExecutor(tiny_bundle, "local", **how)
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value)


def test_a_cluster_that_others_have_taken_gives_what_it_has_or_says_so(
    crew: RayExecutor, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_module, "JOIN_S", 0.5)
    one = RayExecutor(tiny_bundle, "local", workers=2)  # the other crew has two of three
    try:
        assert " x 1 on Ray" in one.name
        assert "1 of 2 workers were started" in caplog.text
        monkeypatch.setattr(ray_module, "START_S", 1.0)
        with pytest.raises(EngineError, match=r"within 1 s: other jobs use the Ray cluster \(0 CPUs"):
            RayExecutor(tiny_bundle, "local", workers=1)
    finally:
        one.close()


def test_a_bundle_that_does_not_exist_is_refused_before_ray_is_asked(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="nowhere"):
        RayExecutor(tmp_path / "nowhere", "local")


def test_a_bundle_that_is_missing_on_a_host_names_the_host(
    crew: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_module, "read_card", lambda bundle: crew.card)
    with pytest.raises(EngineError, match=f"host {socket.gethostname()}: .*nowhere") as caught:
        RayExecutor(tmp_path / "nowhere", "local", workers=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "--ray 127.0.0.1:1: no server answers .*ray start --head"),
        ("ray://127.0.0.1:1", "no server answers"),
        ("nonsense", "'nonsense': not an address; write HOST:6379"),
        ("host:port", "not an address"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_clear_line(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, address: str, words: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(EngineError, match=words):
        RayExecutor(tiny_bundle, address)


def test_without_ray_the_error_says_what_to_install(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"--ray needs Ray: .*\[ray\]"):
        RayExecutor(tiny_bundle, "local")


# ----------------------------------------------------------------------------------- the command


@pytest.fixture
def marked() -> Iterator[dict[str, str]]:
    """Return an environment whose heirs are known; afterwards no process and no file is left."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h", dir="/tmp")))
        mark = uuid.uuid4().hex
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        yield {**kept, "TMPDIR": str(folder), "HISTO_MARK": mark, "OMP_NUM_THREADS": "1"}
        deadline = time.monotonic() + 10
        while (left := heirs(mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
        assert not list(folder.glob("ray-*"))


def heirs(mark: str) -> list[str]:
    """Return the commands of processes that have a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # ended just now, or another user's
            continue
    return found


def command(slides: list[Path], bundle: Path, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "histostream.runtime.cli",
        *(p.name for p in slides),
        "--model",
        str(bundle),
        "--out",
        str(out),
        "--no-tissue",
        "--batch",
        "1",
        "--ray",
        "local",
    ]


def test_the_command_runs_on_a_ray_of_its_own(
    slides: list[Path], tiny_bundle: Path, expected: Path, tmp_path: Path, marked: dict[str, str]
) -> None:
    done = subprocess.run(
        [*command(slides, tiny_bundle, tmp_path), "--workers", "2"],
        capture_output=True,
        text=True,
        env=marked,
        cwd=slides[0].parent,
        timeout=120,
    )
    assert done.returncode == 0, done
    assert " x 2 on Ray (" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr  # Ray itself says nothing
    assert "3 slides: 3 done" in done.stdout
    assert len(done.stdout.splitlines()) == 4, done.stdout
    assert_same(tmp_path, expected, slides)


def test_ctrl_c_ends_the_command_and_its_ray(
    slides: list[Path], tiny_bundle: Path, tmp_path: Path, marked: dict[str, str]
) -> None:
    process = subprocess.Popen(
        command(slides[:1], tiny_bundle, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=marked,
        cwd=slides[0].parent,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while not strips_in(tmp_path / "large") and process.poll() is None:
        assert time.monotonic() < deadline, "no strip was finished"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all
    out, said = process.communicate(timeout=60)
    assert process.returncode == 130, (out, said)
    assert "the same command continues from there" in said
    assert "Traceback" not in said + out
    assert {p.name for p in (tmp_path / "large").iterdir()} == {".journal"}

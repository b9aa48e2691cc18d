"""One process for each slide: locks are exclusive, and the dead do not hold them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from histostream.wsi.errors import OutputError
from histostream.wsi.outputs import lock as module
from histostream.wsi.outputs.lock import STALE_S, Holder, Lock, LockedError, holder_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


def write(path: Path, holder: Holder, age_s: float = 0) -> None:
    path.write_text(json.dumps(asdict(holder)))
    then = time.time() - age_s
    os.utime(path, (then, then))


def ended() -> Holder:
    """Return a process of this machine that has ended."""
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    return replace(Holder.here(), pid=int(child.stdout))


def test_a_lock_is_held_by_one_and_leaves_nothing(path: Path) -> None:
    with Lock(path):
        said = json.loads(path.read_text())
        assert said["pid"] == os.getpid()
        with pytest.raises(LockedError, match=f"process {os.getpid()} on ") as caught, Lock(path):
            pass
        assert caught.value.holder.token == said["token"]
        assert path.exists()
    assert not list(path.parent.iterdir())
    with Lock(path):
        pass


def test_the_lock_of_a_process_that_ended_is_taken_over(path: Path) -> None:
    write(path, ended())
    with Lock(path) as lock:
        assert json.loads(path.read_text())["pid"] == os.getpid()
        lock.check()
    assert not list(path.parent.iterdir())


def test_a_number_that_another_process_has_now_is_told_apart(path: Path) -> None:
    write(path, replace(Holder.here(), started=12345))
    with Lock(path):
        pass


@pytest.mark.parametrize(("age_s", "taken"), [(STALE_S - 60, False), (STALE_S + 60, True)])
def test_the_lock_of_another_host_is_taken_over_when_nobody_touches_it(path: Path, age_s: float, taken: bool) -> None:
    write(path, replace(Holder.here(), host="far", machine="other", pid=1), age_s)
    if taken:
        with Lock(path):
            pass
    else:
        with pytest.raises(LockedError, match="on far"), Lock(path):
            pass


def test_a_holder_touches_its_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    with Lock(path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1


def test_a_lock_that_was_lost_is_noticed_and_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    other = replace(Holder.here(), host="far", machine="other")
    with Lock(path) as lock:
        lock.check()
        write(path, other)
        deadline = time.monotonic() + 10
        while not lock._lost and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(OutputError, match="taken this slide over"):
            lock.check()
    assert json.loads(path.read_text())["token"] == other.token


def test_drives_without_links_work_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Lock(path), pytest.raises(LockedError), Lock(path):
        pass
    assert not list(path.parent.iterdir())


def test_an_empty_lock_that_is_old_is_removed(path: Path) -> None:
    path.touch()
    os.utime(path, (0, 0))
    with Lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("deaths", [0, 0.3])
def test_of_many_processes_at_most_one_holds_it_at_any_time(tmp_path: Path, deaths: float) -> None:
    """Each takes the lock again and again, and looks whether anybody else is inside.

    Some leave the lock of a dead process behind, over which the others then fight.
    """
    path = tmp_path / ".lock"
    dead = json.dumps(asdict(ended()))
    program = textwrap.dedent(f"""
        import os, random, time
        from pathlib import Path
        from histostream.wsi.outputs.lock import Lock, LockedError

        inside, taken = Path({str(tmp_path / "inside")!r}), 0
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            try:
                with Lock(Path({str(path)!r})):
                    taken += 1
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    time.sleep(random.random() / 500)
                    inside.unlink()
                    if random.random() < {deaths}:
                        Path({str(path)!r}).write_text({dead!r})
            except LockedError:
                time.sleep(random.random() / 1000)
        print(taken)
    """)
    children = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    counts = [int(child.communicate()[0]) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert sum(counts) > 0  # a busy machine may let one of them wait all the time
    assert sum(counts) > 20
    assert [p for p in tmp_path.iterdir() if p != path] == []


def test_who_is_at_work_is_told_without_a_trace(path: Path) -> None:
    assert holder_of(path) is None
    with Lock(path):
        found = holder_of(path)
        assert found is not None
        assert found.process == Holder.here().process
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    write(path, ended())
    assert holder_of(path) is None
    assert path.exists()

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from histostream.wsi.errors import OutputError
from histostream.wsi.files import locked, remove_leftovers, whole_file, write_whole

WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from histostream.wsi.files import write_whole
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]), b"half")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    write_whole(path, "old")
    done = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = set(tmp_path.iterdir()) - {path}
    end = left.name.removeprefix(f".{path.name}")
    others = [tmp_path / name for name in (f".x{path.name}{end}", ".model.part", f".{path.name}.other{end}")]
    for other in others:
        other.touch()
    remove_leftovers(path)
    assert not left.exists()
    assert set(tmp_path.iterdir()) == {path, *others}


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_whole(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        _ = temporary.write_text("half") / 0
    with pytest.raises(OutputError, match=r"a\.bin"), whole_file(path):
        pass  # nothing was written
    assert [path] == list(tmp_path.iterdir())
    assert path.read_text() == "old"


def test_text_and_bytes_are_written_one_after_the_other(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"\0", "\u00e9\n\udcff", b"\1")
    assert (tmp_path / "a").read_bytes() == b"\0\xc3\xa9\n\\udcff\1"


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    """Threads stand in for processes here: each opens the lock file for itself."""
    inside = 0
    most = 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(10):
            with locked(tmp_path / "engine"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)  # so that the others come to wait
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == 1
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from histostream.wsi.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_process_that_died_is_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "engine"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with locked(path, wait=False) as held:
        assert not held
    killer = threading.Timer(0.2, process.kill)
    killer.start()
    with locked(path) as held:
        assert held
    process.communicate()
    assert f"{path}: waiting for another process" in caplog.text
    assert not list(tmp_path.iterdir())

"""One process for each slide, also across hosts: a lock file that says who is at work.

The file is made by linking a whole file to its name, which is atomic on network drives too. Its
holder touches it while it works. It is taken over from a process of this host that is no longer
there, from one that the caller knows to have ended, and from one of another host that has not
touched it for `STALE_S`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from histostream.wsi.errors import HistoError, OutputError

BEAT_S = 30.0  # between two touches
STALE_S = 600.0  # without a touch, a process on another host counts as dead
TAKING_S = 60.0  # a takeover itself takes milliseconds
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


Process = tuple[str, int, int]  # machine, number and start, as of a `Holder`


class LockedError(HistoError):
    """Another process is at work; ``holder`` says which.

    Attributes
    ----------
    holder
        The process.
    """

    def __init__(self, path: Path, holder: Holder) -> None:
        super().__init__(
            f"{path.parent}: process {holder.pid} on {holder.host} is at work on it, since "
            f"{holder.since}; if that cannot be, remove {path.name} there"
        )
        self.path, self.holder = path, holder

    def __reduce__(self) -> tuple[type[LockedError], tuple[Path, Holder]]:
        return LockedError, (self.path, self.holder)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds a lock.

    Attributes
    ----------
    host, pid
        Name of its host, and its number there.
    machine
        Where the number counts: this boot of the machine, and the container.
    started
        When the system started it, so that a number used again is told apart; 0 if not known.
    since
        When it took the lock, UTC.
    token
        Of this one lock.
    """

    host: str
    pid: int
    machine: str
    started: int
    since: str
    token: str

    @classmethod
    def here(cls) -> Holder:
        """Return this process, with a new token."""
        pid = os.getpid()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        started = _started(pid) or 0
        return cls(socket.gethostname(), pid, _machine(), started, since, uuid.uuid4().hex)

    @property
    def process(self) -> Process:
        """The process itself, told apart from all others."""
        return self.machine, self.pid, self.started

    def is_gone(self) -> bool:
        """Whether it is a process of this machine that has ended."""
        if self.machine != _machine() or os.name == "nt":  # whose os.kill would kill it
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's
            return False
        return bool(self.started) and _started(self.pid) != self.started


class Lock:
    """A lock file; hold it in a ``with`` block.

    Parameters
    ----------
    path
        The file; its folder must exist.
    gone
        Processes, maybe of other hosts, that are known to have ended.

    Raises
    ------
    LockedError
        On entering, if another process is at work.
    OutputError
        On entering, if the file cannot be written.
    """

    def __init__(self, path: Path, gone: Collection[Process] = ()) -> None:
        self.path, self._gone = path, gone
        self._me: Holder | None = None
        self._lost = False
        self._done = threading.Event()
        self._beat: threading.Thread | None = None

    def __enter__(self) -> Self:
        me = Holder.here()
        try:
            while not _create(self.path, me):
                holder = _read(self.path)
                if holder is None:
                    time.sleep(0.01)  # being removed just now, or written by a drive without links
                    if _age_s(self.path) > TAKING_S:
                        self.path.unlink(missing_ok=True)
                elif holder.process in self._gone or holder.is_gone() or _age_s(self.path) > STALE_S:
                    _clear(self.path, holder)
                else:
                    raise LockedError(self.path, holder)
        except OSError as error:
            if isinstance(error, HistoError):
                raise
            raise OutputError(
                f"cannot write {self.path} ({error.strerror or error}): check the folder's permissions and room"
            ) from error
        self._me = me
        self._beat = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._beat is not None:
            self._beat.join()
        with contextlib.suppress(OSError):
            if self._is_mine():
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Make sure that the lock was not lost.

        Raises
        ------
        OutputError
            If another process has taken it, while this one was suspended or cut off.
        """
        if self._lost:
            raise OutputError(
                f"{self.path.parent}: another process has taken this slide over, since this one "
                f"was not heard of for {STALE_S / 60:g} minutes; leave it to that one"
            )

    def _is_mine(self) -> bool:
        holder = _read(self.path)
        return holder is not None and self._me is not None and holder.token == self._me.token

    def _touch(self) -> None:
        while not self._done.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a drive that is away for a moment
                if not self._is_mine():
                    self._lost = True
                    return
                os.utime(self.path)


def holder_of(path: Path) -> Holder | None:
    """Return who is at work under a lock file, as far as can be told without touching it.

    A process of another host counts as at work as long as its lock is there.
    """
    try:
        holder = _read(path)
    except OSError:
        return None
    return None if holder is None or holder.is_gone() else holder


def _create(path: Path, me: Holder) -> bool:
    """Make the lock file with its content, in one step; False if there is one."""
    text = json.dumps(asdict(me)) + "\n"
    own = path.with_name(f"{path.name}.{me.token}")
    try:
        own.write_text(text, encoding="utf-8")
        try:
            os.link(own, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _create_without_links(path, text)
        return True
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)


def _create_without_links(path: Path, text: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _clear(path: Path, gone: Holder) -> None:
    """Remove the lock of a process that is gone, unless another process does so just now."""
    guard = path.with_name(f"{path.name}.taking")
    try:
        guard.open("x").close()
    except FileExistsError:
        if _age_s(guard) > TAKING_S:
            guard.unlink(missing_ok=True)
        time.sleep(0.01)
        return
    try:
        if _read(path) == gone:
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def _read(path: Path) -> Holder | None:
    """Return who holds a lock; None if nobody does, or the file is not whole."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return Holder(**said)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _age_s(path: Path) -> float:
    """Seconds since a file was touched, by the clock of the drive that it is on."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """Name this boot of this machine and, in containers, the space that process numbers are of."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> int | None:
    """When the system started a process, in its own ticks; None where it does not say."""
    try:
        # The name, in brackets, may hold anything.
        after = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
        return int(after.split()[19])
    except (OSError, ValueError, IndexError):
        return None

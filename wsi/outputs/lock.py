"""Lock an output folder for one process, also across hosts that share a drive.

filelock cannot do this: its locks of the operating system do not reach across hosts on every network
drive, and its soft locks cannot tell a dead process from a busy one on another host or in another
container. Here the lock is a file that names its holder. It is made by linking a complete file to its
name, which is atomic on network drives too, and its holder touches it every `BEAT_S`. It is taken over
if its holder was a process of this host that has ended, if the caller knows that it has ended, or if it
was not touched for `STALE_S`.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from histostream.wsi.errors import HistoError, OutputError
from histostream.wsi.files import writing

BEAT_S = 30.0  # between two touches
STALE_S = 600.0  # without a touch, a process on another host counts as dead
TAKEOVER_S = 60.0  # a takeover itself takes milliseconds
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


Process = tuple[str, int, int]  # machine, pid and start, as of a `Holder`


class LockedError(HistoError):
    """Another process holds the lock: ``holder``."""

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
    """A process that holds a lock; the content of the lock file.

    Attributes
    ----------
    host, pid
        Name of its host, and its number there.
    machine
        Where the number is valid: this boot of the machine, and the container.
    started
        When the system started it, since numbers are used again; 0 if not known.
    since
        When it took the lock, UTC.
    token
        Random name of this one lock.
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
        pid, since = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), pid, _machine(), _started(pid) or 0, since, uuid.uuid4().hex)

    @property
    def process(self) -> Process:
        """Machine, number and start, which tell the process from all others."""
        return self.machine, self.pid, self.started

    def has_ended(self) -> bool:
        """Whether it is a process of this machine that has ended."""
        if self.machine != _machine() or os.name == "nt":  # os.kill would end it on Windows
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
    dead_processes
        Processes, maybe of other hosts, that are known to have ended.

    Raises
    ------
    LockedError
        On entering, if another process holds it.
    OutputError
        On entering, if the file cannot be written.
    """

    def __init__(self, path: Path, dead_processes: Collection[Process] = ()) -> None:
        self.path, self._dead_processes = path, dead_processes
        self._token = ""
        self._lost = False
        self._done = threading.Event()
        self._beat: threading.Thread | None = None

    def __enter__(self) -> Self:
        me = Holder.here()
        with writing(self.path):
            while not _create(self.path, me):
                holder = _read(self.path)
                if holder is None:
                    time.sleep(0.01)  # it is just being removed, or written on a drive without links
                    if _age_s(self.path) > TAKEOVER_S:
                        self.path.unlink(missing_ok=True)
                elif holder.process in self._dead_processes or holder.has_ended() or _age_s(self.path) > STALE_S:
                    _remove_lock_of(holder, self.path)
                else:
                    raise LockedError(self.path, holder)
        self._token = me.token
        self._beat = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._beat is not None:
            self._beat.join()
        with suppress(OSError):
            if self._is_mine():
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise unless the lock is still held.

        Raises
        ------
        OutputError
            If another process took it over, while this one was suspended or cut off.
        """
        if self._lost:
            raise OutputError(
                f"{self.path.parent}: another process has taken this slide over, since this one "
                f"was not heard of for {STALE_S / 60:g} minutes; leave it to that one"
            )

    def _is_mine(self) -> bool:
        holder = _read(self.path)
        return holder is not None and holder.token == self._token

    def _touch(self) -> None:
        while not self._done.wait(BEAT_S):
            with suppress(OSError):  # the drive may be away for a moment
                if not self._is_mine():
                    self._lost = True
                    return
                os.utime(self.path)


def holder_of(path: Path) -> Holder | None:
    """Return the process that holds a lock file, without touching the file; None if there is none.

    A process of another host counts as the holder as long as its lock is there.
    """
    try:
        holder = _read(path)
    except OSError:
        return None
    return None if holder is None or holder.has_ended() else holder


def _create(path: Path, me: Holder) -> bool:
    """Make the lock file with its content in one step; return False if there is one."""
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
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                return False
        return True
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def _remove_lock_of(ended: Holder, path: Path) -> None:
    """Remove the lock of a process that has ended, unless another process is just doing so."""
    guard = path.with_name(f"{path.name}.taking")
    try:
        guard.open("x").close()
    except FileExistsError:
        if _age_s(guard) > TAKEOVER_S:
            guard.unlink(missing_ok=True)
        time.sleep(0.01)
        return
    try:
        if _read(path) == ended:
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def _read(path: Path) -> Holder | None:
    """Return the holder of a lock; None if there is no file, or it is not complete."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
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
    """Name this boot of this machine and, in a container, the namespace of its process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> int | None:
    """When the system started a process, in its own ticks; None if it cannot be read."""
    try:
        # The second field is a name in brackets, which may contain spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return None

"""Workers on a Ray cluster: an actor with one warm engine for each GPU, or each CPU slot.

::

    RayExecutor, in this process                          RayWorker, one for each engine
      hello()                   -> who it is
      open(bundle, how)         -> which engine it has
      segment(number, task)     -> what became of a slide        two at once, by two threads
      pulse(stop)               -> how far its slides are, and what it has to say; twice a second

Paths travel, pixels do not. A worker that is lost is started again; its slides go to whoever is
free, who goes on from their journals, so that the label maps are the same bits as on one device.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from histostream.runtime.bundle.card import ModelCard, read_card
from histostream.runtime.cohort.worker import (
    CONCURRENCY,
    FAILED,
    STOPPED,
    Outcome,
    Report,
    Worker,
    pick_worker,
)
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.errors import EngineError
from histostream.runtime.process_memory import return_buffers_at_once
from histostream.runtime.slide_job import SlideJob
from histostream.wsi.errors import HistoError
from histostream.wsi.optional import install_command
from histostream.wsi.outputs.lock import Holder, Process
from histostream.wsi.slides.sources.base import is_remote, redact_url

LOCAL = "local"  # in place of an address: a Ray of this machine alone
ATTEMPTS = 2  # at a slide whose worker was lost
ASKED_S = 0.2  # how often it is asked whether to stop
PULSE_S = 0.5  # between two looks at a worker
STARTED_S = 60.0  # until one worker is there, at most
JOINED_S = 10.0  # that others get from then on; those that are later join in the middle
REACHED_S = 10.0  # until a cluster answers, at most
STORE_BYTES = 80 << 20  # Ray's object store: little more than the least that it takes
SOCKET_ROOM = 24  # of the 107 bytes of a socket's path, what Ray leaves for the folder
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker says of itself.

    Attributes
    ----------
    host, process
        Where it is, and which process.
    engine
        What its engine says of itself; empty while there is none.
    problem
        Why there is none.
    """

    host: str
    process: Process
    engine: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Pulse:
    """How far a worker is.

    Attributes
    ----------
    progress
        Of each slide in hand: pixels done, pixels in all.
    said
        Warnings since the last pulse.
    """

    progress: dict[int, tuple[int, int]]
    said: list[str]


class RayWorker:
    """One warm engine on some host: what Ray makes an actor of."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._doing: dict[int, _Doing] = {}
        self._said = _Said()
        logging.getLogger("histostream").addHandler(self._said)
        return_buffers_at_once()

    def hello(self) -> Hello:
        """Say who this is."""
        engine = "" if self._worker is None else self._worker.engine.name
        return Hello(socket.gethostname(), Holder.here().process, engine)

    def open(self, bundle: Path, backend: str, precision: str, threads: int | None) -> Hello:
        """Open the engine."""
        if threads is not None:  # numba, which reads these later, would take all cores
            os.environ.setdefault("NUMBA_NUM_THREADS", str(threads))
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            self._worker = Worker(lambda: open_engine(bundle, backend=backend, precision=precision, threads=threads))
        except HistoError as error:
            return replace(self.hello(), problem=str(error))
        return self.hello()

    def segment(self, number: int, task: SlideJob) -> Outcome:
        """Segment a slide."""
        assert self._worker is not None
        doing = self._doing[number] = _Doing()
        try:
            return self._worker.segment(task, doing.report, doing.stop.is_set)
        finally:
            del self._doing[number]

    def pulse(self, stop: bool) -> Pulse:
        """Say how far the slides are; ``stop`` ends them after the strip in hand."""
        doing = dict(self._doing)
        if stop:
            for slide in doing.values():
                slide.stop.set()
        return Pulse({i: d.pixels for i, d in doing.items() if d.pixels[1]}, self._said.take())


class RayExecutor:
    """The same network on many workers of a Ray cluster; see `cohort.Executor`.

    A Ray that this process has started or joined before is used as it is, and left alone.

    Parameters
    ----------
    bundle
        Folder of the model; it must be there on all hosts.
    cluster
        Address of the cluster, "auto" for the one that this host is of, or "local": a Ray is
        started on this machine, which others cannot reach, and ended by `close`.
    workers
        How many; None: as many as there is room for.
    backend, precision
        As for `open_engine`. "auto" takes GPUs where the cluster has any.
    threads
        CPU threads of each worker; on CPUs None is 1, so that there is a worker for each CPU.
    concurrency
        Slides that a worker has in memory together.

    Raises
    ------
    CardError
        If there is no such bundle here.
    EngineError
        If Ray is not installed, cannot be reached, has no room for the workers, none of them is
        there after `STARTED_S`, or one cannot open the network.

    Attributes
    ----------
    card
        The model's card.
    name, each
        What the engines say of themselves, with their number and hosts, and what one of them says.
    """

    def __init__(
        self,
        bundle: Path,
        cluster: str,
        *,
        workers: int | None = None,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        concurrency: int = CONCURRENCY,
    ) -> None:
        self.card: ModelCard = read_card(bundle)
        self.each = ""
        self._concurrency = concurrency
        self._members: list[_Member] = []
        self._coming: list[_Member] = []
        self._gone: list[Process] = []
        self._open = ExitStack()
        try:
            self._ray = _connect(cluster, self._open)
            on_gpu = backend in ("cuda", "tensorrt")
            if backend == "auto":
                on_gpu = self._room("GPU", 1) > 0
            if not on_gpu:
                threads = threads or 1
            what, n = ("GPU", 1) if on_gpu else ("CPU", threads or 1)
            count = self._count(workers, what, n, backend)
            self._how = (bundle.absolute(), backend, precision, threads)
            self._actor = self._ray.remote(RayWorker).options(
                num_cpus=0 if on_gpu else n,
                num_gpus=int(on_gpu),
                max_concurrency=concurrency + 2,  # it answers while all slides are run
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
            )
            self._coming = [self._start() for _ in range(count)]
            self._await_members()
        except BaseException as error:
            self.close()
            if isinstance(error, self._errors()):
                raise EngineError(f"--ray {cluster}: {_last_line(error)}") from error
            raise
        hosts = dict.fromkeys(member.host for member in self._members)
        self.name = f"{self.each} x {len(self._members)} on Ray ({', '.join(hosts)})"

    @property
    def workers(self) -> list[Hello]:
        """Who is there."""
        return [member.hello for member in self._members if member.hello is not None]

    def segment_all(
        self,
        jobs: Sequence[SlideJob],
        *,
        report: Callable[[int], Report],
        stopping: Callable[[], bool],
    ) -> Iterator[tuple[int, Outcome]]:
        """Segment slides, whoever is free taking the next; see `cohort.Executor`."""
        run = _Run([_absolute(job) for job in jobs], [report(i) for i in range(len(jobs))])
        try:
            while run.waiting or run.doing:
                stop = stopping()
                if stop and not run.doing:
                    return
                if not stop:
                    self._share_out(run)
                if not self._members and not self._someone_comes():
                    break
                yield from self._look(run, stop)
        except self._errors() as error:
            run.doing.clear()
            raise EngineError(
                f"the Ray cluster was lost ({_last_line(error)}); what is finished is kept, and "
                "the same command goes on from there"
            ) from error
        finally:
            for member in self._members:  # nobody may be left with a slide of an abandoned run
                if any(m is member for m, _ in run.doing.values()):
                    member.handle.pulse.remote(True)
        for i in run.waiting:
            source = jobs[i].source
            yield i, Outcome(FAILED, f"{source}: no worker is left on the cluster; run it again")

    def close(self) -> None:
        """End the workers, and the Ray that was started for them."""
        for member in (*self._members, *self._coming):
            self._kill(member)
        self._members, self._coming = [], []
        self._open.close()

    # ------------------------------------------------------------------ workers come and go

    def _room(self, what: str, n: int) -> int:
        """How many workers of ``n`` fit on an empty cluster: each has to fit on one host."""
        return sum(int(node["Resources"].get(what, 0) // n) for node in self._nodes())

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _count(self, workers: int | None, what: str, n: int, backend: str) -> int:
        """Decide how many workers there will be.

        Raises
        ------
        EngineError
            If they cannot be.
        """
        if workers is not None and workers < 1:
            raise EngineError(f"--workers {workers}: use 1 or more")
        room, total = self._room(what, n), self._room(what, 1)
        hosts = ", ".join(dict.fromkeys(node["NodeManagerHostname"] for node in self._nodes()))
        there = f"it has {total or 'no'} {what}{'s' if total != 1 else ''} ({hosts})"
        if room < (workers or 1):
            asked = f"{workers or 1} worker{'s' if (workers or 1) > 1 else ''} of {n} {what}"
            if room:
                advice = f"use --workers {room} or fewer"
            elif what == "GPU":
                advice = f"use --backend cpu instead of {backend}"
            else:
                advice = "use fewer --threads"
            raise EngineError(f"the Ray cluster has no room for {asked}: {there}; {advice}")
        return workers or room

    def _start(self) -> _Member:
        """Have Ray start a worker, some time, somewhere."""
        handle = self._actor.remote()
        return _Member(handle, handle.hello.remote())

    def _await_members(self) -> None:
        """Wait until the workers have opened the network.

        Raises
        ------
        EngineError
            If one cannot, or none is there in time.
        """
        limit = time.monotonic() + STARTED_S
        seen = False
        while self._coming:
            self._welcome(self._wait([member.ref for member in self._coming]))
            if problems := [m.problem for m in self._coming if m.problem]:
                raise EngineError(problems[0])
            opening = any(member.hello is not None for member in self._coming)
            if not seen and (opening or self._members):
                seen, limit = True, time.monotonic() + JOINED_S
            if time.monotonic() > limit and not opening:
                if not self._members:
                    raise EngineError(
                        f"no worker was started within {STARTED_S:g} s: the Ray cluster is taken "
                        f"by other jobs ({self._free()} free); run it again when they are done"
                    )
                log.warning(
                    "%d of %d workers are there; the others join when the cluster has room",
                    len(self._members),
                    len(self._members) + len(self._coming),
                )
                return

    def _someone_comes(self) -> bool:
        """Whether a worker may still join; gives up those that Ray has not started in time."""
        late = time.monotonic() - STARTED_S
        for member in [m for m in self._coming if m.hello is None and m.since < late]:
            self._coming.remove(member)
            self._kill(member)
        return bool(self._coming)

    def _welcome(self, ready: Sequence[Any]) -> None:
        """Go on with workers that have said hello or opened the network."""
        for member in [m for m in self._coming if m.ref in ready]:
            try:
                hello: Hello = self._ray.get(member.ref)
            except self._errors() as error:
                where = "on the Ray cluster" if member.hello is None else f"on {member.host}"
                member.problem = f"a worker {where} was lost as it started: {_last_line(error)}"
                continue
            if hello.problem:
                member.problem = f"host {hello.host}: {hello.problem}"
            elif hello.engine:
                member.ref = None
                self._coming.remove(member)
                self._members.append(member)
                self.each = self.each or hello.engine
                if hello.engine != self.each:
                    log.warning(
                        "host %s has the engine %s, others have %s: slides may differ in the last "
                        "bit; name a --backend",
                        hello.host,
                        hello.engine,
                        self.each,
                    )
            else:
                member.ref = member.handle.open.remote(*self._how)
            member.hello = hello

    def _leave(self, member: _Member) -> None:
        """Leave a worker that was lost, and have another one started in its place."""
        log.warning("the worker on %s (process %d) was lost", member.host, member.pid)
        self._members.remove(member)
        self._kill(member)  # Ray may only have lost sight of it
        assert member.hello is not None
        self._gone.append(member.hello.process)
        self._coming.append(self._start())

    def _kill(self, member: _Member) -> None:
        with contextlib.suppress(*self._errors(), ValueError, RuntimeError):
            self._ray.kill(member.handle)

    # ------------------------------------------------------------------ slides

    def _share_out(self, run: _Run) -> None:
        """Give each worker a slide, and one ahead while there is more than one for each."""
        while True:
            held = [sum(m is member for m, _ in run.doing.values()) for member in self._members]
            turn = pick_worker(held, len(run.waiting), self._concurrency)
            if turn is None:
                return
            member, i = self._members[turn], run.waiting.popleft()
            run.attempts[i] += 1
            task = replace(run.tasks[i], dead_processes=tuple(self._gone))
            run.doing[member.handle.segment.remote(i, task)] = member, i

    def _look(self, run: _Run, stop: bool) -> Iterator[tuple[int, Outcome]]:
        """Wait a moment for whatever comes first; yields slides that are done with."""
        now = time.monotonic()
        for member in self._members:
            if member.ref is None and now - member.pulsed > PULSE_S:
                member.ref, member.pulsed = member.handle.pulse.remote(stop), now
        everyone = (*self._members, *self._coming)
        ready = self._wait([*run.doing, *(m.ref for m in everyone if m.ref is not None)])
        lost: list[_Member] = []
        for ref in ready:
            if ref in run.doing:
                member, i = run.doing[ref]
                outcome = self._outcome(ref, run.tasks[i])
                if outcome is None:
                    lost.append(member)
                else:
                    del run.doing[ref]
                    yield i, outcome
        for member in self._members:
            if member.ref in ready:
                try:
                    self._heard(member, self._ray.get(member.ref), run)
                except self._errors():
                    lost.append(member)
                member.ref = None
        for member in {id(m): m for m in lost}.values():
            yield from self._lost(member, run, stop)
        self._welcome(ready)
        for member in [m for m in self._coming if m.problem]:
            log.warning("%s", member.problem)
            self._coming.remove(member)
            self._kill(member)

    def _heard(self, member: _Member, pulse: Pulse, run: _Run) -> None:
        for line in pulse.said:
            log.warning("%s: %s", member.host, line)
        ours = {i for m, i in run.doing.values() if m is member}
        for i in ours & pulse.progress.keys():
            run.reports[i](*pulse.progress[i])

    def _lost(self, member: _Member, run: _Run, stop: bool) -> Iterator[tuple[int, Outcome]]:
        """Leave a worker that was lost; others go on with its slides, from where they were."""
        self._leave(member)
        for ref in [ref for ref, (m, _) in run.doing.items() if m is member]:
            _, i = run.doing.pop(ref)
            if stop:
                yield i, Outcome(STOPPED, "what is finished is kept")
            elif run.attempts[i] < ATTEMPTS:
                run.waiting.appendleft(i)
            else:
                source = redact_url(run.tasks[i].slide.source)
                yield (
                    i,
                    Outcome(
                        FAILED,
                        f"{source}: its worker on {member.host} (process {member.pid}) was "
                        "lost, as was one before it (killed, often for want of memory, or its host "
                        "went away); use a smaller --batch or fewer --workers",
                    ),
                )

    def _outcome(self, ref: Any, task: SlideJob) -> Outcome | None:
        """Return what a worker says became of a slide; None if the worker was lost."""
        try:
            outcome: Outcome = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:  # a fault of ours, not of the cluster
            return Outcome(FAILED, f"{redact_url(task.slide.source)}: {_last_line(error)}")
        except self._errors():
            return None
        return outcome

    # ------------------------------------------------------------------ Ray

    def _wait(self, refs: list[Any]) -> list[Any]:
        """Return what is there of ``refs`` when the first is, or it is time to look around."""
        if not refs:
            time.sleep(ASKED_S)
            return []
        first, _ = self._ray.wait(refs, timeout=ASKED_S)
        if not first:
            return []
        ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return list(ready)

    def _free(self) -> str:
        free = self._ray.available_resources()
        return ", ".join(f"{free.get(what, 0):g} {what}s" for what in ("CPU", "GPU"))

    def _errors(self) -> tuple[type[Exception], ...]:
        return (self._ray.exceptions.RayError,) if hasattr(self, "_ray") else ()


@dataclass(slots=True, eq=False)
class _Member:
    """A worker as the crew sees it."""

    handle: Any
    ref: Any  # what it owes: hello, the open network, then each pulse; None while nothing
    hello: Hello | None = None
    problem: str = ""
    since: float = 0.0
    pulsed: float = 0.0

    def __post_init__(self) -> None:
        self.since = time.monotonic()

    @property
    def host(self) -> str:
        return "?" if self.hello is None else self.hello.host

    @property
    def pid(self) -> int:
        return 0 if self.hello is None else self.hello.process[1]


class _Run:
    """The slides of one call of `segment_all`."""

    def __init__(self, tasks: list[SlideJob], reports: list[Report]) -> None:
        self.tasks, self.reports = tasks, reports
        self.waiting = deque(range(len(tasks)))
        self.attempts = [0] * len(tasks)
        self.doing: dict[Any, tuple[_Member, int]] = {}


class _Doing:
    """A slide in a worker's hands."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.pixels = 0, 0

    def report(self, done: int, total: int) -> None:
        self.pixels = done, total


class _Said(logging.Handler):
    """Keeps warnings for the process that the user sees."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[str] = deque(maxlen=100)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def take(self) -> list[str]:
        lines = []
        with contextlib.suppress(IndexError):
            while True:
                lines.append(self._lines.popleft())
        return lines


def _absolute(task: SlideJob) -> SlideJob:
    """Name every path as it is named on all hosts."""
    slide = task.slide
    if not is_remote(slide.source):
        slide = replace(slide, source=str(Path(slide.source).absolute()))
    roi, stage = task.options.roi, task.stage
    return replace(
        task,
        slide=slide,
        out=task.out.absolute(),
        options=replace(task.options, roi=None if roi is None else roi.absolute()),
        stage=None if stage is None else stage.absolute(),
    )


def _connect(cluster: str, closing: ExitStack) -> Any:
    """Start Ray, or join a cluster; ``closing`` undoes it. Returns the module.

    Raises
    ------
    EngineError
        If that is not possible.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would be sent over the network
    if cluster == LOCAL:
        _keep_to_this_machine()
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise EngineError(f"--ray needs Ray: {install_command('ray')}") from error
    if ray.is_initialized():
        return ray
    how: dict[str, Any] = {"address": cluster}
    if cluster == LOCAL:
        folder = _short_folder()
        closing.callback(shutil.rmtree, folder, ignore_errors=True)
        how |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        how |= {"_temp_dir": str(folder / "r")}  # Ray opens its own to all users
    else:
        _check_that_someone_listens(cluster)
    # Ray reports each lost worker in a paragraph on stdout, where our results are.
    ray._private.worker._worker_logs_enabled = False
    closing.callback(setattr, ray._private.worker, "_worker_logs_enabled", True)
    try:
        closing.callback(ray.shutdown)
        ray.init(**how, log_to_driver=False, logging_level=logging.CRITICAL)  # it raises as well
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        advice = (
            ""
            if cluster == LOCAL
            else ("; run it on a host of the cluster, with the Ray and the Python that the cluster has")
        )
        raise EngineError(f"--ray {cluster}: {_last_line(error)}{advice}") from error
    return ray


def _keep_to_this_machine() -> None:
    """Have Ray listen on 127.0.0.1 alone, and to nobody who lacks a token.

    Whoever reaches Ray's ports may run code. Ray reads the first variable when it is imported; on
    every system it means whether other hosts may join. The token is one of its own, which Ray
    would else write to a file in the user's home.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _short_folder() -> Path:
    """Make a folder of our own whose name leaves Ray room for those of its sockets."""
    room = len(os.fsencode(tempfile.gettempdir())) <= SOCKET_ROOM
    return Path(tempfile.mkdtemp(prefix="ray-", dir=None if room else "/tmp"))


def _check_that_someone_listens(cluster: str) -> None:
    """Refuse an address where nobody is: Ray itself would try for minutes.

    Raises
    ------
    EngineError
        If nobody answers.
    """
    if cluster == "auto":
        return
    try:
        at = urlsplit(cluster if "://" in cluster else f"ray://{cluster}")
        if at.hostname is None or at.port is None:
            raise ValueError("no host or no port")
        socket.create_connection((at.hostname, at.port), REACHED_S).close()
    except ValueError as error:
        raise EngineError(
            f"--ray {cluster!r}: not an address; as HOST:6379, ray://HOST:10001, auto or local"
        ) from error
    except OSError as error:
        raise EngineError(
            f"--ray {cluster}: nobody answers there ({error.strerror or error}); check the address "
            "and that Ray runs (ray start --head)"
        ) from error


def _last_line(error: BaseException) -> str:
    """Return what an error says at its end, where Ray has the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__

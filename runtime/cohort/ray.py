"""Workers on a Ray cluster: an actor with one open engine for each GPU, or for each CPU slot.

::

    RayExecutor, in this process                       RayWorker, one for each engine
      info()                        -> its host and process
      open(bundle, options)         -> the name of its engine
      segment(number, job)          -> the outcome of a slide; two threads run two slides
      status(stop)                  -> progress of its slides, and warnings; called twice a second

Only paths are sent, never pixels. A worker that is lost is replaced by a new one. Its slides go to any free
worker, which continues them from their journals, so that the label maps are the same bits as on one device.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from histostream.runtime.bundle.card import ModelCard, read_card
from histostream.runtime.cohort.worker import CONCURRENCY, Report, Worker, pick_worker
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.errors import EngineError
from histostream.runtime.outcome import FAILED, STOPPED, Outcome
from histostream.runtime.process_memory import return_buffers_at_once
from histostream.runtime.slide_job import SlideJob
from histostream.wsi.errors import HistoError
from histostream.wsi.optional import install_command
from histostream.wsi.outputs.lock import Holder, Process
from histostream.wsi.slides.sources.base import is_remote

LOCAL = "local"  # instead of an address: a Ray of this machine alone
ATTEMPTS = 2  # at a slide whose worker was lost
POLL_S = 0.2  # between two calls of `stopping`, at most
STATUS_S = 0.5  # between two calls of a worker's `status`
START_S = 60.0  # time limit until the first worker is started
JOIN_S = 10.0  # time limit for the other workers from then on; later ones join during the run
CONNECT_S = 10.0  # time limit for an answer of the cluster
STORE_BYTES = 80 << 20  # Ray's object store: little more than its minimum
SOCKET_ROOM = 24  # of the 107 bytes of a socket's path, those that Ray leaves for the folder
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Host and process of a worker, and the name of its engine, or why it has no engine."""

    host: str
    process: Process
    engine: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Progress of a worker's slides as {number: (pixels done, pixels in all)}, and its new warnings."""

    progress: dict[int, tuple[int, int]]
    warnings: list[str]


class RayWorker:
    """One open engine on some host, as a Ray actor."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._slides: dict[int, _SlideState] = {}
        self._warnings = _WarningBuffer()
        logging.getLogger("histostream").addHandler(self._warnings)
        return_buffers_at_once()

    def info(self) -> WorkerInfo:
        """Return host, process and engine of this worker."""
        engine = "" if self._worker is None else self._worker.engine.name
        return WorkerInfo(socket.gethostname(), Holder.here().process, engine)

    def open(self, bundle: Path, backend: str, precision: str, threads: int | None) -> WorkerInfo:
        """Open the engine."""
        if threads is not None:  # numba reads them when it is imported; without them it takes all cores
            os.environ.setdefault("NUMBA_NUM_THREADS", str(threads))
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            self._worker = Worker(lambda: open_engine(bundle, backend=backend, precision=precision, threads=threads))
        except HistoError as error:
            return replace(self.info(), problem=str(error))
        return self.info()

    def segment(self, number: int, job: SlideJob) -> Outcome:
        """Segment a slide."""
        assert self._worker is not None
        slide = self._slides[number] = _SlideState()
        try:
            return self._worker.segment(job, slide.report, slide.stop.is_set)
        finally:
            del self._slides[number]

    def status(self, stop: bool) -> WorkerStatus:
        """Return progress and warnings; ``stop`` ends the slides after the current strip."""
        slides = dict(self._slides)
        if stop:
            for slide in slides.values():
                slide.stop.set()
        return WorkerStatus({i: s.pixels for i, s in slides.items() if s.pixels[1]}, self._warnings.take())


class RayExecutor:
    """The same network on many workers of a Ray cluster; see `Executor`.

    If this process has already started or joined a Ray, that one is used, and not ended.

    Parameters
    ----------
    bundle
        Folder of the model; it must exist on all hosts.
    cluster
        Address of the cluster; "auto" for the cluster of this host; "local" starts a Ray that only this
        machine can reach, and `close` ends it.
    workers
        Number of workers; None: as many as there is room for.
    backend, precision
        As for `open_engine`. "auto" takes GPUs if the cluster has any.
    threads
        CPU threads of each worker; on CPUs None is 1, so that there is a worker for each CPU.
    concurrency
        Slides that a worker has in memory at the same time.

    Raises
    ------
    CardError
        If there is no such bundle on this host.
    EngineError
        If Ray is not installed or cannot be reached, has no room for the workers, starts none within
        `START_S`, or a worker cannot open the network.

    Attributes
    ----------
    card
        The model's card.
    name, engine_name
        Name of the engine, with the number of workers and their hosts, and without.
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
        self.engine_name = ""
        self._concurrency = concurrency
        self._members: list[_Member] = []
        self._starting: list[_Member] = []
        self._dead_processes: list[Process] = []
        self._open = ExitStack()
        try:
            self._ray = _connect(cluster, self._open)
            on_gpu = backend in ("cuda", "tensorrt") or (backend == "auto" and self._room("GPU", 1) > 0)
            if not on_gpu:
                threads = threads or 1
            resource, amount = ("GPU", 1) if on_gpu else ("CPU", threads or 1)
            count = self._count_workers(workers, resource, amount, backend)
            self._open_arguments = (bundle.absolute(), backend, precision, threads)
            self._actor = self._ray.remote(RayWorker).options(
                num_cpus=0 if on_gpu else amount,
                num_gpus=int(on_gpu),
                max_concurrency=concurrency + 2,  # so that it answers `status` while it runs slides
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
            )
            self._starting = [self._start() for _ in range(count)]
            self._await_members()
        except BaseException as error:
            self.close()
            if isinstance(error, self._errors()):
                raise EngineError(f"--ray {cluster}: {_last_line(error)}") from error
            raise
        hosts = dict.fromkeys(member.host for member in self._members)
        self.name = f"{self.engine_name} x {len(self._members)} on Ray ({', '.join(hosts)})"

    def segment_all(
        self,
        jobs: Sequence[SlideJob],
        *,
        report: Callable[[int], Report],
        stopping: Callable[[], bool],
    ) -> Iterator[tuple[int, Outcome]]:
        """Segment slides; each free worker takes the next one; see `Executor`."""
        run = _CohortRun([_with_absolute_paths(job) for job in jobs], [report(i) for i in range(len(jobs))])
        try:
            while run.waiting or run.running:
                stop = stopping()
                if stop and not run.running:
                    return
                if not stop:
                    self._assign_jobs(run)
                if not self._members and not self._await_replacement():
                    break
                yield from self._poll(run, stop)
        except self._errors() as error:
            run.running.clear()
            raise EngineError(
                f"the connection to the Ray cluster was lost ({_last_line(error)}); what is finished is kept: "
                "repeat the command to go on"
            ) from error
        finally:
            for member in self._members:  # no worker may keep a slide of an abandoned run
                if any(worker is member for worker, _ in run.running.values()):
                    member.handle.status.remote(True)
        for i in run.waiting:
            yield i, Outcome(FAILED, f"{jobs[i].source}: no worker is left on the cluster; run it again")

    def close(self) -> None:
        """End the workers, and the Ray that was started for them."""
        for member in (*self._members, *self._starting):
            self._kill(member)
        self._members, self._starting = [], []
        self._open.close()

    # ------------------------------------------------------------------ starting and losing workers

    def _room(self, resource: str, amount: int) -> int:
        """Return how many workers with an amount of a resource fit on an empty cluster, each on one host."""
        return sum(int(node["Resources"].get(resource, 0) // amount) for node in self._nodes())

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _count_workers(self, workers: int | None, resource: str, amount: int, backend: str) -> int:
        """Return how many workers to start.

        Raises
        ------
        EngineError
            If the cluster has no room for so many.
        """
        if workers is not None and workers < 1:
            raise EngineError(f"--workers {workers}: use 1 or more")
        room, total = self._room(resource, amount), self._room(resource, 1)
        if room >= (workers or 1):
            return workers or room
        hosts = ", ".join(dict.fromkeys(node["NodeManagerHostname"] for node in self._nodes()))
        available = f"{total or 'no'} {resource}{'s' if total != 1 else ''} ({hosts})"
        requested = f"{workers or 1} worker{'s' if (workers or 1) > 1 else ''} of {amount} {resource}"
        if room:
            advice = f"use --workers {room} or fewer"
        elif resource == "GPU":
            advice = f"use --backend cpu instead of {backend}"
        else:
            advice = "use fewer --threads"
        raise EngineError(f"the Ray cluster has no room for {requested}: it has {available}; {advice}")

    def _start(self) -> _Member:
        """Ask Ray to start a worker; Ray decides when and where."""
        handle = self._actor.remote()
        return _Member(handle, handle.info.remote())

    def _await_members(self) -> None:
        """Wait until the workers have opened the network.

        Raises
        ------
        EngineError
            If a worker cannot open it, or none is started in time.
        """
        limit = time.monotonic() + START_S
        has_first = False
        while self._starting:
            self._advance_starting(self._wait([member.ref for member in self._starting]))
            if problems := [member.problem for member in self._starting if member.problem]:
                raise EngineError(problems[0])
            is_opening = any(member.info is not None for member in self._starting)
            if not has_first and (is_opening or self._members):
                has_first, limit = True, time.monotonic() + JOIN_S
            if time.monotonic() > limit and not is_opening:
                if not self._members:
                    free = self._ray.available_resources()
                    room = ", ".join(f"{free.get(resource, 0):g} {resource}s" for resource in ("CPU", "GPU"))
                    raise EngineError(
                        f"no worker was started within {START_S:g} s: other jobs use the Ray cluster "
                        f"({room} free); run it again when they are done"
                    )
                log.warning(
                    "%d of %d workers were started; the others join when the cluster has room",
                    len(self._members),
                    len(self._members) + len(self._starting),
                )
                return

    def _await_replacement(self) -> bool:
        """Whether a worker may still join; those that Ray did not start in time are given up."""
        for member in list(self._starting):
            if member.info is None and member.since < time.monotonic() - START_S:
                self._give_up(member)
        return bool(self._starting)

    def _advance_starting(self, ready: Sequence[Any]) -> None:
        """Take the next step with each worker that was started, or has opened the network."""
        for member in [member for member in self._starting if member.ref in ready]:
            try:
                info: WorkerInfo = self._ray.get(member.ref)
            except self._errors() as error:
                where = "on the Ray cluster" if member.info is None else f"on {member.host}"
                member.problem = f"a worker {where} was lost during its start: {_last_line(error)}"
                continue
            if info.problem:
                member.problem = f"host {info.host}: {info.problem}"
            elif info.engine:
                member.ref = None
                self._starting.remove(member)
                self._members.append(member)
                self.engine_name = self.engine_name or info.engine
                if info.engine != self.engine_name:
                    log.warning(
                        "host %s has the engine %s, others have %s: slides may differ in the last bit; set --backend",
                        info.host,
                        info.engine,
                        self.engine_name,
                    )
            else:
                member.ref = member.handle.open.remote(*self._open_arguments)
            member.info = info

    def _give_up(self, member: _Member) -> None:
        self._starting.remove(member)
        self._kill(member)

    def _kill(self, member: _Member) -> None:
        with contextlib.suppress(*self._errors(), ValueError, RuntimeError):
            self._ray.kill(member.handle)

    # ------------------------------------------------------------------ slides

    def _assign_jobs(self, run: _CohortRun) -> None:
        """Give each worker a slide, and one ahead while there is more than one for each."""
        while True:
            held = [sum(worker is member for worker, _ in run.running.values()) for member in self._members]
            index = pick_worker(held, len(run.waiting), self._concurrency)
            if index is None:
                return
            member, i = self._members[index], run.waiting.popleft()
            run.attempts[i] += 1
            job = replace(run.jobs[i], dead_processes=tuple(self._dead_processes))
            run.running[member.handle.segment.remote(i, job)] = member, i

    def _poll(self, run: _CohortRun, stop: bool) -> Iterator[tuple[int, Outcome]]:
        """Wait up to `POLL_S` for answers of the workers; yield the slides that ended."""
        now = time.monotonic()
        for member in self._members:
            if member.ref is None and now - member.requested_at > STATUS_S:
                member.ref, member.requested_at = member.handle.status.remote(stop), now
        refs = [member.ref for member in (*self._members, *self._starting) if member.ref is not None]
        ready = self._wait([*run.running, *refs])
        lost: list[_Member] = []
        for ref in ready:
            if ref in run.running:
                member, i = run.running[ref]
                outcome = self._outcome(ref, run.jobs[i])
                if outcome is None:
                    lost.append(member)
                else:
                    del run.running[ref]
                    yield i, outcome
        for member in self._members:
            if member.ref in ready:
                try:
                    self._take_status(member, self._ray.get(member.ref), run)
                except self._errors():
                    lost.append(member)
                member.ref = None
        for member in {id(m): m for m in lost}.values():
            yield from self._replace(member, run, stop)
        self._advance_starting(ready)
        for member in [member for member in self._starting if member.problem]:
            log.warning("%s", member.problem)
            self._give_up(member)

    def _outcome(self, ref: Any, job: SlideJob) -> Outcome | None:
        """Return the outcome of a slide; None if its worker was lost."""
        try:
            outcome: Outcome = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:  # a bug in the worker, which is still there
            return Outcome(FAILED, f"{job.source}: {_last_line(error)}")
        except self._errors():
            return None
        return outcome

    def _take_status(self, member: _Member, status: WorkerStatus, run: _CohortRun) -> None:
        for line in status.warnings:
            log.warning("%s: %s", member.host, line)
        numbers = {i for worker, i in run.running.values() if worker is member}
        for i in numbers & status.progress.keys():
            run.reports[i](*status.progress[i])

    def _replace(self, member: _Member, run: _CohortRun, stop: bool) -> Iterator[tuple[int, Outcome]]:
        """Start another worker instead of a lost one, and queue its slides again; yield those that are given up."""
        log.warning("the worker on %s (process %d) was lost", member.host, member.pid)
        self._members.remove(member)
        self._kill(member)  # the connection may be lost, and the process alive
        assert member.info is not None
        self._dead_processes.append(member.info.process)
        self._starting.append(self._start())
        for ref in [ref for ref, (worker, _) in run.running.items() if worker is member]:
            _, i = run.running.pop(ref)
            if stop:
                yield i, Outcome(STOPPED, "what is finished is kept")
            elif run.attempts[i] < ATTEMPTS:
                run.waiting.appendleft(i)
            else:
                yield (
                    i,
                    Outcome(
                        FAILED,
                        f"{run.jobs[i].source}: its worker on {member.host} (process {member.pid}) was "
                        "lost, as was one before it (killed, often for lack of memory, or its host "
                        "failed); use a smaller --batch or fewer --workers",
                    ),
                )

    # ------------------------------------------------------------------ Ray

    def _wait(self, refs: list[Any]) -> list[Any]:
        """Return those of ``refs`` that are ready, as soon as one is, or none after `POLL_S`."""
        if not refs:
            time.sleep(POLL_S)
            return []
        first, _ = self._ray.wait(refs, timeout=POLL_S)
        if not first:
            return []
        ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return list(ready)

    def _errors(self) -> tuple[type[Exception], ...]:
        return (self._ray.exceptions.RayError,) if hasattr(self, "_ray") else ()


@dataclass(slots=True, eq=False)
class _Member:
    """A worker as the executor sees it.

    Attributes
    ----------
    handle
        The actor.
    ref
        Its next answer: to `info`, `open`, or `status`; None while nothing is asked.
    info
        Its last answer; None until Ray has started it.
    problem
        Why it cannot be used.
    since, requested_at
        Times at which it was created, and at which its status was last requested.
    """

    handle: Any
    ref: Any
    info: WorkerInfo | None = None
    problem: str = ""
    since: float = field(default_factory=time.monotonic)
    requested_at: float = 0.0

    @property
    def host(self) -> str:
        return "?" if self.info is None else self.info.host

    @property
    def pid(self) -> int:
        return 0 if self.info is None else self.info.process[1]


class _CohortRun:
    """The jobs of one call of `segment_all`: those that wait, and the worker of those that run."""

    def __init__(self, jobs: list[SlideJob], reports: list[Report]) -> None:
        self.jobs, self.reports = jobs, reports
        self.waiting = deque(range(len(jobs)))
        self.attempts = [0] * len(jobs)
        self.running: dict[Any, tuple[_Member, int]] = {}


class _SlideState:
    """Progress of a slide in a worker, and whether it has to stop."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.pixels = 0, 0

    def report(self, done: int, total: int) -> None:
        self.pixels = done, total


class _WarningBuffer(logging.Handler):
    """Keeps warnings until the executor fetches them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[str] = deque(maxlen=100)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def take(self) -> list[str]:
        return [self._lines.popleft() for _ in range(len(self._lines))]


def _with_absolute_paths(job: SlideJob) -> SlideJob:
    """Return a job whose paths are valid in every working directory."""
    slide = job.slide
    if not is_remote(slide.source):
        slide = replace(slide, source=str(Path(slide.source).absolute()))
    files = {name: path.absolute() for name in ("roi", "mask") if (path := getattr(job.options, name)) is not None}
    return replace(
        job,
        slide=slide,
        out=job.out.absolute(),
        options=replace(job.options, **files),
        stage=None if job.stage is None else job.stage.absolute(),
    )


def _connect(cluster: str, closing: ExitStack) -> Any:
    """Start Ray, or join a cluster, and return the module; ``closing`` gets what undoes it.

    Raises
    ------
    EngineError
        If that is not possible.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # they would be sent over the network
    if cluster == LOCAL:
        _keep_to_this_machine()
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise EngineError(f"--ray needs Ray: {install_command('ray')}") from error
    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"address": cluster}
    if cluster == LOCAL:
        folder = _short_folder()
        closing.callback(shutil.rmtree, folder, ignore_errors=True)
        options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        options |= {"_temp_dir": str(folder / "r")}  # Ray makes this folder readable for all users
    else:
        _check_address(cluster)
    # Ray reports each lost worker in a paragraph on stdout, where our results are.
    ray._private.worker._worker_logs_enabled = False
    closing.callback(setattr, ray._private.worker, "_worker_logs_enabled", True)
    try:
        closing.callback(ray.shutdown)
        ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)  # it raises as well
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        advice = "; run it on a host of the cluster, with the same versions of Ray and Python"
        raise EngineError(f"--ray {cluster}: {_last_line(error)}{'' if cluster == LOCAL else advice}") from error
    return ray


def _keep_to_this_machine() -> None:
    """Make Ray listen on 127.0.0.1 only, and refuse everybody who lacks a token.

    Whoever reaches Ray's ports can run code. Ray reads the first variable when it is imported; on
    every system it decides whether other hosts may join. Without our token, Ray would write one to a
    file in the user's home.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _short_folder() -> Path:
    """Make a private folder with a path that is short enough for Ray's sockets."""
    has_room = len(os.fsencode(tempfile.gettempdir())) <= SOCKET_ROOM
    return Path(tempfile.mkdtemp(prefix="ray-", dir=None if has_room else "/tmp"))


def _check_address(cluster: str) -> None:
    """Check that a server listens at an address: Ray itself would try for minutes.

    Raises
    ------
    EngineError
        If it is not an address, or no server answers.
    """
    if cluster == "auto":
        return
    try:
        address = urlsplit(cluster if "://" in cluster else f"ray://{cluster}")
        if address.hostname is None or address.port is None:
            raise ValueError("no host or no port")
        socket.create_connection((address.hostname, address.port), CONNECT_S).close()
    except ValueError as error:
        raise EngineError(
            f"--ray {cluster!r}: not an address; write HOST:6379, ray://HOST:10001, auto or local"
        ) from error
    except OSError as error:
        raise EngineError(
            f"--ray {cluster}: no server answers ({error.strerror or error}); check the address "
            "and that Ray runs (ray start --head)"
        ) from error


def _last_line(error: BaseException) -> str:
    """Return the last line of an error message, in which Ray names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__

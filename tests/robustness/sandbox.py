"""Run ``histo-infer`` on input that may break it, and judge what it did.

Each input runs in a process of its own, forked from one that has the libraries loaded and no
thread: it may crash, hang or ask for any memory without harm. What counts as a failure: a
traceback, death by a signal, running longer than the bound, no clear message, a file outside of
the output folder, results that are there in part, and any program that is started. Linux only.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from histostream.wsi.outputs.journal import JOURNAL
from tests.robustness.hostile.case import Case

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024
SECONDS = 30.0  # wall clock; a sane input takes half a second
HEADROOM_MIB = 1536  # address space beyond what a sane input takes
MAX_LINE = 2000  # characters; a message that a person reads
COMMAND = "histo-infer"
# Loaded before the first fork, so that no child has to; ONNX Runtime has threads and stays out.
LIBRARIES = (
    "histostream.runtime.command",
    "imagecodecs",
    "openslide",
    "tifffile",
    "wsidicom",
    "urllib3",
    "large_image_source_dicom",
    "large_image_source_openslide",
    "large_image_source_pil",
    "large_image_source_tiff",
    "PIL.Image",
)
RESULTS = ("labels.tif", "overview.png", "summary.json", "summary.csv", "report.html")
OUT = "out"
# Python's audit events (PEP 578) of what no input may make the program do.
FORBIDDEN = {
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "subprocess.Popen",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "pickle.find_class",
    "socket.connect",
    "socket.bind",
    "ftplib.connect",
    "http.client.connect",
    "urllib.Request",
    "webbrowser.open",
}
CHANGING = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.chown",
}
NO_MEMORY = re.compile("out of memory|MemoryError|bad_alloc|BFCArena|Failed to allocate", re.I)
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one input led to.

    Attributes
    ----------
    verdict
        "accepted", "refused", or "failed".
    message
        The last line on stderr, or what the failure is.
    status
        Exit status; below 0 the signal that ended the process.
    seconds
        Wall clock.
    peak_mib
        Resident memory at its highest.
    address_mib
        Address space at its highest; 0 where the process could not say.
    out_of_memory
        Whether it was refused because memory did not last, and not by its content.
    """

    verdict: str
    message: str
    status: int
    seconds: float
    peak_mib: float
    address_mib: float
    out_of_memory: bool = False


class Sandbox:
    """The process that inputs are forked from.

    Parameters
    ----------
    folder
        Where inputs are written, one at a time; it is emptied in between.
    seconds
        Bound on each input.
    """

    def __init__(self, folder: Path, *, seconds: float = SECONDS) -> None:
        self._folder, self._seconds = folder.resolve(), seconds
        self.cap_mib = 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.robustness import sandbox; sandbox.serve()"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # no threads of numpy's before the fork
        )

    def measure_cap(self, sane: Case) -> Outcome:
        """Run a sane input without a cap, and set the cap to what it takes and the headroom.

        Raises
        ------
        RuntimeError
            If it is not accepted: then the others' verdicts would mean nothing.
        """
        found = self.run(sane)
        if found.verdict != "accepted":
            raise RuntimeError(f"a sane input is {found.verdict}: {found.message}")
        self.cap_mib = int(found.address_mib) + HEADROOM_MIB
        return found

    def run(self, case: Case) -> Outcome:
        """Run one input and judge it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        place = self._folder / "case"
        for name, content in case.files.items():
            path = os.fsencode(place / name)
            Path(os.fsdecode(path)).parent.mkdir(parents=True, exist_ok=True)
            Path(os.fsdecode(path)).write_bytes(content)
        before = _tree(self._folder)
        job = {"folder": str(place), "args": list(case.args), "cap_mib": self.cap_mib}
        answer = self._ask({**job, "seconds": self._seconds})
        return judge(answer, place, before, _tree(self._folder))

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def close(self) -> None:
        """End the process."""
        self._server.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder but the results', and what the files hold."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not (name + "/").startswith(f"case/{OUT}/") and not name.startswith("case/.log"):
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def judge(answer: dict[str, Any], place: Path, before: dict[str, Any], after: dict[str, Any]) -> Outcome:
    """Turn what a process did into a verdict.

    Parameters
    ----------
    answer
        Of `serve`.
    place
        The folder that the command ran in.
    before, after
        Files outside of the output folder, by name.
    """
    stderr, status = answer.pop("stderr"), answer["status"]
    lines = [line for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    memory = NO_MEMORY.search(last) is not None
    problems = list(_problems(answer, lines, place))
    if before != after:
        changed = sorted(n for n in {*before, *after} if before.get(n, 0) != after.get(n, 0))
        problems.append(f"changed outside of the output folder: {changed}")
    measured = {k: answer[k] for k in ("status", "seconds", "peak_mib", "address_mib")}
    if problems:
        return Outcome("failed", "; ".join(problems), **measured)
    verdict = "refused" if status else "accepted"
    return Outcome(verdict, last, **measured, out_of_memory=bool(status) and memory)


def _problems(answer: dict[str, Any], lines: list[str], place: Path) -> Iterator[str]:
    status, events = answer["status"], answer["events"]
    if answer["timed_out"]:
        yield f"still running after {answer['seconds']:.0f} s"
    elif status < 0:
        yield f"ended by {signal.Signals(-status).name}"
    if any("Traceback" in line for line in lines):
        yield f"traceback: {lines[-1][:300]}"
    last = lines[-1] if lines else ""
    if status > 0 and not (last.startswith(f"{COMMAND}: ") and len(last) > len(COMMAND) + 4):
        yield f"status {status} and no clear message: {last[:300]!r}"
    if any(len(line) > MAX_LINE for line in lines):
        yield f"a line of {max(map(len, lines))} characters: {max(lines, key=len)[:100]!r}..."
    yield from (f"did {event}" for event in events)
    yield from _half_results(place / OUT, status)


def _half_results(out: Path, status: int) -> Iterator[str]:
    """Say what is wrong with the output folder: it holds whole results, or nothing."""
    folders = sorted(path for path in out.iterdir()) if out.is_dir() else []
    if status == 0 and len(folders) != 1:
        yield f"status 0 and {len(folders)} folders of results"
    for folder in folders:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if names == {JOURNAL} and status:
            continue  # with which the same command goes on
        if not names and status:
            yield f"left {folder.name!r} empty"
        elif missing := {"run.json", *RESULTS} - names:
            yield f"results without {sorted(missing)}"
        elif hidden := [name for name in names if name.startswith(".")]:
            yield f"left {hidden}"
        else:
            try:
                json.loads((folder / "run.json").read_text(encoding="utf-8"))
                json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            except ValueError as error:
                yield f"results that are no JSON: {error}"


# --------------------------------------------------------------------------- in the other process


def serve() -> None:
    """Run the inputs that stdin names, one JSON line each; answer with one line each."""
    import large_image

    for name in LIBRARIES:
        importlib.import_module(name)
    large_image.tilesource.loadTileSources()
    if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208
        raise RuntimeError("a library started a thread, which would not survive the fork")
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)


def _fork(job: dict[str, Any]) -> dict[str, Any]:
    """Run one input in a child, to its end or to the bound."""
    folder = Path(job["folder"])
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        _run(folder, job["args"], job["cap_mib"])
    handle = os.pidfd_open(child)
    ended = select.select([handle], [], [], job["seconds"])[0]
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    os.close(handle)
    said = {"events": [], "address_mib": 0.0}
    with contextlib.suppress(OSError, ValueError):
        said = json.loads((folder / ".log.json").read_text())
    stderr = (folder / ".log.stderr").read_bytes().decode(errors="replace")
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": time.perf_counter() - start,
        "peak_mib": usage.ru_maxrss / 1024,
        "timed_out": not ended,
        "stderr": stderr,
        **said,
    }


def _run(folder: Path, args: list[str], cap_mib: int) -> None:
    """Be ``histo-infer`` in the forked process; never returns."""
    os.chdir(folder)
    for number, name in ((1, ".log.stdout"), (2, ".log.stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if cap_mib:
        resource.setrlimit(resource.RLIMIT_AS, (cap_mib * MIB, cap_mib * MIB))
    events: list[str] = []
    _watch(events, folder)
    status = _command(args)
    sys.stdout.flush()
    sys.stderr.flush()
    address = _status_mib("VmPeak")
    log = os.open(".log.json", os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(log, json.dumps({"events": events[:5], "address_mib": address}).encode())
    os._exit(status)


def _command(args: list[str]) -> int:
    import traceback

    from histostream.runtime.cli import main

    try:
        main(args, prog_name=COMMAND)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def _watch(events: list[str], folder: Path) -> None:
    """Note every program that is started, and every change outside of the output folder."""
    allowed = (str(folder / OUT), str(folder / ".log"), os.devnull)

    def inside(path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True  # an open file
        full = os.path.realpath(os.path.join(folder, os.fsdecode(path)))  # noqa: PTH118
        return full.startswith(allowed) or "__pycache__" in full

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            events.append(f"{event} {args[:1]!r}"[:200])
        elif event == "open" and isinstance(args[2], int) and args[2] & WRITE_FLAGS:
            if not inside(args[0]):
                events.append(f"open for writing {args[0]!r}"[:200])
        elif event in CHANGING and not inside(args[0]):
            events.append(f"{event} {args[0]!r}"[:200])

    sys.addaudithook(hook)


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def as_json(outcome: Outcome) -> dict[str, object]:
    """Return an outcome as what JSON can hold."""
    return asdict(outcome)

"""Run ``histo-infer`` on input that may break it, and judge the result.

Each input runs in a process of its own, forked from one that has loaded the libraries and has no threads, so that it
may crash, hang or use any amount of memory without harm. These are failures: a traceback, death by a signal, running
longer than the limit, no clear message, a file outside the output folder, incomplete results, and starting any program.
Linux only.
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
SECONDS = 30.0  # wall clock; a seed input takes half a second
HEADROOM_MIB = 1536  # address space beyond that of a seed input
MAX_LINE = 2000  # characters; a message that a person reads
COMMAND = "histo-infer"
# Loaded once, before the first fork. ONNX Runtime is not among them, because it starts threads.
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
# Python's audit events (PEP 578) that no input may cause.
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
    """The result of one input.

    Attributes
    ----------
    verdict
        "accepted", "refused", or "failed".
    message
        The last line on stderr, or a description of the failure.
    status
        Exit status; if negative, the signal that ended the process.
    seconds
        Wall clock.
    peak_mib
        Largest resident memory.
    address_mib
        Largest address space; 0 if the process could not report it.
    out_of_memory
        Whether it was refused because memory ran out, not because of its content.
    """

    verdict: str
    message: str
    status: int
    seconds: float
    peak_mib: float
    address_mib: float
    out_of_memory: bool = False


class Sandbox:
    """A process that forks a child for each input.

    Parameters
    ----------
    folder
        Inputs are written here, one at a time; it is emptied between them.
    seconds
        Time limit of each input.
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

    def measure_cap(self, seed: Case) -> Outcome:
        """Run a seed input without a cap, and set the cap to its address space plus the headroom.

        Raises
        ------
        RuntimeError
            If it is not accepted, because then the verdicts on other inputs have no meaning.
        """
        outcome = self.run(seed)
        if outcome.verdict != "accepted":
            raise RuntimeError(f"a seed input is {outcome.verdict}: {outcome.message}")
        self.cap_mib = int(outcome.address_mib) + HEADROOM_MIB
        return outcome

    def run(self, case: Case) -> Outcome:
        """Run one input and judge it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        folder = self._folder / "case"
        for name, content in case.files.items():
            path = os.fsencode(folder / name)
            Path(os.fsdecode(path)).parent.mkdir(parents=True, exist_ok=True)
            Path(os.fsdecode(path)).write_bytes(content)
        before = _tree(self._folder)
        job = {"folder": str(folder), "args": list(case.args), "cap_mib": self.cap_mib}
        answer = self._ask({**job, "seconds": self._seconds})
        return judge(answer, folder, before, _tree(self._folder))

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
    """Return every path below a folder except the results, with the content of files."""
    tree: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not (name + "/").startswith(f"case/{OUT}/") and not name.startswith("case/.log"):
            tree[name] = path.read_bytes() if path.is_file() else None
    return tree


def judge(answer: dict[str, Any], folder: Path, before: dict[str, Any], after: dict[str, Any]) -> Outcome:
    """Turn the answer of the process into a verdict.

    Parameters
    ----------
    answer
        Answer of `serve`.
    folder
        The folder that the command ran in.
    before, after
        Files outside of the output folder, by name.
    """
    stderr, status = answer.pop("stderr"), answer["status"]
    lines = [line for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    memory = NO_MEMORY.search(last) is not None
    problems = list(_problems(answer, lines, folder))
    if before != after:
        changed = sorted(n for n in {*before, *after} if before.get(n, 0) != after.get(n, 0))
        problems.append(f"changed outside of the output folder: {changed}")
    measured = {k: answer[k] for k in ("status", "seconds", "peak_mib", "address_mib")}
    if problems:
        return Outcome("failed", "; ".join(problems), **measured)
    verdict = "refused" if status else "accepted"
    return Outcome(verdict, last, **measured, out_of_memory=bool(status) and memory)


def _problems(answer: dict[str, Any], lines: list[str], folder: Path) -> Iterator[str]:
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
    yield from _half_results(folder / OUT, status)


def _half_results(out: Path, status: int) -> Iterator[str]:
    """Yield what is wrong with the output folder, which must hold complete results or nothing."""
    folders = sorted(path for path in out.iterdir()) if out.is_dir() else []
    if status == 0 and len(folders) != 1:
        yield f"status 0 and {len(folders)} folders of results"
    for folder in folders:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if names == {JOURNAL} and status:
            continue  # the same command would resume
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
    """Run the inputs described on stdin, one JSON line each; answer each with one line."""
    import large_image

    for name in LIBRARIES:
        importlib.import_module(name)
    large_image.tilesource.loadTileSources()
    if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208
        raise RuntimeError("a library started a thread, which would not survive the fork")
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)


def _fork(job: dict[str, Any]) -> dict[str, Any]:
    """Run one input in a child, until it ends or its time is up."""
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
    log = {"events": [], "address_mib": 0.0}
    with contextlib.suppress(OSError, ValueError):
        log = json.loads((folder / ".log.json").read_text())
    stderr = (folder / ".log.stderr").read_bytes().decode(errors="replace")
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": time.perf_counter() - start,
        "peak_mib": usage.ru_maxrss / 1024,
        "timed_out": not ended,
        "stderr": stderr,
        **log,
    }


def _run(folder: Path, args: list[str], cap_mib: int) -> None:
    """Run ``histo-infer`` in the forked process; never returns."""
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
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def _watch(events: list[str], folder: Path) -> None:
    """Record every program that is started, and every change outside the output folder."""
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
    """Return an outcome for JSON."""
    return asdict(outcome)

"""Devices: the few CUDA calls that the stream needs, behind one protocol; and how to open one.

The folder is the registry: each file offers ``open(index)`` on one binding of the CUDA driver.
Nothing of CUDA is imported before that. Only the device's primary context is used, so that memory
and streams are shared with ONNX Runtime and TensorRT.

::

    host                           device
    pinned()  ndarray  --upload-->    alloc()  pointer          copies, kernels and fills are queued
                       <-download--                             on a Stream and run in its order;
                                                                an Event orders two streams
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.engines.base import EngineError
from histostream.runtime.engines.tensorrt.build import cache_folder
from histostream.wsi.files import write_whole
from histostream.wsi.optional import install_command

BINDINGS = ("cuda_python", "pycuda")
POINTER, NUMBER = "P", "i"  # as in the module struct: a void pointer, an int32
OPTIONS = ("--std=c++17", "--restrict")
Bytes = NDArray[np.uint8]
log = logging.getLogger(__name__)


class DeviceError(EngineError):
    """A device is not usable, or a call to its driver failed."""


class DeviceMemoryError(DeviceError):
    """The device, or the host's pinned memory, has no room for what was asked.

    Attributes
    ----------
    nbytes
        Size that was asked for.
    """

    def __init__(self, message: str, nbytes: int) -> None:
        super().__init__(message)
        self.nbytes = nbytes


class Event(Protocol):
    """A point in a stream's queue."""

    def record(self, stream: Stream) -> None:
        """Mark what is queued on the stream up to now; an earlier mark is forgotten."""

    def synchronize(self) -> None:
        """Block the host until the mark is reached; at once if there is none."""

    def elapsed_ms(self, start: Event) -> float:
        """Milliseconds on the device since another event; both must be reached."""


class Stream(Protocol):
    """A queue of work that runs in order, beside other queues.

    Attributes
    ----------
    handle
        The CUstream as a number, for libraries.
    """

    handle: int

    def wait(self, event: Event) -> None:
        """Let what is queued from here on wait for the event as it is recorded now."""

    def synchronize(self) -> None:
        """Block the host until the queue is empty."""


class Graph(Protocol):
    """Captured work, launched again in one call; it uses the same addresses each time."""

    def launch(self, stream: Stream) -> None:
        """Queue the work."""

    def close(self) -> None:
        """Free it."""


class Device(Protocol):
    """One GPU.

    Attributes
    ----------
    index
        Its number, as the driver counts.
    name
        As its maker calls it.
    sm
        Its architecture, as "sm90".
    total_bytes
        Its memory.
    multiprocessors
        Their number.
    graphs
        Whether `capture` is possible.
    """

    index: int
    name: str
    sm: str
    total_bytes: int
    multiprocessors: int
    graphs: bool

    def free_bytes(self) -> int:
        """Memory that nobody uses now."""

    def alloc(self, nbytes: int) -> int:
        """Take device memory, its content undefined; returns its address.

        Raises
        ------
        DeviceMemoryError
            If there is not so much; the message names the bytes.
        """

    def free(self, pointer: int) -> None:
        """Give memory back, once nothing queued uses it."""

    def pinned(self, nbytes: int) -> Bytes:
        """Take host memory that copies can run from and to while the host goes on."""

    def unpin(self, array: Bytes) -> None:
        """Give it back."""

    def stream(self) -> Stream:
        """Make a stream; it does not wait for the default stream."""

    def event(self) -> Event:
        """Make an event."""

    def upload(self, pointer: int, array: Bytes, stream: Stream) -> None:
        """Queue a copy of a contiguous, pinned array; leave it alone until that is done."""

    def download(self, array: Bytes, pointer: int, stream: Stream) -> None:
        """Queue a copy to a contiguous, pinned array."""

    def copy(self, to: int, pointer: int, nbytes: int, stream: Stream) -> None:
        """Queue a copy on the device."""

    def zero(self, pointer: int, nbytes: int, stream: Stream) -> None:
        """Queue a fill with zeros."""

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[int],
        stream: Stream,
    ) -> None:
        """Queue a kernel of ``kernels.cu``; the kernels are loaded at the first launch."""

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        """Record what ``work`` queues on the stream, without running it.

        Raises
        ------
        DeviceError
            If that cannot be captured, or the binding has no graphs.
        """

    def activate(self) -> None:
        """Make the device the one that this thread's calls go to."""

    def synchronize(self) -> None:
        """Block the host until all queues are empty."""

    def close(self) -> None:
        """Give everything back that was taken; a second call does nothing."""


def open_device(index: int = 0, *, binding: str = "auto") -> Device:
    """Open a GPU.

    Parameters
    ----------
    index
        Which one, as the driver counts.
    binding
        One of `BINDINGS`; "auto" takes the first that is installed.

    Raises
    ------
    DeviceError
        If no binding is installed, there is no driver, or no such GPU.
    """
    if binding not in ("auto", *BINDINGS):
        raise DeviceError(f"no binding is called {binding!r}: use auto, {', '.join(BINDINGS)}")
    missing = []
    for name in BINDINGS if binding == "auto" else (binding,):
        module = importlib.import_module(f"histostream.runtime.cuda.{name}")
        try:
            return cast(Device, module.open_device(index))
        except ImportError as error:
            missing.append(f"{name.replace('_', '-')}: {error}")
    raise DeviceError(f"no binding of the CUDA driver can be loaded ({'; '.join(missing)}): {install_command('cuda')}")


@cache
def kernel_source() -> str:
    """Return the text of ``kernels.cu``."""
    return (resources.files("histostream.runtime.cuda") / "kernels.cu").read_text(encoding="utf-8")


@cache
def kernel_signatures(source: str | None = None) -> dict[str, str]:
    """Parameters of each kernel, one letter each: `POINTER` or `NUMBER`."""
    text = re.sub(r"//[^\n]*", "", kernel_source() if source is None else source)
    found = re.findall(r"__global__\s+void\s+(\w+)\s*\(([^)]*)\)", text)
    return {
        name: "".join(POINTER if "*" in one else NUMBER for one in parameters.split(",")) for name, parameters in found
    }


def kernel_signature(kernel: str, arguments: Sequence[int]) -> str:
    """Signature of a kernel, once the number of arguments is found to fit it."""
    signature = kernel_signatures()[kernel]
    if len(arguments) != len(signature):
        raise ValueError(f"{kernel} takes {len(signature)} arguments, not {len(arguments)}")
    return signature


def compiled_kernels(sm: str, compiler: str, compile_source: Callable[[str], bytes]) -> bytes:
    """Return the kernels for an architecture: from the user's cache folder, else compiled now.

    Parameters
    ----------
    sm
        The architecture, as "sm90".
    compiler
        Name and version of the compiler; another one compiles again.
    compile_source
        Makes a module of the source.
    """
    path = kernels_path(sm, compiler)
    with suppress(OSError):
        return path.read_bytes()
    log.info("compiling kernels for %s with %s", sm, compiler)
    module = compile_source(kernel_source())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, module)
    except OSError as error:
        log.info("the compiled kernels are not kept: %s", error)
    return module


def kernels_path(sm: str, compiler: str) -> Path:
    """Where compiled kernels are kept: named by source, options, compiler and architecture."""
    said = "\n".join((kernel_source(), *OPTIONS, compiler))
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    return cache_folder() / "kernels" / f"{digest}.{sm}.bin"


def load_kernels(
    sm: str,
    compiler: str,
    compile_source: Callable[[str], bytes],
    load: Callable[[bytes], Any],
) -> Any:
    """Load the kernels; where those from the cache folder do not load, compile them again."""
    path = kernels_path(sm, compiler)
    cached = path.exists()
    try:
        return load(compiled_kernels(sm, compiler, compile_source))
    except DeviceError as error:
        if not cached:
            raise
        log.warning("%s: does not load (%s); compiling again", path, error)
    with suppress(OSError):
        path.unlink()
    return load(compiled_kernels(sm, compiler, compile_source))


def compiler_version() -> str:
    """Name and version of NVRTC.

    Raises
    ------
    ImportError
        If ``cuda-python`` is not installed.
    DeviceError
        If the library itself is not.
    """
    from cuda.bindings import nvrtc

    major, minor = _nvrtc(nvrtc, *_guarded(nvrtc.nvrtcVersion))
    return f"nvrtc {major}.{minor}"


def compile_cubin(source: str, sm: str) -> bytes:
    """Compile CUDA source with NVRTC; needs no GPU.

    Returns
    -------
    Machine code for the architecture; for one that is newer than NVRTC, PTX of the newest that
    NVRTC knows, which the driver compiles further.

    Raises
    ------
    DeviceError
        If the source does not compile; the message has the compiler's first lines.
    """
    from cuda.bindings import nvrtc

    (known,) = _nvrtc(nvrtc, *_guarded(nvrtc.nvrtcGetSupportedArchs))
    number = int(sm.removeprefix("sm"))
    exact = number in known
    if not exact and number < min(known):
        raise DeviceError(
            f"{compiler_version()} does not know {sm}; its oldest is sm{min(known)}; "
            "use --backend cpu, or an older NVRTC"
        )
    target = f"sm_{number}" if exact else f"compute_{max(k for k in known if k < number)}"
    options = [option.encode() for option in (f"--gpu-architecture={target}", *OPTIONS)]
    (program,) = _nvrtc(nvrtc, *nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    try:
        status, *_ = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            (size,) = _nvrtc(nvrtc, *nvrtc.nvrtcGetProgramLogSize(program))
            said = bytearray(size)
            _nvrtc(nvrtc, *nvrtc.nvrtcGetProgramLog(program, said))
            lines = said.decode(errors="replace").strip("\0\n ").splitlines()[:4]
            raise DeviceError(f"kernels.cu does not compile for {sm}: {' | '.join(lines)}; use --backend cpu")
        if exact:
            (size,) = _nvrtc(nvrtc, *nvrtc.nvrtcGetCUBINSize(program))
            code = bytearray(size)
            _nvrtc(nvrtc, *nvrtc.nvrtcGetCUBIN(program, code))
        else:
            (size,) = _nvrtc(nvrtc, *nvrtc.nvrtcGetPTXSize(program))
            code = bytearray(size)
            _nvrtc(nvrtc, *nvrtc.nvrtcGetPTX(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _guarded(call: Callable[[], Any]) -> Any:
    """Call NVRTC the first time: that its library is missing is an exception, not a status."""
    try:
        return call()
    except Exception as error:  # cuda-python's own exceptions have no common base
        raise DeviceError(f"NVRTC cannot be loaded ({first_line(error)}): {install_command('cuda')}") from error


def _nvrtc(nvrtc: Any, status: Any, *values: Any) -> tuple[Any, ...]:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise DeviceError(f"NVRTC failed ({status.name}); use --backend cpu")
    return values


def first_line(error: BaseException) -> str:
    """First line of what an exception says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

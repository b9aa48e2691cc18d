"""The kernels of ``kernels.cu``: their source, their parameters, and their compiled code."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from histostream.runtime.cache import cache_folder
from histostream.runtime.cuda.base import DeviceError
from histostream.wsi.errors import reason
from histostream.wsi.files import write_whole
from histostream.wsi.optional import install_command

POINTER, NUMBER = "P", "i"  # as in the module struct: a void pointer, an int32
COMPILER_OPTIONS = ("--std=c++17", "--restrict")
log = logging.getLogger(__name__)


@cache
def kernel_source() -> str:
    """Return the text of ``kernels.cu``."""
    return (resources.files("histostream.runtime.cuda") / "kernels.cu").read_text(encoding="utf-8")


@cache
def kernel_signatures(source: str | None = None) -> dict[str, str]:
    """Return the parameters of each kernel, one letter each: `POINTER` or `NUMBER`."""
    text = re.sub(r"//[^\n]*", "", kernel_source() if source is None else source)
    kernels = re.findall(r"__global__\s+void\s+(\w+)\s*\(([^)]*)\)", text)
    return {
        name: "".join(POINTER if "*" in parameter else NUMBER for parameter in parameters.split(","))
        for name, parameters in kernels
    }


def kernel_signature(kernel: str, arguments: Sequence[int]) -> str:
    """Return the parameters of one kernel, and check the number of arguments against them."""
    signature = kernel_signatures()[kernel]
    if len(arguments) != len(signature):
        raise ValueError(f"{kernel} takes {len(signature)} arguments, not {len(arguments)}")
    return signature


def load_kernels(
    sm: str,
    compiler: str,
    compile_source: Callable[[str], bytes],
    load: Callable[[bytes], Any],
) -> Any:
    """Load the kernels from the user's cache folder, or compile, load and store them.

    Parameters
    ----------
    sm
        The architecture, as "sm90".
    compiler
        Name and version of the compiler; the code of another one is not used.
    compile_source
        Compiles the source.
    load
        Loads the compiled code; a `DeviceError` of cached code has it compiled again.
    """
    path = kernels_path(sm, compiler)
    with suppress(OSError):
        code = path.read_bytes()
        try:
            return load(code)
        except DeviceError as error:
            log.warning("%s: does not load (%s); compiling again", path, error)
    log.info("compiling kernels for %s with %s", sm, compiler)
    code = compile_source(kernel_source())
    loaded = load(code)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, code)
    except OSError as error:
        log.info("%s: the kernels cannot be stored (%s)", path, error)
    return loaded


def kernels_path(sm: str, compiler: str) -> Path:
    """Return the path of compiled kernels, named by source, options, compiler and architecture."""
    inputs = "\n".join((kernel_source(), *COMPILER_OPTIONS, compiler))
    digest = hashlib.sha256(inputs.encode()).hexdigest()[:16]
    return cache_folder() / "kernels" / f"{digest}.{sm}.bin"


def compiler_version() -> str:
    """Return the name and version of NVRTC.

    Raises
    ------
    ImportError
        If ``cuda-python`` is not installed.
    DeviceError
        If NVRTC itself is not installed.
    """
    from cuda.bindings import nvrtc

    major, minor = _values(nvrtc, *_first_call(nvrtc.nvrtcVersion))
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

    (known,) = _values(nvrtc, *_first_call(nvrtc.nvrtcGetSupportedArchs))
    number = int(sm.removeprefix("sm"))
    if number not in known and number < min(known):
        raise DeviceError(
            f"{compiler_version()} does not know {sm}; its oldest is sm{min(known)}; "
            "use --backend cpu, or an older NVRTC"
        )
    target = f"sm_{number}" if number in known else f"compute_{max(k for k in known if k < number)}"
    options = [option.encode() for option in (f"--gpu-architecture={target}", *COMPILER_OPTIONS)]
    (program,) = _values(nvrtc, *nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))

    def fetch(get_size: Callable[[Any], Any], get: Callable[[Any, bytearray], Any]) -> bytearray:
        (size,) = _values(nvrtc, *get_size(program))
        content = bytearray(size)
        _values(nvrtc, *get(program, content))
        return content

    try:
        status, *_ = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            messages = fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
            lines = messages.strip("\0\n ").splitlines()[:4]
            raise DeviceError(f"kernels.cu does not compile for {sm}: {' | '.join(lines)}; use --backend cpu")
        if number in known:
            return bytes(fetch(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN))
        return bytes(fetch(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX))
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _first_call(call: Callable[[], Any]) -> Any:
    """Call NVRTC for the first time: a missing library is an exception here, not a status."""
    try:
        return call()
    except Exception as error:  # cuda-python's own exceptions have no common base
        raise DeviceError(f"NVRTC cannot be loaded ({reason(error)}): {install_command('cuda')}") from error


def _values(nvrtc: Any, status: Any, *values: Any) -> tuple[Any, ...]:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise DeviceError(f"NVRTC failed ({status.name}); use --backend cpu")
    return values

"""What a result was measured on."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 1024 * 1024
# Attributes of cuda.h.
MULTIPROCESSORS, CAPABILITY_MAJOR, CAPABILITY_MINOR = 16, 75, 76


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it.

    Attributes
    ----------
    capability
        Compute capability, as "9.0".
    """

    name: str
    memory_mib: int
    capability: str
    multiprocessors: int


@dataclass(frozen=True, slots=True)
class Gpus:
    """The NVIDIA GPUs of this machine.

    Attributes
    ----------
    found
        In the driver's order.
    driver
        Version of the driver, as "580.65.06"; None where there is none, or it does not say.
    cuda
        Newest CUDA that the driver runs, as "13.0".
    why_none
        Why ``found`` is empty; "" if it is not.
    """

    found: tuple[Gpu, ...]
    driver: str | None
    cuda: str | None
    why_none: str


def hardware() -> dict[str, object]:
    """Name the processor, its usable cores, the memory and the GPUs."""
    gpus = find_gpus()
    said: dict[str, object] = {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": usable_cores(),
        "memory": _field(Path("/proc/meminfo"), "MemTotal"),
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpus": [asdict(gpu) for gpu in gpus.found],
    }
    if gpus.found:
        said["gpu_driver"] = f"{gpus.driver or 'unknown'}, CUDA {gpus.cuda}"
    return said


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets that the processor says it has; empty where it does not say."""
    path = Path("/proc/cpuinfo")
    return frozenset((_field(path, "flags") or _field(path, "Features") or "").split())


def find_gpus() -> Gpus:
    """Ask the CUDA driver for its GPUs."""
    library = "nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1"
    version = driver_version()
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Gpus((), version, None, f"no NVIDIA driver ({library} is not here)")
    number, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    newest = f"{number.value // 1000}.{number.value % 1000 // 10}"
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if error:
        return Gpus((), version, newest, f"the driver cannot start: {_error_name(cuda, error)}")
    found = tuple(_gpu(cuda, index) for index in range(count.value))
    return Gpus(found, version, newest, "" if found else "the driver sees no GPU")


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None where there is none, or it does not say."""
    text = ctypes.create_string_buffer(96)
    with suppress(OSError, AttributeError):
        name = "nvml.dll" if hasattr(ctypes, "WinDLL") else "libnvidia-ml.so.1"
        nvml = ctypes.CDLL(name)
        if nvml.nvmlInit_v2() == 0:
            nvml.nvmlSystemGetDriverVersion(text, len(text))
            nvml.nvmlShutdown()
    return text.value.decode(errors="replace") or None


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return Gpu(
        name.value.decode(errors="replace"),
        memory.value // MIB,
        f"{attribute(CAPABILITY_MAJOR)}.{attribute(CAPABILITY_MINOR)}",
        attribute(MULTIPROCESSORS),
    )


def _error_name(cuda: ctypes.CDLL, error: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorName(error, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {error}"


def _field(path: Path, name: str) -> str | None:
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None

"""The NVIDIA GPUs of this machine, asked of the driver alone: needs no package."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass

MIB = 1024 * 1024
WINDOWS = hasattr(ctypes, "WinDLL")
# CUdevice_attribute of cuda.h.
MULTIPROCESSOR_COUNT, CAPABILITY_MAJOR, CAPABILITY_MINOR = 16, 75, 76


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
    gpus
        In the driver's order.
    driver
        Version of the driver, as "580.65.06"; None if it is unknown.
    cuda
        Newest CUDA that the driver supports, as "13.0"; None without a driver.
    problem
        Why ``gpus`` is empty; "" if it is not.
    """

    gpus: tuple[Gpu, ...]
    driver: str | None
    cuda: str | None
    problem: str


def find_gpus() -> Gpus:
    """Describe all GPUs."""
    library, count, problem = _start_driver()
    if library is None:
        return Gpus((), driver_version(), None, problem)
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return Gpus(tuple(_describe(library, index) for index in range(count)), driver_version(), cuda, problem)


def has_driver() -> bool:
    """Return whether NVIDIA's driver is installed, even if it sees no GPU."""
    return _start_driver()[0] is not None


def gpu_count() -> int:
    """Return the number of GPUs; 0 without a driver."""
    return _start_driver()[1]


def gpu_sm(index: int = 0) -> str | None:
    """Return the architecture of a GPU, as "sm86"; None if there is no such GPU."""
    library, count, _ = _start_driver()
    if library is None or index >= count:
        return None
    return f"sm{_attribute(library, index, CAPABILITY_MAJOR)}{_attribute(library, index, CAPABILITY_MINOR)}"


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None if it is unknown."""
    text = ctypes.create_string_buffer(96)
    with suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("nvml.dll" if WINDOWS else "libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0:
            nvml.nvmlSystemGetDriverVersion(text, len(text))
            nvml.nvmlShutdown()
    return text.value.decode(errors="replace") or None


def _start_driver() -> tuple[ctypes.CDLL | None, int, str]:
    """Load and start the driver; return it, the number of its GPUs, and why that is 0."""
    name = "nvcuda.dll" if WINDOWS else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None, 0, f"no NVIDIA driver ({name} is not here)"
    count = ctypes.c_int()
    error = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    if error:
        text = ctypes.c_char_p()
        library.cuGetErrorName(error, ctypes.byref(text))
        return library, 0, f"the driver cannot start: {text.value.decode() if text.value else f'error {error}'}"
    return library, count.value, "" if count.value else "the driver sees no GPU"


def _describe(library: ctypes.CDLL, index: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(
        name.value.decode(errors="replace"),
        memory.value // MIB,
        f"{_attribute(library, index, CAPABILITY_MAJOR)}.{_attribute(library, index, CAPABILITY_MINOR)}",
        _attribute(library, index, MULTIPROCESSOR_COUNT),
    )


def _attribute(library: ctypes.CDLL, index: int, attribute: int) -> int:
    device, value = ctypes.c_int(), ctypes.c_int()
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value

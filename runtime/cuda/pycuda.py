"""A GPU through PyCUDA, for hosts that standardise on it; it has no CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np

from histostream.runtime.cuda.base import Bytes, DeviceError, DeviceMemoryError
from histostream.runtime.cuda.kernels import compile_cubin, compiler_version, kernel_signature, load_kernels
from histostream.wsi.errors import reason
from histostream.wsi.optional import install_command


class PyCudaEvent:
    """A mark in a stream's queue; the host sleeps while it waits for it."""

    def __init__(self, device: PyCudaDevice) -> None:
        self._device = device
        driver = device.driver
        self.event = device.call(driver.Event, driver.event_flags.BLOCKING_SYNC)

    def record(self, stream: PyCudaStream) -> None:
        """Put the mark behind the work queued so far."""
        self._device.call(self.event.record, stream.stream)

    def synchronize(self) -> None:
        """Block the host until the mark is reached."""
        self._device.call(self.event.synchronize)

    def elapsed_ms(self, start: PyCudaEvent) -> float:
        """Milliseconds on the device since another event."""
        return float(self._device.call(self.event.time_since, start.event))


class PyCudaStream:
    """A queue of work."""

    def __init__(self, device: PyCudaDevice) -> None:
        self._device = device
        self.stream = device.call(device.driver.Stream, 1)  # 1: CU_STREAM_NON_BLOCKING
        self.handle = int(self.stream.handle)

    def wait(self, event: PyCudaEvent) -> None:
        """Let work queued from now on wait for the event."""
        self._device.call(self.stream.wait_for_event, event.event)

    def synchronize(self) -> None:
        """Block the host until the queue is empty."""
        self._device.call(self.stream.synchronize)


class PyCudaDevice:
    """One GPU; see `histostream.runtime.cuda.base.Device`."""

    graphs = False

    def __init__(self, driver: Any, index: int) -> None:
        self.driver = driver
        self.index = index
        device = self.call(driver.Device, index)
        major, minor = device.compute_capability()
        self.sm = f"sm{major}{minor}"
        self.name = str(device.name())
        self.total_bytes = int(device.total_memory())
        self.multiprocessors = int(device.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT))
        self._context: Any = self.call(device.retain_primary_context)
        self._context.push()
        self._memory: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._module: Any = None
        self._functions: dict[str, Any] = {}

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call PyCUDA; its own exceptions become a `DeviceError`."""
        try:
            return function(*arguments)
        except self.driver.Error as error:
            name = getattr(function, "__name__", "a call")
            raise DeviceError(
                f"GPU {self.index}: {name} failed ({reason(error)}); run it again, or use --backend cpu"
            ) from error

    def free_bytes(self) -> int:
        """Return the size of the unused device memory."""
        free, _ = self.call(self.driver.mem_get_info)
        return int(free)

    def alloc(self, nbytes: int) -> int:
        """Allocate device memory; returns its address."""
        memory = self._allocate(self.driver.mem_alloc, nbytes, "device memory")
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, pointer: int) -> None:
        """Free device memory."""
        self.call(self._memory.pop(pointer).free)

    def pinned(self, nbytes: int) -> Bytes:
        """Allocate page-locked host memory."""
        array = self._allocate(lambda size: self.driver.pagelocked_empty(size, np.uint8), nbytes, "pinned host memory")
        self._pinned[array.ctypes.data] = array
        return np.asarray(array)

    def unpin(self, array: Bytes) -> None:
        """Free page-locked host memory."""
        self.call(self._pinned.pop(array.ctypes.data).base.free)

    def stream(self) -> PyCudaStream:
        """Make a stream."""
        return PyCudaStream(self)

    def event(self) -> PyCudaEvent:
        """Make an event."""
        return PyCudaEvent(self)

    def upload(self, pointer: int, array: Bytes, stream: PyCudaStream) -> None:
        """Queue a copy of a contiguous, pinned array."""
        self.call(self.driver.memcpy_htod_async, pointer, array, stream.stream)

    def download(self, array: Bytes, pointer: int, stream: PyCudaStream) -> None:
        """Queue a copy to a contiguous, pinned array."""
        self.call(self.driver.memcpy_dtoh_async, array, pointer, stream.stream)

    def copy(self, to: int, pointer: int, nbytes: int, stream: PyCudaStream) -> None:
        """Queue a copy on the device."""
        self.call(self.driver.memcpy_dtod_async, to, pointer, nbytes, stream.stream)

    def zero(self, pointer: int, nbytes: int, stream: PyCudaStream) -> None:
        """Queue a fill with zeros."""
        self.call(self.driver.memset_d8_async, pointer, 0, nbytes, stream.stream)

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[int],
        stream: PyCudaStream,
    ) -> None:
        """Queue a kernel of ``kernels.cu``."""
        if kernel not in self._functions:
            self._functions[kernel] = self._function(kernel, arguments)
        function = self._functions[kernel]
        self.call(function.prepared_async_call, grid, block, stream.stream, *arguments)

    def capture(self, stream: PyCudaStream, work: Callable[[], None]) -> NoReturn:
        """Refuse: PyCUDA has no CUDA graphs."""
        raise DeviceError(f"PyCUDA has no CUDA graphs; {install_command('cuda')} for them")

    def activate(self) -> None:
        """Make this the device of the calling thread."""
        with suppress(self.driver.Error):  # another thread has none yet
            self.driver.Context.pop()
        self._context.push()

    def synchronize(self) -> None:
        """Block the host until all queues are empty."""
        self.call(self.driver.Context.synchronize)

    def close(self) -> None:
        """Free everything, and release the device."""
        if self._context is None:
            return
        with suppress(DeviceError):  # a failed device must be released too
            self.synchronize()
        for memory in self._memory.values():
            with suppress(DeviceError):
                self.call(memory.free)
        for array in self._pinned.values():
            with suppress(DeviceError):
                self.call(array.base.free)
        self._memory, self._pinned, self._functions, self._module = {}, {}, {}, None
        self.driver.Context.pop()
        self._context = None  # released once PyCUDA's last stream and event are gone

    def _allocate(self, function: Callable[[int], Any], nbytes: int, kind: str) -> Any:
        try:
            return function(nbytes)
        except self.driver.MemoryError as error:
            raise DeviceMemoryError(
                f"GPU {self.index} ({self.name}): no {nbytes} bytes of {kind} left; "
                "a smaller --batch, or --max-memory for column bands, needs less",
                nbytes,
            ) from error
        except self.driver.Error as error:
            raise DeviceError(
                f"GPU {self.index}: {nbytes} bytes of {kind} cannot be taken ({reason(error)}); use a smaller --batch"
            ) from error

    def _function(self, kernel: str, arguments: Sequence[int]) -> Any:
        signature = kernel_signature(kernel, arguments)
        if self._module is None:
            self._module = load_kernels(
                self.sm,
                _compiler(self.driver),
                self._compile,
                lambda image: self.call(self.driver.module_from_buffer, image),
            )
        function = self.call(self._module.get_function, kernel)
        function.prepare(signature)
        return function

    def _compile(self, source: str) -> bytes:
        """Compile with NVRTC where ``cuda-python`` is here too, else with the toolkit's nvcc."""
        try:
            return compile_cubin(source, self.sm)
        except ImportError:
            pass
        from pycuda.compiler import compile as nvcc

        try:
            return bytes(nvcc(source, no_extern_c=True, arch=self.sm.replace("sm", "sm_")))
        except (OSError, self.driver.CompileError) as error:
            raise DeviceError(
                f"kernels.cu does not compile for {self.sm} ({reason(error)}): "
                f"{install_command('cuda')}, which brings NVRTC"
            ) from error


def _compiler(driver: Any) -> str:
    try:
        return compiler_version()
    except ImportError:
        return f"nvcc, driver {driver.get_version()}"


def open_device(index: int) -> PyCudaDevice:
    """Open a GPU.

    Raises
    ------
    ImportError
        If ``pycuda`` is not installed, or the driver's library is missing.
    DeviceError
        If the driver does not start, or there is no such GPU.
    """
    from pycuda import driver

    try:
        driver.init()
        count = int(driver.Device.count())
    except driver.Error as error:
        raise DeviceError(f"the NVIDIA driver does not start ({reason(error)}); use --backend cpu") from error
    if not 0 <= index < count:
        raise DeviceError(f"there is no GPU {index}: the driver sees {count}; --device counts from 0")
    return PyCudaDevice(driver, index)

"""A GPU through ``cuda-python``, NVIDIA's own binding of the driver; it has CUDA graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from histostream.runtime.cuda.base import Bytes, DeviceError, DeviceMemoryError
from histostream.runtime.cuda.kernels import compile_cubin, compiler_version, kernel_signature, load_kernels
from histostream.wsi.errors import reason

ARGUMENTS = {"P": ctypes.c_void_p, "i": ctypes.c_int32}


class CudaEvent:
    """A mark in a stream's queue; the host sleeps while it waits for it."""

    def __init__(self, device: CudaPythonDevice) -> None:
        self._device = device
        flags = device.driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC
        self.event = device.call("cuEventCreate", int(flags))

    def record(self, stream: CudaStream) -> None:
        """Put the mark behind the work queued so far."""
        self._device.call("cuEventRecord", self.event, stream.stream)

    def synchronize(self) -> None:
        """Block the host until the mark is reached."""
        self._device.call("cuEventSynchronize", self.event)

    def elapsed_ms(self, start: CudaEvent) -> float:
        """Milliseconds on the device since another event."""
        return float(self._device.call("cuEventElapsedTime", start.event, self.event))


class CudaStream:
    """A queue of work."""

    def __init__(self, device: CudaPythonDevice) -> None:
        self._device = device
        flags = device.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = device.call("cuStreamCreate", int(flags))
        self.handle = int(self.stream)

    def wait(self, event: CudaEvent) -> None:
        """Let work queued from now on wait for the event."""
        self._device.call("cuStreamWaitEvent", self.stream, event.event, 0)

    def synchronize(self) -> None:
        """Block the host until the queue is empty."""
        self._device.call("cuStreamSynchronize", self.stream)


class CudaGraph:
    """Captured work."""

    def __init__(self, device: CudaPythonDevice, graph: Any) -> None:
        self._device = device
        self._graph = graph
        self._runnable: Any = device.call("cuGraphInstantiate", graph, 0)

    def launch(self, stream: CudaStream) -> None:
        """Queue the work."""
        self._device.call("cuGraphLaunch", self._runnable, stream.stream)

    def close(self) -> None:
        """Free it."""
        if self._runnable is not None:
            self._device.call("cuGraphExecDestroy", self._runnable)
            self._device.call("cuGraphDestroy", self._graph)
            self._runnable = None


class CudaPythonDevice:
    """One GPU; see `histostream.runtime.cuda.base.Device`."""

    graphs = True

    def __init__(self, driver: Any, index: int) -> None:
        self.driver = driver
        self.index = index
        self._device = self.call("cuDeviceGet", index)
        attribute = driver.CUdevice_attribute
        major, minor, self.multiprocessors = (
            int(self.call("cuDeviceGetAttribute", each, self._device))
            for each in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        self.sm = f"sm{major}{minor}"
        name = bytes(self.call("cuDeviceGetName", 256, self._device))
        self.name = name.split(b"\0")[0].decode(errors="replace")
        self.total_bytes = int(self.call("cuDeviceTotalMem", self._device))
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)
        self._memory: dict[int, int] = {}
        self._pinned: dict[int, int] = {}
        self._streams: list[CudaStream] = []
        self._events: list[CudaEvent] = []
        self._module: Any = None
        self._functions: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        self.activate()

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the driver; returns its values without the status, or raises a `DeviceError`."""
        status, *values = getattr(self.driver, name)(*arguments)
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise self._failed(name, status)
        return values[0] if len(values) == 1 else tuple(values)

    def free_bytes(self) -> int:
        """Return the size of the unused device memory."""
        free, _ = self.call("cuMemGetInfo")
        return int(free)

    def alloc(self, nbytes: int) -> int:
        """Allocate device memory; returns its address."""
        pointer = int(self._allocate("cuMemAlloc", nbytes, "device memory"))
        self._memory[pointer] = nbytes
        return pointer

    def free(self, pointer: int) -> None:
        """Free device memory."""
        del self._memory[pointer]
        self.call("cuMemFree", pointer)

    def pinned(self, nbytes: int) -> Bytes:
        """Allocate page-locked host memory."""
        address = int(self._allocate("cuMemHostAlloc", nbytes, "pinned host memory", 0))
        self._pinned[address] = nbytes
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def unpin(self, array: Bytes) -> None:
        """Free page-locked host memory."""
        address = array.ctypes.data
        del self._pinned[address]
        self.call("cuMemFreeHost", address)

    def stream(self) -> CudaStream:
        """Make a stream."""
        self._streams.append(CudaStream(self))
        return self._streams[-1]

    def event(self) -> CudaEvent:
        """Make an event."""
        self._events.append(CudaEvent(self))
        return self._events[-1]

    def upload(self, pointer: int, array: Bytes, stream: CudaStream) -> None:
        """Queue a copy of a contiguous, pinned array."""
        self.call("cuMemcpyHtoDAsync", pointer, array.ctypes.data, array.nbytes, stream.stream)

    def download(self, array: Bytes, pointer: int, stream: CudaStream) -> None:
        """Queue a copy to a contiguous, pinned array."""
        self.call("cuMemcpyDtoHAsync", array.ctypes.data, pointer, array.nbytes, stream.stream)

    def copy(self, to: int, pointer: int, nbytes: int, stream: CudaStream) -> None:
        """Queue a copy on the device."""
        self.call("cuMemcpyDtoDAsync", to, pointer, nbytes, stream.stream)

    def zero(self, pointer: int, nbytes: int, stream: CudaStream) -> None:
        """Queue a fill with zeros."""
        self.call("cuMemsetD8Async", pointer, 0, nbytes, stream.stream)

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[int],
        stream: CudaStream,
    ) -> None:
        """Queue a kernel of ``kernels.cu``."""
        if kernel not in self._functions:
            self._functions[kernel] = self._function(kernel, arguments)
        function, types = self._functions[kernel]
        self.call("cuLaunchKernel", function, *grid, *block, 0, stream.stream, (tuple(arguments), types), 0)

    def capture(self, stream: CudaStream, work: Callable[[], None]) -> CudaGraph:
        """Record what ``work`` queues on the stream, without running it."""
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", stream.stream, mode)
        try:
            work()
        except BaseException:
            with suppress(DeviceError):  # what broke the capture matters more
                self.call("cuStreamEndCapture", stream.stream)
            raise
        return CudaGraph(self, self.call("cuStreamEndCapture", stream.stream))

    def activate(self) -> None:
        """Make this the device of the calling thread."""
        self.call("cuCtxSetCurrent", self._context)

    def synchronize(self) -> None:
        """Block the host until all queues are empty."""
        self.call("cuCtxSynchronize")

    def close(self) -> None:
        """Free everything, and release the device."""
        if self._context is None:
            return
        self.activate()
        with suppress(DeviceError):  # a failed device must be released too
            self.synchronize()
        calls: list[tuple[str, Any]] = [("cuMemFree", pointer) for pointer in self._memory]
        calls += [("cuMemFreeHost", address) for address in self._pinned]
        calls += [("cuEventDestroy", event.event) for event in self._events]
        calls += [("cuStreamDestroy", stream.stream) for stream in self._streams]
        calls += [("cuModuleUnload", self._module)] if self._module is not None else []
        calls += [("cuDevicePrimaryCtxRelease", self._device)]
        for name, argument in calls:
            with suppress(DeviceError):
                self.call(name, argument)
        self._memory, self._pinned, self._streams, self._events = {}, {}, [], []
        self._functions, self._module, self._context = {}, None, None

    def _allocate(self, name: str, nbytes: int, kind: str, *flags: int) -> Any:
        status, *values = getattr(self.driver, name)(nbytes, *flags)
        if status == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise DeviceMemoryError(
                f"GPU {self.index} ({self.name}): no {nbytes} bytes of {kind} left; "
                "a smaller --batch, or --max-memory for column bands, needs less",
                nbytes,
            )
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise self._failed(name, status)
        return values[0]

    def _function(self, kernel: str, arguments: Sequence[int]) -> tuple[Any, tuple[Any, ...]]:
        signature = kernel_signature(kernel, arguments)
        if self._module is None:
            self._module = load_kernels(
                self.sm,
                compiler_version(),
                lambda source: compile_cubin(source, self.sm),
                lambda image: self.call("cuModuleLoadData", image),
            )
        function = self.call("cuModuleGetFunction", self._module, kernel.encode())
        return function, tuple(ARGUMENTS[letter] for letter in signature)

    def _failed(self, call: str, status: Any) -> DeviceError:
        text = getattr(status, "name", str(status))
        known, description = self.driver.cuGetErrorString(status)
        if known == self.driver.CUresult.CUDA_SUCCESS and description:
            text = f"{text}: {bytes(description).decode(errors='replace')}"
        return DeviceError(f"GPU {self.index}: {call} failed ({text}); run it again, or use --backend cpu")


def open_device(index: int) -> CudaPythonDevice:
    """Open a GPU.

    Raises
    ------
    ImportError
        If ``cuda-python`` is not installed.
    DeviceError
        If there is no driver, or no such GPU.
    """
    from cuda.bindings import driver

    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # cuda-python does not find the driver's library
        raise DeviceError(f"no NVIDIA driver on this machine ({reason(error)}); use --backend cpu") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"the NVIDIA driver does not start ({status.name}); use --backend cpu")
    status, count = driver.cuDeviceGetCount()
    if status != driver.CUresult.CUDA_SUCCESS or not 0 <= index < count:
        raise DeviceError(f"there is no GPU {index}: the driver sees {count or 0}; --device counts from 0")
    return CudaPythonDevice(driver, index)

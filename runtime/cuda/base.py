"""The few CUDA calls that the stream needs, as protocols; and how to open a device.

``cuda_python.py`` and ``pycuda.py`` implement them, each on one binding of the CUDA driver, which
their ``open_device(index)`` imports. Only the device's primary context is used, so that memory and
streams are shared with ONNX Runtime and TensorRT.

::

    host                           device
    pinned()  ndarray  --upload-->    alloc()  pointer          copies, kernels and fills are queued
                       <-download--                             on a Stream and run in its order;
                                                                an Event orders two streams
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.errors import EngineError
from histostream.wsi.optional import install_command

BINDINGS = ("cuda_python", "pycuda")
Bytes = NDArray[np.uint8]


class DeviceError(EngineError):
    """A device is not usable, or a call to its driver failed."""


class DeviceMemoryError(DeviceError):
    """The device's memory, or the host's pinned memory, is used up.

    Attributes
    ----------
    nbytes
        Size of the failed allocation.
    """

    def __init__(self, message: str, nbytes: int) -> None:
        super().__init__(message)
        self.nbytes = nbytes


class Event(Protocol):
    """A mark in a stream's queue."""

    def record(self, stream: Stream) -> None:
        """Put the mark behind the work queued so far; it replaces an earlier mark."""

    def synchronize(self) -> None:
        """Block the host until the mark is reached; returns immediately if nothing was recorded."""

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
        """Let work queued from now on wait for the event's latest mark."""

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
        Its number in the driver's order.
    name
        Its product name.
    sm
        Its architecture, as "sm90".
    total_bytes
        Size of its memory.
    multiprocessors
        Number of its multiprocessors.
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
        """Return the size of the unused device memory."""

    def alloc(self, nbytes: int) -> int:
        """Allocate device memory of undefined content; returns its address.

        Raises
        ------
        DeviceMemoryError
            If not enough is free; the message names the size.
        """

    def free(self, pointer: int) -> None:
        """Free memory; no queued work may use it any more."""

    def pinned(self, nbytes: int) -> Bytes:
        """Allocate page-locked host memory, for copies that run beside the host."""

    def unpin(self, array: Bytes) -> None:
        """Free memory that `pinned` returned."""

    def stream(self) -> Stream:
        """Make a stream that does not synchronise with the default stream."""

    def event(self) -> Event:
        """Make an event."""

    def upload(self, pointer: int, array: Bytes, stream: Stream) -> None:
        """Queue a copy of a contiguous, pinned array to the device; it must not change until then."""

    def download(self, array: Bytes, pointer: int, stream: Stream) -> None:
        """Queue a copy from the device to a contiguous, pinned array."""

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
            If the work cannot be captured, or the binding has no graphs.
        """

    def activate(self) -> None:
        """Make this the device of the calling thread."""

    def synchronize(self) -> None:
        """Block the host until all queues are empty."""

    def close(self) -> None:
        """Free all memory, streams and events, and release the device; a second call does nothing."""


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

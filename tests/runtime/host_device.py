"""A device without a GPU: ``kernels.cu`` itself, compiled with g++, behind the `Device` protocol.

This is a stand-in, because the machines that run these tests have no GPU. What it shows: the
kernels' arithmetic and indices, that no thread depends on another, and that the stream's copies,
events and buffers are right in any order that they allow. What it cannot show: that the calls of
a real driver are right, races inside one launch that need two threads at the same time, and speed.

Work is queued and not done until something waits for it. Then the streams take turns by chance, as
far as their events allow: a copy that should have waited for a kernel, or a buffer that was
reused too early, gives wrong pixels here. Memory is fenced, and full of junk when it is new.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from histostream.runtime.bundle.card import ModelCard, Scores
from histostream.runtime.cuda.base import Device, DeviceMemoryError, Event, Graph, Stream
from histostream.runtime.cuda.kernels import kernel_signature, kernel_signatures, kernel_source
from histostream.runtime.engines.base import Engine
from histostream.runtime.engines.device_engine import BatchBuffers, infer_arrays

SHIM = """
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>
struct Index { unsigned x, y, z; };
static thread_local Index blockIdx, threadIdx, blockDim, gridDim;
#define __global__
#define __device__ static
#define __restrict__
struct Any {
    void* p;
    template <class T> operator T*() const { return static_cast<T*>(p); }
};

template <class Kernel>
static void each_thread(const unsigned* size, unsigned seed, Kernel kernel) {
    gridDim = {size[0], size[1], size[2]};
    blockDim = {size[3], size[4], size[5]};
    unsigned long long count = 1;
    for (int d = 0; d < 6; ++d) count *= size[d];
    std::vector<unsigned> order;
    if (seed) {
        order.resize(count);
        std::iota(order.begin(), order.end(), 0u);
        std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    }
    for (unsigned long long at = 0; at < count; ++at) {
        unsigned long long i = seed ? order[at] : at;
        unsigned place[6];
        for (int d : {3, 4, 5, 0, 1, 2}) { place[d] = i % size[d]; i /= size[d]; }
        blockIdx = {place[0], place[1], place[2]};
        threadIdx = {place[3], place[4], place[5]};
        kernel();
    }
}
"""
FENCE = 64  # bytes before and behind each piece of memory
JUNK = 0xA5


def shim_source() -> str:
    """The kernels, and for each a plain function ``run_<kernel>(size, seed, arguments)``."""
    text = SHIM + kernel_source()
    for name, signature in kernel_signatures().items():
        declared = ", ".join(f"{'void*' if letter == 'P' else 'int'} a{i}" for i, letter in enumerate(signature))
        given = ", ".join(f"Any{{a{i}}}" if letter == "P" else f"a{i}" for i, letter in enumerate(signature))
        text += (
            f'\nextern "C" void run_{name}(const unsigned* size, unsigned seed, {declared}) {{\n'
            f"    each_thread(size, seed, [&] {{ {name}({given}); }});\n}}\n"
        )
    return text


@cache
def host_kernels() -> ctypes.CDLL:
    """Compile the kernels for the host; skips the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed, so kernels.cu cannot be compiled for the host")
    return ctypes.CDLL(str(compiled(shim_source(), "kernels.so")))


def compiled(source: str, name: str) -> Path:
    """Compile a library with g++, once for all processes and runs."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"histostream-tests-{os.getuid()}" / digest
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        part = folder / f"{name}.{os.getpid()}"
        command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*command, "-x", "c++", "-", "-o", part], input=source.encode(), check=True)
        part.replace(path)
    return path


def run_kernel(
    name: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: Sequence[int],
    *,
    seed: int = 0,
) -> None:
    """Run a kernel on host memory, its threads in order, or shuffled by a seed."""
    types = [ctypes.c_void_p if letter == "P" else ctypes.c_int for letter in kernel_signature(name, arguments)]
    size = (ctypes.c_uint * 6)(*grid, *block)
    given = [kind(value) for kind, value in zip(types, arguments, strict=True)]
    getattr(host_kernels(), f"run_{name}")(size, ctypes.c_uint(seed), *given)


class HostEvent:
    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self.marks = 0  # recorded
        self.reached = 0

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, HostStreamQueue)
        self.marks += 1
        mark = self.marks

        def reach() -> None:
            self.reached = mark

        stream.queue(reach)

    def synchronize(self) -> None:
        mark = self.marks
        self._device.run_until(lambda: self.reached >= mark)

    def elapsed_ms(self, start: object) -> float:
        return 0.0


@dataclass
class HostStreamQueue:
    """A stream: work, and marks of events that it waits for."""

    device: HostDevice
    handle: int
    works: deque[Callable[[], None] | tuple[HostEvent, int]] = field(default_factory=deque)

    def queue(self, work: Callable[[], None]) -> None:
        if self.device.capturing is not None:
            self.device.capturing.append(work)
        else:
            self.works.append(work)

    def wait(self, event: object) -> None:
        assert isinstance(event, HostEvent)
        if self.handle - 1 != self.device.careless:
            self.works.append((event, event.marks))

    def synchronize(self) -> None:
        self.device.run_until(lambda: not self.works)

    def step(self) -> bool:
        """Do the next thing, if no event holds it back."""
        if not self.works:
            return False
        work = self.works[0]
        if isinstance(work, tuple):
            event, mark = work
            if event.reached < mark:
                return False
            self.works.popleft()
        else:
            self.works.popleft()
            work()
        return True


@dataclass
class HostGraph:
    works: list[Callable[[], None]]

    def launch(self, stream: Stream) -> None:
        assert isinstance(stream, HostStreamQueue)
        for work in self.works:
            stream.queue(work)

    def close(self) -> None:
        self.works = []


class HostDevice:
    """The `Device` protocol in host memory.

    Parameters
    ----------
    seed
        Of the turns that streams take, and of the order of threads where ``shuffled``.
    shuffled
        Whether the threads of a launch run in a random order.
    total_bytes
        Its memory.
    careless
        Plant a mistake: this stream, 0 for the first that was made, waits for no event.
    junk
        What new memory is full of.
    """

    index = 0
    name = "host stand-in"
    sm = "sm00"
    multiprocessors = 1
    graphs = True

    def __init__(
        self,
        seed: int = 0,
        *,
        shuffled: bool = False,
        total_bytes: int = 1 << 32,
        careless: int | None = None,
        junk: int = JUNK,
    ) -> None:
        host_kernels()
        self.total_bytes = total_bytes
        self.careless, self._junk = careless, junk
        self.capturing: list[Callable[[], None]] | None = None
        self.uploaded = 0
        self.launches: dict[str, int] = {}
        self._random = random.Random(seed)
        self._shuffled = shuffled
        self._streams: list[HostStreamQueue] = []
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._pinned: dict[int, NDArray[np.uint8]] = {}
        self.taken = 0
        self.most = 0

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            streams = self._random.sample(self._streams, len(self._streams))
            assert any(stream.step() for stream in streams), "the streams wait for each other"

    def free_bytes(self) -> int:
        return self.total_bytes - self.taken

    def alloc(self, nbytes: int) -> int:
        assert nbytes > 0
        if nbytes > self.free_bytes():
            raise DeviceMemoryError(f"no {nbytes} bytes of device memory left", nbytes)
        memory = np.full(nbytes + 2 * FENCE, JUNK, np.uint8)
        memory[FENCE:-FENCE] = self._junk
        pointer = memory.ctypes.data + FENCE
        self._memory[pointer] = memory
        self.taken += nbytes
        self.most = max(self.most, self.taken)
        return pointer

    def free(self, pointer: int) -> None:
        memory = self._memory.pop(pointer)
        assert (memory[:FENCE] == JUNK).all(), "something wrote before this memory"
        assert (memory[-FENCE:] == JUNK).all(), "something wrote behind this memory"
        assert not any(stream.works for stream in self._streams), "freed while work is queued"
        self.taken -= len(memory) - 2 * FENCE

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        array = np.full(nbytes, self._junk, np.uint8)
        self._pinned[array.ctypes.data] = array
        return array

    def unpin(self, array: NDArray[np.uint8]) -> None:
        del self._pinned[array.ctypes.data]

    def stream(self) -> Stream:
        self._streams.append(HostStreamQueue(self, len(self._streams) + 1))
        return self._streams[-1]

    def event(self) -> Event:
        return HostEvent(self)

    def upload(self, pointer: int, array: NDArray[np.uint8], stream: Stream) -> None:
        self._check(pointer, array.nbytes)
        self._check_pinned(array)
        self.uploaded += array.nbytes
        self._queue(stream, lambda: self._move(pointer, array.ctypes.data, array.nbytes))

    def download(self, array: NDArray[np.uint8], pointer: int, stream: Stream) -> None:
        self._check(pointer, array.nbytes)
        self._check_pinned(array)
        self._queue(stream, lambda: self._move(array.ctypes.data, pointer, array.nbytes))

    def copy(self, to: int, pointer: int, nbytes: int, stream: Stream) -> None:
        self._check(to, nbytes)
        self._check(pointer, nbytes)
        self._queue(stream, lambda: self._move(to, pointer, nbytes))

    def zero(self, pointer: int, nbytes: int, stream: Stream) -> None:
        self._check(pointer, nbytes)
        self._queue(stream, lambda: _zero(pointer, nbytes))

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[int],
        stream: Stream,
    ) -> None:
        assert grid[0] < 2**31, grid
        assert max(grid[1:]) < 2**16, grid
        assert min(grid) > 0, grid
        assert block[0] * block[1] * block[2] <= 1024
        for letter, value in zip(kernel_signature(kernel, arguments), arguments, strict=True):
            if letter == "P" and value:
                self._check(value, 1)
            assert letter == "P" or -(2**31) <= value < 2**31
        self.launches[kernel] = self.launches.get(kernel, 0) + 1
        seed = self._random.getrandbits(31) | 1 if self._shuffled else 0
        given = tuple(arguments)
        self._queue(stream, lambda: run_kernel(kernel, grid, block, given, seed=seed))

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        self.capturing = []
        try:
            work()
            return HostGraph(self.capturing)
        finally:
            self.capturing = None

    def activate(self) -> None:
        pass

    def synchronize(self) -> None:
        self.run_until(lambda: not any(stream.works for stream in self._streams))

    def close(self) -> None:
        self.synchronize()
        assert not self._memory, f"{len(self._memory)} pieces of device memory were not given back"
        assert not self._pinned, f"{len(self._pinned)} pinned arrays were not given back"

    def _queue(self, stream: Stream, work: Callable[[], None]) -> None:
        assert isinstance(stream, HostStreamQueue)
        stream.queue(work)

    def _move(self, to: int, pointer: int, nbytes: int) -> None:
        ctypes.memmove(to, pointer, nbytes)

    def _check(self, pointer: int, nbytes: int) -> None:
        for start, memory in self._memory.items():
            if start <= pointer and pointer + nbytes <= start + len(memory) - 2 * FENCE:
                return
        raise AssertionError(f"{nbytes} bytes at {pointer:#x} are not memory of this device")

    def _check_pinned(self, array: NDArray[np.uint8]) -> None:
        at = array.ctypes.data
        assert array.flags.c_contiguous
        assert any(
            start <= at and at + array.nbytes <= start + whole.nbytes for start, whole in self._pinned.items()
        ), "this array is not pinned"


class HostDeviceEngine:
    """An engine of the host as a `DeviceEngine` of a `HostDevice`.

    Parameters
    ----------
    engine
        What infers.
    device
        Where tiles and scores are.
    room
        Most tiles that the network's own memory lasts for.
    """

    def __init__(self, engine: Engine, device: HostDevice, *, room: int = 1000) -> None:
        self.card: ModelCard = engine.card
        self.name = f"{engine.name} on {device.name}"
        self.batch = engine.batch
        self.max_batch = 16
        self.device: Device = device
        self.stream: Stream = device.stream()
        self.batches: list[int] = []
        self._engine = engine
        self._room = room
        self._buffers = BatchBuffers(device, engine.card)

    def buffers(self, batch: int) -> tuple[int, int]:
        return self._buffers.get(batch)

    def infer_device(self, tiles: int, scores: int, n: int, stream: Stream) -> None:
        assert isinstance(stream, HostStreamQueue)
        if n > self._room:
            raise DeviceMemoryError(f"the network has no room for {n} tiles", n)
        self.batches.append(n)
        card = self.card
        side = card.tile_px
        shape_in = (n, side, side, card.channels)
        shape_out = (n, len(card.classes), side, side)

        def work() -> None:
            given = array_at(tiles, shape_in).copy()
            array_at(scores, shape_out, card.score_dtype)[...] = self._engine.infer(given)

        stream.queue(work)

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        return infer_arrays(self, tiles)

    def close(self) -> None:
        self._buffers.close()
        self.device.close()


def _zero(pointer: int, nbytes: int) -> None:
    ctypes.memset(pointer, 0, nbytes)


def array_at(pointer: int, shape: tuple[int, ...], dtype: DTypeLike = np.uint8) -> NDArray[Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer)).view(dtype).reshape(shape)


FAKE_DRIVER = """
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <string>

// As much of the CUDA driver as cuda/cuda_python.py calls, in host memory; streams run work
// when it is queued. Counts what is taken, so that a test can see that it is given back.
typedef unsigned long long Pointer;
typedef void (*Launcher)(const unsigned*, void**);
struct Graph { std::vector<std::function<void()>> works; };
static const std::map<std::string, Launcher> launchers = {LAUNCHERS};
static Graph* capturing = nullptr;
static long taken = 0;
static const size_t TOTAL = size_t(1) << 30;
static size_t used = 0;
static std::map<Pointer, size_t> sizes;

static void now_or_later(std::function<void()> work) {
    if (capturing) capturing->works.push_back(work); else work();
}

extern "C" {
int cuInit(unsigned) { return getenv("FAKE_NO_DEVICE") ? 100 : 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int) { *device = 0; return 0; }
int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, length, "fake GPU");
    return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 7 : -1;
    return 0;
}
int cuDeviceTotalMem(size_t* bytes, int) { *bytes = TOTAL; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)8; ++taken; return 0; }
int cuDevicePrimaryCtxRelease(int) { --taken; return 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxSynchronize() { return 0; }
int cuMemGetInfo(size_t* free, size_t* total) { *free = TOTAL - used; *total = TOTAL; return 0; }
int cuMemAlloc(Pointer* pointer, size_t bytes) {
    if (used + bytes > TOTAL) return 2;
    *pointer = (Pointer)malloc(bytes);
    memset((void*)*pointer, 0xA5, bytes);
    used += sizes[*pointer] = bytes;
    ++taken;
    return 0;
}
int cuMemFree(Pointer pointer) {
    if (!sizes.count(pointer)) return 1;
    used -= sizes[pointer];
    sizes.erase(pointer);
    free((void*)pointer);
    --taken;
    return 0;
}
int cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    *pointer = malloc(bytes);
    ++taken;
    return 0;
}
int cuMemFreeHost(void* pointer) { free(pointer); --taken; return 0; }
int cuStreamCreate(void** stream, unsigned flags) {
    if (flags != 1) return 1;
    *stream = (void*)16;
    ++taken;
    return 0;
}
int cuStreamDestroy(void*) { --taken; return 0; }
int cuStreamSynchronize(void*) { return 0; }
int cuStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cuEventCreate(void** event, unsigned flags) {
    if (flags != 1) return 1;
    *event = (void*)24;
    ++taken;
    return 0;
}
int cuEventDestroy(void*) { --taken; return 0; }
int cuEventRecord(void*, void*) { return 0; }
int cuEventSynchronize(void*) { return 0; }
int cuEventElapsedTime(float* ms, void*, void*) { *ms = 1.5f; return 0; }
static int move(void* to, const void* from, size_t bytes) {
    now_or_later([=] { memmove(to, from, bytes); });
    return 0;
}
int cuMemcpyHtoDAsync(Pointer to, const void* from, size_t bytes, void*) {
    return move((void*)to, from, bytes);
}
int cuMemcpyDtoHAsync(void* to, Pointer from, size_t bytes, void*) {
    return move(to, (void*)from, bytes);
}
int cuMemcpyDtoDAsync(Pointer to, Pointer from, size_t bytes, void*) {
    return move((void*)to, (void*)from, bytes);
}
int cuMemsetD8Async(Pointer to, unsigned char value, size_t bytes, void*) {
    now_or_later([=] { memset((void*)to, value, bytes); });
    return 0;
}
int cuModuleLoadData(void** module, const void* image) {
    if (memcmp(image, "\\177ELF", 4)) return 200;
    *module = (void*)32;
    ++taken;
    return 0;
}
int cuModuleUnload(void*) { --taken; return 0; }
int cuModuleGetFunction(void** function, void*, const char* name) {
    if (!launchers.count(name)) return 500;
    *function = (void*)launchers.at(name);
    return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned, void*, void** given, void**) {
    const unsigned size[6] = {gx, gy, gz, bx, by, bz};
    if (capturing) return 1;  // no test captures a kernel
    ((Launcher)function)(size, given);
    return 0;
}
int cuStreamBeginCapture(void*, int mode) { capturing = new Graph; return mode == 1 ? 0 : 1; }
int cuStreamEndCapture(void*, void** graph) {
    *graph = capturing;
    capturing = nullptr;
    ++taken;
    return 0;
}
int cuGraphInstantiateWithFlags(void** runnable, void* graph, Pointer) {
    *runnable = graph;
    ++taken;
    return 0;
}
int cuGraphLaunch(void* runnable, void*) {
    for (auto& work : ((Graph*)runnable)->works) work();
    return 0;
}
int cuGraphExecDestroy(void*) { --taken; return 0; }
int cuGraphDestroy(void* graph) { delete (Graph*)graph; --taken; return 0; }
int cuGetErrorString(int, const char** text) { *text = "in words"; return 0; }
long fake_taken() { return taken; }
int cuGetProcAddress_v2(const char* name, void** function, int, Pointer, int* status) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}
}
"""


@cache
def fake_driver() -> Path:
    """Compile a ``libcuda.so.1`` whose GPU is host memory; returns its folder."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed, so the stand-in for a driver cannot be compiled")
    launchers, table = "", []
    for name, signature in kernel_signatures().items():
        given = ", ".join(
            f"*(void**)given[{i}]" if letter == "P" else f"*(int*)given[{i}]" for i, letter in enumerate(signature)
        )
        launchers += (
            f"static void launch_{name}(const unsigned* size, void** given) {{ run_{name}(size, 0, {given}); }}\n"
        )
        table.append(f'{{"{name}", launch_{name}}}')
    driver = FAKE_DRIVER.replace("LAUNCHERS", ", ".join(table)).replace(
        "static const std::map<std::string, Launcher>",
        launchers + "static const std::map<std::string, Launcher>",
    )
    return compiled(shim_source() + driver, "libcuda.so.1").parent

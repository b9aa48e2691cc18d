"""ONNX Runtime on an NVIDIA GPU.

Tiles and scores are the stream's own device memory (IO binding), the network runs on the stream's
own CUDA stream without waiting for it, and a full batch is one launch of a CUDA graph. ONNX
Runtime's TensorRT provider is not used: `engines.tensorrt` runs TensorRT itself.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard, Scores, graph_file
from histostream.runtime.bundle.onnx_check import read_graph
from histostream.runtime.cuda.base import Device, DeviceError, DeviceMemoryError, Stream, open_device
from histostream.runtime.cuda.driver import gpu_count, has_driver
from histostream.runtime.engines.device_engine import BatchBuffers, infer_arrays, score_bytes
from histostream.runtime.engines.onnxruntime import (
    CUDA_PROVIDER,
    NO_MEMORY,
    ProviderError,
    check_contract,
    check_provider,
    load_library,
    open_session,
)
from histostream.runtime.errors import EngineError
from histostream.runtime.finding import MISSING, OK, Finding, check_module
from histostream.wsi.errors import reason
from histostream.wsi.optional import engine_command, install_command

PRECISIONS = ("fp16", "fp32", "int8")
AUTO_PRIORITY = 20
EXTRA = "cuda"
BATCH = 8  # not measured yet; a few tiles fill a GPU at 512 px
MAX_BATCH = 65535  # a launch's limit in z, which cut_tiles and add_scores use for tiles
# Options of the CUDA provider beyond those that are always set, best first: not every graph can be
# captured (all its nodes have to run on the GPU), nor run channels-last.
OPTIONAL_SETTINGS: tuple[dict[str, str], ...] = (
    {"prefer_nhwc": "1", "enable_cuda_graph": "1"},
    {"prefer_nhwc": "1"},
    {},
)
# Libraries that the provider loads, and their versions; the extra cuda brings them.
CUDA_LIBRARIES = ("cudart", "cublas", "cublasLt", "cufft", "curand", "nvrtc", "cudnn")
LIBRARY_VERSIONS = {"cudnn": (9, 8), "cufft": (12, 11), "curand": (10,)}
CUDA_VERSIONS = (13, 12)
log = logging.getLogger(__name__)


class OnnxRuntimeDeviceEngine:
    """A graph in ONNX Runtime on device memory; see `DeviceEngine`.

    Parameters
    ----------
    session
        On the device, with ``stream`` as its stream.
    card, name
        The model, and the engine's name for the record.
    device, stream
        Where it runs.
    graphs
        Whether the session captures CUDA graphs; only full batches are captured.
    memory_kind
        ONNX Runtime's word for the memory that addresses are of.
    """

    batch = BATCH
    max_batch = MAX_BATCH

    def __init__(
        self,
        session: Any,
        card: ModelCard,
        name: str,
        *,
        device: Device,
        stream: Stream,
        graphs: bool,
        memory_kind: str = "cuda",
    ) -> None:
        self.card = card
        self.name = name
        self.device = device
        self.stream = stream
        self._session = session
        self._graphs = graphs
        self._memory_kind = memory_kind
        self._buffers = BatchBuffers(device, card)
        self._full_batch = 0  # tiles that the buffers were last requested for
        self._bindings: dict[tuple[int, int, int], tuple[Any, Any]] = {}

    def buffers(self, batch: int) -> tuple[int, int]:
        """Return the addresses for the tiles and the scores of a batch."""
        addresses = self._buffers.get(batch)
        if batch != self._full_batch:
            self._full_batch = batch
            self._bindings.clear()
        return addresses

    def infer_device(self, tiles: int, scores: int, n: int, stream: Stream) -> None:
        """Queue the inference of n tiles at one address to scores at another."""
        binding, options = self._binding(tiles, scores, n)
        other_stream = stream is not self.stream
        if other_stream:
            _wait_for(self.device, self.stream, stream)
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            text = f"{self.name}: inference failed on {n} tiles ({reason(error)})"
            if NO_MEMORY.search(str(error)):
                message = f"{text}; a smaller --batch needs less memory"
                raise DeviceMemoryError(message, n * score_bytes(self.card)) from error
            raise EngineError(f"{text}; use --backend cpu") from error
        if other_stream:
            _wait_for(self.device, stream, self.stream)

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        """Map tiles (N, H, W, C) to scores (N, K, H, W)."""
        return infer_arrays(self, tiles)

    def close(self) -> None:
        """Drop the session and release the device."""
        with suppress(DeviceError):  # a failed device must be released too
            self._buffers.close()
        self._bindings.clear()
        self._session = None  # before the stream that it runs on
        self.device.close()

    def _binding(self, tiles: int, scores: int, n: int) -> tuple[Any, Any]:
        import onnxruntime

        key = (tiles, scores, n)
        if key not in self._bindings:
            card, index = self.card, self.device.index
            side = card.tile_px
            binding = self._session.io_binding()
            shape = (n, side, side, card.channels)
            binding.bind_input("tiles", self._memory_kind, index, np.uint8, shape, tiles)
            shape = (n, len(card.classes), side, side)
            binding.bind_output("scores", self._memory_kind, index, card.score_dtype.type, shape, scores)
            options = onnxruntime.RunOptions()
            # Our stream orders the network and the work around it: the host need not wait.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            if self._graphs:
                # A graph holds the addresses, so each needs its own number; -1 runs without one.
                graph_id = abs(hash((tiles, scores, n))) % 2**31 if n == self._full_batch else -1
                options.add_run_config_entry("gpu_graph_id", str(graph_id))
            self._bindings[key] = binding, options
        return self._bindings[key]


def available_hardware() -> str:
    """Return "a GPU" if the driver sees one."""
    return "a GPU" if gpu_count() else ""


def open(
    bundle: Path, card: ModelCard, *, precision: str, threads: int | None = None, device: int = 0
) -> OnnxRuntimeDeviceEngine:
    """Open the graph of one precision; see `EngineModule.open`."""
    library = load_library("cuda", CUDA_PROVIDER)
    path = bundle / graph_file(precision)
    content = read_graph(bundle, card, path.name)
    try:
        gpu = open_device(device)
    except EngineError as error:
        raise EngineError(f"backend 'cuda': {error}") from error
    try:
        stream = gpu.stream()
        session, graphs = _open_session(content, threads, gpu, stream, path)
        check_contract(session, card, path)
    except BaseException:
        gpu.close()
        raise
    name = f"onnxruntime {library.__version__} cuda {precision}"
    return OnnxRuntimeDeviceEngine(session, card, name, device=gpu, stream=stream, graphs=graphs)


def _open_session(content: bytes, threads: int | None, gpu: Device, stream: Stream, path: Path) -> tuple[Any, bool]:
    """Open a session on our stream, with as many optional settings as the graph allows.

    Returns
    -------
    The session, and whether it captures CUDA graphs.
    """
    required = {
        "device_id": str(gpu.index),
        "user_compute_stream": str(stream.handle),
        "use_tf32": "0",  # single precision is single, as in the engines of TensorRT
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, up to twice the need
    }
    for optional in OPTIONAL_SETTINGS:
        try:
            session = open_session(content, CUDA_PROVIDER, threads=threads, settings={**required, **optional})
        except ProviderError:
            raise
        except EngineError as error:
            if not optional:
                raise EngineError(f"{path}: ONNX Runtime cannot load it ({error}); export the model again") from error
            log.info("%s: cannot be run with %s (%s)", path, ", ".join(optional), error)
        else:
            return session, "enable_cuda_graph" in optional
    raise AssertionError("the last settings are always tried")


def _wait_for(device: Device, waiting: Stream, other: Stream) -> None:
    """Let one stream wait for what is queued on another now."""
    event = device.event()
    event.record(other)
    waiting.wait(event)


def check() -> Iterator[Finding]:
    """Check the libraries, the provider and the binding of the driver; nothing without a driver."""
    if not has_driver():
        return
    libraries = {name: find_cuda_library(name) for name in CUDA_LIBRARIES}
    present = ", ".join(file for file in libraries.values() if file)
    if missing := [name for name, file in libraries.items() if not file]:
        text = f"no {', '.join(missing)}{f'; found {present}' if present else ''}"
        yield Finding("CUDA libraries", MISSING, text, install_command("cuda"))
    else:
        yield Finding("CUDA libraries", OK, present)
    with suppress(ImportError, OSError):  # the check of the CPU engine reports it
        if CUDA_PROVIDER in importlib.import_module("onnxruntime").get_available_providers():
            yield check_provider(CUDA_PROVIDER, MISSING, install_command("cuda"))
        else:
            yield Finding(CUDA_PROVIDER, MISSING, "not in the installed ONNX Runtime", engine_command("cuda"))
    yield check_module("cuda-python", "cuda.bindings", install_command("cuda"))


def find_cuda_library(name: str) -> str | None:
    """Find one of NVIDIA's libraries as ONNX Runtime does: in pip's packages, then the system's.

    Returns
    -------
    Its file name, and "(pip)" if it is in a package; None if it is not installed.
    """
    for folder in map(Path, sys.path):
        for pattern in (f"*/lib/lib{name}.so.*", f"*/bin/**/{name}64_*.dll"):
            for file in sorted((folder / "nvidia").glob(pattern)):
                return f"{file.name} (pip)"
    for version in LIBRARY_VERSIONS.get(name, CUDA_VERSIONS):
        file_name = f"{name}64_{version}.dll" if os.name == "nt" else f"lib{name}.so.{version}"
        try:
            ctypes.CDLL(file_name)
        except OSError:
            continue
        return file_name
    return None

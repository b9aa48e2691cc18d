"""ONNX Runtime: on the CPU, and on NVIDIA GPUs through its CUDA provider.

On a GPU, tiles and scores are the stream's own device memory (IO binding), the network runs on the
stream's own CUDA stream without waiting for it, and a full batch is one launch of a CUDA graph.
ONNX Runtime's TensorRT provider is not used: `backends.tensorrt` runs TensorRT itself.
"""

from __future__ import annotations

import io
import logging
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.bundle.onnx_check import read_graph
from histostream.runtime.choices import PRECISIONS
from histostream.runtime.cuda.base import Device, DeviceError, DeviceMemoryError, Stream, first_line, open_device
from histostream.runtime.engines.base import EngineError, check_scores, check_tiles
from histostream.runtime.engines.device_engine import BatchBuffers, infer_arrays, score_bytes
from histostream.wsi.errors import MAX_REASON, printable, reason
from histostream.wsi.optional import either_engine, engine_command, install_command

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ERRORS_ONLY = 3  # ONNX Runtime's severity for messages on stderr; failures are raised by us
FATAL_ONLY = 4
GPU_BATCH = 8  # not measured yet; a few tiles fill a GPU at 512 px
MAX_BATCH = 65535  # a launch's limit in z, which cut_tiles and add_scores use for tiles
# What is asked of the CUDA provider beyond the stream, best first: not every graph can be captured
# (all its nodes have to run on the GPU), nor run channels-last.
WISHES: tuple[dict[str, str], ...] = (
    {"prefer_nhwc": "1", "enable_cuda_graph": "1"},
    {"prefer_nhwc": "1"},
    {},
)
NO_MEMORY = re.compile(r"out of memory|failed to allocate|bad_alloc", re.IGNORECASE)
log = logging.getLogger(__name__)


class OnnxRuntimeEngine:
    """One graph of a bundle in ONNX Runtime, on the CPU."""

    def __init__(self, session: Any, card: ModelCard, name: str) -> None:
        self.card = card
        self.name = name
        self.batch = 1
        self._session = session

    def infer(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Map tiles (N, H, W, C) to scores (N, K, H, W)."""
        check_tiles(self.card, tiles)
        try:
            scores: NDArray[np.uint8] = self._session.run(["scores"], {"tiles": tiles})[0]
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            if NO_MEMORY.search(str(error)):
                raise MemoryError(f"{self.name}: {len(tiles)} tiles at once") from error
            raise EngineError(
                f"{self.name}: inference failed on {len(tiles)} tiles ({reason(error)}); "
                "a smaller --batch needs less memory"
            ) from error
        check_scores(self.card, self.name, scores, len(tiles))
        return scores

    def close(self) -> None:
        """Drop the session."""
        self._session = None


class OnnxRuntimeDeviceEngine:
    """One graph of a bundle in ONNX Runtime, on device memory.

    Parameters
    ----------
    session
        On the device, with ``stream`` as its stream.
    card, name
        The model, and what is recorded of the engine.
    device, stream
        Where it runs.
    graphs
        Whether the session captures CUDA graphs; those are of full batches, a part runs without.
    kind
        ONNX Runtime's word for the memory that addresses are of.
    """

    def __init__(
        self,
        session: Any,
        card: ModelCard,
        name: str,
        *,
        device: Device,
        stream: Stream,
        graphs: bool,
        kind: str = "cuda",
    ) -> None:
        self.card = card
        self.name = name
        self.batch = GPU_BATCH
        self.max_batch = MAX_BATCH
        self.device = device
        self.stream = stream
        self._session = session
        self._graphs = graphs
        self._kind = kind
        self._buffers = BatchBuffers(device, card)
        self._full = 0  # batch that the buffers were asked for
        self._bound: dict[tuple[int, int, int], tuple[Any, Any]] = {}

    def buffers(self, batch: int) -> tuple[int, int]:
        """Addresses for the tiles and the scores of a batch."""
        tiles, scores = self._buffers.get(batch)
        if batch != self._full:
            self._full = batch
            self._bound.clear()
        return tiles, scores

    def infer_device(self, tiles: int, scores: int, n: int, stream: Stream) -> None:
        """Queue the inference of n tiles at an address to scores at another."""
        binding, options = self._binding(tiles, scores, n)
        foreign = stream is not self.stream
        if foreign:
            _order(self.device, stream, self.stream)
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            text = f"{self.name}: inference failed on {n} tiles ({first_line(error)})"
            if NO_MEMORY.search(str(error)):
                message = f"{text}; a smaller --batch needs less memory"
                raise DeviceMemoryError(message, n * score_bytes(self.card)) from error
            raise EngineError(f"{text}; use --backend cpu") from error
        if foreign:
            _order(self.device, self.stream, stream)

    def infer(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Map tiles (N, H, W, C) to scores (N, K, H, W)."""
        return infer_arrays(self, tiles)

    def close(self) -> None:
        """Drop the session, and give the device back."""
        with suppress(DeviceError):  # a failed device still has to be let go
            self._buffers.close()
        self._bound.clear()
        self._session = None  # before the stream that it runs on
        self.device.close()

    def _binding(self, tiles: int, scores: int, n: int) -> tuple[Any, Any]:
        import onnxruntime

        key = (tiles, scores, n)
        if key not in self._bound:
            card, index = self.card, self.device.index
            side = card.tile_px
            binding = self._session.io_binding()
            shape = (n, side, side, card.channels)
            binding.bind_input("tiles", self._kind, index, np.uint8, shape, tiles)
            shape = (n, len(card.classes), side, side)
            binding.bind_output("scores", self._kind, index, np.uint8, shape, scores)
            options = onnxruntime.RunOptions()
            # Our stream orders the network and what is around it: nothing has to be waited for.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            if self._graphs:  # a graph has the addresses in it; -1 runs without one
                name = self._graph_id(tiles, scores) if n == self._full else -1
                options.add_run_config_entry("gpu_graph_id", str(name))
            self._bound[key] = binding, options
        return self._bound[key]

    def _graph_id(self, tiles: int, scores: int) -> int:
        """Return a number that no other batch, and no other memory, of this session has."""
        return abs(hash((tiles, scores, self._full))) % 2**31


def open_onnxruntime(
    bundle: Path,
    card: ModelCard,
    device: str,
    precision: str,
    threads: int | None,
    *,
    index: int = 0,
) -> OnnxRuntimeEngine | OnnxRuntimeDeviceEngine:
    """Open the graph of one precision on "cpu" or "cuda".

    ONNX Runtime falls back to the CPU silently when a GPU provider cannot be loaded; here that is
    an error.

    Parameters
    ----------
    bundle, card
        The model.
    device
        "cpu" or "cuda".
    precision
        Which of its graphs.
    threads
        CPU threads; None leaves it to the library.
    index
        Which GPU.

    Raises
    ------
    EngineError
        If the device is not usable or the model cannot be loaded.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"ONNX Runtime is not installed, or cannot be loaded ({reason(error)}): {either_engine()}"
        ) from error

    file = PRECISIONS[precision]
    content = read_graph(bundle, card, file)
    provider = PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise EngineError(f"backend {device!r}: this ONNX Runtime has no {provider}; {engine_command('cuda')}")
    name = f"onnxruntime {onnxruntime.__version__} {device} {precision}"
    if device == "cpu":
        session = _open_session(content, _session_options(threads), provider, {}, bundle / file)
        _check_contract(session, card, bundle / file)
        return OnnxRuntimeEngine(session, card, name)
    try:
        gpu = open_device(index)
    except EngineError as error:
        raise EngineError(f"backend {device!r}: {error}") from error
    try:
        stream = gpu.stream()
        session, wish = _open_cuda(content, threads, gpu, stream, bundle / file)
        _check_contract(session, card, bundle / file)
    except BaseException:
        gpu.close()
        raise
    graphs = "enable_cuda_graph" in wish
    return OnnxRuntimeDeviceEngine(session, card, name, device=gpu, stream=stream, graphs=graphs)


def _open_cuda(
    content: bytes, threads: int | None, gpu: Device, stream: Stream, path: Path
) -> tuple[Any, dict[str, str]]:
    """Open a session on our stream, with as many of the wishes as the graph allows."""
    import onnxruntime

    with redirect_stdout(io.StringIO()):  # it prints what it does not find; our error says it
        onnxruntime.preload_dlls()
    onnxruntime.set_default_logger_severity(FATAL_ONLY)
    always = {
        "device_id": str(gpu.index),
        "user_compute_stream": str(stream.handle),
        "use_tf32": "0",  # single precision is single, as in the engines of TensorRT
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, up to twice the need
    }
    provider = PROVIDERS["cuda"]
    for wish in WISHES:
        options = _session_options(threads)
        options.log_severity_level = FATAL_ONLY  # what goes wrong is said by our errors
        try:
            session = _open_session(content, options, provider, {**always, **wish}, path)
        except EngineError as error:
            if not wish:
                raise
            log.info("%s: not with %s (%s)", path, ", ".join(wish), error)
            continue
        if session.get_providers()[0] != provider:
            raise EngineError(
                "backend 'cuda' was asked for, but ONNX Runtime cannot use a GPU here (no driver, "
                f"or no CUDA and cuDNN libraries): {install_command('cuda')}, or use --backend cpu"
            )
        return session, wish
    raise AssertionError("the last wish is none")


def _session_options(threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    return options


def _open_session(content: bytes, options: Any, provider: str, settings: dict[str, str], path: Path) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(content, options, providers=[(provider, settings)], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        raise EngineError(f"{path}: ONNX Runtime cannot load it ({reason(error)}); export the model again") from error


def _order(device: Device, first: Stream, then: Stream) -> None:
    """Let one stream wait for what is queued on another now."""
    event = device.event()
    event.record(first)
    then.wait(event)


def _check_contract(session: Any, card: ModelCard, path: Path) -> None:
    inputs = [(i.name, i.type, i.shape[1:]) for i in session.get_inputs()]
    outputs = [(o.name, o.type, o.shape[1:2]) for o in session.get_outputs()]
    wanted_in = [("tiles", "tensor(uint8)", [card.tile_px, card.tile_px, card.channels])]
    wanted_out = [("scores", "tensor(uint8)", [len(card.classes)])]
    if inputs != wanted_in or outputs != wanted_out:
        found = printable(f"takes {inputs} and gives {outputs}")
        raise EngineError(
            f"{path}: {found[:MAX_REASON]}, the card says {wanted_in} and {wanted_out}; export the model again"
        )

"""Run an engine of TensorRT 10, 11 or RTX on the stream's own device memory."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import OLD_SCHEMA, ModelCard, Scores
from histostream.runtime.cache import cache_folder
from histostream.runtime.cuda.base import Device, DeviceError, DeviceMemoryError, Graph, Stream, open_device
from histostream.runtime.engines.device_engine import BatchBuffers, infer_arrays, score_bytes
from histostream.runtime.engines.tensorrt.build import fitting_engine
from histostream.runtime.engines.tensorrt.file import EngineHeader, read_engine
from histostream.runtime.engines.tensorrt.library import Library, find_library, joined, messages
from histostream.runtime.errors import EngineError
from histostream.wsi.files import write_whole

NO_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)
log = logging.getLogger(__name__)


class TensorRtEngine:
    """A deserialised engine and its execution contexts; see `DeviceEngine`.

    A full batch runs as a CUDA graph. The context that a graph was captured from must not change any
    more (NVIDIA's developer guide), so it is a second one, if memory suffices for two; other batches
    run in the first one. TensorRT-RTX captures graphs by itself.

    Parameters
    ----------
    library
        The TensorRT that runs it.
    runtime, engine
        The library's runtime, and the engine that it deserialised.
    header
        Header of the engine's file.
    card
        The model.
    device
        Where it runs.
    logger
        Collects the library's error messages; see `messages`.
    """

    def __init__(
        self,
        library: Library,
        runtime: Any,
        engine: Any,
        header: EngineHeader,
        card: ModelCard,
        device: Device,
        logger: Any,
    ) -> None:
        self.card = card
        self.name = f"{library} {device.sm} {header.precision}"
        self.batch = header.profile.opt_batch
        self.max_batch = header.profile.max_batch
        self.device = device
        self.stream = device.stream()
        self._library, self._runtime, self._engine, self._logger = library, runtime, engine, logger
        self._buffers = BatchBuffers(device, card)
        self._full_batch = 0  # tiles that the buffers were last requested for
        self._graphs = device.graphs and library.name == "tensorrt"
        self._graph: tuple[tuple[int, int], Graph] | None = None  # the addresses, and the graph of a full batch
        self._graph_context: Any = None
        self._cache_path = kernel_cache_path(library, header, device)
        self._context, self._cache = _open_context(library, engine, self._cache_path)
        if self._context is None:
            raise DeviceMemoryError(
                f"{self.name}: no room on {device.name} for the network ({self._errors()}); an "
                "engine for smaller batches needs less",
                int(getattr(engine, "device_memory_size_v2", 0)),
            )

    def buffers(self, batch: int) -> tuple[int, int]:
        """Return the addresses for the tiles and the scores of a batch."""
        if batch != self._full_batch:
            self._forget_graph()
            self._full_batch = batch
        return self._buffers.get(batch)

    def infer_device(self, tiles: int, scores: int, n: int, stream: Stream) -> None:
        """Queue the inference of n tiles at one address to scores at another."""
        if self._graphs and n == self._full_batch:
            if self._graph is None:
                self._capture(tiles, scores, stream)
            if self._graph is not None and self._graph[0] == (tiles, scores):
                self._graph[1].launch(stream)
                return
        self._set(self._context, tiles, scores, n)
        self._execute(self._context, n, stream)

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        """Map tiles (N, H, W, C) to scores (N, K, H, W)."""
        return infer_arrays(self, tiles)

    def close(self) -> None:
        """Store the kernels that TensorRT-RTX compiled, and release the device."""
        if self._context is None:
            return
        with suppress(DeviceError):  # a failed device must be released too
            self.device.synchronize()
        _store_kernels(self._cache, self._cache_path)
        self._forget_graph()
        with suppress(DeviceError):
            self._buffers.close()
        # Before the device that they live on.
        self._context = self._cache = self._engine = self._runtime = None
        self.device.close()

    def _set(self, context: Any, tiles: int, scores: int, n: int) -> None:
        """Set the addresses and the number of tiles of a context."""
        side = self.card.tile_px
        accepted = (
            context.set_input_shape("tiles", (n, side, side, self.card.channels))
            and context.set_tensor_address("tiles", tiles)
            and context.set_tensor_address("scores", scores)
        )
        if not accepted:
            raise EngineError(f"{self.name}: it does not take {n} tiles ({self._errors()}); use a smaller --batch")

    def _execute(self, context: Any, n: int, stream: Stream) -> None:
        if context.execute_async_v3(stream.handle):
            return
        errors = self._errors()
        if NO_MEMORY.search(errors):
            raise DeviceMemoryError(
                f"{self.name}: no memory left for {n} tiles ({errors}); use a smaller --batch",
                n * score_bytes(self.card),
            )
        raise EngineError(f"{self.name}: inference failed on {n} tiles ({errors}); use --backend cuda or cpu")

    def _capture(self, tiles: int, scores: int, stream: Stream) -> None:
        """Capture a full batch as a graph; if that fails, run without graphs from now on."""
        try:
            needed = int(getattr(self._engine, "device_memory_size_v2", 0))
            if self.device.free_bytes() < 2 * needed:
                raise DeviceMemoryError(f"no {needed} bytes to spare for a second context", needed)
            self._graph_context, _ = _open_context(self._library, self._engine, self._cache_path)
            if self._graph_context is None:
                raise DeviceMemoryError(f"no second context ({self._errors()})", needed)
            self._set(self._graph_context, tiles, scores, self._full_batch)
            self._execute(self._graph_context, self._full_batch, stream)  # sets things up that must not be captured
            stream.synchronize()
            graph = self.device.capture(stream, lambda: self._execute(self._graph_context, self._full_batch, stream))
            self._graph = (tiles, scores), graph
        except EngineError as error:
            log.info("%s: runs without a CUDA graph (%s)", self.name, error)
            self._graphs = False
            self._graph_context = None

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self.device.synchronize()
            self._graph[1].close()
        self._graph = self._graph_context = None

    def _errors(self) -> str:
        text = joined(self._logger.errors)
        self._logger.errors.clear()
        return text


def open_tensorrt(bundle: Path, card: ModelCard, precision: str, index: int) -> TensorRtEngine:
    """Open the engine of a bundle that fits a GPU; build it if there is none.

    Parameters
    ----------
    bundle, card
        The model.
    precision
        "fp32", "fp16" or "int8".
    index
        Which GPU, as the driver counts.

    Raises
    ------
    EngineError
        If no GPU or no TensorRT is usable, no engine fits and none can be built, or the one that
        fits does not load.
    """
    try:
        device = open_device(index)
    except EngineError as error:
        raise EngineError(f"backend 'tensorrt': {error}") from error
    try:
        library = find_library()
        path = fitting_engine(bundle, precision, library=library, device_sm=device.sm)
        device.activate()  # the builder may have set another context
        header, plan = read_engine(path)
        logger = messages(library.module)
        runtime, engine = deserialise(library, plan, path, logger)
        _check_contract(library, engine, card, path)
        return TensorRtEngine(library, runtime, engine, header, card, device, logger)
    except BaseException:
        device.close()
        raise


def deserialise(library: Library, plan: bytes, path: Path, logger: Any) -> tuple[Any, Any]:
    """Load a plan onto the current device.

    Returns
    -------
    The library's runtime, which has to outlive the engine, and the engine.

    Raises
    ------
    EngineError
        If it does not load; the message has the library's reason.
    """
    runtime = library.module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{path}: {library} cannot load it on this machine ({joined(logger.errors)}); delete "
            "the file, and it is built again"
        )
    return runtime, engine


def kernel_cache_path(library: Library, header: EngineHeader, device: Device) -> Path:
    """Return the path where the kernels are stored that TensorRT-RTX compiles for a GPU."""
    name = f"{header.plan_sha256[:16]}.{library.version}.{device.sm}.kernels"
    return cache_folder() / "rtx-kernels" / name


def _open_context(library: Library, engine: Any, path: Path) -> tuple[Any, Any]:
    """Make a context, and with TensorRT-RTX the cache of the kernels that it compiles."""
    if library.name != "tensorrt-rtx" or not hasattr(engine, "create_runtime_config"):
        return engine.create_execution_context(), None
    trt = library.module
    config = engine.create_runtime_config()
    cache = None
    if hasattr(config, "create_runtime_cache"):
        cache = config.create_runtime_cache()
        with suppress(OSError):
            if not cache.deserialize(path.read_bytes()):
                log.info("%s: made by another driver or library; compiling again", path)
        config.set_runtime_cache(cache)
    if hasattr(trt, "CudaGraphStrategy"):
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config), cache


def _store_kernels(cache: Any, path: Path) -> None:
    if cache is None:
        return
    try:
        content = cache.serialize()
        if content is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, bytes(content))
    except OSError as error:
        log.info("the compiled kernels are not stored: %s", error)


def _check_contract(library: Library, engine: Any, card: ModelCard, path: Path) -> None:
    """Refuse an engine whose tensors are not those of the card; a static engine may have any batch."""
    trt, side = library.module, card.tile_px
    uint8, mode = trt.DataType.UINT8, trt.TensorIOMode
    score_type = uint8 if card.schema == OLD_SCHEMA else trt.DataType.HALF
    wanted = {
        ("tiles", mode.INPUT, uint8, (side, side, card.channels)),
        ("scores", mode.OUTPUT, score_type, (len(card.classes), side, side)),
    }
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    tensors = {
        (name, engine.get_tensor_mode(name), engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))[1:])
        for name in names
    }
    if tensors != wanted:
        shapes = ", ".join(f"{name} {tuple(engine.get_tensor_shape(name))}" for name in sorted(names))
        raise EngineError(f"{path}: its tensors are {shapes}, not those of the card: delete it, and it is built again")

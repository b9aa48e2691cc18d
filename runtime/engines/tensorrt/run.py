"""TensorRT itself, 10, 11 or RTX: an engine of the bundle on the stream's own device memory."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.cuda.base import Device, DeviceError, DeviceMemoryError, Graph, Stream, open_device
from histostream.runtime.engines.base import EngineError
from histostream.runtime.engines.device_engine import BatchBuffers, infer_arrays, score_bytes
from histostream.runtime.engines.tensorrt.build import (
    Library,
    cache_folder,
    find_library,
    fitting_engine,
    joined,
    messages,
)
from histostream.runtime.engines.tensorrt.file import EngineHeader, read_engine
from histostream.wsi.files import write_whole

NO_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)
log = logging.getLogger(__name__)


class TensorRtEngine:
    """A deserialised engine and its execution contexts.

    A full batch runs as a CUDA graph. What a graph was captured from may not change any more
    (NVIDIA's developer guide), so it has a context of its own, where memory lasts for two; other
    batches run in the first one. TensorRT-RTX captures graphs by itself.

    Parameters
    ----------
    library
        The TensorRT that runs it.
    runtime, engine
        What the plan was deserialised by, and to.
    header
        Of its file.
    card
        The model.
    device
        Where it runs.
    logger
        Keeps what the library says went wrong.
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
        self._full = 0  # batch that the buffers were asked for
        self._graphs = device.graphs and library.name == "tensorrt"
        self._graph: tuple[tuple[int, int], Graph] | None = None  # of a full batch, at addresses
        self._fixed: Any = None  # the graph's context
        self._cache_path = kernel_cache_path(library, header, device)
        self._context, self._cache = _open_context(library, engine, self._cache_path)
        if self._context is None:
            raise DeviceMemoryError(
                f"{self.name}: no room on {device.name} for the network ({self._said()}); an "
                "engine for smaller batches needs less",
                int(getattr(engine, "device_memory_size_v2", 0)),
            )

    def buffers(self, batch: int) -> tuple[int, int]:
        """Addresses for the tiles and the scores of a batch."""
        if batch != self._full:
            self._forget_graph()
            self._full = batch
        return self._buffers.get(batch)

    def infer_device(self, tiles: int, scores: int, n: int, stream: Stream) -> None:
        """Queue the inference of n tiles at an address to scores at another."""
        if self._graphs and n == self._full:
            if self._graph is None:
                self._capture(tiles, scores, stream)
            if self._graph is not None and self._graph[0] == (tiles, scores):
                self._graph[1].launch(stream)
                return
        self._set(self._context, tiles, scores, n)
        self._execute(self._context, n, stream)

    def infer(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Map tiles (N, H, W, C) to scores (N, K, H, W)."""
        return infer_arrays(self, tiles)

    def close(self) -> None:
        """Keep the kernels that TensorRT-RTX compiled, and give the device back."""
        if self._context is None:
            return
        with suppress(DeviceError):  # a failed device still has to be let go
            self.device.synchronize()
        _keep_kernels(self._cache, self._cache_path)
        self._forget_graph()
        with suppress(DeviceError):
            self._buffers.close()
        # Before the device that they live on.
        self._context = self._cache = self._engine = self._runtime = None
        self.device.close()

    def _set(self, context: Any, tiles: int, scores: int, n: int) -> None:
        """Tell a context where and how many the tiles are."""
        side = self.card.tile_px
        done = (
            context.set_input_shape("tiles", (n, side, side, self.card.channels))
            and context.set_tensor_address("tiles", tiles)
            and context.set_tensor_address("scores", scores)
        )
        if not done:
            raise EngineError(f"{self.name}: it does not take {n} tiles ({self._said()}); use a smaller --batch")

    def _execute(self, context: Any, n: int, stream: Stream) -> None:
        if context.execute_async_v3(stream.handle):
            return
        said = self._said()
        if NO_MEMORY.search(said):
            raise DeviceMemoryError(
                f"{self.name}: no memory left for {n} tiles ({said}); use a smaller --batch",
                n * score_bytes(self.card),
            )
        raise EngineError(f"{self.name}: inference failed on {n} tiles ({said}); use --backend cuda or cpu")

    def _capture(self, tiles: int, scores: int, stream: Stream) -> None:
        """Capture a full batch; where that is not possible, run without a graph from here on."""
        try:
            takes = int(getattr(self._engine, "device_memory_size_v2", 0))
            if self.device.free_bytes() < 2 * takes:
                raise DeviceMemoryError(f"no {takes} bytes to spare for a second context", takes)
            self._fixed, _ = _open_context(self._library, self._engine, self._cache_path)
            if self._fixed is None:
                raise DeviceMemoryError(f"no second context ({self._said()})", takes)
            self._set(self._fixed, tiles, scores, self._full)
            self._execute(self._fixed, self._full, stream)  # sets things up; not to be captured
            stream.synchronize()
            graph = self.device.capture(stream, lambda: self._execute(self._fixed, self._full, stream))
            self._graph = (tiles, scores), graph
        except EngineError as error:
            log.info("%s: runs without a CUDA graph (%s)", self.name, error)
            self._graphs = False
            self._fixed = None

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self.device.synchronize()
            self._graph[1].close()
        self._graph = self._fixed = None

    def _said(self) -> str:
        said = joined(self._logger.errors)
        self._logger.errors.clear()
        return said


def open_tensorrt(
    bundle: Path, card: ModelCard, precision: str, *, index: int = 0, rebuild: bool = True
) -> TensorRtEngine:
    """Open the engine of a bundle that fits this GPU; build it if there is none.

    Parameters
    ----------
    bundle, card
        The model.
    precision
        "fp32", "fp16" or "int8".
    index
        Which GPU.
    rebuild
        False makes it an error that no engine fits.

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
        path = fitting_engine(bundle, precision, library=library, device_sm=device.sm, rebuild=rebuild)
        device.activate()  # the builder may have left another context
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
        If it does not load; says why, as the library does.
    """
    runtime = library.module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{path}: {library} cannot load it on this machine ({joined(logger.errors)}); delete "
            "the file and it is built again"
        )
    return runtime, engine


def kernel_cache_path(library: Library, header: EngineHeader, device: Device) -> Path:
    """Where the kernels that TensorRT-RTX compiles for a GPU are kept."""
    name = f"{header.plan_sha256[:16]}.{library.version}.{device.sm}.kernels"
    return cache_folder() / "rtx-kernels" / name


def _open_context(library: Library, engine: Any, path: Path) -> tuple[Any, Any]:
    """Make a context; with TensorRT-RTX also the cache of the kernels that it compiles."""
    if library.name != "tensorrt-rtx" or not hasattr(engine, "create_runtime_config"):
        return engine.create_execution_context(), None
    trt = library.module
    config = engine.create_runtime_config()
    cache = None
    if hasattr(config, "create_runtime_cache"):
        cache = config.create_runtime_cache()
        with suppress(OSError):
            if not cache.deserialize(path.read_bytes()):
                log.info("%s: is of another driver or library; compiling again", path)
        config.set_runtime_cache(cache)
    if hasattr(trt, "CudaGraphStrategy"):
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config), cache


def _keep_kernels(cache: Any, path: Path) -> None:
    if cache is None:
        return
    try:
        content = cache.serialize()
        if content is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, bytes(content))
    except OSError as error:
        log.info("the compiled kernels are not kept: %s", error)


def _check_contract(library: Library, engine: Any, card: ModelCard, path: Path) -> None:
    trt, side = library.module, card.tile_px
    places, mode = engine.num_io_tensors, trt.TensorIOMode
    shape_in, shape_out = (-1, side, side, card.channels), (-1, len(card.classes), side, side)
    wanted = {
        ("tiles", mode.INPUT, trt.DataType.UINT8, shape_in),
        ("scores", mode.OUTPUT, trt.DataType.UINT8, shape_out),
    }
    found = {
        (
            name,
            engine.get_tensor_mode(name),
            engine.get_tensor_dtype(name),
            tuple(engine.get_tensor_shape(name)),
        )
        for name in map(engine.get_tensor_name, range(places))
    }
    if {_any_batch(tensor) for tensor in found} != wanted:
        said = ", ".join(f"{name} {shape}" for name, _, _, shape in sorted(found, key=str))
        raise EngineError(f"{path}: takes and gives {said}, not what the card says: build it again")


def _any_batch(tensor: tuple[str, Any, Any, tuple[int, ...]]) -> Any:
    """Leave out the batch of a static engine."""
    name, mode, kind, shape = tensor
    return name, mode, kind, (-1, *shape[1:])

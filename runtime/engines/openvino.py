"""OpenVINO, for CPUs; the package is optional (extra ``openvino``)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.bundle.onnx_check import read_graph
from histostream.runtime.choices import BF16, PRECISIONS
from histostream.runtime.engines.base import EngineError, check_scores, check_tiles
from histostream.wsi.errors import reason
from histostream.wsi.optional import install_command


class OpenVinoEngine:
    """One graph of a bundle compiled by OpenVINO."""

    def __init__(self, compiled: Any, card: ModelCard, name: str) -> None:
        self.card = card
        self.name = name
        self.batch = 1
        self._compiled = compiled

    def infer(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Map tiles (N, H, W, C) to scores (N, K, H, W)."""
        check_tiles(self.card, tiles)
        try:
            scores = self._compiled(tiles)[0]
        except RuntimeError as error:
            raise EngineError(f"{self.name}: inference failed ({reason(error)}); use --backend cpu") from error
        check_scores(self.card, self.name, scores, len(tiles))
        return np.array(scores, np.uint8)  # a copy: OpenVINO reuses its output buffer

    def close(self) -> None:
        """Drop the compiled model."""
        self._compiled = None


def open_openvino(bundle: Path, card: ModelCard, precision: str, threads: int | None) -> OpenVinoEngine:
    """Compile the graph of one precision for the CPU; what is not INT8 in it computes in FP32.

    Raises
    ------
    EngineError
        If OpenVINO is not installed or cannot load the model.
    """
    try:
        import openvino
    except ImportError as error:
        raise EngineError(f"backend 'openvino' needs a package: {install_command('openvino')}") from error
    file = PRECISIONS["fp32" if precision == BF16 else precision]
    content = read_graph(bundle, card, file)
    # Left to itself, OpenVINO computes FP32 in bfloat16 on CPUs that can.
    hint = BF16 if precision == BF16 else "f32"
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    if precision == BF16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise EngineError(f"precision {BF16}: this CPU has no bfloat16 arithmetic; use int8 or fp32")
    try:
        model = core.read_model(model=io.BytesIO(content))
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise EngineError(f"{bundle / file}: OpenVINO cannot load it ({reason(error)}); use --backend cpu") from error
    name = f"openvino {openvino.__version__.split('-')[0]} cpu {precision}"
    return OpenVinoEngine(compiled, card, name)

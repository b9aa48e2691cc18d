"""OpenVINO, on CPUs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard, Scores, graph_file
from histostream.runtime.bundle.onnx_check import read_graph
from histostream.runtime.choices import BF16
from histostream.runtime.engines.base import check_scores, check_tiles
from histostream.runtime.errors import EngineError
from histostream.runtime.finding import OK, Finding, check_module
from histostream.wsi.errors import reason
from histostream.wsi.optional import install_command

PRECISIONS = ("int8", "fp32", "fp16", BF16)
AUTO_PRIORITY = 0
EXTRA = "openvino"


class OpenVinoEngine:
    """A graph that OpenVINO has compiled; see `Engine`."""

    batch = 1

    def __init__(self, compiled: Any, card: ModelCard, name: str) -> None:
        self.card = card
        self.name = name
        self._compiled = compiled

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        """Map tiles (N, H, W, C) to scores (N, K, H, W)."""
        check_tiles(self.card, tiles)
        try:
            scores = self._compiled(tiles)[0]
        except RuntimeError as error:
            raise EngineError(f"{self.name}: inference failed ({reason(error)}); use --backend cpu") from error
        check_scores(self.card, self.name, scores, len(tiles))
        copy: Scores = np.array(scores)  # a copy: OpenVINO reuses its output buffer
        return copy

    def close(self) -> None:
        """Drop the compiled model."""
        self._compiled = None


def available_hardware() -> str:
    """Return "the CPU"."""
    return "the CPU"


def open(
    bundle: Path, card: ModelCard, *, precision: str, threads: int | None = None, device: int = 0
) -> OpenVinoEngine:
    """Compile the graph of one precision for the CPU; see `EngineModule.open`.

    What is not INT8 in an INT8 graph is computed in FP32.
    """
    import openvino

    path = bundle / graph_file(precision)
    content = read_graph(bundle, card, path.name)
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
        raise EngineError(f"{path}: OpenVINO cannot load it ({reason(error)}); use --backend cpu") from error
    name = f"openvino {openvino.__version__.split('-')[0]} cpu {precision}"
    return OpenVinoEngine(compiled, card, name)


def check() -> Iterator[Finding]:
    """Check that OpenVINO can be loaded, and name its devices."""
    finding = check_module("OpenVINO", "openvino", f"for INT8 on CPUs: {install_command(EXTRA)}")
    if finding.status == OK:
        import openvino

        core = openvino.Core()
        devices = [f"{name} ({core.get_property(name, 'FULL_DEVICE_NAME')})" for name in core.available_devices]
        finding = Finding("OpenVINO", OK, f"{finding.said.split('-')[0]}, on {', '.join(devices)}")
    yield finding

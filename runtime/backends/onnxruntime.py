"""ONNX Runtime: on the CPU, and on NVIDIA GPUs through its CUDA or TensorRT provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.card import PRECISIONS, ModelCard, read_file
from histostream.runtime.engine import EngineError, check_tiles

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
ERRORS_ONLY = 3  # ONNX Runtime's severity for messages on stderr; failures are raised by us
FATAL_ONLY = 4
GPU_BATCH = 8  # not measured yet; a few tiles fill a GPU at 512 px


class OnnxRuntimeEngine:
    """One graph of a bundle in ONNX Runtime."""

    def __init__(self, session: Any, card: ModelCard, name: str, batch: int) -> None:
        self.card = card
        self.name = name
        self.batch = batch
        self._session = session

    def infer(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Map tiles (N, H, W, C) to scores (N, K, H, W)."""
        check_tiles(self.card, tiles)
        try:
            scores: NDArray[np.uint8] = self._session.run(["scores"], {"tiles": tiles})[0]
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise EngineError(
                f"{self.name}: inference failed on {len(tiles)} tiles ({_first_line(error)}); "
                "a smaller --batch needs less memory"
            ) from error
        return scores

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def open_onnxruntime(
    bundle: Path, card: ModelCard, device: str, precision: str, threads: int | None
) -> OnnxRuntimeEngine:
    """Open the graph of one precision on "cpu", "cuda" or "tensorrt".

    ONNX Runtime falls back to the CPU silently when a GPU provider cannot be loaded; here that is
    an error.

    Raises
    ------
    EngineError
        If the device is not usable or the model cannot be loaded.
    """
    import onnxruntime

    file = PRECISIONS[precision]
    content = read_file(bundle, card, file)
    provider = PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise EngineError(
            f"backend {device!r}: this onnxruntime has no {provider}; "
            "pip uninstall onnxruntime, then pip install 'histostream[cuda]'"
        )
    if device != "cpu":
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    if device != "cpu":  # what goes wrong with a GPU is said by the error below
        options.log_severity_level = FATAL_ONLY
        onnxruntime.set_default_logger_severity(FATAL_ONLY)
    options.intra_op_num_threads = threads or 0
    try:
        session = onnxruntime.InferenceSession(content, options, providers=[provider])
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        raise EngineError(
            f"{bundle / file}: ONNX Runtime cannot load it ({_first_line(error)})"
        ) from error
    if session.get_providers()[0] != provider:
        raise EngineError(
            f"backend {device!r} was asked for, but ONNX Runtime cannot use a GPU here (no driver, "
            "or no CUDA and cuDNN libraries); pip install 'histostream[cuda]', or use --backend cpu"
        )
    _check_contract(session, card, bundle / file)
    name = f"onnxruntime {onnxruntime.__version__} {device} {precision}"
    return OnnxRuntimeEngine(session, card, name, 1 if device == "cpu" else GPU_BATCH)


def _check_contract(session: Any, card: ModelCard, path: Path) -> None:
    inputs = [(i.name, i.type, i.shape[1:]) for i in session.get_inputs()]
    outputs = [(o.name, o.type, o.shape[1]) for o in session.get_outputs()]
    wanted_in = [("tiles", "tensor(uint8)", [card.tile_px, card.tile_px, card.channels])]
    wanted_out = [("scores", "tensor(uint8)", len(card.classes))]
    if inputs != wanted_in or outputs != wanted_out:
        raise EngineError(
            f"{path}: takes {inputs} and gives {outputs}, "
            f"the card says {wanted_in} and {wanted_out}; export the model again"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

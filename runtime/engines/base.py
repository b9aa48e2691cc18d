"""Engine: the deployed network, ready to run on tiles; and how to open one.

The folder ``backends`` is the registry: each file offers ``open(bundle, card, device, threads)``.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import CardError, ModelCard, read_card
from histostream.runtime.choices import BACKENDS, BF16, PRECISIONS
from histostream.wsi.errors import HistoError

log = logging.getLogger(__name__)


class EngineError(HistoError, RuntimeError):
    """A backend is not usable on this machine, or the network cannot run on it."""


@runtime_checkable
class Engine(Protocol):
    """A network behind the tile contract.

    Attributes
    ----------
    card
        The model's card.
    name
        Backend, library and precision, for the record.
    batch
        Tiles per inference that suit the device: 1 on a CPU, where more only take more memory.
    """

    card: ModelCard
    name: str
    batch: int

    def infer(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Map tiles (N, H, W, C), raw pixels, to scores (N, K, H, W)."""

    def close(self) -> None:
        """Give the device and its memory back."""


def open_engine(
    bundle: Path,
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    device: int = 0,
    say: Callable[[str], None] = log.info,
) -> Engine:
    """Open the network of a model bundle.

    Parameters
    ----------
    bundle
        Folder with ``card.json``.
    backend
        One of `BACKENDS`. "auto" takes TensorRT where an engine fits or can be built, else ONNX
        Runtime on the GPU where one is usable, else the CPU; a backend that is named is used or is
        an error, never silently replaced.
    precision
        "fp32", "fp16" or "int8": which graph of the bundle is run. "auto" takes FP32 on a CPU,
        where FP16 is not faster; INT8 with OpenVINO and FP16 on a GPU, where the bundle has it.
        "bf16", with OpenVINO only, computes the FP32 graph in bfloat16; no gate has judged that.
    threads
        CPU threads for inference; None leaves it to the library (all cores).
    device
        Which GPU, as the driver counts.
    say
        Told what was chosen and why.

    Raises
    ------
    CardError
        If the bundle is missing something or damaged, or has no graph in that precision.
    EngineError
        If the backend is unknown or not usable on this machine.
    """
    if backend not in BACKENDS:
        raise EngineError(f"no backend is called {backend!r}: use {', '.join(BACKENDS)}")
    if precision == BF16 and backend != "openvino":
        raise EngineError(f"precision {BF16} is OpenVINO's: pass --backend openvino too")
    if precision not in ("auto", BF16, *PRECISIONS):
        raise EngineError(f"no precision is called {precision!r}: use {', '.join(PRECISIONS)}")
    card = read_card(bundle)
    if precision not in ("auto", BF16, *card.precisions):
        raise CardError(
            f"{bundle}: has no {precision} graph, but {', '.join(card.precisions) or 'none'}; "
            "export the model with --precision"
        )
    if backend != "auto":
        engine = _open(bundle, card, backend, precision, threads, device)
        say(f"{engine.name} (asked for)")
        return engine
    reasons = []
    for name in ("tensorrt", "cuda") if gpu_count() else ():
        try:
            engine = _open(bundle, card, name, precision, threads, device)
        except CardError:
            raise
        except HistoError as error:
            reasons.append(f"{name}: {error}")
            continue
        say(f"{engine.name} ({'; '.join(('a GPU is here', *(f'not {r}' for r in reasons)))})")
        return engine
    if reasons:
        log.warning("a GPU is here but cannot be used, running on the CPU: %s", "; ".join(reasons))
    engine = _open(bundle, card, "cpu", precision, threads, device)
    say(f"{engine.name} ({'the GPU cannot be used' if reasons else 'no GPU is here'})")
    return engine


def _open(
    bundle: Path,
    card: ModelCard,
    backend: str,
    precision: str,
    threads: int | None,
    device: int,
) -> Engine:
    """Open one backend, or say why not."""
    if precision == "auto":
        best = {"cpu": "fp32", "openvino": "int8"}.get(backend, "fp16")
        precision = best if best in card.precisions else "fp32"
    if backend == "openvino":
        from histostream.runtime.engines import openvino

        return openvino.open_openvino(bundle, card, precision, threads)
    if backend == "tensorrt":
        from histostream.runtime.engines.tensorrt import run as tensorrt

        return tensorrt.open_tensorrt(bundle, card, precision, index=device)
    from histostream.runtime.engines import onnxruntime

    return onnxruntime.open_onnxruntime(bundle, card, backend, precision, threads, index=device)


def check_tiles(card: ModelCard, tiles: NDArray[np.uint8]) -> None:
    """Refuse tiles that do not keep the tile contract.

    Raises
    ------
    ValueError
        If type or shape are not what the card says.
    """
    wanted = (card.tile_px, card.tile_px, card.channels)
    if tiles.dtype != np.uint8 or tiles.shape[1:] != wanted:
        raise ValueError(
            f"tiles are {tiles.dtype} {tiles.shape}; this model takes uint8 (N, {wanted[0]}, {wanted[1]}, {wanted[2]})"
        )


def check_scores(card: ModelCard, name: str, scores: NDArray[Any], n: int) -> None:
    """Refuse scores that do not keep the tile contract: what a graph declares may not be so.

    Raises
    ------
    EngineError
        If type or shape are not what the card says of ``n`` tiles.
    """
    wanted = (n, len(card.classes), card.tile_px, card.tile_px)
    if scores.dtype != np.uint8 or scores.shape != wanted:
        raise EngineError(
            f"{name}: the network gives {scores.dtype} {scores.shape}, the card says uint8 "
            f"{wanted}; export the model again"
        )


def to_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Turn grey pixels (..., 1) into RGB by repetition, or RGB into grey (ITU-R 601)."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    grey = pixels.astype(np.float32) @ np.array((0.299, 0.587, 0.114), np.float32)
    return np.asarray(np.floor(grey + 0.5), np.uint8)[..., None]


def gpu_count() -> int:
    """Count NVIDIA GPUs as the driver sees them; 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value

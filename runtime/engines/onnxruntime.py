"""What the engines of ONNX Runtime share, on the CPU (``cpu.py``) and on GPUs (``cuda.py``)."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.errors import EngineError
from histostream.runtime.finding import BROKEN, OK, Finding
from histostream.wsi.errors import MAX_REASON, printable, reason
from histostream.wsi.optional import either_engine, engine_command, install_command

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
ERRORS_ONLY, FATAL_ONLY = 3, 4  # ONNX Runtime's severity of messages on stderr
ONNX_NAMES = {np.dtype(np.float16): "float16", np.dtype(np.uint8): "uint8"}
NO_MEMORY = re.compile(r"out of memory|failed to allocate|bad_alloc", re.IGNORECASE)
# A convolution of one channel by 2, as ONNX: the check runs where the package onnx is not installed.
TINY_MODEL = bytes.fromhex(
    "080812003a630a0f0a01780a01771201792204436f6e761201742a130801080108010801100142017"
    "74a04000000405a1b0a017812160a14080112100a0208010a0208010a0208040a020804621b0a0179"
    "12160a14080112100a0208010a0208010a0208040a02080442040a001011"
)


class ProviderError(EngineError):
    """ONNX Runtime runs, but not on the device that was requested."""


def open_session(
    model: bytes, provider: str, *, threads: int | None = None, settings: Mapping[str, str] | None = None
) -> Any:
    """Open a graph with one provider.

    ONNX Runtime falls back to the CPU silently where a GPU provider cannot be loaded, and prints
    what is missing; here the fallback is an error and nothing is printed.

    Parameters
    ----------
    model
        The ONNX file's content.
    provider
        "CPUExecutionProvider" or "CUDAExecutionProvider".
    threads
        CPU threads; None leaves it to the library.
    settings
        Options of the provider.

    Raises
    ------
    ImportError
        If ONNX Runtime is not installed.
    ProviderError
        If the provider is not usable here.
    EngineError
        If the graph cannot be loaded; the message is the library's.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    if provider != CPU_PROVIDER:
        options.log_severity_level = FATAL_ONLY
        onnxruntime.set_default_logger_severity(FATAL_ONLY)
        with quiet():
            onnxruntime.preload_dlls()
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=[(provider, dict(settings or {}))], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        # Without the line of the library's source that it begins with.
        raise EngineError(re.sub(r"^/\S+:\d+ .*?\) ", "", reason(error))) from error
    if session.get_providers()[0] != provider:
        raise ProviderError(
            f"{provider}: ONNX Runtime cannot use a GPU here (no driver, or no CUDA and cuDNN libraries): "
            f"{install_command('cuda')}, or use --backend cpu"
        )
    return session


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what libraries print and log of what is missing; the error that follows has the reason."""
    with contextlib.redirect_stdout(io.StringIO()):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def load_library(backend: str, provider: str) -> Any:
    """Import ONNX Runtime and check that this build of it has a provider.

    Raises
    ------
    EngineError
        If it is not installed, cannot be loaded, or has no such provider.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"ONNX Runtime is not installed, or cannot be loaded ({reason(error)}): {either_engine()}"
        ) from error
    if provider not in onnxruntime.get_available_providers():
        raise EngineError(f"backend {backend!r}: this ONNX Runtime has no {provider}; {engine_command('cuda')}")
    return onnxruntime


def check_contract(session: Any, card: ModelCard, path: Path) -> None:
    """Refuse a graph whose inputs and outputs are not those of the card.

    Raises
    ------
    EngineError
        If so.
    """
    inputs = [(i.name, i.type, i.shape[1:]) for i in session.get_inputs()]
    outputs = [(o.name, o.type, o.shape[1:2]) for o in session.get_outputs()]
    wanted_in = [("tiles", "tensor(uint8)", [card.tile_px, card.tile_px, card.channels])]
    wanted_out = [("scores", f"tensor({ONNX_NAMES[card.score_dtype]})", [len(card.classes)])]
    if inputs != wanted_in or outputs != wanted_out:
        signature = printable(f"takes {inputs} and gives {outputs}")
        raise EngineError(
            f"{path}: {signature[:MAX_REASON]}, the card says {wanted_in} and {wanted_out}; export the model again"
        )


def check_provider(provider: str, status_if_not: str, advice: str) -> Finding:
    """Run a tiny graph: that a provider is listed only means that it was compiled in."""
    pixels = np.ones((1, 1, 4, 4), np.float32)
    try:
        (out,) = open_session(TINY_MODEL, provider).run(None, {"x": pixels})
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        return Finding(provider, status_if_not, reason(error).removeprefix(f"{provider}: "), advice)
    if not np.array_equal(out, 2 * pixels):
        return Finding(provider, BROKEN, "computes 1 x 2 wrongly", advice)
    return Finding(provider, OK, "ran a graph")

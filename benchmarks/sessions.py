"""ONNX Runtime sessions that run where they were asked to, and print nothing."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from typing import Any

FATAL_ONLY = 4  # ONNX Runtime's severity


def open_session(model: bytes, provider: str) -> Any:
    """Open a graph with one provider.

    ONNX Runtime prints what is missing, in several places, and then takes the CPU.

    Raises
    ------
    ImportError
        If ONNX Runtime is not installed.
    RuntimeError
        If the provider is not usable here.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(FATAL_ONLY)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    with quiet():
        if provider != "CPUExecutionProvider" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        try:
            session = onnxruntime.InferenceSession(model, options, providers=[provider], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise RuntimeError(f"{provider}: {_reason(error)}") from error
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"{provider}: no GPU that it can use, or no CUDA and cuDNN libraries")
    return session


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what libraries print of what they miss: the reason is in the error that is raised."""
    with contextlib.redirect_stdout(io.StringIO()):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _reason(error: Exception) -> str:
    """Return the first line without the place in the library's source that it begins with."""
    return re.sub(r"^/\S+:\d+ .*?\) ", "", first_line(error))


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, or its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

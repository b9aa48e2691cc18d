"""The TensorRT that is installed here: TensorRT 10 or 11, or TensorRT-RTX."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from histostream.runtime.cuda import driver
from histostream.runtime.errors import EngineError
from histostream.wsi.optional import install_command

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}  # extras of HistoStream
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Library:
    """A TensorRT that is installed here.

    Attributes
    ----------
    name
        "tensorrt" or "tensorrt-rtx".
    version
        All parts of its version.
    module
        The imported Python module.
    """

    name: str
    version: str
    module: Any

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def targets(self) -> tuple[str, ...]:
        """The GPUs that it can build for without having one, as "sm86"; empty for "tensorrt"."""
        if self.name == "tensorrt":
            return ()
        names = self.module.ComputeCapability.__members__
        return ordered(name.lower() for name in names if name.startswith("SM"))


def find_library(wanted: str = "auto") -> Library:
    """Find the TensorRT to use.

    Parameters
    ----------
    wanted
        "tensorrt", "rtx", or "auto": TensorRT if it is installed and this machine has a GPU, else
        TensorRT-RTX.

    Raises
    ------
    EngineError
        If it is not installed or does not load.
    """
    if wanted not in ("auto", "tensorrt", "rtx"):
        raise EngineError(f"no TensorRT is called {wanted!r}: use auto, tensorrt, rtx")
    if wanted != "auto":
        return _load("tensorrt" if wanted == "tensorrt" else "tensorrt-rtx")
    reasons = []
    for name in ("tensorrt", "tensorrt-rtx") if driver.gpu_sm() else ("tensorrt-rtx",):
        try:
            return _load(name)
        except EngineError as error:
            reasons.append(str(error))
    raise EngineError(
        f"no TensorRT is usable here ({'; '.join(reasons)}): {install_command('rtx')} for GeForce "
        f"and RTX cards, {install_command('tensorrt')} for any NVIDIA GPU, on its own machine"
    )


def _load(name: str) -> Library:
    try:
        module = importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:  # OSError: the package is here, its libraries are not
        raise EngineError(f"{name} cannot be loaded ({error}): {install_command(EXTRAS[name])}") from error
    return Library(name, str(module.__version__), module)


def messages(trt: Any) -> Any:
    """Make a logger for the library that collects its errors in a list, ``errors``, and prints nothing."""

    class Messages(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                log.debug("%s: %s", trt.__name__, message)

    return Messages()


def joined(messages: list[str]) -> str:
    """Join the first three different messages of the library to one line."""
    lines = [" ".join(message.split())[:400] for message in dict.fromkeys(messages)]
    return "; ".join(lines[:3]) or "no reason given"


def ordered(targets: Iterable[str]) -> tuple[str, ...]:
    """Return architectures in ascending order, without duplicates."""
    return tuple(sorted(set(targets), key=lambda target: (sm_number(target), target)))


def sm_number(target: str) -> int:
    """Return the number of an architecture such as "sm86"; 0 if it is none."""
    digits = target.removeprefix("sm")
    return int(digits) if digits.isascii() and digits.isdigit() else 0

"""TensorRT, on NVIDIA GPUs: builds the engine of a bundle where none fits, and runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.cuda.driver import gpu_count, has_driver
from histostream.runtime.engines.base import Engine
from histostream.runtime.finding import Finding, check_module
from histostream.wsi.optional import install_command

PRECISIONS = ("fp16", "fp32", "int8")
AUTO_PRIORITY = 30
EXTRA = "tensorrt"


def available_hardware() -> str:
    """Return "a GPU" if the driver sees one."""
    return "a GPU" if gpu_count() else ""


def open(bundle: Path, card: ModelCard, *, precision: str, threads: int | None = None, device: int = 0) -> Engine:
    """Open the engine of one precision that fits this GPU, or build it; see `EngineModule.open`."""
    from histostream.runtime.engines.tensorrt.run import open_tensorrt

    return open_tensorrt(bundle, card, precision, device)


def check() -> Iterator[Finding]:
    """Check that the libraries can be loaded; nothing without a driver."""
    if has_driver():
        yield check_module("TensorRT", "tensorrt", f"for data-centre GPUs: {install_command('tensorrt')}")
        yield check_module("TensorRT-RTX", "tensorrt_rtx", f"for RTX cards: {install_command('rtx')}")

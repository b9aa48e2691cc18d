"""ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard, Scores, graph_file
from histostream.runtime.bundle.onnx_check import read_graph
from histostream.runtime.engines.base import check_scores, check_tiles
from histostream.runtime.engines.onnxruntime import (
    CPU_PROVIDER,
    NO_MEMORY,
    check_contract,
    check_provider,
    load_library,
    open_session,
)
from histostream.runtime.errors import EngineError
from histostream.runtime.finding import BROKEN, OK, Finding
from histostream.wsi.errors import reason
from histostream.wsi.optional import either_engine, engine_command

PRECISIONS = ("fp32", "fp16", "int8")  # FP16 is not faster here
AUTO_PRIORITY = 10
EXTRA = "cpu"


class OnnxRuntimeEngine:
    """A graph in ONNX Runtime on the CPU; see `Engine`."""

    batch = 1

    def __init__(self, session: Any, card: ModelCard, name: str) -> None:
        self.card = card
        self.name = name
        self._session = session

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        """Map tiles (N, H, W, C) to scores (N, K, H, W)."""
        check_tiles(self.card, tiles)
        try:
            scores: Scores = self._session.run(["scores"], {"tiles": tiles})[0]
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            if NO_MEMORY.search(str(error)):
                raise MemoryError(f"{self.name}: {len(tiles)} tiles at once") from error
            raise EngineError(
                f"{self.name}: inference failed on {len(tiles)} tiles ({reason(error)}); "
                "a smaller --batch needs less memory"
            ) from error
        check_scores(self.card, self.name, scores, len(tiles))
        return scores

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def available_hardware() -> str:
    """Return "the CPU"."""
    return "the CPU"


def open(
    bundle: Path, card: ModelCard, *, precision: str, threads: int | None = None, device: int = 0
) -> OnnxRuntimeEngine:
    """Open the graph of one precision; see `EngineModule.open`."""
    library = load_library("cpu", CPU_PROVIDER)
    path = bundle / graph_file(precision)
    content = read_graph(bundle, card, path.name)
    try:
        session = open_session(content, CPU_PROVIDER, threads=threads)
    except EngineError as error:
        raise EngineError(f"{path}: ONNX Runtime cannot load it ({error}); export the model again") from error
    check_contract(session, card, path)
    return OnnxRuntimeEngine(session, card, f"onnxruntime {library.__version__} cpu {precision}")


def check() -> Iterator[Finding]:
    """Check that ONNX Runtime is installed once, and runs a graph."""
    installed = []
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            installed.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    reinstall = engine_command("cpu")
    try:
        version = importlib.import_module("onnxruntime").__version__
    except ModuleNotFoundError:
        yield Finding("ONNX Runtime", BROKEN, "not installed", either_engine())
        return
    except (ImportError, OSError, AttributeError) as error:
        yield Finding("ONNX Runtime", BROKEN, f"cannot be loaded ({reason(error)})", reinstall)
        return
    if len(installed) > 1:
        text = f"{' and '.join(installed)} are both installed and overwrite each other's files"
        yield Finding("ONNX Runtime", BROKEN, text, reinstall)
    else:
        yield Finding("ONNX Runtime", OK, installed[0] if installed else version)
    yield check_provider(CPU_PROVIDER, BROKEN, reinstall)

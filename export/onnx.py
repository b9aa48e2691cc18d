"""Write the deployed graph as ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import nn

from histostream.export.graph import check_graph

OPSET = 18


def export_onnx(
    module: nn.Module, path: Path, *, channels: int, tile_px: int, opset: int = OPSET
) -> onnx.ModelProto:
    """Export a module that keeps the tile contract to one ONNX file.

    Input ``tiles`` uint8 (N, tile_px, tile_px, channels), output ``scores`` uint8
    (N, K, tile_px, tile_px); N is dynamic.

    Raises
    ------
    GraphError
        If the graph has nodes that may not be deployed.
    """
    # Two tiles, because the exporter takes a dimension of 1 for a constant.
    example = torch.zeros((2, tile_px, tile_px, channels), dtype=torch.uint8)
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            input_names=["tiles"],
            output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
            opset_version=opset,
            dynamo=True,
        )
        assert program is not None
        model = program.model_proto
    _forget_sources(model)
    check_graph(model)
    onnx.save(model, path)
    return model


def _forget_sources(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes (stack traces with paths of this machine) from the graph."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress text and its own deprecation warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ.setdefault("ONNXSCRIPT_LOG", "error")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

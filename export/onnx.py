"""A torch module as the deployed graph, in ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import nn

from histostream.export.graph import GraphError, check_graph

OPSET = 18


def export_onnx(module: nn.Module, *, channels: int, tile_px: int) -> onnx.ModelProto:
    """Export a module that keeps the tile contract.

    Input ``tiles`` uint8 (N, tile_px, tile_px, channels), output ``scores`` uint8
    (N, K, tile_px, tile_px); N is dynamic.

    Raises
    ------
    GraphError
        If an operator has no form in ONNX, the network does not take the tile size, or the graph
        has nodes that may not be deployed.
    """
    # Two tiles, because the exporter takes a dimension of 1 for a constant.
    example = torch.zeros((2, tile_px, tile_px, channels), dtype=torch.uint8)
    with _quiet():
        try:
            program = torch.onnx.export(
                module.eval(),
                (example,),
                input_names=["tiles"],
                output_names=["scores"],
                dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
                opset_version=OPSET,
                dynamo=True,
            )
        except Exception as error:  # whatever the module and the exporter's passes raise
            raise GraphError(_explained(error)) from error
    assert program is not None
    model = program.model_proto
    _forget_sources(model)
    check_graph(model)
    return model


def _explained(error: Exception) -> str:
    """One line out of the exporter's pages: the node it stopped at, and the first cause."""
    cause: BaseException = error
    node = None
    while cause.__cause__ is not None:
        cause = cause.__cause__
        node = node or re.search(r"Error when translating node (%\S+)", str(cause))
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0].strip()
    where = f"node {node.group(1)} " if node else ""
    return f"the network cannot be exported to ONNX: {where}({reason})"


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

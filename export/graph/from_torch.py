"""A torch module as the deployed graph, in ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from histostream.export.graph.model import GraphError, check_graph
from histostream.wsi.files import write_whole, writing

OPSET = 18


def export_onnx(module: nn.Module, *, channels: int, tile_px: int) -> onnx.ModelProto:
    """Export a module that keeps the tile contract.

    Input ``tiles`` uint8 (N, tile_px, tile_px, channels), output ``scores`` float16
    (N, K, tile_px, tile_px); N is dynamic.

    Raises
    ------
    GraphError
        If an operator has no form in ONNX, the network does not take the tile size, or the graph
        has nodes that may not be deployed.
    """
    # Two tiles, because the exporter takes a dimension of 1 for a constant.
    example = torch.zeros((2, tile_px, tile_px, channels), dtype=torch.uint8)
    return to_onnx(module, (example,), {"tiles": example}, "scores")


def to_onnx(module: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Tensor], output: str) -> onnx.ModelProto:
    """Export a module with one output; the first dimension of every tensor is dynamic.

    Parameters
    ----------
    module
        The module; it is put into evaluation mode.
    arguments
        Of its ``forward``: tensors of two samples, or lists of such.
    inputs
        The same tensors in order, by the names that the graph's inputs get.
    output
        Name of the output.

    Raises
    ------
    GraphError
        As `export_onnx`.
    """
    batch = torch.export.Dim("N", min=1)
    with quiet_exporter():
        try:
            program = torch.onnx.export(
                module.eval(),
                arguments,
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=tree_map(lambda _: {0: batch}, arguments),
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


def write_model(model: onnx.ModelProto, out: Path) -> None:
    """Write a graph as one file; one that is there is replaced when the new one is whole.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, model.SerializeToString(deterministic=True))


def _explained(error: Exception) -> str:
    """One line out of the exporter's pages: the node it stopped at, and the first cause."""
    cause: BaseException = error
    node = None
    while cause.__cause__ is not None:
        cause = cause.__cause__
        node = node or re.search(r"Error when translating node (%\S+)", str(cause))
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0].strip()
    where = f"node {node.group(1)} " if node else ""
    return (
        f"the network cannot be exported to ONNX: {where}({reason}); change its forward(), or leave that operation out"
    )


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
def quiet_exporter() -> Iterator[None]:
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

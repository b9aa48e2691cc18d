"""ONNX models: what a deployed one must not contain, and helpers to read, change and run them."""

from __future__ import annotations

from typing import Any

import onnx
import onnx.shape_inference
import onnxruntime
from onnx import helper

from histostream.export.graph.operators import FORBIDDEN, STANDARD_DOMAINS
from histostream.wsi.errors import HistoError

INVALID = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
FATAL_ONLY = 4  # ONNX Runtime's severity; what goes wrong is raised as well


class GraphError(HistoError, ValueError):
    """A graph breaks a rule of deployment; the message names the node."""


def check_graph(model: onnx.ModelProto) -> None:
    """Refuse a graph with random, training-mode or control-flow nodes, or with weights in another file.

    Raises
    ------
    GraphError
        Naming the node.
    """
    for node in model.graph.node:
        if node.op_type in FORBIDDEN:
            raise GraphError(
                f"node {node.name!r} is a {node.op_type}: not in a deployed graph; "
                "leave it out of what deployed() returns"
            )
        if node.op_type == "BatchNormalization" and attribute(node, "training_mode", 0):
            raise GraphError(f"node {node.name!r}: batch normalisation in training mode; call eval() in deployed()")
    for tensor in model.graph.initializer:
        if tensor.external_data:
            raise GraphError(f"weights {tensor.name!r} lie outside the file; export the model again")
    onnx.checker.check_model(model, full_check=True)


def open_session(model: onnx.ModelProto) -> Any:
    """Open a graph in ONNX Runtime on the CPU.

    Raises
    ------
    GraphError
        If ONNX Runtime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.enable_cpu_mem_arena = False  # it would keep the memory that the largest tile needed
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        raise GraphError(first_line(error)) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators that a model uses."""
    return max((i.version for i in model.opset_import if i.domain in STANDARD_DOMAINS), default=1)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return an attribute of a node, text as ``str``."""
    matches = [a for a in node.attribute if a.name == name]
    value = helper.get_attribute_value(matches[0]) if matches else default
    return value.decode() if isinstance(value, bytes) else value


def value_names(graph: onnx.GraphProto) -> set[str]:
    """Return the names of all values of a graph, weights included."""
    weights = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    return weights | {name for node in graph.node for name in (*node.input, *node.output)}


def unused_name(name: str, taken: set[str]) -> str:
    """Return the name, lengthened by underscores until it is not taken."""
    while name in taken:
        name += "_"
    return name

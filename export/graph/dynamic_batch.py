"""Free a network of the batch size that its exporter wrote into constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from histostream.export.external.file import INVALID, unused_name, value_names
from histostream.export.graph.shapes import resize_scale


def with_free_batch(
    network: onnx.ModelProto, shape: tuple[int, int, int, int]
) -> tuple[onnx.ModelProto, list[str], list[str]]:
    """Replace the batch size where exporters write it into constants.

    Nothing changes for batches of the size that the network was exported with.

    Parameters
    ----------
    network
        One input, one output, every node named.
    shape
        Of the input as exported, N first.

    Returns
    -------
    The network, what was changed, and the reshapes that still have a fixed first dimension.
    """
    batch = shape[0]
    model = onnx.ModelProto()
    model.CopyFrom(network)
    graph = model.graph
    _set_shape(graph.input[0], list(shape))
    del graph.value_info[:]
    graph.output[0].type.tensor_type.ClearField("shape")
    shapes = _partial_shapes(model)
    values = _whole_numbers(graph)
    changed: list[str] = []
    stuck: list[str] = []
    moving = {graph.input[0].name}  # values that hold pixels, not sizes
    for node in graph.node:
        if node.op_type in ("Shape", "Size") or not moving & set(node.input):
            continue
        moving |= set(node.output)
        first = shapes.get(node.input[0], [None])
        last = values.get(node.input[-1])
        if last is None or last.ndim != 1 or not last.size:
            continue
        if node.op_type == "Reshape" and last[0] not in (-1, 0):
            if last[0] == batch and (-1 not in last or first[:1] == [batch]):
                # Of two unknowns only one can be -1; 0 takes the dimension of the input.
                new = np.array([0 if -1 in last else -1, *last[1:]])
                _replace_input(graph, node, 1, new)
                changed.append(node.name)
            else:
                stuck.append(node.name)
        elif node.op_type == "Expand" and last[0] == batch:
            _replace_input(graph, node, 1, np.array([1, *last[1:]]))
            changed.append(node.name)
        elif node.op_type == "Resize" and len(node.input) == 4 and last[0] == batch:
            sides = [side for side in first if side is not None]
            if len(sides) != len(last):
                continue
            scales = [resize_scale(old, new) for old, new in zip(sides, last, strict=True)]
            del node.input[3:]
            _replace_input(graph, node, 2, np.array(scales, np.float32))
            changed.append(node.name)
    _set_shape(graph.input[0], ["N", *shape[1:]])
    return model, changed, stuck


def _partial_shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """Shape of every value as far as it can be inferred."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (RuntimeError, ValueError, *INVALID):
        return {}
    return {
        v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    }


def _whole_numbers(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    """Return the whole numbers of a graph that may be shapes, by name."""
    found = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return {
        name: numpy_helper.to_array(tensor)
        for name, tensor in found.items()
        if tensor.data_type == TensorProto.INT64 and len(tensor.dims) == 1
    }


def _replace_input(graph: onnx.GraphProto, node: onnx.NodeProto, place: int, value: NDArray[Any]) -> None:
    """Give a node a constant of its own."""
    name = unused_name(f"{node.output[0]}_{place}", value_names(graph))
    graph.initializer.append(numpy_helper.from_array(value, name))
    node.input[place] = name


def _set_shape(value: onnx.ValueInfoProto, shape: list[Any]) -> None:
    kind = value.type.tensor_type.elem_type
    value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shape))

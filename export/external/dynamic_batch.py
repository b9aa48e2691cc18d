"""Make the batch of a network dynamic where its exporter wrote a fixed size into constants."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from histostream.export.graph.model import INVALID, unused_name, value_names
from histostream.export.graph.shapes import resize_scale


def with_dynamic_batch(
    network: onnx.ModelProto, shape: tuple[int, int, int, int]
) -> tuple[onnx.ModelProto, list[str], list[str]]:
    """Replace the batch size where exporters write it into constants.

    Nothing changes for batches of the size that the network was exported with.

    Parameters
    ----------
    network
        A network with one input and one output, every node named.
    shape
        Shape of the input as exported, N first.

    Returns
    -------
    The network, the names of the changed nodes, and of the reshapes that still have a fixed first dimension.
    """
    batch = shape[0]
    model = copy.deepcopy(network)
    graph = model.graph
    _set_shape(graph.input[0], list(shape))
    del graph.value_info[:]
    graph.output[0].type.tensor_type.ClearField("shape")
    shapes = _partial_shapes(model)
    vectors = _integer_vectors(graph)
    changed: list[str] = []
    fixed: list[str] = []
    pixels = {graph.input[0].name}  # values that depend on pixels, not sizes
    for node in graph.node:
        if node.op_type in ("Shape", "Size") or not pixels & set(node.input):
            continue
        pixels |= set(node.output)
        input_shape = shapes.get(node.input[0], [None])
        target = vectors.get(node.input[-1])
        if target is None or target.ndim != 1 or not target.size:
            continue
        if node.op_type == "Reshape" and target[0] not in (-1, 0):
            if target[0] == batch and (-1 not in target or input_shape[:1] == [batch]):
                # Of two unknowns only one can be -1; 0 takes the dimension of the input, unless allowzero is set.
                new = np.array([0 if -1 in target else -1, *target[1:]])
                for attribute in [a for a in node.attribute if a.name == "allowzero" and -1 in target]:
                    node.attribute.remove(attribute)
                _replace_input(graph, node, 1, new)
                changed.append(node.name)
            else:
                fixed.append(node.name)
        elif node.op_type == "Expand" and target[0] == batch:
            _replace_input(graph, node, 1, np.array([1, *target[1:]]))
            changed.append(node.name)
        elif node.op_type == "Resize" and len(node.input) == 4 and target[0] == batch:
            lengths = [length for length in input_shape if length is not None]
            if len(lengths) != len(target):
                continue
            scales = [resize_scale(old, new) for old, new in zip(lengths, target, strict=True)]
            del node.input[3:]
            _replace_input(graph, node, 2, np.array(scales, np.float32))
            changed.append(node.name)
    _set_shape(graph.input[0], ["N", *shape[1:]])
    return model, changed, fixed


def _partial_shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """Return the shape of every value, as far as it can be inferred."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (RuntimeError, ValueError, *INVALID):
        return {}
    return {
        v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    }


def _integer_vectors(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    """Return the constant integer vectors of a graph, which may be shapes, by name."""
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    return {
        name: numpy_helper.to_array(tensor)
        for name, tensor in constants.items()
        if tensor.data_type == TensorProto.INT64 and len(tensor.dims) == 1
    }


def _replace_input(graph: onnx.GraphProto, node: onnx.NodeProto, index: int, value: NDArray[Any]) -> None:
    """Replace an input of a node by a constant of its own."""
    name = unused_name(f"{node.output[0]}_{index}", value_names(graph))
    graph.initializer.append(numpy_helper.from_array(value, name))
    node.input[index] = name


def _set_shape(value: onnx.ValueInfoProto, shape: list[Any]) -> None:
    kind = value.type.tensor_type.elem_type
    value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shape))

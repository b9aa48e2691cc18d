"""Shapes of the tensors of a graph, and the constants that steer them, for one number of tiles."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner, numpy_helper, reference, shape_inference

from histostream.export.graph.model import GraphError
from histostream.export.graph.operators import FORBIDDEN, STANDARD_DOMAINS

Shape = tuple[int, ...]
TILES = "tiles"
MAX_ELEMENTS = 4096  # of a constant that steers a node: a shape, pads, indices


def with_shapes(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Copy the model with a fixed N, with every shape inferred and computed shapes made constants.

    Raises
    ------
    GraphError
        If height or width are not fixed.
    """
    model = copy.deepcopy(model)
    if model.functions:
        model = inliner.inline_local_functions(model)
    graph = model.graph
    tiles = tiles_input(model)
    (value,) = (value for value in graph.input if value.name == tiles)
    dims = value.type.tensor_type.shape.dim
    if len(dims) != 4 or not (dims[1].dim_value and dims[2].dim_value and dims[3].dim_value):
        raise GraphError(f"input {tiles!r} is not (N, H, W, C) with fixed H, W and C: export for one tile size")
    if not dims[0].dim_value:
        dims[0].dim_value = batch
    # The shapes that the exporter wrote down hold for any N and may be incomplete.
    del graph.value_info[:]
    for out in graph.output:
        out.type.tensor_type.ClearField("shape")
    while True:
        inferred = shape_inference.infer_shapes(model, data_prop=True)
        constants, added = _computed_shapes(inferred), _types_left_out(inferred)
        if not constants and not added:
            return inferred
        graph.value_info.extend(added)
        kept = [node for node in graph.node if node.output[0] not in constants]
        del graph.node[:]
        graph.node.extend(kept)
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())


def tiles_input(model: onnx.ModelProto) -> str:
    """Return the name of the input with the pixels."""
    weights = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in weights]
    return TILES if TILES in names else names[0]


def known_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return the shape of every tensor of which all lengths are known."""
    graph = model.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        dims = kind.shape.dim
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes.setdefault(value.name, tuple(d.dim_value for d in dims))
    return shapes


def small_constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Return the constants of a graph that have at most `MAX_ELEMENTS` elements."""
    values = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if math.prod(tensor.dims) <= MAX_ELEMENTS and tensor.data_type != TensorProto.STRING
    }
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value" and math.prod(attribute.t.dims) <= MAX_ELEMENTS:
                values[node.output[0]] = numpy_helper.to_array(attribute.t)
            elif attribute.name in ("value_int", "value_ints", "value_float", "value_floats"):
                values[node.output[0]] = np.array(helper.get_attribute_value(attribute))
    return values


def resize_scale(source: int, target: int) -> np.float32:
    """Scale with which ONNX's Resize, which rounds down, makes ``target`` of ``source``."""
    scale = np.float32(target / source)
    while math.floor(np.float32(source) * scale) < target:
        scale = np.nextafter(scale, np.float32(math.inf))
    return scale


def _types_left_out(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the outputs that have the type of their input, of nodes that onnx does not infer."""
    graph = model.graph
    known = {value.name: value.type for value in (*graph.input, *graph.value_info, *graph.output)}
    return [
        helper.make_value_info(node.output[0], known[node.input[0]])
        for node in graph.node
        if node.op_type in ("GroupNormalization", "RMSNormalization")
        and node.input[0] in known
        and node.output[0] not in known
    ]


def _computed_shapes(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Return the value of every shape, and of everything small that the graph computes from shapes and constants."""
    known, shapes = small_constants(model), known_shapes(model)
    constants: dict[str, NDArray[Any]] = {}
    for node in model.graph.node:
        values: list[NDArray[Any]] = []
        if node.op_type == "Shape" and node.input[0] in shapes:
            ends = {a.name: a.i for a in node.attribute}
            part = shapes[node.input[0]][ends.get("start", 0) : ends.get("end")]
            values = [np.array(part, np.int64)]
        elif node.op_type == "Size" and node.input[0] in shapes:
            values = [np.array(math.prod(shapes[node.input[0]]), np.int64)]
        elif (
            node.domain in STANDARD_DOMAINS
            and node.op_type not in FORBIDDEN
            and any(node.input)
            and all(name in known for name in node.input if name)
            and all(math.prod(shapes.get(name, (1,))) <= MAX_ELEMENTS for name in node.output)
        ):
            values = _evaluated(node, known, model.opset_import)
        if values and all(value.size <= MAX_ELEMENTS for value in values):
            named = {name: value for name, value in zip(node.output, values, strict=True) if name}
            constants |= named
            known |= named
    return constants


def _evaluated(
    node: onnx.NodeProto,
    known: dict[str, NDArray[Any]],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> list[NDArray[Any]]:
    """Return the outputs of a node whose inputs are constants; none if onnx has no reference for it."""
    inputs = {name: known[name] for name in node.input if name}
    typed = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in inputs.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "shape", typed, outputs)
    try:
        session = reference.ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets))
        values = cast("list[Any]", session.run(None, inputs))
    except Exception:  # an operator without a reference: the node stays as it is
        return []
    return [np.asarray(value) for value in values]

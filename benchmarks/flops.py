"""Count what a graph does for one tile: its operations, and the bytes that it moves.

Only convolutions, transposed convolutions and matrix products are counted, with two operations for each
multiply-accumulate. Bytes are the inputs, weights and outputs of every node, each node by itself: a library that fuses
nodes moves fewer bytes, so the intensity is a lower bound. A tensor that is written only to be quantised counts in its
8-bit form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx
from onnx import NodeProto, helper

from histostream.export.graph.model import GraphError, attribute
from histostream.export.graph.operators import VIEWS
from histostream.export.graph.shapes import Shape, known_shapes, with_shapes


@dataclass(frozen=True, slots=True)
class TileCost:
    """Operations and bytes for one tile.

    Attributes
    ----------
    flops
        Floating-point (or integer) operations, 2 for each multiply-accumulate.
    bytes
        Bytes that the nodes read and write, weights shared by the batch.
    """

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes


def count_flops(model: onnx.ModelProto, batch: int = 1) -> TileCost:
    """Count the operations and bytes of a graph for one tile of a batch.

    Parameters
    ----------
    model
        A graph that takes tiles (N, H, W, C) with fixed H, W and C.
    batch
        N.

    Raises
    ------
    GraphError
        If the shape of a tensor cannot be inferred from that of the tiles.
    """
    sized = with_shapes(model, batch)
    shapes, sizes = known_shapes(sized), _element_bytes(sized)
    stored = _stored_as(sized)

    def moved(name: str) -> int:
        name = stored.get(name, name)
        return math.prod(_shape(shapes, name)) * sizes[name]

    flops = moved_bytes = 0
    for node in sized.graph.node:
        if node.op_type in PRODUCTS:
            flops += PRODUCTS[node.op_type](node, shapes)
        if node.op_type not in VIEWS:
            tensors = {name for name in (*node.input, *node.output) if name}
            moved_bytes += sum(moved(name) for name in tensors)
    if not moved_bytes:
        raise GraphError("the graph has no nodes that compute; use the graph of a network")
    return TileCost(flops / batch, moved_bytes / batch)


def _convolution(node: NodeProto, shapes: dict[str, Shape]) -> int:
    """Count one product with the whole kernel for every output pixel."""
    weights = node.input[3 if node.op_type == "QLinearConv" else 1]
    out = _shape(shapes, node.output[0])
    return 2 * out[0] * math.prod(out[2:]) * math.prod(_shape(shapes, weights))


def _transposed_convolution(node: NodeProto, shapes: dict[str, Shape]) -> int:
    """Count one product with the whole kernel for every input pixel."""
    source = _shape(shapes, node.input[0])
    return 2 * source[0] * math.prod(source[2:]) * math.prod(_shape(shapes, node.input[1]))


def _matrix_product(node: NodeProto, shapes: dict[str, Shape]) -> int:
    """Count one sum over the last axis of the first matrix for every output element."""
    first = _shape(shapes, node.input[0])
    summed = first[0 if attribute(node, "transA", 0) else -1]  # transA: an attribute of Gemm
    return 2 * math.prod(_shape(shapes, node.output[0])) * summed


PRODUCTS: dict[str, Callable[[NodeProto, dict[str, Shape]], int]] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _matrix_product,
    "MatMulInteger": _matrix_product,
    "QLinearMatMul": _matrix_product,
    "Gemm": _matrix_product,
}


def _shape(shapes: dict[str, Shape], name: str) -> Shape:
    if name not in shapes:
        raise GraphError(f"the shape of {name!r} cannot be inferred from that of the tiles; export the model again")
    return shapes[name]


def _element_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Return the bytes of an element of each tensor."""
    graph = model.graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer} | {
        value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)
    }
    return {name: helper.tensor_dtype_to_np_dtype(kind).itemsize for name, kind in kinds.items() if kind}


def _stored_as(model: onnx.ModelProto) -> dict[str, str]:
    """Map each tensor that exists only as a quantisation node to the 8-bit tensor that is in memory."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    stored = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            stored[node.output[0]] = node.input[0]
        elif node.op_type == "QuantizeLinear" and len(readers[node.input[0]]) == 1:
            stored[node.input[0]] = node.output[0]
    return stored

"""Convert a graph to half precision: FP16 nodes, FP32 islands, and a Cast on every edge between them.

TensorRT 11 takes the precision of each node from the graph alone, so it is decided here, node by node. Existing
converters do not suffice: onnxconverter-common leaves Casts to FP32 as they are; ONNX Runtime's rounds every tensor
inside an FP32 island to FP16 (so an overflow inside it remains) and gives two Casts one name where two nodes share a
constant.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from histostream.export.graph.model import GraphError, unused_name
from histostream.export.graph.operators import NEEDS_FP32

# Inputs that the operator wants in FP32 whatever its data is.
ALWAYS_FP32_INPUTS = {"Resize": (1, 2), "QuantizeLinear": (1,), "DequantizeLinear": (1,)}
CONVOLUTIONS = ("Conv", "ConvTranspose")
FP16_MAX = float(np.finfo(np.float16).max)


def fp32_islands(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of the nodes that always stay in FP32.

    These are normalisation layers and Softmax; every node before the first convolution, which scale the input; and
    the last convolution and every node after it, which make the scores, because the margin between two classes of
    iMEMS can be 1/127.5.
    """
    return frozenset(node.name for node in model.graph.node if node.op_type in NEEDS_FP32) | frozenset(
        n.name for n in (*before_convolutions(model), *from_last_convolution(model))
    )


def before_convolutions(model: onnx.ModelProto) -> list[NodeProto]:
    """Return the nodes, other than convolutions, that come before every convolution."""
    after: set[str] = set()
    nodes = []
    for node in model.graph.node:
        if node.op_type in CONVOLUTIONS or any(name in after for name in node.input):
            after.update(node.output)
        else:
            nodes.append(node)
    return nodes


def from_last_convolution(model: onnx.ModelProto) -> list[NodeProto]:
    """Return the last convolutions and the nodes after them."""
    before: set[str] = set()
    nodes = []
    for node in reversed(model.graph.node):
        if not any(name in before for name in node.output):
            nodes.append(node)
            if node.op_type not in CONVOLUTIONS:
                continue
        before.update(node.input)
    return nodes[::-1]


def to_fp16(model: onnx.ModelProto, fp32_nodes: Collection[str], *, emulate: bool = False) -> onnx.ModelProto:
    """Convert a graph to FP16, except for the nodes named.

    Inside an island of FP32 nodes nothing is rounded: a Cast stands only where an FP16 node meets an FP32 node.
    Weights are rounded to nearest; one beyond the range of FP16 becomes infinite, which the parity gate finds.

    Parameters
    ----------
    model
        A graph in FP32 whose nodes have names; sorted, as ONNX demands.
    fp32_nodes
        Names of the nodes that stay in FP32.
    emulate
        Return a graph in FP32 that rounds where the FP16 graph would round. On a CPU, ONNX Runtime computes FP16
        nodes in FP32 and drops the roundings between them, so the parity gate there would accept a graph that
        overflows on a GPU; it runs the emulation instead.

    Raises
    ------
    GraphError
        If nodes lack names or share one.
    """
    names = [node.name for node in model.graph.node]
    if len(set(names)) != len(names) or "" in names:
        raise GraphError("every node needs a name of its own to be converted")
    return _Fp16Conversion(model, frozenset(fp32_nodes), emulate).converted()


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own; names that are unique already are kept."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = unused_name(f"{node.op_type}_{index}", taken)
        taken.add(node.name)


class _Fp16Conversion:
    """The state of one conversion: which tensors are FP16, and the Casts that were added."""

    def __init__(self, model: onnx.ModelProto, keep_fp32: frozenset[str], emulate: bool) -> None:
        self.source = onnx.shape_inference.infer_shapes(model)
        self.keep = keep_fp32
        self.emulate = emulate
        self.constants = {t.name: t for t in self.source.graph.initializer}
        self.floats = {name for name, kind in _types(self.source) if kind == TensorProto.FLOAT}
        self.half: set[str] = set()  # tensors that are FP16 now, or rounded to it
        self.nodes: list[NodeProto] = []
        self.made: dict[tuple[str, bool], str] = {}  # (tensor, as FP16) -> its other form
        self.initializers: dict[str, TensorProto] = {}
        self.used = {n for n, _ in _types(self.source)}

    def converted(self) -> onnx.ModelProto:
        for node in self.source.graph.node:
            self._add(copy.deepcopy(node))
        outputs = {value.name for value in self.source.graph.output}
        if self.half & outputs:
            raise GraphError(
                f"the output {self.half & outputs} would be FP16 inside the graph; end it in `add_rounding`"
            )
        model = copy.deepcopy(self.source)
        for field in ("node", "initializer", "value_info"):
            model.graph.ClearField(field)
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(self.initializers.values())
        return model

    def _add(self, node: NodeProto) -> None:
        half = node.name not in self.keep and any(name in self.floats for name in (*node.input, *node.output))
        always = ALWAYS_FP32_INPUTS.get(node.op_type, ())
        for i, name in enumerate(node.input):
            if name in self.constants and name not in self.floats:
                self.initializers[name] = self.constants[name]
            elif name in self.floats:
                node.input[i] = self._in_precision(name, half=half and i not in always)
        results = [name for name in node.output if name in self.floats]
        self.nodes.append(node)
        if not (half and results):
            return
        self.half.update(results)
        if not self.emulate:
            _retype(node)
            return
        for i, name in enumerate(node.output):
            if name in self.floats:
                node.output[i] = self._fresh(f"{name}_exact")
                self._round(node.output[i], name)

    def _in_precision(self, name: str, *, half: bool) -> str:
        """Return the name of a tensor in FP16 or FP32; a Cast is added where it is needed."""
        if name in self.constants:
            return self._constant(name, half)
        if (name in self.half) == half or (self.emulate and not half):
            return name
        if (name, half) not in self.made:
            other = self._fresh(f"{name}_{'fp16' if half else 'fp32'}")
            if self.emulate:
                self._round(name, other)
            else:
                self._cast(name, other, TensorProto.FLOAT16 if half else TensorProto.FLOAT)
            self.made[name, half] = other
        return self.made[name, half]

    def _constant(self, name: str, half: bool) -> str:
        if (name, half) not in self.made:
            new = name if (name, not half) not in self.made else self._fresh(f"{name}_other")
            tensor = copy.deepcopy(self.constants[name])
            if half:
                with np.errstate(over="ignore"):
                    rounded = numpy_helper.to_array(tensor).astype(np.float16)
                tensor = numpy_helper.from_array(rounded.astype(np.float32) if self.emulate else rounded, new)
            tensor.name = new
            self.initializers[new] = tensor
            self.made[name, half] = new
        return self.made[name, half]

    def _round(self, name: str, to_name: str) -> None:
        """Add Casts that round a tensor to FP16 and turn it back into FP32."""
        rounded = self._fresh(f"{to_name}_rounded")
        self._cast(name, rounded, TensorProto.FLOAT16)
        self._cast(rounded, to_name, TensorProto.FLOAT)

    def _cast(self, name: str, to_name: str, to: int) -> None:
        self.nodes.append(helper.make_node("Cast", [name], [to_name], f"{to_name}_cast", to=to))

    def _fresh(self, name: str) -> str:
        name = unused_name(name, self.used)
        self.used.add(name)
        return name


def _types(model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name, value.type.tensor_type.elem_type
    for tensor in graph.initializer:
        yield tensor.name, tensor.data_type


def _retype(node: NodeProto) -> None:
    """Replace FP32 by FP16 in the attributes of a node."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif attribute.t.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(numpy_helper.from_array(value, attribute.t.name))


def multiply_accumulates(model: onnx.ModelProto) -> int:
    """Count the multiply-accumulates of the convolutions for one tile."""
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    shapes = {t.name: list(t.dims) for t in graph.initializer} | {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    total = 0
    for node in graph.node:
        if node.op_type in CONVOLUTIONS and node.input[1] in shapes:
            # A convolution reads its kernel once for each output, a transposed one for each input.
            at = node.output[0] if node.op_type == "Conv" else node.input[0]
            pixels = int(np.prod(shapes.get(at, [0, 0])[2:]))
            weights = int(np.prod(shapes[node.input[1]]))
            total += pixels * weights
    return total

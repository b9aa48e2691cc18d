"""The end of a deployed graph: scores in float32 become the output ``scores``, rounded so that labels stay.

It computes what `histostream.training.networks.tile_model.rounded` does, and is read from its end here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from histostream.training.networks.tile_model import MARGIN_RATIO, MARGIN_STEP

UNROUNDED = "unrounded_scores"
# The nodes that round, from the output backwards; FP16 and INT8 graphs have the same, since they stay in FP32.
ROUNDING = ("Cast", "Clip", "Where")

AddNode = Callable[..., str]  # kind, inputs, attributes -> name of the output
AddConstant = Callable[[str, Any], str]  # name, value -> name of the constant


def add_rounding(scores: str, add: AddNode, constant: AddConstant) -> str:
    """Add the nodes that round scores (N, K, H, W), float32, to float16; return the name of their output."""
    largest = add("ReduceMax", scores, constant("classes", np.array([1])), keepdims=1)
    ratio, step = constant("ratio", np.float32(1 - MARGIN_RATIO)), constant("step", np.float32(MARGIN_STEP))
    zero, one = constant("zero", np.float32(0)), constant("one", np.float32(1))
    below = add("Sub", add("Mul", add("Min", largest, one), ratio), step)
    is_less = add("Less", scores, largest)
    apart = add("Where", is_less, add("Min", scores, below), add("Max", scores, step))
    return add("Cast", add("Clip", apart, zero, one), to=TensorProto.FLOAT16)


def with_unrounded_scores(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose further output `UNROUNDED` has the scores in FP32 before they were rounded.

    A graph that does not end in `add_rounding` gets no further output.
    """
    producer = {name: node for node in model.graph.node for name in node.output}
    name = model.graph.output[0].name
    node: NodeProto | None = None
    for kind in ROUNDING:
        node = producer.get(name)
        if node is None or node.op_type != kind:
            return model
        name = node.input[0]
    less = producer.get(name)  # the condition of Where: scores below the largest
    if less is None or less.op_type != "Less":
        return model
    watched = copy.deepcopy(model)
    cast = helper.make_node("Cast", [less.input[0]], [UNROUNDED], f"{UNROUNDED}_cast", to=TensorProto.FLOAT)
    watched.graph.node.append(cast)
    watched.graph.output.append(helper.make_tensor_value_info(UNROUNDED, TensorProto.FLOAT, None))
    return watched

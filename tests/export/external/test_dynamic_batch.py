"""Reshapes in which an exporter wrote the batch of 1 take any batch, and compute what they did for each tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.shape_inference
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from histostream.export.external.dynamic_batch import with_dynamic_batch


@pytest.mark.parametrize("allowzero", [None, 0, 1])
@pytest.mark.parametrize("target", [(1, -1, 12), (1, 3, -1), (1, -1), (1, 3, 4, 12)], ids=str)
def test_a_reshape_to_a_batch_of_one_takes_two_tiles(target: tuple[int, ...], allowzero: int | None) -> None:
    """torch.onnx.export writes allowzero=1, with which a 0 is a length of zero and not that of the input."""
    attributes: dict[str, Any] = {} if allowzero is None else {"allowzero": allowzero}
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["x", "target"], ["tokens"], name="tokens", **attributes),
            helper.make_node("Neg", ["tokens"], ["negative"], name="negative"),
            helper.make_node("Reshape", ["negative", "image"], ["y"], name="image", **attributes),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 4, 12])],
        [
            numpy_helper.from_array(np.array(target), "target"),
            numpy_helper.from_array(np.array([1, 3, 4, 12]), "image"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    dynamic, changed, fixed = with_dynamic_batch(model, (1, 3, 4, 12))
    assert (changed, fixed) == (["tokens", "image"], [])
    onnx.shape_inference.infer_shapes(dynamic, check_type=True, strict_mode=True)
    session = onnxruntime.InferenceSession(dynamic.SerializeToString(), providers=["CPUExecutionProvider"])
    tiles = np.random.default_rng(0).standard_normal((2, 3, 4, 12)).astype(np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": tiles})[0], -tiles)

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from histostream.export.graph.scores import add_rounding
from histostream.training.networks.tile_model import rounded


def in_the_stream(scores: NDArray[np.float16]) -> NDArray[np.intp]:
    """Return the label that the stream gives to a pixel of one tile: the arg-max of floor(s * 2**14 + 1/2)."""
    labels: NDArray[np.intp] = np.floor(scores.astype(np.float64) * 2**14 + 0.5).argmax(axis=1)
    return labels


def close_scores(classes: int, spread: float, level: float, seed: int = 0) -> NDArray[np.float32]:
    """Return scores about ``level`` that differ by about ``spread``, which is often less than rounding."""
    random = np.random.default_rng(seed)
    values = level + spread * random.normal(size=(1, classes, 64, 64))
    return np.clip(values, 0, 1).astype(np.float32)


CASES = [
    (classes, spread, level)
    for classes in (2, 3, 20, 254)
    for spread in (1e-7, 1e-5, 1e-3, 0.1)
    for level in (0.0, 1e-6, 1e-4, 1 / 254, 0.05, 0.3, 0.5, 0.9999, 1.0)
]


@pytest.mark.parametrize(("classes", "spread", "level"), CASES)
def test_rounding_never_changes_the_label(classes: int, spread: float, level: float) -> None:
    scores = close_scores(classes, spread, level)
    found = rounded(torch.from_numpy(scores)).numpy()
    assert found.dtype == np.float16
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_array_equal(in_the_stream(found), scores.argmax(axis=1))
    # Plain rounding would change labels, so this test can fail.
    if spread == 1e-5 and level == 0.3 and classes > 2:
        assert (in_the_stream(scores.astype(np.float16)) != scores.argmax(axis=1)).mean() > 0.1


def test_scores_far_from_the_largest_are_rounded_to_nearest_only() -> None:
    scores = torch.rand(1, 5, 64, 64, generator=torch.Generator().manual_seed(0))
    found, plain = rounded(scores), scores.to(torch.float16)
    largest = scores.amax(dim=1, keepdim=True)
    far = (scores > 2**-13) & ((scores == largest) | (scores < 0.99 * largest))
    assert torch.equal(found[far], plain[far])
    assert (found - plain).abs().max() < 0.003


@pytest.mark.parametrize("classes", [2, 20])
def test_the_nodes_of_onnx_round_as_torch_does(classes: int) -> None:
    nodes: list[onnx.NodeProto] = []
    constants: list[TensorProto] = []

    def add(kind: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"{kind}{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def constant(name: str, value: object) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    out = add_rounding("x", add, constant)
    graph = helper.make_graph(
        nodes,
        "rounding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, classes, 64, 64])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT16, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for spread, level in ((1e-5, 0.05), (1e-3, 0.5), (0.3, 0.5), (1e-6, 0.0)):
        scores = close_scores(classes, spread, level)
        (found,) = session.run(None, {"x": scores})
        np.testing.assert_array_equal(found, rounded(torch.from_numpy(scores)).numpy())

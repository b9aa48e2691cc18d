"""Small ONNX files, made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


def graph_file(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: Mapping[str, Any],
    source: tuple[str, int, Sequence[Any]],
    results: Sequence[tuple[str, int, Sequence[Any]]],
    **model: Any,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info(*source)],
        [helper.make_tensor_value_info(*result) for result in results],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model.setdefault("opset_imports", [helper.make_opsetid("", 18)])
    onnx.save(helper.make_model(graph, ir_version=10, **model), path)
    return path


def convolution(kind: Any = np.float32, classes: int = 3, channels: int = 3) -> NDArray[Any]:
    weights = np.random.default_rng(0).normal(size=(classes, channels, 3, 3))
    return (2 * weights).astype(kind)

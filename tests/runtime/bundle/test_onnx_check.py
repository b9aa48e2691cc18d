"""Graphs are read without trust: what an export writes passes, what could do harm is named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from histostream.runtime.bundle.card import CardError, default_bundle, read_card
from histostream.runtime.bundle.onnx_check import read_graph
from tests.robustness.hostile.graphs import between, put_laughs, put_loop
from tests.robustness.hostile.seeds import seed_model
from tests.runtime.conftest import CARD


def read(folder: Path, content: bytes) -> bytes:
    (folder / "model.onnx").write_bytes(content)
    card = replace(CARD, files={"model.onnx": hashlib.sha256(content).hexdigest()})
    return read_graph(folder, card, "model.onnx")


def test_shipped_graphs_pass() -> None:
    bundle = default_bundle()
    card = read_card(bundle)
    for name in card.files:
        assert read_graph(bundle, card, name) == (bundle / name).read_bytes()


def outside(tensor: Any) -> Any:
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    return tensor


def in_initializer(model: Any) -> None:
    outside(model.graph.initializer[0])


def in_attribute(model: Any) -> None:
    from onnx import helper, numpy_helper

    value = outside(numpy_helper.from_array(np.zeros(3, np.float32)))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["x"], value=value))


def in_sparse_initializer(model: Any) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.dims.append(3)
    sparse.values.CopyFrom(outside(model.graph.initializer[0]))


def with_training(model: Any) -> None:
    model.training_info.add()


def with_branch(model: Any) -> None:
    from onnx import helper

    body = helper.make_graph([], "body", [], [])
    between(model, helper.make_node("If", ["planes"], ["x"], then_branch=body, else_branch=body))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_initializer, "its weights are in another file"),
        (in_attribute, "its weights are in another file"),
        (in_sparse_initializer, "its weights are in another file"),
        (with_training, "it has steps for training"),
        (with_branch, "a node is a 'If': a deployed graph has no control flow"),
        (put_loop, "a node is a 'Loop': a deployed graph has no control flow"),
        (lambda model: put_laughs(model, 2), "it has functions"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_could_do_harm_is_named(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    model = seed_model()
    change(model)
    with pytest.raises(CardError, match=rf"model\.onnx: {message}"):
        read(tmp_path, model.SerializeToString())


def test_a_sane_graph_passes(tmp_path: Path) -> None:
    content = seed_model().SerializeToString()
    assert read(tmp_path, content) == content


@pytest.mark.parametrize("end", [1, 3, 50, 200, -1])
def test_a_graph_that_was_cut_off_is_named(tmp_path: Path, end: int) -> None:
    with pytest.raises(CardError, match="it is damaged, or was cut off; export the model again"):
        read(tmp_path, seed_model().SerializeToString()[:end])

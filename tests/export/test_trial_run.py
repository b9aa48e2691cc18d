"""What export passes, runs with default options; what does not run, replaces nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from histostream.export.bundle import Options
from histostream.export.external.network import ExternalModel
from histostream.export.external.wrap import wrap_onnx
from histostream.export.trial_run import TrialError
from histostream.runtime import layout
from histostream.runtime.bundle.card import read_card
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.pixels import segment_pixels
from histostream.runtime.stream.blend import BlendError

QUICK = Options(precisions=("fp32",), tensorrt="off")
SIDE = 96


def node(kind: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


POOL = {"kernel_shape": [SIDE, SIDE], "strides": [SIDE, SIDE]}
BINS = {"kernel_shape": [SIDE // 3, SIDE // 3], "strides": [SIDE // 3, SIDE // 3]}
NETWORKS = {
    "squeeze and excitation": [
        node("AveragePool", "f", "p", **POOL),
        node("Sigmoid", "p", "a"),
        node("Mul", "f a", "y"),
    ],
    "a maximum of the tile": [node("MaxPool", "f", "p", **POOL), node("Sub", "f p", "y")],
    "pooling into bins": [
        node("AveragePool", "f", "p", **BINS),
        node("Resize", "p  scales", "u", mode="nearest"),
        node("Add", "f u", "y"),
    ],
    "five poolings by two": [
        *(node("MaxPool", f"p{i}" if i else "f", f"p{i + 1}", kernel_shape=[2, 2], strides=[2, 2]) for i in range(5)),
        node("Resize", "p5  whole", "u", mode="nearest"),
        node("Add", "f u", "y"),
    ],
    "the sum of a row": [node("CumSum", "f three", "c"), node("Mul", "c small", "t"), node("Sub", "f t", "y")],
}


def network(name: str, path: Path) -> Path:
    """Write a network of three classes from pixels (N, 3, SIDE, SIDE)."""
    weights = {
        "w": np.random.default_rng(0).normal(size=(3, 3, 1, 1)).astype(np.float32) * 6,
        "scales": np.array([1, 1, SIDE // 3, SIDE // 3], np.float32),
        "whole": np.array([1, 1, 32, 32], np.float32),
        "three": np.array(3, np.int64),
        "small": np.array(0.01, np.float32),
    }
    nodes = [node("Conv", "x w", "f"), *NETWORKS[name]]
    for n in nodes:
        if n.op_type == "Resize":
            n.input.insert(1, "")
    used = {i for n in nodes for i in n.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [numpy_helper.from_array(v, k) for k, v in weights.items() if k in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


EXTERNAL = ExternalModel(classes=("background", "a", "b"), activation="softmax")


@pytest.mark.parametrize("name", NETWORKS)
def test_what_export_passes_runs_with_default_options(name: str, tmp_path: Path) -> None:
    path = network(name, tmp_path / "net.onnx")
    said: list[str] = []
    export = wrap_onnx(path, tmp_path / "bundle", EXTERNAL, QUICK, mpp=0.5, say=said.append)
    assert export.card.tile_statistics == (name != "five poolings by two")
    assert export.card.align_px == (32 if name == "five poolings by two" else 1)
    assert export.card.halo_source == ("measured" if name == "the sum of a row" else "computed")
    assert any("halo unknown, measured by perturbation" in line for line in said) == (name == "the sum of a row")
    # One tile, so that no blending takes part: the labels are those of the file itself.
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    x = np.moveaxis(pixels, -1, 0)[None].astype(np.float32) / 255
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"x": x})[0].argmax(axis=1)[0]
    engine = open_engine(tmp_path / "bundle", backend="cpu", precision="fp32")
    assert (segment_pixels(pixels, engine) == wanted).mean() > 0.999
    large = np.tile(pixels, (3, 2, 1))[: 2 * SIDE + 11]
    assert segment_pixels(large, engine).shape == large.shape[:2]


def test_a_bundle_that_does_not_run_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = network("squeeze and excitation", tmp_path / "net.onnx"), tmp_path / "bundle"
    wrap_onnx(path, out, EXTERNAL, QUICK, mpp=0.5, note="the first")
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def refuse(*arguments: object) -> None:
        raise BlendError("no overlap fits")

    monkeypatch.setattr(layout, "check_blend", refuse)
    with pytest.raises(TrialError, match=r"fp32: the bundle does not run .*no overlap fits.* nothing was written"):
        wrap_onnx(path, out, EXTERNAL, QUICK, mpp=0.5, note="the second")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert read_card(out).note == "the first"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle", "net.onnx"]  # nothing is left over

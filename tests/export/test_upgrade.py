from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from histostream.export.cli import main
from histostream.runtime.bundle.card import read_card
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.pixels import segment_pixels

SIDE, CLASSES = 64, 20

# What schema 1 deployed: scores of 0..255, rounded to bytes at the end.
OLD_GRAPH = f"""<ir_version: 9, opset_import: ["" : 18]>
old (uint8[N,{SIDE},{SIDE},3] tiles) => (uint8[N,{CLASSES},{SIDE},{SIDE}] scores)
<float full = {{255.0}}, float half = {{0.5}}, float least = {{0.0}}>
{{
  [cast] x = Cast <to: int = 1> (tiles)
  [turn] y = Transpose <perm: ints = [0, 3, 1, 2]> (x)
  [scale] z = Div (y, full)
  [conv] logits = Conv (z, w)
  [soft] p = Softmax <axis: int = 1> (logits)
  [grow] q = Mul (p, full)
  [round] r = Add (q, half)
  [clip] s = Clip (r, least, full)
  [narrow] scores = Cast <to: int = 2> (s)
}}
"""


@pytest.fixture
def weights() -> NDArray[np.float32]:
    return (np.random.default_rng(0).normal(size=(CLASSES, 3, 1, 1)) * 0.3).astype(np.float32)


@pytest.fixture
def old_bundle(tmp_path: Path, weights: NDArray[np.float32]) -> Path:
    """A bundle of schema 1 of a network with many classes of nearly equal probability."""
    model = parser.parse_model(OLD_GRAPH)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    onnx.checker.check_model(model, full_check=True)
    folder = tmp_path / "old"
    folder.mkdir()
    content = model.SerializeToString(deterministic=True)
    (folder / "model.onnx").write_bytes(content)
    card = {
        "schema": 1,
        "method": "foreign",
        "classes": [{"name": f"class {k}", "color": [k, k, k]} for k in range(CLASSES)],
        "mpp": 0.5,
        "channels": 3,
        "tile_px": SIDE,
        "align_px": 1,
        "halo_px": 0,
        "tile_statistics": False,
        "score_kind": "probability",
        "files": {"model.onnx": hashlib.sha256(content).hexdigest()},
        "opset": 18,
        "parity": {},
        "training": {"file": "soft.onnx"},
        "note": "for a test",
        "crf": {"w1": 3.0},
        "mine": [1, 2],
    }
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (200, 300, 3), np.uint8)


def labels_by_hand(weights: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return the arg-max of the network's logits, which needs no softmax and no tiles."""
    logits = np.einsum("hwc,kc->hwk", pixels().astype(np.float64) / 255, weights[:, :, 0, 0].astype(np.float64))
    labels: NDArray[np.intp] = logits.argmax(axis=2)
    return labels


def test_a_bundle_of_schema_1_runs_and_one_line_says_what_it_loses(
    old_bundle: Path, weights: NDArray[np.float32], caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(old_bundle, backend="cpu")
    (line,) = caplog.messages
    assert f"histo-export upgrade {old_bundle}" in line
    assert engine.infer(np.zeros((1, SIDE, SIDE, 3), np.uint8)).dtype == np.uint8
    same = (segment_pixels(pixels(), engine, blend="crop") == labels_by_hand(weights)).mean()
    assert 0.5 < same < 0.97  # why there is a schema 2


def test_an_upgraded_bundle_gives_the_network_s_own_labels(old_bundle: Path, weights: NDArray[np.float32]) -> None:
    done = CliRunner().invoke(main, ["upgrade", str(old_bundle), "--precision", "fp32", "--tensorrt", "off"])
    assert done.exit_code == 0, done.output
    card = read_card(old_bundle)
    assert (card.schema, card.note, card.crf, card.further) == (2, "for a test", {"w1": 3.0}, {"mine": [1, 2]})
    assert card.training == {"file": "soft.onnx"}
    assert card.parity["model.onnx"]["label_agreement"] == 1
    engine = open_engine(old_bundle, backend="cpu")
    found = segment_pixels(pixels(), engine, blend="crop")
    # Float32 cannot tell classes apart that differ by less than its rounding.
    assert (found == labels_by_hand(weights)).mean() > 0.9999


def test_a_bundle_of_today_is_not_upgraded_and_not_touched(tiny_bundle: Path) -> None:
    before = (tiny_bundle / "card.json").read_bytes()
    done = CliRunner().invoke(main, ["upgrade", str(tiny_bundle), "--tensorrt", "off"])
    assert done.exit_code == 1
    assert "it is of schema 2 already" in done.stderr
    assert (tiny_bundle / "card.json").read_bytes() == before


def test_a_graph_with_another_end_is_refused_and_stays(old_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(old_bundle, tmp_path / "other")
    model = onnx.load(bundle / "model.onnx")
    last = model.graph.node[-1]
    last.input[0] = "r"
    model.graph.node.remove(next(node for node in model.graph.node if node.name == "clip"))
    content = model.SerializeToString()
    (bundle / "model.onnx").write_bytes(content)
    card = json.loads((bundle / "card.json").read_text())
    card["files"]["model.onnx"] = hashlib.sha256(content).hexdigest()
    (bundle / "card.json").write_text(json.dumps(card))
    before = sorted(path.read_bytes() for path in bundle.iterdir())
    done = CliRunner().invoke(main, ["upgrade", str(bundle), "--tensorrt", "off"])
    assert done.exit_code == 1
    assert "its scores come from a Add, not from Clip; export the model again" in done.stderr
    assert sorted(path.read_bytes() for path in bundle.iterdir()) == before


def test_float16_is_the_smallest_output_of_all_engines(old_bundle: Path, weights: NDArray[np.float32]) -> None:
    """The file alone in ONNX Runtime, without any code of ours."""
    CliRunner().invoke(main, ["upgrade", str(old_bundle), "--precision", "fp32", "--tensorrt", "off"])
    session = onnxruntime.InferenceSession(old_bundle / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.get_outputs()
    assert (output.name, output.type, output.shape[1:]) == ("scores", "tensor(float16)", [CLASSES, SIDE, SIDE])
    tile = pixels()[None, :SIDE, :SIDE]
    (scores,) = session.run(None, {"tiles": tile})
    assert (scores[0].argmax(axis=0) == labels_by_hand(weights)[:SIDE, :SIDE]).mean() > 0.9999

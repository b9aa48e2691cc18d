from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from histostream.export import parity
from histostream.export.bundle import export_bundle
from histostream.export.graph import GraphError, check_graph, depends_on_tile_statistics, halo_px
from histostream.export.parity import ParityError, compare, demo_tiles
from histostream.runtime.card import read_card, read_file
from histostream.runtime.engine import open_engine
from histostream.training import checkpoint
from histostream.training.checkpoint import CheckpointError
from histostream.training.methods import imems
from histostream.training.networks.unet import UNet
from histostream.wsi.errors import OutputError


def test_a_bundle_says_what_it_holds(tiny_bundle: Path) -> None:
    card = read_card(tiny_bundle)
    assert (card.method, card.mpp, card.tile_px, card.align_px) == ("imems", 0.5, 128, 4)
    assert [c.name for c in card.classes] == ["ground", "gland", "nucleus"]
    assert not card.tile_statistics
    assert card.note == "Tiny and untrained."
    assert read_file(tiny_bundle, card, "model.onnx")
    figures = card.parity["model.onnx"]
    assert figures["label_agreement"] >= 0.9999
    assert figures["dark_label_agreement"] >= 0.999
    assert figures["pixels"] == parity.TILES * 128 * 128
    assert len(figures["dice"]) == 3


def test_the_graph_is_fit_for_deployment(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "model.onnx")
    check_graph(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds[:2] == ["Cast", "Transpose"]  # TensorRT refuses a uint8 transpose
    assert kinds[-1] == "Cast"
    assert not {"Dropout", "If", "Loop"} & set(kinds)
    (tiles,) = model.graph.input
    assert tiles.type.tensor_type.elem_type == TensorProto.UINT8
    assert tiles.type.tensor_type.shape.dim[0].dim_param
    assert str(Path(__file__).parents[2]) not in str(model)  # no path of this machine


def test_forbidden_nodes_are_named() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    node = helper.make_node("Dropout", ["x"], ["y"], name="sneaky")
    model = helper.make_model(helper.make_graph([node], "g", [value], [out]))
    with pytest.raises(GraphError, match="'sneaky' is a Dropout"):
        check_graph(model)


class TwoConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(4, 2, (3, 7), padding=(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(torch.relu(self.one(x)))
        return out


def test_the_halo_is_the_reach_of_the_convolutions() -> None:
    assert halo_px(TwoConvolutions(), 3, 1) == 2 + 3
    assert halo_px(nn.Conv2d(3, 2, 1), 3, 1) == 0
    assert halo_px(nn.Conv2d(3, 2, 3, padding=4, dilation=4), 3, 1) == 4


@pytest.mark.parametrize("depth", [1, 2])
def test_beyond_the_halo_of_a_u_net_nothing_is_seen_and_within_it_something(depth: int) -> None:
    torch.manual_seed(0)
    net = UNet(3, 2, base_width=4, depth=depth, dropout=0.0).eval()
    halo = halo_px(net, 3, 1 << depth)

    def sees(position: int, distance: int) -> bool:
        x = torch.rand(1, 3, 16, 128)
        y = x.clone()
        y[..., position + distance :] = 10 * torch.rand(1, 3, 16, 128 - position - distance)
        with torch.no_grad():
            return not torch.equal(net(x)[..., position], net(y)[..., position])

    phases = range(48, 48 + (1 << depth))
    assert not any(sees(p, halo + 1) for p in phases)
    assert any(sees(p, halo) for p in phases)


def test_layers_with_tile_statistics_are_found() -> None:
    assert depends_on_tile_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4)))
    assert depends_on_tile_statistics(nn.GroupNorm(2, 4))
    assert not depends_on_tile_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))


def test_a_graph_of_other_weights_fails_the_parity_gate(
    tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    said = checkpoint.read(tiny_checkpoint)
    torch.manual_seed(99)
    other = imems.deployed(imems.build(imems.Config(**said.config), 3))
    engine = open_engine(tiny_bundle, backend="cpu")
    with pytest.raises(ParityError, match="of the labels agree with torch"):
        compare(other, engine, demo_tiles(128, 3, 0.5), agreement=0.9999)


def test_a_failed_export_leaves_the_old_bundle(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(tiny_bundle, tmp_path / "bundles" / "model")
    before = (out / "card.json").read_bytes()
    monkeypatch.setattr("histostream.export.bundle.FP32_AGREEMENT", 1.1)
    with pytest.raises(ParityError):
        export_bundle("imems", tiny_checkpoint, out, tile_px=64)
    assert (out / "card.json").read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_a_folder_that_is_no_bundle_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("years of work")
    with pytest.raises(OutputError, match="is not a model bundle"):
        export_bundle("imems", tiny_checkpoint, tmp_path)
    assert (tmp_path / "thesis.doc").exists()


def test_a_checkpoint_of_another_method_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said = checkpoint.read(tiny_checkpoint)
    state = imems.build(imems.Config(**said.config), 3)
    from dataclasses import replace

    checkpoint.save(tmp_path / "other", replace(said, method="apma_net"), state)
    with pytest.raises(CheckpointError, match="trained by 'apma_net', not 'imems'"):
        export_bundle("imems", tmp_path / "other", tmp_path / "out")


def export(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "histostream.export.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_a_checkpoint_the_shipped_weights_are_exported(tmp_path: Path) -> None:
    from histostream.runtime.card import default_bundle

    done = export("--method", "imems", "--out", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    assert "labels agree with torch" in done.stdout
    exported, shipped = open_engine(tmp_path / "bundle"), open_engine(default_bundle())
    tiles = demo_tiles(512, 3, 0.5)[2:4]
    np.testing.assert_array_equal(exported.infer(tiles), shipped.infer(tiles))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "imens"], "did you mean 'imems'"),
        (["--method", "imems", "--checkpoint", "nowhere"], "no checkpoint in it"),
    ],
)
def test_a_wrong_option_is_one_clear_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = export(*arguments, "--out", tmp_path / "bundle")
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "bundle").exists()


def test_the_shipped_bundle_is_what_the_issue_of_models_asks() -> None:
    from histostream.runtime.card import default_bundle

    bundle = default_bundle()
    card = read_card(bundle)
    weights = onnx.load(bundle / "model.onnx").graph.initializer
    assert sum(int(np.prod(w.dims)) for w in weights) <= 2_500_000
    assert [c.name for c in card.classes] == ["background", "nucleus"]
    scores = card.training["scores"]["test"]
    assert scores["f_score"][1] >= 0.80
    assert scores["pixel_accuracy"] > 0.85
    assert json.dumps(card.training["recipe"])
    assert "fails" in card.note

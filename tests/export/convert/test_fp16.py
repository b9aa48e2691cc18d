"""The FP16 converter: what it leaves alone, where it rounds, and that the emulation is honest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, checker, numpy_helper, parser

from histostream.export.convert.fp16 import fp32_islands, multiply_accumulates, name_nodes, to_fp16
from histostream.export.graph.from_torch import export_onnx
from histostream.export.graph.model import GraphError, open_session
from histostream.export.parity import run_graph
from histostream.training.networks.unet import UNet
from tests.export.networks import GroupNormNet, PyramidNet, TileNetwork, TranslationNet, TransposedNet

NETWORKS: dict[str, Callable[[], TileNetwork]] = {
    "pyramid": PyramidNet,
    "translation": lambda: TranslationNet(64).fold(),
    "layer norm": lambda: TranslationNet(64, norm="layer").fold(),
    "group norm": GroupNormNet,
    "transposed": TransposedNet,
}


def tiles(channels: int, side: int = 64, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), np.uint8)


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    graph = inferred.graph
    found = {t.name: t.data_type for t in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        found[value.name] = value.type.tensor_type.elem_type
    return found


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, int]:
    """Return an exported network with every operator of one method, and its channels."""
    torch.manual_seed(3)
    net = NETWORKS[request.param]().eval()
    model = export_onnx(net, channels=net.channels, tile_px=64)
    name_nodes(model)
    return model, net.channels


def test_every_node_computes_in_the_precision_it_was_given(
    network: tuple[onnx.ModelProto, int],
) -> None:
    model, _ = network
    islands = fp32_islands(model)
    half = to_fp16(model, islands)
    checker.check_model(half, full_check=True)
    kinds = types(half)
    names = {node.name for node in model.graph.node}
    for node in half.graph.node:
        if node.name not in names:
            assert node.op_type == "Cast"
            continue
        found = {kinds.get(name) for name in node.output} & {TensorProto.FLOAT, TensorProto.FLOAT16}
        wanted = TensorProto.FLOAT if node.name in islands else TensorProto.FLOAT16
        assert found <= {wanted} or node.output == ["scores"], node.name
    assert any(k == TensorProto.FLOAT16 for k in kinds.values())


def test_a_tensor_is_cast_once_and_only_where_precisions_meet(
    network: tuple[onnx.ModelProto, int],
) -> None:
    model, _ = network
    half = to_fp16(model, fp32_islands(model))
    casts = [n for n in half.graph.node if n.name not in {m.name for m in model.graph.node}]
    made = [(n.input[0], n.attribute[0].i) for n in casts]
    assert len(set(made)) == len(made)
    producer = {name: n for n in half.graph.node for name in n.output}
    for cast in casts:  # never back to where it came from: an island is not rounded inside
        before = producer.get(cast.input[0])
        assert before is None or before not in casts


def test_half_precision_agrees_with_single_to_a_step_or_two(
    network: tuple[onnx.ModelProto, int],
) -> None:
    model, channels = network
    x = tiles(channels)
    wanted = run_graph(model, x).unrounded
    for converted in (
        to_fp16(model, fp32_islands(model)),
        to_fp16(model, fp32_islands(model), emulate=True),
    ):
        found = run_graph(converted, x)
        assert found.not_finite == 0
        assert np.abs(found.unrounded - wanted).max() <= 3 / 255


def test_keeping_every_node_changes_nothing(network: tuple[onnx.ModelProto, int]) -> None:
    model, channels = network
    whole = to_fp16(model, [node.name for node in model.graph.node])
    assert not [n for n in whole.graph.node if n.name not in {m.name for m in model.graph.node}]
    assert [name for name, kind in types(whole).items() if kind == TensorProto.FLOAT16] == ["scores"]
    x = tiles(channels)
    np.testing.assert_array_equal(run_graph(whole, x).scores, run_graph(model, x).scores)


def test_the_model_given_is_not_changed(network: tuple[onnx.ModelProto, int]) -> None:
    model, _ = network
    before = model.SerializeToString(deterministic=True)
    to_fp16(model, ())
    to_fp16(model, (), emulate=True)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.full
def test_the_islands_are_scaling_normalisation_softmax_and_what_makes_the_scores() -> None:
    torch.manual_seed(0)
    model = export_onnx(PyramidNet().eval(), channels=3, tile_px=32)
    name_nodes(model)
    islands = fp32_islands(model)
    kept = [n for n in model.graph.node if n.name in islands]
    kinds = [n.op_type for n in kept]
    assert [k for k in kinds if k != "Shape"][:2] == ["Cast", "Transpose"]
    assert kinds.count("Softmax") == sum(n.op_type == "Softmax" for n in model.graph.node)
    assert [n.op_type for n in kept if n.op_type in ("Conv", "ConvTranspose")] == ["Conv"]
    assert kept[-1].op_type == "Cast"


# Eight channels of overflow between two nodes: 2 * 50000 > 65504, then back by 1/50000.
OVERFLOW = """<ir_version: 9, opset_import: ["" : 18]>
g (uint8[N,4,4,1] tiles) => (float16[N,1,4,4] scores)
<float up = {50000.0}, float down = {0.00002}, float[1,1,1,1] one = {1.0}>
{
  [cast] x = Cast <to: int = 1> (tiles)
  [turn] y = Transpose <perm: ints = [0, 3, 1, 2]> (x)
  [first] z = Conv (y, one)
  [raise] big = Mul (z, up)
  [lower] small = Mul (big, down)
  [last] out = Conv (small, one)
  [narrow] scores = Cast <to: int = 10> (out)
}
"""


def test_the_emulation_overflows_where_a_gpu_would_and_an_island_heals_it() -> None:
    model = parser.parse_model(OVERFLOW)
    x = np.full((1, 4, 4, 1), 100, np.uint8)
    ends = {"cast", "turn", "first", "last", "narrow"}
    assert run_graph(to_fp16(model, ends, emulate=True), x).not_finite == 16
    for kept in ({"raise"}, {"lower"}):  # the tensor between the two is still FP16
        assert run_graph(to_fp16(model, ends | kept, emulate=True), x).not_finite == 16
    healed = to_fp16(model, ends | {"raise", "lower"}, emulate=True)
    found = run_graph(healed, x)
    assert found.not_finite == 0
    np.testing.assert_array_equal(found.scores, 100)
    # Why there is an emulation: on a CPU, ONNX Runtime computes these FP16 nodes in FP32.
    assert run_graph(to_fp16(model, ends), x).not_finite == 0


def test_a_weight_beyond_half_precision_is_not_clipped_in_silence() -> None:
    model = parser.parse_model(OVERFLOW.replace("{50000.0}", "{70000.0}"))
    half = to_fp16(model, {"cast", "turn", "first", "last", "narrow"})
    (up,) = [t for t in half.graph.initializer if t.name == "up"]
    assert np.isinf(numpy_helper.to_array(up))


def test_a_constant_that_both_precisions_use_exists_in_both() -> None:
    model = parser.parse_model(OVERFLOW.replace("(big, down)", "(big, up)"))
    mixed = to_fp16(model, {"cast", "turn", "first", "last", "narrow", "raise"})
    kinds = sorted(t.data_type for t in mixed.graph.initializer if t.name.startswith("up"))
    assert kinds == [TensorProto.FLOAT, TensorProto.FLOAT16]
    open_session(mixed)


def test_nodes_without_names_of_their_own_are_refused_and_can_be_named() -> None:
    model = parser.parse_model(OVERFLOW)
    for node in model.graph.node:
        node.name = "same"
    with pytest.raises(GraphError, match="needs a name of its own"):
        to_fp16(model, ())
    name_nodes(model)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert names[0] == "same"


def test_multiply_accumulates_are_those_of_the_layers() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ConvTranspose2d(8, 4, 2, stride=2))

    class Tile(TileNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def probs(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(x)
            return out

    model = export_onnx(Tile().eval(), channels=3, tile_px=16)
    assert multiply_accumulates(model) == 16 * 16 * 8 * 3 * 9 + 16 * 16 * 8 * 4 * 4
    unet = UNet(3, 2, base_width=64, depth=4, dropout=0.0)
    assert sum(p.numel() for p in unet.parameters()) > 30e6

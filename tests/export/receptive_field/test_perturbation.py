from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from histostream.export.graph.from_torch import export_onnx
from histostream.export.receptive_field.measure import receptive_field
from histostream.export.receptive_field.perturbation import PHASES, receptive_field_of
from histostream.export.receptive_field.rules import RULES
from tests.export.networks import GroupNormNet, TransposedNet
from tests.export.receptive_field.test_measure import (
    LOCAL,
    UNKNOWN,
    Mixed,
    Tiles,
    graph,
    impulse_halo,
    ints,
    kernel,
    u_net,
    upsampling,
)


def constant(model: onnx.ModelProto, name: str, values: np.ndarray) -> onnx.ModelProto:
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def neighbourhoods() -> onnx.ModelProto:
    """Return the sum over 3 x 3 pixels by indices, as exporters write torch's unfold."""
    index = np.arange(32)[:, None] + np.arange(3)  # into rows and columns that are padded by 1
    model = graph(f"""
        {ints("pads", 0, 0, 1, 1, 0, 0, 1, 1)}
        {ints("axes", 3, 5)}
        p = Pad (x, pads)
        r = Gather <axis = 2> (p, index)
        c = Gather <axis = 4> (r, index)
        y = ReduceSum <keepdims = 0> (c, axes)""")
    return constant(model, "index", index)


MEASURED = {
    "einsum": (lambda: graph(UNKNOWN["einsum"][0]), 1),
    "neighbourhoods": (neighbourhoods, 1),
    "behind a pooling": (
        lambda: graph(
            f"{kernel('w', 2, 2)}\n"
            "r = MaxPool <kernel_shape = [4, 4], strides = [4, 4]> (x)\n"
            'm = Einsum <equation = "kc,nchw->nkhw"> (w, r)\n z = Relu (m)\n'
            "s = Constant <value = float[4] {1, 1, 4, 4}> ()\n y = Resize (z, , s)"
        ),
        4,
    ),
    "unpooled": (
        lambda: graph(
            "r, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)\n"
            f"{kernel('w', 2, 2, 3, 3)}\n c = Conv <pads = [1, 1, 1, 1]> (r, w)\n"
            "y = MaxUnpool <kernel_shape = [2, 2], strides = [2, 2]> (c, i)"
        ),
        2,
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_no_rule_covers_is_measured(name: str) -> None:
    build, align_px = MEASURED[name]
    model = build()
    assert receptive_field(model).unknown
    found = receptive_field_of(model)
    assert (found.source, found.align_px, found.is_local) == ("measured", align_px, True)
    seen = impulse_halo(model, align_px)
    assert seen <= found.halo_px <= seen + -(-align_px // PHASES) - 1


@pytest.mark.parametrize("name", ["a sum along the rows", "halves swapped"])
def test_an_unknown_node_that_sees_across_the_tile_is_found_out(name: str) -> None:
    found = receptive_field_of(graph(UNKNOWN[name][0]))
    assert (found.source, found.halo_px, found.is_local) == ("measured", 16, False)
    assert found.whole_tile == found.unknown


NETWORKS = {
    "u-net": (lambda: Tiles(u_net(1)), ("Conv", "MaxPool", "Resize", "Concat", "Relu")),
    "dilated, strided, transposed": (lambda: Tiles(Mixed()), ("Conv", "ConvTranspose")),
    "bilinear": (lambda: Tiles(upsampling(mode="bilinear", align_corners=False)), ("AveragePool", "Resize")),
    "transposed": (lambda: TransposedNet(1, 2), ("ConvTranspose", "Softmax", "BatchNormalization")),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_without_the_rule_of_an_operator_the_same_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    build, kinds = NETWORKS[name]
    net = build()
    model = export_onnx(net.eval(), channels=net.channels, tile_px=96)
    computed = receptive_field_of(model)
    assert (computed.source, computed.is_local) == ("computed", True)
    for kind in {node.op_type for node in model.graph.node}.intersection(kinds):
        with monkeypatch.context() as patch:
            patch.delitem(RULES, kind)
            found = receptive_field_of(model)
        assert (found.source, found.align_px, found.is_local) == ("measured", computed.align_px, True), kind
        most = computed.halo_px + -(-computed.align_px // PHASES) - 1
        assert computed.halo_px <= found.halo_px <= most, kind


def test_the_reach_beside_a_statistic_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = export_onnx(GroupNormNet().eval(), channels=1, tile_px=64)
    computed = receptive_field_of(model)
    monkeypatch.delitem(RULES, "Relu")
    found = receptive_field_of(model)
    assert (found.source, found.whole_tile) == ("measured", computed.whole_tile)
    assert computed.halo_px <= found.halo_px <= computed.halo_px + 1


def test_coordinates_as_input_make_the_result_depend_on_the_position() -> None:
    ramp = np.linspace(0, 255, 32, dtype=np.float32)[None, None, :, None]
    model = constant(graph("y = Add (x, ramp)"), "ramp", ramp)
    assert receptive_field(model).is_local  # the rules do not see it
    assert receptive_field_of(model).position
    assert not receptive_field_of(constant(graph("y = Add (x, ramp)"), "ramp", 0 * ramp + 3)).position


def test_aligned_corners_make_the_result_depend_on_the_position() -> None:
    for aligned in (True, False):
        net = Tiles(upsampling(mode="bilinear", align_corners=aligned))
        model = export_onnx(net.eval(), channels=3, tile_px=64)
        assert receptive_field_of(model).position == aligned


@pytest.mark.parametrize("name", ["same padding below, strided", "space to depth", "tokens"])
def test_a_local_graph_stays_so(name: str) -> None:
    model = graph(LOCAL[name][0])
    assert receptive_field_of(model) == receptive_field(model)

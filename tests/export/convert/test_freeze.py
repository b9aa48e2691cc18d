from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper, parser
from torch import nn

from histostream.export.convert.freeze import freeze_statistics
from histostream.export.graph.from_torch import export_onnx
from histostream.export.graph.model import GraphError, check_graph
from histostream.export.receptive_field.measure import receptive_field
from tests.export.networks import GroupNormNet, TileNetwork, TranslationNet, TransposedNet

TILE_PX = 64


def tiles(n: int, channels: int, size_px: int = TILE_PX) -> NDArray[np.uint8]:
    """Tiles that differ in brightness and contrast, so that their statistics differ."""
    rng = np.random.default_rng(3)
    noise = rng.random((n, size_px, size_px, channels))
    low = rng.uniform(0, 120, (n, 1, 1, channels))
    high = rng.uniform(140, 255, (n, 1, 1, channels))
    return (low + (high - low) * noise).astype(np.uint8)


def run(model: onnx.ModelProto, x: NDArray[np.uint8]) -> NDArray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"tiles": x})[0])


NETWORKS: dict[str, Callable[[], TileNetwork]] = {
    "instance norm and adain": lambda: TranslationNet(TILE_PX).fold(),
    "layer norm": lambda: TranslationNet(TILE_PX, norm="layer").fold(),
    "group norm": GroupNormNet,
}


@pytest.fixture(scope="module", params=NETWORKS)
def live(request: pytest.FixtureRequest) -> onnx.ModelProto:
    """Return a graph with statistics of the tile, exported."""
    torch.manual_seed(1)
    return export_onnx(NETWORKS[request.param]().eval(), channels=1, tile_px=TILE_PX)


def test_frozen_to_one_tile_a_graph_gives_what_the_live_one_gives(live: onnx.ModelProto) -> None:
    model, tile = live, tiles(1, 1)
    before, after = run(model, tile), run(freeze_statistics(model, tile), tile)
    assert np.ptp(before) > 20 / 255  # the result is not flat
    assert np.abs(before.astype(np.float32) - after).max() <= 2**-9


def test_a_frozen_graph_is_local_and_the_live_one_is_not(live: onnx.ModelProto) -> None:
    model = live
    seen = receptive_field(model)
    frozen = freeze_statistics(model, tiles(3, 1))
    assert seen.whole_tile
    assert receptive_field(frozen).whole_tile == ()
    assert (receptive_field(frozen).halo_px, receptive_field(frozen).align_px) == (seen.halo_px, seen.align_px)

    one = tiles(1, 1)
    other = one.copy()
    other[:, :, TILE_PX // 2 :] = 255 - other[:, :, TILE_PX // 2 :] // 2
    beyond = np.s_[..., : TILE_PX // 2 - seen.halo_px]
    np.testing.assert_array_equal(run(frozen, one)[beyond], run(frozen, other)[beyond])
    assert not np.array_equal(run(frozen, one), run(frozen, other))
    assert not np.array_equal(run(model, one)[beyond], run(model, other)[beyond])


def test_tiles_of_one_batch_do_not_see_each_other(live: onnx.ModelProto) -> None:
    x = tiles(3, 1)
    frozen = freeze_statistics(live, x)
    one_by_one = np.concatenate([run(frozen, x[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(run(frozen, x), one_by_one)


def test_a_frozen_graph_is_fit_for_deployment_under_the_same_names(live: onnx.ModelProto) -> None:
    model = live
    frozen = freeze_statistics(model, tiles(2, 1))
    check_graph(frozen)
    assert frozen.graph.input == model.graph.input
    assert frozen.graph.output == model.graph.output
    used = {name for node in frozen.graph.node for name in node.input}
    assert {tensor.name for tensor in frozen.graph.initializer} <= used
    assert freeze_statistics(frozen, tiles(1, 1)) is frozen


def test_a_graph_without_statistics_is_returned_unchanged(tmp_path: Path) -> None:
    model = export_onnx(TransposedNet().eval(), channels=3, tile_px=32)
    before = model.SerializeToString()
    assert freeze_statistics(model, tiles(1, 3, 32)) is model
    assert model.SerializeToString() == before


class OneNorm(TileNetwork):
    """A convolution, an affine normalisation, a sigmoid."""

    def __init__(self, norm: type[nn.InstanceNorm2d] | type[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.channels, self.classes = 3, 4
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = norm(4, affine=True, momentum=1.0)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)

    def probs(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.norm(self.conv(x)))


def test_pooled_statistics_are_those_of_batch_normalisation(tmp_path: Path) -> None:
    x = tiles(4, 3, 32)
    model = export_onnx(OneNorm(nn.InstanceNorm2d).eval(), channels=3, tile_px=32)
    frozen = freeze_statistics(model, x)
    trained = OneNorm(nn.BatchNorm2d).train()
    trained(torch.from_numpy(x))
    (node,) = (n for n in frozen.graph.node if n.op_type == "BatchNormalization")
    values = {t.name: numpy_helper.to_array(t) for t in frozen.graph.initializer}
    mean, variance = (values[name] for name in node.input[3:])
    pixels = x[..., 0].size
    assert trained.norm.running_mean is not None
    assert trained.norm.running_var is not None
    np.testing.assert_allclose(mean, trained.norm.running_mean.numpy(), rtol=1e-5, atol=1e-6)
    biased = trained.norm.running_var.numpy() * (pixels - 1) / pixels  # torch keeps the unbiased
    np.testing.assert_allclose(variance, biased, rtol=1e-5)
    with torch.no_grad():
        trained.norm.running_var.copy_(torch.tensor(variance))
        expected = trained.eval()(torch.from_numpy(x)).numpy()
    assert np.abs(run(frozen, x).astype(np.float32) - expected).max() <= 2**-9


# --- Graphs by hand, for operators that our exporter does not write. ---


def graph(body: str, opset: int = 18) -> onnx.ModelProto:
    """Return a graph that maps x, (N, 4, 16, 16) in 0..1, to y in 0..1, behind the contract."""
    return parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": {opset}]>
        net (uint8[N,16,16,4] tiles) => (uint8[N,4,16,16] scores) {{
            real = Cast <to = 1> (tiles)
            raw = Transpose <perm = [0, 3, 1, 2]> (real)
            white = Constant <value = float {{255}}> ()
            x = Div (raw, white)
            {body}
            bright = Mul (y, white)
            scores = Cast <to = 2> (bright)
        }}""")


def floats(name: str, *values: float) -> str:
    return f"{name} = Constant <value = float[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


TWO, FOUR = (1.5, 0.5), (1.5, 0.5, 1, 2)
BY_HAND: dict[str, tuple[str, int]] = {
    "group norm by groups": (
        f"{floats('s', *TWO)}\n{floats('b', *TWO)}\n"
        "n = GroupNormalization <num_groups = 2> (x, s, b)\n y = Sigmoid (n)",
        18,
    ),
    "group norm by channels": (
        f"{floats('s', *FOUR)}\n{floats('b', *FOUR)}\n"
        "n = GroupNormalization <num_groups = 2> (x, s, b)\n y = Sigmoid (n)",
        21,
    ),
    "instance norm, old opset": (
        f"{floats('s', *FOUR)}\n{floats('b', *FOUR)}\nn = InstanceNormalization (x, s, b)\n y = Sigmoid (n)",
        11,
    ),
    "layer norm of a row": (
        f"{floats('s', *range(1, 17))}\n{floats('b', *range(16))}\n"
        "n = LayerNormalization <axis = -1, epsilon = 0.01> (x, s, b)\n y = Sigmoid (n)",
        18,
    ),
    "squeeze and excite": ("m = GlobalAveragePool (x)\n g = Sigmoid (m)\n y = Mul (x, g)", 18),
    "contrast": (
        "axes = Constant <value = int64[2] {2, 3}> ()\n"
        "l = ReduceMin (x, axes)\n h = ReduceMax (x, axes)\n w = Sub (h, l)\n"
        "d = Sub (x, l)\n y = Div (d, w)",
        18,
    ),
    "context beside the pixels": (
        "m = GlobalAveragePool (x)\n"
        "sh = Shape (x)\n e = Expand (m, sh)\n c = Concat <axis = 1> (x, e)\n"
        "axes = Constant <value = int64[1] {1}> ()\n p = ReduceMean <keepdims = 1> (c, axes)\n"
        "f = Add (x, p)\n y = Sigmoid (f)",
        18,
    ),
    "second moment": (
        "axes = Constant <value = int64[2] {2, 3}> ()\n"
        "q = Mul (x, x)\n m = ReduceMean (x, axes)\n e = ReduceMean (q, axes)\n"
        "mm = Mul (m, m)\n v = Sub (e, mm)\n s = Sqrt (v)\n"
        "d = Sub (x, m)\n n = Div (d, s)\n y = Sigmoid (n)",
        18,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_statistics_of_a_foreign_graph_are_frozen(name: str) -> None:
    model = graph(*BY_HAND[name])
    x = tiles(3, 4, 16)
    frozen = freeze_statistics(model, x[:1])
    assert receptive_field(model).whole_tile
    assert receptive_field(model).halo_px == receptive_field(frozen).halo_px == 0
    assert receptive_field(frozen).whole_tile == ()
    assert np.abs(run(model, x[:1]).astype(int) - run(frozen, x[:1])).max() <= 1  # of 255
    pooled = freeze_statistics(model, x)
    together = run(pooled, x)
    np.testing.assert_array_equal(together[1:2], run(pooled, x[1:2]))
    assert not np.array_equal(together, run(model, x))


ATTENTION = """
    flat = Constant <value = int64[3] {0, 4, -1}> ()
    square = Constant <value = int64[4] {0, 4, 16, 16}> ()
    k = Reshape (x, flat)
    q = Transpose <perm = [0, 2, 1]> (k)
    a = MatMul (q, k)
    p = Softmax <axis = -1> (a)
    v = MatMul (p, q)
    t = Transpose <perm = [0, 2, 1]> (v)
    y = Reshape (t, square)
"""


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (ATTENTION, "MatMul"),
        ("s = Softmax <axis = -1> (x)\n y = Identity (s)", "Softmax"),
        ("a = Constant <value = int64 {3}> ()\n y = CumSum (x, a)", "CumSum"),
    ],
)
def test_what_is_no_statistic_is_refused_by_name(body: str, kind: str) -> None:
    model = graph(body)
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type} {i}"
    with pytest.raises(GraphError, match=f"'{kind} .*depends on the whole tile"):
        freeze_statistics(model, tiles(1, 4, 16))


def test_a_deviation_that_the_graph_computes_is_that_of_all_tiles_together() -> None:
    n = 4 * 16 * 16
    model = graph(f"""
        axes = Constant <value = int64[3] {{1, 2, 3}}> ()
        m = ReduceMean (x, axes)
        d = Sub (x, m)
        q = Mul (d, d)
        v = ReduceMean (q, axes)
        unbias = Constant <value = float {{{n / (n - 1)}}}> ()
        u = Mul (v, unbias)
        r = Sqrt (u)
        e = Constant <value = float {{0.01}}> ()
        s = Add (r, e)
        z = Div (d, s)
        y = Sigmoid (z)""")
    x = tiles(3, 4, 16)
    pixels = x.transpose(0, 3, 1, 2) / 255
    deviation = np.sqrt(pixels.var() * n / (n - 1)) + 0.01
    expected = 255 / (1 + np.exp(-(pixels - pixels.mean()) / deviation))
    assert np.abs(run(freeze_statistics(model, x), x) - expected).max() < 1.01  # truncated


def test_tiles_of_another_size_are_refused() -> None:
    model = graph("m = GlobalAveragePool (x)\n y = Sub (x, m)")
    for wrong in (tiles(1, 4, 16)[:0], tiles(1, 4, 32), tiles(1, 3, 16)):
        with pytest.raises(GraphError, match=r"give uint8 \(N, 16, 16, 4\)"):
            freeze_statistics(model, wrong)


def test_a_fixed_number_of_tiles_is_refused() -> None:
    model = graph("m = GlobalAveragePool (x)\n y = Sub (x, m)")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(GraphError, match="fixed N"):
        freeze_statistics(model, tiles(1, 4, 16))


def test_n_taken_from_a_statistic_is_refused() -> None:
    model = graph("""
        m = GlobalAveragePool (x)
        sh = Shape (m)
        zero = Constant <value = int64[1] {0}> ()
        n = Gather <axis = 0> (sh, zero)
        rest = Constant <value = int64[3] {4, 16, 16}> ()
        to = Concat <axis = 0> (n, rest)
        d = Sub (x, m)
        y = Reshape (d, to)""")
    with pytest.raises(GraphError, match="takes its N from a statistic"):
        freeze_statistics(model, tiles(1, 4, 16))

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import parser
from torch import Tensor, nn

from histostream.export.graph.from_torch import export_onnx
from histostream.export.graph.model import GraphError
from histostream.export.receptive_field.measure import ReceptiveField, receptive_field
from histostream.training.networks.unet import UNet
from tests.export.networks import (
    GroupNormNet,
    LayerNorm,
    PyramidNet,
    TileNetwork,
    TranslationNet,
    TransposedNet,
)


class Tiles(TileNetwork):
    """Any network behind the tile contract."""

    def __init__(self, network: nn.Module, channels: int = 3) -> None:
        super().__init__()
        self.network, self.channels = network, channels

    def probs(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out


def exported_field(net: TileNetwork, tile_px: int = 32) -> ReceptiveField:
    return receptive_field(export_onnx(net.eval(), channels=net.channels, tile_px=tile_px))


# --- The oracle: gradient support in torch. ---


def open_copy(net: TileNetwork) -> TileNetwork:
    """No path cancels or is switched off: positive weights, maximum -> mean, norms -> identity."""
    net = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1 / parameter[0].numel() if parameter.ndim > 1 else 0)
    norms = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, LayerNorm, nn.Softmax)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MaxPool2d):
                average = nn.AvgPool2d(child.kernel_size, child.stride, child.padding)
                setattr(parent, name, average)
            elif isinstance(child, norms):
                setattr(parent, name, nn.Identity())
    return net


def gradient_halo(net: TileNetwork, align_px: int, size_px: int = 192) -> int:
    net = open_copy(net)
    longest = 0
    for axis in (2, 3):
        shape = [1, net.channels, 8 * align_px, 8 * align_px]
        shape[axis] = size_px
        x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        out = net.probs(x)
        middle = size_px // 2 // align_px * align_px
        for position in range(middle, middle + align_px):
            wanted = out.select(axis, position).sum()
            (gradient,) = torch.autograd.grad(wanted, x, retain_graph=True)
            seen = gradient.abs().sum(dim=[d for d in range(4) if d != axis]).nonzero()[:, 0]
            first, last = int(seen.min()), int(seen.max())
            assert first > 0
            assert last < size_px - 1, "the field does not fit"
            longest = max(longest, position - first, last - position)
    return longest


class Mixed(nn.Module):
    """Dilation, stride, reflection and both transposed convolutions, not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.dilated = nn.Conv2d(3, 2, (3, 5), padding=(3, 4), dilation=(3, 2))
        self.to_half = nn.Conv2d(2, 2, 3, stride=2, padding=1, padding_mode="reflect")
        self.to_quarter = nn.Conv2d(2, 2, 5, stride=2, padding=2)
        self.up = nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1)
        self.full = nn.ConvTranspose2d(4, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        half = torch.relu(self.to_half(self.dilated(x)))
        up = self.up(torch.relu(self.to_quarter(half)))
        out: Tensor = self.full(torch.cat([half, up], dim=1))
        return out


def upsampling(**options: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1),
        nn.AvgPool2d(4),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Upsample(scale_factor=2, **options),  # type: ignore[arg-type]
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Upsample(scale_factor=2, **options),  # type: ignore[arg-type]
    )


NETWORKS: dict[str, tuple[Callable[[], TileNetwork], int]] = {
    "u-net of depth 1": (lambda: Tiles(u_net(1)), 2),
    "u-net of depth 2": (lambda: Tiles(u_net(2)), 4),
    "u-net of depth 3": (lambda: Tiles(u_net(3)), 8),
    "dilated, strided, transposed": (lambda: Tiles(Mixed()), 4),
    "bilinear": (lambda: Tiles(upsampling(mode="bilinear", align_corners=False)), 4),
    "nearest": (lambda: Tiles(upsampling(mode="nearest")), 4),
    "pixel shuffle": (
        lambda: Tiles(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3, padding=1), nn.PixelShuffle(2))),
        2,
    ),
    "pyramid": (PyramidNet, 4),
    "translation": (lambda: TranslationNet(norm="layer").fold(), 4),
    "group norm": (GroupNormNet, 2),
    "transposed": (lambda: TransposedNet(2, 2), 4),
}


def u_net(depth: int) -> UNet:
    return UNet(3, 2, base_width=2, depth=depth, dropout=0.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_halo_is_the_support_of_the_gradient(name: str) -> None:
    torch.manual_seed(0)
    build, align_px = NETWORKS[name]
    net = build()
    found = exported_field(net)
    assert found.align_px == align_px
    assert found.halo_px == gradient_halo(net, align_px)
    assert bool(found.whole_tile) == (name in ("translation", "group norm"))


def test_aligned_corners_cost_less_than_a_pixel_of_the_coarse_map() -> None:
    # The place in the coarse map drifts by half a pixel across the tile; the bound holds anywhere.
    net = Tiles(upsampling(mode="bilinear", align_corners=True))
    found = exported_field(net)
    exact = gradient_halo(net, 4)
    assert exact <= found.halo_px < exact + 4


@pytest.mark.full
def test_the_halo_does_not_depend_on_the_tile_and_may_be_longer() -> None:
    torch.manual_seed(0)
    net = PyramidNet(3, layers=1)
    small, large = (exported_field(net, tile_px) for tile_px in (32, 64))
    assert small == large
    assert small.halo_px > 32
    assert small.align_px == 8


# --- What sees the whole tile. ---


@pytest.mark.full
def test_normalisation_by_the_tile_is_named_and_by_running_statistics_is_not() -> None:
    torch.manual_seed(0)
    found, kinds = [], []
    for norm in ("adain", "layer"):
        net = TranslationNet(norm=norm).fold()
        model = export_onnx(net.eval(), channels=net.channels, tile_px=32)
        found.append(receptive_field(model))
        named = {node.name: node.op_type for node in model.graph.node}
        kinds.append([named[name] for name in found[-1].whole_tile])
    assert kinds[0].count("InstanceNormalization") == 5
    assert kinds[0].count("Gemm") == 1
    assert kinds[1].count("ReduceMean") == 4
    assert found[0].halo_px == found[1].halo_px  # statistics have no reach of their own
    assert not exported_field(TransposedNet()).whole_tile


# --- Graphs by hand, for operators that our exporter does not write. ---


def graph(body: str, opset: int = 18, size_px: int = 32) -> onnx.ModelProto:
    """Return a graph that maps x, (N, 2, size_px, size_px), to y, behind the tile contract."""
    return parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": {opset}]>
        net (uint8[N,{size_px},{size_px},2] tiles) => (float scores) {{
            real = Cast <to = 1> (tiles)
            x = Transpose <perm = [0, 3, 1, 2]> (real)
            {body}
            scores = Identity (y)
        }}""")


def ints(name: str, *values: int) -> str:
    return f"{name} = Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


def floats(name: str, *values: float) -> str:
    return f"{name} = Constant <value = float[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


def kernel(name: str, *shape: int) -> str:
    values = ", ".join("1" for _ in range(int(np.prod(shape))))
    dims = ", ".join(map(str, shape))
    return f"{name} = Constant <value = float[{dims}] {{{values}}}> ()"


def impulse_halo(model: onnx.ModelProto, align_px: int, size_px: int = 32) -> int:
    """Brighten one row, or one column, of the input at a time and see which outputs change."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    longest = 0
    rng = np.random.default_rng(0)
    base = np.broadcast_to(
        rng.integers(20, 100, (1, size_px, size_px, 2), dtype=np.uint8),
        (size_px, size_px, size_px, 2),
    )
    for axis in (1, 2):
        bright = base.copy()
        for i in range(size_px):
            np.moveaxis(bright[i], axis - 1, 0)[i] += 100
        before, after = (session.run(None, {"tiles": x})[0] for x in (base, bright))
        changed = np.abs(before - after).max(axis=(1, 4 - axis)) > 1e-3  # (input, output)
        middle = size_px // 2 // align_px * align_px
        for position in range(middle, middle + align_px):
            seen = np.nonzero(changed[:, position])[0]
            if seen.size:
                longest = max(longest, position - seen[0], seen[-1] - position)
    return int(longest)


RESIZE = "r = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)\n y = Resize <{}> (r, , s)"
LOCAL: dict[str, tuple[str, int]] = {
    "same padding": (f'{kernel("w", 2, 2, 4, 3)}\ny = Conv <auto_pad = "SAME_UPPER"> (x, w)', 1),
    "same padding below, strided": (
        f"{kernel('w', 2, 2, 5, 4)}\n"
        'r = Conv <auto_pad = "SAME_LOWER", strides = [2, 2]> (x, w)\n'
        'y = ConvTranspose <auto_pad = "SAME_UPPER", strides = [2, 2]> (r, w)',
        2,
    ),
    "transposed and dilated": (
        f"{kernel('w', 2, 2, 2, 2)}\n"
        "r = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)\n"
        "y = ConvTranspose <strides = [2, 2], dilations = [3, 3], pads = [1, 1, 1, 1]> (r, w)",
        2,
    ),
    "transposed with gaps": (
        f"{kernel('w', 2, 2, 1, 1)}\n"
        "r = AveragePool <kernel_shape = [1, 1], strides = [2, 2]> (x)\n"
        "y = ConvTranspose <strides = [2, 2], output_padding = [1, 1]> (r, w)",
        2,
    ),
    "ceiling pool": (
        "r = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)\n"
        "s = Constant <value = float[4] {1, 1, 2, 2}> ()\n y = Resize (r, , s)",
        2,
    ),
    "dilated pool": ("y = MaxPool <kernel_shape = [3, 3], dilations = [2, 1], pads = [2, 1, 2, 1]> (x)", 1),
    "space to depth": (
        f"{kernel('w', 32, 32, 3, 1)}\n"
        "r = SpaceToDepth <blocksize = 4> (x)\n"
        "p = Conv <pads = [1, 0, 1, 0]> (r, w)\n"
        "y = DepthToSpace <blocksize = 4> (p)",
        4,
    ),
    "slice and concat as reflection": (
        f"{ints('one', 1)}\n{ints('two', 2)}\n{ints('rows', 2)}\n{ints('m2', -2)}\n"
        f"{ints('m1', -1)}\n{ints('m3', -3)}\n"
        "top = Slice (x, one, two, rows)\n"
        "low = Slice (x, m2, m1, rows)\n"
        "r = Concat <axis = 2> (top, x, low)\n"
        "y = AveragePool <kernel_shape = [3, 3], pads = [0, 1, 0, 1]> (r)",
        1,
    ),
    "every second, flipped twice": (
        f"{ints('from', -1, -1)}\n{ints('to', -99, -99)}\n{ints('axes', 2, 3)}\n"
        f"{ints('back', -1, -1)}\n{ints('zero', 0, 0)}\n{ints('end', 99, 99)}\n"
        f"{ints('step', 2, 2)}\n{ints('pads', 0, 0, 0, 0, 0, 0, 1, 0)}\n"
        "f = Slice (x, from, to, axes, back)\n"
        "p = MaxPool <kernel_shape = [2, 1]> (f)\n"
        "c = Pad (p, pads)\n"
        "g = Slice (c, from, to, axes, back)\n"
        "h = Slice (g, zero, end, axes, step)\n"
        "s = Constant <value = float[4] {1, 1, 2, 2}> ()\n"
        "y = Resize (h, , s)",
        2,
    ),
    "split along the width": (
        f"{ints('parts', 1, 31)}\n"
        "a, b = Split <axis = 3> (x, parts)\n"
        f"{ints('pads', 0, 0, 0, 0, 0, 0, 0, 1)}\n y = Pad (b, pads)",
        1,
    ),
    "pad of named axes": (f"{ints('pads', 2, 1, -2, -1)}\n{ints('axes', 3, 2)}\ny = Pad (x, pads, , axes)", 1),
    "rows gathered": (
        f"{ints('rows', *range(1, 32), 31)}\n"
        f"{ints('most', *range(1, 32))}\n r = Gather <axis = 2> (x, most)\n"
        f"{ints('pads', 0, 0, 0, 0, 0, 0, 1, 0)}\n y = Pad (r, pads)",
        1,
    ),
    "tokens": (
        f"{ints('flat', 0, 2, -1)}\n{ints('square', 0, 2, 32, 32)}\n"
        f"{kernel('w', 2, 2)}\n"
        "f = Reshape (x, flat)\n t = Transpose <perm = [0, 2, 1]> (f)\n"
        "m = MatMul (t, w)\n u = Transpose <perm = [0, 2, 1]> (m)\n"
        "r = Reshape (u, square)\n"
        "y = AveragePool <kernel_shape = [1, 3], pads = [0, 1, 0, 1]> (r)",
        1,
    ),
    "computed shapes": (
        f"{ints('n0', 0)}\n{ints('rest', 2, 32, 32)}\n{ints('flat', 2, -1)}\n"
        "sh = Shape (x)\n n = Gather <axis = 0> (sh, n0)\n"
        "to = Concat <axis = 0> (n, flat)\n f = Reshape (x, to)\n"
        "full = Concat <axis = 0> (n, rest)\n r = Reshape (f, full)\n"
        "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r)",
        1,
    ),
    **{
        f"resize {options}": ("s = Constant <value = float[4] {1, 1, 2, 2}> ()\n" + RESIZE.format(options), 2)
        for options in (
            'mode = "nearest", coordinate_transformation_mode = "half_pixel"',
            'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "ceil"',
            'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "round_prefer_ceil"',
            'mode = "linear", coordinate_transformation_mode = "half_pixel"',
            'mode = "linear", coordinate_transformation_mode = "asymmetric"',
            'mode = "linear", coordinate_transformation_mode = "pytorch_half_pixel"',
            'mode = "cubic", coordinate_transformation_mode = "half_pixel"',
            'mode = "cubic", coordinate_transformation_mode = "asymmetric"',
        )
    },
    "resize by sizes": (
        f"{ints('to', 16, 16)}\n{ints('up', 32, 32)}\n"
        'r = Resize <mode = "linear", axes = [2, 3]> (x, , , to)\n'
        "y = Resize <axes = [3, 2]> (r, , , up)",
        2,
    ),
}


@pytest.mark.parametrize("name", LOCAL)
def test_the_halo_of_a_foreign_graph_is_what_an_impulse_shows(name: str) -> None:
    body, align_px = LOCAL[name]
    model = graph(body)
    found = receptive_field(model)
    assert not found.whole_tile
    assert found.align_px == align_px
    assert found.halo_px == impulse_halo(model, align_px)


def test_an_antialiased_reduction_sees_as_far_as_its_filter() -> None:
    model = graph("""
        s = Constant <value = float[4] {1, 1, 0.5, 0.5}> ()
        r = Resize <mode = "linear", antialias = 1> (x, , s)
        t = Constant <value = float[4] {1, 1, 2, 2}> ()
        y = Resize (r, , t)""")
    found = receptive_field(model)
    assert (found.align_px, found.whole_tile) == (2, ())
    assert impulse_halo(model, 2) <= found.halo_px <= impulse_halo(model, 2) + 1


WHOLE: dict[str, tuple[str, list[str]]] = {
    "squeeze and excite": ("m = GlobalAveragePool (x)\n g = Sigmoid (m)\n y = Mul (x, g)", ["GlobalAveragePool"]),
    "softmax over space": (
        f"{ints('flat', 0, 2, -1)}\n{ints('square', 0, 2, 32, 32)}\n"
        "f = Reshape (x, flat)\n p = Softmax <axis = -1> (f)\n y = Reshape (p, square)",
        ["Softmax"],
    ),
    "attention": (
        f"{ints('flat', 0, 2, -1)}\n{ints('square', 0, 2, 32, 32)}\n"
        "k = Reshape (x, flat)\n q = Transpose <perm = [0, 2, 1]> (k)\n"
        "a = MatMul (q, k)\n p = Softmax <axis = -1> (a)\n v = MatMul (p, q)\n"
        "t = Transpose <perm = [0, 2, 1]> (v)\n r = Reshape (t, square)\n y = Add (x, r)",
        ["MatMul", "MatMul"],
    ),
    "range of the tile": (
        "q, s, z = DynamicQuantizeLinear (x)\n y = DequantizeLinear (q, s, z)",
        ["DynamicQuantizeLinear"],
    ),
    "group normalisation": (
        f"{floats('s', 1, 2)}\nn = GroupNormalization <num_groups = 2> (x, s, s)\n y = Relu (n)",
        ["GroupNormalization"],
    ),
    "layer normalisation of a row": (
        f"{kernel('w', 32)}\n y = LayerNormalization <axis = -1> (x, w)",
        ["LayerNormalization"],
    ),
    "pooling with the tile's kernel": (
        "m = AveragePool <kernel_shape = [32, 32], strides = [32, 32]> (x)\n g = Sigmoid (m)\n y = Mul (x, g)",
        ["AveragePool"],
    ),
    "convolution with the tile's kernel": (
        f"{kernel('w', 2, 2, 32, 32)}\n m = Conv (x, w)\n y = Add (x, m)",
        ["Conv"],
    ),
    "pooling into bins": (
        "a = AveragePool <kernel_shape = [16, 16], strides = [16, 16]> (x)\n"
        "b = AveragePool <kernel_shape = [11, 11], strides = [10, 10]> (x)\n"
        f"{ints('to', 32, 32)}\n"
        'u = Resize <mode = "linear", axes = [2, 3]> (a, , , to)\n'
        'v = Resize <mode = "linear", axes = [2, 3]> (b, , , to)\n'
        "y = Concat <axis = 1> (x, u, v)",
        ["AveragePool", "AveragePool"],
    ),
    "rows pooled": (
        "m = AveragePool <kernel_shape = [1, 32]> (x)\n y = Add (x, m)",
        ["AveragePool"],
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_sees_the_whole_tile_is_named(name: str) -> None:
    body, kinds = WHOLE[name]
    model = named(graph(body))
    found = receptive_field(model)
    assert [label.split("/")[0] for label in found.whole_tile] == kinds
    assert (found.halo_px, found.align_px, found.unknown) == (0, 1, ())


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name every node by its operator."""
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}/{i}"
    return model


UNKNOWN = {
    "a sum along the rows": ("three = Constant <value = int64 {3}> ()\n y = CumSum (x, three)", "CumSum"),
    "halves swapped": (
        f"{ints('parts', 16, 16)}\n a, b = Split <axis = 2> (x, parts)\ny = Concat <axis = 2> (b, a)",
        "Concat",
    ),
    "einsum": (f'{kernel("w", 2, 2)}\n y = Einsum <equation = "kc,nchw->nkhw"> (w, x)', "Einsum"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_node_without_a_rule_is_a_finding_of_its_own(name: str) -> None:
    body, kind = UNKNOWN[name]
    found = receptive_field(named(graph(body)))
    assert [label.split("/")[0] for label in found.unknown] == [kind]
    assert (found.whole_tile, found.is_local) == ((), False)


def pyramid_of_poolings(levels: int, size_px: int) -> onnx.ModelProto:
    """Return a graph that halves the tile so often, and enlarges it again."""
    pools = "".join(f"p{i + 1} = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (p{i})\n" for i in range(levels))
    back = f"s = Constant <value = float[4] {{1, 1, {2**levels}, {2**levels}}}> ()\n y = Resize (p{levels}, , s)"
    return graph(f"p0 = Identity (x)\n{pools}{back}", size_px=size_px)


@pytest.mark.parametrize(("levels", "size_px", "align_px"), [(5, 64, 32), (6, 64, 32), (6, 128, 64), (4, 512, 16)])
def test_overlapping_tiles_can_keep_the_alignment(levels: int, size_px: int, align_px: int) -> None:
    found = receptive_field(pyramid_of_poolings(levels, size_px))
    assert found.align_px == align_px <= size_px // 2
    assert bool(found.whole_tile) == (2**levels > align_px)


def test_a_tile_of_33_px_has_whole_strides_where_corners_are_aligned() -> None:
    # 33, 17, 9: strides of 1, 2 and 4, and from corner to corner 32, 16 and 8 steps.
    down = "r = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> ({})\n"
    body = (
        f"{ints('to', 33, 33)}\n{down.format('x')}{down.format('r').replace('r =', 'q =')}"
        'y = Resize <mode = "linear", axes = [2, 3], coordinate_transformation_mode = "align_corners"> (q, , , to)'
    )
    model = graph(body, size_px=33)
    found = receptive_field(model)
    assert (found.align_px, found.whole_tile) == (4, ())
    assert found.halo_px == impulse_halo(model, 4, 33)


def test_attention_inside_windows_is_local() -> None:
    # (N, C, H, W) to windows (N H/8 W/8, 64, C), whose pixels are compared with each other, and back.
    split, back = ints("split", 1, 2, 4, 8, 4, 8), ints("back", 1, 4, 4, 8, 8, 2)
    model = graph(
        f"{split}\n{back}\n{ints('windows', 16, 64, 2)}\n{ints('square', 1, 2, 32, 32)}\n"
        "a = Reshape (x, split)\n b = Transpose <perm = [0, 2, 4, 3, 5, 1]> (a)\n q = Reshape (b, windows)\n"
        "k = Transpose <perm = [0, 2, 1]> (q)\n m = MatMul (q, k)\n p = Softmax <axis = -1> (m)\n"
        "v = MatMul (p, q)\n c = Reshape (v, back)\n d = Transpose <perm = [0, 5, 1, 3, 2, 4]> (c)\n"
        "y = Reshape (d, square)"
    )
    assert receptive_field(model) == ReceptiveField(7, 8, ())


@pytest.mark.parametrize(
    "body",
    [
        "y = Softmax <axis = 1> (x)",
        f"{ints('one', 1)}\n y = ReduceMean (x, one)",
        "a = ArgMax <axis = 1> (x)\n y = Cast <to = 1> (a)",
        "t = Transpose <perm = [0, 2, 3, 1]> (x)\n"
        "w = Constant <value = float[2] {1, 2}> ()\n"
        "n = LayerNormalization <axis = -1> (t, w)\n y = Transpose <perm = [0, 3, 1, 2]> (n)",
    ],
    ids=["softmax", "mean", "argmax", "layer norm"],
)
def test_statistics_over_channels_are_local(body: str) -> None:
    assert receptive_field(graph(body)) == ReceptiveField(0, 1, ())


def test_a_node_that_leads_nowhere_is_not_named() -> None:
    assert receptive_field(graph("m = GlobalMaxPool (x)\n y = Relu (x)")) == ReceptiveField(0, 1, ())


def test_a_result_that_is_not_on_the_grid_of_the_tile_is_not_local() -> None:
    found = receptive_field(graph("y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)"))
    assert found.whole_tile


def test_a_graph_of_any_size_is_refused() -> None:
    model = graph("y = Relu (x)")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "H"
    with pytest.raises(GraphError, match="fixed H, W and C"):
        receptive_field(model)

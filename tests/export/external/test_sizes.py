"""Sizes, layouts, channels and types of input and output, each against ONNX Runtime on the same pixels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

from histostream.export.external.description import DescriptionError, ExternalModel
from histostream.export.external.wrap import WrappedModel, wrap_graph
from histostream.export.graph.model import GraphError
from histostream.runtime.stream.blend import BlendError, check_blend, exact_overlap_px
from tests.export.external.graphs import convolution, graph_file
from tests.runtime.conftest import CARD

FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8
Array = NDArray[Any]
node = helper.make_node
ABC = ("a", "b", "c")


def wrap(path: Path, options: ExternalModel) -> WrappedModel:
    return wrap_graph(path, options, mpp=0.5)


def labels(wrapped: WrappedModel, tiles: Array) -> Array:
    session = onnxruntime.InferenceSession(wrapped.model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"tiles": tiles})[0].argmax(axis=1)
    return found


def output(path: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    return np.concatenate([session.run(None, {source.name: one[None]})[0] for one in x])


def noise(side: int, channels: int = 3, count: int = 2) -> Array:
    """Return smooth tiles of all colours, (count, side, side, channels)."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, side // 8 + 2, side // 8 + 2, channels))
    return coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :side, :side].astype(np.uint8)


def nchw(tiles: Array) -> Array:
    return np.ascontiguousarray((tiles / 255).astype(np.float32).transpose(0, 3, 1, 2))


def convolutional(path: Path, shape: list[Any], *, channels: int = 3, layout: str = "nchw") -> Path:
    """Write a convolution of three classes whose input has a shape."""
    inner = [node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])]
    sides = shape[2:] if layout == "nchw" else shape[1:3]
    result = [shape[0], 3, *sides]
    if layout == "nhwc":
        inner = [
            node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
            node("Conv", ["t", "w"], ["l"], pads=[1, 1, 1, 1]),
            node("Transpose", ["l"], ["y"], perm=[0, 2, 3, 1]),
        ]
        result = [shape[0], *sides, 3]
    return graph_file(path, inner, {"w": convolution(channels=channels)}, ("x", FLOAT, shape), [("y", FLOAT, result)])


# --- input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layout", "channels", "side"),
    [
        (["n", 3, 96, 96], "nchw", 3, 96),
        (["n", 3, "h", "w"], "nchw", 3, 512),
        (["n", 3, 96, "w"], "nchw", 3, 96),
        ([1, 96, 96, 3], "nhwc", 3, 96),
        (["n", "h", "w", 3], "nhwc", 3, 512),
        (["n", 5, 96, 96], "nchw", 5, 96),
        (["n", 96, 96, 7], "nhwc", 7, 96),
        (["n", 1, 96, 96], "nchw", 1, 96),
        (["n", 4, 75, 75], "nchw", 4, 75),
    ],
)
def test_layout_channels_and_side_come_from_the_file(
    tmp_path: Path, shape: list[Any], layout: str, channels: int, side: int
) -> None:
    path = convolutional(tmp_path / "net.onnx", shape, channels=channels, layout=layout)
    wrapped = wrap(path, ExternalModel(ABC))
    source = wrapped.source
    assert (source.layout, source.channels, source.tile_px) == (layout, channels, side)
    tiles = noise(side, channels)
    x = nchw(tiles) if layout == "nchw" else (tiles / 255).astype(np.float32)
    expected = output(path, x).argmax(axis=1 if layout == "nchw" else 3)
    assert (labels(wrapped, tiles) == expected).mean() >= 0.9999


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        (["n", "c", "h", "w"], {}, "pass --layout nchw or --layout nhwc"),
        (["n", 3, 96, 128], {}, r"takes 96 x 128 pixels, and tiles are square"),
        (["n", 3, 96, 96], {"tile_px": 128}, r"takes 96 x 96 pixels, not 128 x 128; pass --tile 96, or leave it out"),
        (["n", 4, 96, 96], {"mean": (0.5,) * 3}, r"has 4 channels, --mean, --std or --channel-names 3"),
        (["n", 4, 96, 96], {"order": "bgr"}, r"--bgr needs 3 channels, input 'x' has 4"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, shape: list[Any], options: dict[str, Any], words: str
) -> None:
    channels = shape[1] if isinstance(shape[1], int) else 3
    path = convolutional(tmp_path / "net.onnx", shape, channels=channels)
    with pytest.raises(GraphError, match=words):
        wrap(path, ExternalModel(ABC, **options))


@pytest.mark.parametrize("casts_first", [True, False])
def test_a_network_of_bytes_gets_raw_pixels(tmp_path: Path, casts_first: bool) -> None:
    """Where arithmetic of bytes comes before the cast, bytes must reach it: 200 + 100 is 44 there."""
    first = [node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), node("Cast", ["t"], ["f"], to=FLOAT)]
    if not casts_first:
        first[:0] = [node("Max", ["x", "least"], ["m"])]
        first[1].input[0] = "m"
    weights = {"w": convolution() / 255, "least": np.array(40, np.uint8)}
    path = graph_file(
        tmp_path / "net.onnx",
        [*first, node("Conv", ["f", "w"], ["y"], pads=[1, 1, 1, 1])],
        weights,
        ("x", UINT8, ["n", 96, 96, 3]),
        [("y", FLOAT, ["n", 3, 96, 96])],
    )
    wrapped = wrap(path, ExternalModel(ABC))
    kinds = [entry.op_type for entry in wrapped.model.graph.node[:2]]
    assert kinds.count("Cast") == (1 if casts_first else 2)  # TensorRT moves no bytes
    tiles = noise(96)
    np.testing.assert_array_equal(labels(wrapped, tiles), output(path, tiles).argmax(axis=1))
    model = onnx.load(path)
    helper.set_model_props(model, {"mean": "0.5", "std": "0.2"})  # for the network itself
    onnx.save(model, path)
    assert wrap(path, ExternalModel(ABC)).source.mean == (0.0,) * 3
    with pytest.raises(DescriptionError, match=r"takes uint8 and normalises it itself: leave --mean, --scale out"):
        wrap(path, ExternalModel(ABC, mean=(0.5,), scale=1 / 255))


# --- output -------------------------------------------------------------------------------------


def label_network(path: Path, form: str) -> Path:
    """Write a network that gives labels: of which type, and with which axes."""
    nodes = [node("Conv", ["x", "w"], ["l"], pads=[1, 1, 1, 1])]
    kind, shape = TensorProto.INT64, ["n", 96, 96]
    if form == "float":
        nodes += [node("ArgMax", ["l"], ["a"], axis=1), node("Cast", ["a"], ["y"], to=FLOAT)]
        kind, shape = FLOAT, ["n", 1, 96, 96]
    elif form == "uint8 last":
        nodes += [node("ArgMax", ["l"], ["a"], axis=1), node("Cast", ["a"], ["b"], to=UINT8)]
        nodes += [node("Transpose", ["b"], ["y"], perm=[0, 2, 3, 1])]
        kind, shape = UINT8, ["n", 96, 96, 1]
    elif form == "bool":
        nodes += [node("Slice", ["l", "zero", "one", "one"], ["s"]), node("Greater", ["s", "least"], ["y"])]
        kind, shape = TensorProto.BOOL, ["n", 1, 96, 96]
    else:
        nodes += [node("ArgMax", ["l"], ["y"], axis=1, keepdims=0)]
    weights = {"w": convolution(), "zero": np.array([0]), "one": np.array([1]), "least": np.array(0.3, np.float32)}
    return graph_file(path, nodes, weights, ("x", FLOAT, ["n", 3, 96, 96]), [("y", kind, shape)])


@pytest.mark.parametrize("form", ["int64", "float", "uint8 last", "bool"])
def test_labels_are_taken_as_they_are(tmp_path: Path, form: str) -> None:
    path = label_network(tmp_path / "net.onnx", form)
    names = ABC[:2] if form == "bool" else ABC
    wrapped = wrap(path, ExternalModel(names))
    assert any("without blending" in line for line in wrapped.decisions)
    tiles = noise(96)
    np.testing.assert_array_equal(labels(wrapped, tiles), output(path, nchw(tiles)).reshape(2, 96, 96))
    for options, words in (
        ({"threshold": 0.4}, "labels, which have no threshold"),
        ({"activation": "softmax"}, "--activation softmax cannot be"),
    ):
        with pytest.raises(DescriptionError, match=words):
            wrap(path, ExternalModel(names, **options))


def test_more_labels_than_classes_are_refused(tmp_path: Path) -> None:
    path = label_network(tmp_path / "net.onnx", "int64")
    with pytest.raises(GraphError, match=r"gives the label 2, and 2 classes were named \(0 to 1\)"):
        wrap(path, ExternalModel(ABC[:2]))


def test_a_model_of_labels_or_with_a_border_is_cropped_unless_it_cannot_be() -> None:
    from dataclasses import replace

    of_labels, bordered = replace(CARD, score_kind="label"), replace(CARD, border_px=10, halo_px=12)
    assert [card.default_blend for card in (CARD, of_labels, bordered)] == ["hann", "crop", "exact"]
    assert replace(bordered, tile_statistics=True).default_blend == "crop"
    assert replace(bordered, halo_px=40).default_blend == "crop"
    check_blend("exact", bordered, exact_overlap_px(bordered))
    check_blend("crop", bordered, 20)
    check_blend("crop", of_labels, 16)
    for card, mode, overlap_px, words in (
        (of_labels, "hann", 16, "--blend hann: this model gives labels, which cannot be averaged; leave --blend out"),
        (bordered, "linear", 30, "no scores within 10 px of a tile's border; leave --blend out, or use crop"),
        (bordered, "crop", 16, "--overlap 16: .*leave --overlap out, or use at least 20"),
    ):
        with pytest.raises(BlendError, match=words):
            check_blend(mode, card, overlap_px)


# --- strides ------------------------------------------------------------------------------------


class Strided(nn.Module):
    """Has maps of a half, a quarter and an eighth, and enlarges the last to the size of the input, as DeepLab does."""

    def __init__(self, *, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.layers = nn.ModuleList(nn.Conv2d(c, 8, 3, stride=2, padding=1) for c in (3, 8, 8))
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = torch.relu(layer(y))
        y = 40 * self.out(y)
        return functional.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=self.align_corners)


class Unpadded(nn.Module):
    """Has convolutions without padding around a pooled map, as the first U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 2, 2)
        self.three = nn.Conv2d(16, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.one(x))
        y = self.up(torch.relu(self.two(functional.max_pool2d(skip, 2))))
        rim = (skip.shape[-1] - y.shape[-1]) // 2
        out: Tensor = self.three(torch.cat([skip[..., rim:-rim, rim:-rim], y], dim=1))
        return 40 * out


def exported(network: nn.Module, path: Path, side: int, *, free: bool = False) -> Path:
    axes = {"x": {2: "h", 3: "w"}} if free else None
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.zeros(1, 3, side, side),),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            dynamic_axes=axes,
        )
    return path


def test_a_side_that_is_no_multiple_of_the_strides_gets_tiles_that_are(tmp_path: Path) -> None:
    """161 = 8 * 20 + 1, as 513 = 16 * 32 + 1: the last row and column are repeated to give what the network takes."""
    path = exported(Strided(align_corners=True), tmp_path / "net.onnx", 161)
    wrapped = wrap(path, ExternalModel(ABC))
    assert (wrapped.source.side, wrapped.source.tile_px) == (161, 160)
    assert any("160 px; the last row and column are repeated" in line for line in wrapped.decisions)
    tiles = noise(160)
    extended = np.pad(tiles, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    expected = output(path, nchw(extended)).argmax(axis=1)[:, :160, :160]
    assert (labels(wrapped, tiles) == expected).mean() >= 0.9999


@pytest.mark.parametrize("side", [100, 102])
def test_the_output_of_unpadded_convolutions_is_laid_in_the_middle(tmp_path: Path, side: int) -> None:
    path = exported(Unpadded(), tmp_path / "net.onnx", side)
    with pytest.raises(DescriptionError, match=r"pass --resize-output .* or --crop-output if it is the tile's centre"):
        wrap(path, ExternalModel(ABC))
    wrapped = wrap(path, ExternalModel(ABC, crop_output=True))
    tiles = noise(wrapped.source.tile_px)
    expected = output(path, nchw(tiles[:, :side, :side])).argmax(axis=1)
    border = (side - expected.shape[1]) // 2
    found = labels(wrapped, tiles)[:, border : border + expected.shape[1], border : border + expected.shape[2]]
    assert (found == expected).mean() >= 0.9999
    assert wrapped.border_px >= border


def test_an_unpadded_network_of_a_side_that_is_no_multiple_of_its_strides_gets_larger_tiles(tmp_path: Path) -> None:
    """102 px become 25 positions of 4 px after a convolution that takes a pixel off; as 572 px of the first U-Net."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(4), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 4))
    path = exported(network, tmp_path / "net.onnx", 102)
    wrapped = wrap(path, ExternalModel(ABC, crop_output=True, activation="softmax"))
    assert (wrapped.source.tile_px, wrapped.border_px) == (104, 3)
    tiles = noise(104)
    expected = output(path, nchw(tiles[:, :102, :102])).argmax(axis=1)
    assert (labels(wrapped, tiles)[:, 1:101, 1:101] == expected).mean() >= 0.9999


def test_a_free_side_that_the_network_does_not_take_gets_one_that_it_takes(tmp_path: Path) -> None:
    """An unpadded network takes even sides only; the size that the message names works."""
    path = exported(Unpadded(), tmp_path / "net.onnx", 100, free=True)
    with pytest.raises(GraphError, match=r"does not take 101 x 101 pixels .*pass --tile (\d+)$") as caught:
        wrap(path, ExternalModel(ABC, 101, crop_output=True))
    tile_px = int(str(caught.value).rpartition(" ")[2])
    wrap(path, ExternalModel(ABC, tile_px, crop_output=True))

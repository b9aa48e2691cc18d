from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

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
from histostream.export.graph.model import GraphError, check_graph
from histostream.wsi.synthetic import SyntheticSlide
from tests.export.external.graphs import convolution, graph_file

SIDE = 64
THREE = ("glass", "stroma", "tumour")
TWO = ("background", "nucleus")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters, whose warnings are not ours."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def wrap(path: Path, options: ExternalModel) -> WrappedModel:
    return wrap_graph(path, options, mpp=0.5)


def tissue(side: int, channels: int = 3) -> NDArray[np.uint8]:
    """Three tiles of the synthetic slide, (3, side, side, channels)."""
    slide = SyntheticSlide(8 * side, 8 * side, mpp=0.5, seed=0)
    tiles = np.stack([slide.region(n * side, n * side, side, side)[0] for n in (2, 3, 5)])
    return tiles[..., :channels]


def run(wrapped: WrappedModel, tiles: NDArray[np.uint8]) -> NDArray[np.float16]:
    session = onnxruntime.InferenceSession(wrapped.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {"tiles": tiles})
    found: NDArray[np.float16] = scores
    return found


def assert_the_laws_hold(wrapped: WrappedModel) -> NDArray[np.float16]:
    """Contract, the labels of the file as it came, and independence of the batch."""
    source, classes = wrapped.source, wrapped.scoring.classes
    tiles = tissue(source.tile_px, source.channels)
    check_graph(wrapped.model)
    initializers = {tensor.name for tensor in wrapped.model.graph.initializer}
    assert initializers <= {name for node in wrapped.model.graph.node for name in node.input}
    nodes = wrapped.model.graph.node
    assert nodes[0].op_type == nodes[-1].op_type == "Cast"  # uint8 only beside a cast
    assert len({n.name for n in nodes}) == len(nodes)
    (first,), (result,) = wrapped.model.graph.input, wrapped.model.graph.output
    for value, name, element, shape in (
        (first, "tiles", TensorProto.UINT8, [source.tile_px, source.tile_px, source.channels]),
        (result, "scores", TensorProto.FLOAT16, [len(classes), source.tile_px, source.tile_px]),
    ):
        kind = value.type.tensor_type
        assert (value.name, kind.elem_type) == (name, element)
        assert kind.shape.dim[0].dim_param
        assert [d.dim_value for d in kind.shape.dim][1:] == shape
    found, wanted = run(wrapped, tiles), wrapped.reference(tiles)
    assert found.shape == wanted.shape == (3, *shape)
    assert found.dtype == np.float16
    assert wanted.dtype == np.float32
    assert np.ptp(wanted, axis=(0, 2, 3)).max() > 0.04  # a network that does something
    assert np.abs(found - wanted).max() <= 1 / 255
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() >= 0.9999
    alone = np.concatenate([run(wrapped, tile[None]) for tile in tiles])
    np.testing.assert_allclose(found, alone, atol=1 / 1024)
    return found


# --- networks of MONAI, exported by MONAI -------------------------------------------------------


def monai_unet() -> nn.Module:
    from monai.networks.nets.unet import UNet

    network: nn.Module = UNet(
        spatial_dims=2, in_channels=3, out_channels=3, channels=(8, 16, 32), strides=(2, 2), num_res_units=1
    )
    return network


def monai_basic_unet() -> nn.Module:
    from monai.networks.nets.basic_unet import BasicUNet

    network: nn.Module = BasicUNet(
        spatial_dims=2, in_channels=3, out_channels=3, features=(8, 8, 16, 16, 32, 8), dropout=0.1
    )
    return network


def by_monai(net: nn.Module, path: Path, **options: Any) -> None:
    """Export as MONAI's documentation says; torch's newest exporter is its default."""
    with quiet():
        from monai.networks.utils import convert_to_onnx

        convert_to_onnx(net, [torch.zeros(1, 3, SIDE, SIDE)], filename=str(path), **options)


@pytest.fixture(scope="module")
def unet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return MONAI's U-Net in ONNX, weights beside it, opset 20, batch fixed at 1."""
    torch.manual_seed(0)
    with quiet():
        net = monai_unet()
    path = tmp_path_factory.mktemp("monai") / "unet.onnx"
    by_monai(net, path)
    return path


def test_a_unet_that_monai_exports_is_wrapped(unet_file: Path) -> None:
    assert unet_file.with_name("unet.onnx.data").exists()
    wrapped = wrap(unet_file, ExternalModel(THREE, SIDE, MEAN, STD))
    assert (wrapped.source.layout, wrapped.scoring.activation) == ("nchw", "softmax")
    kinds = [node.op_type for node in wrapped.model.graph.node]
    assert kinds[:4] == ["Cast", "Transpose", "Mul", "Add"]
    assert kinds[-3:] == ["Where", "Clip", "Cast"]
    names = {node.name for node in onnx.load(unet_file, load_external_data=False).graph.node}
    assert names <= {node.name for node in wrapped.model.graph.node}
    assert not any(t.external_data for t in wrapped.model.graph.initializer)
    assert str(Path(torch.__file__).parents[2]) not in str(wrapped.model)
    scores = assert_the_laws_hold(wrapped)
    assert np.abs(scores.sum(axis=1, dtype=float) - 1).max() <= 0.005


def test_the_reference_is_monai_s_network_on_normalised_pixels(unet_file: Path) -> None:
    torch.manual_seed(0)
    with quiet():
        net = monai_unet().eval()
    wrapped = wrap(unet_file, ExternalModel(THREE, SIDE, MEAN, STD))
    tiles = tissue(SIDE)
    x = torch.from_numpy(tiles).float().permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        p = torch.softmax(net(x), dim=1).numpy()
    np.testing.assert_allclose(wrapped.reference(tiles), p, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("dynamo", [True, False])
def test_monai_s_basic_unet_is_wrapped_from_either_exporter(tmp_path: Path, dynamo: bool) -> None:
    torch.manual_seed(0)
    with quiet():
        net = monai_basic_unet()
    by_monai(net, tmp_path / "net.onnx", dynamo=dynamo)
    assert_the_laws_hold(wrap(tmp_path / "net.onnx", ExternalModel(THREE, SIDE)))


# --- networks with a fixed batch, old operator sets, other endings -------------------------------


class Small(nn.Module):
    """Has what exporters write a fixed batch into: group norm, reshapes, resizing to a size."""

    def __init__(self, channels: int = 3, classes: int = 3, ending: str = "logits") -> None:
        super().__init__()
        self.ending = ending
        self.one = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(8 + channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.one(x)))
        n, c, h, w = y.shape
        gate = torch.sigmoid(y.reshape(n, c, h * w).mean(-1)).reshape(n, c, 1, 1)
        y = self.two(y * gate)
        y = functional.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
        y = 6 * cast(Tensor, self.out(torch.cat([x, y], dim=1)))
        if self.ending == "softmax":
            return torch.softmax(y, dim=1)
        if self.ending == "sigmoid":
            return torch.sigmoid(y)
        if self.ending == "quarter":
            return functional.avg_pool2d(y, 4)
        return y


def export(net: nn.Module, path: Path, **options: Any) -> Path:
    example = torch.zeros(options.pop("shape", (1, 3, SIDE, SIDE)))
    with quiet():
        torch.onnx.export(net.eval(), (example,), path, **options)
    return path


@pytest.mark.parametrize(("dynamo", "opset"), [(False, 11), (False, 13), (False, 17), (True, 18), (True, 20)])
def test_a_fixed_batch_becomes_free(tmp_path: Path, dynamo: bool, opset: int) -> None:
    torch.manual_seed(1)
    path = export(Small(), tmp_path / "net.onnx", dynamo=dynamo, opset_version=opset)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    wrapped = wrap(path, ExternalModel(THREE, SIDE))
    assert wrapped.opset == max(opset, 18)
    assert wrapped.changes
    assert_the_laws_hold(wrapped)


def test_a_fixed_batch_of_several_becomes_free(tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = export(Small(), tmp_path / "net.onnx", dynamo=False, opset_version=17, shape=(4, 3, SIDE, SIDE))
    assert_the_laws_hold(wrap(path, ExternalModel(THREE, SIDE)))


def test_free_sides_become_those_of_the_tile(tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = export(
        Small(),
        tmp_path / "net.onnx",
        dynamo=False,
        opset_version=17,
        input_names=["x"],
        dynamic_axes={"x": {0: "n", 2: "h", 3: "w"}},
    )
    wrapped = wrap(path, ExternalModel(THREE, 48))
    assert_the_laws_hold(wrapped)


@pytest.mark.parametrize("ending", ["softmax", "sigmoid"])
def test_probabilities_are_recognised(tmp_path: Path, ending: str) -> None:
    torch.manual_seed(2)
    path = export(Small(ending=ending), tmp_path / "net.onnx", dynamo=True)
    wrapped = wrap(path, ExternalModel(THREE, SIDE))
    assert wrapped.scoring.activation == "none"
    assert_the_laws_hold(wrapped)
    same = wrap(path, ExternalModel(THREE, SIDE, activation="none"))
    tiles = tissue(SIDE)
    np.testing.assert_array_equal(run(wrapped, tiles), run(same, tiles))


@pytest.mark.parametrize("ending", ["logits", "sigmoid"])
def test_one_output_channel_becomes_two_classes(tmp_path: Path, ending: str) -> None:
    torch.manual_seed(3)
    path = export(Small(classes=1, ending=ending), tmp_path / "net.onnx", dynamo=True)
    wrapped = wrap(path, ExternalModel(TWO, SIDE))
    assert wrapped.scoring.activation == ("sigmoid" if ending == "logits" else "none")
    scores = assert_the_laws_hold(wrapped)
    assert np.abs(scores.sum(axis=1, dtype=float) - 1).max() <= 0.005


def test_grey_tiles_fit_a_network_of_one_channel(tmp_path: Path) -> None:
    torch.manual_seed(4)
    path = export(Small(channels=1), tmp_path / "net.onnx", shape=(1, 1, SIDE, SIDE), dynamo=False)
    assert_the_laws_hold(wrap(path, ExternalModel(THREE, SIDE, mean=(0.5,), std=(0.2,))))


def test_an_output_of_lower_resolution_is_interpolated_only_when_asked(tmp_path: Path) -> None:
    torch.manual_seed(5)
    path = export(Small(ending="quarter"), tmp_path / "net.onnx", dynamo=True)
    with pytest.raises(GraphError, match=r"16 x 16 pixels for a tile of 64 x 64: pass --resize"):
        wrap(path, ExternalModel(THREE, SIDE))
    wrapped = wrap(path, ExternalModel(THREE, SIDE, resize_output=True))
    assert_the_laws_hold(wrapped)
    # As torch interpolates, so the half-pixel convention is the usual one.
    tiles = tissue(SIDE)
    torch.manual_seed(5)
    with torch.no_grad():
        x = torch.from_numpy(tiles).float().permute(0, 3, 1, 2) / 255
        y = Small(ending="quarter")(x)
        y = functional.interpolate(y, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        p = torch.softmax(y, dim=1).numpy()
    np.testing.assert_allclose(wrapped.reference(tiles), p, atol=1e-4)


# --- graphs made by hand ------------------------------------------------------------------------


def simple(path: Path, *, kind: int = TensorProto.FLOAT, batch: Any = "n", **model: Any) -> Path:
    """Write one convolution of three classes, NCHW."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1, 1, 1, 1])
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    shape = [batch, 3, "h", "w"]
    return graph_file(path, [node], {"w": convolution(dtype)}, ("x", kind, shape), [("y", kind, shape)], **model)


def test_a_network_of_keras_is_wrapped_channels_last(tmp_path: Path) -> None:
    """Keras graphs keep NHWC outside, and transpose around each convolution."""
    weights = {"w": convolution(), "b": np.array([0.5, 0.0, -0.5], np.float32)}
    nodes = [
        helper.make_node("Transpose", ["input_1"], ["nchw"], name="t1", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "w", "b"], ["conv"], name="conv2d", pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["conv"], ["nhwc"], name="t2", perm=[0, 2, 3, 1]),
        helper.make_node("Softmax", ["nhwc"], ["softmax"], name="softmax", axis=-1),
    ]
    shape = ["batch", SIDE, SIDE, 3]
    path = graph_file(
        tmp_path / "keras.onnx",
        nodes,
        weights,
        ("input_1", TensorProto.FLOAT, shape),
        [("softmax", TensorProto.FLOAT, shape)],
    )
    wrapped = wrap(path, ExternalModel(THREE, SIDE, mean=(0.5,) * 3, std=(0.5,) * 3))
    assert (wrapped.source.layout, wrapped.scoring.activation) == ("nhwc", "none")
    kinds = [node.op_type for node in wrapped.model.graph.node]
    assert kinds[:3] == ["Cast", "Mul", "Add"]
    assert_the_laws_hold(wrapped)


def test_half_precision_is_cast_at_both_ends(tmp_path: Path) -> None:
    path = simple(tmp_path / "net.onnx", kind=TensorProto.FLOAT16)
    wrapped = wrap(path, ExternalModel(THREE, SIDE))
    before = [node.op_type for node in wrapped.model.graph.node]
    assert before[:6] == ["Cast", "Transpose", "Mul", "Add", "Cast", "Conv"]
    assert_the_laws_hold(wrapped)


def test_bgr_is_rgb_reversed(tmp_path: Path) -> None:
    path = simple(tmp_path / "net.onnx")
    options = ExternalModel(THREE, SIDE, mean=(103.5, 116.3, 123.7), std=(57, 57, 58), scale=1.0)
    swapped = wrap(path, replace(options, order="bgr"))
    assert_the_laws_hold(swapped)
    tiles = tissue(SIDE)
    plain = wrap(path, options)
    np.testing.assert_array_equal(run(swapped, tiles), run(plain, np.ascontiguousarray(tiles[..., ::-1])))
    assert (run(swapped, tiles) != run(plain, tiles)).any()


def test_names_of_the_contract_may_be_in_use(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["scores", "w"], ["histostream/in/cast"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["histostream/in/cast"], ["tiles"], name="histostream/in/cast"),
    ]
    shape = ["n", 3, SIDE, SIDE]
    path = graph_file(
        tmp_path / "net.onnx",
        nodes,
        {"w": convolution()},
        ("scores", TensorProto.FLOAT, shape),
        [("tiles", TensorProto.FLOAT, shape)],
    )
    assert_the_laws_hold(wrap(path, ExternalModel(THREE, SIDE)))


def test_of_several_outputs_one_is_asked_for(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["main"], pads=[1, 1, 1, 1]),
        helper.make_node("Neg", ["main"], ["aux"]),
    ]
    shape = ["n", 3, SIDE, SIDE]
    path = graph_file(
        tmp_path / "net.onnx",
        nodes,
        {"w": convolution()},
        ("x", TensorProto.FLOAT, shape),
        [("main", TensorProto.FLOAT, shape), ("aux", TensorProto.FLOAT, shape)],
    )
    options = ExternalModel(THREE, SIDE)
    with pytest.raises(GraphError, match="has 2 outputs: pass --output 'main' or 'aux'"):
        wrap(path, options)
    with pytest.raises(GraphError, match="no output 'mian'; it has 'main' or 'aux'"):
        wrap(path, replace(options, output_name="mian"))
    wrapped = wrap(path, replace(options, output_name="main"))
    assert "Neg" not in {node.op_type for node in wrapped.model.graph.node}
    assert_the_laws_hold(wrapped)


def test_a_dropout_that_does_nothing_is_no_hindrance(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Dropout", ["x"], ["kept"], name="drop"),
        helper.make_node("Conv", ["kept", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    shape = ["n", 3, SIDE, SIDE]
    path = graph_file(
        tmp_path / "net.onnx",
        nodes,
        {"w": convolution()},
        ("x", TensorProto.FLOAT, shape),
        [("y", TensorProto.FLOAT, shape)],
    )
    assert_the_laws_hold(wrap(path, ExternalModel(THREE, SIDE)))


def with_function(path: Path, body: list[onnx.NodeProto], *more: onnx.FunctionProto) -> Path:
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 18), ("mine", 1), ("evil.ops", 1))]
    function = helper.make_function("mine", "Block", ["a", "b"], ["c"], body, opsets)
    node = helper.make_node("Block", ["x", "w"], ["y"], name="block", domain="mine")
    shape = ["n", 3, SIDE, SIDE]
    return graph_file(
        path,
        [node],
        {"w": convolution()},
        ("x", TensorProto.FLOAT, shape),
        [("y", TensorProto.FLOAT, shape)],
        opset_imports=opsets,
        functions=[function, *more],
    )


def test_local_functions_are_written_out(tmp_path: Path) -> None:
    body = [helper.make_node("Conv", ["a", "b"], ["c"], pads=[1, 1, 1, 1])]
    wrapped = wrap(with_function(tmp_path / "net.onnx", body), ExternalModel(THREE, SIDE))
    assert not wrapped.model.functions
    assert_the_laws_hold(wrapped)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"classes": ("one", "one")}, "not different names"),
        ({"classes": tuple(map(str, range(255)))}, "not at most 254 names"),
        ({"tile_px": 0}, "tile_px=0 is not a positive number"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5, 0.5)}, "have different numbers of channels: pass one number"),
        ({"mean": (float("nan"),) * 3}, "not a number for each channel"),
        ({"std": (0.5, 0.0, 0.5)}, "not a positive number for each channel"),
        ({"scale": 0.0}, "scale=0.0 is not"),
        ({"layout": "NCHW"}, "layout='NCHW' is not one of"),
        ({"activation": "relu"}, "activation='relu' is not one of"),
        ({"order": "gbr"}, "order='gbr' is not one of"),
        ({"order": "bgr", "mean": (0.5, 0.5)}, "needs 3 channels"),
        ({"resize_output": True, "crop_output": True}, "exclude each other"),
        ({"threshold": 1.0}, r"threshold=1\.0 is not between 0\.001 and 0\.999"),
        ({"background_below": -0.5}, "background_below=-0.5 is not between"),
        ({"background_below": 0.5, "threshold": 0.5}, "for two classes, --background-below for more"),
        ({"background": "glas"}, "--background 'glas' is none of the classes glass, stroma, tumour"),
        ({"colors": ((0, 0, 0),)}, "1 colours for 3 classes"),
    ],
)
def test_options_that_cannot_be_are_refused(said: dict[str, Any], words: str) -> None:
    with pytest.raises(DescriptionError, match=words) as caught:
        ExternalModel(**{"classes": THREE, "tile_px": SIDE, **said})
    assert caught.value.exit_status == 2  # a wrong call, not a refused file


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"classes": (*THREE, "fat")}, r"3 channels; 4 classes were named"),
        ({"mean": (0.5, 0.5)}, r"has 3 channels, --mean, --std or --channel-names 2"),
        ({"tile_px": 96}, r"takes 64 x 64 pixels, not 96 x 96; pass --tile 64"),
        ({"layout": "nhwc"}, r"takes 3 x 64 pixels, and tiles are square"),
        ({"activation": "none"}, r"so it is not probabilities: pass --activation softmax"),
        ({"input_name": "image"}, r"no input 'image'; it has 'x'"),
    ],
)
def test_options_that_do_not_fit_the_network_are_refused(unet_file: Path, said: dict[str, Any], words: str) -> None:
    with pytest.raises(GraphError, match=words) as caught:
        wrap(unet_file, ExternalModel(**{"classes": THREE, "tile_px": SIDE, **said}))
    assert "\n" not in str(caught.value)


def test_a_tile_that_the_pooling_does_not_divide_gets_a_hint(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["half"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Resize", ["half", "", "twice"], ["full"], mode="nearest"),
        helper.make_node("Add", ["x", "full"], ["y"], name="skip"),
    ]
    shape = ["n", 3, "h", "w"]
    path = graph_file(
        tmp_path / "net.onnx",
        nodes,
        {"twice": np.array([1, 1, 2, 2], np.float32)},
        ("x", TensorProto.FLOAT, shape),
        [("y", TensorProto.FLOAT, shape)],
    )
    with pytest.raises(GraphError, match=r"not take 75 x 75 pixels .*skip.*pass --tile 96$"):
        wrap(path, ExternalModel(THREE, 75))
    wrap(path, ExternalModel(THREE, 96))


def one_node(path: Path, kind: str, shape: list[Any], **attributes: Any) -> Path:
    node = helper.make_node(kind, ["x"], ["y"], name="odd", **attributes)
    source = ("x", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])
    return graph_file(path, [node], {}, source, [("y", TensorProto.FLOAT, shape)])


@pytest.mark.parametrize(
    ("kind", "shape", "attributes", "words"),
    [
        ("Flatten", ["n", 3 * SIDE * SIDE], {}, r"output 'y' is \(2, 12288\)"),
        ("RandomNormalLike", ["n", 3, SIDE, SIDE], {}, "'odd' is a RandomNormalLike"),
    ],
)
def test_networks_that_do_not_give_scores_are_refused(
    tmp_path: Path, kind: str, shape: list[Any], attributes: dict[str, Any], words: str
) -> None:
    path = one_node(tmp_path / "net.onnx", kind, shape, **attributes)
    with pytest.raises(GraphError, match=words):
        wrap(path, ExternalModel(THREE, SIDE))


def test_a_network_that_mixes_the_tiles_of_a_batch_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], name="over_the_batch"),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    shape = ["n", 3, SIDE, SIDE]
    path = graph_file(
        tmp_path / "net.onnx",
        nodes,
        {"axes": np.array([0])},
        ("x", TensorProto.FLOAT, shape),
        [("y", TensorProto.FLOAT, shape)],
    )
    with pytest.raises(GraphError, match="two tiles together score unlike each alone"):
        wrap(path, ExternalModel(THREE, SIDE))


def test_a_reshape_that_holds_on_to_the_batch_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[2, 0, 1, 3]),
        helper.make_node("Reshape", ["t", "flat"], ["f"], name="stubborn"),
        helper.make_node("Reshape", ["f", "back"], ["u"]),
        helper.make_node("Transpose", ["u"], ["y"], perm=[1, 2, 0, 3]),
    ]
    weights = {"flat": np.array([SIDE, 3, SIDE]), "back": np.array([SIDE, 1, 3, SIDE])}
    shape = [1, 3, SIDE, SIDE]
    path = graph_file(
        tmp_path / "net.onnx", nodes, weights, ("x", TensorProto.FLOAT, shape), [("y", TensorProto.FLOAT, shape)]
    )
    with pytest.raises(GraphError, match=r"batch of 2 tiles fails .*stubborn.*dynamic batch"):
        wrap(path, ExternalModel(THREE, SIDE))


# --- files that mean harm -----------------------------------------------------------------------


def test_operators_outside_the_standard_are_named(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("evil.ops", 1)]
    node = helper.make_node("Shell", ["x"], ["y"], name="payload", domain="evil.ops")
    shape = ["n", 3, SIDE, SIDE]
    path = graph_file(
        tmp_path / "net.onnx",
        [node],
        {},
        ("x", TensorProto.FLOAT, shape),
        [("y", TensorProto.FLOAT, shape)],
        opset_imports=opsets,
    )
    with pytest.raises(GraphError, match=r"'payload' is a Shell of 'evil\.ops', not an operator"):
        wrap(path, ExternalModel(THREE, SIDE))
    inside = [helper.make_node("Shell", ["a"], ["c"], name="hidden", domain="evil.ops")]
    with pytest.raises(GraphError, match=r"'hidden' is a Shell of 'evil\.ops'"):
        wrap(with_function(tmp_path / "f.onnx", inside), ExternalModel(THREE, SIDE))


def test_functions_that_multiply_are_refused_before_they_are_written_out(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]

    def tenfold(name: str, inner: str, domain: str) -> onnx.FunctionProto:
        body = [helper.make_node(inner, [f"v{i}"], [f"v{i + 1}"], domain=domain) for i in range(10)]
        return helper.make_function("mine", name, ["v0"], ["v10"], body, opsets)

    levels = [tenfold("F0", "Relu", "")]
    levels += [tenfold(f"F{i}", f"F{i - 1}", "mine") for i in range(1, 12)]
    body = [helper.make_node("F11", ["a"], ["c"], domain="mine")]
    path = with_function(tmp_path / "net.onnx", body, *levels)
    with pytest.raises(GraphError, match="too many to be a network"):
        wrap(path, ExternalModel(THREE, SIDE))


def test_control_flow_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "b", [], [value])
    node = helper.make_node("If", ["c"], ["y"], name="maybe", then_branch=branch, else_branch=branch)
    shape = ["n", 3, SIDE, SIDE]
    path = graph_file(
        tmp_path / "net.onnx",
        [node],
        {"c": np.array([True])},
        ("x", TensorProto.FLOAT, shape),
        [("y", TensorProto.FLOAT, shape)],
    )
    with pytest.raises(GraphError, match="'maybe' is a If: not in a deployed graph"):
        wrap(path, ExternalModel(THREE, SIDE))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Return a file whose weights lie in ``secret.bin``, in the folder above."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(convolution().tobytes())
    return simple(folder / "net.onnx")


def point_to(path: Path, location: str, **entries: str) -> Path:
    """Move the weights of a file to another one."""
    model = onnx.load(path, load_external_data=False)
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret.bin", "x/../../secret.bin", "{}", "link", "", "."])
def test_weights_outside_the_folder_are_never_read(outside: Path, location: str) -> None:
    secret = outside.parents[2] / "secret.bin"
    (outside.parent / "link").symlink_to(secret)
    path = point_to(outside, location.format(secret))
    with pytest.raises(GraphError, match=r"only files beside the model are read|is missing"):
        wrap(path, ExternalModel(THREE, SIDE))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"length": "99999999999"}, "damaged"),
        ({"offset": "-1"}, "damaged"),
        ({"length": "8"}, "damaged|cannot load"),
    ],
)
def test_wrong_extents_of_weights_are_refused(outside: Path, entries: dict[str, str], words: str) -> None:
    (outside.parent / "w.bin").write_bytes(convolution().tobytes())
    assert_the_laws_hold(wrap(point_to(outside, "w.bin"), ExternalModel(THREE, SIDE)))
    path = point_to(simple(outside), "w.bin", **entries)
    with pytest.raises(GraphError, match=words):
        wrap(path, ExternalModel(THREE, SIDE))


def test_weights_outside_in_the_constant_of_a_function_are_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    entry = onnx.StringStringEntryProto(key="location", value="../../../etc/passwd")
    tensor.external_data.append(entry)
    body = [
        helper.make_node("Constant", [], ["k"], value=tensor),
        helper.make_node("Add", ["a", "k"], ["c"]),
    ]
    path = with_function(tmp_path / "net.onnx", body)
    with pytest.raises(GraphError, match="only files beside the model are read"):
        wrap(path, ExternalModel(THREE, SIDE))


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: good[: len(good) // 2],
        lambda good: good[:-1],
        lambda good: b"",
        lambda good: b"PK\x03\x04" + good,
        lambda good: b"\x80\x04\x95not a pickle either.",
        lambda good: good.replace(b"conv", b"\xff\xfe\xfd\xfc"),
        lambda good: good[:40] + struct.pack("<Q", 2**63 - 1) + good[48:],
    ],
    ids=["half", "one byte short", "empty", "zip", "pickle", "no text", "garbled"],
)
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = simple(tmp_path / "net.onnx")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(GraphError, match=r"net.onnx") as caught:
        wrap(path, ExternalModel(THREE, SIDE))
    assert "\n" not in str(caught.value)


def test_whatever_bytes_change_nothing_but_a_clear_line_comes_out(tmp_path: Path) -> None:
    good = with_function(
        tmp_path / "net.onnx", [helper.make_node("Conv", ["a", "b"], ["c"], pads=[1, 1, 1, 1])]
    ).read_bytes()
    random = np.random.default_rng(0)
    said = []
    for _ in range(300):
        bad = bytearray(good)
        place, kind = int(random.integers(len(bad))), random.integers(3)
        noise = random.integers(0, 256, random.integers(1, 5), dtype=np.uint8).tobytes()
        bad[place : place + (0, 1, len(noise))[kind]] = noise if kind < 2 else b""
        (tmp_path / "net.onnx").write_bytes(bad)
        try:
            wrap(tmp_path / "net.onnx", ExternalModel(THREE, SIDE))
        except GraphError as error:
            said.append(str(error))
    assert len(said) > 200
    assert not any("\n" in line for line in said)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="cannot be read"):
        wrap(tmp_path / "nowhere.onnx", ExternalModel(THREE, SIDE))
    assert not list(tmp_path.iterdir())

"""Networks of the kinds that people bring, from the file to the label map, against ONNX Runtime on the same pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tifffile
from numpy.typing import NDArray
from onnx import TensorProto, helper

from histostream.export.cli import main as export_main
from histostream.runtime.cli import main as infer_main
from histostream.wsi.synthetic import SyntheticSlide
from tests.commands import call
from tests.export.external.graphs import graph_file

WIDTH, HEIGHT = 330, 290
FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8
Array = NDArray[Any]
node = helper.make_node


@dataclass(frozen=True)
class Case:
    """A network, how it is wrapped, and how a user would make labels of its output.

    Attributes
    ----------
    write
        Writes the file.
    classes
        As passed; names of the label map follow from them.
    labels
        Maps the output (N, ...) for tiles to labels (N, H, W).
    options
        Further options of the command.
    side
        Side of the network's input.
    border
        Pixels at each side of the input that the output does not cover.
    feed
        Maps tiles (N, H, W, 3) uint8 to the network's input.
    """

    write: Callable[[Path], Path]
    classes: str
    labels: Callable[[Array], Array]
    options: tuple[str, ...] = ()
    side: int = 96
    border: int = 0
    feed: Callable[[Array], Array] = field(default=lambda tiles: (tiles / 255).astype(np.float32).transpose(0, 3, 1, 2))


def blurred(*per_channel: tuple[float, float, float]) -> Array:
    """Return the weights of 3 x 3 convolutions that average, times a factor for each colour."""
    kernel = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    return np.array([[kernel * colour for colour in colours] for colours in per_channel], np.float32)


def logits(weights: str = "w", bias: str = "b", out: str = "l") -> Any:
    return node("Conv", ["x", weights, bias], [out], pads=[1, 1, 1, 1])


def write(path: Path, nodes: list[Any], weights: dict[str, Any], k: int, side: int = 96, **model: Any) -> Path:
    shapes = ["N", 3, side, side], ["N", k, side, side]
    return graph_file(path, nodes, weights, ("x", FLOAT, shapes[0]), [("y", FLOAT, shapes[1])], **model)


DARK = blurred((-3, -3, -3))
COLOURS = blurred((-6, 0, 3), (3, -5, 3), (-4, -4, -4))
BIASES = np.array([0.517, -2.031, 6.113], np.float32)  # not round, or rounding would decide on ties of 8-bit pixels


def ensemble(path: Path) -> Path:
    """Write the mean of three sigmoids: probabilities that do not end in a Sigmoid."""
    weights = {"w": DARK, "b": np.array([5.013], np.float32), "one": np.float32(1), "third": np.float32(1 / 3)}
    nodes = [
        logits(),
        node("Sigmoid", ["l"], ["s0"]),
        node("Add", ["l", "one"], ["l1"]),
        node("Sub", ["l", "one"], ["l2"]),
    ]
    nodes += [node("Sigmoid", ["l1"], ["s1"]), node("Sigmoid", ["l2"], ["s2"]), node("Sum", ["s0", "s1", "s2"], ["s"])]
    return write(path, [*nodes, node("Mul", ["s", "third"], ["y"])], weights, 1)


def clamped(path: Path) -> Path:
    """Write a sigmoid that is kept away from 0 and 1, as for a logarithm."""
    weights = {"w": DARK, "b": np.array([5.013], np.float32), "low": np.float32(0.02), "high": np.float32(0.98)}
    nodes = [logits(), node("Sigmoid", ["l"], ["s"]), node("Clip", ["s", "low", "high"], ["y"])]
    return write(path, nodes, weights, 1)


def independent(path: Path) -> Path:
    """Write three sigmoids, none of them of the background: glass is in no class."""
    weights = {"w": COLOURS, "b": BIASES}
    return write(path, [logits(), node("Sigmoid", ["l"], ["y"])], weights, 3)


def close_classes(path: Path) -> Path:
    """Write twelve classes whose probabilities lie within a few hundredths."""
    weights = {"w": np.random.default_rng(7).normal(size=(12, 3, 5, 5)).astype(np.float32) * 0.02}
    nodes = [node("Conv", ["x", "w"], ["l"], pads=[2, 2, 2, 2]), node("Softmax", ["l"], ["y"], axis=1)]
    return write(path, nodes, weights, 12, side=64)


def arg_max(path: Path) -> Path:
    """Write labels, int64 (N, H, W)."""
    nodes = [logits(), node("ArgMax", ["l"], ["y"], axis=1, keepdims=0)]
    results = [("y", TensorProto.INT64, ["N", 96, 96])]
    weights = {"w": COLOURS, "b": BIASES}
    return graph_file(path, nodes, weights, ("x", FLOAT, ["N", 3, 96, 96]), results)


def unpadded(path: Path) -> Path:
    """Write convolutions without padding around a pooled map: 92 px of 100, as in the first U-Net."""
    each = np.eye(3, dtype=np.float32)[..., None, None]
    box, twice = each * np.full((3, 3), 1 / 9, np.float32), each * np.ones((2, 2), np.float32)
    weights = {"w": COLOURS, "b": np.array([0.5, -2, 8.5], np.float32) + BIASES / 100, "box": box, "up": twice}
    nodes = [
        node("Conv", ["x", "w", "b"], ["l"]),
        node("AveragePool", ["l"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "box"], ["q"]),
        node("ConvTranspose", ["q", "up"], ["u"], strides=[2, 2]),
        node("Conv", ["u", "box"], ["y"]),
    ]
    shapes = ["N", 3, 100, 100], ["N", 3, 92, 92]
    return graph_file(path, nodes, weights, ("x", FLOAT, shapes[0]), [("y", FLOAT, shapes[1])])


def of_bytes(path: Path) -> Path:
    """Write a network that takes uint8 (N, H, W, C), as exported for a web service, and normalises it itself."""
    weights = {"w": COLOURS, "b": BIASES, "full": np.float32(255)}
    nodes = [
        node("Transpose", ["image"], ["t"], perm=[0, 3, 1, 2]),
        node("Cast", ["t"], ["f"], to=FLOAT),
        node("Div", ["f", "full"], ["x"]),
        logits(out="y"),
    ]
    shapes = ["N", 96, 96, 3], ["N", 3, 96, 96]
    return graph_file(path, nodes, weights, ("image", UINT8, shapes[0]), [("y", FLOAT, shapes[1])])


def enlarged_as_before(path: Path) -> Path:
    """Write an Upsample of operator set 9, whose coordinates are those of no Resize by default."""
    weights = {"w": COLOURS, "b": BIASES, "s": np.array([1, 1, 2, 2], np.float32)}
    nodes = [
        node("Conv", ["x", "w", "b"], ["l"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Upsample", ["l", "s"], ["y"], mode="linear"),
    ]
    return write(path, nodes, weights, 3, opset_imports=[helper.make_opsetid("", 9)])


def best(y: Array) -> Array:
    labels: Array = y.argmax(axis=1)
    return labels


def reached(y: Array) -> Array:
    return (y[:, 0] >= 0.5).astype(int)


def best_above_half(y: Array) -> Array:
    return np.where((y < 0.5).all(axis=1), 0, 1 + y.argmax(axis=1))


CASES = {
    "mean of sigmoids": Case(ensemble, "background,nucleus", reached),
    "clamped sigmoid": Case(clamped, "background,nucleus", reached),
    "one named class": Case(clamped, "nucleus", reached),
    "threshold": Case(clamped, "rest,nucleus", lambda y: (y[:, 0] >= 0.2).astype(int), ("--threshold", "0.2")),
    "independent sigmoids": Case(independent, "red,green,dark", best_above_half),
    "no background": Case(independent, "red,green,dark", best, ("--background-below", "0")),
    "background named": Case(independent, "Hintergrund,red,green,dark", best_above_half),
    "close classes": Case(close_classes, ",".join("abcdefghijkl"), best, side=64),
    "labels": Case(arg_max, "red,green,dark", lambda y: y),
    "unpadded convolutions": Case(unpadded, "red,green,dark", best, ("--crop-output",), side=100, border=4),
    "uint8": Case(of_bytes, "red,green,dark", best, feed=lambda tiles: tiles),
    "old Upsample": Case(enlarged_as_before, "red,green,dark", best),
}


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    SyntheticSlide(WIDTH, HEIGHT, 0.5, 5).write(path)
    return path


def centres(size: int, side: int, border: int) -> Iterator[tuple[int, slice]]:
    """Yield where tiles begin along an axis, and which of its pixels each is asked for: those near its centre."""
    step = (side - 2 * border) // 4 * 2
    first = 0
    while True:
        start = min(first, size - side)
        low = 0 if first == 0 else start + (side - step) // 2
        high = size if start == size - side else start + (side + step) // 2
        yield start, slice(low, high)
        if start == size - side:
            return
        first += step


def directly(case: Case, path: Path, pixels: Array) -> Array:
    """Return labels (H, W) by ONNX Runtime alone; -1 where no tile has any."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    height, width = pixels.shape[:2]
    found = np.full((height, width), -1)
    side, border = case.side, case.border
    for y, rows in centres(height, side, border):
        for x, columns in centres(width, side, border):
            tile = case.feed(pixels[None, y : y + side, x : x + side])
            labels = np.full((side, side), -1)
            inner = slice(border, side - border)
            labels[inner, inner] = case.labels(session.run(None, {source.name: tile})[0])[0]
            found[rows, columns] = labels[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x]
    return found


FAST = ("mean of sigmoids", "independent sigmoids", "labels", "unpadded convolutions")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_labels_are_those_of_the_network_with_default_options(slide: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    path = case.write(tmp_path / "net.onnx")
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    arguments = ("wrap", path, "--classes", case.classes, "--mpp", 0.5, "--precision", "fp32", "--tensorrt", "off")
    made = call(export_main, *arguments, "--out", bundle, *case.options)
    assert made.returncode == 0, made.stderr
    done = call(infer_main, slide, "--model", bundle, "--out", out, "--backend", "cpu", "--no-tissue")
    assert done.returncode == 0, done.stderr
    labels = tifffile.imread(out / "slide" / "labels.tif", level=0)
    expected = directly(case, path, tifffile.imread(slide, level=0))
    known = expected >= 0
    assert known.mean() > (0.9 if case.border else 0.999)
    assert len(np.unique(expected[known])) > 1
    assert (labels == expected)[known].mean() >= 0.999
    if case.border:
        return
    # The card tells how it was decided, and the record of the run how tiles were joined.
    card = json.loads((bundle / "card.json").read_text())
    assert card["training"]["decisions"]
    run = json.loads((out / "slide" / "run.json").read_text())
    assert run["options"]["blend"] == ("crop" if name == "labels" else "hann")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--classes", "a,b", "--mpp", "0.5", "--threshold", "2"), 2, "threshold=2.0 is not between 0.001 and 0.999"),
        (("--classes", "a,b"), 2, "pass --mpp"),
        (("--mpp", "0.5"), 2, "pass --classes"),
        (("--classes", "a,b", "--mpp", "0.5", "--mean", "123"), 2, "pass --scale 1"),
        (("--classes", "a,b", "--mpp", "0.5", "--tile", "128"), 2, "pass --tile 96, or leave it out"),
        (("--classes", "a,b,c", "--mpp", "0.5"), 2, "3 classes were named"),
        (("--classes", "a,b", "--mpp", "0.5", "--scale", "1/0"), 2, "write 1/255 or 0.0039"),
        (("--classes", "a,b", "--mpp", "0.5", "--colors", "red,blue"), 2, "write six digits for each"),
        (("--classes", "a,b", "--mpp", "0.5", "--colors", "ff0000"), 2, "1 colours for 2 classes"),
    ],
)
def test_a_wrong_call_says_what_to_pass_and_leaves_nothing(
    tmp_path: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    path = clamped(tmp_path / "net.onnx")
    done = call(export_main, "wrap", path, *words, "--out", tmp_path / "bundle")
    assert (done.returncode, message in done.stderr) == (status, True), done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]


def test_colours_channels_and_a_fraction_reach_the_card(tmp_path: Path) -> None:
    path = clamped(tmp_path / "net.onnx")
    words = ("--classes", "a,b", "--mpp", 0.5, "--colors", "#010203,ff8000", "--scale", "1/255", "--mean", "0")
    fast = ("--channel-names", "DAPI,FITC,TRITC", "--precision", "fp32", "--tensorrt", "off")
    done = call(export_main, "wrap", path, *words, *fast, "--out", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "bundle" / "card.json").read_text())
    assert [entry["color"] for entry in card["classes"]] == [[1, 2, 3], [255, 128, 0]]
    assert card["classes"][0]["role"] == "background"
    assert card["channel_names"] == ["DAPI", "FITC", "TRITC"]

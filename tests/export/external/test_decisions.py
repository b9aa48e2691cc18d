"""What is decided for the user: activation, background, normalisation, defaults of the file's metadata."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from histostream.export.external.activation import Evidence, choose_activation
from histostream.export.external.description import DescriptionError, ExternalModel, check_normalisation
from histostream.export.external.reference import Reference
from histostream.export.external.scoring import Scoring
from histostream.export.external.wrap import WrappedModel, wrap_graph
from histostream.export.graph.model import GraphError
from tests.export.external.graphs import convolution, graph_file

SIDE = 64
Array = NDArray[Any]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE = tuple(255 * v for v in IMAGENET[0]), tuple(255 * v for v in IMAGENET[1])
node = helper.make_node


def wrap(path: Path, options: ExternalModel) -> WrappedModel:
    return wrap_graph(path, options, mpp=0.5)


def network(
    path: Path, ending: list[Any], k: int = 3, shape: tuple[Any, ...] = ("n", 3, SIDE, SIDE), **weights: Array
) -> Path:
    """Write a convolution whose output ``l`` other nodes make ``y`` of."""
    nodes = [node("Conv", ["x", "w"], ["l"], pads=[1, 1, 1, 1]), *ending]
    channels = int(shape[1])
    return graph_file(
        path,
        nodes,
        {"w": convolution(classes=k, channels=channels), **weights},
        ("x", TensorProto.FLOAT, list(shape)),
        [("y", TensorProto.FLOAT, [shape[0], k, *shape[2:]])],
    )


# --- activation ---------------------------------------------------------------------------------


def evidence(low: float, high: float, ending: str = "Mul", *, one: bool = False) -> Evidence:
    return Evidence(low, high, one, ending, "tiles")


@pytest.mark.parametrize(
    ("seen", "channels", "name", "independent"),
    [
        (evidence(0.02, 0.98), 1, "none", False),
        (evidence(0.02, 0.98), 3, "none", True),
        (evidence(0.0, 1.0005), 3, "none", True),
        (evidence(0.3, 0.4, one=True), 3, "none", False),
        (evidence(0.3, 0.4, "Sigmoid"), 1, "none", False),
        (evidence(0.3, 0.4, "Softmax"), 3, "none", True),
        (evidence(-0.01, 0.98), 1, "sigmoid", False),
        (evidence(-7, 5), 3, "softmax", False),
        (evidence(0.2, 1.1), 3, "softmax", False),
    ],
)
def test_values_within_0_and_1_are_probabilities_and_others_logits(
    seen: Evidence, channels: int, name: str, independent: bool
) -> None:
    found = choose_activation("auto", seen, channels, background_is_added=False)
    assert (found.name, found.independent) == (name, independent)


@pytest.mark.parametrize(("low", "high"), [(0.4, 0.4), (0.2, 0.6), (0.0, 0.3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_where_tiles_cannot_tell_the_command_asks(low: float, high: float, channels: int) -> None:
    logits = "sigmoid" if channels == 1 else "softmax"
    words = f"--activation none if it is probabilities, --activation {logits} if it is logits"
    with pytest.raises(DescriptionError, match=words):
        choose_activation("auto", evidence(low, high), channels, background_is_added=False)
    for asked in ("none", logits):  # what the message advises
        assert choose_activation(asked, evidence(low, high), channels, background_is_added=False).name == asked


def test_real_tiles_count_not_only_noise(tmp_path: Path) -> None:
    """A network of which only smooth pixels leave 0..1: on the noise of a first try they do not."""
    ending = [node("Abs", ["l"], ["a"]), node("Sub", ["two", "a"], ["y"])]
    path = network(tmp_path / "net.onnx", ending, k=1, two=np.array(2, np.float32))
    model = onnx.load(path)
    laplace = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32) * 40
    model.graph.initializer[0].raw_data = np.broadcast_to(laplace, (1, 3, 3, 3)).tobytes()
    onnx.save(model, path)
    wrapped = wrap(path, ExternalModel(("background", "edge")))
    assert wrapped.scoring.activation == "sigmoid"
    assert any("tiles of synthetic slide" in line for line in wrapped.decisions)


def test_a_later_tile_that_contradicts_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", [node("Mul", ["l", "s"], ["y"])], k=1, s=np.array(0.001, np.float32))
    wrapped = wrap(path, ExternalModel(("background", "a"), activation="none", scale=1e-4))
    assert isinstance(wrapped.reference, Reference)
    wild = replace(wrapped.reference, scoring=replace(wrapped.scoring, activation="none"))
    source = replace(wild.network.source, scale=1e6)
    wild = replace(wild, network=replace(wild.network, source=source))
    with pytest.raises(GraphError, match="on a further tile: pass --activation"):
        wild(np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8))


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.9, 0.99])
def test_a_class_is_the_label_exactly_from_its_threshold_on(threshold: float) -> None:
    least = np.float32(threshold)
    p = np.array(
        [0, 0.001, np.nextafter(least, np.float32(0)), least, np.nextafter(least, np.float32(1)), 1], np.float32
    )
    y = p.reshape(1, 1, 1, -1)
    one = Scoring("none", ("background", "a"), 0, threshold=threshold)
    np.testing.assert_array_equal(one.scores(y).argmax(axis=1).ravel(), p >= least)
    two = Scoring("none", ("a", "background"), 1, threshold=threshold, foreground=0)
    np.testing.assert_array_equal(two.scores(np.concatenate([y, 1 - y], axis=1)).argmax(axis=1).ravel(), p < least)
    added = Scoring("none", ("background", "a", "b"), 0, background_below=threshold)
    labels = added.scores(np.concatenate([y, y / 2], axis=1)).argmax(axis=1).ravel()
    np.testing.assert_array_equal(labels, p >= least)


def test_averaging_scores_is_averaging_the_probability() -> None:
    """Two tiles with 0.95 and 0.5 have a mean of 0.725, which is below a threshold of 0.9."""
    scoring = Scoring("none", ("background", "a"), 0, threshold=0.9)
    scores = scoring.scores(np.array([0.95, 0.5, 0.99, 0.82], np.float32).reshape(4, 1, 1, 1))
    assert scores[:2].mean(axis=0).argmax() == 0
    assert scores[2:].mean(axis=0).argmax() == 1  # a mean of 0.905


def test_the_graph_makes_the_same_labels_as_the_reference_at_the_threshold(tmp_path: Path) -> None:
    """Votes of two networks that disagree are exactly one half: the rule for them is in the graph too."""
    ending = [
        node("Greater", ["l", "zero"], ["v"]),
        node("Cast", ["v"], ["vote"], to=TensorProto.FLOAT),
        node("ReduceMean", ["vote", "axis"], ["y"], keepdims=1),
    ]
    path = network(tmp_path / "net.onnx", ending, k=2, zero=np.array(0.1, np.float32), axis=np.array([1]))
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, path)
    tiles = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    for threshold, ties in ((None, 1), (0.51, 0)):
        wrapped = wrap(path, ExternalModel(("background", "a"), threshold=threshold))
        session = onnxruntime.InferenceSession(wrapped.model.SerializeToString(), providers=["CPUExecutionProvider"])
        labels = session.run(None, {"tiles": tiles})[0].argmax(axis=1)
        assert isinstance(wrapped.reference, Reference)
        votes = wrapped.reference.network.run(wrapped.source.normalised(tiles))[:, 0]
        assert (votes == 0.5).mean() > 0.05
        np.testing.assert_array_equal(labels[votes == 0.5], ties)
        np.testing.assert_array_equal(labels[votes == 1], 1)
        np.testing.assert_array_equal(labels[votes == 0], 0)


@pytest.mark.parametrize("classes", [("background", "a"), ("a", "background")])
@pytest.mark.parametrize("threshold", [0.2, 0.8])
def test_of_two_classes_the_one_that_is_no_background_has_the_threshold(
    tmp_path: Path, classes: tuple[str, str], threshold: float
) -> None:
    path = network(tmp_path / "net.onnx", [node("Identity", ["l"], ["y"])], k=2)
    wrapped = wrap(path, ExternalModel(classes, threshold=threshold, mean=(0.5,)))
    tiles = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    session = onnxruntime.InferenceSession(wrapped.model.SerializeToString(), providers=["CPUExecutionProvider"])
    labels = session.run(None, {"tiles": tiles})[0].argmax(axis=1)
    assert isinstance(wrapped.reference, Reference)
    logits = wrapped.reference.network.run(wrapped.source.normalised(tiles))
    index = classes.index("a")
    p = 1 / (1 + np.exp(logits[:, 1 - index] - logits[:, index]))
    assert 0.01 < (p >= threshold).mean() < 0.99
    assert ((labels == index) == (p >= threshold)).mean() >= 0.9999


@pytest.mark.parametrize(
    ("k", "classes", "options", "names", "background"),
    [
        (3, ("a", "b", "c"), {}, ("background", "a", "b", "c"), 0),
        (3, ("a", "Background", "c"), {}, ("a", "Background", "c"), 1),
        (3, ("Fond", "a", "b", "c"), {}, ("Fond", "a", "b", "c"), 0),
        (3, ("a", "b", "glass"), {"background": "glass"}, ("a", "b", "glass"), 2),
        (3, ("a", "b", "c"), {"background_below": 0.0}, ("a", "b", "c"), None),
        (1, ("nucleus",), {}, ("background", "nucleus"), 0),
        (1, ("rest", "nucleus"), {}, ("rest", "nucleus"), 0),
    ],
)
def test_which_class_is_the_background_of_sigmoids(
    tmp_path: Path, k: int, classes: tuple[str, ...], options: dict[str, Any], names: tuple[str, ...], background: int
) -> None:
    path = network(tmp_path / "net.onnx", [node("Sigmoid", ["l"], ["y"])], k=k)
    wrapped = wrap(path, ExternalModel(classes, **options))
    found = wrapped.classes()
    assert tuple(entry.name for entry in found) == names
    assert [entry.role for entry in found].count("background") == (background is not None)
    if background is not None:
        assert (found[background].role, found[background].color) == ("background", (255, 255, 255))
    assert len({entry.color for entry in found}) == len(found)


@pytest.mark.parametrize(
    ("k", "classes", "options", "words"),
    [
        (1, ("tumour", "background"), {}, "name the background first, as in --classes background,tumour"),
        (1, ("background",), {}, "name the background first, as in --classes background,tumour"),
        (1, ("background", "a"), {"background_below": 0.4}, "one output channel: pass --threshold"),
        (3, ("background", "a", "b"), {"background_below": 0.4}, "'background' is one: leave the option out"),
        (3, ("a", "b", "c"), {"threshold": 0.4}, "--threshold is for two classes"),
        (2, ("a", "b"), {"threshold": 0.4}, "pass --background-below for independent sigmoids"),
        (3, ("a", "b"), {}, "3 channels; 2 classes were named"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(
    tmp_path: Path, k: int, classes: tuple[str, ...], options: dict[str, Any], words: str
) -> None:
    path = network(tmp_path / "net.onnx", [node("Sigmoid", ["l"], ["y"])], k=k)
    with pytest.raises(DescriptionError, match=words):
        wrap(path, ExternalModel(classes, **options))


# --- normalisation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "std", "scale"),
    [
        (*IMAGENET, 1 / 255),
        (*CAFFE, 1.0),
        ((0.0,), (1.0,), 1 / 255),
        ((0.0,), (1.0,), 1.0),
        ((0.0,), (255.0,), 1.0),
        ((127.5,), (127.5,), 1.0),
        ((1.0,), (1.0,), 1 / 127.5),
        ((0.5, 0.5, 0.5, 0.1), (0.25, 0.25, 0.25, 0.2), 1 / 255),
        ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0), 1.0),
    ],
)
def test_normalisations_in_use_pass(mean: tuple[float, ...], std: tuple[float, ...], scale: float) -> None:
    check_normalisation(mean, std, scale)


@pytest.mark.parametrize(
    ("mean", "std", "scale", "words"),
    [
        (*CAFFE, 1 / 255, "pass --scale 1 or --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"),
        (*IMAGENET, 1.0, "pass --scale 1/255 or --mean 123.675,116.28,103.53 --std 58.395,57.12,57.375"),
        ((0.5,), (1.0,), 1.0, "pass --scale 1/255"),
        ((0.0,), (0.25,), 1.0, "pass --scale 1/255"),
        ((0.0,), (58.0,), 1 / 255, "pass --scale 1"),
        ((123.0,), (1.0,), 1 / 255, "pass --scale 1"),
    ],
)
def test_a_mean_of_other_pixels_than_the_scale_makes_is_refused_with_what_fits(
    mean: tuple[float, ...], std: tuple[float, ...], scale: float, words: str
) -> None:
    with pytest.raises(DescriptionError, match=words) as caught:
        check_normalisation(mean, std, scale)
    for advice in str(caught.value).rpartition(": pass ")[2].split(" or "):  # each must be accepted
        values = dict(zip(advice.split()[::2], advice.split()[1::2], strict=True))
        numbers = {name: tuple(map(float, text.split(","))) for name, text in values.items() if name != "--scale"}
        numerator, _, denominator = values.get("--scale", str(scale)).partition("/")
        check_normalisation(
            numbers.get("--mean", mean), numbers.get("--std", std), float(numerator) / float(denominator or 1)
        )


def test_one_number_stands_for_all_channels_of_the_file(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", [node("Identity", ["l"], ["y"])], shape=("n", 5, SIDE, SIDE))
    wrapped = wrap(path, ExternalModel(("a", "b", "c"), activation="softmax", mean=(0.5,), std=(0.2,)))
    assert wrapped.source.channels == 5
    assert (wrapped.source.mean, wrapped.source.std) == ((0.5,) * 5, (0.2,) * 5)


# --- metadata -----------------------------------------------------------------------------------


def with_metadata(path: Path, **entries: str) -> Path:
    model = onnx.load(network(path, [node("Softmax", ["l"], ["y"], axis=1)]))
    helper.set_model_props(model, entries)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    "classes",
    [
        "glass,stroma,tumour",
        '["glass", "stroma", "tumour"]',
        "{0: 'glass', 1: 'stroma', 2: 'tumour'}",
        '{"0": "glass", "2": "tumour", "1": "stroma"}',
    ],
)
def test_what_the_file_says_of_itself_is_the_default(tmp_path: Path, classes: str) -> None:
    path = with_metadata(
        tmp_path / "net.onnx",
        names=classes,
        mean="[0.4, 0.5, 0.6]",
        std="0.2 0.2 0.2",
        mpp="0.25",
        description="For\nH&E",
    )
    wrapped = wrap_graph(path, ExternalModel(), mpp=None)
    assert wrapped.scoring.classes == ("glass", "stroma", "tumour")
    assert (wrapped.source.mean, wrapped.source.std, wrapped.mpp) == ((0.4, 0.5, 0.6), (0.2,) * 3, 0.25)
    assert wrapped.note == "For H&E"
    assert sum("from the file's metadata" in line for line in wrapped.decisions) == 3
    said = wrap_graph(path, ExternalModel(("a", "b", "c"), mean=(0.1,)), mpp=0.5)
    assert (said.scoring.classes, said.source.mean, said.mpp) == (("a", "b", "c"), (0.1,) * 3, 0.5)
    assert not any("from the file's metadata" in line for line in said.decisions)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("names", "[__import__('os').system('touch owned')]"),
        ("names", "[" * 10_000),
        ("names", "a" * 100_000),
        ("names", "a,\x1b[31mb,c"),
        ("names", "{0: 'a', 5: 'b'}"),
        ("names", "[1, 2, 3]"),
        ("mean", "0.5,nan,0.5"),
        ("std", "[0, 1, 1]"),
        ("mpp", "-1"),
        ("mpp", "1e300"),
        ("mean", "half"),
    ],
)
def test_metadata_that_are_not_understood_are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = with_metadata(tmp_path / "net.onnx", **{key: value})
    wrapped = wrap(path, ExternalModel(("a", "b", "c")))
    (line,) = (line for line in wrapped.decisions if line.startswith("metadata left out"))
    assert key in line
    assert len(line) < 200
    assert not (tmp_path / "owned").exists()


def test_what_neither_the_user_nor_the_file_says_is_asked_for(tmp_path: Path) -> None:
    path = with_metadata(tmp_path / "net.onnx")
    with pytest.raises(DescriptionError, match="pass --classes"):
        wrap(path, ExternalModel())
    with pytest.raises(DescriptionError, match="pass --mpp"):
        wrap_graph(path, ExternalModel(("a", "b", "c")), mpp=None)

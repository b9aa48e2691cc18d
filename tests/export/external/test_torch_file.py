"""Files of torch.export are read without running anything in them; other formats are named, with the way to ONNX."""

from __future__ import annotations

import io
import json
import pickle
import shlex
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from histostream.export.external.description import ExternalModel
from histostream.export.external.wrap import WrappedModel, wrap_graph
from histostream.export.graph.model import GraphError

SIDE = 48
ABC = ("a", "b", "c")


class Small(nn.Module):
    """Has parameters, a buffer, a constant, statistics and an enlargement."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)
        self.register_buffer("gain", torch.full((1, 3, 1, 1), 40.0))
        self.offset = torch.tensor([0.5])

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(torch.relu(self.norm(self.one(x)))) - self.offset
        return functional.interpolate(y, size=x.shape[2:], mode="bilinear") * self.gain  # type: ignore[operator]


class Several(Small):
    """Gives a dictionary, as networks of torchvision and transformers do."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"out": super().forward(x), "aux": x.mean(dim=(2, 3))}


@pytest.fixture(scope="module")
def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def saved(network: nn.Module, path: Path, *, dynamic: bool = False) -> Path:
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},) if dynamic else None
    example = torch.zeros(2 if dynamic else 1, 3, SIDE, SIDE)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def good(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(small, tmp_path_factory.mktemp("pt2") / "net.pt2")


def wrap(path: Path, **options: Any) -> WrappedModel:
    return wrap_graph(path, ExternalModel(ABC, **options), mpp=0.5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program_gives_the_labels_of_the_module(small: Small, tmp_path: Path, dynamic: bool) -> None:
    wrapped = wrap(saved(small, tmp_path / "net.pt2", dynamic=dynamic), mean=(0.5,), std=(0.2,))
    tiles = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    x = (torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
    with torch.no_grad():
        expected = torch.softmax(small(x), dim=1).numpy()
    np.testing.assert_allclose(wrapped.reference(tiles), expected, atol=1e-4)
    session = onnxruntime.InferenceSession(wrapped.model.SerializeToString(), providers=["CPUExecutionProvider"])
    labels = session.run(None, {"tiles": tiles})[0].argmax(axis=1)
    assert (labels == expected.argmax(axis=1)).mean() >= 0.9999
    assert len(np.unique(labels)) > 1
    assert str(Path(__file__).parent) not in str(wrapped.model)  # no paths of the machine that exported it


def test_of_a_dictionary_one_output_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = saved(Several().eval(), tmp_path / "net.pt2")
    with pytest.raises(GraphError, match=r"has 2 outputs: pass --output '(.*)' or '(.*)'") as caught:
        wrap(path)
    name = str(caught.value).split("'")[1]
    assert wrap(path, output_name=name).scoring.classes == ABC


# --- files that mean harm -----------------------------------------------------------------------


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def changed(good: Path, path: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """Copy an archive with one file changed; ``name`` is the end of its name."""
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        names = [entry for entry in source.namelist() if entry.endswith(name)]
        assert len(names) == 1
        for entry in source.namelist():
            content = source.read(entry)
            target.writestr(entry, change(content) if entry in names else content)
    return path


def in_json(edit: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        value = json.loads(content)
        edit(value)
        return json.dumps(value).encode()

    return change


def graph_of(program: dict[str, Any]) -> dict[str, Any]:
    graph: dict[str, Any] = program["graph_module"]["graph"]
    return graph


def set_size(program: dict[str, Any], text: str) -> None:
    values = graph_of(program)["tensor_values"]
    next(iter(values.values()))["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}


def set_name(program: dict[str, Any], text: str) -> None:
    renamed = json.loads(json.dumps(program["graph_module"]).replace('"x"', json.dumps(text)))
    program["graph_module"] = renamed


EVIL = "__import__('pathlib').Path({0!r}).touch()"
ATTACKS: dict[str, tuple[str, Callable[[str], Callable[[dict[str, Any]], object]]]] = {
    "size": ("models/net.json", lambda code: lambda p: set_size(p, code)),
    "size of names": ("models/net.json", lambda code: lambda p: set_size(p, f"Symbol('s0').func({code!r})")),
    "power": ("models/net.json", lambda code: lambda p: set_size(p, "9**9**9**9")),
    "range": (
        "models/net.json",
        lambda code: lambda p: p["range_constraints"].update({code: {"min_val": 1, "max_val": 2}}),
    ),
    "target": ("models/net.json", lambda code: lambda p: graph_of(p)["nodes"][0].update(target="torch.hub.load")),
    "dunder": (
        "models/net.json",
        lambda code: lambda p: graph_of(p)["nodes"][0].update(target="torch.ops.aten.__init__.x"),
    ),
    "reads a file": (
        "models/net.json",
        lambda code: lambda p: graph_of(p)["nodes"][0].update(target="torch.ops.aten.from_file.default"),
    ),
    "name": ("models/net.json", lambda code: lambda p: set_name(p, f"x=({code})")),
    "pickled weights": (
        "weights_config.json",
        lambda code: lambda c: next(iter(c["config"].values())).update(use_pickle=True),
    ),
    "path of weights": (
        "weights_config.json",
        lambda code: lambda c: next(iter(c["config"].values())).update(path_name="../../models/net.json"),
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_is_no_graph_of_tensors_is_refused(good: Path, tmp_path: Path, attack: str) -> None:
    sentinel = tmp_path / "owned"
    name, edit = ATTACKS[attack]
    name = name.replace("net.json", "model.json")
    path = changed(good, tmp_path / "net.pt2", name, in_json(edit(EVIL.format(str(sentinel)))))
    with pytest.raises(GraphError, match=r"net\.pt2: .*export the network to ONNX instead") as caught:
        wrap(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not sentinel.exists()


def test_what_is_not_needed_is_not_even_read(good: Path, tmp_path: Path) -> None:
    """Sample inputs are pickled, guards are code, the tree of outputs names classes: a file is wrapped without them."""
    sentinel = tmp_path / "owned"
    pickled = changed(good, tmp_path / "a.pt2", "sample_inputs/model.pt", lambda _: pickle.dumps(Harm(sentinel)))

    def edit(program: dict[str, Any]) -> None:
        program["guards_code"] = [EVIL.format(str(sentinel))]
        for node in graph_of(program)["nodes"]:
            node["metadata"] = {"stack_trace": EVIL.format(str(sentinel)), "custom": "x"}
        program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = "evil"

    path = changed(pickled, tmp_path / "net.pt2", "models/model.json", in_json(edit))
    assert wrap(path).scoring.classes == ABC
    assert not sentinel.exists()
    with pytest.raises(Exception, match=r".*"):  # the attack is real: torch alone runs it
        torch.export.load(path)
    assert sentinel.exists()


@pytest.mark.parametrize("size", [10, 1000, -1])
def test_a_damaged_archive_is_one_clear_line(good: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(good.read_bytes()[:size])
    with pytest.raises(GraphError, match=r"net\.pt2") as caught:
        wrap(path)
    assert "\n" not in str(caught.value)


def test_a_second_file_of_the_same_name_is_refused(good: Path, tmp_path: Path) -> None:
    """Two readers of zip archives may take another one of the two."""
    path = tmp_path / "net.pt2"
    path.write_bytes(good.read_bytes())
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        (name,) = (entry for entry in archive.namelist() if entry.endswith("weight_0"))
        archive.writestr(name, b"other")
    with pytest.raises(GraphError, match="export the network to ONNX instead"):
        wrap(path)


# --- other formats ------------------------------------------------------------------------------


@pytest.mark.full
def test_the_way_to_onnx_of_torchscript_works_as_it_is_printed(small: Small, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(small).save(tmp_path / "net.pt")
    with pytest.raises(GraphError, match="TorchScript, which is code and is not run here") as caught:
        wrap(tmp_path / "net.pt")
    command = shlex.split(str(caught.value).partition("make ONNX of it with ")[2])
    assert command[0] == "python"
    done = subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert wrap(tmp_path / "model.onnx").source.tile_px == 512


@pytest.mark.full
def test_the_way_to_onnx_of_weights_works_as_it_is_printed(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(small.state_dict(), tmp_path / "net.pt")
    with pytest.raises(GraphError, match="weights of torch without their network") as caught:
        wrap(tmp_path / "net.pt")
    code = str(caught.value).partition("in the code that has it, ")[2]
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, {"torch": torch, "YourNetwork": Small})
    assert wrap(tmp_path / "model.onnx").source.tile_px == 512


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("net.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "a model of Keras: make ONNX of it"),
        ("net.pth", pickle.dumps({"a": 1}, protocol=2), "weights of torch without their network"),
        ("net.safetensors", bytes(100), "weights without their network"),
        ("net.zip", None, "a zip archive without a network"),
        ("net.keras", None, "a model of Keras"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("model.weights.h5" if name == "net.keras" else "readme.txt", b"")
        content = buffer.getvalue()
    path.write_bytes(content)
    with pytest.raises(GraphError, match=words):
        wrap(path)


def test_a_folder_of_tensorflow_is_named(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(GraphError, match=r"a SavedModel of TensorFlow: make ONNX of it with python -m tf2onnx"):
        wrap(tmp_path)

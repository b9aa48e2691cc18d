from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from histostream.export.triton import write_triton
from histostream.runtime.bundle.card import CardError, ModelCard, read_card
from histostream.wsi.errors import OutputError
from histostream.wsi.outputs.label_rows import ClassInfo

pytestmark = pytest.mark.full

NAMES = (
    'quo"ted \\ back',
    "Drüse 腺 🔬",
    "two\nlines\r\nand\ttab",
    "'; } parameters {",
    "\x00\x7f",
)


def parse(model: Path) -> Any:
    """Read a config with the schema that Triton publishes."""
    config = model_config_pb2.ModelConfig()
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), config)


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> tuple[Path, ModelCard]:
    """Return a bundle with a second graph, and its card."""
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    shutil.copy(folder / "model.onnx", folder / "model.fp16.onnx")
    card = read_card(folder)
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    return folder, replace(card, files={**card.files, "model.fp16.onnx": digest})


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "models"


def test_triton_s_own_schema_reads_every_field(bundle: tuple[Path, ModelCard], repository: Path) -> None:
    folder, card = bundle
    models = write_triton(*bundle, repository, plan=b"a plan")
    assert [m.name for m in models] == ["bundle_fp32", "bundle_fp16", "bundle_tensorrt"]
    platforms = [("onnxruntime_onnx", "onnxruntime", "model.onnx")] * 2
    platforms += [("tensorrt_plan", "tensorrt", "model.plan")]
    for model, said in zip(models, platforms, strict=True):
        config = parse(model)
        assert config.name == model.name  # Triton refuses another name
        assert (config.platform, config.backend, config.default_model_filename) == said
        assert config.max_batch_size == 32
        (tiles,), (scores,) = config.input, config.output
        assert (tiles.name, tiles.data_type) == ("tiles", model_config_pb2.TYPE_UINT8)
        assert list(tiles.dims) == [card.tile_px, card.tile_px, card.channels]
        assert (scores.name, scores.data_type) == ("scores", model_config_pb2.TYPE_FP16)
        assert list(scores.dims) == [len(card.classes), card.tile_px, card.tile_px]
        assert scores.label_filename == "labels.txt"
        assert list(config.dynamic_batching.preferred_batch_size) == [8, 16, 32]
        assert config.dynamic_batching.max_queue_delay_microseconds == 2000
        (group,) = config.instance_group
        assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_AUTO
        assert group.count == 1
        found = parameters(config)
        assert json.loads(found.pop("classes")) == [{"name": c.name, "color": list(c.color)} for c in card.classes]
        assert found == {
            "method": "imems",
            "mpp": "0.5",
            "tile_px": "128",
            "halo_px": str(card.halo_px),
            "align_px": "4",
            "tile_statistics": "false",
            "score_kind": "embedding",
            "card_sha256": card.digest(),
        }
        assert (model / "labels.txt").read_text() == "ground\ngland\nnucleus\n"
        assert [p.name for p in sorted(model.rglob("*")) if p.is_file()] == [said[2], "config.pbtxt", "labels.txt"]
    assert (models[0] / "1/model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert (models[2] / "1/model.plan").read_bytes() == b"a plan"
    assert sorted(p.name for p in repository.parent.iterdir()) == ["bundle", "models"]


def test_the_graph_that_is_served_has_exactly_the_tensors_of_the_config(tiny_bundle: Path, repository: Path) -> None:
    (model,) = write_triton(tiny_bundle, read_card(tiny_bundle), repository)
    config = parse(model)
    path = model / "1" / config.default_model_filename
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for wanted, found in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        assert [t.name for t in wanted] == [t.name for t in found]
        for tensor, graph in zip(wanted, found, strict=True):
            types = {model_config_pb2.TYPE_UINT8: "tensor(uint8)", model_config_pb2.TYPE_FP16: "tensor(float16)"}
            assert graph.type == types[tensor.data_type]
            assert isinstance(graph.shape[0], str)  # Triton's batch
            assert graph.shape[1:] == list(tensor.dims)
    tiles = np.zeros((2, *config.input[0].dims), np.uint8)
    assert session.run(["scores"], {"tiles": tiles})[0].shape == (2, *config.output[0].dims)


def test_names_of_classes_survive_whatever_they_hold(tiny_bundle: Path, repository: Path) -> None:
    card = read_card(tiny_bundle)
    classes = tuple(ClassInfo(name, (1, 2, 3)) for name in NAMES)
    (model,) = write_triton(tiny_bundle, replace(card, classes=classes), repository)
    found = json.loads(parameters(parse(model))["classes"])
    assert [c["name"] for c in found] == list(NAMES)
    lines = (model / "labels.txt").read_text(encoding="utf-8").split("\n")
    assert lines[1:3] == ["Drüse 腺 🔬", "two lines and tab"]
    assert len(lines) == len(NAMES) + 1  # each label stays on its own line


def test_a_batch_limit_also_limits_the_preferred_sizes(tiny_bundle: Path, repository: Path) -> None:
    for most, sizes in ((1, [1]), (8, [8]), (12, [8, 12]), (64, [8, 16, 32, 64])):
        (model,) = write_triton(tiny_bundle, read_card(tiny_bundle), repository, max_batch=most)
        config = parse(model)
        assert config.max_batch_size == most
        assert list(config.dynamic_batching.preferred_batch_size) == sizes


def test_a_model_that_was_written_before_is_replaced_and_others_stay(tiny_bundle: Path, repository: Path) -> None:
    card = read_card(tiny_bundle)
    (repository / "other").mkdir(parents=True)
    (repository / "other" / "config.pbtxt").write_text('name: "other"')
    write_triton(tiny_bundle, card, repository)
    (model,) = write_triton(tiny_bundle, replace(card, note="better"), repository)
    assert parameters(parse(model))["card_sha256"] == replace(card, note="better").digest()
    assert (repository / "other" / "config.pbtxt").read_text() == 'name: "other"'
    assert sorted(p.name for p in repository.iterdir()) == ["other", "tiny_fp32"]
    assert [p.name for p in repository.parent.iterdir()] == ["models"]


def edit(model: Path) -> None:
    text = (model / "config.pbtxt").read_text()
    (model / "config.pbtxt").write_text(text.replace("count: 1", "count: 4"))


def replace_by_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("a file")


def replace_by_link(model: Path) -> None:
    model.rename(model.with_name("elsewhere"))
    model.symlink_to(model.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: (m / "config.pbtxt").unlink(), "not written by HistoStream"),
        (lambda m: (m / "config.pbtxt").write_text("name: 'bundle_fp32'"), "not written by"),
        (edit, "was edited since it was written"),
        (lambda m: (m / "2").mkdir(), "was not written by HistoStream"),
        (lambda m: (m / "1" / "notes.doc").write_text("work"), "was not written by HistoStream"),
        (replace_by_file, "not written by HistoStream"),
        (replace_by_link, "not written by HistoStream"),
    ],
    ids=["no config", "other config", "edited", "version 2", "more files", "a file", "a link"],
)
def test_nothing_that_is_not_ours_is_overwritten(
    tiny_bundle: Path, repository: Path, change: Callable[[Path], object], words: str
) -> None:
    card = read_card(tiny_bundle)
    (model,) = write_triton(tiny_bundle, card, repository)
    change(model)
    before = sorted((p, p.is_file() and p.read_bytes()) for p in repository.rglob("*"))
    with pytest.raises(OutputError, match=words):
        write_triton(tiny_bundle, card, repository, plan=b"plan")
    assert sorted((p, p.is_file() and p.read_bytes()) for p in repository.rglob("*")) == before
    assert [p.name for p in repository.parent.iterdir()] == ["models"]


def test_a_disk_that_fails_leaves_the_old_model(
    tiny_bundle: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = read_card(tiny_bundle)
    (model,) = write_triton(tiny_bundle, card, repository)
    before = (model / "config.pbtxt").read_bytes()
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target == model and not path.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_triton(tiny_bundle, replace(card, note="better"), repository)
    assert (model / "config.pbtxt").read_bytes() == before
    assert (model / "1" / "model.onnx").exists()
    assert [p.name for p in repository.parent.iterdir()] == ["models"]


def test_a_graph_that_the_card_does_not_vouch_for_is_not_served(
    bundle: tuple[Path, ModelCard], repository: Path
) -> None:
    folder, card = bundle
    (folder / "model.fp16.onnx").write_bytes(b"tampered")
    with pytest.raises(CardError, match=r"does not match card\.json"):
        write_triton(folder, card, repository)
    assert not repository.exists()


@pytest.mark.parametrize(("folder", "model"), [("a b", "a_b_fp32"), (".hidden", "hidden_fp32"), ("ä", "imems_fp32")])
def test_a_folder_whose_name_triton_would_not_take_gets_one_that_it_does(
    tiny_bundle: Path, tmp_path: Path, repository: Path, folder: str, model: str
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / folder)
    (written,) = write_triton(bundle, read_card(bundle), repository)
    assert (written.name, parse(written).name) == (model, model)


def test_a_repository_that_cannot_be_written_is_one_clear_line(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_triton(tiny_bundle, read_card(tiny_bundle), tmp_path / "file" / "models")
    with pytest.raises(OutputError, match="plan is empty"):
        write_triton(tiny_bundle, read_card(tiny_bundle), tmp_path / "models", plan=b"")
    with pytest.raises(OutputError, match="max_batch=0"):
        write_triton(tiny_bundle, read_card(tiny_bundle), tmp_path / "models", max_batch=0)
    assert not (tmp_path / "models").exists()

"""Bundles: what they hold, that their graphs agree as the card says, and how they fail."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from histostream.export import bundle as bundles
from histostream.export.bundle import OptionError, Options, write_bundle
from histostream.export.graph.model import GraphError, check_graph
from histostream.export.parity import LIMITS, Limits, ParityError
from histostream.export.tiles import collect_tiles
from histostream.export.trained import export_checkpoint, trained_network
from histostream.runtime.bundle.card import CardError, default_bundle, read_card, read_file
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.engines.tensorrt.file import read_engine
from histostream.runtime.errors import EngineError
from histostream.training import checkpoint
from histostream.training.checkpoint import CheckpointError
from histostream.training.methods.imems import method as imems
from histostream.wsi.errors import OutputError
from histostream.wsi.optional import install_command
from histostream.wsi.outputs.label_rows import ClassInfo
from tests.export.networks import (
    GroupNormNet,
    PyramidNet,
    TileNetwork,
    TranslationNet,
    TransposedNet,
    train_briefly,
)

CLASSES = (ClassInfo("background", (255, 255, 255)), ClassInfo("nucleus", (0, 0, 255)))
QUICK = Options(precisions=("fp32",), tensorrt="off", tile_px=64)


def test_a_bundle_says_what_it_holds(tiny_bundle: Path) -> None:
    card = read_card(tiny_bundle)
    assert (card.method, card.mpp, card.tile_px, card.align_px) == ("imems", 0.5, 128, 4)
    assert [c.name for c in card.classes] == ["ground", "gland", "nucleus"]
    assert not card.tile_statistics
    assert card.note == "Tiny and untrained."
    assert read_file(tiny_bundle, card, "model.onnx")
    figures = card.parity["model.onnx"]
    assert figures["label_agreement"] >= 0.9999
    assert figures["dark_label_agreement"] >= 0.999
    assert figures["pixels"] == figures["tiles"] * 128 * 128
    assert figures["source"] == "synthetic slide"
    assert len(figures["dice"]) == 3


def test_the_graph_is_fit_for_deployment(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "model.onnx")
    check_graph(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds[:2] == ["Cast", "Transpose"]  # TensorRT refuses a uint8 transpose
    assert kinds[-1] == "Cast"
    assert not {"Dropout", "If", "Loop"} & set(kinds)
    (tiles,) = model.graph.input
    assert tiles.type.tensor_type.elem_type == TensorProto.UINT8
    assert tiles.type.tensor_type.shape.dim[0].dim_param
    assert str(Path(__file__).parents[2]) not in str(model)  # no path of this machine


def test_forbidden_nodes_are_named() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    node = helper.make_node("Dropout", ["x"], ["y"], name="sneaky")
    model = helper.make_model(helper.make_graph([node], "g", [value], [out]))
    with pytest.raises(GraphError, match="'sneaky' is a Dropout"):
        check_graph(model)


# --- The networks of the methods to come, in every precision and as an engine. ---


def taught(network: TileNetwork, tile_px: int = 64) -> bundles.Network:
    tiles = collect_tiles(
        None, tile_px=tile_px, channels=network.channels, mpp=0.5, classes=tuple(c.name for c in CLASSES), count=8
    )
    assert tiles.truth is not None
    train_briefly(network, torch.from_numpy(tiles.gate), torch.from_numpy(tiles.truth))
    if isinstance(network, TranslationNet):
        network.fold()
    return trained_network(
        network, method="operators", classes=CLASSES, mpp=0.5, channels=network.channels, tile_px=tile_px
    )


NETWORKS: dict[str, Callable[[], TileNetwork]] = {
    "pyramid": PyramidNet,
    "translation": lambda: TranslationNet(64),
    "layer norm": lambda: TranslationNet(64, norm="layer"),
    "group norm": GroupNormNet,
    "transposed": lambda: TransposedNet(classes=2),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> bundles.Network:
    torch.manual_seed(4)
    return taught(NETWORKS[request.param]())


@pytest.mark.full
def test_every_method_s_operators_export_in_every_precision_and_build(network: bundles.Network, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX to build with")
    said: list[str] = []
    export = write_bundle(network, tmp_path / "out", Options(tile_px=64), say=said.append)
    assert export.failures == ()
    card = read_card(tmp_path / "out")
    assert card.digest() == export.card.digest()
    assert list(card.files) == ["model.onnx", "model.fp16.onnx", "model.int8.onnx", "engines/model.fp16.rtx.engine"]
    for name, sha256 in card.files.items():
        content = (tmp_path / "out" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
    tiles = collect_tiles(None, tile_px=64, channels=card.channels, mpp=0.5, classes=(), count=8).gate
    wanted = network.reference(tiles).argmax(axis=1)
    assert 0.01 < wanted.mean() < 0.99  # it learnt to see both classes
    for precision, limits in LIMITS.items():
        engine = open_engine(tmp_path / "out", backend="cpu", precision=precision)
        assert engine.name.endswith(precision)
        labels = engine.infer(tiles).argmax(axis=1)
        assert (labels == wanted).mean() >= limits.agreement, precision
        file = {"fp32": "model.onnx"}.get(precision, f"model.{precision}.onnx")
        assert card.parity[file]["label_agreement"] >= limits.agreement
    header, plan = read_engine(tmp_path / "out" / "engines" / "model.fp16.rtx.engine")
    assert header.card == card.digest()
    assert header.onnx_sha256 == card.files["model.fp16.onnx"]
    assert header.precision_map == card.precision["fp16"]
    assert len(plan) == header.plan_bytes > 0
    kinds = {
        precision: {n.op_type for n in onnx.load(tmp_path / "out" / file).graph.node}
        for precision, file in (("fp16", "model.fp16.onnx"), ("int8", "model.int8.onnx"))
    }
    assert "QuantizeLinear" in kinds["int8"]
    half = onnx.load(tmp_path / "out" / "model.fp16.onnx").graph.initializer
    assert any(t.data_type == TensorProto.FLOAT16 for t in half)


@pytest.mark.full
def test_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(4)
    network = taught(TransposedNet(classes=2))
    for name in ("one", "two"):
        write_bundle(network, tmp_path / name, Options(tensorrt="off", tile_px=64))
    files = read_card(tmp_path / "one").files
    assert files == read_card(tmp_path / "two").files
    assert len(files) == 3


@pytest.mark.full
def test_frozen_statistics_make_tiles_agree_and_the_card_says_what_it_cost(wsi_slides: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    network = taught(GroupNormNet())
    slide = wsi_slides / "CMU-1-Small-Region.svs"
    live = write_bundle(network, tmp_path / "live", QUICK).card
    frozen = write_bundle(network, tmp_path / "frozen", replace(QUICK, freeze=slide)).card
    assert live.tile_statistics
    assert not frozen.tile_statistics
    assert (live.halo_px, live.align_px) == (frozen.halo_px, frozen.align_px)
    record = frozen.precision["fp32"]
    assert record["statistics_frozen_over"] == slide.name
    assert 0.5 < record["frozen_against_live"]["label_agreement"] < 1
    # A pixel more than a halo away from a change does not notice it; live, it does.
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (1, 64, 64, 1), np.uint8)
    other = one.copy()
    other[:, :, 32 + frozen.halo_px + 1 :] = 255
    notices = {}
    for name in ("live", "frozen"):
        engine = open_engine(tmp_path / name, backend="cpu")
        a, b = engine.infer(one), engine.infer(other)
        notices[name] = not np.array_equal(a[..., :32], b[..., :32])
    assert notices == {"live": True, "frozen": False}


@pytest.mark.full
def test_where_there_is_nothing_to_freeze_nothing_is_changed(
    imems_network: bundles.Network, wsi_slides: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    slide = wsi_slides / "CMU-1-Small-Region.svs"
    plain = write_bundle(imems_network, tmp_path / "plain", QUICK).card
    frozen = write_bundle(imems_network, tmp_path / "frozen", replace(QUICK, freeze=slide), say=said.append).card
    assert any("nothing to freeze" in line for line in said)
    assert frozen.files == plain.files
    assert frozen.precision == {}


# --- Failing. ---


@pytest.fixture
def imems_network(tiny_checkpoint: Path) -> bundles.Network:
    said = checkpoint.read(tiny_checkpoint)
    state = imems.build(imems.Config(**said.config), 3)
    checkpoint.load(tiny_checkpoint, state)
    classes = tuple(ClassInfo(name, color) for name, color in said.classes)
    return trained_network(imems.deployed(state), method="imems", classes=classes, mpp=0.5, channels=3, tile_px=64)


@pytest.mark.full
def test_a_graph_that_is_not_the_network_is_never_written(imems_network: bundles.Network, tmp_path: Path) -> None:
    def other(tiles: np.ndarray) -> np.ndarray:
        return imems_network.reference(tiles)[:, ::-1].copy()

    with pytest.raises(ParityError, match=r"fp32: .* of the labels agree .* nothing was written"):
        write_bundle(replace(imems_network, reference=other), tmp_path / "out", QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_a_failed_export_leaves_the_old_bundle(
    tiny_bundle: Path, imems_network: bundles.Network, tmp_path: Path
) -> None:
    out = shutil.copytree(tiny_bundle, tmp_path / "bundles" / "model")
    before = (out / "card.json").read_bytes()
    broken = replace(imems_network, reference=lambda tiles: imems_network.reference(tiles) // 2 * 0)
    with pytest.raises(ParityError):
        write_bundle(broken, out, QUICK)
    assert (out / "card.json").read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["model"]


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_that_cannot_be_healed_is_left_out_and_said(
    imems_network: bundles.Network,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    monkeypatch.setitem(LIMITS, precision, Limits(1.1, 0.0))
    export = write_bundle(imems_network, tmp_path / "out", replace(QUICK, precisions=("fp32", precision)))
    (failure,) = export.failures
    assert failure.startswith(f"{precision}: ")
    assert f"model.{precision}.onnx was not written" in failure
    assert not (tmp_path / "out" / f"model.{precision}.onnx").exists()
    card = read_card(tmp_path / "out")
    assert precision not in card.precisions
    assert precision not in card.precision
    assert list(card.files) == ["model.onnx"]
    with pytest.raises(CardError, match=f"has no {precision} graph, but fp32"):
        open_engine(tmp_path / "out", precision=precision)


def test_a_folder_that_is_no_bundle_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("years of work")
    with pytest.raises(OutputError, match="is not a model bundle"):
        export_checkpoint("imems", tiny_checkpoint, tmp_path)
    assert (tmp_path / "thesis.doc").exists()


def test_a_score_that_is_not_a_number_is_null_in_the_card(tmp_path: Path) -> None:
    """As of a class that no validation image has."""
    config = imems.Config(base_width=4, depth=2, discriminator_width=4)
    record = {"scores": {"validation": {"f_score": [1.0, float("nan")]}}}
    classes = [("ground", (255, 255, 255)), ("gland", (200, 30, 60))]
    contents = checkpoint.Checkpoint("imems", asdict(config), classes, 3, 0.5, 0, record)
    checkpoint.save(tmp_path / "run", contents, imems.build(config, classes=2))
    options = Options(precisions=("fp32",), tensorrt="off", tile_px=128)
    card = export_checkpoint("imems", tmp_path / "run", tmp_path / "bundle", options).card
    assert card.training["scores"] == {"validation": {"f_score": [1.0, None]}}


def test_a_checkpoint_of_another_method_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said = checkpoint.read(tiny_checkpoint)
    state = imems.build(imems.Config(**said.config), 3)
    checkpoint.save(tmp_path / "other", replace(said, method="apma_net"), state)
    with pytest.raises(CheckpointError, match="trained by 'apma_net', not 'imems'"):
        export_checkpoint("imems", tmp_path / "other", tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"precisions": ("fp32", "fp8")}, "precision 'fp8' does not exist: use fp32, fp16, int8"),
        ({"tensorrt": "always"}, "use auto, tensorrt, rtx or off"),
        ({"tile_px": 0}, "tile_px=0"),
        ({"calibrate": Path("nowhere.svs")}, r"nowhere\.svs: does not exist"),
    ],
)
def test_a_wrong_option_is_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Options(**changed)  # type: ignore[arg-type]


def test_a_tile_that_the_network_does_not_take_is_refused_with_the_nearest_that_it_does(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(GraphError, match="66 px: this network takes multiples of 4; use 64 or 68"):
        export_checkpoint("imems", tiny_checkpoint, tmp_path / "out", replace(QUICK, tile_px=66))
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_form_in_onnx_is_named() -> None:
    class Bessel(TileNetwork):
        channels, classes = 3, 2

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def probs(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.special.bessel_j0(self.conv(x))
            return out

    with pytest.raises(GraphError, match=r"node %bessel_j0 .*No ONNX function found") as caught:
        trained_network(Bessel(), method="m", classes=CLASSES, mpp=0.5, channels=3, tile_px=32)
    assert "\n" not in str(caught.value)


def test_a_target_that_the_library_does_not_have_is_refused_before_any_work(
    imems_network: bundles.Network, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX to build with")

    def never(tiles: np.ndarray) -> np.ndarray:
        raise AssertionError("work was done")

    options = replace(QUICK, tensorrt="rtx", targets=("sm86", "sm90"))
    with pytest.raises(EngineError, match="sm90"):
        write_bundle(replace(imems_network, reference=never), tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_without_tensorrt_an_engine_is_left_out_unless_it_was_demanded(
    imems_network: bundles.Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)  # which is how Python says: not installed
    said: list[str] = []
    export = write_bundle(imems_network, tmp_path / "out", replace(QUICK, tensorrt="auto"), say=said.append)
    assert export.failures == ()
    assert any("no engine: " in line and install_command("rtx") in line for line in said)
    with pytest.raises(EngineError, match=r"\[rtx\]"):
        write_bundle(imems_network, tmp_path / "other", replace(QUICK, tensorrt="rtx"))


@pytest.mark.full
def test_triton_gets_every_graph(imems_network: bundles.Network, tmp_path: Path) -> None:
    options = replace(QUICK, precisions=("fp32", "fp16"), triton=tmp_path / "repository")
    write_bundle(imems_network, tmp_path / "mine", options)
    models = sorted(p.name for p in (tmp_path / "repository").iterdir())
    assert models == ["mine_fp16", "mine_fp32"]


def test_a_network_too_large_for_many_tiles_gets_few(
    imems_network: bundles.Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "MAX_MULTIPLY_ACCUMULATES", 1.0)
    card = write_bundle(imems_network, tmp_path / "out", QUICK).card
    assert card.parity["model.onnx"]["tiles"] == 1


def test_the_shipped_bundle_is_what_the_issue_of_models_asks() -> None:
    bundle = default_bundle()
    card = read_card(bundle)
    weights = onnx.load(bundle / "model.onnx").graph.initializer
    assert sum(int(np.prod(w.dims)) for w in weights) <= 2_500_000
    assert [c.name for c in card.classes] == ["background", "nucleus"]
    scores = card.training["scores"]["test"]
    assert scores["f_score"][1] >= 0.80
    assert scores["pixel_accuracy"] > 0.85
    assert json.dumps(card.training["recipe"])
    assert "fails" in card.note
    assert asdict(card)["halo_px"] == 122

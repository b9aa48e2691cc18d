"""The gate that heals: planted faults are found, kept in FP32, and nothing else is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from histostream.export.convert.fp16 import FP16_MAX, fp32_islands, name_nodes, to_fp16
from histostream.export.convert.int8 import Quantizer, measure_ranges
from histostream.export.convert.mixed_precision import JudgeConversion, find_mixed_precision, node_groups
from histostream.export.parity import LIMITS, GraphOutput, Judge, Limits, ParityReport, run_graph
from histostream.export.tiles import Tiles, collect_tiles

TILE_PX = 128
CLASSES = ("background", "nucleus")


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    return collect_tiles(None, tile_px=TILE_PX, channels=3, mpp=0.5, classes=CLASSES, count=4)


@pytest.fixture
def model() -> onnx.ModelProto:
    """Return the shipped network, for tiles of 128 px."""
    from histostream.export.trained import shipped_checkpoint, trained_network
    from histostream.training import checkpoint
    from histostream.training.methods.imems import method as imems
    from histostream.wsi.outputs.label_rows import ClassInfo

    folder = shipped_checkpoint("imems")
    said = checkpoint.read(folder)
    state = imems.build(imems.Config(**said.config), len(said.classes))
    checkpoint.load(folder, state)
    classes = tuple(ClassInfo(name, color) for name, color in said.classes)
    network = trained_network(
        imems.deployed(state), method="imems", classes=classes, mpp=0.5, channels=3, tile_px=TILE_PX
    )
    name_nodes(network.model)
    return network.model


def fp16_judge(model: onnx.ModelProto, tiles: Tiles) -> JudgeConversion:
    judge = Judge(tiles, run_graph(model, tiles.gate).unrounded)

    def judged(fp32_nodes: Collection[str], *, quick: bool) -> ParityReport:
        return judge.judge(to_fp16(model, fp32_nodes, emulate=True))

    return judged


def plant_overflow(model: onnx.ModelProto, tiles: Tiles, index: int) -> tuple[str, str]:
    """Scale one convolution up and the next down: the same function, but not in FP16.

    The ReLU between them is homogeneous. Returns the names of the two convolutions.
    """
    tensors = {t.name: t for t in model.graph.initializer}
    convs = [n for n in model.graph.node if n.op_type == "Conv"]
    one, two = convs[index], convs[index + 1]
    factor = 1.5 * FP16_MAX / float(measure_ranges(model, tiles.gate)[one.output[0]][1])
    assert np.abs(numpy_helper.to_array(tensors[one.input[1]])).max() * factor < FP16_MAX
    for name, by in ((one.input[1], factor), (one.input[2], factor), (two.input[1], 1 / factor)):
        value = numpy_helper.to_array(tensors[name]) * np.float32(by)
        tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    return one.name, two.name


@pytest.mark.full
@pytest.mark.parametrize("index", [2, 9])
def test_a_planted_overflow_is_found_and_kept_in_fp32(model: onnx.ModelProto, tiles: Tiles, index: int) -> None:
    before = run_graph(model, tiles.gate).unrounded
    one, two = plant_overflow(model, tiles, index)
    after = run_graph(model, tiles.gate).unrounded
    assert np.abs(before - after).max() <= 1 / 255  # in FP32 nothing has changed
    judged = fp16_judge(model, tiles)
    islands = fp32_islands(model)
    assert not judged(islands, quick=False).meets(LIMITS["fp16"])
    found = find_mixed_precision(model, judged, LIMITS["fp16"], islands)
    assert found.passed
    assert {one, two} <= set(found.added)
    groups = {group[0]: group for group in node_groups(model, islands)}
    assert set(found.added) == {*groups[one], *groups[two]}  # and nothing else
    assert found.report.meets(LIMITS["fp16"])
    assert [s["passed"] for s in found.steps].count(True) >= 1
    assert set(found.fp32_nodes) == islands | set(found.added)


def test_a_sound_network_needs_no_healing(model: onnx.ModelProto, tiles: Tiles) -> None:
    judged = fp16_judge(model, tiles)
    found = find_mixed_precision(model, judged, LIMITS["fp16"], fp32_islands(model))
    assert found.passed
    assert found.added == ()
    assert len(found.steps) == 1


@pytest.mark.full
def test_what_cannot_be_healed_does_not_pass(model: onnx.ModelProto, tiles: Tiles) -> None:
    judged = fp16_judge(model, tiles)
    found = find_mixed_precision(model, judged, Limits(1.1, 0.0), fp32_islands(model))
    assert not found.passed


@pytest.mark.full
def test_int8_that_loses_too_much_is_healed_by_the_groups_that_lose_most(model: onnx.ModelProto, tiles: Tiles) -> None:
    judge = Judge(tiles, run_graph(model, tiles.gate).unrounded)
    islands = fp32_islands(model)
    with Quantizer(model, tiles.calibration) as quantizer:

        def judged(fp32_nodes: Collection[str], *, quick: bool) -> ParityReport:
            return judge.judge(quantizer.quantize(fp32_nodes))

        whole = judged(islands, quick=False)
        # Half of what is lost may be lost: there is something to do, and it can be done.
        limits = Limits(1 - (1 - whole.label_agreement) / 2, 1.0)
        assert not whole.meets(limits)
        found = find_mixed_precision(model, judged, limits, islands)
        assert found.passed
        assert 0 < len(found.added) < len(model.graph.node) - len(islands)
        quantised = quantizer.quantize(found.fp32_nodes)
    kept = {n.name: n for n in quantised.graph.node}
    producers = {name: n.op_type for n in quantised.graph.node for name in n.output}
    for name in found.added:
        if kept[name].op_type == "Conv":
            assert producers.get(kept[name].input[1]) != "DequantizeLinear"
    assert any(n.op_type == "QuantizeLinear" for n in quantised.graph.node)


def test_int8_weights_use_seven_bits_so_that_no_cpu_saturates(model: onnx.ModelProto, tiles: Tiles) -> None:
    with Quantizer(model, tiles.calibration) as quantizer:
        quantised = quantizer.quantize(fp32_islands(model))
    weights = [
        numpy_helper.to_array(t)
        for t in quantised.graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
    ]
    assert len(weights) == sum(n.op_type == "Conv" for n in model.graph.node) - 1
    assert max(np.abs(w.astype(int)).max() for w in weights) <= 64


@pytest.mark.full
def test_ranges_are_those_of_the_tensors_however_many_sessions_it_takes(
    model: onnx.ModelProto, tiles: Tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = measure_ranges(model, tiles.calibration)
    monkeypatch.setattr("histostream.export.convert.int8.MAX_WATCHED_BYTES", 1)
    many = measure_ranges(model, tiles.calibration[:1])
    assert one.keys() == many.keys()
    assert all(one[k][0] <= many[k][0] + 1e-4 for k in one)
    assert all(one[k][1] >= many[k][1] - 1e-4 for k in one)
    relus = [n.output[0] for n in model.graph.node if n.op_type == "Relu"]
    assert all(one[name][0] >= 0 for name in relus)
    scaled = next(n.output[0] for n in model.graph.node if n.op_type == "Sub")
    pixels = tiles.calibration / 127.5 - 1
    assert one[scaled][0] == pytest.approx(pixels.min(), abs=1e-6)
    assert one[scaled][1] == pytest.approx(pixels.max(), abs=1e-6)


def output(scores: NDArray[np.float32], not_finite: int = 0) -> GraphOutput:
    """Return what a graph with these scores gives."""
    labels = scores.argmax(axis=1)
    return GraphOutput(scores.astype(np.float16), scores, labels, labels, not_finite)


def test_the_truth_decides_by_how_much_a_dice_changed(tiles: Tiles) -> None:
    assert tiles.truth is not None
    reference = np.stack([(tiles.truth == k).astype(np.float32) for k in (0, 1)], axis=1)
    judge = Judge(tiles, reference)
    assert judge.report(output(reference), "perfect").meets(LIMITS["fp32"])
    worse = reference.copy()
    worse[:, :, :40] = reference[:, ::-1, :40]  # the classes swapped in some rows
    report = judge.report(output(worse), "worse")
    assert report.dice_change > 0.1
    assert report.label_agreement == pytest.approx(1 - 40 / TILE_PX)
    assert not report.meets(LIMITS["int8"])
    # Without a truth the reference's labels stand for it.
    blind = Judge(replace(tiles, truth=None), reference).report(output(worse), "blind")
    low = min(d for d in blind.dice if d is not None)
    assert blind.dice_change == pytest.approx(1 - low)


def test_scores_that_are_not_finite_never_pass(tiles: Tiles) -> None:
    reference = np.zeros((len(tiles.gate), 2, TILE_PX, TILE_PX), np.float32)
    report = Judge(tiles, reference).report(output(reference, not_finite=3), "lost")
    assert not report.meets(Limits(0.0, 1.0))
    assert "3 scores not finite" in str(report)


def test_tiles_of_a_real_slide_are_tissue_from_dark_to_pale(wsi_slides: Path) -> None:
    slide = wsi_slides / "CMU-1-Small-Region.svs"
    found = collect_tiles(slide, tile_px=256, channels=3, mpp=0.5, classes=CLASSES, count=6)
    assert found.gate.shape == found.calibration.shape == (6, 256, 256, 3)
    assert found.truth is None
    for some in (found.gate, found.calibration):
        means = some.mean(axis=(1, 2, 3))
        assert (np.diff(means) >= 0).all()
        assert means[0] < 160 < means[-1]  # both halves have dark tiles and pale ones
    flat = {t.tobytes() for t in found.gate} & {t.tobytes() for t in found.calibration}
    assert not flat


def test_tiles_of_annotated_images_bring_their_truth(data_dir: Path) -> None:
    folder = data_dir / "nuclei-dsb2018" / "brightfield"
    found = collect_tiles(folder, tile_px=512, channels=3, mpp=0.5, classes=CLASSES, count=3)
    assert found.truth is not None
    assert found.truth.shape == found.gate.shape[:3]
    inside = found.gate[found.truth == 1].mean()
    assert inside < found.gate[found.truth == 0].mean()  # nuclei are darker


def test_grey_networks_get_grey_tiles_and_images_need_no_resolution(data_dir: Path) -> None:
    folder = data_dir / "em-epfl-hippocampus" / "test" / "images"
    found = collect_tiles(folder, tile_px=256, channels=1, mpp=0.5, classes=("a", "b"), count=2)
    assert found.gate.shape == (2, 256, 256, 1)

"""histo-bench as a user runs it: small slides, a tiny network, real clocks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from histostream.benchmarks import peak_rates, speed
from histostream.benchmarks.cli import main
from histostream.benchmarks.flops import count_flops
from histostream.benchmarks.plots import roofline_png, stages_png
from histostream.benchmarks.report import write_together
from histostream.benchmarks.stages import ALONE, Contender, Setup
from histostream.export.convert.fp16 import multiply_accumulates
from histostream.runtime.bundle.card import default_bundle
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.hardware import hardware
from histostream.runtime.options import Options
from histostream.wsi.errors import OutputError
from histostream.wsi.optional import install_command
from histostream.wsi.synthetic import SyntheticSlide
from tests.runtime.host_device import HostDevice, HostDeviceEngine

FILES = {"bench.json", "bench.md", "stages.png", "roofline.png"}
SLIDE_PX = (320, 224)  # of a network with tiles of 128 px that share 32


def bench(*arguments: object) -> Result:
    """Run a command in this process: starting Python and torch takes longer than measuring."""
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def one_clear_line(done: Result) -> str:
    """Return the complaint: status 1, one line, nothing else."""
    assert done.exit_code == 1, done.output
    lines = [ln for ln in done.stderr.splitlines() if ln.startswith("histo-bench: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture(scope="module", autouse=True)
def _small_probes() -> Any:
    """Measure peak rates with small matrices: here it matters that they are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak_rates, "SIDES", {"cpu": (128,), "gpu": (128,)})
        patch.setattr(peak_rates, "COPY_BYTES", {"cpu": 1 << 20, "gpu": 1 << 20})
        yield


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one sweep over batches, backends and tiles."""
    out = tmp_path_factory.mktemp("bench") / "out"
    done = bench(
        "--model",
        tiny_bundle,
        "--synthetic",
        "x".join(map(str, SLIDE_PX)),
        "--backend",
        "cpu,openvino",
        "--batch",
        "1,3",
        "--tile",
        "auto,64",
        "--repeats",
        2,
        "--out",
        out,
    )
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def found(measured: Path) -> dict[str, Any]:
    return dict(json.loads((measured / "bench.json").read_text()))


# ----------------------------------------------------------------------------- run


@pytest.mark.full
def test_all_files_are_there_and_nothing_half_written(measured: Path) -> None:
    assert {p.name for p in measured.iterdir()} == FILES


@pytest.mark.full
def test_every_combination_is_measured(found: dict[str, Any]) -> None:
    runs = found["runs"]
    assert {(r["engine"].split()[0], r["batch"], r["tile_px"]) for r in runs} == {
        (engine, batch, tile) for engine in ("onnxruntime", "openvino") for batch in (1, 3) for tile in (128, 64)
    }
    assert len(set(speed.labels(runs))) == len(runs) == 8


@pytest.mark.full
def test_every_tile_and_pixel_of_the_slide_counts(found: dict[str, Any]) -> None:
    width, height = SLIDE_PX
    for run in found["runs"]:
        assert run["mpx"] == pytest.approx(width * height / 1e6, abs=5e-4)
        stride = run["tile_px"] - run["overlap_px"]
        columns, rows = (-(-(side - run["tile_px"]) // stride) + 1 for side in SLIDE_PX)
        assert run["tiles"] == run["tiles_held"] == columns * rows


@pytest.mark.full
def test_figures_are_positive_and_consistent(found: dict[str, Any]) -> None:
    assert found["repeats"] == 2
    for run in found["runs"]:
        assert list(run["stages"]) == [*ALONE, "end_to_end"]
        for stage in run["stages"].values():
            assert len(stage["every_seconds"]) == 2
            assert all(s > 0 for s in stage["every_seconds"])
            assert stage["seconds"] == pytest.approx(np.median(stage["every_seconds"]), abs=2e-6)
            product = stage["mpx_per_s"] * stage["seconds"]
            assert product == pytest.approx(run["mpx"], rel=0.05)
        bound = run["bound_by"]["stage"]
        assert run["stages"][bound]["seconds"] == max(run["stages"][s]["seconds"] for s in ALONE)
        assert run["bound_by"]["share_of_end_to_end"] > 0
        assert run["end_to_end_of_bare_engine"] > 0
        assert run["cores_busy"] > 0


@pytest.mark.full
def test_stages_inside_a_run_sum_to_no_more_than_all_of_it(found: dict[str, Any]) -> None:
    for run in found["runs"]:
        inside = dict(run["inside_end_to_end_s"])
        total = inside.pop("total")
        assert {"read", "infer", "write"} <= set(inside)
        # Medians of two repeats, each rounded to a millisecond.
        assert 0 < sum(inside.values()) <= total + 0.001 * len(inside)
        assert total <= run["stages"]["end_to_end"]["seconds"] + 0.001


@pytest.mark.full
def test_the_roofline_follows_from_the_ceilings(found: dict[str, Any]) -> None:
    ceiling = found["ceilings"]["cpu"]
    peak, memory = ceiling["gflop_per_s"]["fp32"]["rate"], ceiling["gbyte_per_s"]["rate"]
    assert peak > 0
    assert memory > 0
    for run in found["runs"]:
        roof = run["roofline"]
        assert roof["peak"] == "fp32"
        wanted = min(peak, roof["flop_per_byte"] * memory)
        assert roof["roof_gflop_per_s"] == pytest.approx(wanted, rel=0.01, abs=0.1)
        fastest = min(run["stages"]["engine"]["every_seconds"])
        attained = roof["gflop_per_tile"] * run["tiles"] / fastest
        assert roof["gflop_per_s"] == pytest.approx(attained, rel=0.05)
        share = roof["gflop_per_s"] / roof["roof_gflop_per_s"]
        assert roof["share_of_roof"] == pytest.approx(share, rel=0.02, abs=0.001)


@pytest.mark.full
def test_the_page_has_a_row_for_every_run(measured: Path, found: dict[str, Any]) -> None:
    page = (measured / "bench.md").read_text()
    for label in speed.labels(found["runs"]):
        assert page.count(f"| {label} |") == 3  # speed, inside, roofline
    assert str(hardware()["cpu"]) in page
    for table in page.split("\n\n"):
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, table


@pytest.mark.full
@pytest.mark.parametrize("name", ["stages.png", "roofline.png"])
def test_pictures_show_something(measured: Path, name: str) -> None:
    with Image.open(measured / name) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert 0.01 < float((pixels < 200).any(axis=2).mean()) < 0.7
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert border.min() > 240, "something is cut off"


@pytest.mark.full
def test_pictures_are_drawn_without_ceilings(found: dict[str, Any], tmp_path: Path) -> None:
    bare = {**found, "ceilings": {}, "runs": found["runs"][:1]}
    roofline_png(bare, tmp_path / "a.png")
    stages_png(bare, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300


@pytest.mark.full
def test_a_backend_that_is_not_usable_is_listed_with_the_reason(tiny_bundle: Path, tmp_path: Path) -> None:
    done = bench(
        "run",
        "--model",
        tiny_bundle,
        "--synthetic",
        "256x256",
        "--backend",
        "cpu",
        "--precision",
        "fp32,int8",
        "--repeats",
        1,
        "--out",
        tmp_path,
    )
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "bench.json").read_text())
    (refused,) = said["not_usable"]
    assert "has no int8 graph" in refused["reason"]
    assert refused["reason"] in done.stdout
    assert len(said["runs"]) == 1


def test_more_tiles_than_are_held_stand_for_a_large_slide(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histostream.benchmarks.stages.HELD_BYTES", 5 * 3 * 128**2)
    slide = tmp_path / "slide.tif"
    SyntheticSlide(512, 512).write(slide)
    setup = Setup(tiny_bundle, "cpu", batch=2)
    contender = Contender(setup, slide, Options(tissue=False), tmp_path)
    assert len(contender.tiles) == 5 < contender.tile_count
    sizes = [len(batch) for batch in contender._batches(contender.tile_count)]
    assert sum(sizes) == contender.tile_count
    assert set(sizes[:-1]) == {2}
    contender.measure()
    assert contender.measured.run["grid"]["tiles_inferred"] == contender.tile_count


@pytest.mark.full
def test_an_engine_with_a_device_is_measured_on_it(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = open_engine(tiny_bundle, backend="cpu")
    engine = HostDeviceEngine(inner, HostDevice())
    monkeypatch.setattr("histostream.benchmarks.stages.open_engine", lambda *a, **k: engine)
    width, height = 310, 270  # no multiple of anything: the last tiles are shifted
    slide = tmp_path / "slide.tif"
    SyntheticSlide(width, height).write(slide)
    contender = Contender(Setup(tiny_bundle, batch=2), slide, Options(tissue=False), tmp_path)
    assert contender.resident
    assert contender.device == "gpu"
    contender.measure()
    assert all(len(found) == 1 and found[0] > 0 for found in contender.measured.seconds.values())
    assert contender.measured.run["grid"]["tiles_inferred"] == contender.tile_count == 9


def test_files_are_written_all_or_none(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="no room to write"):
        write_together(tmp_path, {"a.json": "{}", "b.png": fails})
    assert not list(tmp_path.iterdir())
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OutputError, match="a folder is in the way"):
        write_together(tmp_path, {"a.json": "{}", "b.png": "x"})
    assert [p.name for p in tmp_path.iterdir()] == ["b.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1,x"], "'--batch': 'x' is no number from 1"),
        (["--batch", "0"], "'--batch': '0' is no number"),
        (["--tile", "-64"], "'--tile': '-64' is no number"),
        (["--backend", "cpu,abacus"], "'abacus' is none of auto, cpu"),
        (["--precision", "fp8"], "'fp8' is none of auto, fp32"),
        (["compare", "--method", "imens"], "did you mean 'imems'?"),
    ],
)
def test_a_wrong_call_ends_with_status_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = bench(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--synthetic", "4096"], "--synthetic 4096: is not a size"),
        (["--repeats", "0"], "--repeats 0: use 1 or more"),
        (["--threads", "0"], "threads=0: use 1 or more"),
        (["--model", "nowhere"], "nowhere: not a model bundle"),
        (["--slide", "nowhere.svs"], "nowhere.svs: there is no such file"),
        (["compare", "--tiles", "0"], "--tiles 0: use 1 or more"),
        (["compare", "--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_a_bad_option_is_one_clear_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = bench(*arguments, "--out", tmp_path / "out")
    assert said in one_clear_line(done)
    assert not (tmp_path / "out").exists()


def test_a_tile_that_the_network_cannot_take_is_one_clear_line(tiny_bundle: Path, tmp_path: Path) -> None:
    done = bench("--model", tiny_bundle, "--synthetic", "256x256", "--tile", 99, "--out", tmp_path / "out")
    assert "--tile 99: this model takes multiples of 4" in one_clear_line(done)


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [("run", "matplotlib", "bench"), ("run", "onnx", "bench"), ("compare", "torch", "export")],
)
def test_a_missing_package_is_one_line_with_what_to_install(
    command: str, missing: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; "
        f"from histostream.benchmarks.cli import main; main([{command!r}, '--out', 'out'])"
    )
    monkeypatch.chdir(tmp_path)  # where the advice is given
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"histo-bench: {missing} is not installed: {install_command(extra)}"]
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- counting work


def graph(nodes: list[Any], weights: dict[str, NDArray[Any]], out: list[int]) -> onnx.ModelProto:
    """Return a network of tiles (N, 8, 8, 3), which it is given as float32."""
    inputs = [helper.make_tensor_value_info("tiles", TensorProto.FLOAT, ["N", 8, 8, 3])]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", *out])]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = helper.make_graph(nodes, "test", inputs, outputs, tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    onnx.checker.check_model(model)
    return model


def test_operations_and_bytes_are_those_of_a_calculation_by_hand() -> None:
    model = graph(
        [
            helper.make_node("Transpose", ["tiles"], ["x"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["x", "w", "b"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("ConvTranspose", ["r", "t"], ["u"], strides=[2, 2]),
            helper.make_node("MatMul", ["u", "m"], ["scores"]),
        ],
        {
            "w": np.ones((4, 3, 3, 3), np.float32),
            "b": np.ones(4, np.float32),
            "t": np.ones((4, 2, 2, 2), np.float32),
            "m": np.ones((8, 5), np.float32),
        },
        [2, 8, 5],
    )
    conv = 4 * 4 * 4 * (3 * 3 * 3)  # outputs, times the kernel of each
    transposed = 4 * 4 * 4 * (2 * 2 * 2)  # inputs, times the kernel of each
    product = 2 * 8 * 5 * 8  # outputs, times the length of a row
    flops = 2 * (conv + transposed + product)
    pixels, small, large, scores = 8 * 8 * 3, 4 * 4 * 4, 2 * 8 * 8, 2 * 8 * 5
    per_tile = (pixels + pixels) + (pixels + small) + (small + small) + (small + large) + (large + scores)
    weights = 4 * 27 + 4 + 4 * 2 * 2 * 2 + 8 * 5
    for batch in (1, 4):
        work = count_flops(model, batch)
        assert work.flops == flops
        assert work.bytes == 4 * (per_tile + weights / batch)
        assert work.intensity == work.flops / work.bytes


def test_a_quantised_graph_counts_the_same_operations_on_8_bit_tensors() -> None:
    scale, zero = np.array(0.5, np.float32), np.array(0, np.uint8)
    model = graph(
        [
            helper.make_node("Transpose", ["tiles"], ["x"], perm=[0, 3, 1, 2]),
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
            helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["w"]),
            helper.make_node("Conv", ["xd", "w"], ["scores"]),
        ],
        {"s": scale, "z": zero, "wq": np.ones((2, 3, 1, 1), np.uint8)},
        [2, 8, 8],
    )
    work = count_flops(model)
    assert work.flops == 2 * 64 * 2 * 3
    transposed = 4 * 192 + 192  # float32 in, 8 bits out
    convolved = 192 + 6 + 4 * 128  # 8 bits in, float32 out
    assert work.bytes == transposed + convolved


def test_the_shipped_model_counts_as_its_export_does() -> None:
    model = onnx.load(default_bundle() / "model.onnx")
    assert count_flops(model).flops == 2 * multiply_accumulates(model)


@pytest.mark.full
def test_probes_measure_something_and_say_what_is_missing() -> None:
    probes, missing = peak_rates.open_probes("cpu", ("fp32", "int8"))
    assert {p.kind for p in probes} == {"fp32", "int8", "copy"}
    assert not missing
    assert all(p.rate() > 0 for p in probes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openvino", None)
        probes, missing = peak_rates.open_probes("cpu", ("fp32",))
    assert missing == ["openvino is not installed"]
    assert {p.kind for p in probes} == {"fp32", "copy"}


# ----------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def compared(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    out = tmp_path_factory.mktemp("compare")
    done = bench(
        "compare",
        "--model",
        tiny_bundle,
        "--checkpoint",
        tiny_checkpoint,
        "--tiles",
        3,
        "--batch",
        2,
        "--repeats",
        2,
        "--out",
        out,
    )
    assert done.exit_code == 0, done.output
    assert {p.name for p in out.iterdir()} == {"compare.json", "compare.md"}
    return json.loads((out / "compare.json").read_text()), done.stdout


@pytest.mark.full
def test_compare_has_a_number_or_a_reason_for_every_contender(
    compared: tuple[dict[str, Any], str],
) -> None:
    said, page = compared
    ran = {c["name"] for c in said["contenders"]}
    refused = {c["name"]: c["reason"] for c in said["not_usable"]}
    assert not ran & set(refused)
    assert ran | set(refused) == {
        "torch eager fp32",
        "torch AMP",
        "torch compile",
        *(
            f"{b} {p}"
            for b in ("onnxruntime cpu", "onnxruntime cuda", "openvino", "tensorrt")
            for p in ("fp32", "fp16", "int8")
        ),
    }
    assert {"torch eager fp32", "onnxruntime cpu fp32", "openvino fp32"} <= ran
    assert refused["openvino int8"] == "the bundle has no int8 graph"
    assert "--compile" in refused["torch compile"]
    for name in ran | set(refused):
        assert name in page
    assert all(refused.values())


@pytest.mark.full
def test_compare_gives_the_same_labels_everywhere(compared: tuple[dict[str, Any], str]) -> None:
    said, _ = compared
    assert said["tiles"] == 3
    for row in said["contenders"]:
        assert row["mpx_per_s"] > 0
        assert row["ratio_to_torch_eager"] > 0
        assert len(row["every_seconds"]) == 2
        # Untrained, classes are all but equal: half precision flips more than a trained one would.
        assert row["label_agreement"] >= (0.8 if "AMP" in row["name"] else 0.999), row
    first = said["contenders"][0]
    assert (first["name"], first["ratio_to_torch_eager"]) == ("torch eager fp32", 1.0)
    assert first["label_agreement"] == 1.0


def test_compare_refuses_a_checkpoint_of_another_network(tiny_bundle: Path) -> None:
    line = one_clear_line(bench("compare", "--model", tiny_bundle))
    assert "ground, gland, nucleus" in line
    assert "--checkpoint" in line

"""``histo-export`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from histostream.export.cli import main as export_main
from histostream.runtime.bundle.card import read_card
from histostream.runtime.cli import main as infer_main
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.pixels import segment_pixels
from histostream.wsi.optional import install_command
from histostream.wsi.slides.reader import open_slide
from tests.commands import call

MEAN, STD = "0.5,0.4,0.5", "0.2,0.25,0.2"


def run(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return call({"export": export_main, "infer": infer_main}[command], *arguments)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what ``histo-export --method imems`` writes, in all precisions and with an engine."""
    out = tmp_path_factory.mktemp("exported") / "imems"
    done = run("export", "--method", "imems", "--out", out, "--tile", 256)
    assert done.returncode == 0, done.stderr
    for precision in ("fp32", "fp16", "int8"):
        assert f"{precision}: " in done.stdout
    assert "of the labels agree" in done.stdout
    return out


@pytest.fixture(scope="module")
def crop(wsi_slides: Path) -> np.ndarray:
    """Return a piece of a real slide, at the model's resolution."""
    with open_slide(wsi_slides / "CMU-1-Small-Region.svs") as slide:
        return slide.read(0, 600, 600, 700, 500)


@pytest.mark.full
def test_every_artefact_of_one_command_agrees_on_a_real_slide_as_the_card_says(
    exported: Path, crop: np.ndarray
) -> None:
    card = read_card(exported)
    assert card.precisions == ("fp32", "fp16", "int8")
    labels = {
        precision: segment_pixels(crop, open_engine(exported, backend="cpu", precision=precision))
        for precision in card.precisions
    }
    share = (labels["fp32"] == 1).mean()
    assert 0.02 < share < 0.5  # there are nuclei
    for precision, file in (("fp16", "model.fp16.onnx"), ("int8", "model.int8.onnx")):
        said = card.parity[file]["label_agreement"]
        assert (labels[precision] == labels["fp32"]).mean() >= said - 0.005


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_histo_infer_runs_the_graph_that_is_asked_for(
    exported: Path, wsi_slides: Path, tmp_path: Path, precision: str
) -> None:
    roi = {
        "type": "Polygon",
        "coordinates": [[[600, 600], [1200, 600], [1200, 1000], [600, 1000], [600, 600]]],
    }
    (tmp_path / "roi.geojson").write_text(json.dumps(roi))
    done = run(
        "infer",
        wsi_slides / "CMU-1-Small-Region.svs",
        "--model",
        exported,
        "--precision",
        precision,
        "--backend",
        "cpu",
        "--roi",
        tmp_path / "roi.geojson",
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "CMU-1-Small-Region" / "run.json").read_text())
    assert record["model"]["engine"].endswith(f"cpu {precision}")


def test_a_precision_that_the_bundle_does_not_have_is_one_clear_line(tmp_path: Path) -> None:
    from histostream.runtime.bundle.card import default_bundle

    missing = {"fp32", "fp16", "int8"} - set(read_card(default_bundle()).precisions)
    (tmp_path / "slide.svs").write_bytes(b"")
    for precision in missing:
        done = run("infer", tmp_path / "slide.svs", "--precision", precision)
        assert done.returncode == 1
        assert f"has no {precision} graph" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.full
def test_inspect_prints_what_a_bundle_and_an_engine_say_of_themselves(exported: Path) -> None:
    bundle = run("export", "inspect", exported)
    assert bundle.returncode == 0, bundle.stderr
    assert "background, nucleus" in bundle.stdout
    assert "halo 122 px" in bundle.stdout
    assert "model.int8.onnx: 99." in bundle.stdout
    (engine,) = (exported / "engines").iterdir()
    said = run("export", "inspect", engine)
    assert said.returncode == 0, said.stderr
    for words in ("tensorrt-rtx", "sm86", "256", "fp16", read_card(exported).digest()):
        assert words in said.stdout
    for file in (exported / "model.onnx", exported / "nothing"):
        wrong = run("export", "inspect", file)
        assert wrong.returncode == 1
        assert len(wrong.stderr.splitlines()) == 1
        assert str(file) in wrong.stderr


@pytest.mark.full
def test_a_damaged_bundle_is_said_by_inspect(exported: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(exported, tmp_path / "broken")
    (broken / "model.int8.onnx").write_bytes(b"no model")
    done = run("export", "inspect", broken)
    assert done.returncode == 1
    assert "model.int8.onnx does not match card.json" in done.stderr


@pytest.fixture(scope="module")
def monai_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a MONAI U-Net as MONAI's own tool exports it."""
    path = tmp_path_factory.mktemp("monai") / "unet.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks.nets.unet import UNet
        from monai.networks.utils import convert_to_onnx

        torch.manual_seed(0)
        net = UNet(2, 3, 3, channels=(8, 16, 32), strides=(2, 2), norm="batch", num_res_units=1)
        with torch.no_grad():
            head = [m for m in net.modules() if isinstance(m, torch.nn.ConvTranspose2d)][-1]
            head.weight.mul_(30)
        convert_to_onnx(net.eval(), [torch.zeros(1, 3, 128, 128)], filename=str(path))
    return path


def test_a_monai_network_is_wrapped_and_runs_on_a_slide(monai_model: Path, wsi_slides: Path, tmp_path: Path) -> None:
    done = run(
        "export",
        "wrap",
        monai_model,
        "--classes",
        "ground,gland,nucleus",
        "--mpp",
        1.0,
        "--mean",
        MEAN,
        "--std",
        STD,
        "--tile",
        128,
        "--out",
        tmp_path / "wrapped",
        "--calibrate",
        wsi_slides / "CMU-1-Small-Region.svs",
    )
    card = read_card(tmp_path / "wrapped")
    assert (card.method, card.mpp, card.tile_px, card.align_px) == ("foreign", 1.0, 128, 4)
    assert [c.name for c in card.classes] == ["ground", "gland", "nucleus"]
    assert "fp16" in card.precisions
    # Untrained, it may not hold INT8; then the command says so and its exit status too.
    assert done.returncode == (0 if "int8" in card.precisions else 1), done.stderr
    assert ("int8: " in done.stderr) == ("int8" not in card.precisions)
    assert card.parity["model.onnx"]["source"] == "CMU-1-Small-Region.svs"
    assert card.training["file"] == "unet.onnx"
    assert card.training["wrapped_with"]["mean"] == [0.5, 0.4, 0.5]
    ran = run(
        "infer",
        wsi_slides / "CMU-1-Small-Region.svs",
        "--model",
        tmp_path / "wrapped",
        "--out",
        tmp_path / "out",
        "--backend",
        "cpu",
    )
    assert ran.returncode == 0, ran.stderr
    assert "gland" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "imems", "--checkpoint", "nowhere"], "no checkpoint in it"),
        (["--method", "imems", "--tile", 500], "multiples of 16; use 496 or 512"),
        (["--method", "imems", "--calibrate", "gone.svs"], "gone.svs: does not exist"),
        pytest.param(
            ["--method", "imems", "--tensorrt", "rtx", "--targets", "sm90"],
            "sm90",
            marks=pytest.mark.full,
        ),
        (["--method", "imems", "--calibrate", "README.md"], "README.md"),
        (["wrap", "gone.onnx", "--classes", "a,b", "--mpp", 1], "gone.onnx"),
        (["wrap", "README.md", "--classes", "a,b", "--mpp", 1], "README.md"),
    ],
)
def test_a_wrong_option_is_one_clear_line(tmp_path: Path, arguments: list[object], words: str) -> None:
    done = run("export", *arguments, "--out", tmp_path / "bundle")
    assert done.returncode == (2 if "imens" in arguments else 1)
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "imens"], "did you mean 'imems'"),
        (["--method", "imems", "--precision", "fp32,int4"], "'int4' is none of fp32, fp16, int8"),
        (["--method", "imems", "--tensorrt", "maybe"], "'maybe' is not one of 'auto', 'tensorrt', 'rtx', 'off'"),
        (["wrap", "gone.onnx", "--classes", "a,b", "--mpp", 0], "mpp=0.0 is not a positive"),
        (["wrap", "gone.onnx", "--classes", "a,a", "--mpp", 1], "is not different names"),
    ],
)
def test_a_wrong_call_ends_with_status_2(tmp_path: Path, arguments: list[object], words: str) -> None:
    done = run("export", *arguments, "--out", tmp_path / "bundle")
    assert done.returncode == 2
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_method_usage_is_shown() -> None:
    done = run("export")
    assert done.returncode == 2
    assert "--method is missing" in done.stderr


def test_a_missing_package_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the advice is given
    (tmp_path / "onnx.py").write_text("raise ImportError('no', name='onnx')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from histostream.export.cli import main\n"
        "main(['--method', 'imems'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == (f"histo-export: onnx is not installed: {install_command('export')}")


def test_a_checkpoint_that_is_damaged_is_one_clear_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    weights = broken / "checkpoint.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    done = run("export", "--method", "imems", "--checkpoint", broken, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert str(weights) in done.stderr or str(broken) in done.stderr
    assert not (tmp_path / "out").exists()

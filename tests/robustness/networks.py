"""Wrap networks of other libraries, run them on a slide, and compare the labels with ONNX Runtime run directly.

::

    python -m tests.robustness.networks SLIDE --out tests/robustness/results/networks-cpu.json

Each network runs through the code and the command of its section in docs/networks.md as they stand there, then through
``histo-infer --no-tissue``, and with ``--blend crop``. What those make is compared with a program of its own,
which shares no code with them: OpenSlide reads the pixels, ONNX Runtime runs the file that the library exported, and
NumPy normalises the pixels and joins the tiles, in double precision. The weights are random, of seed 0; statistics of
batch normalisation and the scale of the last layer are fitted to tiles of the slide, so that all classes occur.

The libraries must be installed (segmentation-models-pytorch, monai, torchvision, transformers, nnunetv2; keras,
tensorflow and tf2onnx). A network whose library is not there is left out, and the result file says so. The slide must
have a resolution of 0.49 to 0.51 um per pixel, so that the networks, which are wrapped at 0.5 um, see its own pixels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from histostream.runtime.hardware import hardware
from histostream.wsi.files import json_text
from tests.conftest import REPOSITORY
from tests.docs.pages import blocks
from tests.robustness.networks_reference import (
    NOT_ANALYSED,
    Format,
    Labels,
    Pixels,
    Reference,
    agreement,
    read_pixels,
    reference_labels,
)
from tests.robustness.networks_weights import Fit, keras_unet, nnunet_fold, segformer, state_dict

PAGE = REPOSITORY / "docs" / "networks.md"
LEAST_AGREEMENT = 0.999
QUICK = ("--precision", "fp32", "--tensorrt", "off")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PLAIN = Format()  # pixels divided by 255
UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True, slots=True)
class Case:
    """A network: the section of the page, what it needs, and what the reference has to know.

    Attributes
    ----------
    section
        Heading of the page under which its code and its command stand.
    packages
        Modules that must be there.
    weights
        Writes the trained weights that the code loads, into the working directory.
    edits
        Words of the section that are replaced, for networks that share one.
    form
        What the network takes and gives, for the reference.
    """

    section: str
    packages: tuple[str, ...]
    weights: Callable[[Pixels], None]
    edits: tuple[tuple[str, str], ...] = ()
    form: Format = PLAIN


def _smp(architecture: str, encoder: str) -> Case:
    def build() -> Any:
        import segmentation_models_pytorch as smp

        return getattr(smp, architecture)(encoder, encoder_weights=None, classes=3)

    fit = Fit(*IMAGENET, heads=("segmentation_head.0",))
    return Case(
        "segmentation_models.pytorch",
        ("segmentation_models_pytorch",),
        lambda images: state_dict(build, "unet.pt", fit, images),
        (('Unet("resnet34"', f'{architecture}("{encoder}"'),),
        Format(*IMAGENET),
    )


def _monai(images: Pixels) -> None:
    def build() -> Any:
        from monai.networks.nets.unet import UNet

        return UNet(2, 3, 3, (16, 32, 64, 128), (2, 2, 2), num_res_units=2)

    state_dict(build, "monai.pt", Fit(*UNIT, heads=("model.2.1.conv.unit0.conv",)), images)


def _lraspp(images: Pixels) -> None:
    def build() -> Any:
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)

    heads = ("classifier.high_classifier", "classifier.low_classifier")
    state_dict(build, "lraspp.pt", Fit(*IMAGENET, heads=heads, output="out"), images)


CASES = {
    "smp-unet": _smp("Unet", "resnet34"),
    "smp-deeplabv3plus": _smp("DeepLabV3Plus", "resnet18"),
    "smp-pspnet": _smp("PSPNet", "resnet34"),
    "monai-unet": Case("MONAI", ("monai",), _monai),
    "torchvision-lraspp": Case("torchvision", ("torchvision",), _lraspp, (), Format(*IMAGENET)),
    "transformers-segformer": Case(
        "transformers",
        ("transformers",),
        lambda images: segformer("segformer", Fit(*IMAGENET), images),
        (),
        Format(*IMAGENET),
    ),
    "nnunet-fold": Case(
        "nnU-Net",
        ("nnunetv2",),
        lambda images: nnunet_fold("Dataset001_Tumour/nnUNetTrainer__nnUNetPlans__2d", Fit(*UNIT), images),
    ),
    "keras-unet": Case(
        "Keras",
        ("keras", "tensorflow", "tf2onnx"),
        lambda images: keras_unet("unet.keras", images),
        (),
        Format(scale=1.0, channels_last=True, output="probabilities"),
    ),
}


@dataclass(frozen=True, slots=True)
class FileCase:
    """A network that is there as a file of its own, ``--files FOLDER``; see `Case` for ``form``."""

    classes: str
    form: Format


FILES = {
    "mean-of-sigmoids": FileCase("background,nucleus", Format(output="foreground")),
    "clamped-sigmoid": FileCase("background,nucleus", Format(output="foreground")),
    "multilabel": FileCase("tumour,stroma", Format(output="sigmoids")),
    "soft-20": FileCase(",".join(f"class {k}" for k in range(20)), Format(output="probabilities")),
    "whole-tile-pool": FileCase("background,tumour,stroma", PLAIN),
}


def section_of(case: Case) -> tuple[str, list[str]]:
    """Return the code of a section of the page, and the words of its command."""
    first = next(
        number
        for number, line in enumerate(PAGE.read_text(encoding="utf-8").splitlines(), 1)
        if line == f"## {case.section}"
    )
    section = [block for block in blocks(PAGE) if block.line > first][:2]
    code, command = section
    text = code.text
    for old, new in case.edits:
        if old not in text:
            raise ValueError(f"{PAGE}: {old!r} is not in the code of the section {case.section}")
        text = text.replace(old, new)
    (words,) = command.commands
    return text, words


def tiles_of(pixels: Pixels, count: int, side: int) -> Pixels:
    """Return tiles from the middle of a slide outwards, (count, side, side, 3)."""
    height, width = pixels.shape[:2]
    random = np.random.default_rng(0)
    ys, xs = (random.integers(n // 5, 4 * n // 5 - side, count) for n in (height, width))
    return np.stack([pixels[y : y + side, x : x + side] for y, x in zip(ys, xs, strict=True)])


def run_case(
    name: str, slide: Path, pixels: Pixels, export_options: Sequence[str] = (), files: Path | None = None
) -> dict[str, Any]:
    """Export, wrap and run a network, and compare its labels; the working directory is used.

    Parameters
    ----------
    name
        Of `CASES` or `FILES`.
    slide, pixels
        The slide, and its pixels (H, W, 3).
    export_options
        Added to the page's command.
    files
        Where the networks of `FILES` are.
    """
    case = CASES.get(name) or FILES[name]
    with _in_folder(name):
        if isinstance(case, Case):
            case.weights(tiles_of(pixels, 6, 256))
            code, words = section_of(case)
            Path("export.py").write_text(code, encoding="utf-8")
            _run([sys.executable, "-W", "ignore", "export.py"])
        else:
            shutil.copy(Path(files or "") / f"{name}.onnx", ".")
            words = ["histo-export", "wrap", f"{name}.onnx", "--classes", case.classes, "--mpp", "0.5"]
        file = Path(words[2])
        started = time.perf_counter()
        wrapped = _run([*words, *export_options], statuses=(0, 1))
        seconds = time.perf_counter() - started
        bundle = Path("bundles") / file.stem
        if not bundle.exists():
            raise RuntimeError(f"{shlex.join(words)}: {wrapped.stderr}")
        card = json.loads((bundle / "card.json").read_text())
        result: dict[str, Any] = {
            "command": shlex.join([*words, *export_options]),
            "wrap_seconds": round(seconds, 1),
            "refused": wrapped.stderr.strip().splitlines(),
            "graphs": sorted(file for file in card["files"] if file.endswith(".onnx")),
            "halo_px": card["halo_px"],
            "tile_statistics": card["tile_statistics"],
        }
        expected: dict[str, Labels] = {}
        for mode, options in (("hann", ()), ("crop", ("--blend", "crop"))):
            # Glass too: which tiles have tissue is not what is compared.
            _run(["histo-infer", str(slide), "--model", str(bundle), "--out", mode, "--no-tissue", *options])
            labels = read_labels(Path(mode) / slide.stem / "labels.tif")
            if not expected:
                grid = json.loads((Path(mode) / slide.stem / "run.json").read_text())["grid"]
                reference = Reference(file, case.form)
                joined = reference_labels(pixels, reference, labels != NOT_ANALYSED, grid, card["align_px"])
                expected = dict(zip(("hann", "crop"), joined, strict=True))
                result["grid"] = grid
            result[mode] = agreement(labels, expected[mode])
    return result


def read_labels(path: Path) -> Labels:
    """Read the full size of a label map."""
    import tifffile

    return np.asarray(tifffile.imread(path, level=0), np.uint8)


def missing(case: Case) -> list[str]:
    """Return the packages of a case that are not installed."""
    return [package for package in case.packages if importlib.util.find_spec(package) is None]


@contextlib.contextmanager
def _in_folder(name: str) -> Iterator[None]:
    Path(name).mkdir()
    with contextlib.chdir(name):
        yield


def _run(words: list[str], statuses: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    modules = {"histo-export": "histostream.export.cli", "histo-infer": "histostream.runtime.cli"}
    command = [sys.executable, "-m", modules[words[0]], *words[1:]] if words[0] in modules else words
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in statuses:
        raise RuntimeError(f"{shlex.join(words)}: exit status {done.returncode}\n{done.stdout}{done.stderr}"[-4000:])
    return done


@click.command()
@click.argument("slide", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), help="Result file; earlier results of other cases are kept.")
@click.option("--case", "names", multiple=True, type=click.Choice((*CASES, *FILES)), help="Only this; may be repeated.")
@click.option("--files", type=click.Path(path_type=Path, exists=True), help="Folder of networks: soft-20.onnx, ...")
@click.option("--quick", is_flag=True, help="Write the FP32 graph alone, which is what a CPU runs by default.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for all files; default: a temporary one.")
def main(
    slide: Path, out: Path | None, names: tuple[str, ...], files: Path | None, quick: bool, keep: Path | None
) -> None:
    """Compare the labels of wrapped networks on SLIDE with those of ONNX Runtime run directly."""
    slide, out, files = slide.resolve(), out and out.resolve(), files and files.resolve()
    pixels = read_pixels(slide)
    earlier = json.loads(out.read_text()) if out is not None and out.exists() else {}
    results: dict[str, Any] = dict(earlier.get("networks", {}))
    failed = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(keep or folder):
        for name in names or (*CASES, *(FILES if files else ())):
            if absent := missing(CASES[name]) if name in CASES else []:
                results[name] = {"left_out": f"not installed: {', '.join(absent)}"}
                click.echo(f"{name}: {results[name]['left_out']}")
                continue
            try:
                result = results[name] = run_case(name, slide, pixels, QUICK if quick else (), files)
            except (RuntimeError, ValueError) as error:
                results[name] = {"error": re.sub(r"\s+", " ", str(error))[-1000:]}
                click.echo(f"{name}: {error}")
                failed.append(name)
                continue
            agreements = [result[mode]["agreement"] for mode in ("hann", "crop")]
            click.echo(
                f"{name}: {agreements[0]:.4%} of the labels agree, {agreements[1]:.4%} with --blend crop; "
                f"shares of the classes {result['hann']['shares']}; wrapped in {result['wrap_seconds']} s; "
                f"{'; '.join(result['refused']) or 'nothing refused'}"
            )
            if min(agreements) < LEAST_AGREEMENT:
                failed.append(name)
            if out is not None:
                out.write_text(json_text({"hardware": hardware(), "slide": slide.name, "networks": results}))
    if out is not None:
        out.write_text(json_text({"hardware": hardware(), "slide": slide.name, "networks": results}))
    if failed:
        raise click.ClickException(f"labels differ, or the run failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

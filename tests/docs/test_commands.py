"""Every command line of the pages runs, or is marked as not run; all options and sub-commands exist."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper
from PIL import Image

from histostream.wsi.synthetic import SyntheticSlide
from tests.conftest import REPOSITORY
from tests.docs.pages import INLINE, PAGES, blocks, prose

COMMANDS = {
    "histo-infer": "histostream.runtime.cli",
    "histo-train": "histostream.training.cli",
    "histo-export": "histostream.export.cli",
    "histo-bench": "histostream.benchmarks.cli",
}
# Commands of histo-infer that are no group of it.
OF_INFER = {
    "view": "histostream.runtime.viewer.command",
    "qupath": "histostream.runtime.qupath.command",
    "dsa": "histostream.runtime.dsa.command",
}
# Added to each `histo-train` of a page: a narrow network and two steps.
SHORT_TRAINING = (
    "method.base_width=4",
    "method.depth=2",
    "method.discriminator_width=4",
    "schedule.steps=2",
    "schedule.crop_px=64",
    "schedule.validate_every=2",
)
# Added to each export of a page: such networks do not pass the parity check in INT8.
SHORT_EXPORT = ("--precision", "fp32", "--tensorrt", "off")
# Options of other programs that a page mentions.
FOREIGN_OPTIONS = {"--build-arg", "--depth", "--no-crop", "--upgrade"}
PAGES_WITH_COMMANDS = [page for page in PAGES if any(block.commands for block in blocks(page))]
RUN = [(page, block) for page in PAGES for block in blocks(page) if block.commands and not block.not_run]


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the innermost command of a command line, and the words that are left for it."""
    if words[0] == "histo-infer" and words[1:2] and words[1] in OF_INFER:
        inner, rest = getattr(importlib.import_module(OF_INFER[words[1]]), words[1]), words[2:]
        is_task = isinstance(inner, click.Group) and rest[:1] == ["histo-infer"]
        return (inner.commands[rest[0]], rest[1:]) if is_task else (inner, rest)
    if words[:2] == ["python", "-m"]:
        return importlib.import_module(words[2]).main, words[3:]
    command: click.Command = importlib.import_module(COMMANDS[words[0]]).main
    rest = words[1:]
    while isinstance(command, click.Group):
        inner = next((word for word in rest if word in command.commands), None)
        if inner is None and "run" in command.commands and rest[:1] not in (["--help"], ["--version"]):
            inner, rest = "run", ["run", *rest]  # the default of histo-bench
        if inner is None:
            break
        at = rest.index(inner)
        command, rest = command.commands[inner], rest[:at] + rest[at + 1 :]
    return command, rest


def check_options(words: list[str]) -> None:
    """Parse a command line without running it: unknown options, missing values and unknown choices are errors."""
    command, rest = command_of(words)
    context = click.Context(command, info_name=words[0])
    values, _, _ = command.make_parser(context).parse_args(list(rest))
    for parameter in command.params:
        value = values.get(str(parameter.name))
        if value is not None and isinstance(parameter.type, click.Choice):
            for word in value if isinstance(value, list) else [value]:
                parameter.type.convert(word, parameter, context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_of_a_page_exist(page: Path) -> None:
    for block in blocks(page):
        for words in block.commands:
            if words[0] in COMMANDS or words[:2] == ["python", "-m"]:
                check_options(words)
    for words in (shlex.split(code) for code in INLINE.findall(prose(page)) if code.startswith("histo-")):
        if words[0] in COMMANDS:
            with contextlib.suppress(click.BadOptionUsage):  # in a sentence an option can be without its value
                check_options(words)


def test_every_option_that_a_page_names_exists() -> None:
    known = set(FOREIGN_OPTIONS)
    queue: list[click.Command] = [importlib.import_module(module).main for module in COMMANDS.values()]
    queue += [command_of(["histo-infer", name])[0] for name in OF_INFER]
    queue.append(command_of(["python", "-m", "histostream.benchmarks.accuracy.generative"])[0])
    while queue:
        command = queue.pop()
        queue += command.commands.values() if isinstance(command, click.Group) else []
        known |= {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    known |= {"--help", "--version"}
    for page in PAGES:
        named = {option for code in INLINE.findall(prose(page)) for option in re.findall(r"^--[a-z][a-z-]*", code)}
        assert named <= known, page.name


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=lambda page: page.name)
def test_modules_and_scripts_that_are_run_exist(page: Path) -> None:
    for block in blocks(page):
        for words in block.commands:
            if words[:2] == ["python", "-m"]:
                name = words[2].removeprefix("histostream.").replace(".", "/")
                assert (REPOSITORY / f"{name}.py").exists() or (REPOSITORY / name / "__main__.py").exists(), words[2]
            elif words[0].startswith("benchmarks/"):
                assert (REPOSITORY / words[0]).exists(), words[0]
            elif words[0] not in COMMANDS:
                assert block.not_run, f"{page.name}:{block.line}: mark the block with <!-- not run: REASON -->"


def make_images(folder: Path) -> None:
    """Write a data set of six images of a synthetic slide, all of them with nuclei."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for seed in (5, 10, 11, 22, 25, 27):
        image, label = SyntheticSlide(96, 96, 0.5, seed).region(0, 0, 96, 96)
        Image.fromarray(image).save(folder / "images" / f"{seed}.png")
        Image.fromarray(label).save(folder / "labels" / f"{seed}.png")
    (folder / "dataset.toml").write_text("mpp = 0.5\n")


def make_onnx(path: Path) -> None:
    """Write a network of two classes as a user could bring it: NCHW images in, logits out."""
    random = np.random.default_rng(0)
    weights = {"w1": (8, 3, 3, 3), "w2": (2, 8, 3, 3)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1"], ["h"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Conv", ["r", "w2"], ["y"], pads=[1, 1, 1, 1]),
        ],
        "unet",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 512, 512])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2, 512, 512])],
        [
            onnx.numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the inputs that the pages name: slides, lists, regions, images, a network."""
    folder = tmp_path_factory.mktemp("commands")
    SyntheticSlide(700, 600, 0.5, 1).write(folder / "slide.svs")
    (folder / "slides").mkdir()
    SyntheticSlide(300, 300, 0.5, 2).write(folder / "slides" / "one.svs")
    (folder / "others").mkdir()
    SyntheticSlide(300, 300, 0.5, 2).write(folder / "others" / "two.svs")
    for name in ("cohort.csv", "list.csv"):
        (folder / name).write_text("path,mpp\nothers/two.svs,0.5\n")
    ring = [[0, 0], [700, 0], [700, 600], [0, 600], [0, 0]]
    for name in ("tumour.geojson", "regions.geojson"):
        (folder / name).write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    for name in ("DIR", "my-glands"):
        make_images(folder / name)
    make_onnx(folder / "unet.onnx")
    Image.fromarray(np.full((60, 70), 255, np.uint8)).save(folder / "mask.png")
    return folder


def run_line(words: list[str]) -> None:
    """Run a command line in this process, with the patterns that a shell would expand."""
    arguments: list[str] = []
    for word in words[1:]:
        unquoted = "*" in word and "**" not in word
        arguments += sorted(map(str, Path().glob(word))) if unquoted else [word]
    if words[0] == "histo-train":
        arguments += [word for setting in SHORT_TRAINING for word in ("--set", setting)]
    if words[:2] in (["histo-export", "--method"], ["histo-export", "wrap"]):
        arguments += SHORT_EXPORT
    result = CliRunner().invoke(importlib.import_module(COMMANDS[words[0]]).main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"


@pytest.mark.full
@pytest.mark.parametrize("page", sorted({page for page, _ in RUN}), ids=lambda page: page.name)
def test_the_commands_of_a_page_run(
    page: Path,
    prepared: Path,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    lines = [words for block in blocks(page) if not block.not_run for words in block.commands]
    if not any(words[0] == "histo-train" for words in lines):  # else the page makes them
        shutil.copytree(tiny_checkpoint, folder / "runs" / "mine")
        shutil.copytree(tiny_bundle, folder / "bundles" / "mine")
    monkeypatch.chdir(folder)
    for words in lines:
        run_line(words)

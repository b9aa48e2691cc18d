"""The command ``histo-export``: a checkpoint or an ONNX file from elsewhere in, a model bundle out."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from histostream.runtime.choices import PRECISIONS
from histostream.wsi.console import fail, one_line_errors, show_only_our_warnings
from histostream.wsi.option_types import WordList

if TYPE_CHECKING:
    from histostream.export.bundle import Export
    from histostream.runtime.bundle.card import ModelCard

COMMAND = "histo-export"
PATH = click.Path(path_type=Path)
NAMES: dict[str, Any] = {"type": WordList(), "default": "", "show_default": False}


def _numbers(_: click.Context, __: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """Read a comma-separated list of numbers."""
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a comma-separated list of numbers: write 0.5,0.5,0.5") from error


def _fraction(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """Read a number, or a fraction as 1/255."""
    if text is None:
        return None
    numerator, _slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise click.BadParameter(f"{text!r} is not a number: write 1/255 or 0.0039") from error


def _colors(_: click.Context, __: click.Parameter, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Read colours in hexadecimal; # may lead, but a shell may take it for a comment."""
    colors = []
    for word in words:
        if not re.fullmatch("#?[0-9a-fA-F]{6}", word):
            raise click.BadParameter(f"{word!r} is not a colour: write six digits for each, as ffffff,e69f00")
        colors.append(tuple(bytes.fromhex(word.removeprefix("#"))))
    return tuple(colors)


def _export_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the commands that make a bundle of a network."""
    out = click.option("--out", type=PATH, help="Bundle to write; default: bundles/NAME.")
    tile = click.option(
        "--tile",
        "tile_px",
        type=int,
        metavar="PX",
        help="Side of a tile, in pixels; default: the network's own, else 512.",
    )
    return out(tile(_bundle_options(command)))


def _bundle_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command has that writes a bundle."""
    for option in reversed(
        (
            click.option(
                "--precision",
                "precisions",
                type=WordList(tuple(PRECISIONS)),
                default=",".join(PRECISIONS),
                metavar=",".join(PRECISIONS),
                help="Which graphs to write; fp32 is always written.",
            ),
            click.option(
                "--tensorrt",
                default="auto",
                type=click.Choice(("auto", "tensorrt", "rtx", "off")),
                help="Which library builds the engine; auto: where one is installed.",
            ),
            click.option(
                "--targets",
                type=WordList(),
                default="",
                show_default=False,
                metavar="sm80,sm86,...",
                help="GPUs to build the engine for; default: what the library suggests.",
            ),
            click.option(
                "--calibrate",
                type=PATH,
                metavar="SLIDE_OR_FOLDER",
                help="Tiles to calibrate INT8 and to judge on; default: a synthetic slide.",
            ),
            click.option(
                "--freeze-statistics",
                "freeze",
                type=PATH,
                metavar="SLIDE_OR_FOLDER",
                help="Make the statistics of instance and group normalisation constants, "
                "estimated here, so that tiles agree.",
            ),
            click.option(
                "--object-rule",
                "object_rules",
                multiple=True,
                metavar="NAME=MIN[-MAX][,touching]|no",
                help="Areas of the objects of a class in um2, or no: it is not counted; several times; nuclei: 8.",
            ),
            click.option(
                "--triton", type=PATH, metavar="REPO", help="Write the models to a Triton model repository too."
            ),
        )
    ):
        command = option(command)
    return command


_one_line_errors = one_line_errors(
    COMMAND,
    out_of_memory="try a smaller --tile, or --precision fp32",
    stopped="nothing half-written is left",
    extra="export",
    extras={},
)


@click.group(invoke_without_command=True, context_settings={"show_default": True})
@click.version_option(package_name="histostream")
@click.option("--method", "method_name", help="Method that the model is of, as imems.")
@click.option(
    "--checkpoint",
    "run",
    type=PATH,
    help="Folder of a training run or checkpoint; default: the weights that ship.",
)
@_export_options
@click.pass_context
@_one_line_errors
def main(
    context: click.Context,
    method_name: str | None,
    run: Path | None,
    out: Path | None,
    **values: Any,
) -> None:
    """Export a trained model to a bundle that histo-infer runs.

    In single precision, half precision and 8-bit integers, each compared with the trained network
    before it is written, and as a TensorRT engine. Exit status 0 only if all of it was written.
    """
    show_only_our_warnings(COMMAND)
    from histostream.runtime.process_memory import return_buffers_at_once

    return_buffers_at_once()
    if context.invoked_subcommand is not None:
        return
    if method_name is None:
        raise click.UsageError("--method is missing; or use another command (--help shows them)")
    from histostream.export import Options, export_checkpoint

    options = Options(**values)
    out = out or Path("bundles") / method_name
    _report(export_checkpoint(method_name, run, out, options, say=click.echo), out)


@main.command()
@click.argument("model", type=PATH)
@click.option(
    "--classes", type=WordList(), default="", show_default=False, metavar="NAME,NAME,...", help="Names in label order."
)
@click.option(
    "--colors",
    type=WordList(),
    callback=_colors,
    default="",
    show_default=False,
    metavar="ffffff,e69f00,...",
    help="Of the classes.",
)
@click.option("--background", metavar="NAME", help="The class that is not painted, if its name does not say so.")
@click.option("--mpp", type=float, help="Resolution that it was trained at, um per pixel.")
@click.option(
    "--mean",
    callback=_numbers,
    metavar="R,G,B",
    help="Of each channel, scaled, or one number for all; default: 0.",
)
@click.option("--std", callback=_numbers, metavar="R,G,B", help="Of each channel, scaled; default: 1.")
@click.option(
    "--scale",
    callback=_fraction,
    metavar="NUMBER",
    help="Factor of the raw pixels, 0 to 255; default: 1/255, or 1 if it takes uint8.",
)
@click.option(
    "--channel-names",
    type=WordList(),
    default="",
    show_default=False,
    metavar="NAME,NAME,...",
    help="Of its channels, if not RGB.",
)
@click.option("--layout", default="auto", type=click.Choice(("auto", "nchw", "nhwc")), help="Of its input.")
@click.option(
    "--activation",
    default="auto",
    type=click.Choice(("auto", "softmax", "sigmoid", "none")),
    help="What makes probabilities of its output; none: it gives them.",
)
@click.option(
    "--threshold", type=float, metavar="P", help="Of two classes, the second from this probability on; default: 0.5."
)
@click.option(
    "--background-below",
    type=float,
    metavar="P",
    help="Add a background class, where every score is below; 0: none; default: 0.5 for independent sigmoids.",
)
@click.option("--bgr", is_flag=True, help="Its channels are blue, green, red.")
@click.option("--resize-output", is_flag=True, help="Enlarge an output coarser than its input.")
@click.option("--crop-output", is_flag=True, help="Its output is the tile's centre, as of unpadded convolutions.")
@click.option("--input", "input_name", help="Which input, where it has several.")
@click.option("--output", "output_name", help="Which output, where it has several.")
@click.option("--note", default="", help="What the model is for and where it fails.")
@_export_options
@_one_line_errors
def wrap(model: Path, mpp: float | None, bgr: bool, note: str, out: Path | None, **values: Any) -> None:
    """Make a bundle of a segmentation network from elsewhere: ONNX, or a file of torch.export.

    Its normalisation and activation become part of the graph; then it goes through the same
    comparisons as a network of ours. What is not said is taken from the file's metadata, or
    found out by running the network; each decision is printed.
    """
    from histostream.export import ExternalModel, Options, wrap_onnx

    names = {field.name for field in dataclasses.fields(ExternalModel)} & values.keys() - {"tile_px"}
    properties = {name: values.pop(name) for name in names}
    options = Options(**values)
    external = ExternalModel(tile_px=options.tile_px, order="bgr" if bgr else "rgb", **properties)
    out = out or Path("bundles") / model.stem
    _report(wrap_onnx(model, out, external, options, mpp=mpp, note=note, say=click.echo), out)


def _graph_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments of the commands that write a single graph."""
    tile = click.option("--tile", "tile_px", type=int, metavar="PX", help="Side of the images, in pixels.")
    file = click.argument("out", type=PATH)
    return click.argument("run", type=PATH)(file(tile(_one_line_errors(command))))


@main.command()
@_graph_arguments
def generator(run: Path, out: Path, tile_px: int | None) -> None:
    """Write the generators of RUN, a pyramid GAN, as one ONNX file OUT.

    Masks and noise are its inputs, so that it samples without torch.
    """
    from histostream.export.generator import export_generator

    model = export_generator(run, out, tile_px=tile_px)
    click.echo(f"{out}: {', '.join(v.name for v in model.graph.input)} in, images out")


@main.command()
@_graph_arguments
def explanation(run: Path, out: Path, tile_px: int | None) -> None:
    """Write the graph that explains the labels of RUN as one ONNX file OUT.

    That of translation: the image without its target.
    """
    from histostream.export.explanation import export_explanation

    export_explanation(run, out, tile_px=tile_px)
    click.echo(f"{out}: tiles in, images out")


@main.command("tune-crf")
@click.argument("bundle", type=PATH)
@click.option(
    "--data",
    "source",
    required=True,
    metavar="SET",
    help="Annotated images that the model was not trained on, as of histo-train.",
)
@click.option(
    "--part",
    type=click.Choice(("validation", "test", "train", "all")),
    default="validation",
    show_default=True,
    help="Which images; of a set without such a part, all.",
)
@click.option("--run", type=PATH, help="The training run, whose own validation images are taken.")
@click.option("--mpp", type=float, help="Resolution of images that do not say theirs.")
@_one_line_errors
def tune_crf(bundle: Path, source: str, part: str, run: Path | None, mpp: float | None) -> None:
    """Learn the parameters of the dense CRF for BUNDLE, and keep them in its card.

    histo-infer --crf then uses them.
    """
    from histostream.export.tune_crf import choose_samples
    from histostream.export.tune_crf import tune_crf as tune

    samples, own_mpp = choose_samples(source, part, run)
    tuned = tune(bundle, samples, mpp or own_mpp, say=click.echo)
    if tuned.params is None:
        fail(COMMAND, f"{bundle}: none of {tuned.tried} parameter sets is better than no CRF; the card is unchanged")
        sys.exit(1)
    click.echo(
        f"{bundle}: Dice {tuned.dice:.4f} with the CRF, {tuned.dice_without:.4f} without, on {len(samples)} images"
    )


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--out", type=PATH, help="Bundle to write; default: BUNDLE itself is replaced.")
@_bundle_options
@_one_line_errors
def upgrade(bundle: Path, out: Path | None, **values: Any) -> None:
    """Write BUNDLE, of an older version, again with scores that are not rounded to 8 bits.

    The labels are then those of the network. The parity check compares with the bundle's FP32 graph, of which the
    other precisions are made again; a checkpoint at hand is better exported again.
    """
    from histostream.export import Options
    from histostream.export.upgrade import upgrade_bundle

    out = out or bundle
    _report(upgrade_bundle(bundle, out, Options(**values), say=click.echo), out)


@main.command("object-rules")
@click.argument("bundle", type=PATH)
@click.argument("rules", nargs=-1, required=True, metavar="NAME=MIN[-MAX][,touching]|no...")
@_one_line_errors
def object_rules(bundle: Path, rules: tuple[str, ...]) -> None:
    """Say in the card of BUNDLE which regions of its classes are objects.

    nucleus=8,touching: regions of at least 8 um2, of which large concave ones are taken for several that touch.
    gland=500-90000: of 500 to 90000 um2. stroma=no: not counted. Graphs and engines stay as they are.
    """
    from histostream.export.object_rules import set_object_rules

    for entry in set_object_rules(bundle, rules).classes:
        click.echo(f"{bundle}: {entry.name}: {entry.rule or 'no rule'}")


@main.command()
@click.argument("file", type=PATH)
@_one_line_errors
def inspect(file: Path) -> None:
    """Print what an engine file or a model bundle says of itself."""
    from histostream.runtime.bundle.card import read_card, read_file
    from histostream.runtime.engines.tensorrt.file import describe

    if not file.is_dir():
        click.echo(describe(file))
        return
    card = read_card(file)
    click.echo(f"{file}: {card.method}, {', '.join(c.name for c in card.classes)}")
    for entry in card.classes:
        if entry.rule is not None:
            click.echo(f"{entry.name}: {entry.rule}")
    click.echo(
        f"tiles of {card.tile_px} px at {card.mpp:g} um/px, {card.channels} channels, {_halo(card)}, "
        f"{'depends on' if card.tile_statistics else 'no'} tile statistics"
    )
    for name in card.files:
        read_file(file, card, name)  # raises if it is damaged
        click.echo(f"{name}: {_figures(card.parity.get(name, {}))}")
    for precision, record in card.precision.items():
        click.echo(f"{precision}: {json.dumps({k: v for k, v in record.items() if k != 'steps'})}")


def _report(export: Export, out: Path) -> None:
    card = export.card
    statistics = ", depends on tile statistics" if card.tile_statistics else ""
    click.echo(f"{out}: {card.tile_px} px tiles at {card.mpp:g} um/px, {_halo(card)}{statistics}")
    for failure in export.failures:
        fail(COMMAND, failure)
    if export.failures:
        sys.exit(1)


def _halo(card: ModelCard) -> str:
    if card.halo_source == "computed":
        return f"halo {card.halo_px} px"
    return f"halo unknown, measured by perturbation as {card.halo_px} px"


def _figures(parity: dict[str, Any]) -> str:
    if "label_agreement" in parity:
        return (
            f"{parity['label_agreement']:.4%} of the labels agree on {parity['tiles']} tiles of "
            f"{parity.get('source', '?')}, largest difference of scores {parity['max_difference']:.4f}"
        )
    return json.dumps(parity)


if __name__ == "__main__":
    main()

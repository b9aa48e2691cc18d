"""The command ``histo-bench``: measure speed, compare libraries, score accuracy, examine the machine."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from histostream.runtime.choices import BACKENDS, PRECISIONS, RUN_PRECISIONS
from histostream.wsi.console import one_line_errors
from histostream.wsi.errors import HistoError
from histostream.wsi.option_types import CountList, WordList

PATH = click.Path(path_type=Path)
DEFAULT = "run"
MEASURED_PRECISIONS = ("auto", *PRECISIONS)  # each with its own graph, whose operations are counted


class _OptionError(HistoError, ValueError):
    """An option has a value that cannot work."""


class _RunByDefault(click.Group):
    """``histo-bench --model ...`` is ``histo-bench run --model ...``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help", "--version"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


_one_line_errors = one_line_errors(
    "histo-bench",
    out_of_memory="try a smaller --batch or a smaller slide",
    stopped="nothing was written",
    extra="export",
    extras={"matplotlib": "bench", "onnx": "bench"},
)


@click.group(cls=_RunByDefault, context_settings={"show_default": True})
@click.version_option(package_name="histostream")
def main() -> None:
    """Measure HistoStream on this machine. Without a command: run."""


@main.command()
@click.option(
    "--model",
    "bundles",
    type=PATH,
    multiple=True,
    help="Model bundle; several may be given; default: nuclei.",
)
@click.option("--slide", type=PATH, help="Slide to run on; default: a synthetic one.")
@click.option("--synthetic", default="4096x4096", metavar="WxH", help="Its size, in pixels.")
@click.option(
    "--backend",
    "backends",
    default="auto",
    type=WordList(BACKENDS),
    metavar=",".join(BACKENDS),
    help="Library that runs the network.",
)
@click.option(
    "--precision",
    "precisions",
    default="auto",
    type=WordList(MEASURED_PRECISIONS),
    metavar=",".join(MEASURED_PRECISIONS),
    help="Graph of the model to run.",
)
@click.option(
    "--batch",
    "batches",
    default="auto",
    type=CountList(),
    metavar="auto,1,2,...",
    help="Tiles per inference; auto: depends on the device.",
)
@click.option(
    "--tile",
    "tiles_px",
    default="auto",
    type=CountList(),
    metavar="auto,256,...",
    help="Side of a tile, in pixels, for speed alone; auto: as the model was exported.",
)
@click.option("--tissue/--no-tissue", default=False, help="Skip glass, or analyse it too.")
@click.option("--mpp", type=float, help="Resolution of the slide at full size, um per pixel.")
@click.option("--threads", type=int, help="CPU threads; default: all cores.")
@click.option("--repeats", default=3, help="How often; the figures are medians.")
@click.option("--out", default="bench", type=PATH, help="Folder for the result files.")
@_one_line_errors
def run(
    bundles: tuple[Path, ...],
    slide: Path | None,
    synthetic: str,
    backends: tuple[str, ...],
    precisions: tuple[str, ...],
    batches: tuple[int | None, ...],
    tiles_px: tuple[int | None, ...],
    repeats: int,
    out: Path,
    **options: Any,
) -> None:
    """Measure every stage alone and end to end, and how far the network is from the roofline.

    Options that list values with commas take several of them; every combination is run, in turns.
    Writes bench.json, bench.md, stages.png and roofline.png.
    """
    from histostream.benchmarks.plots import roofline_png, stages_png
    from histostream.benchmarks.report import write_together
    from histostream.benchmarks.speed import markdown, measure_speed
    from histostream.benchmarks.stages import Setup
    from histostream.runtime.bundle.card import default_bundle
    from histostream.runtime.options import Options
    from histostream.runtime.process_memory import return_buffers_at_once
    from histostream.wsi.files import json_text

    return_buffers_at_once()  # as in histo-infer
    setups = [
        Setup(*values)
        for values in itertools.product(bundles or (default_bundle(),), backends, precisions, batches, tiles_px)
    ]
    result = measure_speed(
        setups,
        slide=slide,
        synthetic_px=_size(synthetic),
        options=Options(**options),
        repeats=repeats,
        say=_say,
    )
    page = markdown(result)
    write_together(
        out,
        {
            "bench.md": page,
            "stages.png": functools.partial(stages_png, result),
            "roofline.png": functools.partial(roofline_png, result),
            "bench.json": json_text(result),
        },
    )
    click.echo(page)
    click.echo(f"-> {out}")


@main.command()
@click.option("--model", "bundle", type=PATH, help="Model bundle; default: nuclei.")
@click.option(
    "--checkpoint",
    type=PATH,
    help="Folder of the training run or checkpoint that it was made of; default: the weights that ship.",
)
@click.option("--method", default="imems", help="Method that the model is of, as imems.")
@click.option("--slide", type=PATH, help="Where tiles are cut from; default: a synthetic slide.")
@click.option("--tiles", default=4, help="How many tiles.")
@click.option("--batch", default=1, help="Tiles per inference.")
@click.option("--threads", type=int, help="CPU threads; default: all cores.")
@click.option("--repeats", default=5, help="How often; the figures are medians.")
@click.option("--compile", "compiled", is_flag=True, help="Try torch.compile too (minutes).")
@click.option("--out", type=PATH, help="Folder for compare.json and compare.md.")
@_one_line_errors
def compare(bundle: Path | None, out: Path | None, **options: Any) -> None:
    """Run one network in torch and in every backend, side by side on the same tiles."""
    from histostream.benchmarks.compare import compare as compared
    from histostream.benchmarks.compare import markdown
    from histostream.benchmarks.report import write_together
    from histostream.runtime.bundle.card import default_bundle
    from histostream.wsi.files import json_text

    result = compared(bundle or default_bundle(), **options, say=_say)
    page = markdown(result)
    if out is not None:
        write_together(out, {"compare.md": page, "compare.json": json_text(result)})
    click.echo(page)


@main.command()
@click.option(
    "--data",
    "source",
    required=True,
    metavar="SET",
    help="Images with labels: a folder, or a known set as glas:PATH (docs/data.md).",
)
@click.option("--model", "bundle", type=PATH, help="Score a model bundle; default: nuclei.")
@click.option("--checkpoint", "run", type=PATH, help="Score the folder of a training run or checkpoint.")
@click.option("--labels", type=PATH, help="Score a folder of label maps, one for each image.")
@click.option(
    "--part",
    type=click.Choice(("auto", "test", "validation", "train", "all")),
    default="auto",
    help="Which images; auto: those that were held back, else the set's test part, else all.",
)
@click.option("--mpp", type=float, help="Resolution of the images, where the set does not say.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", help="Library that runs the network.")
@click.option("--precision", type=click.Choice(RUN_PRECISIONS), default="auto", help="Graph of the model to run.")
@click.option("--min-object", default=100, help="Smaller regions are no objects, in pixels.")
@click.option("--out", default="accuracy", type=PATH, help="Folder for the result files.")
@_one_line_errors
def accuracy(
    source: str,
    bundle: Path | None,
    run: Path | None,
    labels: Path | None,
    part: str,
    mpp: float | None,
    min_object: int,
    out: Path,
    **options: str,
) -> None:
    """Score a bundle, a checkpoint or a folder of label maps against annotated images.

    At the resolution of the images; pooled over pixels and as the mean over images; objects by the
    rules of GlaS where the images have instances. Writes accuracy.json, accuracy.md, confusion.png.
    """
    from histostream.benchmarks.accuracy.score import markdown, score_set
    from histostream.benchmarks.plots import confusion_png
    from histostream.benchmarks.report import write_together
    from histostream.runtime.bundle.card import default_bundle
    from histostream.wsi.files import json_text

    if sum(x is not None for x in (bundle, run, labels)) > 1:
        raise _OptionError("give one of --model, --checkpoint and --labels")
    if bundle is None and run is None and labels is None:
        bundle = default_bundle()
    result = score_set(
        source, bundle=bundle, run=run, labels=labels, part=part, mpp=mpp, min_object_px=min_object, say=_say, **options
    )
    page = markdown(result)
    write_together(
        out,
        {
            "accuracy.md": page,
            "confusion.png": functools.partial(confusion_png, result),
            "accuracy.json": json_text(result),
        },
    )
    click.echo(page)
    click.echo(f"-> {out}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_one_line_errors
def doctor(as_json: bool) -> None:
    """List what this machine can run, and what to install for the rest.

    Exit status 1 if something is broken; what is only missing does not count.
    """
    from histostream.runtime.doctor import examine
    from histostream.runtime.finding import BROKEN

    findings = examine()
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            click.echo(str(finding))
    sys.exit(1 if any(finding.status == BROKEN for finding in findings) else 0)


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise _OptionError(f"--synthetic {text}: is not a size; write 4096x4096")
    return int(sides[0]), int(sides[1])


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()

"""``histo-infer``: slides in, label maps out.

This module has only the options. Modules that take time to import are imported after parsing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from histostream.runtime.choices import AUTO, BACKENDS, RUN_PRECISIONS, WINDOWS
from histostream.wsi.console import GroupedCommand, memory_mib, one_line_errors, option_group, read_settings
from histostream.wsi.option_types import DEVICES_METAVAR, DeviceList, IndexList, WordList
from histostream.wsi.outputs.sinks import sink_names
from histostream.wsi.slides.coordinates import COORDINATES

PATH = click.Path(path_type=Path)
_model = option_group("Model and device")
_slide = option_group("What is analysed")
_tiles = option_group("Tiles and labels")
_outputs = option_group("Results")
_work = option_group("Cohorts, memory and restarts")
_one_line_errors = one_line_errors(
    "histo-infer",
    out_of_memory="set --max-memory, or --batch 1",
    stopped="repeat the command to continue",
    extra="cpu",
    extras={},
)


class _WithCommands(GroupedCommand):
    """``histo-infer``; ``histo-infer view`` and others are commands (a slide of that name is ``./view``)."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        match args[:1]:
            case ["view"]:
                from histostream.runtime.viewer.command import view as command
            case ["qupath"]:
                from histostream.runtime.qupath.command import qupath as command
            case ["dsa"]:
                from histostream.runtime.dsa.command import dsa as command
            case _:
                return super().parse_args(ctx, args)
        command.main(args[1:], prog_name=f"histo-infer {args[0]}")
        raise AssertionError("a command ends the program")


@click.command(cls=_WithCommands, context_settings={"show_default": True})
@click.version_option(package_name="histostream")
@click.argument("slides", nargs=-1, required=True)
@_model("--model", "bundle", type=PATH, help="Model bundle; default: nuclei.")
@_model("--backend", default="auto", type=click.Choice(BACKENDS), help="Library that runs the network.")
@_model(
    "--precision",
    default="auto",
    type=click.Choice(RUN_PRECISIONS),
    help="Graph of the model to run; int8 is the fastest on a CPU, bf16 needs OpenVINO.",
)
@_model(
    "--device",
    "devices",
    aliases=("--devices",),
    type=DeviceList(),
    metavar=DEVICES_METAVAR,
    default="auto",
    help="What runs the network. Several GPUs share slides, or the columns of one slide.",
)
@_model("--threads", type=int, help="CPU threads; default: all cores.")
@_model("--batch", type=int, help="Tiles per inference; default: depends on the device.")
@_slide("--mpp", type=float, help="Resolution of the slide at full size, um per pixel.")
@_slide(
    "--channels",
    type=IndexList(),
    metavar="0,1,2",
    help="Channels of the slide to analyse, one for each of the model's; default: its colours.",
)
@_slide("--roi", type=PATH, help="GeoJSON polygons (full-size pixels) to analyse.")
@_slide(
    "--coordinates",
    default=COORDINATES[0],
    type=click.Choice(COORDINATES),
    help="Where pixels of --roi and outlines begin: at the scanned area (QuPath), or as OpenSlide counts (MIRAX).",
)
@_slide(
    "--mask",
    type=PATH,
    help="What to analyse: an image of the slide (0: not), or GeoJSON (not Ignore*, pen, fold, blur).",
)
@_slide("--tissue/--no-tissue", default=True, help="Skip glass, or analyse it too.")
@_slide("--artefacts", is_flag=True, help="Leave out pen ink and tissue that is out of focus.")
@_slide("--force-upsampling", is_flag=True, help="Enlarge slides coarser than the model.")
@_slide("--strict", is_flag=True, help="Stop a slide at a damaged block; default: skip the block.")
@_tiles("--overlap", "overlap_px", type=int, metavar="PX", help="Pixels that tiles share; default: 64.")
@_tiles(
    "--blend",
    default=AUTO,
    type=click.Choice((AUTO, *WINDOWS)),
    help="How overlapping tiles are joined; auto: hann, unless the model gives labels.",
)
@_tiles("--crf", is_flag=True, help="Refine the labels by a dense CRF with the model's parameters.")
@_tiles(
    "--crf-params",
    metavar="w1=5,theta_alpha=15um,...",
    help="Other parameters: w1, theta_alpha, theta_beta, w2, theta_gamma, n_iter; with --crf.",
)
@_tiles(
    "--crf-uncertain",
    type=float,
    metavar="P",
    help="Refine only where the two best scores differ by less than P, 0 to 1; with --crf.",
)
@_outputs("--out", default="out", type=PATH, help="Folder for results.")
@_outputs("--probabilities", is_flag=True, help="Write probabilities.tif too.")
@_outputs(
    "--rasters",
    default="",
    show_default=False,
    type=WordList(sink_names("rasters")),
    metavar=",".join(sink_names("rasters")),
    help="Write the label map as OME-TIFF (rgb: its colours, for QuPath), OME-Zarr or DICOM too; or the density of "
    "objects.",
)
@_outputs("--geojson", is_flag=True, help="Write objects.geojson.gz, outlines for QuPath.")
@_outputs(
    "--annotations",
    type=click.Choice(sink_names("annotations")),
    multiple=True,
    help="Write outlines: dsa is annotations.json, qupath the same as --geojson.",
)
@_outputs(
    "--objects",
    default="",
    show_default=False,
    type=WordList(sink_names("objects")),
    metavar=",".join(sink_names("objects")),
    help="Write a table of objects: area, perimeter, eccentricity.",
)
@_outputs(
    "--min-area",
    "min_area_um2",
    type=float,
    metavar="UM2",
    help="Leave smaller objects out, and out of the counts; default: as the model's card says (nuclei: 8).",
)
@_outputs(
    "--simplify",
    "simplify_um",
    default=0.0,
    metavar="UM",
    help="How far outlines may deviate, to have fewer points; 0 follows the pixels.",
)
@_work(
    "--config",
    type=PATH,
    is_eager=True,
    expose_value=False,
    callback=read_settings,
    metavar="FILE.toml",
    help="Read options from a TOML file, as max-memory = '2GiB'; the command line takes precedence.",
)
@_work(
    "--dry-run",
    is_flag=True,
    help="Print what a run would do, and its time and disk space; write nothing.",
)
@_work(
    "--max-memory",
    "max_memory_mib",
    type=memory_mib,
    metavar="1GiB",
    help="Bound on memory (MiB without a unit); wide slides are run in column bands.",
)
@_work(
    "--restart",
    is_flag=True,
    help="Run finished and interrupted slides from the start; default: skip and continue them.",
)
@_work(
    "--stage",
    type=PATH,
    metavar="DIR",
    help="Copy each slide to this fast local folder while the one before it is run.",
)
@_work(
    "--ray",
    "cluster",
    metavar="ADDRESS|local",
    help="Run on a Ray cluster, one engine for each GPU; paths must be the same on all hosts.",
)
@_work("--workers", type=int, help="Engines on the cluster; default: as many as fit.")
@_work("--log-json", is_flag=True, help="Write all messages to stderr as JSON, one object a line.")
@_one_line_errors
def main(geojson: bool, annotations: tuple[str, ...], **options: Any) -> None:
    """Segment whole slides; results go to OUT/<slide name>/.

    SLIDES are files, folders, patterns in quotes, URLs (s3://, gs://, https://), and .csv files
    with the column path and optionally mpp, roi, mask and name.

    Repeat the command to continue after an interruption; finished slides are skipped. A slide that
    fails does not stop the others; OUT/cohort.csv lists the status of each. Exit status: 0 all done,
    1 some failed, 2 a wrong option, 3 some slides have damaged blocks, 4 some have no tissue, 130 stopped.

    histo-infer view OUT shows results in a browser, also during a run; histo-infer qupath OUT writes a
    script that imports them into QuPath; histo-infer dsa is a task of the Digital Slide Archive. Each
    has its own --help.
    """
    from histostream.runtime.command import run

    sys.exit(run(annotations=(("qupath",) if geojson else ()) + annotations, **options))


if __name__ == "__main__":
    main()

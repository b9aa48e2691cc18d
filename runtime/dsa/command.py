"""``histo-infer dsa``: the container entry of a task that the Digital Slide Archive runs.

The archive (its plug-in slicer_cli_web) starts a container three ways::

    --list_cli                           print the tasks of the image, as JSON
    histo-infer --xml                    print the parameters of a task
    histo-infer [OPTIONS] IMAGE OUTPUT   run it: the archive mounts IMAGE, and takes OUTPUT into its data base
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from importlib import metadata, resources
from pathlib import Path
from xml.sax.saxutils import escape

import click

from histostream.runtime.choices import RUN_PRECISIONS
from histostream.wsi.console import one_line_errors
from histostream.wsi.errors import HistoError
from histostream.wsi.files import replace_whole, temporary_name, writing

COMMAND = "histo-infer dsa"
TASK = "histo-infer"
WHOLE = "-1,-1,-1,-1"  # the region of the archive's form while none is drawn
PATH = click.Path(path_type=Path)


class RegionError(HistoError, ValueError):
    """The region that the archive passes is no rectangle."""

    exit_status = 2


@click.group(invoke_without_command=True)
@click.option("--list_cli", is_flag=True, help="Print the tasks of this container as JSON.")
@click.pass_context
def dsa(context: click.Context, list_cli: bool) -> None:
    """Run as a task of the Digital Slide Archive: the entry point of a container."""
    if list_cli:
        click.echo(json.dumps({TASK: {"type": "python"}}))
    elif context.invoked_subcommand is None:
        click.echo(context.get_help())
        context.exit(2)


def _print_xml(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(task_xml())
        context.exit()


@dsa.command(TASK, context_settings={"show_default": True})
@click.option("--xml", is_flag=True, is_eager=True, expose_value=False, callback=_print_xml, help="Print parameters.")
@click.argument("image", type=PATH)
@click.argument("output", type=PATH)
@click.option("--region", default=WHOLE, metavar="X,Y,W,H", help="Rectangle in full-size pixels; -1: the whole slide.")
@click.option("--mpp", default=0.0, help="Resolution of the slide at full size, um per pixel; 0: as its file says.")
@click.option(
    "--min-area", default=0.0, metavar="UM2", help="Leave smaller objects out; 0: as the model's card says (nuclei: 8)."
)
@click.option("--model", type=PATH, help="Model bundle; default: nuclei.")
@click.option("--glass", default="skip", type=click.Choice(("skip", "analyse")), help="Whether glass is left out.")
@click.option("--precision", default="auto", type=click.Choice(RUN_PRECISIONS), help="Graph of the model to run.")
@click.option("--label-map", type=PATH, help="Where labels.tif goes.")
@click.option("--summary", type=PATH, help="Where summary.csv goes.")
@one_line_errors(
    COMMAND,
    out_of_memory="give the container more memory, or draw a smaller region",
    stopped="nothing is kept",
    extra="cpu",
    extras={},
)
def task(
    image: Path,
    output: Path,
    region: str,
    mpp: float,
    min_area: float,
    model: Path | None,
    glass: str,
    precision: str,
    label_map: Path | None,
    summary: Path | None,
) -> None:
    """Segment IMAGE, and write its outlines to OUTPUT as an annotation of large-image."""
    from histostream.runtime.command import run

    wanted = {"annotations.json": output, "labels.tif": label_map, "summary.csv": summary}
    with tempfile.TemporaryDirectory(prefix="histo-infer-") as scratch:
        out, roi = Path(scratch, "out"), None
        if polygon := _polygon(region):
            roi = Path(scratch, "region.geojson")
            roi.write_text(json.dumps(polygon), encoding="utf-8")
        status = run(
            slides=(str(image),),
            out=out,
            bundle=model,
            precision=precision,
            roi=roi,
            mpp=mpp or None,
            tissue=glass == "skip",
            annotations=("dsa",),
            min_area_um2=min_area or None,
        )
        results = [path.parent for path in out.glob("*/run.json")]
        if len(results) == 1:
            for name, target in wanted.items():
                if target is not None:
                    _copy(results[0] / name, target)
    sys.exit(status)


def task_xml() -> str:
    """Return the parameters of the task, as the Slicer execution model describes them."""
    text = resources.files(__package__).joinpath(f"{TASK}.xml").read_text(encoding="utf-8")
    package = metadata.metadata("histostream")
    pages = [url.partition(",")[2].strip() for url in package.get_all("Project-URL") or ()]
    values = {
        "VERSION": package["Version"],
        "URL": pages[0] if pages else "",
        "LICENSE": (package.get_all("License-Expression") or package.get_all("License") or [""])[0],
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", escape(str(value)))
    return text.rstrip("\n")


def _polygon(region: str) -> dict[str, object] | None:
    """Return the rectangle of the archive's form, X,Y,WIDTH,HEIGHT, as GeoJSON; None for the whole slide.

    Raises
    ------
    RegionError
        If it is something else.
    """
    words = [word.strip() for word in region.split(",")]
    try:
        sides = [float(word) for word in words]
    except ValueError:
        sides = []
    if len(sides) == 4 and all(side == -1 for side in sides):
        return None
    if len(sides) != 4 or not all(abs(side) < 1 << 31 for side in sides) or min(sides[2:]) <= 0:
        raise RegionError(f"--region {region!r}: draw one rectangle, X,Y,WIDTH,HEIGHT, or none for the whole slide")
    x, y, width, height = sides
    corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    return {"type": "Polygon", "coordinates": [corners]}


def _copy(source: Path, target: Path) -> None:
    """Copy a result, which appears under its name when it is whole.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    temporary = temporary_name(target)
    with writing(target):
        shutil.copyfile(source, temporary)
        replace_whole(temporary, target)

"""``histo-infer qupath``: the script that imports results into QuPath."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

import click

from histostream.wsi.console import fail
from histostream.wsi.errors import HistoError
from histostream.wsi.files import write_whole
from histostream.wsi.outputs.folder import RUN_FILE

COMMAND = "histo-infer qupath"
SCRIPT = "import-qupath.groovy"
PLACE = "@RESULTS@"  # in the script, of the folder of results


@click.command()
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
def qupath(out: Path) -> None:
    """Write the script that imports results into QuPath, OUT/import-qupath.groovy.

    OUT is the folder that was given to histo-infer as --out, or one slide's folder in it. Open an image
    or a project in QuPath, drag the script onto its window, and press Run in the script editor.
    """
    try:
        path = write_script(out)
    except HistoError as error:
        fail(COMMAND, str(error))
        sys.exit(1)
    click.echo(f"{path}: drag it onto QuPath's window, with an image or a project open, and press Run")


def write_script(out: Path) -> Path:
    """Write the script with the folder of results in it; return its path.

    Raises
    ------
    HistoError
        If the folder has no results, or cannot be written.
    """
    try:
        has_results = (out / RUN_FILE).is_file() or any(out.glob(f"*/{RUN_FILE}"))
    except OSError:
        has_results = False
    if not has_results:
        raise HistoError(f"{out}: no results there; name the folder that was given to histo-infer as --out")
    path = out / SCRIPT
    write_whole(path, script(out))
    return path


def script(out: Path) -> str:
    """Return the text of the script for a folder of results."""
    text = resources.files(__package__).joinpath("import_results.groovy").read_text(encoding="utf-8")
    folder = str(out.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return text.replace(PLACE, "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in folder))

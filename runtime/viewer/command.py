"""``histo-infer view``: results in a browser."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

import click

from histostream.runtime.viewer.results import Results
from histostream.runtime.viewer.server import DEFAULT_PORT, PortError, Viewer, ViewServer
from histostream.wsi.console import fail, show_only_our_warnings
from histostream.wsi.errors import HistoError

COMMAND = "histo-infer view"


@click.command(context_settings={"show_default": True})
@click.argument("folders", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help=f"Port on 127.0.0.1; default: {DEFAULT_PORT}, or a free one.",
)
@click.option("--browser/--no-browser", default=True, help="Open the page, or only print its address.")
@click.option(
    "--slides",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of slides that were moved since they were run.",
)
def view(folders: tuple[Path, ...], port: int | None, browser: bool, slides: Path | None) -> None:
    """Show results in a browser, also while a run is writing them.

    OUT is the folder that was given to histo-infer as --out, or one slide's folder in it. Two runs of
    one slide can be shown side by side, also from different folders. Only this machine can open the
    page; ? on the page lists the keys. Ctrl-C ends the viewer.
    """
    show_only_our_warnings(COMMAND)
    try:
        if slides is not None and not slides.is_dir():
            raise HistoError(f"{slides}: there is no such folder; check --slides")
        server = _listen(Viewer(Results(folders), slides), port)
    except HistoError as error:
        fail(COMMAND, str(error))
        sys.exit(1)
    with server:
        click.echo(f"open {server.url} (Ctrl-C ends the viewer)")
        if browser and _has_screen():
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo("", err=True)  # after ^C


def _has_screen() -> bool:
    """Whether a browser can open a window; a browser in the terminal cannot run the page."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _listen(viewer: Viewer, port: int | None) -> ViewServer:
    """Listen on a port; without one, on the default port or a free one.

    Raises
    ------
    PortError
        If the port is in use.
    """
    if port is not None:
        return ViewServer(viewer, port)
    try:
        return ViewServer(viewer, DEFAULT_PORT)
    except PortError:
        return ViewServer(viewer)

"""The HTTP server of the viewer: it answers this machine only, and changes nothing.

::

    /                                          the page, and /static/...
    /api/runs                                  list of the results
    /api/run/ROOT/NAME                         one result: progress, areas, size of its slide
    /api/place/ROOT/NAME?x=&y=                 label and scores of a pixel of the label map
    /api/difference/ROOT/NAME/ROOT/NAME        share of pixels in which two label maps differ
    /overview/ROOT/NAME                        overview.png
    /density/ROOT/NAME/LABEL                   float32, little-endian: objects per mm2 of a class, a row after the other
    /tiles/labels/ROOT/NAME/LEVEL/COLUMN/ROW   PNG, grey value = label; level 0 is the finest
    /tiles/slide/ROOT/NAME/LEVEL/COLUMN/ROW    JPEG; level 0 is the coarsest

A page of another site may send requests to this server too, also under a host name of its own that
resolves to 127.0.0.1. Therefore only requests to a local host name are answered, and other sites cannot
read the answers.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import imagecodecs

from histostream.runtime.record import SUMMARY_FILE
from histostream.runtime.result import ResultError
from histostream.runtime.viewer import slide as slide_tiles
from histostream.runtime.viewer.labels import (
    TILE_PX,
    Difference,
    FinishedLabels,
    LabelMap,
    UnfinishedLabels,
    count_differences,
)
from histostream.runtime.viewer.results import (
    DONE,
    LabelView,
    Results,
    Run,
    read_manifest,
    slide_version,
    view_of_journal,
    view_of_result,
)
from histostream.runtime.viewer.slide import SlideTiles
from histostream.wsi.errors import HistoError, SlideError
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, background_label
from histostream.wsi.outputs.sinks.rasters.density import DENSITY_FILE, DensityMap, grid_shape, read_density
from histostream.wsi.outputs.sinks.summary import SummaryRecord
from histostream.wsi.records import from_json

LOCAL = "127.0.0.1"
DEFAULT_PORT = 8737
MAX_OPEN = 4  # slides, label maps and comparisons that are kept, of each
IDLE_S = 60.0  # a connection without a request is closed
MAX_URL = 2000  # characters
STATIC = {
    "viewer.css": "text/css; charset=utf-8",
    "viewer.js": "text/javascript; charset=utf-8",
    "density.js": "text/javascript; charset=utf-8",
    "labels.js": "text/javascript; charset=utf-8",
    "pane.js": "text/javascript; charset=utf-8",
    "openseadragon/openseadragon.min.js": "text/javascript; charset=utf-8",
    "openseadragon/LICENSE.txt": "text/plain; charset=utf-8",
}
# The only style that OpenSeadragon 6.1.1 adds to the page, for touch screens.
OPENSEADRAGON_STYLE = "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'self'; style-src 'self' {OPENSEADRAGON_STYLE}; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
log = logging.getLogger(__name__)


class PortError(HistoError, OSError):
    """The server cannot listen on the port."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request.

    Attributes
    ----------
    body, content_type
        Content and its media type.
    status
        HTTP status.
    immutable
        Whether the content of this address never changes.
    """

    body: bytes
    content_type: str
    status: HTTPStatus = HTTPStatus.OK
    immutable: bool = False


Value = TypeVar("Value")


class _Cache(Generic[Value]):
    """The last used values of a function; each is made once, also when several threads ask for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: OrderedDict[Any, Value] = OrderedDict()

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
                while len(self._values) > MAX_OPEN:
                    self._values.popitem(last=False)  # not closed: another thread may still read from it
            self._values.move_to_end(key)
            return self._values[key]


class Viewer:
    """Finds the content of each address of the server.

    Parameters
    ----------
    results
        The results to show.
    slides
        Folder in which moved slides are looked for; None: moved slides are not shown.
    """

    def __init__(self, results: Results, slides: Path | None = None) -> None:
        self._results, self._slides = results, slides
        self._open_labels: _Cache[LabelMap] = _Cache()
        self._open_slides: _Cache[SlideTiles] = _Cache()
        self._differences: _Cache[Difference] = _Cache()
        self._open_densities: _Cache[DensityMap] = _Cache()

    def answer(self, target: str) -> Answer:
        """Answer a GET request.

        Parameters
        ----------
        target
            Path and query, as sent.

        Raises
        ------
        ResultError
            If there is no such address, result or tile.
        HistoError
            If a file cannot be read.
        """
        try:
            parts = urlsplit(target)
            names = [unquote(part, errors="strict") for part in parts.path.split("/")[1:]]
            path, query = parts.path, parse_qs(parts.query)
        except ValueError as error:
            raise ResultError("this is not a valid address; see all slides, at /") from error
        if path == "/":
            return _static("index.html", "text/html; charset=utf-8")
        if path.startswith("/static/"):
            name = path.removeprefix("/static/")
            if name in STATIC:
                return _static(name, STATIC[name])
        match names:
            case ["api", "runs"]:
                return _json({"runs": [self._summarise(run) for run in self._results]})
            case ["api", "run", root, name]:
                return _json(self._describe(self._results.find(root, name)))
            case ["api", "place", root, name]:
                return _json(self._pixel(self._results.find(root, name), _number(query, "x"), _number(query, "y")))
            case ["api", "difference", root, name, other_root, other_name]:
                return _json(self._compare(self._results.find(root, name), self._results.find(other_root, other_name)))
            case ["overview", root, name]:
                file = self._results.find(root, name).file("overview.png")
                return Answer(file.read_bytes(), "image/png")
            case ["density", root, name, label]:
                return Answer(
                    self._density_of(self._results.find(root, name), label),
                    "application/octet-stream",
                    immutable="v" in query,
                )
            case ["tiles", kind, root, name, *numbers] if len(numbers) == 3:
                if not all(re.fullmatch("[0-9]{1,7}", number, re.ASCII) for number in numbers):
                    raise ResultError("use numbers: /tiles/KIND/ROOT/NAME/LEVEL/COLUMN/ROW")
                level, column, row = map(int, numbers)
                run, immutable = self._results.find(root, name), "v" in query
                if kind == "labels":
                    labels, _ = self._labels(run)
                    png = bytes(imagecodecs.png_encode(labels.tile(level, column, row), level=1))
                    return Answer(png, "image/png", immutable=immutable)
                if kind == "slide":
                    _, view = self._labels(run)
                    jpeg = self._slide(view).jpeg(level, column, row)
                    return Answer(jpeg, "image/jpeg", immutable=immutable)
        raise ResultError("there is nothing at this address; see all slides, at /")

    def _summarise(self, run: Run) -> dict[str, Any]:
        """Return what the list of results shows of a run."""
        entry: dict[str, Any] = {"key": run.key, "name": run.name, "status": run.status, "in": run.folder.parent.name}
        try:
            entry["overview"] = bool(run.file("overview.png"))
        except ResultError:
            entry["overview"] = False
        entry["slide"] = slide_version(run)
        if entry["status"] == DONE:
            try:
                entry["classes"] = _areas(from_json(SummaryRecord, run.json(SUMMARY_FILE)), view_of_result(run))
            except ResultError as error:
                entry["error"] = str(error)
        return entry

    def _describe(self, run: Run) -> dict[str, Any]:
        """Return all that the page needs to show a run."""
        labels, view = self._labels(run)
        entry = self._summarise(run) | {
            "width": view.info.width,
            "height": view.info.height,
            "mpp": view.info.mpp,
            "downsample": view.downsample,
            "levels": len(labels.sizes),
            "tile_px": TILE_PX,
            "outside": NOT_ANALYSED,
        }
        if isinstance(labels, UnfinishedLabels):
            manifest = read_manifest(run)
            bands = [
                {"x0": x0, "x1": x1, "rows": rows} for (x0, x1), rows in zip(manifest.bands, labels.rows, strict=False)
            ]
            finished_px = sum((band["x1"] - band["x0"]) * band["rows"] for band in bands)
            entry |= {
                "version": f"begun-{manifest.runs}",
                "bands": bands,
                "classes": _areas(labels.summary.record(), view),
                "progress": finished_px / (view.info.width * view.info.height),
            }
        else:
            entry |= {
                "version": str(run.file("labels.tif").stat().st_mtime_ns),
                "classes": _areas(from_json(SummaryRecord, run.json(SUMMARY_FILE)), view),
                "progress": 1.0,
                "density": self._describe_density(run, view),
            }
        try:
            slide = self._slide(view)
            entry["image"] = {
                "width": slide.width,
                "height": slide.height,
                "levels": slide.levels,
                "tile_px": slide_tiles.TILE_PX,
                "overlap_px": slide_tiles.OVERLAP_PX,
            }
        except HistoError as error:
            entry["image"], entry["why"] = None, str(error)
        return entry

    def _describe_density(self, run: Run, view: LabelView) -> dict[str, Any] | None:
        """Return what the page needs to show the density of objects; None if it was not written or is damaged."""
        try:
            density = self._density(run, view)
        except HistoError:
            return None
        height, width, _ = density.values.shape
        names = [entry.name for entry in view.info.classes]
        return {
            "width": width,
            "height": height,
            "cell_px": density.cell_um / view.info.mpp * view.downsample,
            "classes": [{"label": label, "name": names[label]} for label in density.labels],
        }

    def _density_of(self, run: Run, label: str) -> bytes:
        """Return the density map of a class."""
        density = self._density(run, view_of_result(run))
        if label not in map(str, density.labels):
            raise ResultError(f"{run.name}: objects of this class are not counted; load the page again")
        values = density.values[..., [str(k) for k in density.labels].index(label)]
        return values.astype("<f4").tobytes()

    def _density(self, run: Run, view: LabelView) -> DensityMap:
        """Read the density map of a finished run.

        Raises
        ------
        ResultError, SlideError
            If there is none, it is damaged, or it is of another label map.
        """
        file = run.file(DENSITY_FILE)
        stat = file.stat()
        density = self._open_densities.get(
            (run.key, stat.st_mtime_ns, stat.st_ino, stat.st_size), lambda: read_density(file)
        )
        if density.values.shape[:2] != grid_shape(view.info) or max(density.labels) >= len(view.info.classes):
            raise ResultError(f"{run.name}: {file.name} is of another run; run the slide again")
        return density

    def _pixel(self, run: Run, x: int, y: int) -> dict[str, Any]:
        """Return label and scores of a pixel of the label map."""
        labels, view = self._labels(run)
        width, height, classes = view.info.width, view.info.height, view.info.classes
        if not (0 <= x < width and 0 <= y < height):
            raise ResultError(f"{run.name}: the label map has no pixel {x}, {y}; it has {width} x {height} pixels")
        label = int(labels.tile(0, x // TILE_PX, y // TILE_PX)[y % TILE_PX, x % TILE_PX])
        scores = labels.scores(x, y)
        return {
            "x": x,
            "y": y,
            "label": label,
            "name": classes[label].name if label < len(classes) else None,
            "scores": None if scores is None or label == NOT_ANALYSED else scores,
        }

    def _compare(self, run: Run, other_run: Run) -> dict[str, Any]:
        """Return in how many pixels the labels of two runs differ."""
        labels, view = self._labels(run)
        other, other_view = self._labels(other_run)
        if isinstance(labels, UnfinishedLabels) or isinstance(other, UnfinishedLabels):
            raise ResultError("only finished runs can be compared; wait until both are finished")
        if labels.sizes != other.sizes or view.downsample != other_view.downsample:
            raise ResultError("the label maps differ in size; compare runs at one resolution")
        if [c.name for c in view.info.classes] != [c.name for c in other_view.info.classes]:
            raise ResultError("the runs have different classes; compare runs of models with the same classes")
        difference = self._differences.get((labels, other), lambda: count_differences(labels, other))
        return {
            "pixels": difference.pixels,
            "of": difference.compared,
            "share": difference.pixels / difference.compared if difference.compared else None,
            "every": 1 << difference.level,
        }

    def _labels(self, run: Run) -> tuple[LabelMap, LabelView]:
        """Return the current label map of a run, and its position on the slide."""
        if run.status != DONE:
            manifest = read_manifest(run)
            view = view_of_journal(run, manifest)
            # A run that starts over counts its runs from 1 again; a run that is resumed keeps its strips.
            key = (run.key, json.dumps(dict(manifest.fingerprint), sort_keys=True), manifest.runs)
            labels = self._open_labels.get(key, lambda: UnfinishedLabels(run.folder, manifest.bands, view.info))
            if isinstance(labels, UnfinishedLabels):
                labels.refresh()
            return labels, view
        view = view_of_result(run)
        file = run.file("labels.tif")
        try:
            scores = run.file("probabilities.tif")
        except ResultError:
            scores = None
        stat = file.stat()
        version = (run.key, stat.st_mtime_ns, stat.st_ino, stat.st_size, view, scores is None)
        return self._open_labels.get(version, lambda: FinishedLabels(file, scores, view.info)), view

    def _slide(self, view: LabelView) -> SlideTiles:
        """Open the slide of a run.

        Raises
        ------
        SlideError
            If it was moved or changed, or cannot be opened.
        """

        def open_tiles() -> SlideTiles:
            slide = SlideTiles(view.place.find(self._slides))
            for slide_px, label_px in ((slide.width, view.info.width), (slide.height, view.info.height)):
                # Only a part of the last pixel of the label map may be on the slide.
                if abs(slide_px / view.downsample - label_px) > 1:
                    raise SlideError(f"{slide.path}: the label map is of another slide; run the slide again")
            return slide

        return self._open_slides.get((view.place, view.downsample), open_tiles)


class _Handler(BaseHTTPRequestHandler):
    """Reads HTTP requests and sends the answers of a `Viewer`."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    # Headers and body are sent together: sent apart, each tile would wait 40 ms for an acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: ViewServer

    def do_GET(self) -> None:
        self._send(self._answer())

    def do_HEAD(self) -> None:
        self._send(self._answer(), head=True)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer an invalid request with a short JSON error, and close the connection."""
        self.close_connection = True
        if code == HTTPStatus.NOT_IMPLEMENTED:  # how Python answers a method without a do_... function
            self._send(_error(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD"))
        else:
            self._send(_error(HTTPStatus(code), message))

    def version_string(self) -> str:
        """Return the Server header, without versions of Python and HistoStream."""
        return "HistoStream"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Do not log requests."""

    def handle(self) -> None:
        """Answer requests until the client closes the connection, which is not an error."""
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _answer(self) -> Answer:
        hosts = [host.lower() for host in self.headers.get_all("Host", [])]
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            return _error(HTTPStatus.FORBIDDEN, "only requests to this machine's own name")
        same_site = self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        if not same_site and self.path != "/":  # another site may link to the page, and to nothing else
            return _error(HTTPStatus.FORBIDDEN, "only requests of the page itself")
        if len(self.path) > MAX_URL:
            return _error(HTTPStatus.REQUEST_URI_TOO_LONG, "the address is too long")
        try:
            return self.server.viewer.answer(self.path)
        except ResultError as error:
            return _error(HTTPStatus.NOT_FOUND, str(error))
        except HistoError as error:
            return _error(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except Exception as error:  # a bug, or out of memory: the server goes on
            log.warning("%s: %s: %s", self.path, type(error).__name__, error)
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the terminal shows its cause")

    def _send(self, answer: Answer, *, head: bool = False) -> None:
        self.send_response(answer.status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "private, max-age=86400, immutable" if answer.immutable else "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if not head:
            self.wfile.write(answer.body)


class ViewServer(ThreadingHTTPServer):
    """Serves a `Viewer` on 127.0.0.1.

    Parameters
    ----------
    viewer
        The content.
    port
        Port; 0 takes a free one.

    Raises
    ------
    PortError
        If the port is in use.

    Attributes
    ----------
    url
        Address of the page.
    hosts
        Values of the Host header that are answered.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, viewer: Viewer, port: int = 0) -> None:
        self.viewer = viewer
        try:
            super().__init__((LOCAL, port), _Handler)
        except (OSError, OverflowError) as error:
            raise PortError(
                f"port {port} cannot be used ({getattr(error, 'strerror', None) or error}); "
                "choose another with --port, or leave it out"
            ) from error
        port = self.server_address[1]
        self.url = f"http://{LOCAL}:{port}/"
        names = (LOCAL, "localhost", "[::1]")
        self.hosts = frozenset(f"{name}:{port}" for name in names)
        if port == 80:  # which browsers leave out
            self.hosts |= frozenset(names)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of one connection; the others go on."""
        log.exception("a request failed")


def _static(name: str, content_type: str) -> Answer:
    folder = resources.files("histostream.runtime.viewer")
    return Answer(folder.joinpath("static", *name.split("/")).read_bytes(), content_type)


def _json(content: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> Answer:
    text = json.dumps(content, allow_nan=False)
    return Answer(text.encode("utf-8", "replace"), "application/json", status)


def _error(status: HTTPStatus, message: str | None) -> Answer:
    return _json({"error": message or status.phrase}, status)


def _number(query: dict[str, list[str]], name: str) -> int:
    values = query.get(name, [])
    if len(values) != 1 or not re.fullmatch("[0-9]{1,9}", values[0], re.ASCII):
        raise ResultError(f"{name} must be one whole number")
    return int(values[0])


def _areas(summary: SummaryRecord, view: LabelView) -> list[dict[str, Any]]:
    """Return name, colour, area in mm2, share and objects of each class, from the pixels in the summary."""
    pixels = [entry.pixels for entry in summary.classes if entry.pixels is not None]
    if len(pixels) != len(view.info.classes):
        raise ResultError("summary.json holds invalid values; run the slide again")
    background = background_label(view.info.classes)
    total, pixel_mm2 = sum(pixels), (view.info.mpp / 1000) ** 2
    return [
        {
            "name": entry.name,
            "color": entry.hex,
            "background": label == background,
            "area_mm2": count * pixel_mm2,
            "share": count / total if total else None,
            "objects": summary.classes[label].objects,
            "objects_per_mm2": summary.classes[label].objects_per_mm2,
            "touching_share": summary.classes[label].touching_share,
        }
        for label, (entry, count) in enumerate(zip(view.info.classes, pixels, strict=True))
    ]

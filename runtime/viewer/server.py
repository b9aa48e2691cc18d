"""The HTTP server behind the page: answers this machine only, and changes nothing.

::

    /                                          the page, and /static/...
    /api/runs                                  which results there are
    /api/run/ROOT/NAME                         one of them, how far it is, where its slide is
    /api/place/ROOT/NAME?x=&y=                 label and scores of a pixel of the label map
    /api/difference/ROOT/NAME/ROOT/NAME        share of pixels in which two label maps differ
    /overview/ROOT/NAME                        overview.png
    /tiles/labels/ROOT/NAME/LEVEL/COLUMN/ROW   PNG, grey is the label; level 0 is the finest
    /tiles/slide/ROOT/NAME/LEVEL/COLUMN/ROW    JPEG; level 0 is the coarsest

A page of another site may send requests here too, under a name of its own that leads to
127.0.0.1; so only requests to a local name are answered, and no answer may be read across sites.
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
import numpy as np

from histostream.runtime.result import ResultError
from histostream.runtime.viewer import slide as slide_tiles
from histostream.runtime.viewer.labels import TILE_PX, FinishedLabels, LabelMap, UnfinishedLabels
from histostream.runtime.viewer.results import (
    DONE,
    Results,
    Run,
    Seen,
    begun_in,
    seen_in_journal,
    seen_in_result,
    version_in,
)
from histostream.runtime.viewer.slide import SlideTiles
from histostream.wsi.errors import HistoError, SlideError
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, SlideInfo

LOCAL = "127.0.0.1"
DEFAULT_PORT = 8737
OPEN_SLIDES = 4
OPEN_LABELS = 4
IDLE_S = 60.0  # a connection without a request is closed
COMPARED_PX = 1 << 27  # above that, two label maps are compared at a coarser level
MAX_URL = 2000
STATIC = {
    "viewer.css": "text/css; charset=utf-8",
    "viewer.js": "text/javascript; charset=utf-8",
    "labels.js": "text/javascript; charset=utf-8",
    "pane.js": "text/javascript; charset=utf-8",
    "openseadragon/openseadragon.min.js": "text/javascript; charset=utf-8",
    "openseadragon/LICENSE.txt": "text/plain; charset=utf-8",
}
# The one style that OpenSeadragon 6.1.1 puts into the page, for touch screens.
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
    """The port cannot be listened on."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered with.

    Attributes
    ----------
    body, kind
        Content, and its type.
    status
        HTTP's.
    lasting
        Whether the same address will always give the same.
    """

    body: bytes
    kind: str
    status: HTTPStatus = HTTPStatus.OK
    lasting: bool = False


Kept = TypeVar("Kept")


class _LastUsed(Generic[Kept]):
    """A few open things, the last used ones; each is opened once, also by several threads."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept: OrderedDict[Any, Kept] = OrderedDict()

    def get(self, key: Any, make: Callable[[], Kept]) -> Kept:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
                while len(self._kept) > self._most:
                    self._kept.popitem(last=False)  # whoever still reads from it holds it
            self._kept.move_to_end(key)
            return self._kept[key]


class Viewer:
    """What the addresses of the server lead to; knows nothing of HTTP's connections.

    Parameters
    ----------
    results
        The folders.
    slides
        Where slides are looked for that are not where they were; None: nowhere.
    """

    def __init__(self, results: Results, slides: Path | None = None) -> None:
        self._results, self._slides = results, slides
        self._open_labels: _LastUsed[LabelMap] = _LastUsed(OPEN_LABELS)
        self._open_slides: _LastUsed[SlideTiles] = _LastUsed(OPEN_SLIDES)
        self._compared: _LastUsed[dict[str, Any]] = _LastUsed(OPEN_LABELS)

    def answer(self, target: str) -> Answer:
        """Answer a GET request.

        Parameters
        ----------
        target
            Path and query, as sent.

        Raises
        ------
        ResultError
            If there is no such thing.
        HistoError
            If it cannot be read.
        """
        try:
            parts = urlsplit(target)
            names = [unquote(part, errors="strict") for part in parts.path.split("/")[1:]]
            path, query = parts.path, parse_qs(parts.query)
        except ValueError as error:
            raise ResultError("that is no address; see all slides, at /") from error
        if path == "/":
            return _static("index.html", "text/html; charset=utf-8")
        if path.startswith("/static/"):
            name = path.removeprefix("/static/")
            if name in STATIC:
                return _static(name, STATIC[name])
        match names:
            case ["api", "runs"]:
                return _json({"runs": [self._entry(run) for run in self._results]})
            case ["api", "run", root, name]:
                return _json(self._describe(self._results.find(root, name)))
            case ["api", "place", root, name]:
                place = _number(query, "x"), _number(query, "y")
                return _json(self._place(self._results.find(root, name), *place))
            case ["api", "difference", root, name, other_root, other_name]:
                pair = self._results.find(root, name), self._results.find(other_root, other_name)
                return _json(self._difference(*pair))
            case ["overview", root, name]:
                file = self._results.find(root, name).file("overview.png")
                return Answer(file.read_bytes(), "image/png")
            case ["tiles", kind, root, name, *numbers] if len(numbers) == 3:
                if not all(re.fullmatch("[0-9]{1,7}", number, re.ASCII) for number in numbers):
                    raise ResultError("use numbers: /tiles/KIND/ROOT/NAME/LEVEL/COLUMN/ROW")
                level, column, row = map(int, numbers)
                run, lasting = self._results.find(root, name), "v" in query
                if kind == "labels":
                    labels, _ = self._labels(run)
                    data = imagecodecs.png_encode(labels.tile(level, column, row), level=1)
                    return Answer(bytes(data), "image/png", lasting=lasting)
                if kind == "slide":
                    jpeg = self._slide(run).jpeg(level, column, row)
                    return Answer(jpeg, "image/jpeg", lasting=lasting)
        raise ResultError("there is nothing at this address; see all slides, at /")

    def _entry(self, run: Run) -> dict[str, Any]:
        """Say what the list of results shows of one."""
        said: dict[str, Any] = {"key": run.key, "name": run.name, "status": run.status, "in": run.folder.parent.name}
        try:
            said["overview"] = bool(run.file("overview.png"))
        except ResultError:
            said["overview"] = False
        said["slide"] = version_in(run)
        if said["status"] == DONE:
            try:
                seen = seen_in_result(run)
                said["classes"] = _areas(run.json("summary.json"), seen)
            except ResultError as error:
                said["error"] = str(error)
        return said

    def _describe(self, run: Run) -> dict[str, Any]:
        """Say all that the page needs to show a run."""
        labels, seen = self._labels(run)
        said = self._entry(run) | {
            "width": seen.width,
            "height": seen.height,
            "mpp": seen.mpp,
            "downsample": seen.downsample,
            "levels": len(labels.sizes),
            "tile_px": TILE_PX,
            "outside": NOT_ANALYSED,
        }
        if isinstance(labels, UnfinishedLabels):
            begun = begun_in(run)
            said["version"] = f"begun-{begun.runs}"
            said["bands"] = [
                {"x0": x0, "x1": x1, "rows": rows} for (x0, x1), rows in zip(begun.bands, labels.rows, strict=False)
            ]
            said["classes"] = _areas(labels.summary.as_dict(), seen)
            done = sum((b["x1"] - b["x0"]) * b["rows"] for b in said["bands"])
            said["progress"] = done / (seen.width * seen.height)
        else:
            said["version"] = str(run.file("labels.tif").stat().st_mtime_ns)
            said["classes"] = _areas(run.json("summary.json"), seen)
            said["progress"] = 1.0
        try:
            slide = self._slide(run, seen)
            said["image"] = {
                "width": slide.width,
                "height": slide.height,
                "levels": slide.levels,
                "tile_px": slide_tiles.TILE_PX,
                "overlap_px": slide_tiles.OVERLAP_PX,
            }
        except HistoError as error:
            said["image"], said["why"] = None, str(error)
        return said

    def _place(self, run: Run, x: int, y: int) -> dict[str, Any]:
        labels, seen = self._labels(run)
        if not (0 <= x < seen.width and 0 <= y < seen.height):
            raise ResultError(f"{run.name}: the label map has no pixel {x}, {y}; choose one of it")
        label = int(labels.tile(0, x // TILE_PX, y // TILE_PX)[y % TILE_PX, x % TILE_PX])
        scores = labels.scores(x, y)
        named = label < len(seen.classes)
        return {
            "x": x,
            "y": y,
            "label": label,
            "name": seen.classes[label].name if named else None,
            "scores": None if scores is None or label == NOT_ANALYSED else [s / 255 for s in scores],
        }

    def _difference(self, one: Run, other: Run) -> dict[str, Any]:
        labels, seen = self._labels(one)
        others, its = self._labels(other)
        if isinstance(labels, UnfinishedLabels) or isinstance(others, UnfinishedLabels):
            raise ResultError("differences are counted when both runs are finished; wait for it")
        if labels.sizes != others.sizes or seen.downsample != its.downsample:
            raise ResultError("the label maps have different pixels; compare runs at one resolution")
        if [c.name for c in seen.classes] != [c.name for c in its.classes]:
            raise ResultError("the runs have different classes; compare runs of the same ones")

        def count() -> dict[str, Any]:
            level = next(
                (k for k, (w, h) in enumerate(labels.sizes) if w * h <= COMPARED_PX),
                len(labels.sizes) - 1,
            )
            width, height = labels.sizes[level]
            both = differ = 0
            for row in range(-(-height // TILE_PX)):
                for column in range(-(-width // TILE_PX)):
                    a, b = labels.tile(level, column, row), others.tile(level, column, row)
                    both += int(np.count_nonzero((a != NOT_ANALYSED) & (b != NOT_ANALYSED)))
                    differ += int(np.count_nonzero((a != b) & (a != NOT_ANALYSED) & (b != NOT_ANALYSED)))
            return {"pixels": differ, "of": both, "share": differ / both if both else None, "every": 1 << level}

        return self._compared.get((labels, others), count)

    def _labels(self, run: Run) -> tuple[LabelMap, Seen]:
        """Return the label map of a run as it is now, and how it lies on the slide."""
        if run.status != DONE:
            begun = begun_in(run)
            seen = seen_in_journal(run, begun)
            # RunManifest anew, a run counts from 1 again; going on, it keeps what is finished.
            key = (run.key, json.dumps(dict(begun.what), sort_keys=True), begun.runs)
            info = SlideInfo(run.name, seen.width, seen.height, seen.mpp, seen.classes)
            found = self._open_labels.get(key, lambda: UnfinishedLabels(run.folder, begun.bands, info))
            if isinstance(found, UnfinishedLabels):
                found.refresh()
            return found, seen
        seen = seen_in_result(run)
        file = run.file("labels.tif")
        try:
            scores = run.file("probabilities.tif")
        except ResultError:
            scores = None
        about = file.stat()
        name = (run.key, about.st_mtime_ns, about.st_ino, about.st_size, seen, scores is None)

        def opened() -> FinishedLabels:
            return FinishedLabels(file, scores, seen.width, seen.height, len(seen.classes))

        return self._open_labels.get(name, opened), seen

    def _slide(self, run: Run, seen: Seen | None = None) -> SlideTiles:
        """Return the slide of a run.

        Raises
        ------
        SlideError
            If it is not there as it was, or cannot be opened.
        """
        if seen is None:
            _, seen = self._labels(run)
        place = seen.place

        def opened() -> SlideTiles:
            slide = SlideTiles(place.find(self._slides))
            for side, labels in ((slide.width, seen.width), (slide.height, seen.height)):
                # The last pixel of the label map may be covered in part.
                if abs(side / seen.downsample - labels) > 1:
                    raise SlideError(f"{slide.path}: the label map is not of this slide; run it again")
            return slide

        return self._open_slides.get((place, seen.downsample), opened)


class _Handler(BaseHTTPRequestHandler):
    """Speaks HTTP for a `Viewer`."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    # Header and tile leave together; apart, each tile would wait 40 ms for the other side's "yes".
    wbufsize = -1
    disable_nagle_algorithm = True
    server: ViewServer

    def do_GET(self) -> None:
        self._send(self._answer())

    def do_HEAD(self) -> None:
        self._send(self._answer(), head=True)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request of ours, as short JSON; the connection ends."""
        self.close_connection = True
        # Python says 501 of a method that is not there.
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == 501 else HTTPStatus(code)
        self._send(_error(status, message if code != 501 else "only GET and HEAD"))

    def version_string(self) -> str:
        """Say no more of what is at work than this."""
        return "HistoStream"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing of each request."""

    def handle(self) -> None:
        """Answer requests until the other side has gone, which is no error."""
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _answer(self) -> Answer:
        hosts = [host.lower() for host in self.headers.get_all("Host", [])]
        if len(hosts) != 1 or hosts[0] not in self.server.names:
            return _error(HTTPStatus.FORBIDDEN, "only requests to this machine's own name")
        elsewhere = self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        if elsewhere and self.path != "/":  # a link may lead to the page, but to nothing else
            return _error(HTTPStatus.FORBIDDEN, "only requests of the page itself")
        if len(self.path) > MAX_URL:
            return _error(HTTPStatus.REQUEST_URI_TOO_LONG, "the address is too long")
        try:
            return self.server.viewer.answer(self.path)
        except ResultError as error:
            return _error(HTTPStatus.NOT_FOUND, str(error))
        except HistoError as error:
            return _error(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except Exception as error:  # a fault of ours, or memory: the page may go on
            log.warning("%s: %s: %s", self.path, type(error).__name__, error)
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "it cannot be read just now")

    def _send(self, answer: Answer, *, head: bool = False) -> None:
        self.send_response(answer.status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        lasting = "private, max-age=86400, immutable" if answer.lasting else "no-store"
        self.send_header("Cache-Control", lasting)
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
        What is served.
    port
        Port; 0 takes a free one.

    Raises
    ------
    PortError
        If the port is in use.

    Attributes
    ----------
    url
        Where the page is.
    names
        What requests may call this server.
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
        hosts = (LOCAL, "localhost", "[::1]")
        self.names = frozenset(f"{host}:{port}" for host in hosts)
        if port == 80:  # which browsers leave out
            self.names |= frozenset(hosts)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note what went wrong with a connection; it ends, the others go on."""
        log.exception("a request failed")


def _static(name: str, kind: str) -> Answer:
    folder = resources.files("histostream.runtime.viewer")
    return Answer(folder.joinpath("static", *name.split("/")).read_bytes(), kind)


def _json(said: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> Answer:
    text = json.dumps(said, allow_nan=False)
    return Answer(text.encode("utf-8", "replace"), "application/json", status)


def _error(status: HTTPStatus, message: str | None) -> Answer:
    return _json({"error": message or status.phrase}, status)


def _number(query: dict[str, list[str]], name: str) -> int:
    given = query.get(name, [])
    if len(given) != 1 or not re.fullmatch("[0-9]{1,9}", given[0], re.ASCII):
        raise ResultError(f"{name} must be one whole number")
    return int(given[0])


def _areas(summary: dict[str, Any], seen: Seen) -> list[dict[str, Any]]:
    """Return names, colours, areas in mm2 and shares; pixels are as the summary says."""
    try:
        pixels = [int(entry["pixels"]) for entry in summary["classes"]]
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ResultError("summary.json says what cannot be; run the slide again") from error
    total, pixel_mm2 = sum(pixels), (seen.mpp / 1000) ** 2
    return [
        {
            "name": entry.name,
            "color": entry.hex,
            "area_mm2": count * pixel_mm2,
            "share": count / total if total else None,
        }
        for entry, count in zip(seen.classes, pixels, strict=True)
    ]

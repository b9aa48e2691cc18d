"""The viewer's server, asked over HTTP: tiles are the labels, and nothing else is given away."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histostream.runtime import slide_run as infer
from histostream.runtime.options import Options
from histostream.runtime.result import ResultError
from histostream.runtime.slide_run import segment_slide
from histostream.runtime.viewer import labels as labels_module
from histostream.runtime.viewer.results import Results
from histostream.runtime.viewer.server import LOCAL, PortError, Viewer, ViewServer
from histostream.wsi.errors import StoppedError
from tests.runtime.conftest import IdentityEngine, PlaceDependentEngine, random_pixels, write_slide
from tests.runtime.viewer.viewing import serving, stop_after

ALL = Options(tissue=False, overlap_px=16, probabilities=True)
Array = NDArray[np.uint8]


@dataclass
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def image(self) -> Array:
        with Image.open(io.BytesIO(self.body)) as image:
            return np.asarray(image)


def ask(server: ViewServer, path: str, method: str = "GET", headers: dict[str, str] | None = None) -> Answered:
    port = server.server_address[1]
    connection = http.client.HTTPConnection(LOCAL, port, timeout=20)
    try:
        host = {} if headers and "Host" in headers else {"Host": f"{LOCAL}:{port}"}
        connection.putrequest(method, path, skip_host=True)
        for name, value in {**host, **(headers or {}), "Connection": "close"}.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return Answered(answer.status, dict(answer.headers), answer.read())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished slides; the first is 2 x as fine as the model."""
    folder = tmp_path_factory.mktemp("viewed")
    pixels = np.kron(random_pixels(150, 110), np.ones((16, 16, 1), np.uint8))
    fine = write_slide(folder / "a fine & odd slide.tif", pixels[:1700, :2301], mpp=0.25)
    segment_slide(fine, IdentityEngine(), folder / "out", replace(ALL, rasters=("density",)))
    same = write_slide(folder / "same.tif", random_pixels(300, 200))
    segment_slide(same, PlaceDependentEngine(), folder / "out", replace(ALL, probabilities=False))
    return folder / "out"


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[ViewServer]:
    with serving(out) as server:
        yield server


FINE = "0/" + quote("a fine & odd slide")


def test_the_list_has_every_slide_and_its_areas(server: ViewServer, out: Path) -> None:
    runs = ask(server, "/api/runs").json["runs"]
    assert [run["name"] for run in runs] == ["a fine & odd slide", "same"]
    for run in runs:
        summary = json.loads((out / run["name"] / "summary.json").read_text())
        assert run["status"] == "done"
        areas = [entry["area_mm2"] for entry in summary["classes"]]
        assert [entry["area_mm2"] for entry in run["classes"]] == pytest.approx(areas)
    overview = ask(server, "/overview/0/same")
    assert overview.body == (out / "same" / "overview.png").read_bytes()


def test_label_tiles_are_the_label_map_at_every_level(server: ViewServer, out: Path) -> None:
    run = ask(server, f"/api/run/{FINE}").json
    assert (run["downsample"], run["mpp"]) == (2.0, 0.5)
    with tifffile.TiffFile(out / "a fine & odd slide" / "labels.tif") as file:
        assert run["levels"] == len(file.pages) == 3
        for level, page in enumerate(file.pages):
            labels = page.asarray()
            for row in range(-(-labels.shape[0] // 512)):
                for column in range(-(-labels.shape[1] // 512)):
                    tile = ask(server, f"/tiles/labels/{FINE}/{level}/{column}/{row}").image
                    place = np.s_[row * 512 : row * 512 + 512, column * 512 : column * 512 + 512]
                    np.testing.assert_array_equal(tile, labels[place])


def test_the_density_of_objects_is_that_of_the_file(server: ViewServer, out: Path) -> None:
    run = ask(server, f"/api/run/{FINE}").json
    values = tifffile.imread(out / "a fine & odd slide" / "density.tif")  # (class, row, column)
    density = run["density"]
    assert (density["height"], density["width"]) == values.shape[1:] == (7, 9)
    assert density["cell_px"] == 64 / 0.25
    assert [entry["name"] for entry in density["classes"]] == ["red", "green", "blue"]
    for label in range(3):
        found = np.frombuffer(ask(server, f"/density/{FINE}/{label}").body, "<f4").reshape(7, 9)
        np.testing.assert_array_equal(found, values[label])
    assert [ask(server, f"/density/{FINE}/{label}").status for label in ("3", "01", "-1", "x")] == [404] * 4
    assert ask(server, "/density/0/same/0").status == 404
    assert ask(server, "/api/run/0/same").json["density"] is None
    objects = [entry["objects"] for entry in run["classes"]]
    assert objects == [
        entry["objects"] for entry in json.loads((out / "a fine & odd slide" / "summary.json").read_text())["classes"]
    ]
    assert min(objects) > 0


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:300], lambda data: b"no TIFF"])
def test_a_spoilt_density_map_leaves_the_labels(out: Path, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    folder = shutil.copytree(out / "a fine & odd slide", tmp_path / "copy" / "fine")
    (folder / "density.tif").write_bytes(spoil((folder / "density.tif").read_bytes()))
    with serving(tmp_path / "copy") as server:
        run = ask(server, "/api/run/0/fine")
        assert (run.status, run.json["density"]) == (200, None)
        assert ask(server, "/density/0/fine/0").status in (404, 422)
        tifffile.imwrite(folder / "density.tif", np.ones((5, 5), np.float32))  # of another program
        assert ask(server, "/api/run/0/fine").json["density"] is None


def test_slide_tiles_are_the_slide(server: ViewServer, out: Path) -> None:
    image = ask(server, f"/api/run/{FINE}").json["image"]
    assert (image["width"], image["height"]) == (2301, 1700)
    slide = tifffile.imread(out.parent / "a fine & odd slide.tif")
    finest, side, overlap = image["levels"] - 1, image["tile_px"], image["overlap_px"]
    last = 2300 // side
    tile = ask(server, f"/tiles/slide/{FINE}/{finest}/{last}/1").image
    pixels = slide[side - overlap : 2 * side + overlap, last * side - overlap :]
    assert tile.shape == pixels.shape  # not padded
    assert np.abs(tile.astype(int) - pixels).mean() < 12  # JPEG, of noise
    coarsest = ask(server, f"/tiles/slide/{FINE}/0/0/0").image
    assert coarsest.shape == (-(-1700 // 2**finest), -(-2301 // 2**finest), 3)


def test_a_place_has_its_label_and_scores(server: ViewServer, out: Path) -> None:
    folder = out / "a fine & odd slide"
    labels = tifffile.imread(folder / "labels.tif", level=0)
    scores = tifffile.imread(folder / "probabilities.tif", level=0)
    for x, y in ((0, 0), (700, 513), (1149, 849)):
        said = ask(server, f"/api/place/{FINE}?x={x}&y={y}").json
        assert said["label"] == labels[y, x]
        assert said["name"] == ("red", "green", "blue")[labels[y, x]]
        assert [round(65535 * score) for score in said["scores"]] == scores[y, x].tolist()
    assert ask(server, "/api/place/0/same?x=3&y=4").json["scores"] is None


@pytest.mark.parametrize(
    "path",
    [
        "/tiles/labels/0/same/0/1/0",
        "/tiles/labels/0/same/9/0/0",
        "/tiles/labels/0/same/-1/0/0",
        "/tiles/labels/0/same/0/0/99999999",
        "/tiles/labels/0/same/0/0/x",
        "/tiles/labels/0/same/0",
        "/tiles/slide/0/same/0/0/7",
        "/tiles/slide/0/same/40/0/0",
        "/tiles/run.json/0/same/0/0/0",
        "/tiles/labels/0/same/%d9%a0/0/0",
        "/api/place/0/same?x=300&y=0",
        "/api/place/0/same?x=-1&y=0",
        "/api/place/0/same?x=1",
        "/api/place/0/same?x=1&x=2&y=0",
        "/api/run/1/same",
        "/api/run/-1/same",
        "/api/run/00/same",
        "/api/run/0/",
        "/api/run/0/..",
        "/api/run/0/%2e%2e",
        "/api/run/0/..%2fout%2fsame",
        "/api/run/0/same%2f..%2fsame",
        "/api/run/0/%2fetc",
        "/api/run/0/same%00",
        "/api/run/0/%ff",
        "/overview/0/../same",
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static/",
        "/static/index.html",
        "/out/same/run.json",
        "/0/same/run.json",
        "//etc/passwd",
        "/[",
        "//[",
        "/api",
        "/%",
        "/index.html",
    ],
)
def test_what_is_not_offered_is_not_found(server: ViewServer, path: str) -> None:
    answer = ask(server, path)
    assert answer.status == 404, answer.body
    assert list(answer.json) == ["error"]
    assert len(answer.body) < 300


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", ""])
def test_requests_under_another_name_are_refused(server: ViewServer, host: str) -> None:
    port = server.server_address[1]
    answer = ask(server, "/api/runs", headers={"Host": host.format(port=port)})
    assert answer.status == 403
    assert b"same" not in answer.body
    for local in ("localhost", "LOCALHOST", "[::1]", "127.0.0.1"):
        assert ask(server, "/api/runs", headers={"Host": f"{local}:{port}"}).status == 200


def test_other_sites_may_link_to_the_page_but_load_nothing(server: ViewServer) -> None:
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert ask(server, "/", headers=elsewhere).status == 200
    assert ask(server, "/overview/0/same", headers=elsewhere).status == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "X"])
def test_only_reading_is_allowed(server: ViewServer, method: str) -> None:
    answer = ask(server, "/api/runs", method)
    assert answer.status == 405
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_every_answer_is_fenced_in(server: ViewServer) -> None:
    for path in ("/", "/static/viewer.js", "/api/runs", "/tiles/labels/0/same/0/0/0", "/no"):
        headers = ask(server, path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
    page = ask(server, "/")
    head = ask(server, "/", "HEAD")
    assert head.body == b""
    assert head.headers["Content-Length"] == str(len(page.body))


def test_openseadragon_is_shipped_with_its_licence(server: ViewServer) -> None:
    page = ask(server, "/").body.decode()
    script = ask(server, "/static/openseadragon/openseadragon.min.js").body.decode()
    version = script.split()[2]
    assert f"OpenSeadragon {version} shows the slide" in page.replace("</a>", "")
    assert b"Redistribution" in ask(server, "/static/openseadragon/LICENSE.txt").body


def test_links_out_of_the_folder_are_not_followed(out: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    for name in ("run.json", "summary.json", "labels.tif"):
        (secret / name).write_bytes((out / "same" / name).read_bytes())
    (secret / "overview.png").write_bytes(b"secret")
    inside = tmp_path / "out"
    inside.mkdir()
    (inside / "linked").symlink_to(secret)
    (inside / "real").mkdir()
    for name in ("run.json", "summary.json", "labels.tif"):
        (inside / "real" / name).write_bytes((out / "same" / name).read_bytes())
    (inside / "real" / "overview.png").symlink_to(secret / "overview.png")
    with serving(inside) as server:
        assert [run["name"] for run in ask(server, "/api/runs").json["runs"]] == ["real"]
        assert ask(server, "/api/run/0/linked").status == 404
        assert ask(server, "/tiles/labels/0/linked/0/0/0").status == 404
        answer = ask(server, "/overview/0/real")
        assert answer.status == 404
        assert answer.body != b"secret"
        assert ask(server, "/tiles/labels/0/real/0/0/0").status == 200


@pytest.fixture
def copied(out: Path, tmp_path: Path) -> Path:
    """A finished slide's folder, whose files may be spoilt."""
    folder = tmp_path / "copied" / "same"
    folder.mkdir(parents=True)
    for file in (out / "same").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def said_of(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text())


def test_a_slide_that_moved_is_found_by_its_name_and_content(copied: Path, out: Path, tmp_path: Path) -> None:
    said = said_of(copied)
    said["slide"]["source"] = said["slide"]["path"] = "/nowhere/same.tif"
    (copied / "run.json").write_text(json.dumps(said))
    with serving(copied) as server:
        run = ask(server, "/api/run/0/same").json
        assert run["image"] is None
        assert "/nowhere/same.tif is not there" in run["why"]
        assert "--slides" in run["why"]
        assert ask(server, "/tiles/slide/0/same/0/0/0").status == 422
        assert ask(server, "/tiles/labels/0/same/0/0/0").status == 200  # the overlay alone
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "same.tif").write_bytes((out.parent / "same.tif").read_bytes())  # another time
    with serving(copied, slides=moved) as server:
        assert ask(server, "/api/run/0/same").json["image"]["width"] == 300
    with (moved / "same.tif").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with serving(copied, slides=moved) as server:
        assert "was changed since" in ask(server, "/api/run/0/same").json["why"]


def test_only_the_slide_that_was_run_is_opened(copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("secret")
    about = other.stat()
    said = said_of(copied)
    said["slide"] |= {"source": str(other)}
    (copied / "run.json").write_text(json.dumps(said))
    with serving(copied) as server:
        assert "another size" in ask(server, "/api/run/0/same").json["why"]
    said["slide"] |= {"bytes": about.st_size, "modified": str(about.st_mtime_ns)}
    (copied / "run.json").write_text(json.dumps(said))
    with serving(copied) as server:  # no slide at all
        answer = ask(server, "/tiles/slide/0/same/0/0/0")
        assert answer.status == 422
        assert b"secret" not in answer.body


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("run.json", lambda data: b"[" * 100_000),
        ("run.json", lambda data: data.replace(b'"width": 300', b'"width": 3000000000')),
        ("run.json", lambda data: data.replace(b'"downsample": 1.0', b'"downsample": NaN')),
        ("run.json", lambda data: data.replace(b'"result_mpp": 0.5', b'"result_mpp": -1')),
        ("run.json", lambda data: data.replace(b'"bytes": ', b'"bytes": 1e999')),
        ("summary.json", lambda data: data.replace(b'"pixels": ', b'"pixels": 1e999')),
        ("summary.json", lambda data: data.replace(b"255", b"256")),
        ("summary.json", lambda data: b"{}"),
        ("labels.tif", lambda data: data[:2000]),
        ("labels.tif", lambda data: b"no TIFF"),
        ("labels.tif", lambda data: b""),
    ],
)
def test_spoilt_results_are_said_to_be_so(copied: Path, file: str, spoil: Callable[[bytes], bytes]) -> None:
    data = (copied / file).read_bytes()
    assert spoil(data) != data
    (copied / file).write_bytes(spoil(data))
    with serving(copied.parent) as server:
        assert ask(server, "/api/runs").status == 200
        paths = ("/api/run/0/same", "/tiles/labels/0/same/0/0/0")
        answers = [ask(server, path) for path in paths]
        assert any(answer.status in (404, 422) for answer in answers)
        assert all(b"Traceback" not in answer.body for answer in answers)
        assert all(answer.status != 500 for answer in answers)


def test_two_runs_differ_where_their_labels_do(out: Path, tmp_path: Path) -> None:
    options = replace(ALL, probabilities=False)
    segment_slide(out.parent / "same.tif", IdentityEngine(), tmp_path / "other", options)
    with serving(out, tmp_path / "other") as server:
        said = ask(server, "/api/difference/0/same/1/same").json
        one, other = (tifffile.imread(folder / "same" / "labels.tif", level=0) for folder in (out, tmp_path / "other"))
        assert said["pixels"] == np.count_nonzero(one != other) > 0
        assert said["share"] == pytest.approx(np.mean(one != other))
        assert ask(server, f"/api/difference/1/same/{FINE}").status == 404
        runs = ask(server, "/api/runs").json["runs"]
        versions = [run["slide"] for run in runs if run["name"] == "same"]
        assert versions[0] == versions[1] is not None


@pytest.mark.parametrize("kept_px", [labels_module.MAX_KEPT_PX, 300 * 300], ids=["kept", "read again"])
@pytest.mark.parametrize("bands", [[(0, 1100)], [(0, 512), (512, 1100)]], ids=["whole", "bands"])
def test_strips_are_shown_as_they_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bands: list[tuple[int, int]], kept_px: int
) -> None:
    monkeypatch.setattr(infer, "plan_bands", lambda *_, **__: bands)
    monkeypatch.setattr(labels_module, "MAX_KEPT_PX", kept_px)
    pixels = random_pixels(1100, 700)
    slide = write_slide(tmp_path / "slide.tif", pixels)
    whole = segment_slide(slide, IdentityEngine(), tmp_path / "whole", ALL).folder
    levels = [tifffile.imread(whole / "labels.tif", level=k) for k in range(3)]
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        segment_slide(slide, IdentityEngine(), out, ALL, stopping=stop_after(5))
    with serving(out) as server:
        before = 0.0
        for rows in (0, 9, 13):
            if rows:
                with pytest.raises(StoppedError):
                    segment_slide(slide, IdentityEngine(), out, ALL, stopping=stop_after(rows))
            strips = next((out / "slide" / ".journal").glob("*.strips"))
            with strips.open("ab") as file:  # as a process leaves it that is in the middle of one
                file.write(b"HSJ1" + bytes(60))
            size = strips.stat().st_size
            run = ask(server, "/api/run/0/slide").json
            assert run["status"] == "interrupted"
            assert before < run["progress"] < 1
            before = run["progress"]
            expected = np.full((700, 1100), 255, np.uint8)
            for band in run["bands"]:
                place = np.s_[: band["rows"], band["x0"] : band["x1"]]
                expected[place] = levels[0][place]
            assert run["image"]["width"] == 1100
            for level in range(3):
                of_level = expected[:: 1 << level, :: 1 << level]
                for row in range(-(-of_level.shape[0] // 512)):
                    for column in range(-(-of_level.shape[1] // 512)):
                        path = f"/tiles/labels/0/slide/{level}/{column}/{row}"
                        y, x = 512 * row, 512 * column
                        shown = ask(server, path).image
                        np.testing.assert_array_equal(shown, of_level[y : y + 512, x : x + 512])
            counted = [round(c["area_mm2"] / 0.25e-6) for c in run["classes"]]
            assert counted == [np.count_nonzero(expected == label) for label in range(3)]
            said = ask(server, "/api/place/0/slide?x=40&y=30").json
            assert [round(256 * s) for s in said["scores"]] == pixels[30, 40].tolist()
            assert ask(server, "/api/place/0/slide?x=1099&y=699").json["name"] is None
            assert strips.stat().st_size == size  # nothing was cut off
        segment_slide(slide, IdentityEngine(), out, ALL)
        run = ask(server, "/api/run/0/slide").json
        assert (run["status"], run["progress"]) == ("done", 1.0)
        shown = ask(server, "/tiles/labels/0/slide/2/0/0").image
        np.testing.assert_array_equal(shown, levels[2])


@pytest.mark.parametrize(
    "change",
    [
        {"seen": {}},
        {"seen": {"width": 10**9}},
        {"seen": {"downsample": -1}},
        {"bands": []},
        {"seen": {"classes": []}},
        {"bands": [[0, 100]]},
        {"bands": [[0, 200], [100, 300]]},
        {"bands": [[0, 300], [300, 300]]},
        {"what": {}},
        {"bands": "?"},
        {"seen": {"width": 299}},
        {"runs": 1e999},
        {"seen": {"height": 1e999}},
    ],
    ids=str,
)
def test_a_journal_that_says_what_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    slide = write_slide(tmp_path / "slide.tif", random_pixels(300, 200))
    with pytest.raises(StoppedError):
        segment_slide(slide, IdentityEngine(), tmp_path / "out", ALL, stopping=stop_after(2))
    file = tmp_path / "out" / "slide" / ".journal" / "begun.json"
    said = json.loads(file.read_text())
    ((name, value),) = change.items()
    said[name] = {**said[name], **value} if name == "seen" and value else value
    file.write_text(json.dumps(said))
    with serving(tmp_path / "out") as server:
        assert len(ask(server, "/api/runs").json["runs"]) == 1
        for path in ("/api/run/0/slide", "/tiles/labels/0/slide/0/0/0"):
            answer = ask(server, path)
            assert answer.status == 404
            assert "begun.json holds invalid values" in answer.json["error"]


def test_a_run_at_work_is_told_from_one_that_was_broken_off(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "slide.tif", random_pixels(300, 200))
    seen = []

    def stopping() -> bool:
        if (tmp_path / "out" / "slide" / ".journal" / "begun.json").exists():
            seen.append(next(iter(Results([tmp_path / "out"]))).status)
        return len(seen) > 1

    with pytest.raises(StoppedError):
        segment_slide(slide, IdentityEngine(), tmp_path / "out", ALL, stopping=stopping)
    assert set(seen) == {"running"}
    assert next(iter(Results([tmp_path / "out"]))).status == "interrupted"


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_folder_without_results_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultError, match=folder):
        Results([tmp_path / folder])


def test_a_port_in_use_is_said_so(out: Path, server: ViewServer) -> None:
    port = server.server_address[1]
    with pytest.raises(PortError, match=f"port {port} .*--port"):
        ViewServer(Viewer(Results([out])), port)


def command(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "histostream.runtime.cli", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd=cwd)


def test_the_command_serves_until_it_is_stopped(out: Path, server: ViewServer) -> None:
    with command("view", out, "--no-browser") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        with socket.create_connection((LOCAL, port)) as connection:
            connection.sendall(f"GET / HTTP/1.0\r\nHost: localhost:{port}\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said.strip()) == (0, "")


def test_mistakes_are_one_line_and_a_slide_may_be_called_view(out: Path, tmp_path: Path) -> None:
    with (
        socket.create_server((LOCAL, 0)) as busy,
        command("view", tmp_path / "no") as missing,
        command("view", out, "--slides", "no") as no_slides,
        command("view", out, "--port", busy.getsockname()[1]) as in_use,
        command("./view", cwd=tmp_path) as slide,
    ):
        said = [process.communicate(timeout=60)[1] for process in (missing, no_slides, in_use)]
        for text, expected in zip(said, ("no such folder", "--slides", "--port"), strict=True):
            assert expected in text
        assert [len(text.splitlines()) for text in said] == [1, 1, 1]
        assert "view: there is no such file" in slide.communicate(timeout=60)[1]

"""Staging: a slide arrives whole under its own name or not at all, and is gone afterwards."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from histostream.wsi.errors import OutputError, SlideError, StoppedError
from histostream.wsi.optional import install_command
from histostream.wsi.slides import staging
from histostream.wsi.slides.sources.base import SlidePart, redact_url
from histostream.wsi.slides.staging import list_files, sha256_of, staged, version_of

pytestmark = pytest.mark.xdist_group("staging")  # a server of each kind is enough
BYTES = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(staging, "CHUNK_BYTES", 1000)


def write(path: Path, content: bytes = BYTES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# Local slides


def test_without_a_folder_a_local_slide_is_opened_where_it_is(tmp_path: Path) -> None:
    with staged(str(tmp_path / "a.svs"), None) as path:
        assert path == tmp_path / "a.svs"
    with pytest.raises(SlideError, match="need a folder"), staged("s3://bucket/a.svs", None):
        pass


def test_a_staged_slide_has_its_name_content_and_time_and_is_removed(tmp_path: Path) -> None:
    slide = write(tmp_path / "größe 組織.svs")
    os.utime(slide, ns=(1, 1_234_567_890_123_456_789))
    with staged(str(slide), tmp_path / "new" / "stage") as path:
        assert path.name == slide.name
        assert path.read_bytes() == BYTES
        assert path.stat().st_mtime_ns == slide.stat().st_mtime_ns
        assert (tmp_path / "new" / "stage") in path.parents
    assert left_in(tmp_path / "new" / "stage") == []


def test_a_staged_slide_is_removed_after_an_error_too(tmp_path: Path) -> None:
    slide = write(tmp_path / "a.svs")
    with pytest.raises(ZeroDivisionError), staged(str(slide), tmp_path / "stage"):
        raise ZeroDivisionError
    assert left_in(tmp_path / "stage") == []


VMS = b"""[Virtual Microscope Specimen]\r
ImageFile=h-1.jpg\r
OptimisationFile = h.opt\r
MacroImage=../other.jpg\r
MapFile=none\r
"""
FORMATS = {
    "m.mrxs": ["m.mrxs", "m/Data0001.dat", "m/deep/Index.dat"],
    "h.vms": ["h.vms", "h-1.jpg", "h.opt"],
    "series": ["series/1.dcm", "series/2.dcm"],
    "d1.dcm": ["d1.dcm", "d2.dcm"],
}


@pytest.mark.parametrize(("name", "files"), FORMATS.items())
def test_formats_of_several_files_are_staged_whole(tmp_path: Path, name: str, files: list[str]) -> None:
    data = tmp_path / "data"
    for file in [*files, "other.jpg", "other/x.dat"]:
        write(data / file)
    if name == "h.vms":
        write(data / name, VMS)
    before = version_of(str(data / name))
    assert before.bytes == sum((data / file).stat().st_size for file in files)
    with staged(str(data / name), tmp_path / "stage") as path:
        found = [p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*")]
        assert {p for p in found if (path.parent / p).is_file()} == set(files)
    os.utime(data / files[-1], ns=(1, 1))
    assert version_of(str(data / name)) != before


def test_a_folder_may_be_named_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "series" / "1.dcm")
    monkeypatch.chdir(tmp_path / "series")
    with staged(".", tmp_path / "stage") as path:
        assert (path.name, left_in(path)) == ("series", ["1.dcm"])


def test_a_version_is_size_and_time(tmp_path: Path) -> None:
    slide = write(tmp_path / "a.svs")
    os.utime(slide, ns=(1, 17))
    assert version_of(str(slide)) == staging.SlideVersion(len(BYTES), "17")


@pytest.mark.parametrize("name", ["none.svs", "empty"])
def test_a_missing_slide_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SlideError, match=rf"{name}: (there is no such file|a folder without)"):
        version_of(str(tmp_path / name))
    with pytest.raises(SlideError, match=name), staged(str(tmp_path / name), tmp_path / "stage"):
        pass


def test_a_checksum_is_that_of_sha256sum(tmp_path: Path) -> None:
    slide = write(tmp_path / "a.svs", BYTES * 200)
    assert sha256_of(slide) == hashlib.sha256(BYTES * 200).hexdigest()
    for name in ("s/b/1.dcm", "s/2.dcm", "s/.DS_Store"):
        write(tmp_path / name, name.encode())
    lines = subprocess.run(
        ["sha256sum", "2.dcm", "b/1.dcm"], cwd=tmp_path / "s", capture_output=True, check=True
    ).stdout
    assert sha256_of(tmp_path / "s") == hashlib.sha256(lines).hexdigest()
    with pytest.raises(StoppedError):
        sha256_of(slide, lambda: True)
    with pytest.raises(SlideError, match=r"none: cannot be read"):
        sha256_of(tmp_path / "none")


def test_a_stop_leaves_nothing(tmp_path: Path) -> None:
    slide, asked = write(tmp_path / "a.svs"), iter([False, False, True])
    with (
        pytest.raises(StoppedError),
        staged(str(slide), tmp_path / "stage", stopping=lambda: next(asked)),
    ):
        pass
    assert left_in(tmp_path / "stage") == []


def test_a_slide_that_grows_is_refused(tmp_path: Path) -> None:
    slide = write(tmp_path / "a.svs")

    def grow() -> bool:
        with slide.open("ab") as file:
            file.write(b"x")
        return False

    with (
        pytest.raises(SlideError, match=r"a\.svs: it had 10240 bytes and now 10\d\d\d"),
        staged(str(slide), tmp_path / "stage", stopping=grow),
    ):
        pass
    assert left_in(tmp_path / "stage") == []


def test_copies_of_the_same_slide_do_not_meet(tmp_path: Path) -> None:
    slide = str(write(tmp_path / "a.svs"))
    with ExitStack() as stack:
        paths = [stack.enter_context(staged(slide, tmp_path / "stage")) for _ in range(3)]
        assert len(set(paths)) == 3
    assert left_in(tmp_path / "stage") == []


def test_many_threads_stage_and_remove_at_once(tmp_path: Path) -> None:
    slide = str(write(tmp_path / "a.svs"))
    wrong: list[object] = []

    def work() -> None:
        for _ in range(20):
            with staged(slide, tmp_path / "stage") as path:
                if path.read_bytes() != BYTES:
                    wrong.append(path)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert left_in(tmp_path / "stage") == []


def test_room_is_checked_before_anything_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = write(tmp_path / "a.svs")
    os.truncate(slide, 3 << 30)  # takes no room itself
    usage = (4 << 30, 3 << 30, 1 << 30)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": usage[2]}))
    with (
        pytest.raises(OutputError, match=r"a\.svs in .*: 3\.00 GiB are needed, 1\.00 GiB are free"),
        staged(str(slide), tmp_path / "stage"),
    ):
        pass
    assert left_in(tmp_path / "stage") == []


def python(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    # A limit on file size fails like a full disk, in write(2); another process, since it stays.
    program = """
        import resource, sys
        from pathlib import Path
        from histostream.wsi.errors import OutputError
        from histostream.wsi.slides.staging import staged

        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            with staged(sys.argv[1], Path(sys.argv[2])):
                pass
        except OutputError as error:
            print(error)
    """
    with python(program, str(write(tmp_path / "a.svs")), str(tmp_path / "stage")) as done:
        out, errors = done.communicate()
    assert out.startswith("no room to write")
    assert (len(out.splitlines()), errors) == (1, "")
    assert left_in(tmp_path / "stage") == []


@pytest.mark.parametrize("folder", ["a.svs", "a.svs/stage"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, folder: str) -> None:
    slide = write(tmp_path / "a.svs")
    with pytest.raises(OutputError, match=r"a\.svs"), staged(str(slide), tmp_path / folder):
        pass


# The web

Answer = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Answers each path by the function given for it, and remembers what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, Message]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers))
        self.server.answers[self.path.partition("?")[0]](self)

    def begin(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def whole(content: bytes = BYTES, **headers: object) -> Answer:
    def answer(handler: Handler) -> None:
        handler.begin(200, Content_Length=len(content), **headers)
        try:
            handler.wfile.write(content)
        except ConnectionError:  # it wanted the header alone
            handler.close_connection = True

    return answer


def refuses(status: int, **headers: object) -> Answer:
    return lambda handler: handler.begin(status, **headers)


def in_turn(*answers: Answer) -> Answer:
    """Give one answer after the other, then the last for ever."""
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


def cut_off(handler: Handler) -> None:
    handler.begin(200, Content_Length=len(BYTES))
    handler.wfile.write(BYTES[:5000])


@pytest.fixture
def web() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_slide_is_downloaded(web: Server, tmp_path: Path) -> None:
    web.answers["/gr%C3%B6%C3%9Fe.svs"] = whole(ETag='"v1"')
    url = f"{web.url}/größe.svs?signature=a%2Fb"
    assert version_of(url) == staging.SlideVersion(len(BYTES), '"v1"')
    with staged(url, tmp_path) as path:
        assert (path.name, path.read_bytes()) == ("größe.svs", BYTES)
    assert left_in(tmp_path) == []
    assert {asked for asked, _ in web.asked} == {"/gr%C3%B6%C3%9Fe.svs?signature=a%2Fb"}


@pytest.mark.parametrize("fault", [cut_off, refuses(503), refuses(429), lambda handler: handler.connection.close()])
def test_a_fault_that_passes_is_not_noticed(web: Server, tmp_path: Path, fault: Answer) -> None:
    web.answers["/a.svs"] = in_turn(whole(), fault, fault, whole())
    with staged(f"{web.url}/a.svs", tmp_path) as path:
        assert path.read_bytes() == BYTES


def test_a_stop_does_not_wait_for_the_next_attempt(
    web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "PAUSES_S", (60, 60))
    web.answers["/a.svs"] = refuses(503)
    with (
        pytest.raises(StoppedError),
        staged(f"{web.url}/a.svs", tmp_path, stopping=lambda: True),
    ):
        pass
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (refuses(404), "there is no such file"),
        (refuses(403), "access denied .*signed URL has expired"),
        (refuses(401), "access denied"),
        (refuses(400), "the server refuses it"),
        (refuses(500), "the server fails"),
        (refuses(200), "does not announce the size"),
        (whole(Content_Encoding="gzip"), "does not announce the size"),
        (in_turn(whole(), cut_off), "5000 of 10240 bytes came; .* announces a wrong size"),
        (refuses(302, Location="file:///etc/passwd"), "redirects to file:///etc/passwd, which is"),
        (refuses(302, Location="https://127.0.0.1/a.svs"), "redirects to https://127.0.0.1/a.svs"),
        (refuses(302, Location="ftp://127.0.0.1/a.svs"), "redirects to ftp://127.0.0.1/a.svs"),
        (refuses(302, Location="/a.svs"), "redirects to /a.svs"),
        (refuses(302), "redirects to nowhere"),
    ],
)
def test_a_fault_that_stays_is_said_in_one_line(web: Server, tmp_path: Path, answer: Answer, message: str) -> None:
    web.answers["/a.svs"] = answer
    with (
        pytest.raises(SlideError, match=rf"/a\.svs: .*{message}") as caught,
        staged(f"{web.url}/a.svs?secret", tmp_path),
    ):
        pass
    assert len(str(caught.value).splitlines()) == 1
    assert "secret" not in str(caught.value)
    assert left_in(tmp_path) == []


def test_a_redirect_to_another_host_gets_no_password(
    web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    there = f"http://localhost:{web.server_port}/there.svs"
    web.answers["/a.svs"] = refuses(302, Location=there)
    web.answers["/there.svs"] = whole()
    with staged(f"{web.url}/a.svs", tmp_path / "stage") as path:
        assert (path.name, path.read_bytes()) == ("a.svs", BYTES)
    passwords = {asked: headers["Authorization"] for asked, headers in web.asked}
    assert passwords == {"/a.svs": "Basic bWU6c2VjcmV0", "/there.svs": None}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/a.svs", "cannot be reached .*refused"),
        ("http://no.such.host.invalid/a.svs", "cannot be reached"),
        ("http://127.0.0.1:port/a.svs", "not a URL"),
        ("http://[/a.svs", "not a URL|not a plain file name"),
        ("http://me:secret@127.0.0.1:1/a.svs", "put them into ~/.netrc"),
        ("http://127.0.0.1:1/m.mrxs", "several files"),
        ("http://127.0.0.1:1/", "not a plain file name"),
        ("http://127.0.0.1:1/..%2F..%2Fa.svs", "not a plain file name"),
        ("http://127.0.0.1:1/%2e%2e", "not a plain file name"),
        ("http://127.0.0.1:1/a%00.svs", "not a plain file name"),
        ("ftp://127.0.0.1/a.svs", "no such kind of source"),
        ("file:///etc/passwd", "no such kind of source"),
    ],
)
def test_what_cannot_be_asked_for_is_said(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(SlideError, match=message) as caught, staged(url, tmp_path / "stage"):
        pass
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "stage").exists()


def test_there_is_no_listing_of_the_web() -> None:
    with pytest.raises(SlideError, match="no listings"):
        list_files("https://host/folder/")


def test_a_url_is_shown_without_its_secrets() -> None:
    assert redact_url("https://me:secret@host/a.svs?X-Amz-Signature=1") == "https://host/a.svs"
    assert redact_url("s3://bucket/what?.svs") == "s3://bucket/what?.svs"
    assert redact_url("/data/what?.svs") == "/data/what?.svs"


HOLD = """
    import sys, time
    from pathlib import Path
    from histostream.wsi.slides.staging import staged

    with staged(sys.argv[1], Path(sys.argv[2])) as path:
        print(path, flush=True)
        time.sleep(60)
"""


def test_a_killed_download_leaves_nothing_under_the_final_name(web: Server, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hang(handler: Handler) -> None:
        handler.begin(200, Content_Length=len(BYTES))
        handler.wfile.write(BYTES[:5000])
        handler.wfile.flush()
        begun.set()
        go_on.wait(20)

    web.answers["/a.svs"] = in_turn(whole(), hang, whole())
    with python(HOLD, f"{web.url}/a.svs", str(tmp_path)) as process:
        assert begun.wait(20)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    go_on.set()
    left = left_in(tmp_path)
    assert [name for name in left if not name.startswith(".") and not name.endswith(".lock")] == []
    with staged(f"{web.url}/a.svs", tmp_path) as path:
        assert path.read_bytes() == BYTES
    assert left_in(tmp_path) == []


def test_a_whole_copy_of_a_killed_process_is_used_again(web: Server, tmp_path: Path) -> None:
    web.answers["/a.svs"] = whole(ETag="v1")
    with python(HOLD, f"{web.url}/a.svs", str(tmp_path)) as process:
        assert process.stdout is not None
        first = Path(process.stdout.readline().strip())
        with staged(f"{web.url}/a.svs", tmp_path) as path:
            assert path != first
        process.send_signal(signal.SIGKILL)
        process.communicate()
    asked = len(web.asked)
    with staged(f"{web.url}/a.svs", tmp_path) as path:
        assert path == first
        assert len(web.asked) == asked + 1  # for the version alone
    web.answers["/a.svs"] = whole(ETag="v2")
    with staged(f"{web.url}/a.svs", tmp_path) as path:
        assert path != first
    assert left_in(tmp_path) == []


def test_what_was_left_is_not_used_if_its_size_is_wrong(tmp_path: Path) -> None:
    slide = write(tmp_path / "a.svs")
    with staged(str(slide), tmp_path / "stage") as path:
        place = path.parent
    write(place / "a.svs", b"")
    with staged(str(slide), tmp_path / "stage") as path:
        assert path.parent == place
        assert path.read_bytes() == BYTES


# Object storage


def put(url: str, content: bytes = BYTES) -> str:
    import fsspec

    scheme, _, path = url.partition("://")
    fsspec.filesystem(scheme).pipe(path, content)
    return url


def test_an_object_is_downloaded(bucket: str, tmp_path: Path) -> None:
    url = put(f"{bucket}/deep/größe [1] 100%25.svs")
    before = version_of(url)
    assert before.bytes == len(BYTES)
    assert before.modified
    with staged(url, tmp_path) as path:
        assert (path.name, path.read_bytes()) == ("größe [1] 100%25.svs", BYTES)
    assert left_in(tmp_path) == []
    put(url, BYTES[::-1])
    assert version_of(url) != before


@pytest.mark.parametrize(("name", "files"), FORMATS.items())
def test_formats_of_several_objects_are_staged_whole(bucket: str, tmp_path: Path, name: str, files: list[str]) -> None:
    for file in [*files, "several/other.jpg", "several/other/x.dat"]:
        put(f"{bucket}/several/{file}")
    if name == "h.vms":
        put(f"{bucket}/several/{name}", b"ImageFile=h-1.jpg\nOptimisationFile=h.opt\nMapFile=../x\n")
    with staged(f"{bucket}/several/{name}" + "/" * (name == "series"), tmp_path) as path:
        assert path.name == name
        found = [p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*")]
        assert {p for p in found if (path.parent / p).is_file()} == set(files)


def test_an_object_that_is_replaced_meanwhile_is_refused(bucket: str, tmp_path: Path) -> None:
    url = put(f"{bucket}/a.svs")
    (part,) = staging._find_parts(url)
    put(url, BYTES[::-1])
    with pytest.raises(SlideError, match=f"{url}: replaced while it was staged"):
        staging._fetch(part, tmp_path / "a.svs", lambda: False)


def test_an_empty_object_is_staged_as_it_is(bucket: str, tmp_path: Path) -> None:
    with staged(put(f"{bucket}/empty.svs", b""), tmp_path) as path:
        assert path.stat().st_size == 0


def test_folders_and_patterns_are_listed(bucket: str) -> None:
    for name in ("a.svs", "b/c.svs", "b/d.tif", "b/.hidden"):
        put(f"{bucket}/list/{name}")
    urls = [f"{bucket}/list/{name}" for name in ("a.svs", "b/c.svs", "b/d.tif")]
    assert list_files(f"{bucket}/list/") == urls
    assert list_files(f"{bucket}/list/**/*.svs") == urls[:2]
    assert list_files(f"{bucket}/list/*.svs") == urls[:1]
    assert list_files(f"{bucket}/list/b/[cd].*") == urls[1:]
    assert list_files(f"{bucket}/list/*.ndpi") == []
    assert list_files(put(f"{bucket}/list/x[1].svs")) == [f"{bucket}/list/x[1].svs"]


@pytest.mark.parametrize("name", ["slides/none.svs", "slides/none/", "none/a.svs"])
def test_a_missing_object_is_named(bucket: str, tmp_path: Path, name: str) -> None:
    url = f"{bucket.partition('://')[0]}://{name}"
    with pytest.raises(SlideError, match=f"{url}: (there is no such object|not an object)"):
        version_of(url)
    with pytest.raises(SlideError, match=url), staged(url, tmp_path / "stage"):
        pass
    assert not (tmp_path / "stage").exists()


def test_what_names_no_object_is_refused(bucket: str) -> None:
    scheme = bucket.partition("://")[0]
    put(f"{bucket}/deep/a.svs")
    for url, message in (
        (f"{bucket}/deep", "not an object; .* with /"),
        (f"{scheme}:///a.svs", "names no bucket"),
        (f"{scheme}://b@d!/a.svs", "cannot be requested|no such object"),
        (f"{bucket}/..", "not a plain file name"),
    ):
        with pytest.raises(SlideError, match=message):
            version_of(url)
    with pytest.raises(SlideError, match="names no bucket"):
        list_files(f"{scheme}://")


def test_an_object_never_leads_out_of_the_folder(bucket: str, tmp_path: Path) -> None:
    fetched = SlidePart(put(f"{bucket}/evil"), "series/../../../evil", len(BYTES), "1")
    with pytest.raises(SlideError, match="not a plain name"):
        staging._stage(bucket, [fetched], tmp_path / "place", lambda: False)
    assert left_in(tmp_path) == []


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget the connections of s3fs and gcsfs, which know the environment as it was."""
    import gcsfs
    import s3fs

    for kind in (s3fs.S3FileSystem, gcsfs.GCSFileSystem):
        kind.clear_instance_cache()
    yield
    for kind in (s3fs.S3FileSystem, gcsfs.GCSFileSystem):
        kind.clear_instance_cache()


@pytest.mark.parametrize(
    ("bucket", "environment", "message"),
    [
        ("s3", {"AWS_ACCESS_KEY_ID": ""}, "no credentials .*set AWS_PROFILE"),
        ("s3", {"AWS_PROFILE": "none"}, r"no credentials .*profile \(none\) could not be found"),
        ("s3", {"FSSPEC_S3": '{"anon": true}'}, "access denied .*AWS_PROFILE"),
        ("s3", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "the storage cannot be reached"),
        ("s3", {"AWS_ENDPOINT_URL": "nonsense"}, "cannot be requested .*nonsense"),
        (
            "gs",
            {"GOOGLE_APPLICATION_CREDENTIALS": "none", "FSSPEC_GS": '{"token": "google_default"}'},
            "no credentials",
        ),
    ],
    indirect=["bucket"],
)
@pytest.mark.usefixtures("fresh")
def test_no_access_is_said_in_one_line(
    bucket: str, environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    url = put(f"{bucket}/a.svs")
    fsspec.get_filesystem_class(bucket[:2]).clear_instance_cache()
    for name, value in environment.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    configured: dict[str, dict[str, object]] = {}
    fsspec.config.set_conf_env(configured)  # at import, outside of tests
    for scheme, settings in configured.items():
        monkeypatch.setitem(fsspec.config.conf, scheme, settings)
    with pytest.raises(SlideError, match=f"{url}: {message}") as caught:
        version_of(url)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("hidden", ["s3fs", "fsspec"])
def test_a_missing_package_is_named(hidden: str) -> None:
    program = """
        import sys
        from histostream.wsi.errors import SlideError
        from histostream.wsi.slides.staging import version_of

        sys.modules[sys.argv[1]] = None
        try:
            version_of("s3://bucket/a.svs")
        except SlideError as error:
            print(error)
    """
    with python(program, hidden) as asked:
        out, errors = asked.communicate()
    assert (out, errors) == (f"s3:// needs s3fs: {install_command('cloud')}\n", "")

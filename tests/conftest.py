"""Where the tests find real slides and images."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests also open the library without HistoStream

REPOSITORY = Path(__file__).resolve().parents[1]
# Modules that import packages of the extra dev, which the fast tier goes without.
PACKAGES = {
    "export/test_triton.py": "tritonclient",
    "runtime/test_notebook.py": "nbclient",
    "wsi/outputs/test_object_files.py": "pyarrow",
    "wsi/outputs/test_rasters.py": "highdicom",
}
collect_ignore = [file for file, package in PACKAGES.items() if find_spec(package) is None]
# Fixtures that need such packages too: storage servers, and networks of MONAI.
FULL_FIXTURES = {"s3_server", "gs_server", "bucket", "unet_file", "monai_model"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests with these fixtures into the full tier, and the lattice, which numba compiles."""
    for item in items:
        if FULL_FIXTURES & set(getattr(item, "fixturenames", ())) or "lattice" in item.name:
            item.add_marker(pytest.mark.full)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data: the folder that HISTO_DATA names, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("HISTO_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist; set HISTO_DATA")
    return folder


@pytest.fixture(scope="session")
def wsi_slides(data_dir: Path) -> Path:
    """Return the folder of real slides."""
    folder = data_dir / "wsi-slides"
    if not folder.is_dir():
        pytest.skip(f"no real slides: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an untrained iMEMS of 3 classes, small enough for tests; one for all of them."""
    import torch

    from histostream.training import checkpoint
    from histostream.training.checkpoint import Checkpoint
    from histostream.training.methods.imems import method as imems

    torch.manual_seed(7)
    config = imems.Config(base_width=4, depth=2, discriminator_width=4)
    state = imems.build(config, classes=3)
    folder = tmp_path_factory.mktemp("checkpoint")
    classes = [("ground", (255, 255, 255)), ("gland", (200, 30, 60)), ("nucleus", (30, 100, 220))]
    said = Checkpoint("imems", asdict(config), classes, 3, 0.5, 0, {})
    checkpoint.save(folder, said, state)
    (folder / "note.md").write_text("Tiny and\nuntrained.")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny iMEMS as a model bundle, exported by the real export."""
    from histostream.export.bundle import Options
    from histostream.export.trained import export_checkpoint

    out = tmp_path_factory.mktemp("bundles") / "tiny"
    options = Options(precisions=("fp32",), tensorrt="off", tile_px=128)
    export_checkpoint("imems", tiny_checkpoint, out, options)
    return out


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/slides", method="PUT")).close()
    yield url
    server.stop()


@pytest.fixture(scope="session")
def gs_server() -> Iterator[str]:
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="slides")
    server.start()
    while server._api._httpd is None:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server._api._httpd.server_port}"
    server.stop()


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a bucket on a real server: of S3, and of Google's storage."""
    server = request.getfixturevalue(f"{request.param}_server")
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "none",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "STORAGE_EMULATOR_HOST": server,
    }.items():
        monkeypatch.setenv(name, value)
    return f"{request.param}://slides"

"""histo-infer as a user runs it: real slides, real mistakes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from tests.runtime.conftest import random_pixels, write_slide


def infer(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "histostream.runtime.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def one_clear_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the complaint: status not 0, no traceback, one line."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    lines = [ln for ln in done.stderr.splitlines() if not ln.startswith("model:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_slide(tmp_path / "slide.tif", random_pixels(400, 300))


@pytest.mark.full
def test_a_real_slide_becomes_a_label_map(wsi_slides: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    source = wsi_slides / "CMU-1-Small-Region.svs"
    done = infer(source, "--model", tiny_bundle, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "CMU-1-Small-Region"
    assert {p.name for p in folder.iterdir()} == {
        "labels.tif",
        "overview.png",
        "summary.json",
        "summary.csv",
        "tissue.geojson",
        "run.json",
        "report.html",
    }
    with openslide.OpenSlide(str(folder / "labels.tif")) as labels:
        assert labels.dimensions == (2220, 2967)
        assert labels.level_count > 2
        assert float(labels.properties["openslide.mpp-x"]) == pytest.approx(0.499, rel=1e-3)
    assert "CMU-1-Small-Region.svs" in done.stdout
    assert "Mpx/s" in done.stdout


@pytest.mark.full
def test_dicom_and_svs_of_one_slide_agree(wsi_slides: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """The DICOM is another coding of the same pixels, so labels agree, but not everywhere."""
    maps = []
    for name in ("CMU-1-Small-Region.svs", "dicom-cmu-1-small-region-ybr"):
        done = infer(wsi_slides / name, "--model", tiny_bundle, "--out", tmp_path, "--no-tissue")
        assert done.returncode == 0, done.stderr
        maps.append(tifffile.imread(tmp_path / Path(name).stem / "labels.tif", level=0))
    assert maps[0].shape == maps[1].shape
    assert (maps[0] == maps[1]).mean() > 0.9


def test_a_failed_slide_does_not_stop_the_others(slide: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_text("not a slide")
    done = infer(bad, slide, "--model", tiny_bundle, "--out", tmp_path / "out", "--no-tissue")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"{bad}" in done.stderr
    assert "1 of 2 slides failed" in done.stderr
    assert (tmp_path / "out" / "slide" / "labels.tif").exists()
    assert not (tmp_path / "out" / "bad").exists()


def test_a_missing_resolution_names_the_option(wsi_slides: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    source = wsi_slides / "TCGA-CR-7395-01A-01-TS1.svs"
    line = one_clear_line(infer(source, "--model", tiny_bundle, "--out", tmp_path / "out"))
    assert source.name in line
    assert "--mpp" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "unreadable", "below a file"])
def test_a_broken_slide_is_one_clear_line(
    kind: str, slide: Path, tiny_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    broken = tmp_path / f"{kind}.svs"
    if kind == "empty":
        broken.touch()
    elif kind == "text":
        broken.write_text("this was a spreadsheet\n" * 50)
    elif kind == "truncated":
        slides = request.getfixturevalue("wsi_slides")
        broken.write_bytes((slides / "CMU-1-Small-Region.svs").read_bytes()[:1_000_000])
    elif kind == "below a file":
        broken = slide / "inside.svs"
    elif kind == "unreadable":
        shutil.copy(slide, broken)
        broken.chmod(0)
        if os.access(broken, os.R_OK):
            pytest.skip("root reads every file")
    line = one_clear_line(infer(broken, "--model", tiny_bundle, "--out", tmp_path / "out"))
    assert broken.name in line
    assert not (tmp_path / "out").exists()


def test_a_broken_bundle_is_one_clear_line(slide: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    card = json.loads((bundle / "card.json").read_text())
    (bundle / "model.onnx").write_bytes(b"other")
    out = tmp_path / "out"
    assert "does not match" in one_clear_line(infer(slide, "--model", bundle, "--out", out))
    (bundle / "card.json").write_text(json.dumps({**card, "schema": 99}))
    assert "schema 99" in one_clear_line(infer(slide, "--model", bundle, "--out", out))
    assert "no card.json" in one_clear_line(infer(slide, "--model", tmp_path, "--out", out))
    assert not out.exists()


def test_an_output_folder_that_cannot_be_written_is_one_clear_line(
    slide: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    line = one_clear_line(infer(slide, "--model", tiny_bundle, "--out", tmp_path / "file" / "out"))
    assert str(tmp_path / "file") in line
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(locked, os.W_OK):
        return  # root writes everywhere
    assert str(locked) in one_clear_line(infer(slide, "--model", tiny_bundle, "--out", locked))


@pytest.mark.full
def test_a_full_disk_leaves_nothing_under_a_final_name(tiny_bundle: Path, tmp_path: Path) -> None:
    """A limit on file size stands for the disk: writes fail in the middle just the same."""
    slide = write_slide(tmp_path / "big.tif", random_pixels(1500, 1500))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = infer(
        slide, "--model", tiny_bundle, "--out", tmp_path / "out", "--no-tissue", "--probabilities", preexec_fn=limit
    )
    assert "no room" in one_clear_line(done)
    folder = tmp_path / "out" / "big"
    assert not [p for p in folder.glob("*") if p.name != ".journal"]  # with which it goes on
    done = infer(slide, "--model", tiny_bundle, "--out", tmp_path / "out", "--no-tissue", "--probabilities")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run.json").read_text())["resumed"]["runs"] == 2


@pytest.mark.parametrize("kind", ["missing", "folder", "not GeoJSON", "no polygon"])
def test_a_region_that_cannot_be_used_is_one_line_before_any_slide_is_opened(
    slide: Path, tiny_bundle: Path, tmp_path: Path, kind: str
) -> None:
    roi = tmp_path / "roi.geojson"
    if kind == "folder":
        roi.mkdir()
    elif kind != "missing":
        roi.write_text('{"type": "GeometryCollection", "geometries": []}' if kind == "no polygon" else "[")
    slide.write_bytes(b"no slide")
    line = one_clear_line(infer(slide, "--roi", roi, "--model", tiny_bundle, "--out", tmp_path / "out"))
    assert "roi.geojson: " in line
    assert not (tmp_path / "out").exists()


def test_slides_that_would_share_a_folder_are_told_apart(slide: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / slide.name
    other.parent.mkdir()
    shutil.copy(slide, other)
    out = tmp_path / "out"
    done = infer(slide, other, "--model", tiny_bundle, "--out", out)
    assert done.returncode == 0, done.stderr
    folders = {path.parent.name for path in out.glob("*/run.json")}
    assert folders == {f"{path.parent.name}_{slide.stem}" for path in (slide, other)}
    for path in (slide, other):
        named = f"{path.parent.name}_{slide.stem}"
        line = f"{path}: its folder is {named}, because another slide has the name {slide.stem} too"
        assert line in done.stderr
        assert named in (out / "cohort.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "cuda"], "cuda"),
        (["--overlap", "100"], "half a tile"),
        (["--batch", "0"], "batch"),
        (["--mpp", "900"], "--mpp"),
        (["--roi", "nowhere.geojson"], "nowhere.geojson"),
        (["--max-memory", "1"], "--max-memory"),
    ],
)
def test_an_option_that_cannot_work_is_one_clear_line(
    slide: Path, tiny_bundle: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = infer(slide, "--model", tiny_bundle, "--out", tmp_path / "out", *arguments)
    assert words in one_clear_line(done)
    assert not (tmp_path / "out").exists()


def test_running_again_replaces_the_result(slide: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = infer(slide, "--model", tiny_bundle, "--out", tmp_path / "out", "--no-tissue")
        assert done.returncode == 0, done.stderr
    labels = tifffile.imread(tmp_path / "out" / "slide" / "labels.tif", level=0)
    assert labels.shape == (300, 400)
    assert set(np.unique(labels)) <= {0, 1, 2}
    assert not [p for p in (tmp_path / "out" / "slide").iterdir() if p.name.startswith(".")]


@pytest.mark.full
@pytest.mark.xdist_group("fleet")
def test_several_devices_share_slides_or_the_columns_of_one(tiny_bundle: Path, tmp_path: Path) -> None:
    from histostream.wsi.synthetic import SyntheticSlide

    for name, seed in (("a", 1), ("b", 2)):
        SyntheticSlide(1200, 400, mpp=0.5, seed=seed).write(tmp_path / f"{name}.tif")
    slides = [tmp_path / "a.tif", tmp_path / "b.tif"]
    common = ["--model", tiny_bundle, "--device", "cpu,cpu", "--no-tissue"]
    both = infer(*slides, *common, "--out", tmp_path / "both")
    assert both.returncode == 0, both.stderr
    assert "x 2 (cpu, cpu)" in both.stderr
    one = infer(slides[0], *common, "--out", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    alone = infer(slides[0], "--model", tiny_bundle, "--no-tissue", "--out", tmp_path / "alone")
    assert alone.returncode == 0
    found = [(tmp_path / folder / "a" / "labels.tif").read_bytes() for folder in ("both", "one", "alone")]
    assert found[0] == found[1] == found[2]
    wrong = infer(slides[0], "--model", tiny_bundle, "--device", "0,0", "--out", tmp_path / "x")
    assert wrong.returncode == 2
    assert "0,0: GPU 0 is named twice; name each once" in wrong.stderr


@pytest.mark.full
def test_rasters_are_written_where_they_are_asked_for(slide: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    command = (slide, "--model", tiny_bundle, "--out", tmp_path / "out", "--no-tissue")
    done = infer(*command, "--rasters", "dicom-seg, ome-zarr,ome-tiff")
    assert done.returncode == 0, done.stderr
    outputs = json.loads((tmp_path / "out" / "slide" / "run.json").read_text())["outputs"]
    assert {"labels.dcm", "labels.ome.tif", "labels.ome.zarr"} < set(outputs)
    again = infer(*command, "--rasters", "ome-tiff,ome-zarr,dicom-seg")
    assert "done before" in again.stdout
    wrong = infer(*command, "--rasters", "zarr")
    assert wrong.returncode == 2
    assert "'zarr' is none of density, dicom-seg, ome-tiff, ome-tiff-rgb, ome-zarr" in wrong.stderr


@pytest.mark.full
def test_objects_are_written_where_they_are_asked_for(slide: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    command = (slide, "--model", tiny_bundle, "--out", tmp_path / "out", "--no-tissue")
    asked = ("--geojson", "--annotations", "dsa", "--objects", "csv, parquet", "--simplify", "0.5")
    done = infer(*command, *asked)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "slide"
    assert {p.name for p in folder.iterdir()} > {
        "objects.geojson.gz",
        "annotations.json",
        "objects.csv",
        "objects.parquet",
    }
    other_words = ("--annotations", "dsa", "--annotations", "qupath", "--objects", "parquet,csv")
    again = infer(*command, *other_words, "--simplify", "0.5")
    assert "done before" in again.stdout
    wrong = infer(*command, "--objects", "xlsx")
    assert wrong.returncode == 2
    assert "'xlsx' is none of csv, parquet" in wrong.stderr
    assert "none is written" in infer(*command, "--simplify", "9").stderr

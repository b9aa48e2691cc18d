"""Laws of the sinks: what is written is what was given, however it was cut, or nothing is."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import large_image
import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histostream.wsi.errors import OutputError
from histostream.wsi.files import write_json
from histostream.wsi.outputs.folder import OutputFolder
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, ClassInfo, LabelRows, Sink, SlideInfo
from histostream.wsi.outputs.sinks.overview import PAINT, Overview, overview_size, scale_bar
from histostream.wsi.outputs.sinks.summary import Summary
from histostream.wsi.outputs.sinks.tiff import LabelTiff, ProbabilityTiff
from histostream.wsi.records import to_json

Array = NDArray[np.uint8]

CLASSES = (
    ClassInfo("background", (250, 240, 230)),
    ClassInfo("nucleus", (200, 10, 30)),
    ClassInfo("gland, drüse", (10, 150, 60)),
)
SIZES = [(1, 1), (513, 1), (37, 1030), (700, 515), (2111, 1537)]


def slide_info(width: int, height: int, mpp: float = 0.2527) -> SlideInfo:
    return SlideInfo("slide", width, height, mpp, CLASSES)


def label_map(width: int, height: int, seed: int = 0) -> Array:
    """Squares of 23 px of classes and of NOT_ANALYSED."""
    values = np.array([0, 1, 2, NOT_ANALYSED], np.uint8)
    squares = np.random.default_rng(seed).integers(0, 4, (height // 23 + 1, width // 23 + 1))
    return np.kron(values[squares], np.ones((23, 23), np.uint8))[:height, :width]


def probability_map(labels: Array) -> NDArray[np.uint16]:
    return np.stack([np.where(labels == k, 50_201, 4_027) for k in range(3)], axis=2).astype(np.uint16)


def parts(labels: Array, seed: int, band_px: int = 1 << 20) -> Iterator[LabelRows]:
    """Cut a label map as the runtime does: bands, then rows of any height."""
    heights = np.random.default_rng(seed)
    for x in range(0, labels.shape[1], band_px):
        y = 0
        while y < len(labels):
            rows = labels[y : y + int(heights.integers(1, 900)), x : x + band_px]
            yield LabelRows(x, y, rows, probability_map(rows))
            y += len(rows)


def write(sink: Sink, cut: Iterator[LabelRows]) -> Path:
    for part in cut:
        sink.write(part)
    ((temporary, final),) = sink.finish()
    assert not final.exists()
    temporary.rename(final)
    assert list(final.parent.iterdir()) == [final]
    return final


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_labels_come_back_from_level_0(tmp_path: Path, width: int, height: int) -> None:
    labels = label_map(width, height)
    sink = LabelTiff(tmp_path / "labels.tif", slide_info(width, height))
    path = write(sink, parts(labels, seed=1, band_px=1024))
    with tifffile.TiffFile(path) as file:
        np.testing.assert_array_equal(file.pages[0].asarray(), labels)
        for level, page in enumerate(file.pages):
            np.testing.assert_array_equal(page.asarray(), labels[:: 2**level, :: 2**level])


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_probabilities_come_back_from_level_0(tmp_path: Path, width: int, height: int) -> None:
    labels = label_map(width, height)
    sink = ProbabilityTiff(tmp_path / "probabilities.tif", slide_info(width, height))
    path = write(sink, parts(labels, seed=1, band_px=1024))
    with tifffile.TiffFile(path) as file:
        np.testing.assert_array_equal(file.pages[0].asarray(), probability_map(labels))
        means = [page.asarray().mean() for page in file.pages]
    assert openslide.OpenSlide(path).level_count == len(means)
    np.testing.assert_allclose(means, means[0], atol=1.5 * 257)


def test_one_class_has_one_sample_a_pixel(tmp_path: Path) -> None:
    labels = np.zeros((600, 700), np.uint8)
    probs = np.random.default_rng(0).integers(0, 65536, (600, 700, 1), np.uint16)
    info = SlideInfo("slide", 700, 600, 0.5, CLASSES[:1])
    sink = ProbabilityTiff(tmp_path / "p.tif", info)
    path = write(sink, iter([LabelRows(0, 0, labels, probs)]))
    np.testing.assert_array_equal(tifffile.imread(path, key=0), probs[..., 0])


@pytest.mark.parametrize("kind", [LabelTiff, ProbabilityTiff])
def test_bytes_do_not_depend_on_the_cut(tmp_path: Path, kind: Callable[[Path, SlideInfo], Sink]) -> None:
    labels, files = label_map(1300, 1100), []
    for seed, band_px in [(1, 1 << 20), (2, 1 << 20), (3, 512), (4, 1024)]:
        folder = tmp_path / str(seed)
        folder.mkdir()
        sink = kind(folder / "out.tif", slide_info(1300, 1100))
        files.append(write(sink, parts(labels, seed, band_px)).read_bytes())
    assert files.count(files[0]) == len(files)


def glassy_parts(width: int, height: int, band_px: int, *, broadcast: bool) -> Iterator[LabelRows]:
    """Rows of glass and rows with labels in turns, glass as one value or written out."""
    labels, random = label_map(width, height, seed=3), np.random.default_rng(7)
    heights = list(random.integers(1, 900, 40))
    for x in range(0, width, band_px):
        y, right = 0, min(x + band_px, width)
        for i, rows in enumerate(heights):
            end = min(y + int(rows), height)
            if y == end:
                break
            glass = LabelRows.outside(x, y, right - x, end - y, classes=3)
            if i % 3 == 1:
                some = labels[y:end, x:right]
                yield LabelRows(x, y, some, probability_map(some))
            elif broadcast:
                yield glass
            else:
                assert glass.probabilities is not None
                yield LabelRows(x, y, glass.labels.copy(), glass.probabilities.copy())
            y = end


@pytest.mark.parametrize(("width", "height"), [(700, 2600), (1300, 4000), (37, 1030)])
@pytest.mark.parametrize("band_px", [512, 1 << 20])
def test_glass_as_one_value_is_glass(tmp_path: Path, width: int, height: int, band_px: int) -> None:
    info, files, others = slide_info(width, height), [], []
    thumbnail = np.full((20, 20, 3), 100, np.uint8)
    for broadcast in (True, False):
        folder = tmp_path / str(broadcast)
        with OutputFolder(folder, "slide") as out:
            out.add(LabelTiff(out.path / "labels.tif", info))
            out.add(ProbabilityTiff(out.path / "probabilities.tif", info))
            summary, overview = (
                Summary(out.path, info),
                Overview(out.path / "overview.png", info, thumbnail),
            )
            for sink in (summary, overview):
                out.add(sink)
            for part in glassy_parts(width, height, band_px, broadcast=broadcast):
                assert part.all_outside <= broadcast
                out.write(part)
        files.append({p.name: p.read_bytes() for p in out.path.iterdir()})
        others.append((summary.record(), overview.image().tolist()))
    assert files[0] == files[1]
    assert others[0] == others[1]


def test_only_one_value_that_is_outside_is_known_to_be() -> None:
    outside = LabelRows.outside(3, 4, 50, 20, classes=2)
    assert outside.all_outside
    assert outside.labels.shape == (20, 50)
    assert outside.probabilities is not None
    assert outside.probabilities.shape == (20, 50, 2)
    assert LabelRows.outside(0, 0, 5, 6).probabilities is None
    assert (outside.labels == NOT_ANALYSED).all()
    assert not outside.probabilities.any()
    with pytest.raises(ValueError, match="read-only"):
        outside.labels[0, 0] = 1
    assert not LabelRows(0, 0, np.broadcast_to(np.uint8(1), (20, 50))).all_outside
    assert not LabelRows(0, 0, np.full((20, 50), NOT_ANALYSED, np.uint8)).all_outside
    assert not LabelRows(0, 0, np.empty((0, 50), np.uint8)).all_outside


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_reader_sees_the_same_levels(tmp_path: Path, width: int, height: int) -> None:
    sink = LabelTiff(tmp_path / "labels.tif", slide_info(width, height))
    path = write(sink, parts(label_map(width, height), seed=0))
    with tifffile.TiffFile(path) as file:
        sizes = tuple((page.shape[1], page.shape[0]) for page in file.pages)
        assert file.is_bigtiff
        assert all(page.aspage().is_tiled for page in file.pages)
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == sizes
    source = large_image.open(str(path))
    assert (source.sizeX, source.sizeY, source.levels) == (width, height, len(sizes))
    assert max(sizes[-1]) <= 512


def test_every_reader_sees_the_resolution_and_the_classes(tmp_path: Path) -> None:
    sink = LabelTiff(tmp_path / "labels.tif", slide_info(1100, 900, mpp=0.2527))
    path = write(sink, parts(label_map(1100, 900), seed=0))
    with openslide.OpenSlide(path) as slide:
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.2527, rel=1e-6)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.2527, rel=1e-6)
    assert large_image.open(str(path)).getMetadata()["mm_x"] == pytest.approx(0.2527e-3, rel=1e-6)
    with tifffile.TiffFile(path) as file:
        for level, page in enumerate(file.pages):
            numerator, denominator = page.aspage().tags["XResolution"].value
            um = 1e4 * denominator / numerator
            assert um == pytest.approx(0.2527 * 2**level, rel=1e-6)
        about = json.loads(file.pages.first.description)
    assert [entry["name"] for entry in about["classes"]] == [entry.name for entry in CLASSES]
    assert about["outside"] == NOT_ANALYSED


def test_openslide_shows_the_colors_of_the_classes(tmp_path: Path) -> None:
    labels = label_map(1100, 900)
    path = write(LabelTiff(tmp_path / "l.tif", slide_info(1100, 900)), parts(labels, seed=0))
    colors = np.full((256, 3), 255, np.uint8)
    colors[:3] = [entry.color for entry in CLASSES]
    with openslide.OpenSlide(path) as slide:
        for level, size in enumerate(slide.level_dimensions):
            seen = np.asarray(slide.read_region((0, 0), level, size))[..., :3]
            np.testing.assert_array_equal(seen, colors[labels[:: 2**level, :: 2**level]])


def test_a_map_of_glass_is_tiny(tmp_path: Path) -> None:
    labels = np.full((5000, 7000), NOT_ANALYSED, np.uint8)
    path = write(LabelTiff(tmp_path / "l.tif", slide_info(7000, 5000)), parts(labels, seed=0))
    assert path.stat().st_size < 100_000
    assert (tifffile.imread(path, key=0) == NOT_ANALYSED).all()


@pytest.mark.parametrize(
    ("x", "y", "width", "height"),
    [(0, 3, 700, 10), (5, 0, 695, 10), (0, 0, 300, 10), (0, 0, 700, 601), (512, 0, 300, 10)],
    ids=["gap", "off the tiles", "band too narrow", "too many rows", "past the border"],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, x: int, y: int, width: int, height: int) -> None:
    sink = LabelTiff(tmp_path / "labels.tif", slide_info(700, 600))
    with pytest.raises(ValueError, match=r"labels\.tif"):
        sink.write(LabelRows(x, y, np.zeros((height, width), np.uint8)))
    sink.abort()


def test_a_map_with_missing_rows_is_not_finished(tmp_path: Path) -> None:
    sink = LabelTiff(tmp_path / "labels.tif", slide_info(700, 600))
    sink.write(LabelRows(0, 0, np.zeros((599, 700), np.uint8)))
    with pytest.raises(ValueError, match="never written"):
        sink.finish()
    sink.abort()
    assert not list(tmp_path.iterdir())


def test_the_caller_may_reuse_its_buffer(tmp_path: Path) -> None:
    labels, buffer = label_map(600, 700), np.empty((100, 600), np.uint8)
    sink = LabelTiff(tmp_path / "labels.tif", slide_info(600, 700))
    for y in range(0, 700, 100):
        buffer[:] = labels[y : y + 100]
        sink.write(LabelRows(0, y, buffer))
        buffer[:] = 77
    ((temporary, _),) = sink.finish()
    np.testing.assert_array_equal(tifffile.imread(temporary, key=0), labels)


# --------------------------------------------------------------------------- summary


def test_summary_counts_every_pixel_once(tmp_path: Path) -> None:
    labels, info = label_map(2111, 1537), slide_info(2111, 1537, mpp=0.5)
    summary = Summary(tmp_path, info)
    for part in parts(labels, seed=5, band_px=512):
        summary.write(part)
    for temporary, final in summary.finish():
        temporary.rename(final)
    content = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert content == to_json(summary.record())
    assert [entry["pixels"] for entry in content["classes"]] == [int((labels == k).sum()) for k in range(3)]
    assert sum(entry["share"] for entry in content["classes"]) == pytest.approx(1)
    assert content["analysed_mm2"] == pytest.approx((labels != NOT_ANALYSED).sum() * 0.25e-6)
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [entry.name for entry in CLASSES]
    assert lines[1]["color"] == "#c80a1e"
    assert float(lines[2]["area_mm2"]) == content["classes"][2]["area_mm2"]


def test_summary_of_glass_has_no_shares(tmp_path: Path) -> None:
    summary = Summary(tmp_path, slide_info(20, 10))
    summary.write(LabelRows(0, 0, np.full((10, 20), NOT_ANALYSED, np.uint8)))
    record = summary.record()
    assert record.analysed_mm2 == 0
    assert [entry.share for entry in record.classes] == [None] * 3


@pytest.mark.parametrize("count", [1, 3, 16, 17, 255])
def test_summary_counts_few_and_many_classes(tmp_path: Path, count: int) -> None:
    labels = np.random.default_rng(count).integers(0, count + 1, (700, 900), np.uint8)
    labels[labels == count] = NOT_ANALYSED
    classes = tuple(ClassInfo(str(k), (k, k, k)) for k in range(count))
    summary = Summary(tmp_path, SlideInfo("slide", 900, 700, 0.5, classes))
    summary.write(LabelRows(0, 0, labels))
    assert [entry.pixels for entry in summary.record().classes] == np.bincount(labels.ravel(), minlength=256)[
        :count
    ].tolist()


def test_summary_refuses_a_label_without_a_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label 3"):
        Summary(tmp_path, slide_info(20, 10)).write(LabelRows(0, 0, np.full((10, 20), 3, np.uint8)))


# --------------------------------------------------------------------------- overview


def test_overview_blends_by_share(tmp_path: Path) -> None:
    labels = np.zeros((80, 120), np.uint8)
    labels[:, 40:80] = 1
    labels[::2, 80:] = 2
    labels[1::2, 80:] = NOT_ANALYSED
    slide = np.full((8, 12, 3), 100, np.uint8)
    overview = Overview(tmp_path / "overview.png", slide_info(120, 80), slide)
    for part in parts(labels, seed=0):
        overview.write(part)
    ((temporary, _),) = overview.finish()
    seen = np.asarray(Image.open(temporary).convert("RGB"))
    assert (seen[:8, :4] == 100).all()
    for place, share, color in [(slice(4, 8), 1.0, CLASSES[1]), (slice(8, 12), 0.5, CLASSES[2])]:
        expected = 100 * (1 - PAINT * share) + PAINT * share * np.array(color.color)
        np.testing.assert_allclose(seen[:8, place] - expected, 0, atol=1)
    assert (seen[:8, 12] == 255).all()
    overview.abort()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("width", "height"), [(1, 1), (700, 515), (2111, 1537)])
def test_overview_does_not_depend_on_the_cut(tmp_path: Path, width: int, height: int) -> None:
    labels, images = label_map(width, height), []
    shown_width, shown_height = overview_size(width, height, longest_px=150)
    slide = np.full((shown_height, shown_width, 3), 100, np.uint8)
    for seed, band_px in [(0, 1 << 20), (1, 512)]:
        overview = Overview(tmp_path / "overview.png", slide_info(width, height), slide)
        for part in parts(labels, seed, band_px):
            overview.write(part)
        images.append(overview.image())
    np.testing.assert_array_equal(images[0], images[1])


def test_overview_size_keeps_the_shape_and_never_enlarges() -> None:
    assert overview_size(100_000, 50_000) == (1600, 800)
    assert overview_size(300, 200) == (300, 200)
    assert overview_size(200_000, 3) == (1600, 1)


def test_scale_bars_are_round_and_fit() -> None:
    assert scale_bar(0.5, 176) == (100, "50 um")
    assert scale_bar(50, 176) == (100, "5 mm")
    assert scale_bar(1, 20) == (20, "20 um")


# --------------------------------------------------------------------------- folder


def fill(folder: OutputFolder, labels: Array) -> None:
    height, width = labels.shape
    info = slide_info(width, height)
    folder.add(LabelTiff(folder.path / "labels.tif", info))
    folder.add(Summary(folder.path, info))
    folder.add(Overview(folder.path / "overview.png", info, np.full((1, 1, 3), 9, np.uint8)))
    for part in parts(labels, seed=0):
        folder.write(part)
    folder.run["seconds"] = 1.5


def test_leaving_the_block_publishes_everything(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "new", "slide é") as folder:
        fill(folder, label_map(700, 600))
        assert not [p for p in folder.path.iterdir() if not p.name.startswith(".")]
    names = ["labels.tif", "overview.png", "run.json", "summary.csv", "summary.json"]
    assert sorted(p.name for p in folder.path.iterdir()) == names
    run = json.loads((folder.path / "run.json").read_text(encoding="utf-8"))
    assert run == {"seconds": 1.5, "outputs": [name for name in names if name != "run.json"]}


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with OutputFolder(tmp_path / "new", "slide") as folder:
            fill(folder, label_map(700, 600))
            folder.finish()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_an_error_keeps_the_run_before(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, "slide") as folder:
        fill(folder, label_map(700, 600))
    before = {p.name: p.read_bytes() for p in folder.path.iterdir()}
    with pytest.raises(ValueError, match="never written"), OutputFolder(tmp_path, "slide") as again:
        again.add(LabelTiff(again.path / "labels.tif", slide_info(700, 600)))
    assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before


def test_run_json_is_removed_first_and_comes_back_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OutputFolder(tmp_path, "slide") as folder:
        fill(folder, label_map(700, 600))
    order, replace = [], Path.replace

    def watch(self: Path, target: Path) -> Path:
        order.append((target.name, (target.parent / "run.json").exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    with OutputFolder(tmp_path, "slide") as again:
        fill(again, label_map(700, 600, seed=1))
    assert [name for name, _ in order][-1] == "run.json"
    assert not any(complete for _, complete in order)
    assert len(order) == 5


def test_files_of_other_options_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "theirs.txt").write_text("not ours")
    with OutputFolder(tmp_path, "slide") as folder:
        folder.add_text("page.html", "once")
        folder.add_text("objects.csv", "once")
    (folder.path / "notes.txt").write_text("of the user")
    said = json.loads((folder.path / "run.json").read_text())
    said["outputs"] += ["../theirs.txt", ".lock", 7, str(tmp_path / "theirs.txt")]
    runs: list[object] = [said, {**said, "outputs": None}, []]
    for run in runs:
        (folder.path / "run.json").write_text(json.dumps(run))
        with OutputFolder(tmp_path, "slide") as again:
            again.add_text("page.html", "again")
    assert {p.name for p in folder.path.iterdir()} == {"page.html", "notes.txt", "run.json"}
    assert (tmp_path / "theirs.txt").exists()


def test_a_rename_that_fails_leaves_no_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OutputFolder(tmp_path, "slide") as folder:
        fill(folder, label_map(700, 600))
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target.name == "summary.csv":
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match=r"no permission to write .*summary\.csv"):  # noqa: SIM117
        with OutputFolder(tmp_path, "slide") as again:
            fill(again, label_map(700, 600))
    left = {p.name for p in folder.path.iterdir()}
    assert "run.json" not in left
    assert not [name for name in left if name.startswith(".")]


def test_a_file_in_the_way_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "slide").write_text("mine")
    with (
        pytest.raises(OutputError, match="move the file that is in the way"),
        OutputFolder(tmp_path, "slide"),
    ):
        pass
    assert (tmp_path / "slide").read_text() == "mine"


def test_a_missing_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*labels\.tif"):
        LabelTiff(tmp_path / "none" / "labels.tif", slide_info(10, 10))


def test_a_text_made_of_finished_files_is_published_with_them_or_not_at_all(
    tmp_path: Path,
) -> None:
    info, labels = slide_info(37, 30), label_map(37, 30)

    def run(stops: bool) -> None:
        with OutputFolder(tmp_path / "out", "slide") as folder:
            folder.add(Summary(folder.path, info))
            folder.write(LabelRows(0, 0, labels))
            folder.finish()
            made = folder.unpublished["summary.json"]
            folder.add_text("page.html", made.read_text())
            assert not (folder.path / "page.html").exists()
            if stops:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stops=True)
    assert not (tmp_path / "out").exists()
    run(stops=False)
    folder = tmp_path / "out" / "slide"
    assert (folder / "page.html").read_text() == (folder / "summary.json").read_text()
    said = json.loads((folder / "run.json").read_text())
    assert said["outputs"] == ["page.html", "summary.csv", "summary.json"]
    assert {p.name for p in folder.iterdir()} == {*said["outputs"], "run.json"}


@pytest.mark.parametrize("stem", ["", "a/b", "..", "."])
def test_a_stem_with_a_path_is_refused(tmp_path: Path, stem: str) -> None:
    with pytest.raises(OutputError, match="plain name"):
        OutputFolder(tmp_path, stem)


@pytest.mark.parametrize("limit", [3_000, 60_000, 300_000], ids=["rows", "levels", "assembly"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, limit: int) -> None:
    # A limit on file size fails like a full disk, in write(2); another process, since it stays.
    program = textwrap.dedent(f"""
        import resource, numpy as np
        from pathlib import Path
        from histostream.wsi.errors import OutputError
        from histostream.wsi.outputs.folder import OutputFolder
        from histostream.wsi.outputs.label_rows import ClassInfo, LabelRows, SlideInfo
        from histostream.wsi.outputs.sinks.tiff import LabelTiff

        classes = tuple(ClassInfo(str(k), (k, k, k)) for k in range(5))
        info = SlideInfo("slide", 1024, 1024, 0.5, classes)
        labels = np.random.default_rng(0).integers(0, 5, (1024, 1024), np.uint8)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            with OutputFolder(Path({str(tmp_path)!r}), "slide") as folder:
                folder.add(LabelTiff(folder.path / "labels.tif", info))
                folder.write(LabelRows(0, 0, labels))
        except OutputError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"no room to write {tmp_path}/slide/labels.tif")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


def test_write_json_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"name": "é", "n": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"n": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "é", "n": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_memory_does_not_grow_with_the_slide(tmp_path: Path) -> None:
    rows = label_map(8192, 512)
    sink = LabelTiff(tmp_path / "labels.tif", slide_info(8192, 16384))
    tracemalloc.start()
    for y in range(0, 16384, 512):
        sink.write(LabelRows(0, y, rows))
    sink.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6  # the map has 134 MB, a row of tiles 4

"""Reports: all that matters is in them, they are valid, and nothing in them acts or loads."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes
from xml.etree.ElementTree import Element

import html5lib
import numpy as np
import pytest
from PIL import Image

from histostream.runtime import outcome as outcome_module
from histostream.runtime.bundle.card import default_bundle, read_card
from histostream.runtime.cohort.worker import CohortRecord, LocalExecutor
from histostream.runtime.options import Options
from histostream.runtime.outcome import Outcome
from histostream.runtime.record import RunRecord, card_record, read_run, read_summary
from histostream.runtime.report.cohort import MAX_PICTURES, WORST_FIRST, CohortReport, share_bar
from histostream.runtime.report.distribution import distribution
from histostream.runtime.report.picture import PICTURE_PX, read_picture
from histostream.runtime.report.slide import slide_report
from histostream.runtime.result import SlideResult
from histostream.runtime.slide_job import SlideInput, SlideJob
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.errors import printable
from histostream.wsi.outputs.label_rows import ClassInfo, SlideInfo
from histostream.wsi.outputs.sinks.overview import Overview
from histostream.wsi.outputs.sinks.summary import SummaryRecord
from histostream.wsi.records import from_json, to_json
from histostream.wsi.report.figures import duration, figure, percent, size
from histostream.wsi.report.json_view import JsonView
from tests.runtime.conftest import CARD, IdentityEngine, random_pixels, write_slide
from tests.runtime.test_damage import damage, write_compressed

ALL = Options(tissue=False, overlap_px=16)
MARKUP = "<img src=x onerror=alert(1)>\"'&amp;</style></title><script>alert(2)</script>{{ 7 * 7 }}"
ATTRIBUTES = {
    "alt",
    "aria-label",
    "charset",
    "class",
    "colspan",
    "content",
    "d",
    "height",
    "href",
    "http-equiv",
    "lang",
    "name",
    "preserveAspectRatio",
    "role",
    "rowspan",
    "scope",
    "src",
    "style",
    "vector-effect",
    "viewBox",
    "width",
    "x",
    "y",
}


def parsed(text: str) -> Element:
    """Read a page as the standard asks; any error of it is an error here."""
    page = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)
    assert isinstance(page, Element)
    return page


def text_of(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def rows(page: Element) -> list[list[str]]:
    """Return the cells of all tables."""
    return [[text_of(cell) for cell in row] for row in page.iter("tr")]


def facts(page: Element) -> dict[str, str]:
    return {text_of(pair[0]): text_of(pair[1]) for pair in page.iter("div") if [e.tag for e in pair] == ["dt", "dd"]}


def warnings(page: Element) -> str:
    (found,) = [e for e in page.iter("section") if e.get("class") == "warnings"] or [Element("p")]
    return text_of(found)


def loads_nothing(page: Element) -> bool:
    """Check that a page has no script, and refers to nothing but data and the files beside it."""
    for element in page.iter():
        assert element.tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        assert set(element.keys()) <= ATTRIBUTES, (element.tag, element.keys())
        assert element.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert re.fullmatch(r"\./[^/:]+(/[^/:]+)?", element.get("href", "./x"))
        styles = element.get("style", "") + (element.text or "" if element.tag == "style" else "")
        assert not re.search(r"url\(|@import|expression|\\", styles)
    (policy,) = [e.get("content") for e in page.iter("meta") if e.get("http-equiv")]
    return str(policy).startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def skeleton(page: Element) -> list[tuple[str, tuple[str, ...]]]:
    """Return the elements of a page in order, with the names of their attributes."""
    return [(str(element.tag), tuple(sorted(element.keys()))) for element in page.iter()]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> SlideResult:
    folder = tmp_path_factory.mktemp("report")
    slide = write_slide(folder / "slide.tif", random_pixels(400, 300))
    options = replace(ALL, annotations=("qupath",), objects=("csv",))
    return segment_slide(slide, IdentityEngine(), folder / "out", options)


def report(result: SlideResult, **changed: Any) -> Element:
    """Return the report of a result with other values in its run.json."""
    run = from_json(RunRecord, {**to_json(result.run), **changed})
    return parsed(slide_report(run, result.summary, result.folder / "overview.png"))


def test_a_run_leaves_a_valid_report_with_every_class_and_file(result: SlideResult) -> None:
    text = (result.folder / "report.html").read_text(encoding="utf-8")
    page = parsed(text)
    assert text.startswith("<!DOCTYPE html>")
    assert loads_nothing(page)
    assert text_of(next(page.iter("h1"))) == "slide.tif"
    table = rows(page)
    for entry in result.summary.classes:
        assert [entry.name, figure(entry.area_mm2), percent(entry.share)] in table
    for entry in result.objects.values():
        numbers = map(figure, (entry.objects, entry.objects_per_mm2, entry.mean_object_um2))
        assert [entry.name, *numbers, percent(entry.touching_share)] in table
    published = json.loads((result.folder / "run.json").read_text())["outputs"]
    assert "report.html" in published
    links = {unquote_to_bytes(a.get("href", ""))[2:].decode() for a in page.iter("a")}
    assert links == {*published, "run.json"} - {"report.html"}
    assert not warnings(page)
    said = facts(page)
    assert said["slide"] == result.run.slide.sha256
    assert said["annotations"] == "qupath"
    assert "blend" not in said  # it has its default value


def test_the_count_of_objects_is_that_of_the_table(result: SlideResult) -> None:
    lines = (result.folder / "objects.csv").read_text().splitlines()[1:]
    counts = [(entry.objects or 0, entry.mean_object_um2 or 0.0) for entry in result.objects.values()]
    assert sum(count for count, _ in counts) == len(lines)
    areas = [float(line.split(",")[9]) for line in lines]
    assert sum(count * mean_um2 for count, mean_um2 in counts) == pytest.approx(sum(areas), rel=1e-3)


def test_the_report_can_be_made_from_the_files_of_the_result(result: SlideResult) -> None:
    run, summary = read_run(result.folder), read_summary(result.folder)
    assert run is not None
    assert summary is not None
    text = slide_report(run, summary, result.folder / "overview.png")
    assert text == (result.folder / "report.html").read_text(encoding="utf-8")


def test_two_runs_of_the_same_slide_differ_in_times_alone(result: SlideResult, tmp_path: Path) -> None:
    slide = Path(result.run.slide.path)
    options = replace(ALL, annotations=("qupath",), objects=("csv",))
    again = segment_slide(slide, IdentityEngine(), tmp_path, options)
    times = ("seconds", "mpx_per_s", "bound_by", "peak_memory_mib", "started")
    run = replace(again.run, **{name: getattr(result.run, name) for name in times})
    text = slide_report(run, again.summary, again.folder / "overview.png")
    assert text == (result.folder / "report.html").read_text(encoding="utf-8")


def test_the_picture_is_the_overview_without_its_legend(result: SlideResult) -> None:
    (img,) = report(result).iter("img")
    data = base64.b64decode(img.get("src", "").partition(",")[2])
    with Image.open(io.BytesIO(data)) as found, Image.open(result.folder / "overview.png") as whole:
        assert found.size == (400, 300)
        ours, theirs = (np.asarray(p.convert("RGB"), int)[:300, :400] for p in (found, whole))
    assert np.abs(ours - theirs).mean() < 12  # noise is the worst for JPEG


def test_the_largest_picture_of_the_worst_slide_is_small_enough(tmp_path: Path) -> None:
    info = SlideInfo("noise", 1600, 1600, 0.5, CARD.classes)
    overview = Overview(tmp_path / "overview.png", info, random_pixels(1600, 1600))
    ((made, _),) = overview.finish()
    found = read_picture(made, 1600, 1600, PICTURE_PX)
    assert found is not None
    assert (found.width, found.height) == (PICTURE_PX, PICTURE_PX)
    assert len(found.uri) < 1_500_000


def test_a_picture_that_is_no_overview_of_the_slide_is_left_out(result: SlideResult, tmp_path: Path) -> None:
    path = tmp_path / "overview.png"
    assert read_picture(path, 400, 300, PICTURE_PX) is None
    for content in (b"", b"\x89PNG\r\n\x1a\n junk", (result.folder / "summary.json").read_bytes()):
        path.write_bytes(content)
        assert read_picture(path, 400, 300, PICTURE_PX) is None
    Image.new("1", (20_000, 20_000)).save(path)  # is refused before it is decoded
    assert read_picture(path, 400, 300, PICTURE_PX) is None


def test_names_are_text_whatever_they_are(tmp_path: Path) -> None:
    pages = []
    for folder, name, told in (("a", "plain", "told"), ("b", MARKUP.replace("/", "|"), MARKUP)):
        (tmp_path / folder).mkdir()
        slide = write_slide(tmp_path / folder / f"{name}.tif", random_pixels(130, 90))
        classes = tuple(ClassInfo(f"{told} {k}", (k, 2, 3)) for k in range(3))
        card = replace(
            CARD,
            classes=classes,
            note=told,
            parity={told: {"engine": told}},
            training={"images": {told: 3}, "scores": {told: {told: 0.5}}},
        )
        engine = IdentityEngine(card, name=told)
        done = segment_slide(slide, engine, tmp_path / folder, replace(ALL, objects=("csv",)))
        pages.append(parsed((done.folder / "report.html").read_text(encoding="utf-8")))
    assert skeleton(pages[0]) == skeleton(pages[1])
    assert loads_nothing(pages[1])
    assert text_of(next(pages[1].iter("h1"))) == MARKUP.replace("/", "|") + ".tif"
    assert facts(pages[1])["Engine"] == MARKUP
    assert [f"{MARKUP} 0"] in [row[:1] for row in rows(pages[1])]
    assert MARKUP in "".join(pages[1].itertext())


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_a_name_that_is_no_text_is_shown_with_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xe2\x80\xaegnp.tif")  # and one that writes backwards
    done = segment_slide(write_slide(tmp_path / name, random_pixels(130, 90)), IdentityEngine(), tmp_path, ALL)
    page = parsed((done.folder / "report.html").read_text(encoding="utf-8"))
    assert text_of(next(page.iter("h1"))) == printable(name) == r"caf\udce9 \u202egnp.tif"


def test_damaged_places_are_counted_listed_and_outlined(tmp_path: Path) -> None:
    slide = write_compressed(tmp_path / "slide.tif", random_pixels(400, 300))
    damage(slide, [2 * 7 + 3, 0])
    done = segment_slide(slide, IdentityEngine(), tmp_path / "out", ALL)
    page = parsed((done.folder / "report.html").read_text(encoding="utf-8"))
    assert "2 blocks of the slide could not be decoded: not analysed" in warnings(page)
    assert ["0", "192", "128", "64", "64"] in rows(page)
    (drawing,) = [e for e in page.iter() if str(e.tag).endswith("svg")]
    assert drawing.get("viewBox") == "0 0 400 300"
    (outline,) = drawing
    assert outline.get("d") == "M0 0h64v64h-64zM192 128h64v64h-64z"
    share = 2 * 64 * 64 / (400 * 300)
    assert f"at most {figure(share * 0.03)} mm², {percent(share)} of the slide" in text_of(page)


def test_what_a_reader_must_know_is_said_above_all(result: SlideResult) -> None:
    slide, options = to_json(result.run.slide), result.run.options
    assert "enlarged 2 times" in warnings(report(result, slide={**slide, "scale": 0.5}))
    by_hand = report(result, options={**options, "mpp": 0.25}, slide={**slide, "mpp": None})
    assert "0.25 μm per pixel was set by --mpp (the file has none)" in warnings(by_hand)
    resumed = report(result, resumed={"runs": 3, "mpx_before": 0.05})
    assert "resumed 2 times" in warnings(resumed)
    assert "in the last run" in facts(resumed)["Tiles"]
    nothing = tuple(replace(c, share=None, area_mm2=0) for c in result.summary.classes)
    empty = replace(result.summary, analysed_mm2=0, classes=nothing)
    page = parsed(slide_report(result.run, empty, result.folder / "none.png"))
    assert "Nothing was analysed" in warnings(page)
    assert not list(page.iter("img"))


def test_the_stage_that_bounds_is_that_of_run_json(result: SlideResult) -> None:
    for stage, words in (("read", "reading the slide"), ("crf", "the CRF")):
        seconds = {**dict.fromkeys(to_json(result.run.seconds), 0.0), stage: 99.0, "total": 100.0}
        (bounds,) = [
            row for row in report(result, seconds=seconds, bound_by=stage).iter("tr") if row.get("class") == "bounds"
        ]
        assert [text_of(cell) for cell in bounds][2:] == ["99.0 s", "99.0 %"]
        assert words in text_of(report(result, seconds=seconds, bound_by=stage))


def test_the_model_is_judged_without_its_bundle(result: SlideResult) -> None:
    card = read_card(default_bundle())
    model = {
        "method": card.method,
        "engine": "onnxruntime 1.31.1 cpu int8",
        "mpp": card.mpp,
        "sha256": card.files,
        "card": to_json(card_record(card)),
    }
    crf = {"params": {"w1": 5.0, "n_iter": 5}, "uncertain": 0.25, "backend": "auto"}
    cells = {"halo_px": 8, "cell_px": 1024, "cells": 3, "cells_skipped": 1}
    page = report(result, model=model, options={**result.run.options, "crf": crf}, crf=cells)
    text = text_of(page)
    assert " ".join(card.note.split()) in text
    (used,) = [row for row in page.iter("tr") if row.get("class") == "used"]
    parity = card.parity["model.int8.onnx"]
    assert [text_of(cell) for cell in used][:3] == [
        "model.int8.onnx used here",
        percent(parity["label_agreement"]),
        f"{parity['max_difference']:.3g}",
    ]
    said = facts(page)
    assert said["training data"] == card.training["data_sha256"]
    assert said["model.int8.onnx (used here)"] == card.files["model.int8.onnx"]
    assert said["w1"] == "5"
    assert said["refined"] == "pixels with a score margin below 0.25"
    assert "test_images" not in json.dumps(model["card"])


def test_memory_is_held_against_its_bound(result: SlideResult) -> None:
    options = {**result.run.options, "max_memory_mib": 1000}
    page = report(result, options=options, peak_memory_mib=250.0)
    assert ["250 MiB", "25.0 %"] in [row[-2:] for row in rows(page)]


def paths(value: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, inner in value.items():
        yield (*prefix, name)
        if isinstance(inner, dict):
            yield from paths(inner, (*prefix, name))


def test_a_card_may_hold_anything_in_its_records_of_training_and_parity(result: SlideResult) -> None:
    card = to_json(card_record(read_card(default_bundle())))
    others: list[Any] = [None, "text", -1.5, [1, None, "x"], {"a": {"b": [{}]}}, True]
    for record in ("training", "parity"):
        for path in paths(card[record]):
            for other in others:
                changed = copy.deepcopy(card)
                inner = changed[record]
                for name in path[:-1]:
                    inner = inner[name]
                inner[path[-1]] = other
                page = report(result, model={**to_json(result.run.model), "card": changed})
                assert "Parity" in text_of(page)


def test_figures_of_any_card_can_be_written_as_json() -> None:
    nested: dict[str, Any] = {"deep": 1.0}
    for _ in range(50):
        nested = {"in": nested}
    odd = {
        "nan": float("nan"),
        "inf": [1.0, float("inf")],
        "huge": 10**400,
        "things": [{}] * 9,
        "nested": nested,
        "kept": [0.5, 1],
        "said": "x" * 9999,
        "none": None,
    }
    record = to_json(card_record(replace(CARD, parity={"model.onnx": odd}, training={"scores": odd})))
    text = json.dumps(record, allow_nan=False)
    assert len(text) < 3000
    assert record["parity"]["model.onnx"]["kept"] == [0.5, 1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0494123, "0.0494"),
        (5.145, "5.14"),
        (6586740, "6,586,740"),
        (1234.56, "1,235"),
        (0, "0"),
        (100.0, "100"),
        (0.00000123, "< 0.0001"),
        (None, "\N{EN DASH}"),
        (99.96, "100"),
        (-2.5, "-2.5"),
    ],
)
def test_figures_have_three_digits_and_no_exponent(value: float | None, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0.0 %"),
        (1, "100.0 %"),
        (0.5, "50.0 %"),
        (0.00001, "0.001 %"),
        (0.99999, "99.999 %"),
        (None, "\N{EN DASH}"),
    ],
)
def test_a_share_is_rounded_neither_to_nothing_nor_to_all(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_times_and_sizes_are_read_at_a_glance() -> None:
    said = [duration(s) for s in (0.0123, 12.34, 245, 7440, 3599.9)]
    assert said == ["0.012 s", "12.3 s", "4 min 05 s", "2 h 04 min", "1 h 00 min"]
    assert [size(n) for n in (999, 1_938_955, 4.2e12)] == ["999 bytes", "1.94 MB", "4.2 TB"]


def test_only_what_is_of_its_kind_is_said() -> None:
    said = JsonView({"a": {"b": 1}, "nan": float("nan"), "true": True, "huge": 10**500, "list": [1]})
    assert said.number("a", "b") == 1
    assert [said.number(n) for n in ("a", "nan", "true", "huge", "list", "none")] == [None] * 6
    assert said.text("a") == ""


def made_up(count: int) -> list[tuple[str, Outcome]]:
    """Return slides of which every tenth failed and every seventh is damaged."""
    rng = np.random.default_rng(1)
    slides = []
    for i in range(count):
        status = "failed" if i % 10 == 9 else "damaged" if i % 7 == 6 else "done"
        share = float(rng.beta(2, 9))
        classes = [
            {"name": name, "color": [k, 9, 9], "area_mm2": 3 * part, "share": part}
            for k, (name, part) in enumerate((("ground", 1 - share), ("gland", share)))
        ]
        summary = {"width_px": 40, "height_px": 30, "analysed_mm2": 3.0, "classes": classes}
        run = {
            "mpx": 12.5,
            "mpx_per_s": float(rng.uniform(0.5, 2)),
            "seconds": {"total": 9.0},
            "damaged": [{}] * (status == "damaged"),
        }
        records = (from_json(RunRecord, run), from_json(SummaryRecord, summary))
        outcome = Outcome(status, f"why {i}", *(records if status != "failed" else (None, None)))
        slides.append((f"slide-{i}", outcome))
    return slides


WHEN = {"host": "h", "started": "s", "updated": "u"}


def test_a_cohort_leaves_a_report_of_all_its_slides(tmp_path: Path) -> None:
    slides = [write_slide(tmp_path / f"{n}.tif", random_pixels(300, 200, n)) for n in range(3)]
    slides[1].write_bytes(b"no slide")
    odd = MARKUP.replace("/", "|")
    slides[2] = write_compressed(tmp_path / f"{odd}.tif", random_pixels(130, 90))
    damage(slides[2], [0])
    out = tmp_path / "out"
    jobs = [SlideJob(SlideInput(str(p), p.stem), out, ALL) for p in slides]
    executor = LocalExecutor(IdentityEngine)
    with CohortRecord(out, jobs) as record:
        for i, outcome in executor.segment_all(jobs, report=lambda i: lambda done, total: None, stopping=lambda: False):
            record.add(i, outcome)
    executor.close()
    text = (out / "report.html").read_text(encoding="utf-8")
    page = parsed(text)
    assert loads_nothing(page)
    *_, table = page.iter("table")
    lines = rows(table)[2:]
    assert [line[1] for line in lines] == ["failed", "damaged", "done"]  # the worst first
    summary = json.loads((out / "0" / "summary.json").read_text())
    for entry in summary["classes"]:
        assert figure(entry["area_mm2"]) in lines[2]
        assert figure(100 * entry["share"]) in lines[2]
    failed, damaged = rows(next(page.iter("table")))[1:]
    assert failed[:2] == ["1", "failed"]
    assert "1.tif" in failed[2]
    assert damaged[0] == odd
    links = {unquote_to_bytes(a.get("href", ""))[2:].decode() for a in page.iter("a")}
    assert links - {"cohort.csv", "cohort.json"} == {"0/report.html", f"{odd}/report.html"}
    assert len(list(page.iter("img"))) == 2


def test_a_slide_without_a_report_of_its_own_is_not_linked(tmp_path: Path) -> None:
    slides = made_up(2)
    for name, _ in slides:
        (tmp_path / name).mkdir()
    (tmp_path / slides[1][0] / "report.html").touch()
    page = parsed(CohortReport(tmp_path).text(slides, **WHEN))
    links = {a.get("href") for a in page.iter("a")}
    assert links == {"./cohort.csv", "./cohort.json", "./slide-1/report.html"}


def test_thousands_of_slides_are_one_small_page_made_at_once(tmp_path: Path) -> None:
    slides = made_up(2000)
    info = SlideInfo("s", 40, 30, 0.5, CARD.classes)
    ((made, _),) = Overview(tmp_path / "overview.png", info, random_pixels(40, 30)).finish()
    for name, _ in slides:
        (tmp_path / name).mkdir()
        os.link(made, tmp_path / name / "overview.png")
    page = CohortReport(tmp_path)
    page.text(slides, **WHEN)
    for path in tmp_path.rglob("*.png"):  # each was read once
        path.unlink()
    start = time.process_time()
    text = page.text(slides, **WHEN)
    assert time.process_time() - start < 5  # 0.5 on a quiet machine
    assert len(text) < 3_000_000
    assert text.count("data:image/jpeg") == MAX_PICTURES
    tree = parsed(text)
    assert f"{MAX_PICTURES} of 1800 are shown" in text_of(tree)
    *_, table = tree.iter("table")
    assert len(rows(table)) == 2 + 2000
    reasons = Counter(re.findall(r">(why \d+)<", text))
    wrong = [outcome.reason for _, outcome in slides if outcome.status != "done"]
    assert reasons == Counter(wrong)  # each is said once


def test_every_status_of_a_cohort_has_its_rank() -> None:
    words = {
        getattr(outcome_module, name)
        for name in ("DONE", "DAMAGED", "UNCHANGED", "NO_TISSUE", "LOCKED", "FAILED", "STOPPED", "NOT_BEGUN")
    }
    assert set(WORST_FIRST) == words


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.07, 0.2, 0.2, 0.93], [3e-7, 2e-7], [41.0] * 9])
def test_a_plot_has_each_value_at_its_place(values: list[float]) -> None:
    plot = distribution(values)
    assert plot.end >= max(values)
    assert max(values) == 0 or plot.end < 1.51 * max(values)
    ticks = [int(x) for x in re.findall(r"M(\d+) ", plot.ticks)]
    assert ticks == sorted({round(400 * value / plot.end) for value in values})
    heights = [float(h) for h in re.findall(r"v-([\d.]+)", plot.bars)]
    in_bins = Counter(min(int(40 * value / plot.end), 39) for value in values)
    tallest = max(in_bins.values())
    assert heights == pytest.approx([34 * in_bins[i] / tallest for i in sorted(in_bins)], abs=0.06)
    assert plot.middle == pytest.approx(400 * np.median(values) / plot.end)


def test_the_bar_of_a_slide_is_as_wide_as_its_shares() -> None:
    ((_, outcome),) = made_up(1)
    assert outcome.summary is not None
    stops = re.findall(r"rgb\((\d+) 9 9\) 0 ([\d.]+)%", share_bar(outcome.summary))
    assert [k for k, _ in stops] == ["0", "1"]
    assert float(stops[0][1]) == pytest.approx(100 * (outcome.summary.classes[0].share or 0), abs=0.06)
    assert float(stops[1][1]) == 100

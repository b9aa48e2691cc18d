"""The report of a training run: what is in it, that it is valid, and that its curves are right."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
import numpy as np
import pytest

from histostream.training import checkpoint, loop
from histostream.training.data import DataSet
from histostream.training.methods.imems import method as imems
from histostream.training.report import run as run_report
from histostream.training.report.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Plot, draw
from histostream.wsi import files
from histostream.wsi.errors import OutputError
from tests.training.resuming import logged
from tests.training.test_running import recipe

MARKUP = "<img src=x onerror=alert(1)>\"'&amp;</style></title><script>alert(2)</script>{{ 7 * 7 }}"


def parsed(run: Path) -> Element:
    """Read a report as strictly as the standard asks."""
    text = (run / "report.html").read_text(encoding="utf-8")
    page = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)
    assert isinstance(page, Element)
    return page


def text_of(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def titles(page: Element) -> list[str]:
    return [text_of(e) for e in page.iter("p") if e.get("class") == "plot-title"]


def cells(page: Element) -> dict[str, list[str]]:
    rows = [[text_of(cell) for cell in row] for row in page.iter("tr")]
    return {row[0]: row[1:] for row in rows}


def test_a_finished_run_leaves_a_page_with_losses_scores_rates_samples_and_the_record(
    found: DataSet, tmp_path: Path
) -> None:
    named = replace(recipe(test=0.25), classes=(("ground", (255, 255, 255)), ("nucleus", (30, 100, 220))))
    best = loop.train(named, imems, found, tmp_path / "mine")
    page = parsed(tmp_path / "mine")
    text = text_of(page)
    assert text_of(next(page.iter("h1"))) == "mine"
    assert titles(page) == [
        "Dice coefficient of each class",
        "validation loss",
        "discriminator",
        "adversarial",
        "l1",
        "Learning rate",
    ]
    last = logged(tmp_path / "mine")[-1]
    table = cells(page)
    shares = [float(table[name][0].removesuffix(" %")) / 100 for name in ("ground", "nucleus")]
    labels = np.concatenate([found.train[i].labels.ravel() for i in training_images(found, best)])
    assert shares == pytest.approx([(labels == k).mean() for k in (0, 1)], abs=6e-4)
    for k, name in enumerate(("ground", "nucleus")):
        assert float(table[name][1]) == pytest.approx(float(last[f"dice_{name}"]), abs=6e-4)
        assert float(table[name][3]) == pytest.approx(best.record["scores"]["test"]["f_score"][k], abs=6e-4)
    assert best.record["data_sha256"] in text
    assert "batch2" in text
    pictures = [e.get("src", "") for e in page.iter("img")]
    assert len(pictures) == 1
    assert pictures[0].startswith("data:image/png;base64,")
    links = {e.get("href", "") for e in page.iter("a")}
    assert {"./best", "./last", "./log.csv", "./samples/step-000002.png", "./samples/step-000004.png"} <= links
    assert all((tmp_path / "mine" / link).exists() for link in links)


def training_images(found: DataSet, best: checkpoint.Checkpoint) -> list[int]:
    """Return the indices of the images that are in no other part, by the record and the split."""
    from histostream.training.batches import divide

    parts = divide(found, recipe(test=0.25).schedule)
    assert len(parts.split.train) == best.record["images"]["train"]
    return list(parts.split.train)


def test_the_page_has_no_script_and_loads_nothing_whatever_the_names(found: DataSet, tmp_path: Path) -> None:
    hostile = replace(recipe(), classes=((MARKUP, (1, 2, 3)), ("\u202enucleus\x1b", (30, 100, 220))))
    loop.train(hostile, imems, replace(found, name=MARKUP), tmp_path)
    page = parsed(tmp_path)
    for element in page.iter():
        assert element.tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") for name in element.keys())  # noqa: SIM118
        assert element.get("src", "data:").startswith("data:")
        assert re.fullmatch(r"\./[^/:]+(/[^/:]+)?", element.get("href", "./x"))
        assert not re.search(r"url\(|@import", element.get("style", ""))
    assert MARKUP in text_of(page)
    assert "\\u202enucleus\\x1b" in text_of(page)
    (policy,) = [e.get("content", "") for e in page.iter("meta") if e.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_the_page_is_written_at_each_validation_and_survives_a_stop(
    found: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    seen: list[str] = []

    def watch(progress: loop.Progress) -> None:
        if (tmp_path / "report.html").exists():
            seen.append(text_of(next(e for e in parsed(tmp_path).iter("ul") if e.get("class") == "headlines")))
        if progress.step == 7:
            raise Killed

    with pytest.raises(Killed):
        loop.train(recipe(steps=8, validate_every=2), imems, found, tmp_path, report=watch)
    assert [re.findall(r"Steps(\d+)", text)[0] for text in seen] == ["2", "2", "4", "4", "6"]
    loop.train(recipe(steps=8, validate_every=2), imems, found, tmp_path)
    page = parsed(tmp_path)
    marks = [e.get("d", "") for e in page.iter() if e.get("class") == "line"]
    # Dice of the first class has a point for each of the four validations, of both processes.
    assert marks[0].count("L") == 3

    before = (tmp_path / "report.html").read_bytes()

    def full(handle: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OutputError):
        files.write_whole(tmp_path / run_report.REPORT, "half")
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_run_without_validation_images_says_so(found: DataSet, tmp_path: Path) -> None:
    loop.train(recipe(validation=0.0, select="last"), imems, found, tmp_path)
    page = parsed(tmp_path)
    assert "There are no validation images" in text_of(page)
    assert "Dice coefficient of each class" not in titles(page)


def points(path: str) -> list[tuple[float, float]]:
    pairs = [pair.split() for pair in path.removeprefix("M").removesuffix("z").split("L")]
    return [(float(x), float(y)) for x, y in pairs]


def drawn(*arguments: object, **options: object) -> Plot:
    plot = draw(*arguments, **options)  # type: ignore[arg-type]
    assert plot is not None
    return plot


def test_a_curve_goes_through_its_values() -> None:
    """Ends of a fixed axis are the edges of the drawing, and the middle is halfway."""
    steps = np.array([0.0, 50.0, 100.0])
    plot = drawn("t", "u", steps, [("a", np.array([0.0, 0.5, 1.0]))], limits=(0.0, 1.0), mark=50)
    floor, middle = HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2
    across = (LEFT + WIDTH - RIGHT) / 2
    assert points(plot.curves[0].path) == [(LEFT, floor), (across, middle), (WIDTH - RIGHT, TOP)]
    assert plot.mark == across
    assert [text for _, text in plot.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert [text for _, text in plot.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert plot.curves[0].dots[1] == (across, middle, "step 50: 0.5")


def test_many_steps_are_drawn_as_means_with_their_lowest_and_highest_value() -> None:
    rng = np.random.default_rng(0)
    steps, values = np.arange(1.0, 1001.0), rng.uniform(0, 1, 1000)
    plot = drawn("t", "u", steps, [("a", values)], limits=(0.0, 1.0))
    assert plot.averaged == 7  # the fewest steps that make at most 160 points of 1000
    found = points(plot.curves[0].path)
    groups = [values[i : i + 7] for i in range(0, 1000, 7)]
    assert len(found) == len(groups)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value * (HEIGHT - BOTTOM - TOP)

    assert [b for _, b in found] == pytest.approx([y(g.mean()) for g in groups], abs=0.051)
    band = points(plot.curves[0].band)
    assert [b for _, b in band[: len(groups)]] == pytest.approx([y(g.min()) for g in groups], abs=0.051)
    assert [b for _, b in band[len(groups) :]] == pytest.approx([y(g.max()) for g in groups][::-1], abs=0.051)


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [3.0], [-2.0, -2.0], [1e-9, 2e-9], [-5.0, 7.0], [1e6, 1e6], [1e-5, 10.0]]
)
def test_any_values_have_an_axis_with_ticks_inside_the_drawing(values: list[float]) -> None:
    plot = drawn("t", "u", np.arange(1.0, 1 + len(values)), [("", np.array(values))])
    assert 2 <= len(plot.y_ticks) <= 12
    assert all(TOP <= y <= HEIGHT - BOTTOM for y, _ in plot.y_ticks)
    assert all(LEFT <= x <= WIDTH - RIGHT for x, _ in plot.x_ticks)
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in points(plot.curves[0].path))
    assert len({text for _, text in plot.y_ticks}) == len(plot.y_ticks)


def test_nothing_is_drawn_of_no_value() -> None:
    assert draw("t", "u", np.arange(3.0), [("a", np.full(3, np.nan))]) is None

"""The viewer's page in a real browser: what is seen is what was found, where it was found."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histostream.runtime.options import Options
from histostream.runtime.slide_run import segment_slide
from histostream.runtime.viewer.server import ViewServer
from histostream.wsi.errors import StoppedError
from histostream.wsi.tiling.cells import dilated
from tests.runtime.conftest import IdentityEngine, write_slide
from tests.runtime.viewer.viewing import serving, stop_after

pytestmark = pytest.mark.full

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
)
ALL = Options(tissue=False, overlap_px=16, probabilities=True)
SQUARE_PX = 30
PANE_PX = (720, 559)  # beside the panel, below the header
Array = NDArray[np.uint8]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM)} is installed; make browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that asks nobody but the server, and has nothing to complain of."""
    page = browser.new_page(viewport={"width": 1000, "height": 600}, reduced_motion="reduce")
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: said.extend([asked.url] * (not is_local(asked.url))))
    page.set_default_timeout(10_000)
    yield page
    page.close()
    assert said == []


def is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:"))


def squares(seed: int) -> Array:
    """Return sharp squares of pure red, green and blue, which are the classes, 1860 x 1350."""
    which = np.random.default_rng(seed).integers(0, 3, (45, 62))
    colours = 255 * np.eye(3, dtype=np.uint8)[which]
    return np.kron(colours, np.ones((SQUARE_PX, SQUARE_PX, 1), np.uint8))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides: as fine as the model, 2 x and 5/3 x as fine."""
    folder = tmp_path_factory.mktemp("viewed")
    for seed, (name, mpp) in enumerate({"same": 0.5, "double": 0.25, "odd & 5+3 µ": 0.3}.items()):
        slide = write_slide(folder / f"{name}.tif", squares(seed), mpp=mpp, tile_px=256)
        options = replace(ALL, rasters=("density",)) if name == "odd & 5+3 µ" else ALL
        segment_slide(slide, IdentityEngine(), folder / "out", options)
    return folder / "out"


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[ViewServer]:
    with serving(out) as server:
        yield server


def open_at(page: Page, server: ViewServer, name: str, x: float, y: float, zoom: float) -> None:
    page.goto(f"{server.url}#slide=0/{quote(name)}&x={x}&y={y}&zoom={zoom}")
    page.wait_for_selector(".pane .labels")


def seen(page: Page, pane: int = 0) -> Array:
    """What a pane shows when nothing changes any more, (H, W, 3), without caption and bar."""
    page.wait_for_load_state("networkidle")
    page.locator(".scale").evaluate_all("bars => bars.forEach(bar => bar.style.opacity = 0)")
    before, now = b"", b"no"
    while before != now:
        page.wait_for_timeout(100)
        before, now = now, page.locator(".pane").nth(pane).screenshot()
    with Image.open(io.BytesIO(now)) as image:
        return np.asarray(image.convert("RGB"))[50:]


def with_opacity(page: Page, percent: int) -> Array:
    page.locator("#opacity").fill(str(percent))
    return seen(page)


def edges(line: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.flatnonzero(np.diff(line)) + 1


def hash_of(page: Page) -> dict[str, str]:
    """What the address says of slide and place; it follows the page by a third of a second."""
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).fragment).items()}


def place_of(page: Page) -> NDArray[np.float64]:
    """x, y and zoom that the address says."""
    said = hash_of(page)
    return np.array([float(said.get(name, "nan")) for name in ("x", "y", "zoom")])


def is_at(page: Page, place: tuple[float, float, float]) -> bool:
    return np.allclose(place_of(page), place, rtol=2e-3)


def until(page: Page, is_so: Callable[[], bool]) -> None:
    """Wait for something; the page's policy lets nobody do so inside it."""
    for _ in range(100):
        if is_so():
            return
        page.wait_for_timeout(100)
    pytest.fail("it did not come about")


@dataclass
class Shifted(IdentityEngine):
    """Finds everything some pixels to the right."""

    def infer(self, tiles: Array) -> Array:
        return np.roll(super().infer(tiles), 5, axis=3)


@pytest.mark.parametrize(("name", "zoom"), [("same", 0.42), ("double", 1.0), ("odd & 5+3 µ", 7.3)])
def test_labels_lie_on_the_slide_to_the_pixel(page: Page, server: ViewServer, name: str, zoom: float) -> None:
    open_at(page, server, name, 933.3, 671.7, zoom)
    slide = with_opacity(page, 0).argmax(axis=2)
    painted = with_opacity(page, 100)
    assert set(np.unique(painted)) == {0, 255}  # crisp: no colour between two classes
    labels = painted.argmax(axis=2)
    apart = []
    for of_slide, of_labels in (*zip(slide, labels, strict=True), *zip(slide.T, labels.T, strict=True)):
        found, expected = edges(of_labels), edges(of_slide)
        if not len(expected):
            assert len(found) == 0
            continue
        nearest = np.abs(found[:, None] - expected).argmin(axis=1)
        apart.append(found - expected[nearest])
    offsets = np.concatenate(apart)
    assert len(offsets) > 1000
    # JPEG and the browser's averaging may give a pixel that an edge halves to either side.
    assert np.abs(offsets).max() <= 1
    assert abs(offsets.mean()) < 0.02
    assert np.mean(slide == labels) > 0.998


def test_classes_are_toggled_coloured_and_faded_without_asking_the_server(page: Page, server: ViewServer) -> None:
    open_at(page, server, "same", 900, 700, 2)
    slide, full = with_opacity(page, 0), with_opacity(page, 100)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    reds = (full == (255, 0, 0)).all(axis=2)
    assert 0.1 < reds.mean() < 0.9
    page.locator("#class-0").uncheck()
    np.testing.assert_array_equal(seen(page)[reds], slide[reds])
    np.testing.assert_array_equal(seen(page)[~reds], full[~reds])
    page.locator("#class-0").check()
    page.get_by_label("Colour of red").fill("#ffcc00")
    assert (seen(page)[reds] == (255, 204, 0)).all()
    half = with_opacity(page, 50)
    expected = 0.5 * slide[reds] + 0.5 * np.array((255, 204, 0))
    assert np.abs(half[reds] - expected).max() <= 1.5
    assert asked == []


def test_the_heatmap_lies_on_its_cells_in_colours_that_rise_with_the_density(
    page: Page, server: ViewServer, out: Path
) -> None:
    open_at(page, server, "odd & 5+3 µ", 900, 700, 0.5)
    with_opacity(page, 100)
    page.keyboard.press("h")
    heat = seen(page).astype(int)
    values = tifffile.imread(out / "odd & 5+3 µ" / "density.tif")[0]
    side = 64 / 0.3  # pixels of the slide
    top = float(page.locator("#density-high").inner_text().replace(",", ""))
    found = {}
    for row, column in np.ndindex(*values.shape):
        x, y = (column + 0.5) * side, (row + 0.5) * side
        at = round((x - 900) / 2 + PANE_PX[0] / 2), round((y - 700) / 2 + PANE_PX[1] / 2) - 50
        if 5 < at[0] < PANE_PX[0] - 5 and 5 < at[1] < heat.shape[0] - 5 and x < 1860 and y < 1350:
            found[row, column] = heat[at[1], at[0]]
            assert np.ptp(heat[at[1] - 5 : at[1] + 6, at[0] - 5 : at[0] + 6], axis=(0, 1)).max() == 0  # one colour
    assert len(found) > 20
    order = sorted(found, key=lambda cell: values[cell])
    brightness = [found[cell] @ (0.3, 0.6, 0.1) for cell in order]  # of viridis it rises with the value
    assert np.corrcoef(brightness, [values[cell] for cell in order])[0, 1] > 0.98
    assert np.nanpercentile(values, 98) <= top <= 5 * np.nanmax(values)
    page.mouse.click(PANE_PX[0] / 2, 600 - PANE_PX[1] / 2)
    middle = values[int(700 // side), int(900 // side)]
    page.locator("#place").get_by_text(f"red: {round(float(middle))} per mm²").wait_for()
    page.locator("#density").select_option("")
    assert {tuple(colour) for colour in seen(page).reshape(-1, 3)} >= {(255, 0, 0), (0, 255, 0), (0, 0, 255)}


def test_the_analysed_area_is_outlined_and_the_slide_is_not(page: Page, tmp_path: Path) -> None:
    """Here a pixel of the screen is one of the slide, and half of it is excluded."""
    slide = write_slide(tmp_path / "half.tif", squares(1), tile_px=256)
    mask = np.ones((45, 62), np.uint8)
    mask[:, 31:] = mask[:20, :10] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    segment_slide(slide, IdentityEngine(), tmp_path / "out", replace(ALL, mask=tmp_path / "mask.png"))
    with serving(tmp_path / "out") as server:
        for x, y, zoom in ((930, 675, 1), (300, 600, 1), (930, 675, 0.3)):
            open_at(page, server, "half", x, y, zoom)
            with_outline = with_opacity(page, 100)
            page.get_by_label("Outline of the analysed area").uncheck()
            without = seen(page)
            black = (with_outline == 0).all(axis=2)
            np.testing.assert_array_equal(with_outline[~black], without[~black])
            # Slide and labels have the same colours, so that only the outline is black.
            height, width = black.shape
            xs = (np.arange(width) + 0.5 - PANE_PX[0] / 2) / zoom + x
            ys = (np.arange(height) + 50.5 - PANE_PX[1] / 2) / zoom + y
            inside = np.logical_and.outer((ys > 0) & (ys < 1350), (xs > 0) & (xs < 1860))
            rows, columns = (ys // SQUARE_PX).astype(int).clip(0, 44), (xs // SQUARE_PX).astype(int).clip(0, 61)
            kept = mask[np.ix_(rows, columns)] > 0
            expected = inside & ~kept & dilated(kept & inside, 1)
            assert expected.sum() > 400
            assert not (black & ~dilated(expected, 1)).any()  # the corners of squares, and half a pixel of the view
            assert not (expected & ~dilated(black, 1)).any()
            page.get_by_label("Outline of the analysed area").check()


def test_a_click_reads_label_scores_and_place(page: Page, server: ViewServer, out: Path) -> None:
    open_at(page, server, "double", 900, 700, 4)
    labels = tifffile.imread(out / "double" / "labels.tif", level=0)
    box = page.locator(".pane").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2 + 202, box["y"] + box["height"] / 2 - 118)
    x, y = 900 + 202 / 4, 700 - 118 / 4
    name = ("red", "green", "blue")[labels[int(y / 2), int(x / 2)]]
    said = page.locator("#place")
    said.get_by_text(re.compile(name + r" \(label")).wait_for()
    assert f"{int(x)}, {int(y)} px; {x * 0.25:.1f}, {y * 0.25:.1f} µm" in said.inner_text()
    assert f"{name}0.996" in re.sub(r"\s*\n\s*", "", said.inner_text())
    rows = page.locator("#classes tr").all_inner_texts()
    share = np.mean(labels == 0)
    assert f"{100 * share:.1f}" in rows[0]


def test_everything_can_be_done_by_keys(page: Page, server: ViewServer) -> None:
    open_at(page, server, "same", 900, 700, 2)
    seen(page)
    width, height = PANE_PX
    for key, place in (
        ("ArrowRight", (900 + 0.15 * width / 2, 700, 2)),
        ("+", (900 + 0.15 * width / 2, 700, 3)),
        ("Shift+ArrowUp", (900 + 0.15 * width / 2, 700 - 0.8 * height / 3, 3)),
        ("0", (930, 675, min(width / 1860, height / 1350))),
    ):
        page.keyboard.press(key)
        until(page, partial(is_at, page, place))
    page.keyboard.press("2")
    assert not page.locator("#class-1").is_checked()
    page.keyboard.press("o")
    assert page.locator("#opacity").input_value() == "100"
    page.keyboard.press("Enter")
    page.locator("#place").get_by_text("(label").wait_for()
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"all", "out", "in", "home", "help", "opacity", "class-0", "color-2"} <= reached
    assert any("openseadragon" in name for name in reached)


def test_the_scale_bar_is_as_long_as_it_says(page: Page, server: ViewServer) -> None:
    for zoom in (0.5, 3.7):
        open_at(page, server, "odd & 5+3 µ", 900, 700, zoom)
        seen(page)
        said = page.locator(".scale").inner_text().split()
        um = float(said[0]) * {"µm": 1, "mm": 1000}[said[1]]
        width = page.evaluate("document.querySelector('.scale i').getBoundingClientRect().width")
        assert width == pytest.approx(um / 0.3 * zoom, rel=0.01)


def test_a_link_leads_to_the_place_it_was_taken_from(page: Page, server: ViewServer) -> None:
    page.goto(server.url)
    page.get_by_role("link", name="double").click()
    page.wait_for_selector(".pane")
    seen(page)
    place = place_of(page)
    page.keyboard.press("+")
    page.keyboard.press("ArrowDown")
    until(page, lambda: bool((place_of(page)[1:] > place[1:]).all()))
    first, said, link = seen(page).astype(int), hash_of(page), page.url
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector(".pane")
    np.testing.assert_allclose(seen(page), first, atol=12)  # places have two decimals
    assert hash_of(page) == said


def test_two_runs_side_by_side_move_together(page: Page, out: Path, tmp_path: Path) -> None:
    slide = out.parent / "same.tif"
    options = replace(ALL, probabilities=False)
    segment_slide(slide, Shifted(), tmp_path / "other", options)
    with serving(out, tmp_path / "other") as server:
        open_at(page, server, "same", 900, 700, 2)
        seen(page)
        page.locator("#compare").select_option("1/same")
        page.wait_for_selector(".pane >> nth=1")
        until(page, lambda: hash_of(page).get("compare") == "1/same")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("+")
        page.locator("#opacity").fill("0")
        np.testing.assert_array_equal(seen(page, 0), seen(page, 1))  # the same place of the slide
        page.locator("#opacity").fill("100")
        one, other = seen(page, 0), seen(page, 1)
        differ = (one != other).any(axis=2)
        assert 0 < differ.mean() < 1
        page.locator("#differences").check()
        page.get_by_text("of the pixels that both analysed").wait_for()
        magenta = (seen(page) == (255, 0, 255)).all(axis=2)
        np.testing.assert_array_equal(magenta, differ)
        maps = [tifffile.imread(folder / "same" / "labels.tif", level=0) for folder in (out, tmp_path / "other")]
        share = 100 * np.mean(maps[0] != maps[1])
        assert page.locator("#share").inner_text().startswith(f"{share:.1f} %")
        page.keyboard.press("c")
        until(page, lambda: page.locator(".pane").count() == 1)


def test_strips_appear_while_a_run_is_writing(page: Page, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "slide.tif", squares(9), tile_px=256)
    out = tmp_path / "out"

    def go_on(rows: int) -> None:
        with pytest.raises(StoppedError):
            segment_slide(slide, IdentityEngine(), out, ALL, stopping=stop_after(rows))

    def painted() -> float:
        """Share of the rows that have labels, from the top."""
        image = seen(page)
        full = (np.isin(image, (0, 255)).all(axis=2) & (image.sum(axis=2) == 255)).mean(axis=1)
        top = np.flatnonzero(full > 0.4)
        return float(len(top) / len(image))

    go_on(6)
    with serving(out) as server:
        page.goto(server.url)
        page.wait_for_selector(".pane")
        page.locator("#opacity").fill("100")
        page.locator("#status").get_by_text("interrupted").wait_for()
        progress = page.locator("#progress")
        first, begun = painted(), progress.evaluate("bar => bar.value")
        assert 0 < begun < 0.5
        go_on(14)
        until(page, lambda: progress.evaluate("bar => bar.value") > begun)
        second = painted()
        assert first < second < 1
        segment_slide(slide, IdentityEngine(), out, ALL)
        page.locator("#state").wait_for(state="hidden")
        assert painted() > 0.9


def test_a_slide_that_is_gone_leaves_the_labels(page: Page, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "same"
    shutil.copytree(out / "same", folder)
    said = (folder / "run.json").read_text()
    (folder / "run.json").write_text(said.replace(str(out.parent), "/nowhere"))
    with serving(folder) as server:
        page.goto(server.url)
        page.get_by_text("--slides DIR").wait_for()
        page.locator("#opacity").fill("100")
        image = seen(page)
        assert (image[:400, 200:400].max(axis=2) == 255).all()

"""Make the figures of the pages again; needs the extra dev and a Chromium: python docs/figures.py FOLDER.

FOLDER keeps the synthetic slides and their results, so that a second run takes seconds. ``overview.png`` is a
montage made by hand.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import threading
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Browser, sync_playwright

from histostream.benchmarks.plots import roofline_png, stages_png
from histostream.runtime import Options, Segmenter
from histostream.runtime.viewer.results import Results
from histostream.runtime.viewer.server import Viewer, ViewServer
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.synthetic import SyntheticSlide

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PART, PART_PX = (900, 600), 260  # of the slide that is drawn, at full size
PANEL_PX, GAP_PX = 360, 12
VIEW = "#slide=0/synthetic&x=1200&y=900&zoom=1"


def segment(folder: Path) -> Path:
    """Segment a synthetic slide, and return the output folder."""
    slide = folder / "synthetic.tif"
    if not slide.exists():
        folder.mkdir(parents=True, exist_ok=True)
        SyntheticSlide(1890, 1510, 0.5, 1).write(slide)
    options = Options(probabilities=True, annotations=("qupath",), max_memory_mib=1024)
    with Segmenter.load() as segmenter:
        return segmenter.run(slide, folder / "results", options).folder


def report(browser: Browser, result: Path) -> None:
    """Write ``report.png``: the upper part of the report of a slide."""
    page = browser.new_page(viewport={"width": 1200, "height": 1440})
    page.goto((result / "report.html").as_uri())
    page.screenshot(path=DOCS / "report.png")


def viewer(browser: Browser, result: Path) -> None:
    """Write ``viewer.png``: a part of a slide, after a click on a pixel."""
    with ViewServer(Viewer(Results([result.parent]), None)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            page = browser.new_page(viewport={"width": 1100, "height": 620})
            page.goto(f"{server.url}{VIEW}")
            page.wait_for_selector(".pane .labels")
            page.wait_for_load_state("networkidle")
            page.mouse.click(582, 135)
            page.wait_for_timeout(2000)
            page.screenshot(path=DOCS / "viewer.png")
        finally:
            server.shutdown()
            thread.join()


def outlines(result: Path) -> None:
    """Write ``qupath.png``: a part of a slide, the outlines of its objects file on it, and its label map."""
    with open_slide(result.parent.parent / "synthetic.tif") as slide:
        plain = Image.fromarray(slide.read(0, *PART, PART_PX, PART_PX)).resize((PANEL_PX, PANEL_PX))
    drawn = plain.copy()
    canvas = ImageDraw.Draw(drawn)
    scale = PANEL_PX / PART_PX
    with gzip.open(result / "objects.geojson.gz", "rt", encoding="utf-8") as file:
        features = json.load(file)["features"]
    for feature in features:
        color = tuple(feature["properties"]["classification"]["color"])
        for ring in feature["geometry"]["coordinates"]:
            points = [((x - PART[0]) * scale, (y - PART[1]) * scale) for x, y in ring]
            canvas.line(points, fill=color, width=2, joint="curve")
    with Image.open(result / "labels.tif") as labels:
        box = (*PART, PART[0] + PART_PX, PART[1] + PART_PX)
        classes = labels.crop(box).convert("RGB").resize((PANEL_PX, PANEL_PX), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (3 * PANEL_PX + 2 * GAP_PX, PANEL_PX), "white")
    for number, panel in enumerate((plain, drawn, classes)):
        sheet.paste(panel, (number * (PANEL_PX + GAP_PX), 0))
    sheet.quantize(128).save(DOCS / "qupath.png", optimize=True)


def coordinates() -> None:
    """Write ``coordinates.png``: where OpenSlide and QuPath begin to count the pixels of a MIRAX slide."""
    sheet = Image.new("RGB", (760, 300), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    whole, scanned = (20, 30, 740, 280), (330, 110, 620, 240)
    draw.rectangle(whole, outline=(120, 120, 120), width=2)
    draw.rectangle(scanned, fill=(243, 226, 236), outline=(30, 100, 220), width=2)
    draw.ellipse((400, 140, 560, 215), fill=(214, 150, 190))
    for corner, text in ((whole, "(0, 0) of OpenSlide"), (scanned, "(0, 0) of QuPath and of the results")):
        draw.ellipse((corner[0] - 5, corner[1] - 5, corner[0] + 5, corner[1] + 5), fill=(30, 100, 220))
        draw.text((corner[0] + 8, corner[1] - 22), text, fill="black", font=font)
    draw.line((whole[0], scanned[1], scanned[0], scanned[1]), fill=(120, 120, 120))
    draw.line((scanned[0], whole[1], scanned[0], scanned[1] - 26), fill=(120, 120, 120))
    draw.text((130, scanned[1] + 4), "bounds.x", fill="black", font=font)
    draw.text((scanned[0] - 70, 55), "bounds.y", fill="black", font=font)
    draw.text((scanned[0] + 60, scanned[3] + 6), "scanned area", fill=(30, 100, 220), font=font)
    sheet.quantize(32).save(DOCS / "coordinates.png", optimize=True)


def main(folder: Path) -> None:
    """Make all figures for which there is a program."""
    speed = json.loads((RESULTS / "bench-cpu.json").read_text(encoding="utf-8"))
    stages_png(speed, DOCS / "bench-stages.png")
    roofline_png(speed, DOCS / "bench-roofline.png")
    coordinates()
    result = segment(folder)
    outlines(result)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        report(browser, result)
        viewer(browser, result)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Make the figures of the pages again; needs the extra dev and a Chromium: python docs/figures.py FOLDER.

FOLDER keeps the synthetic slides and their results, so that a second run takes seconds. ``overview.png`` is a
montage made by hand.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from histostream.benchmarks.plots import roofline_png, stages_png
from histostream.runtime import Options, Segmenter
from histostream.runtime.viewer.results import Results
from histostream.runtime.viewer.server import Viewer, ViewServer
from histostream.wsi.synthetic import SyntheticSlide

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
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


def main(folder: Path) -> None:
    """Make all figures for which there is a program."""
    speed = json.loads((RESULTS / "bench-cpu.json").read_text(encoding="utf-8"))
    stages_png(speed, DOCS / "bench-stages.png")
    roofline_png(speed, DOCS / "bench-roofline.png")
    result = segment(folder)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        report(browser, result)
        viewer(browser, result)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

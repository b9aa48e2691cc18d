"""Plot results: the seconds of each stage, the roofline, and a confusion matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from histostream.benchmarks.report import machine_line, three_digits
from histostream.benchmarks.speed import labels

Plain = dict[str, Any]
# Okabe and Ito's colours, which people with any colour vision tell apart; markers differ too.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#4D4D4D")
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NAMES = {"decode": "decode", "engine": "bare engine", "blend": "blend", "write": "write", "end_to_end": "end to end"}
BOUND = {"decode": "decoding", "engine": "the network", "blend": "blending", "write": "writing"}
DPI = 150


def stages_png(result: Plain, path: Path) -> None:
    """Plot one bar for each stage of each run."""
    runs = result["runs"]
    figure = Figure(figsize=(8, 0.9 + 1.75 * len(runs)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    longest = max(stage["seconds"] for run in runs for stage in run["stages"].values())
    for axes, run, label in zip(panels, runs, labels(runs), strict=True):
        _bars(axes, run, label)
    panels[0].set_xlim(0, 1.3 * longest)
    panels[-1].set_xlabel(f"seconds for this slide ({runs[0]['mpx']:.1f} Mpx)")
    figure.suptitle(f"{result['slide']} on {machine_line(result['hardware'])}", fontsize=10, color=GREY)
    figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.12)


def _bars(axes: Axes, run: Plain, label: str) -> None:
    bound = run["bound_by"]
    colours = {bound["stage"]: ORANGE, "end_to_end": GREY}
    seconds = [stage["seconds"] for stage in run["stages"].values()]
    bars = axes.barh(
        range(len(seconds)), seconds, color=[colours.get(name, SKY) for name in run["stages"]], height=0.72
    )
    texts = [
        f"{three_digits(stage['seconds'])} s, {three_digits(stage['mpx_per_s'])} Mpx/s"
        for stage in run["stages"].values()
    ]
    axes.bar_label(bars, texts, padding=4, fontsize=9)
    axes.set_yticks(range(len(seconds)), [NAMES[name] for name in run["stages"]])
    axes.invert_yaxis()
    share = f"{bound['share_of_end_to_end']:.0%} of the time"
    axes.set_title(f"{label}: bound by {BOUND[bound['stage']]}, {share}", loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def roofline_png(result: Plain, path: Path) -> None:
    """Plot the peak rates of each device and the rate of every engine."""
    runs = result["runs"]
    points = [
        (label, run["roofline"])
        for run, label in zip(runs, labels(runs), strict=True)
        if "gflop_per_s" in run["roofline"]
    ]
    roofs = [
        (f"{device.upper()} {precision.upper()}", float(peak["rate"]), peaks["gbyte_per_s"]["rate"])
        for device, peaks in result["ceilings"].items()
        if peaks["gbyte_per_s"]
        for precision, peak in peaks["gflop_per_s"].items()
    ]
    figure = Figure(figsize=(9, 4.5), dpi=DPI)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    intensities = [point["flop_per_byte"] for _, point in points] + [peak / memory for _, peak, memory in roofs]
    rates = [point["gflop_per_s"] for _, point in points] + [peak for _, peak, _ in roofs]
    low, high = min(intensities, default=1) / 4, 3 * max(intensities, default=1)
    axes.set_xlim(low, high)
    axes.set_ylim(min(rates, default=1) / 5, 1.8 * max(rates, default=1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    for i, (name, peak, memory) in enumerate(roofs):
        text = f"{name}: {three_digits(peak)} GFLOP/s, memory {three_digits(memory)} GB/s"
        style = ("-", "--", ":", "-.")[i % 4]
        axes.plot([low, peak / memory, high], [low * memory, peak, peak], style, color=GREY, linewidth=1.6, label=text)
    for i, (label, point) in enumerate(points):
        x, y = point["flop_per_byte"], point["gflop_per_s"]
        share = f", {point['share_of_roof']:.0%} of its roof" if "share_of_roof" in point else ""
        text = f"{label}\n{three_digits(y)} GFLOP/s{share}"
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot([x], [y], marker, color=colour, markersize=8, zorder=3, label=text)
    axes.set_xlabel("arithmetic intensity, FLOP per byte (each operator separately)")
    axes.set_ylabel("bare engine, GFLOP/s")
    axes.set_title(f"Roofline of {machine_line(result['hardware'])}", loc="left", fontsize=11)
    axes.grid(visible=True, which="major", color="#E4E4E4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9, frameon=False)
    figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.12)


def confusion_png(result: Plain, path: Path) -> None:
    """Plot a confusion matrix; the shares of each row, which is a true class, sum to 1."""
    counts = np.asarray(result["confusion"], np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    side = 1.6 + 0.9 * len(counts)
    figure = Figure(figsize=(side + 1.2, side), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = result["classes"]
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for (i, j), share in np.ndenumerate(shares):
        color = "white" if share > 0.5 else "black"
        axes.text(j, i, f"{share:.1%}", ha="center", va="center", fontsize=10, color=color)
    axes.set_title(f"{result['data']}, {result['images']} images", fontsize=10, color=GREY)
    figure.savefig(path, format="png")

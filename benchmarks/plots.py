"""Two pictures of a result: where the time goes, and how far the network is from the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from histostream.benchmarks.speed import labels

Plain = dict[str, Any]
# Okabe and Ito's colours, told apart by the colour-blind; markers differ too.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#4D4D4D")
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NAMES = {"decode": "decode", "engine": "bare engine", "blend": "blend", "write": "write", "end_to_end": "end to end"}
BOUND = {"decode": "decoding", "engine": "the network", "blend": "blending", "write": "writing"}
DPI = 150


def stages_png(said: Plain, path: Path) -> None:
    """Draw one bar for each stage of each run."""
    runs = said["runs"]
    figure = Figure(figsize=(8, 0.9 + 1.75 * len(runs)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    longest = max(stage["seconds"] for run in runs for stage in run["stages"].values())
    for axes, run, label in zip(panels, runs, labels(runs), strict=True):
        _bars(axes, run, label)
    panels[0].set_xlim(0, 1.3 * longest)
    panels[-1].set_xlabel(f"seconds for this slide ({runs[0]['mpx']:.1f} Mpx)")
    figure.suptitle(f"{said['slide']} on {_machine(said)}", fontsize=10, color=GREY)
    figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.12)


def _bars(axes: Axes, run: Plain, label: str) -> None:
    bound = run["bound_by"]
    colours = {bound["stage"]: ORANGE, "end_to_end": GREY}
    for place, (stage, found) in enumerate(run["stages"].items()):
        axes.barh(place, found["seconds"], color=colours.get(stage, SKY), height=0.72)
        axes.annotate(
            f"{_figure(found['seconds'])} s, {_figure(found['mpx_per_s'])} Mpx/s",
            (found["seconds"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(run["stages"])), [NAMES[stage] for stage in run["stages"]])
    axes.invert_yaxis()
    share = f"{bound['share_of_end_to_end']:.0%} of the time"
    axes.set_title(f"{label}: bound by {BOUND[bound['stage']]}, {share}", loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def roofline_png(said: Plain, path: Path) -> None:
    """Draw the ceilings of each device and where the engines stand."""
    runs = said["runs"]
    points = [
        (label, run["roofline"])
        for run, label in zip(runs, labels(runs), strict=True)
        if "gflop_per_s" in run["roofline"]
    ]
    roofs = [
        (f"{device.upper()} {name.upper()}", float(peak["rate"]), found["gbyte_per_s"]["rate"])
        for device, found in said["ceilings"].items()
        if found["gbyte_per_s"]
        for name, peak in found["gflop_per_s"].items()
    ]
    texts = 2 * len(points) + len(roofs)
    figure = Figure(figsize=(9, max(4.5, 1.4 + 0.24 * texts)), dpi=DPI)
    axes = figure.add_axes((0.085, 0.13, 0.6, 0.78))
    axes.set(xscale="log", yscale="log")
    _limit(axes, points, roofs)
    _draw_slopes(axes, roofs)
    high = axes.get_xlim()[1]
    notes: list[_Note] = []
    for name, peak, memory in roofs:
        axes.plot([peak / memory, high], [peak, peak], color=GREY, linewidth=1.6)
        notes.append(_Note(f"{name} peak {_figure(peak)} GFLOP/s", GREY, high, peak, 1))
    for i, (label, point) in enumerate(points):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        x, y = point["flop_per_byte"], point["gflop_per_s"]
        axes.plot([x], [y], marker, color=colour, markersize=8, zorder=3)
        share = f", {point['share_of_roof']:.0%} of its roof" if "share_of_roof" in point else ""
        notes.append(_Note(f"{label}\n{_figure(y)} GFLOP/s{share}", colour, x, y, 2))
    _write(axes, notes)
    axes.set_xlabel("arithmetic intensity, FLOP per byte (each operator separately)")
    axes.set_ylabel("bare engine, GFLOP/s")
    axes.set_title(f"Roofline of {_machine(said)}", loc="left", fontsize=11)
    axes.grid(visible=True, which="major", color="#E4E4E4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.12)


@dataclass(frozen=True, slots=True)
class _Note:
    """A text beside the plot, and the place that it speaks of."""

    text: str
    colour: str
    x: float
    y: float
    lines: int


def _limit(axes: Axes, points: Sequence[tuple[str, Plain]], roofs: Sequence[tuple[str, float, float]]) -> None:
    """Show all points and the ridges, with some room, and write plain numbers on the axes."""
    xs = [point["flop_per_byte"] for _, point in points] + [p / memory for _, p, memory in roofs]
    ys = [point["gflop_per_s"] for _, point in points] + [peak for _, peak, _ in roofs]
    axes.set_xlim(min(xs, default=1) / 4, 3 * max(xs, default=1))
    axes.set_ylim(min(ys, default=1) / 5, 1.8 * max(ys, default=1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def _draw_slopes(axes: Axes, roofs: Sequence[tuple[str, float, float]]) -> None:
    """Draw one slope for each device's memory, up to its highest ceiling."""
    low, high = axes.get_xlim()
    box = axes.get_window_extent()
    across, up = np.log10(high / low), float(np.ptp(np.log10(axes.get_ylim())))
    angle = np.degrees(np.arctan2(box.height / up, box.width / across))
    devices = dict.fromkeys(name.split()[0] for name, _, _ in roofs)
    for device in devices:
        of_device = [(peak, memory) for name, peak, memory in roofs if name.split()[0] == device]
        highest, memory = max(of_device)
        axes.plot([low, highest / memory], [low * memory, highest], color=GREY, linewidth=1.6)
        # In the middle of what is seen of the slope, along it and above it.
        bottom = max(low, axes.get_ylim()[0] / memory)
        x = float(np.sqrt(bottom * highest / memory))
        axes.annotate(
            f"{device} memory {_figure(memory)} GB/s",
            (x, x * memory),
            xytext=(-3, 5),
            textcoords="offset points",
            fontsize=9,
            color=GREY,
            ha="center",
            va="bottom",
            rotation=angle,
            rotation_mode="anchor",
        )


def _write(axes: Axes, notes: Sequence[_Note]) -> None:
    """Write the notes right of the plot, as near to their height as they fit, each with a line."""
    bottom, top = np.log10(axes.get_ylim())
    points = axes.get_window_extent().height * 72 / axes.figure.dpi
    line = (top - bottom) * 12.5 / points  # of text, in decades
    edge = axes.get_xlim()[1]
    order = sorted(notes, key=lambda note: -note.y)
    heights = spread([float(np.log10(note.y)) for note in order], [(n.lines + 0.35) * line for n in order], top)
    for note, height in zip(order, heights, strict=True):
        axes.annotate(
            note.text,
            (note.x, note.y),
            xytext=(edge * 1.12, 10**height),
            textcoords="data",
            va="center",
            fontsize=9,
            color=note.colour,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": note.colour,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
        )


def spread(wanted: Sequence[float], sizes: Sequence[float], top: float) -> list[float]:
    """Move texts apart so that none covers another, as little as that allows.

    Parameters
    ----------
    wanted
        Where each one would have its middle, from high to low.
    sizes
        How much each one takes.
    top
        None may reach above it.
    """
    # Groups of texts that touch: [members' wanted middles of a stack, their sizes].
    groups: list[tuple[list[float], list[float]]] = []
    for middle, size in zip(wanted, sizes, strict=True):
        groups.append(([middle], [size]))
        while len(groups) > 1 and _start(*groups[-1], top) > _end(*groups[-2], top):
            middles, own = groups.pop()
            groups[-1][0].extend(middles)
            groups[-1][1].extend(own)
    placed = []
    for middles, own in groups:
        at = _start(middles, own, top)
        for size in own:
            placed.append(at - size / 2)
            at -= size
    return placed


def _start(middles: list[float], sizes: list[float], top: float) -> float:
    """Upper end of a stack whose middle is where its members' mean wants to be."""
    return min(sum(middles) / len(middles) + sum(sizes) / 2, top)


def _end(middles: list[float], sizes: list[float], top: float) -> float:
    return _start(middles, sizes, top) - sum(sizes)


def _figure(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _machine(said: Plain) -> str:
    machine = said["hardware"]
    gpus = [gpu["name"] for gpu in machine["gpus"]]
    cpu = f"{machine['cpu']}, {machine['cores']} cores"
    return ", ".join([*gpus, cpu])


def confusion_png(said: Plain, path: Path) -> None:
    """Draw a confusion matrix: rows are the truth, each row's shares add to 1."""
    counts = np.asarray(said["confusion"], np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    side = 1.6 + 0.9 * len(counts)
    figure = Figure(figsize=(side + 1.2, side), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = said["classes"]
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for (i, j), share in np.ndenumerate(shares):
        axes.text(
            j, i, f"{share:.1%}", ha="center", va="center", fontsize=10, color="white" if share > 0.5 else "black"
        )
    axes.set_title(f"{said['data']}, {said['images']} images", fontsize=10, color=GREY)
    figure.savefig(path, format="png")

"""Measure every setup in turns, with the peak rates of the device between them: ``histo-bench run``."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import onnx

from histostream.benchmarks.flops import count_flops
from histostream.benchmarks.peak_rates import Device, Probe, open_probes
from histostream.benchmarks.report import table_lines, three_digits
from histostream.benchmarks.stages import ALONE, STAGES, BenchError, Contender, Setup
from histostream.benchmarks.timing import paired_ratio
from histostream.export.graph.model import GraphError
from histostream.runtime.bundle.card import read_file
from histostream.runtime.choices import PRECISIONS
from histostream.runtime.hardware import hardware
from histostream.runtime.options import Options
from histostream.runtime.record import versions
from histostream.wsi.errors import HistoError
from histostream.wsi.synthetic import SyntheticSlide

Say = Callable[[str], None]
Plain = dict[str, Any]
SYNTHETIC_MPP = 0.5


def measure_speed(
    setups: Sequence[Setup],
    *,
    slide: Path | None = None,
    synthetic_px: tuple[int, int] = (4096, 4096),
    options: Options | None = None,
    repeats: int = 3,
    say: Say = lambda text: None,
) -> Plain:
    """Measure every stage alone and end to end, for every setup, in turns.

    Parameters
    ----------
    setups
        What to run; setups that are not usable here are listed with the reason.
    slide
        What to run on; None: a synthetic slide of ``synthetic_px``, (width, height).
    options
        How to run it; by default every tile is inferred, also glass.
    repeats
        Number of repeats; the figures are medians.
    say
        Called with each line of progress.

    Returns
    -------
    The content of ``bench.json``.

    Raises
    ------
    BenchError
        If none of the setups is usable.
    SlideError
        If the slide cannot be read.
    """
    if repeats < 1:
        raise BenchError(f"--repeats {repeats}: use 1 or more")
    options = options or Options(tissue=False)
    result: Plain = {"hardware": hardware(), "versions": versions(), "repeats": repeats, "options": asdict(options)}
    del result["options"]["batch"]  # each run has its own
    with tempfile.TemporaryDirectory(prefix="histo-bench-") as name:
        scratch = Path(name)
        if slide is None:
            width, height = synthetic_px
            result["slide"] = f"synthetic {width}x{height}"
            say(f"making a synthetic slide of {width} x {height} px")
            slide = scratch / f"synthetic-{width}x{height}.tif"
            SyntheticSlide(width, height, mpp=SYNTHETIC_MPP).write(slide)
        else:
            result["slide"] = slide.name
        contenders, result["not_usable"] = _open(setups, slide, options, scratch, say)
        try:
            probes = _probes(contenders)
            rates = _in_turns(contenders, probes, repeats, say)
        finally:
            for contender in contenders:
                contender.close()
        result["ceilings"] = {d: _best_rates(rates[d], missing) for d, (_, missing) in probes.items()}
        result["runs"] = [_run(contender, result["ceilings"]) for contender in contenders]
    return result


def _open(
    setups: Sequence[Setup], slide: Path, options: Options, scratch: Path, say: Say
) -> tuple[list[Contender], list[Plain]]:
    contenders: list[Contender] = []
    refused: list[Plain] = []
    for setup in setups:
        say(f"opening {setup}")
        try:
            contenders.append(Contender(setup, slide, options, scratch))
        except HistoError as error:
            if len(setups) == 1:
                raise
            refused.append({"what": str(setup), "reason": str(error)})
            say(f"not usable: {error}")
    if not contenders:
        raise BenchError(f"nothing to measure: {refused[0]['reason']}; run histo-bench doctor")
    return contenders, refused


def _probes(contenders: list[Contender]) -> dict[str, tuple[list[Probe], list[str]]]:
    """Return the probes of every device that a contender runs on, and what cannot be measured there."""
    probes = {}
    for device in sorted({c.device for c in contenders}):
        precisions = sorted({c.precision for c in contenders if c.device == device} | {"fp32"})
        probes[device] = open_probes(cast("Device", device), tuple(precisions))
    return probes


def _in_turns(
    contenders: list[Contender],
    probes: dict[str, tuple[list[Probe], list[str]]],
    repeats: int,
    say: Say,
) -> dict[str, dict[Probe, list[float]]]:
    """Measure all contenders and probes in turns; return the rates of the probes."""
    rates: dict[str, dict[Probe, list[float]]] = {
        device: {probe: [] for probe in device_probes} for device, (device_probes, _) in probes.items()
    }
    for repeat in range(repeats):
        for device_rates in rates.values():
            for probe, measured in device_rates.items():
                measured.append(probe.rate())
        for contender in contenders:
            contender.measure()
            total = contender.measured.seconds["end_to_end"][-1]
            say(f"{repeat + 1} of {repeats}: {contender.setup}: end to end in {total:.2f} s")
    return rates


def _best_rates(rates: dict[Probe, list[float]], missing: list[str]) -> Plain:
    """Return the best rate of each kind, and how it was measured."""
    best: dict[str, Plain] = {}
    for probe, measured in rates.items():
        rate = max(measured)
        if probe.kind not in best or rate > best[probe.kind]["rate"]:
            best[probe.kind] = {"rate": round(rate, 1), "how": probe.description}
    copy = best.pop("copy", None)
    return {
        "gflop_per_s": {name: best[name] for name in PRECISIONS if name in best},
        "gbyte_per_s": copy,
        "not_measured": missing,
    }


def _run(contender: Contender, peak_rates: dict[str, Plain]) -> Plain:
    """Return the figures of one contender."""
    measured, card, run = contender.measured, contender.engine.card, contender.measured.run
    mpx = float(run["mpx"])
    repeats = measured.seconds
    seconds = {stage: statistics.median(values) for stage, values in repeats.items()}
    bound = max(ALONE, key=lambda stage: seconds[stage])
    inside = {
        name: round(statistics.median(stages[name] for stages in measured.inside), 4) for name in measured.inside[0]
    }
    return {
        "model": contender.setup.bundle.name,
        "method": card.method,
        "engine": contender.engine.name,
        "device": contender.device,
        "precision": contender.precision,
        "tile_px": card.tile_px,
        "overlap_px": contender.grid.overlap_px,
        "batch": contender.batch,
        "tiles": contender.tile_count,
        "tiles_held": len(contender.tiles),
        "tiles_on_device": contender.resident,
        "mpx": mpx,
        "stages": {
            stage: {
                "seconds": round(seconds[stage], 6),
                "mpx_per_s": round(mpx / seconds[stage], 3),
                "every_seconds": [round(s, 6) for s in repeats[stage]],
            }
            for stage in STAGES
        },
        "cores_busy": round(statistics.median(measured.cores), 2),
        "inside_end_to_end_s": inside,
        "bound_by": {
            "stage": bound,
            "share_of_end_to_end": round(paired_ratio(repeats[bound], repeats["end_to_end"]), 3),
        },
        "end_to_end_of_bare_engine": round(paired_ratio(repeats["engine"], repeats["end_to_end"]), 3),
        "roofline": _roofline(contender, min(measured.seconds["engine"]), peak_rates),
    }


def _roofline(contender: Contender, engine_s: float, peak_rates: dict[str, Plain]) -> Plain:
    """Compare the fastest repeat of the bare engine with the peak rates of its device."""
    card = contender.engine.card
    content = read_file(contender.bundle, card, PRECISIONS[contender.precision])
    try:
        cost = count_flops(onnx.load_from_string(content), contender.batch)
    except GraphError as error:
        return {"why_none": str(error)}
    attained = cost.flops * contender.tile_count / engine_s / 1e9
    figures: Plain = {
        "gflop_per_tile": round(cost.flops / 1e9, 6),
        "mbyte_per_tile": round(cost.bytes / 1e6, 6),
        "flop_per_byte": round(cost.intensity, 3),
        "gflop_per_s": round(attained, 3),
    }
    rates = peak_rates.get(contender.device, {})
    peak = _peak(rates.get("gflop_per_s", {}), contender.precision)
    copy = rates.get("gbyte_per_s")
    if peak is None or copy is None:
        return {**figures, "why_none": "the peak rates of the device were not measured"}
    slope = cost.intensity * copy["rate"]
    roof = min(peak[1], slope)
    return {
        **figures,
        "peak": peak[0],
        "roof_gflop_per_s": round(roof, 1),
        "share_of_roof": round(attained / roof, 3),
        "limited_by": "arithmetic" if peak[1] <= slope else "memory",
    }


def _peak(peaks: Plain, precision: str) -> tuple[str, float] | None:
    """Return the peak rate of a precision, or that of FP32, in which a CPU computes FP16."""
    for name in (precision, "fp32"):
        if name in peaks:
            return name, float(peaks[name]["rate"])
    return None


def labels(runs: Sequence[Plain]) -> list[str]:
    """Name each run by the properties in which the runs differ, and by engine and precision."""
    parts: dict[str, Callable[[Plain], str]] = {
        "model": lambda run: run["model"],
        "engine": lambda run: _library_and_device(run["engine"], run["precision"]),
        "precision": lambda run: run["precision"].upper(),
        "tile_px": lambda run: f"tile {run['tile_px']}",
        "batch": lambda run: f"batch {run['batch']}",
    }
    names: list[list[str]] = [[] for _ in runs]
    for name, text in parts.items():
        texts = [text(run) for run in runs]
        if len(set(texts)) > 1 or name in ("engine", "precision"):
            for label, part in zip(names, texts, strict=True):
                label.append(part)
    return [", ".join(label) for label in names]


def _library_and_device(name: str, precision: str) -> str:
    """Return library and device: "onnxruntime 1.31.1 cpu fp32" becomes "onnxruntime cpu"."""
    words = name.split()
    return " ".join(w for w in words if w != precision and not w[0].isdigit())


def markdown(result: Plain) -> str:
    """Return the result as a page with tables."""
    lines = [*_head(result), *_speed_table(result), *_inside_table(result), *_roofline_table(result)]
    if result["not_usable"]:
        lines += ["Not usable here:", "", *(f"- {r['what']}: {r['reason']}" for r in result["not_usable"]), ""]
    return "\n".join(lines)


def _head(result: Plain) -> list[str]:
    machine = result["hardware"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    driver = f", {gpus} (driver {machine['gpu_driver']})" if gpus else ""
    return [
        f"# {result['slide']}: {result['runs'][0]['mpx']:.1f} Mpx",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory']}{driver}; load before "
        f"{machine['load_before']}. Medians of {result['repeats']} repeats, everything in turns.",
        "",
    ]


def _speed_table(result: Plain) -> list[str]:
    runs = result["runs"]
    lines = ["Mpx of the slide per second, and seconds; each stage alone, then all together."]
    if any(run["tiles_on_device"] for run in runs):
        lines += [
            "On a GPU the bare engine runs on tiles in its memory, and blending includes the copies to and from it."
        ]
    columns = "|tiles|tile|batch|decode|bare engine|blend|write|**end to end**|of bare engine|bound by"
    rows = [
        [
            label,
            str(run["tiles"]),
            str(run["tile_px"]),
            str(run["batch"]),
            *(_rate_and_seconds(run["stages"][stage]) for stage in ALONE),
            f"**{_rate_and_seconds(run['stages']['end_to_end'])}**",
            f"{run['end_to_end_of_bare_engine']:.0%}",
            f"{run['bound_by']['stage']} ({run['bound_by']['share_of_end_to_end']:.0%} of the time)",
        ]
        for label, run in zip(labels(runs), runs, strict=True)
    ]
    return [*lines, "", *table_lines(columns.split("|"), rows), ""]


def _inside_table(result: Plain) -> list[str]:
    """Return a table of the seconds of the stages inside the end-to-end run."""
    runs = result["runs"]
    names = list(dict.fromkeys(name for run in runs for name in run["inside_end_to_end_s"]))
    rows = [
        [label, *(three_digits(run["inside_end_to_end_s"].get(name, 0)) for name in names)]
        for label, run in zip(labels(runs), runs, strict=True)
    ]
    title = "Inside the end-to-end run: seconds that its main thread spent in each stage, or waiting."
    return [title, "", *table_lines(["", *names], rows), ""]


def _roofline_table(result: Plain) -> list[str]:
    rows = []
    for label, run in zip(labels(result["runs"]), result["runs"], strict=True):
        roofline = run["roofline"]
        if "gflop_per_tile" not in roofline:
            continue
        roof = ["", "", roofline.get("why_none", "")]
        if "share_of_roof" in roofline:
            roof = [
                three_digits(roofline["roof_gflop_per_s"]),
                f"{roofline['share_of_roof']:.0%}",
                f"{roofline['limited_by']} ({roofline['peak']})",
            ]
        figures = [three_digits(roofline[key]) for key in ("gflop_per_tile", "mbyte_per_tile", "flop_per_byte")]
        rows.append([label, *figures, f"{run['cores_busy']:.1f}", three_digits(roofline["gflop_per_s"]), *roof])
    if not rows:
        return []
    columns = "|GFLOP per tile|MB per tile|FLOP per byte|cores busy|GFLOP/s|roof, GFLOP/s|of the roof|roof is"
    lines = ["The fastest repeat of the bare engine, and the best measured rates of its device:", ""]
    lines += [*table_lines(columns.split("|"), rows), ""]
    for device, peaks in result["ceilings"].items():
        for name, peak in peaks["gflop_per_s"].items():
            lines.append(f"- {device}, {name}: {peak['rate']:.1f} GFLOP/s ({peak['how']})")
        if copy := peaks["gbyte_per_s"]:
            lines.append(f"- {device}, memory: {copy['rate']:.1f} GB/s ({copy['how']})")
        lines += [f"- {device}, not measured: {reason}" for reason in peaks["not_measured"]]
    return [
        *lines,
        "",
        "FLOPs are those of convolutions and matrix products, two for each multiply-accumulate; bytes are the inputs, "
        "weights and outputs of every node by itself. A library that fuses nodes moves fewer bytes, so it may lie "
        "above the slope of the memory; and one above 100% does better than the matrix products that were measured. "
        "If fewer cores are busy than there are, other programs used the rest.",
        "",
    ]


def _rate_and_seconds(stage: Plain) -> str:
    return f"{three_digits(stage['mpx_per_s'])} Mpx/s, {three_digits(stage['seconds'])} s"

"""What ``histo-bench run`` does: every setup in turns, the ceilings between them, the result."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import onnx

from histostream.benchmarks.flops import count_flops
from histostream.benchmarks.peak_rates import Device, Probe, open_probes
from histostream.benchmarks.stages import ALONE, STAGES, BenchError, Contender, Setup
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
    ceilings: bool = True,
    say: Say = lambda text: None,
) -> Plain:
    """Measure every stage alone and end to end, for every setup, in turns.

    Parameters
    ----------
    setups
        What to run; those that are not usable here are listed with the reason.
    slide
        What to run on; None: a synthetic slide of ``synthetic_px``, (width, height).
    options
        How to run it; by default every tile is inferred, glass or not.
    repeats
        How often all of it is done; the figures are medians.
    ceilings
        Whether the device's own speed is measured too, for the roofline.
    say
        Told what is done, one line at a time.

    Returns
    -------
    What ``bench.json`` says.

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
    said: Plain = {"hardware": hardware(), "versions": versions(), "repeats": repeats, "options": asdict(options)}
    del said["options"]["batch"]  # each run has its own
    with tempfile.TemporaryDirectory(prefix="histo-bench-") as name:
        scratch = Path(name)
        if slide is None:
            width, height = synthetic_px
            said["slide"] = f"synthetic {width}x{height}"
            say(f"making a synthetic slide of {width} x {height} px")
            slide = scratch / f"synthetic-{width}x{height}.tif"
            SyntheticSlide(width, height, mpp=SYNTHETIC_MPP).write(slide)
        else:
            said["slide"] = slide.name
        contenders, said["not_usable"] = _open(setups, slide, options, scratch, say)
        try:
            probes = _probes(contenders) if ceilings else {}
            rates = _in_turns(contenders, probes, repeats, say)
        finally:
            for contender in contenders:
                contender.close()
        said["ceilings"] = {d: _ceilings(rates[d], missing) for d, (_, missing) in probes.items()}
        said["runs"] = [_run(contender, said["ceilings"]) for contender in contenders]
    return said


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
    """Return the probes of every device that a contender runs on."""
    found = {}
    for device in sorted({c.device for c in contenders}):
        precisions = sorted({c.precision for c in contenders if c.device == device} | {"fp32"})
        found[device] = open_probes(cast("Device", device), tuple(precisions))
    return found


def _in_turns(
    contenders: list[Contender],
    probes: dict[str, tuple[list[Probe], list[str]]],
    repeats: int,
    say: Say,
) -> dict[str, dict[Probe, list[float]]]:
    """Measure; return the rates of the probes."""
    rates: dict[str, dict[Probe, list[float]]] = {
        device: {probe: [] for probe in of_device} for device, (of_device, _) in probes.items()
    }
    for repeat in range(repeats):
        for of_device in rates.values():
            for probe, found in of_device.items():
                found.append(probe.rate())
        for contender in contenders:
            contender.measure()
            total = contender.measured.seconds["end_to_end"][-1]
            say(f"{repeat + 1} of {repeats}: {contender.setup}: end to end in {total:.2f} s")
    return rates


def _ceilings(rates: dict[Probe, list[float]], missing: list[str]) -> Plain:
    """Return the best of each ceiling, and how it was reached."""
    best: dict[str, Plain] = {}
    for probe, found in rates.items():
        rate = max(found)
        if probe.ceiling not in best or rate > best[probe.ceiling]["rate"]:
            best[probe.ceiling] = {"rate": round(rate, 1), "how": probe.how}
    copy = best.pop("copy", None)
    return {
        "gflop_per_s": {name: best[name] for name in PRECISIONS if name in best},
        "gbyte_per_s": copy,
        "not_measured": missing,
    }


def _run(contender: Contender, ceilings: dict[str, Plain]) -> Plain:
    """Return what was found of one contender."""
    measured, card, run = contender.measured, contender.engine.card, contender.measured.run
    mpx = float(run["mpx"])
    every = measured.seconds
    seconds = {stage: statistics.median(found) for stage, found in every.items()}
    bound = max(ALONE, key=lambda stage: seconds[stage])
    inside = {
        name: round(statistics.median(found[name] for found in measured.inside), 4) for name in measured.inside[0]
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
                "every_seconds": [round(s, 6) for s in every[stage]],
            }
            for stage in STAGES
        },
        "cores_busy": round(statistics.median(measured.cores), 2),
        "inside_end_to_end_s": inside,
        "bound_by": {
            "stage": bound,
            "share_of_end_to_end": round(_ratio(every[bound], every["end_to_end"]), 3),
        },
        "end_to_end_of_bare_engine": round(_ratio(every["engine"], every["end_to_end"]), 3),
        "roofline": _roofline(contender, min(measured.seconds["engine"]), ceilings),
    }


def _ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Median of the ratios of the repeats: what disturbed one disturbed the other."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def _roofline(contender: Contender, engine_s: float, ceilings: dict[str, Plain]) -> Plain:
    """Where the bare engine, in its fastest repeat, stands below the ceilings of its device."""
    card = contender.engine.card
    content = read_file(contender.bundle, card, PRECISIONS[contender.precision])
    try:
        work = count_flops(onnx.load_from_string(content), contender.batch)
    except GraphError as error:
        return {"why_none": str(error)}
    attained = work.flops * contender.tile_count / engine_s / 1e9
    found: Plain = {
        "gflop_per_tile": round(work.flops / 1e9, 6),
        "mbyte_per_tile": round(work.bytes / 1e6, 6),
        "flop_per_byte": round(work.intensity, 3),
        "gflop_per_s": round(attained, 3),
    }
    ceiling = ceilings.get(contender.device, {})
    peak = _peak(ceiling.get("gflop_per_s", {}), contender.precision)
    copy = ceiling.get("gbyte_per_s")
    if peak is None or copy is None:
        return {**found, "why_none": "the ceilings of the device were not measured"}
    slope = work.intensity * copy["rate"]
    roof = min(peak[1], slope)
    return {
        **found,
        "peak": peak[0],
        "roof_gflop_per_s": round(roof, 1),
        "share_of_roof": round(attained / roof, 3),
        "limited_by": "arithmetic" if peak[1] <= slope else "memory",
    }


def _peak(peaks: Plain, precision: str) -> tuple[str, float] | None:
    """Return the ceiling of a precision, or of FP32, in which a CPU computes FP16."""
    for name in (precision, "fp32"):
        if name in peaks:
            return name, float(peaks[name]["rate"])
    return None


def labels(runs: Sequence[Plain]) -> list[str]:
    """Name each run by what it does not share with all others."""
    parts: dict[str, Callable[[Plain], str]] = {
        "model": lambda run: run["model"],
        "engine": lambda run: _engine(run["engine"], run["precision"]),
        "precision": lambda run: run["precision"].upper(),
        "tile_px": lambda run: f"tile {run['tile_px']}",
        "batch": lambda run: f"batch {run['batch']}",
    }
    said: list[list[str]] = [[] for _ in runs]
    for name, text in parts.items():
        texts = [text(run) for run in runs]
        if len(set(texts)) > 1 or name in ("engine", "precision"):
            for label, part in zip(said, texts, strict=True):
                label.append(part)
    return [", ".join(label) for label in said]


def _engine(name: str, precision: str) -> str:
    """Library and device: "onnxruntime 1.31.1 cpu fp32" becomes "onnxruntime cpu"."""
    words = name.split()
    return " ".join(w for w in words if w != precision and not w[0].isdigit())


def markdown(said: Plain) -> str:
    """Return the result as a page with tables."""
    return "\n".join(
        [
            *_head(said),
            *_speed_table(said),
            *_inside_table(said),
            *_roofline_table(said),
            *_foot(said),
        ]
    )


def _head(said: Plain) -> Iterator[str]:
    machine = said["hardware"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    first = said["runs"][0]
    yield f"# {said['slide']}: {first['mpx']:.1f} Mpx"
    yield ""
    yield (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory']}"
        f"{', ' + gpus + ' (driver ' + machine['gpu_driver'] + ')' if gpus else ''}; "
        f"load before {machine['load_before']}. "
        f"Medians of {said['repeats']} repeats, everything in turns."
    )
    yield ""


def _speed_table(said: Plain) -> Iterator[str]:
    yield "Mpx of the slide per second, and seconds; each stage alone, then all together."
    if any(run["tiles_on_device"] for run in said["runs"]):
        yield ("On a GPU the bare engine runs on tiles in its memory, and blending includes the copies to and from it.")
    yield ""
    yield from _table(
        [
            "",
            "tiles",
            "tile",
            "batch",
            "decode",
            "bare engine",
            "blend",
            "write",
            "**end to end**",
            "of bare engine",
            "bound by",
        ],
        [
            [
                label,
                str(run["tiles"]),
                str(run["tile_px"]),
                str(run["batch"]),
                *(_both(run["stages"][stage]) for stage in ALONE),
                f"**{_both(run['stages']['end_to_end'])}**",
                f"{run['end_to_end_of_bare_engine']:.0%}",
                f"{run['bound_by']['stage']} ({run['bound_by']['share_of_end_to_end']:.0%} of the time)",
            ]
            for label, run in zip(labels(said["runs"]), said["runs"], strict=True)
        ],
    )


def _inside_table(said: Plain) -> Iterator[str]:
    """Seconds of the stages inside the end-to-end run."""
    runs = said["runs"]
    names = list(dict.fromkeys(name for run in runs for name in run["inside_end_to_end_s"]))
    yield "Inside the end-to-end run: seconds that its main thread spent in each stage, or waiting."
    yield ""
    yield from _table(
        ["", *names],
        [
            [label, *(_figure(run["inside_end_to_end_s"].get(name, 0)) for name in names)]
            for label, run in zip(labels(runs), runs, strict=True)
        ],
    )


def _both(stage: Plain) -> str:
    return f"{_figure(stage['mpx_per_s'])} Mpx/s, {_figure(stage['seconds'])} s"


def _figure(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _roofline_table(said: Plain) -> Iterator[str]:
    rows = [
        [
            label,
            _figure(r["gflop_per_tile"]),
            _figure(r["mbyte_per_tile"]),
            _figure(r["flop_per_byte"]),
            f"{run['cores_busy']:.1f}",
            _figure(r["gflop_per_s"]),
            *(
                [_figure(r["roof_gflop_per_s"]), f"{r['share_of_roof']:.0%}", f"{r['limited_by']} ({r['peak']})"]
                if "share_of_roof" in r
                else ["", "", r["why_none"]]
            ),
        ]
        for label, run in zip(labels(said["runs"]), said["runs"], strict=True)
        if "gflop_per_tile" in (r := run["roofline"])
    ]
    if not rows:
        return
    yield "The fastest repeat of the bare engine, and the best that its device was seen to do:"
    yield ""
    yield from _table(
        [
            "",
            "GFLOP per tile",
            "MB per tile",
            "FLOP per byte",
            "cores busy",
            "GFLOP/s",
            "roof, GFLOP/s",
            "of the roof",
            "roof is",
        ],
        rows,
    )
    for device, found in said["ceilings"].items():
        for name, peak in found["gflop_per_s"].items():
            yield f"- {device}, {name}: {peak['rate']:.1f} GFLOP/s ({peak['how']})"
        if found["gbyte_per_s"]:
            copy = found["gbyte_per_s"]
            yield f"- {device}, memory: {copy['rate']:.1f} GB/s ({copy['how']})"
        for reason in found["not_measured"]:
            yield f"- {device}, not measured: {reason}"
    yield ""
    yield (
        "FLOPs are those of convolutions and matrix products, two for each multiply-accumulate; "
        "bytes are the inputs, weights and outputs of every node by itself. A library that fuses "
        "nodes moves less, so it may lie above the slope of the memory; and one above 100% does "
        "better than the products of matrices that were measured. Fewer cores busy than there are "
        "say that other programs had the rest."
    )
    yield ""


def _foot(said: Plain) -> Iterator[str]:
    if said["not_usable"]:
        yield "Not usable here:"
        yield ""
        for refused in said["not_usable"]:
            yield f"- {refused['what']}: {refused['reason']}"
        yield ""


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""

r"""Fill the tables of ``docs/`` from the committed result files.

::

    python -m histostream.benchmarks.tables          # from the repository's root

A table stands between ``<!-- table: FOLDER/NAME.json -->`` and ``<!-- end of table -->``.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from histostream.benchmarks.report import table_lines

Result = dict[str, Any]  # the content of a result file
Rows = Iterator[list[str]]  # the head, then the rows

MARKED = re.compile(
    r"(<!-- table: (?P<path>[\w/-]+/(?P<name>[\w-]+))\.json -->\n).*?(<!-- end of table -->)",
    re.DOTALL,
)


def filled(text: str, root: Path) -> str:
    """Return a document with its tables made from the result files below ``root``."""

    def table(match: re.Match[str]) -> str:
        result = json.loads((root / f"{match['path']}.json").read_text())
        head, *rows = TABLES[match["name"]](result)
        body = "".join(f"{line}\n" for line in table_lines(head, rows))
        return f"{match[1]}{body}{match[4]}"

    return MARKED.sub(table, text)


def _head(columns: str) -> list[str]:
    return columns.split("|")


def export_cpu(result: Result) -> Rows:
    """Tabulate parity, size and speed of each artefact of the shipped model."""
    yield _head(
        "judged and calibrated on|artefact|MB|labels that agree|darkest tenth|moved by rounding|Dice changes by|"
        "nodes healed|ONNX Runtime|OpenVINO"
    )
    for source, export in result["nuclei"].items():
        for precision, row in export["artefacts"].items():
            if "label_agreement" in row:
                speed = row["speed_against_fp32"]
                yield [
                    source,
                    precision,
                    f"{row['megabytes']:.2f}",
                    f"{row['label_agreement']:.3%}",
                    f"{row['dark_label_agreement']:.3%}",
                    f"{row['moved_by_rounding']:.3%}",
                    f"{row['dice_change']:.4f}",
                    str(row["nodes_healed"]),
                    f"{speed['cpu']:.2f} x",
                    f"{speed['openvino']:.2f} x" if "openvino" in speed else "",
                ]


def accuracy_nuclei(result: Result) -> Rows:
    """Tabulate the Dice of the shipped model in each precision."""
    yield _head("|TNBC, 50 images|MoNuSeg test set, 14 images")
    for precision, scores in result["scores"].items():
        yield [precision, *(f"{scores[data]['dice_pooled']:.4f}" for data in ("tnbc", "monuseg-test"))]


def accuracy_nuclei_adapted(result: Result) -> Rows:
    """Tabulate the Dice of several nucleus models in single precision."""
    yield _head("|TNBC, pooled|TNBC, mean of images|MoNuSeg test set, pooled|MoNuSeg test set, mean of images")
    for name, model in result["models"].items():
        for row, suffix in (("fp32", ""), ("fp32, CRF", " with CRF")):
            if row in model["scores"]:
                figures = [
                    f"{100 * model['scores'][row][data][measure]:.1f}"
                    for data in ("tnbc", "monuseg-test")
                    for measure in ("dice_pooled", "dice_mean_over_images")
                ]
                yield [name + suffix, *figures]


def frozen_statistics(result: Result) -> Rows:
    """Tabulate Dice and seams of networks with live and with frozen statistics."""
    yield _head("normalisation|statistics|Dice, TNBC|Dice, MoNuSeg test set|labels that depend on the tile")
    for norm, kinds in result["networks"].items():
        for kind, row in kinds.items():
            if isinstance(row, dict):
                dice = [f"{row[f'dice_{data}']:.3f}" for data in ("tnbc", "monuseg-test")]
                yield [norm, kind, *dice, f"{row['labels_that_depend_on_the_tile']:.2%}"]


def bench_cpu(result: Result) -> Rows:
    """Tabulate the rates of each stage alone, and end to end."""
    yield _head("|decode|bare engine|blend|write|end to end|of bare engine|of the roof")
    stages = ("decode", "engine", "blend", "write", "end_to_end")
    for run in result["runs"]:
        rates = [f"{run['stages'][stage]['mpx_per_s']:.3g} Mpx/s" for stage in stages]
        shares = [f"{run['end_to_end_of_bare_engine']:.0%}", f"{run['roofline']['share_of_roof']:.0%}"]
        yield [run["engine"], *rates, *shares]


def crf_cpu(result: Result) -> Rows:
    """Tabulate the speed of the CRF's backends against pydensecrf2 in the same run."""
    backends = [b for b in result["runs"][0]["speed_against_reference"] if b != "pydensecrf2"]
    yield ["px", "classes", "theta_alpha", *backends, "labels that agree with pydensecrf2"]
    for run in result["runs"]:
        setting = [f"{run['side_px']} x {run['side_px']}", str(run["classes"]), f"{run['theta_alpha']:g}"]
        speeds = [f"{run['speed_against_reference'][b]:.2f} x" for b in backends]
        yield [*setting, *speeds, f"{run['labels_that_agree_with_reference'][backends[0]]:.3%}"]


def size_cpu(result: Result) -> Rows:
    """Tabulate seconds and peak memory of large slides."""
    yield _head("slide, px|tissue|network|column bands|seconds|of them the network|load before|peak memory")
    for run in result["runs"].values():
        yield [
            f"{run['width']} x {run['height']}",
            f"{run['tissue']:.0%}",
            run["network"],
            str(run["column_bands"]),
            f"{run['wall_s']:.0f}",
            f"{run['seconds']['infer']:.0f}",
            f"{run['load_before']:.1f}",
            f"{run['peak_mib']:.0f} MiB",
        ]


def kills_cpu(result: Result) -> Rows:
    """Tabulate the runs that were killed, and what differed in the end."""
    yield _head(
        "|kills|while it started|amid the strips|while files were finished|runs compared|differing pixels|"
        "differing files"
    )
    keys = ["kills", "before_strips", "amid_strips", "after_strips", "rounds", "differing_pixels", "differing_files"]
    for name, mode in (*result["ways"].items(), ("all", result["total"])):
        yield [name, *(str(mode[key]) for key in keys)]


def fuzz_cpu(result: Result) -> Rows:
    """Tabulate the hostile inputs of each kind, and their results."""
    yield _head("|tried|accepted|refused|failed|longest, s|peak memory, MiB")
    kinds = result["kinds"]
    worst = {key: max(kind[key] for kind in kinds.values()) for key in ("worst_seconds", "peak_mib")}
    for name, row in (*kinds.items(), ("all", result | worst)):
        counts = [str(row[key]) for key in ("tried", "accepted", "refused", "failed")]
        yield [name, *counts, f"{row['worst_seconds']:.1f}", f"{row['peak_mib']:.0f}"]


def accuracy_imems(result: Result) -> Rows:
    """Tabulate the mean and spread, over seeds or folds, of each algorithm of the iMEMS paper."""
    cells = list(result["cells"].values())
    classes = cells[0]["scores"]["classes"]
    with_objects = all("objects" in cell["scores"] for cell in cells)
    objects = ["object F1", "object Dice", "object Hausdorff, px"] if with_objects else []
    yield ["", *(f"F {c}" for c in classes), "mean F", "pixel accuracy", *objects, "runs"]
    for algorithm, scores in _by_algorithm(result):
        figures = [_spread([100 * s["pooled"]["f"][c] for s in scores], 2) for c in classes]
        figures += [_spread([100 * s["pooled"][key] for s in scores], 2) for key in ("mean_f", "accuracy")]
        if with_objects:
            figures += _object_figures(scores, "f1_pooled", "dice_per_image_mean")
        yield [algorithm, *figures, str(len(scores))]


def accuracy_adaptation(result: Result) -> Rows:
    """Tabulate Dice and Jaccard of the last class on the target, of each algorithm."""
    yield _head("|Dice, pooled|Jaccard, pooled|Dice, mean of images|Jaccard, mean of images|runs")
    for algorithm, scores in sorted(_by_algorithm(result), key=lambda row: row[0] == "oracle"):  # the ceiling is last
        figures = [figure for reduce in ("pooled", "per_image_mean") for figure in _dice_and_jaccard(scores, reduce)]
        yield [algorithm, *figures, str(len(scores))]


def accuracy_variants(reduce: str, result: Result) -> Rows:
    """Tabulate Dice and Jaccard of the last class by each checkpoint, without and with a CRF.

    Parameters
    ----------
    reduce
        "pooled" or "per_image_mean", the measure of the paper.
    result
        Result file of `benchmarks.accuracy.adaptation`.
    """
    cells = list(result["cells"].values())
    variants = [cells[0]["judged"], *cells[0]["variants"]]
    yield ["", *(f"{v}: {measure}" for v in variants for measure in ("Dice", "Jaccard")), "runs"]
    algorithms = dict.fromkeys(cell["algorithm"] for cell in cells)
    for algorithm in sorted(algorithms, key=lambda name: name == "oracle"):  # the ceiling is last
        runs = [cell for cell in cells if cell["algorithm"] == algorithm]
        scored = [{run["judged"]: run["scores"], **run["variants"]} for run in runs]
        figures = [figure for v in variants for figure in _dice_and_jaccard([scores[v] for scores in scored], reduce)]
        yield [algorithm, *figures, str(len(runs))]


def accuracy_objects(result: Result) -> Rows:
    """Tabulate object scores, mean IoU and pixel accuracy of each algorithm and reference."""
    yield _head("|object Dice|object F1|object Hausdorff, px|mean IoU|pixel accuracy|runs")
    rows = [(name, scores, str(len(scores))) for name, scores in _by_algorithm(result)]
    rows += [(name, [scores], "") for name, scores in result.get("references", {}).items()]
    for name, scores, runs in rows:
        figures = _object_figures(scores, "dice_per_image_mean", "f1_pooled")
        figures += [_spread([100 * s["pooled"][key] for s in scores], 1) for key in ("mean_iou", "accuracy")]
        yield [name, *figures, runs]


def accuracy_digits(result: Result) -> Rows:
    """Tabulate the Dice of the second class, of its probabilities (the paper's) and of its labels."""
    yield _head("|Dice of the probabilities|Dice of the labels|runs")
    for algorithm, scores in _by_algorithm(result):
        name = scores[0]["classes"][1]
        soft, hard = [s["soft_dice"] for s in scores], [s["pooled"]["f"][name] for s in scores]
        yield [algorithm, _spread(soft, 3), _spread(hard, 3), str(len(scores))]


def accuracy_painted(result: Result) -> Rows:
    """Tabulate the Fréchet distance of painted images to true ones."""
    yield _head("|FID|runs")
    rows = list(_by_algorithm(result))
    for algorithm, scores in rows:
        yield [algorithm, _spread([s["fid"]["painted"] for s in scores], 4), str(len(scores))]
    halves = rows[0][1][0]["fid"]["real_halves"]
    yield ["halves of the true images", f"{halves:.4f}", ""]


def _by_algorithm(result: Result) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each algorithm with the scores of its cells."""
    cells = list(result["cells"].values())
    for algorithm in dict.fromkeys(cell["algorithm"] for cell in cells):
        yield algorithm, [cell["scores"] for cell in cells if cell["algorithm"] == algorithm]


def _dice_and_jaccard(scores: list[dict[str, Any]], reduce: str) -> list[str]:
    """Return both scores of the last class, in per cent."""
    name = scores[0]["classes"][-1]
    return [_spread([100 * s[reduce][measure][name] for s in scores], 1) for measure in ("f", "jaccard")]


def _object_figures(scores: list[dict[str, Any]], *shares: str) -> list[str]:
    """Return the named object scores, and the Hausdorff distance."""
    digits = {**dict.fromkeys(shares, 3), "hausdorff_px_per_image_mean": 1}
    return [_spread([s["objects"][key] for s in scores], n) for key, n in digits.items()]


def _spread(values: list[float], digits: int) -> str:
    """Return the mean and, of several values, the standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def networks_cpu(result: Result) -> Rows:
    """Tabulate how many labels of wrapped networks are those of ONNX Runtime, run directly."""
    yield _head("network|tile, px|depends on the tile|labels that agree, blended|labels that agree, each tile's centre")
    for name, run in result["networks"].items():
        if "hann" in run:
            agreements = [f"{run[mode]['agreement']:.4%}" for mode in ("hann", "crop")]
            yield [name, str(run["grid"]["tile_px"]), "yes" if run["tile_statistics"] else "no", *agreements]


TABLES: dict[str, Callable[[Result], Rows]] = {
    "accuracy-imems-glas-small": accuracy_imems,
    "accuracy-imems-nuclei-small": accuracy_imems,
    "accuracy-imems-glas-short": accuracy_imems,
    "accuracy-imems-nuclei-short": accuracy_imems,
    "accuracy-tnbc-other-short": functools.partial(accuracy_variants, "per_image_mean"),
    "accuracy-epfl-vnc-short": functools.partial(accuracy_variants, "pooled"),
    "accuracy-tnbc-other-small": accuracy_adaptation,
    "accuracy-epfl-vnc-small": accuracy_adaptation,
    "accuracy-glas-small": accuracy_objects,
    "accuracy-glas-quarter": accuracy_objects,
    "accuracy-glas-20-quarter": accuracy_objects,
    "accuracy-glas-40-quarter": accuracy_objects,
    "accuracy-glas-painted-quarter": accuracy_painted,
    "accuracy-mnist-simple-small": accuracy_digits,
    "accuracy-mnist-hard-small": accuracy_digits,
    "accuracy-em-small": accuracy_adaptation,
    "crf-cpu": crf_cpu,
    "kills-cpu": kills_cpu,
    "fuzz-cpu": fuzz_cpu,
    "size-cpu": size_cpu,
    "networks-cpu": networks_cpu,
    "bench-cpu": bench_cpu,
    "export-cpu": export_cpu,
    "accuracy-nuclei": accuracy_nuclei,
    "accuracy-nuclei-adapted": accuracy_nuclei_adapted,
    "frozen-statistics": frozen_statistics,
}


@click.command()
def main() -> None:
    """Fill the tables of docs/."""
    for path in sorted(Path("docs").glob("*.md")):
        path.write_text(filled(path.read_text(), Path()))


if __name__ == "__main__":
    main()

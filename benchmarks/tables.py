r"""Fill the tables of ``docs/`` from the result files that are committed.

::

    python -m histostream.benchmarks.tables          # from the repository's root

A table stands between ``<!-- table: FOLDER/NAME.json -->`` and
``<!-- end of table -->``.
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

MARKED = re.compile(
    r"(<!-- table: (?P<path>[\w/-]+/(?P<name>[\w-]+))\.json -->\n).*?(<!-- end of table -->)",
    re.DOTALL,
)


def filled(text: str, root: Path) -> str:
    """Return a document with its tables made anew from result files below ``root``."""

    def table(match: re.Match[str]) -> str:
        found = json.loads((root / f"{match['path']}.json").read_text())
        rows = [list(row) for row in TABLES[match["name"]](found)]
        rows.insert(1, ["---"] * len(rows[0]))
        body = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        return f"{match[1]}{body}{match[4]}"

    return MARKED.sub(table, text)


def export_cpu(found: dict[str, Any]) -> Iterator[list[str]]:
    """Parity, size and speed of each artefact of the shipped model."""
    yield [
        "judged and calibrated on",
        "artefact",
        "MB",
        "labels that agree",
        "darkest tenth",
        "Dice changes by",
        "nodes healed",
        "ONNX Runtime",
        "OpenVINO",
    ]
    for source, export in found["nuclei"].items():
        for precision, row in export["artefacts"].items():
            if "label_agreement" in row:
                speed = row["speed_against_fp32"]
                yield [
                    source,
                    precision,
                    f"{row['megabytes']:.2f}",
                    f"{row['label_agreement']:.3%}",
                    f"{row['dark_label_agreement']:.3%}",
                    f"{row['dice_change']:.4f}",
                    str(row["nodes_healed"]),
                    f"{speed['cpu']:.2f} x",
                    f"{speed['openvino']:.2f} x" if "openvino" in speed else "",
                ]


def accuracy_nuclei(found: dict[str, Any]) -> Iterator[list[str]]:
    """Dice of the shipped model in each precision."""
    yield ["", "TNBC, 50 images", "MoNuSeg test set, 14 images"]
    for precision, scores in found["scores"].items():
        yield [precision, *(f"{scores[s]['dice_pooled']:.4f}" for s in ("tnbc", "monuseg-test"))]


def accuracy_nuclei_adapted(found: dict[str, Any]) -> Iterator[list[str]]:
    """Dice of several nucleus models in single precision."""
    yield ["", "TNBC, pooled", "TNBC, mean of images", "MoNuSeg test set, pooled", "MoNuSeg test set, mean of images"]
    for name, said in found["models"].items():
        for row, suffix in (("fp32", ""), ("fp32, CRF", " with CRF")):
            if row not in said["scores"]:
                continue
            scores = said["scores"][row]
            yield [
                name + suffix,
                *(
                    f"{100 * scores[data][measure]:.1f}"
                    for data in ("tnbc", "monuseg-test")
                    for measure in ("dice_pooled", "dice_mean_over_images")
                ),
            ]


def frozen_statistics(found: dict[str, Any]) -> Iterator[list[str]]:
    """Dice and seams of networks with live and with frozen statistics."""
    yield ["normalisation", "statistics", "Dice, TNBC", "Dice, MoNuSeg test set", "labels that depend on the tile"]
    for norm, kinds in found["networks"].items():
        for kind, row in kinds.items():
            if isinstance(row, dict):
                yield [
                    norm,
                    kind,
                    f"{row['dice_tnbc']:.3f}",
                    f"{row['dice_monuseg-test']:.3f}",
                    f"{row['labels_that_depend_on_the_tile']:.2%}",
                ]


def bench_cpu(found: dict[str, Any]) -> Iterator[list[str]]:
    """Rates of each stage alone, and end to end."""
    yield ["", "decode", "bare engine", "blend", "write", "end to end", "of bare engine", "of the roof"]
    for run in found["runs"]:
        rates = (
            f"{run['stages'][s]['mpx_per_s']:.3g} Mpx/s" for s in ("decode", "engine", "blend", "write", "end_to_end")
        )
        yield [
            run["engine"],
            *rates,
            f"{run['end_to_end_of_bare_engine']:.0%}",
            f"{run['roofline']['share_of_roof']:.0%}",
        ]


def crf_cpu(found: dict[str, Any]) -> Iterator[list[str]]:
    """Speed of the CRF's backends against pydensecrf2 in the same run."""
    backends = [b for b in found["runs"][0]["speed_against_reference"] if b != "pydensecrf2"]
    yield ["px", "classes", "theta_alpha", *backends, "labels that agree with pydensecrf2"]
    for run in found["runs"]:
        speed, agree = run["speed_against_reference"], run["labels_that_agree_with_reference"]
        yield [
            f"{run['side_px']} x {run['side_px']}",
            str(run["classes"]),
            f"{run['theta_alpha']:g}",
            *(f"{speed[b]:.2f} x" for b in backends),
            f"{agree[backends[0]]:.3%}",
        ]


def size_cpu(found: dict[str, Any]) -> Iterator[list[str]]:
    """Seconds and peak memory of large slides."""
    yield [
        "slide, px",
        "tissue",
        "network",
        "column bands",
        "seconds",
        "of them the network",
        "load before",
        "peak memory",
    ]
    for run in found["runs"].values():
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


def kills_cpu(found: dict[str, Any]) -> Iterator[list[str]]:
    """Count runs that were killed, and what differed in the end."""
    yield [
        "",
        "kills",
        "while it started",
        "amid the strips",
        "while files were finished",
        "runs compared",
        "differing pixels",
        "differing files",
    ]
    for name, way in (*found["ways"].items(), ("all", found["total"])):
        keys = (
            "kills",
            "before_strips",
            "amid_strips",
            "after_strips",
            "rounds",
            "differing_pixels",
            "differing_files",
        )
        yield [name, *(str(way[key]) for key in keys)]


def fuzz_cpu(found: dict[str, Any]) -> Iterator[list[str]]:
    """Hostile inputs of each kind, and what became of them."""
    yield ["", "tried", "accepted", "refused", "failed", "longest, s", "peak memory, MiB"]
    kinds = found["kinds"]
    worst = {key: max(kind[key] for kind in kinds.values()) for key in ("worst_seconds", "peak_mib")}
    for name, row in (*kinds.items(), ("all", found | worst)):
        counts = (str(row[key]) for key in ("tried", "accepted", "refused", "failed"))
        yield [name, *counts, f"{row['worst_seconds']:.1f}", f"{row['peak_mib']:.0f}"]


def accuracy_imems(found: dict[str, Any]) -> Iterator[list[str]]:
    """Mean over seeds or folds of each algorithm of the iMEMS paper, and their spread."""
    cells = list(found["cells"].values())
    classes = cells[0]["scores"]["classes"]
    with_objects = all("objects" in cell["scores"] for cell in cells)
    objects = ["object F1", "object Dice", "object Hausdorff, px"] if with_objects else []
    yield ["", *(f"F {c}" for c in classes), "mean F", "pixel accuracy", *objects, "runs"]
    for algorithm in dict.fromkeys(cell["algorithm"] for cell in cells):
        scores = [cell["scores"] for cell in cells if cell["algorithm"] == algorithm]
        columns = [[100 * s["pooled"]["f"][c] for s in scores] for c in classes]
        columns += [[100 * s["pooled"][k] for s in scores] for k in ("mean_f", "accuracy")]
        if with_objects:
            columns += [
                [s["objects"][k] for s in scores]
                for k in ("f1_pooled", "dice_per_image_mean", "hausdorff_px_per_image_mean")
            ]
        digits = [2] * (2 + len(classes)) + [3, 3, 1]
        figures = [_spread(column, d) for column, d in zip(columns, digits, strict=False)]
        yield [algorithm, *figures, str(len(scores))]


def accuracy_adaptation(found: dict[str, Any]) -> Iterator[list[str]]:
    """Dice and Jaccard of the last class on the target, of each algorithm of a table."""
    yield ["", "Dice, pooled", "Jaccard, pooled", "Dice, mean of images", "Jaccard, mean of images", "runs"]
    rows = sorted(_by_algorithm(found), key=lambda row: row[0] == "oracle")  # the ceiling is last
    for algorithm, scores in rows:
        name = scores[0]["classes"][-1]
        figures = [
            _spread([100 * s[how][measure][name] for s in scores], 1)
            for how in ("pooled", "per_image_mean")
            for measure in ("f", "jaccard")
        ]
        yield [algorithm, *figures, str(len(scores))]


def accuracy_variants(reduce: str, found: dict[str, Any]) -> Iterator[list[str]]:
    """Dice and Jaccard of the last class by each checkpoint, without and with a CRF.

    Parameters
    ----------
    reduce
        "pooled" or "per_image_mean", the measure of the paper.
    found
        Result file of `benchmarks.accuracy.adaptation`.
    """
    cells = list(found["cells"].values())
    variants = [cells[0]["judged"], *cells[0]["variants"]]
    yield ["", *(f"{v}: {measure}" for v in variants for measure in ("Dice", "Jaccard")), "runs"]
    rows = dict.fromkeys(cell["algorithm"] for cell in cells)
    for algorithm in sorted(rows, key=lambda row: row == "oracle"):  # the ceiling is last
        runs = [cell for cell in cells if cell["algorithm"] == algorithm]
        name = runs[0]["scores"]["classes"][-1]
        scored = [{run["judged"]: run["scores"], **run["variants"]} for run in runs]
        figures = [
            _spread([100 * scores[v][reduce][measure][name] for scores in scored], 1)
            for v in variants
            for measure in ("f", "jaccard")
        ]
        yield [algorithm, *figures, str(len(runs))]


def accuracy_objects(found: dict[str, Any]) -> Iterator[list[str]]:
    """Object scores, mean IoU and accuracy of the pixels, of each algorithm and reference."""
    yield ["", "object Dice", "object F1", "object Hausdorff, px", "mean IoU", "pixel accuracy", "runs"]
    rows = [(name, scores, str(len(scores))) for name, scores in _by_algorithm(found)]
    rows += [(name, [one], "") for name, one in found.get("references", {}).items()]
    for name, scores, runs in rows:
        objects = [s["objects"] for s in scores]
        yield [
            name,
            _spread([o["dice_per_image_mean"] for o in objects], 3),
            _spread([o["f1_pooled"] for o in objects], 3),
            _spread([o["hausdorff_px_per_image_mean"] for o in objects], 1),
            *(_spread([100 * s["pooled"][k] for s in scores], 1) for k in ("mean_iou", "accuracy")),
            runs,
        ]


def accuracy_digits(found: dict[str, Any]) -> Iterator[list[str]]:
    """Dice of the second class, of its probabilities (the paper's) and of its labels."""
    yield ["", "Dice of the probabilities", "Dice of the labels", "runs"]
    for algorithm, scores in _by_algorithm(found):
        name = scores[0]["classes"][1]
        yield [
            algorithm,
            _spread([s["soft_dice"] for s in scores], 3),
            _spread([s["pooled"]["f"][name] for s in scores], 3),
            str(len(scores)),
        ]


def accuracy_painted(found: dict[str, Any]) -> Iterator[list[str]]:
    """Fréchet distance of painted images to true ones."""
    rows = list(_by_algorithm(found))
    yield ["", "FID", "runs"]
    for algorithm, scores in rows:
        yield [algorithm, _spread([s["fid"]["painted"] for s in scores], 4), str(len(scores))]
    halves = rows[0][1][0]["fid"]["real_halves"]
    yield ["halves of the true images", f"{halves:.4f}", ""]


def _by_algorithm(found: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    cells = list(found["cells"].values())
    for algorithm in dict.fromkeys(cell["algorithm"] for cell in cells):
        yield algorithm, [cell["scores"] for cell in cells if cell["algorithm"] == algorithm]


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


TABLES: dict[str, Callable[[dict[str, Any]], Iterator[list[str]]]] = {
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

"""Speed of the dense CRF's backends against pydensecrf2, in one run.

::

    pip install pydensecrf2
    OMP_WAIT_POLICY=passive python -m histostream.benchmarks.crf \
        --out benchmarks/results/crf-cpu.json

pydensecrf2 wraps the code of Kraehenbuehl and Koltun, which the lattice backend follows; it has one
thread, and its smoothness kernel runs on a lattice too. All process the same synthetic tissue and
noisy probabilities, alternately, so that other load on the machine affects each: read the ratios,
not the speeds. CPU seconds are those of all threads. (Without the variable, GNU's threads spin while
they wait, which slows a busy machine down.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import product
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from histostream.runtime.crf import CrfParams, dense_crf
from histostream.runtime.crf.dense import MIN_PROBABILITY
from histostream.runtime.hardware import hardware, usable_cores
from histostream.wsi.synthetic import SyntheticSlide

SLIDE = SyntheticSlide(4096, 4096, seed=1)
TISSUE, EDGE = (3072, 0), (1024, 0)  # x, y of a region of tissue, and of one that is half glass
SIDES, CLASSES, THETA_ALPHAS = (512, 1024), (2, 5), (10.0, 60.0)
REFERENCE = "pydensecrf2"
TILE_PX = 128  # tiles in which the network is certain are left out
CERTAIN, MAX_UNCERTAIN = 0.9, 0.001  # probability, and share of pixels below it, of such a tile

Pixels = NDArray[np.uint8]
Scores = NDArray[np.float32]
Crf = Callable[[Pixels, Scores, CrfParams], Scores]


def make_input(corner: tuple[int, int], side: int, classes: int, noise: float) -> tuple[Pixels, Scores]:
    """Make synthetic tissue, and probabilities of nuclei and grey levels with noise of a standard deviation."""
    image, nuclei = SLIDE.region(*corner, side, side)
    labels = np.minimum(nuclei + (image[..., 0] // 64 if classes > 2 else 0), classes - 1)
    logits = np.random.default_rng(0).normal(0, noise, (classes, side, side)).astype(np.float32)
    logits += (1.5 if noise else 6) * np.moveaxis(np.eye(classes, dtype=np.float32)[labels], -1, 0)
    odds = np.exp(logits)
    return image, np.ascontiguousarray(odds / odds.sum(axis=0), np.float32)


def run_reference(image: Pixels, scores: Scores, params: CrfParams) -> Scores:
    """Run pydensecrf2."""
    from pydensecrf import densecrf

    classes, height, width = scores.shape
    energies = -np.log(np.clip(scores, MIN_PROBABILITY, 1)).reshape(classes, -1)
    crf = densecrf.DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(np.ascontiguousarray(energies))
    crf.addPairwiseGaussian(sxy=params.theta_gamma, compat=params.w2)
    crf.addPairwiseBilateral(sxy=params.theta_alpha, srgb=params.theta_beta, rgbim=image, compat=params.w1)
    result: Scores = np.array(crf.inference(params.n_iter)).reshape(scores.shape)
    return result


def run_lattice(threads: int) -> Crf:
    """Return a function that runs the lattice on a number of threads."""

    def run(image: Pixels, scores: Scores, params: CrfParams) -> Scores:
        import numba

        numba.set_num_threads(threads)
        return dense_crf(image, scores, params, backend="lattice")

    return run


def measure(
    contenders: dict[str, Crf], image: Pixels, scores: Scores, params: CrfParams, repeats: int
) -> dict[str, object]:
    """Time the contenders alternately, and compare their labels with those of the reference."""
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    labels = {}
    for _ in range(repeats):
        for name, run in contenders.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            labels[name] = run(image, scores, params).argmax(axis=0)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    megapixels = image.shape[0] * image.shape[1] / 1e6
    return {
        "side_px": image.shape[0],
        "classes": len(scores),
        "theta_alpha": params.theta_alpha,
        "mpx_per_s": {n: round(megapixels / float(np.median(s)), 3) for n, s in wall.items()},
        "speed_against_reference": {n: _ratio(wall[REFERENCE], s) for n, s in wall.items()},
        "cpu_seconds": {n: round(float(np.median(s)), 3) for n, s in cpu.items()},
        "cpu_seconds_of_reference_over": {n: _ratio(cpu[REFERENCE], s) for n, s in cpu.items()},
        "labels_that_agree_with_reference": {
            n: round(float((result == labels[REFERENCE]).mean()), 5) for n, result in labels.items()
        },
        "labels_changed_by_reference": round(float((labels[REFERENCE] != scores.argmax(axis=0)).mean()), 4),
    }


def _ratio(reference: list[float], ours: list[float]) -> float:
    """Return the median of the ratios of runs that followed each other."""
    return round(float(np.median(np.divide(reference, ours))), 2)


def uncertain_tiles(scores: Scores) -> Iterator[tuple[int, int]]:
    """Yield row and column of the tiles in which the network is uncertain."""
    uncertain = scores.max(axis=0) < CERTAIN
    for y, x in product(*(range(0, size, TILE_PX) for size in uncertain.shape)):
        if uncertain[y : y + TILE_PX, x : x + TILE_PX].mean() > MAX_UNCERTAIN:
            yield y, x


def run_uncertain(image: Pixels, scores: Scores, params: CrfParams) -> Scores:
    """Run the lattice on the uncertain tiles, with a halo; the other tiles keep their probabilities."""
    out, halo = scores.copy(), params.halo_px
    for y, x in uncertain_tiles(scores):
        y0, x0 = max(y - halo, 0), max(x - halo, 0)
        box = np.s_[y0 : y + TILE_PX + halo, x0 : x + TILE_PX + halo]
        result = dense_crf(image[box], scores[:, *box], params, origin=(y0, x0), backend="lattice")
        part = result[:, y - y0 :, x - x0 :][:, :TILE_PX, :TILE_PX]
        out[:, y : y + TILE_PX, x : x + TILE_PX] = part
    return out


def measure_uncertain(repeats: int) -> dict[str, object]:
    """Time the lattice on a region that is half glass: on all of it, and on its uncertain tiles."""
    side, params = 1024, CrfParams(theta_alpha=10)
    image, noisy = make_input(EDGE, side, 2, 1.5)
    _, certain = make_input(EDGE, side, 2, 0)
    # Networks are uncertain in tissue, and certain on glass.
    scores = np.where(image.min(axis=2) < 225, noisy, certain)
    whole = run_lattice(1)  # one thread: small tiles use several cores by running in parallel
    seconds: dict[str, list[float]] = {"whole": [], "uncertain tiles": []}
    labels = {}
    for _ in range(repeats):
        for name, run in (("whole", whole), ("uncertain tiles", run_uncertain)):
            start = time.perf_counter()
            labels[name] = run(image, scores, params).argmax(axis=0)
            seconds[name].append(time.perf_counter() - start)
    tiles = sum(1 for _ in uncertain_tiles(scores))
    return {
        "side_px": side,
        "tile_px": TILE_PX,
        "halo_px": params.halo_px,
        "share_of_tiles": round(tiles / (side / TILE_PX) ** 2, 3),
        "speed_against_whole": _ratio(seconds["whole"], seconds["uncertain tiles"]),
        "labels_that_agree": round(float((labels["whole"] == labels["uncertain tiles"]).mean()), 5),
    }


@click.command(context_settings={"show_default": True})
@click.option("--repeats", default=3, help="Runs of each; the figures are medians.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(repeats: int, out: Path) -> None:
    """Time the backends and pydensecrf2 alternately."""
    threads = usable_cores()
    contenders: dict[str, Crf] = {REFERENCE: run_reference, "lattice, 1 thread": run_lattice(1)}
    if threads > 1:
        contenders[f"lattice, {threads} threads"] = run_lattice(threads)
    machine = hardware()
    results: dict[str, object] = {
        "hardware": machine,
        "note": f"load {machine['load_before']} on {threads} cores before the run: "
        "where other work runs beside, ratios hold and speeds do not",
        "versions": {name: metadata.version(name) for name in ("numba", "numpy", REFERENCE)},
        "w1": 10,
        "theta_beta": 10,
        "w2": 3,
        "theta_gamma": 3,
        "n_iter": 5,
        "repeats": repeats,
        "runs": (runs := []),
    }
    for side, classes, theta_alpha in product(SIDES, CLASSES, THETA_ALPHAS):
        image, scores = make_input(TISSUE, side, classes, 1.5)
        params = CrfParams(w1=10, theta_alpha=theta_alpha)
        for run in contenders.values():  # the first run compiles
            run(np.ascontiguousarray(image[:64, :64]), scores[:, :64, :64], params)
        runs.append(measure(contenders, image, scores, params, repeats))
        click.echo(json.dumps(runs[-1]))
    results["only_uncertain_tiles"] = measure_uncertain(repeats)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    click.echo(json.dumps(results["only_uncertain_tiles"]))


if __name__ == "__main__":
    main()

r"""Run ``histo-infer`` on input that was damaged on purpose, and count the results.

::

    python -m tests.robustness.fuzz --inputs 3000 --seed 1 \
        --out tests/robustness/results/fuzz-cpu.json

Each input goes through the real command, in a process of its own with limits on memory and time. It must be accepted
with complete results, or refused with one clear line; `tests.robustness.sandbox` lists the failures.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import click

from histostream.runtime.hardware import hardware
from histostream.wsi.files import write_json
from tests.robustness.hostile import Case, make_case, seed_case
from tests.robustness.hostile.case import slide_case
from tests.robustness.hostile.images import make_dicom
from tests.robustness.hostile.seeds import real_files
from tests.robustness.hostile.tiff import damage_tiff
from tests.robustness.sandbox import HEADROOM_MIB, SECONDS, Outcome, Sandbox

SHARES = {"tiff": 7, "image": 3, "dicom": 2, "name": 1, "roi": 3, "card": 3, "onnx": 4, "real": 1}
LIBRARIES = (
    "histostream",
    "tifffile",
    "imagecodecs",
    "large-image",
    "openslide-bin",
    "pillow",
    "wsidicom",
    "numpy",
    "onnxruntime-gpu",
    "onnxruntime",
)


@dataclass
class Tally:
    """The results of the inputs of one kind."""

    verdicts: dict[str, int] = field(default_factory=lambda: {"accepted": 0, "refused": 0, "failed": 0})
    out_of_memory: int = 0
    seconds: float = 0.0
    worst: Outcome | None = None
    worst_input: str = ""
    peak_mib: float = 0.0

    def add(self, case: Case, outcome: Outcome) -> None:
        """Count one result."""
        self.verdicts[outcome.verdict] += 1
        self.out_of_memory += outcome.out_of_memory
        self.seconds += outcome.seconds
        self.peak_mib = max(self.peak_mib, outcome.peak_mib)
        if self.worst is None or outcome.seconds > self.worst.seconds:
            self.worst, self.worst_input = outcome, case.what[:200]

    def as_dict(self) -> dict[str, object]:
        """Return the record for the result file."""
        return {
            "tried": sum(self.verdicts.values()),
            **self.verdicts,
            "refused_for_memory": self.out_of_memory,
            "seconds": round(self.seconds, 1),
            "worst_seconds": round(self.worst.seconds, 2) if self.worst else None,
            "worst_input": self.worst_input,
            "peak_mib": round(self.peak_mib),
        }


def make_inputs(seed: int, count: int, data: Path | None) -> Iterator[tuple[int, Case]]:
    """Make the inputs of a run; each depends only on the seed, its number, and the real files."""
    real = real_files(data)
    kinds = [kind for kind, share in SHARES.items() for _ in range(share) if kind != "real" or real]
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        kind = kinds[number % len(kinds)]
        yield number, _real(real, rng) if kind == "real" else make_case(kind, rng)


def _real(real: dict[str, bytes], rng: random.Random) -> Case:
    """Damage one of the real slides."""
    name = rng.choice(sorted(real))
    if name.endswith(".dcm"):
        return make_dicom(rng, real[name])
    what, content = damage_tiff(real[name], rng)
    return slide_case("real", f"{name}: {what}", name, content)


def fuzz(seed: int, count: int, data: Path | None, seconds: float, first: int = 0) -> dict[str, object]:
    """Run the inputs ``first`` to ``count``; return the content of the result file."""
    tallies: dict[str, Tally] = {}
    failures: list[dict[str, object]] = []
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        Sandbox(Path(folder) / "w", seconds=seconds) as box,
    ):
        seed_outcome = box.measure_cap(seed_case())
        for number, case in make_inputs(seed, count, data):
            if number < first:
                continue
            outcome = box.run(case)
            tallies.setdefault(case.kind, Tally()).add(case, outcome)
            if outcome.verdict == "failed":
                failures.append(
                    {"number": number, "kind": case.kind, "what": case.what[:500], "failure": outcome.message[:500]}
                )
                click.echo(f"{number} {case.kind} {case.what[:200]!r}: {outcome.message[:500]}")
            elif number % 100 == 99:
                click.echo(f"{number + 1} of {count}, {len(failures)} failures")
    total = {
        name: sum(tally.verdicts[name] for tally in tallies.values()) for name in ("accepted", "refused", "failed")
    }
    return {
        "seed": seed,
        "tried": sum(total.values()),
        **total,
        "failures": failures,
        "bounds": {
            "seconds": seconds,
            "address_space_mib": box.cap_mib,
            "of_which_headroom_mib": HEADROOM_MIB,
        },
        "sane_input": {
            "seconds": round(seed_outcome.seconds, 2),
            "peak_mib": round(seed_outcome.peak_mib),
            "address_space_mib": round(seed_outcome.address_mib),
        },
        "seconds": round(time.perf_counter() - start),
        "kinds": {kind: tallies[kind].as_dict() for kind in sorted(tallies)},
    }


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@click.command(context_settings={"show_default": True})
@click.option("--inputs", "count", default=2000, help="Number of inputs.")
@click.option("--first", default=0, help="Skip inputs before this number, to repeat one.")
@click.option("--seed", default=1, help="Another seed makes other inputs.")
@click.option("--seconds", default=SECONDS, help="Time limit of each.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    envvar="HISTO_DATA",
    help="Folder of real data; a DICOM and an OME-TIFF of it are damaged too.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(count: int, first: int, seed: int, seconds: float, data: Path | None, out: Path) -> None:
    """Run hostile input through histo-infer; exit status 1 if anything fails."""
    machine = hardware()
    result = fuzz(seed, count, data, seconds, first)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"hardware": machine, "versions": _versions(), **result})
    click.echo(f"{result['tried']} tried, {result['failed']} failed -> {out}")
    sys.exit(1 if result["failed"] else 0)


if __name__ == "__main__":
    main()

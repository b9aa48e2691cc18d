"""Kill runs at random moments, resume them, and count the pixels that differ in the end.

::

    python -m tests.robustness.kill_resume --kills 100 --out tests/robustness/results/kills-cpu.json

``histo-infer`` with the shipped model on a synthetic slide is killed with SIGKILL at moments spread over the time that
an uninterrupted run takes: while it starts, reads, infers, writes pyramids or moves files into place. The same command
is repeated until it completes; then its files are compared with those of an uninterrupted run, and the slide starts
again. The modes take turns.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import numpy as np
import tifffile

from histostream.runtime.hardware import hardware
from histostream.wsi.files import write_json
from histostream.wsi.outputs.folder import RUN_FILE
from histostream.wsi.outputs.journal import JOURNAL
from histostream.wsi.synthetic import SyntheticSlide

WIDTH, HEIGHT = 1700, 2400
MIN_MEMORY = "MIN_MEMORY"  # placeholder for the smallest memory that one band of this slide needs
VARIATION_MIB = 12  # of the resident memory from run to run
MODES = {
    "plain": (),
    "probabilities": ("--probabilities",),
    "crf": ("--crf",),
    "two processes": ("--device", "cpu,cpu"),
    "column bands": ("--max-memory", MIN_MEMORY),
}
MAPS = ("labels.tif", "probabilities.tif")
TABLES = ("summary.csv", "summary.json", "overview.png")


@dataclass
class Tally:
    """The results of one mode.

    Attributes
    ----------
    kills
        Number of runs that were killed.
    before_strips, amid_strips, after_strips
        Number of them with an empty journal, with part of it, and with only the final files left to write.
    rounds
        Number of runs that completed and were compared.
    differing_pixels, differing_files
        Sum over the completed runs.
    left_behind
        Hidden files that completed runs have left.
    """

    kills: int = 0
    before_strips: int = 0
    amid_strips: int = 0
    after_strips: int = 0
    rounds: int = 0
    differing_pixels: int = 0
    differing_files: int = 0
    left_behind: int = 0
    column_bands: int = 0
    seconds_unbroken: float = 0.0
    runs_to_the_end: list[int] = field(default_factory=list)


class Mode:
    """One set of options, with its slide and output folders."""

    def __init__(self, name: str, options: tuple[str, ...], slide: Path, folder: Path) -> None:
        self.name, self.tally = name, Tally()
        self._out, self._reference = folder / "out", folder / "unbroken"
        self._line = [sys.executable, "-m", "histostream.runtime.cli", str(slide), "--no-tissue", "--threads", "1"]
        self._line += [self._min_memory() if word == MIN_MEMORY else word for word in options]
        self._stem = slide.stem
        line = [*self._line, "--out", str(self._reference)]
        subprocess.run(line, check=True, capture_output=True)  # the CRF compiles in its first run
        start = time.monotonic()
        subprocess.run([*line, "--restart"], check=True, capture_output=True)
        self.tally.seconds_unbroken = round(time.monotonic() - start, 2)
        run = json.loads((self._reference / slide.stem / RUN_FILE).read_text())
        self.tally.column_bands = run["grid"]["column_bands"]
        self._runs = 0

    def _min_memory(self) -> str:
        """Read the smallest memory from the command's error message."""
        line = [*self._line, "--max-memory", "1MiB", "--out", str(self._out)]
        stderr = subprocess.run(line, capture_output=True, text=True, check=False).stderr
        match = re.search(r"one band of this slide takes (\d+) MiB", stderr)
        if match is None:
            raise RuntimeError(f"the message states no smallest memory: {stderr}")
        return f"{int(match[1]) + VARIATION_MIB}MiB"

    def kill_once(self, rng: random.Random) -> None:
        """Start or resume a run; kill it at a random moment, or compare its files if it completed before."""
        process = subprocess.Popen(
            [*self._line, "--out", str(self._out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._runs += 1
        try:
            _, stderr = process.communicate(timeout=rng.uniform(0.2, self.tally.seconds_unbroken))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self._count_kill()
            return
        if process.returncode:
            raise RuntimeError(f"{self.name}: a run that was not killed failed: {stderr}")
        self._compare()

    def finish(self) -> None:
        """Let the last run complete, and compare its files."""
        if self._runs:
            line = [*self._line, "--out", str(self._out)]
            subprocess.run(line, check=True, capture_output=True)
            self._runs += 1
            self._compare()

    def _count_kill(self) -> None:
        tally = self.tally
        tally.kills += 1
        folder = self._out / self._stem
        if (folder / RUN_FILE).exists() or (folder / ".labels.tif.part").exists():
            tally.after_strips += 1
        elif any(p.stat().st_size for p in (folder / JOURNAL).glob("*.strips")):
            tally.amid_strips += 1
        else:
            tally.before_strips += 1

    def _compare(self) -> None:
        tally, ours, theirs = self.tally, self._out / self._stem, self._reference / self._stem
        tally.rounds += 1
        tally.runs_to_the_end.append(self._runs)
        names = {p.name for p in ours.iterdir()}
        tally.left_behind += sum(name.startswith(".") for name in names)
        if {n for n in names if not n.startswith(".")} != {p.name for p in theirs.iterdir()}:
            tally.differing_files += 1
        for name in set(MAPS) & names:
            one, other = (tifffile.imread(f / name, level=0) for f in (ours, theirs))
            tally.differing_pixels += int(np.count_nonzero(one != other))
        for name in (*MAPS, *TABLES):
            if name in names and (ours / name).read_bytes() != (theirs / name).read_bytes():
                tally.differing_files += 1
        shutil.rmtree(self._out)
        self._runs = 0


def count_kills(kills: int, seed: int) -> Iterator[Mode]:
    """Kill a number of runs; yield each mode when its last run is compared."""
    rng = random.Random(seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        slide = Path(scratch) / "slide.tif"
        SyntheticSlide(WIDTH, HEIGHT, mpp=0.5, seed=seed).write(slide)
        modes = []
        for i, (name, options) in enumerate(MODES.items()):
            modes.append(Mode(name, options, slide, Path(scratch) / str(i)))
            click.echo(f"{name}: {modes[-1].tally.seconds_unbroken} s uninterrupted", err=True)
        while (done := sum(mode.tally.kills for mode in modes)) < kills:
            min(modes, key=lambda mode: mode.tally.kills).kill_once(rng)
            click.echo(f"{done} kills", err=True)
        for mode in modes:
            mode.finish()
            yield mode


@click.command()
@click.option("--kills", default=100, show_default=True, help="Number of runs to kill.")
@click.option("--seed", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Result file; default: print only.")
def main(kills: int, seed: int, out: Path | None) -> None:
    """Kill runs at random moments and compare the final files."""
    modes = {mode.name: asdict(mode.tally) for mode in count_kills(kills, seed)}
    totals = {
        name: sum(mode[name] for mode in modes.values())
        for name in (
            "kills",
            "before_strips",
            "amid_strips",
            "after_strips",
            "rounds",
            "differing_pixels",
            "differing_files",
            "left_behind",
        )
    }
    result = {"hardware": hardware(), "slide_px": [WIDTH, HEIGHT], "seed": seed, "total": totals, "ways": modes}
    click.echo(json.dumps(totals, indent=1))
    if out is not None:
        write_json(out, result)
    wrong = totals["differing_pixels"] + totals["differing_files"] + totals["left_behind"]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

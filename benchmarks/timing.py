"""Time several calls in turns, so that other load on the machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of each repeat of each call: of the clock, and of the processor, all threads together."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]

    def cores_busy(self, name: str) -> float:
        """Return the median number of cores that a call kept busy."""
        return statistics.median(cpu / wall for cpu, wall in zip(self.cpu[name], self.wall[name], strict=True))


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, *, say: Callable[[str], None] = lambda text: None
) -> Timings:
    """Run each call once, then each again, ``repeats`` times in all."""
    timings = Timings({name: [] for name in calls}, {name: [] for name in calls})
    for repeat in range(repeats):
        for name, call in calls.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            timings.wall[name].append(time.perf_counter() - start)
            timings.cpu[name].append(time.process_time() - start_cpu)
        say(f"{repeat + 1} of {repeats}")
    return timings


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of the repeats: load that disturbs one of a pair disturbs the other."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))

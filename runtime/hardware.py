"""The machine that a program runs on: processor, memory, GPUs."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path

from histostream.runtime.cuda.driver import find_gpus

CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")


def hardware() -> dict[str, object]:
    """Describe the processor, its usable cores, the memory, the load and the GPUs, for a result file."""
    gpus = find_gpus()
    machine: dict[str, object] = {
        "cpu": _proc_field(CPUINFO, "model name") or platform.processor(),
        "cores": usable_cores(),
        "memory": _proc_field(MEMINFO, "MemTotal"),
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpus": [asdict(gpu) for gpu in gpus.gpus],
    }
    if gpus.gpus:
        machine["gpu_driver"] = f"{gpus.driver or 'unknown'}, CUDA {gpus.cuda}"
    return machine


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets that the processor reports; empty where it reports none."""
    return frozenset((_proc_field(CPUINFO, "flags") or _proc_field(CPUINFO, "Features") or "").split())


def _proc_field(path: Path, name: str) -> str | None:
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None

"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def hardware() -> dict[str, object]:
    """Name the processor, its usable cores and the memory."""
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _field(Path("/proc/meminfo"), "MemTotal"),
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _field(path: Path, name: str) -> str | None:
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None

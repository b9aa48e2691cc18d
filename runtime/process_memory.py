"""Memory of this process and of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from pathlib import Path

from histostream.wsi.errors import HistoError

MIB = 1024 * 1024
M_MMAP_THRESHOLD = -3  # malloc.h


class MemoryLimitError(HistoError, ValueError):
    """The bound on memory is below what the narrowest band takes."""


def return_buffers_at_once() -> None:
    """Let the C library give large freed buffers back to the system (glibc; elsewhere nothing).

    By default glibc learns to keep them, in one arena per thread.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MIB)


def physical_bytes() -> float:
    """Memory of this machine; infinity where the system does not say (Windows)."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def resident_bytes() -> int:
    """Memory of this process now; where the system does not say, its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return int((peak_memory_mib() or 300) * MIB)
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory_mib() -> float | None:
    """Peak memory of this process in MiB; None where the system does not say (Windows)."""
    # Not getrusage on Linux: its peak counts the process that started this one, until its exec.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (MIB if sys.platform == "darwin" else 1024), 1)

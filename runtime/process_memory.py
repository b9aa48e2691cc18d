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
    """The bound on memory is too low for the narrowest band."""


def return_buffers_at_once() -> None:
    """Make glibc return large freed buffers to the system; does nothing with other C libraries.

    By default glibc keeps them, in one arena per thread.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MIB)


def physical_bytes() -> float:
    """Return the memory of this machine; infinity on systems that do not tell (Windows)."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def resident_bytes() -> int:
    """Return the memory of this process now; on systems that do not tell, its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return int((peak_memory_mib() or 300) * MIB)
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory_mib() -> float | None:
    """Return the peak memory of this process in MiB; None on systems that do not tell (Windows)."""
    # Linux's getrusage counts the process that started this one, until its exec.
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

"""The folder in which HistoStream keeps what it can make again: engines, compiled kernels, timings."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the user's cache folder of HistoStream."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "histostream"

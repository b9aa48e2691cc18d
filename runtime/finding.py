"""One line of the report of ``histo-bench doctor``; engines make their own."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from histostream.wsi.errors import reason

OK, ABSENT, MISSING, BROKEN = "ok", "none", "missing", "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes
    ----------
    name
        What was checked.
    status
        "ok"; "none": this machine does not have it; "missing": it is optional and can be installed;
        "broken": nothing runs without it.
    said
        What was found, or why not.
    advice
        What to do; "" if nothing.
    """

    name: str
    status: str
    said: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:8}{self.name}: {self.said}{f'; {self.advice}' if self.advice else ''}"


def check_module(name: str, module: str, advice: str) -> Finding:
    """Check that a Python module can be imported, and report its version."""
    try:
        version = getattr(importlib.import_module(module), "__version__", "version unknown")
    except ModuleNotFoundError:
        return Finding(name, MISSING, "not installed", advice)
    except (ImportError, OSError) as error:  # the package is here, its libraries are not
        return Finding(name, MISSING, f"cannot be loaded ({reason(error)})", advice)
    return Finding(name, OK, str(version))

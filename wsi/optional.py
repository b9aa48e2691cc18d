"""Libraries that only some outputs take."""

from __future__ import annotations

import importlib.util

from histostream.wsi.errors import OutputError


def need(module: str, what: str, extra: str) -> None:
    """See that an optional library is there.

    Raises
    ------
    OutputError
        If it is not; the message says how to get it.
    """
    if importlib.util.find_spec(module) is None:
        raise OutputError(f"{what} {module}: pip install 'histostream[{extra}]'")

"""What the ``histo-*`` commands share: one line for a user's mistake, and our own warnings only."""

from __future__ import annotations

import functools
import logging
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import click

from histostream.wsi.errors import HistoError, printable
from histostream.wsi.optional import install_command

MIB = 1024 * 1024
BYTES = {"MIB": MIB, "GIB": 1024 * MIB, "TIB": MIB * MIB, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def memory_mib(text: str) -> int:
    """Read a size of memory as people write it; the type of an option.

    Parameters
    ----------
    text
        ``1GiB``, ``900MiB``, ``2GB``, or a plain number of MiB.

    Returns
    -------
    Whole MiB; parts of one are dropped, so that a bound stays a bound.

    Raises
    ------
    click.BadParameter
        If it is no size.

    Examples
    --------
    >>> memory_mib("1.5GiB"), memory_mib("900")
    (1536, 900)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)", text.strip().upper())
    unit = BYTES.get(found.group(2) or "MIB") if found else None
    if found is None or unit is None:
        raise click.BadParameter(
            f"{text!r} is no size of memory: write 1GiB, 900MiB, 2GB, or a number of MiB"
        )
    return int(float(found.group(1)) * unit / MIB)


def show_only_our_warnings(command: str) -> None:
    """Show HistoStream's own warnings; what libraries say is in the error that they raise."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{command}: %(message)s"))
    handler.addFilter(logging.Filter("histostream"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    if not sys.warnoptions:  # whoever asks Python for them sees them
        warnings.simplefilter("ignore")


def fail(command: str, message: str) -> None:
    """Say what went wrong, in one line on stderr."""
    click.echo(f"{command}: {printable(message)}", err=True)


def one_line_errors(
    command: str, *, out_of_memory: str, stopped: str, extras: Mapping[str, str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command say what went wrong in one line, and leave with status 1, or 130 if stopped.

    Parameters
    ----------
    command
        Its name, as "histo-export".
    out_of_memory
        What to try when memory does not last.
    stopped
        What a user who stops it finds.
    extras
        The extra of HistoStream that brings a package; "export" for those not named.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except HistoError as error:
                message, status = str(error), 1
            except ImportError as error:
                if error.name is None or error.name.startswith("histostream"):
                    raise
                package = error.name.split(".")[0]
                extra = extras.get(package, "export")
                message = f"{package} is not installed: {install_command(extra)}"
                status = 1
            except MemoryError:
                message, status = f"out of memory; {out_of_memory}", 1
            except KeyboardInterrupt:
                message, status = f"stopped; {stopped}", 130
            else:
                return
            fail(command, message)
            sys.exit(status)

        return guarded

    return decorate

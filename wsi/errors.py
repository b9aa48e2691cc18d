"""Errors that a caller may want to catch; each message says what happened, to what, and what to do.

::

  HistoError
    SlideError       a slide cannot be opened, lacks something, or breaks while being read
      DamagedError   one place of it cannot be decoded; others may
    OutputError      an output file or folder cannot be written
  StoppedError       the user asked to stop; no fault of anything, so no HistoError
"""


class HistoError(Exception):
    """Base of every error that is the input's fault, not the program's."""


class SlideError(HistoError, OSError):
    """A slide cannot be opened or read, or does not say what is needed of it."""


class DamagedError(SlideError):
    """A block of a slide cannot be decoded, though the file can be read; other blocks may."""


class OutputError(HistoError, OSError):
    """An output cannot be written; nothing is left under its final name."""


class StoppedError(Exception):
    """The user asked to stop; what was finished is kept."""


MAX_REASON = 300  # characters; libraries quote whole files


def reason(error: BaseException) -> str:
    """Return what a library's exception says as one short line, or its name if it says nothing."""
    line = printable(" ".join(str(error).split())) or type(error).__name__
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]}..."


def printable(text: str) -> str:
    """Write control characters, and what is no character, as Python's escapes: names hold any."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

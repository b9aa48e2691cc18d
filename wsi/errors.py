"""Errors that a caller may want to catch; each message says what happened, to which file, and what to do.

::

  HistoError
    SlideError       a slide cannot be opened, lacks something, or breaks while being read
      DamagedError   one block of it cannot be decoded
    OutputError      an output file or folder cannot be written
  StoppedError       the user stopped the program; not a HistoError, since nothing is wrong
"""

import re


class HistoError(Exception):
    """Base of all errors that the input causes, not the program.

    Attributes
    ----------
    exit_status
        With which a command ends: 1, or 2 if the call itself was wrong.
    """

    exit_status = 1


class SlideError(HistoError, OSError):
    """A slide cannot be opened or read, or lacks information that is needed."""


class DamagedError(SlideError):
    """A block of a slide cannot be decoded, though the file can be read."""


class OutputError(HistoError, OSError):
    """An output cannot be written; nothing is left under its final name."""


class StoppedError(Exception):
    """The user stopped the program; finished results are kept."""


def unreadable(source: object, error: OSError) -> SlideError:
    """Return the error for a slide that the system does not read; ``error`` says why."""
    file = error.filename
    other = f"{file}: " if isinstance(file, str) and file != str(source) else ""
    return SlideError(
        f"{source}: cannot be read ({printable(other + (error.strerror or reason(error)))}); "
        "check its permissions and the drive that it is on"
    )


def no_longer_readable(path: object, error: Exception) -> SlideError:
    """Return the error for an open slide that the system stops to read; ``error`` says why."""
    problem = (error.strerror if isinstance(error, OSError) else None) or reason(error)
    return SlideError(f"{path}: cannot be read any more ({problem}); check the drive that it is on")


OBJECT = re.compile(r"\s*<[^<>]*\bat 0x[0-9a-fA-F]+[^<>]*>")  # as Python shows an object without a text
MAX_REASON = 300  # characters; some libraries quote a complete file


def reason(error: BaseException) -> str:
    """Return the message of a library's exception as one short line, or its class if it has none.

    Python's names of objects in memory are left out, as <_io.BytesIO object at 0x7f12>: they say nothing to a user.

    Examples
    --------
    >>> reason(ValueError("cannot identify image file <_io.BytesIO object at 0x7f12>"))
    'cannot identify image file'
    """
    line = printable(" ".join(OBJECT.sub("", str(error)).split())) or type(error).__name__
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]}..."


def printable(text: str) -> str:
    """Return a text whose control characters and surrogates are Python's escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

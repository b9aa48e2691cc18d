"""Errors that a caller may want to catch; each message says what happened, to what, and what to do.

HistoError
  SlideError     a slide cannot be opened, lacks something, or breaks while being read
    DamagedError one place of it cannot be decoded; others may
  OutputError    an output file or folder cannot be written
StoppedError     the user asked to stop; no fault of anything, so no HistoError
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

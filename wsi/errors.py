"""Errors that a caller may want to catch; each message says what happened, to what, and what to do.

HistoError
  SlideError   a slide cannot be opened, lacks something, or breaks while being read
  OutputError  an output file or folder cannot be written

StoppedError   the caller asked to stop; no fault of anything, so no HistoError
"""


class HistoError(Exception):
    """Base of every error that is the input's fault, not the program's."""


class SlideError(HistoError, OSError):
    """A slide cannot be opened or read, or does not say what is needed of it."""


class OutputError(HistoError, OSError):
    """An output cannot be written; nothing is left under its final name."""


class StoppedError(Exception):
    """The caller's ``stopping()`` said yes; what was begun has been cleaned up."""

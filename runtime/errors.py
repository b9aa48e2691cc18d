"""Errors of running a network."""

from __future__ import annotations

from histostream.wsi.errors import HistoError


class EngineError(HistoError, RuntimeError):
    """A backend is not usable on this machine, or the network cannot run on it."""

"""Outlines of the objects, for ``--annotations``."""

"""Tables of the objects, for ``--objects``."""

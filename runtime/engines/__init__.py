"""The libraries that run networks: one module each, found by its file name.

``base.py`` lists what such a module offers; ``opener.py`` opens an engine by name, or the best one.
"""

"""Recipes that ship: TOML files for ``histo-train --config NAME``."""

"""Modules that are found by lying in a folder, or by an entry point of another package."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any

from histostream.wsi.errors import HistoError


@dataclass(frozen=True)
class Registry:
    """The modules of one kind, by name.

    Attributes
    ----------
    package
        The package of the modules, as ``histostream.wsi.slides.readers``. A module is known by its
        name; modules whose names begin with ``_`` do not count.
    group
        Entry points of other packages, as ``histostream.readers``; each names a module.
    shared
        Modules of the package that the others share and that do not count either.
    """

    package: str
    group: str
    shared: tuple[str, ...] = ("base",)

    @cached_property
    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        return {entry_point.name: entry_point for entry_point in metadata.entry_points(group=self.group)}

    @property
    def _own(self) -> set[str]:
        modules = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        return {module.name for module in modules if not module.name.startswith("_")} - set(self.shared)

    @property
    def names(self) -> list[str]:
        """The names of all modules, sorted."""
        return sorted(self._own | self._entry_points.keys())

    def load(self, name: str) -> Any:
        """Import one module.

        Raises
        ------
        KeyError
            If there is no such module.
        HistoError
            If the module of another package cannot be loaded.
        """
        if name in self._own:
            return importlib.import_module(f"{self.package}.{name}")
        entry_point = self._entry_points[name]
        try:
            return entry_point.load()
        except (ImportError, AttributeError) as error:
            raise HistoError(
                f"{self.group} {name}: {entry_point.value} cannot be loaded ({error}); update or remove its package"
            ) from error

    def load_all(self) -> dict[str, Any]:
        """Import all modules, by their names."""
        return {name: self.load(name) for name in self.names}

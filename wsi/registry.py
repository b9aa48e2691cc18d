"""Modules that are found by name: the files of a folder, and the entry points of other packages."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from histostream.wsi.errors import HistoError


@dataclass(frozen=True, slots=True)
class Registry:
    """The modules of one kind; listing them imports none.

    Attributes
    ----------
    package
        Name of the package whose modules are listed.
    group
        Group of the entry points with which other packages add modules.
    kind
        What a module is, for messages.
    error
        Type of the errors.
    submodule
        Module of a listed sub-package that is imported.
    hidden
        Modules of the package that are not listed; those that begin with an underscore never are.
    """

    package: str
    group: str
    kind: str
    error: type[HistoError] = HistoError
    submodule: str = ""
    hidden: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return the names of all modules, sorted."""
        return sorted(self._own() | entry_points(self.group).keys())

    def load(self, name: str) -> Any:
        """Import the module called ``name``.

        Raises
        ------
        HistoError
            The registry's ``error``, if there is no such module, and the message names the nearest; or
            if the module of another package cannot be loaded.
        """
        if name in self._own():
            return importlib.import_module(".".join(filter(None, (self.package, name, self.submodule))))
        entry_point = entry_points(self.group).get(name)
        if entry_point is None:
            near = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.names())}"
            raise self.error(f"no {self.kind} is called {name!r}: {hint}")
        try:
            return entry_point.load()
        except (ImportError, AttributeError) as error:
            raise self.error(
                f"the {self.kind} {name!r} of another package cannot be loaded ({error}): update or remove "
                f"the package of {entry_point.value}"
            ) from error

    def load_all(self) -> dict[str, Any]:
        """Import all modules, by their names."""
        return {name: self.load(name) for name in self.names()}

    def _own(self) -> set[str]:
        modules = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        return {module.name for module in modules if module.name[0] != "_" and module.name not in self.hidden}


@cache
def entry_points(group: str) -> dict[str, metadata.EntryPoint]:
    """Return the entry points of a group, by their names."""
    return {entry_point.name: entry_point for entry_point in metadata.entry_points(group=group)}

"""Modules that are found by name: the files of a folder, and the entry points of other packages."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

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
        Type of the error for an unknown name.
    submodule
        Module of a listed sub-package that is imported.
    hidden
        Modules of the package that are not listed; those that begin with an underscore never are.
    """

    package: str
    group: str
    kind: str
    error: type[HistoError]
    submodule: str = ""
    hidden: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return the names of all modules, sorted."""
        return sorted({*self._own(), *(point.name for point in metadata.entry_points(group=self.group))})

    def load(self, name: str) -> ModuleType:
        """Import the module called ``name``.

        Raises
        ------
        HistoError
            The registry's ``error``, if there is none; the message names the nearest.
        """
        own = self._own()
        if name in own:
            return importlib.import_module(own[name])
        for point in metadata.entry_points(group=self.group, name=name):
            module: ModuleType = point.load()
            return module
        near = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.names())}"
        raise self.error(f"no {self.kind} is called {name!r}: {hint}")

    def _own(self) -> dict[str, str]:
        """Return the full names of the package's modules, by name."""
        return {
            module.name: f"{self.package}.{module.name}" + (f".{self.submodule}" if module.ispkg else "")
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__)
            if not module.name.startswith("_") and module.name not in self.hidden
        }

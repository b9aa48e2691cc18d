"""Modules that are found by name: the files of a folder, and the entry points of other packages."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

from histostream.wsi.errors import HistoError


@dataclass(frozen=True, slots=True)
class Registry:
    """The modules of one kind; listing them imports none.

    Attributes
    ----------
    package, folder
        Name of the package whose modules are listed, and its ``__path__``.
    group
        Group of the entry points with which other packages add modules.
    kind
        What a module is, for messages.
    error
        Type of the error for an unknown name.
    submodule
        Module of a listed sub-package that is imported; "": the listed module itself.
    hidden
        Modules of the package that are not listed; those that begin with an underscore never are.
    """

    package: str
    folder: Sequence[str]
    group: str
    kind: str
    error: type[HistoError]
    submodule: str = ""
    hidden: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return the names of all modules, sorted."""
        own = {module.name for module in pkgutil.iter_modules(self.folder) if not module.name.startswith("_")}
        added = {point.name for point in metadata.entry_points(group=self.group)}
        return sorted(own - set(self.hidden) | added)

    def load(self, name: str) -> ModuleType:
        """Import the module called ``name``.

        Raises
        ------
        HistoError
            The registry's ``error``, if there is none; the message names the nearest.
        """
        names = self.names()
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise self.error(f"no {self.kind} is called {name!r}: {hint}")
        for point in metadata.entry_points(group=self.group, name=name):
            module: ModuleType = point.load()
            return module
        return importlib.import_module(".".join(filter(None, (self.package, name, self.submodule))))

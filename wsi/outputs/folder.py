"""The output folder of a slide, in which all files of a run appear together.

Sinks write under temporary names. At the end the folder renames everything, ``run.json`` last: a
folder with a ``run.json`` is complete and never a mixture of two runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from histostream.wsi.errors import OutputError
from histostream.wsi.files import (
    json_text,
    remove,
    replace_whole,
    sync,
    sync_all,
    temporary_name,
    write_temporary,
    writing,
)
from histostream.wsi.outputs.label_rows import AnySink, LabelRows, Sink
from histostream.wsi.outputs.lock import Lock, Process

RUN_FILE = "run.json"
LOCK_FILE = ".lock"


class OutputFolder:
    """The folder ``out/stem``: all files of a run appear in it, or none.

    ::

        with OutputFolder(out, "slide") as folder:
            folder.add(LabelTiff(folder.path / "labels.tif", info))
            for part in parts:
                folder.write(part)
            folder.run["seconds"] = 12.3

    Leaving the block publishes the files; an exception inside it removes what was written, and the
    folder too if it is new and empty. Inside the block no other process works on the folder, also on
    no other host. ``dead_processes`` are processes that are known to have ended.

    Raises
    ------
    LockedError
        On entering, if another process works on it.
    OutputError
        On entering or leaving, if something cannot be written.

    Attributes
    ----------
    path
        The folder.
    run
        Content of ``run.json``; the names of the published files are added as ``outputs``.
    """

    def __init__(self, out: Path, stem: str, dead_processes: Collection[Process] = ()) -> None:
        if not stem or stem == ".." or Path(stem).name != stem:
            raise OutputError(f"{stem!r} is not a plain name for a folder of results: give the slide another name")
        self.path = Path(out) / stem
        self.run: dict[str, object] = {}
        self._sinks: list[Sink] = []
        self._finished: list[tuple[Path, Path]] | None = None
        self._texts: list[tuple[Path, Path]] = []
        self._created: list[Path] = []
        self._lock = Lock(self.path / LOCK_FILE, dead_processes)
        self._afterwards: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        while not self._entered():
            pass
        self._created = missing
        return self

    def _entered(self) -> bool:
        """Make the folder and lock it; return False if another process removed it in between."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.__enter__()
        except OutputError:
            if self.path.exists():
                raise
            return False
        return True

    def after_publishing(self, call: Callable[[], None]) -> None:
        """Call something when the files are in place and the folder is still locked."""
        self._afterwards.append(call)

    def add(self, sink: AnySink) -> AnySink:
        """Add a sink that takes the rows too; return it."""
        self._sinks.append(sink)
        return sink

    def write(self, part: LabelRows) -> None:
        """Hand finished rows to every sink.

        Raises
        ------
        OutputError
            If a file cannot be written, or another process has taken the folder over.
        """
        self._lock.check()
        for sink in self._sinks:
            sink.write(part)

    def finish(self) -> None:
        """Complete every file under its temporary name; leaving the block does it too."""
        if self._finished is None:
            self._finished = [pair for sink in self._sinks for pair in sink.finish()]

    @property
    def unpublished(self) -> dict[str, Path]:
        """Temporary paths of the files that `finish` has completed, by their final names."""
        return {final.name: temporary for temporary, final in (self._finished or [])}

    def add_text(self, name: str, text: str) -> None:
        """Add a text file that is published with the files of the sinks."""
        self._texts.append(write_temporary(self.path / name, text))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self._abort()
                return
            try:
                self.finish()
                self._publish()
            except BaseException:
                self._abort()
                raise
        finally:
            self._lock.__exit__(kind, error, trace)
            if self._created and not (self.path / RUN_FILE).exists():
                self._remove_new_folders()

    def _publish(self) -> None:
        self._lock.check()
        pairs = [*(self._finished or []), *self._texts]
        names = sorted(final.name for _, final in pairs)
        marker = self.path / RUN_FILE
        outdated = [self.path / name for name in sorted(_outputs_of(marker) - set(names))]
        last = write_temporary(marker, json_text({**self.run, "outputs": names}))
        for temporary, final in (*pairs, last):
            with writing(final):
                sync_all(temporary)
        with writing(marker):
            # From here to the end the folder is a mixture of two runs, so it has no marker.
            marker.unlink(missing_ok=True)
            sync(self.path)
        remove(outdated)  # of a run with other options
        for temporary, final in (*pairs, last):
            with writing(final):
                if final == marker:
                    sync(self.path)
                replace_whole(temporary, final)
        with writing(self.path):
            sync(self.path)
        for call in self._afterwards:
            call()

    def _abort(self) -> None:
        for sink in self._sinks:
            sink.abort()
        remove([temporary_name(self.path / RUN_FILE), *(temporary for temporary, _ in self._texts)])

    def _remove_new_folders(self) -> None:
        with suppress(OSError):  # not empty, or removed by another process
            for folder in self._created:
                folder.rmdir()


def _outputs_of(marker: Path) -> set[str]:
    """Return the file names that a run.json lists; none if it cannot be read."""
    try:
        names = json.loads(marker.read_text(encoding="utf-8"))["outputs"]
        return {n for n in names if isinstance(n, str) and Path(n).name == n and not n.startswith(".")}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()

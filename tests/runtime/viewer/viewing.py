"""A viewer's server for a test, and runs that stop half-way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from histostream.runtime.viewer.results import Results
from histostream.runtime.viewer.server import Viewer, ViewServer


@contextmanager
def serving(*folders: Path, slides: Path | None = None) -> Iterator[ViewServer]:
    with ViewServer(Viewer(Results(folders), slides)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def stop_after(rows: int) -> Callable[[], bool]:
    """Ask to stop after a number of rows of tiles, those of former runs counted."""
    left = iter(range(rows))
    return lambda: next(left, None) is None

"""How many calls lie between the command and the network: a reader follows each of them."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import onnxruntime
import pytest

from histostream.runtime.cli import main
from tests.commands import call
from tests.conftest import REPOSITORY
from tests.runtime.conftest import random_pixels, write_slide

MAX_CALLS = 8
OURS = tuple(str(REPOSITORY / folder) for folder in ("runtime", "wsi"))


def calls_in(frame: FrameType | None) -> list[str]:
    """Return the product's functions on one stack, the outermost first, without click's wrapper."""
    return [
        f"{Path(entry.filename).name}:{entry.name}"
        for entry in traceback.extract_stack(frame)
        if entry.filename.startswith(OURS) and Path(entry.filename).name != "console.py"
    ]


def test_few_calls_lie_between_the_command_and_the_network(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slide's run waits in the command's thread, goes on in a worker's, and ends in the device's."""
    path: list[str] = []
    session_run = onnxruntime.InferenceSession.run

    def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not path:
            stacks, here = sys._current_frames(), threading.get_ident()
            command = next(thread for thread in threading.enumerate() if thread is threading.main_thread())
            slides = [thread for thread in threading.enumerate() if thread.name.startswith("slide")]
            for thread in (command, *slides):
                if thread.ident is not None and thread.ident != here:
                    path.extend(calls_in(stacks[thread.ident]))
            path.extend(calls_in(sys._getframe(1)))
        return session_run(self, *arguments, **keywords)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", run)
    slide = write_slide(tmp_path / "slide.tif", random_pixels(200, 150))
    done = call(main, slide, "--model", tiny_bundle, "--out", tmp_path / "out", "--backend", "cpu", "--no-tissue")
    assert done.returncode == 0, done.stderr
    assert path[0].startswith("cli.py"), path
    assert path[-1] == "cpu.py:infer", path
    assert len(path) <= MAX_CALLS, path

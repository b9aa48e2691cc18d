"""Event files for TensorBoard, which the package tensorboard writes and shows; it is optional."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from histostream.wsi.optional import require

FOLDER = "tensorboard"  # in a run


def check_events() -> None:
    """Raise OutputError, with the command that installs it, unless tensorboard is there."""
    require("tensorboard", "--tensorboard needs the package", "tensorboard")


class Events:
    """Writes the values of steps to event files in a folder.

    Parameters
    ----------
    folder
        Of the event files.
    start
        Steps that are done. TensorBoard does not show what earlier files have of later ones, which
        the run takes again.
    """

    def __init__(self, folder: Path, start: int) -> None:
        check_events()
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1)

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write values of a step by tag; those that are None or nan are left out."""
        for tag, value in values.items():
            if value is not None and not math.isnan(value):
                self._writer.add_scalar(tag, value, step)

    def write_sheet(self, step: int, sheet: Path) -> None:
        """Write the samples of a validation."""
        with Image.open(sheet) as page:
            self._writer.add_image("samples", np.asarray(page.convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        """Write to the file what was handed over."""
        self._writer.flush()

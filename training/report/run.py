"""Report of a training run: how far it is, its curves, its samples and what it was made of."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histostream.training.checkpoint import CheckpointError, read
from histostream.training.data import Classes
from histostream.training.plan import Plan
from histostream.training.report import plot
from histostream.training.report.plot import Plot, draw
from histostream.wsi.files import write_whole
from histostream.wsi.report.json_view import JsonView
from histostream.wsi.report.page import render

REPORT = "report.html"
MAX_CLASSES = 6  # lines in a plot
MAX_PNG_BYTES = 1_500_000  # of the picture of samples; larger ones become JPEG
RECENT = 0.1  # share of the steps from which the speed is taken
FILES = {
    "best": "the checkpoint that is exported",
    "last": "the newest checkpoint, from which the run continues",
    "log.csv": "losses, learning rates and scores of each step",
    "samples": "images of all validations",
    "tensorboard": "event files for TensorBoard",
}


class Status(Enum):
    """How a run is at the time of its report."""

    RUNNING = "running"
    STOPPED = "stopped"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class ClassRow:
    """A class in the table: its share of the training pixels, its weight, and its Dice coefficients."""

    name: str
    color: tuple[int, int, int]
    share: float | None
    weight: float | None
    newest: float | None
    best: float | None
    test: float | None


def write_report(
    folder: Path,
    status: Status,
    plan: Plan,
    columns: Mapping[str, Sequence[float]],
    record: Mapping[str, Any],
    *,
    classes: Classes,
    best: int,
    patience: tuple[int, int],
) -> None:
    """Write ``report.html`` of a run, whole or not at all.

    Parameters
    ----------
    folder
        Of the run.
    status, plan
        How the run is, and what it was to do.
    columns
        Of its log, by name.
    record
        Its training record.
    classes
        (name, colour) of each.
    best
        Step of the best checkpoint; 0: there is none.
    patience
        Validations since then, and after how many the run ends; 0: it does not.
    """
    values = {name: np.asarray(column, np.float64) for name, column in columns.items()}
    scores = JsonView(_scores(folder))
    waited, most = patience
    text = render(
        __package__,
        "run.html",
        name=folder.resolve().name or str(folder),
        status=status.value,
        plan=plan,
        done=int(values["step"][-1]),
        seconds=float(values["seconds"][-1]),
        pace=_pace(values),
        best=best,
        best_loss=_at(values, "validation_loss", best),
        best_dice=_at(values, "validation_dice", best),
        ended_early=status is Status.FINISHED and bool(most) and waited >= most and values["step"][-1] < plan.steps,
        waited=waited,
        validated=bool(np.isfinite(values["validation_dice"]).any()),
        dice_plot=_dice_plot(values, classes, best),
        loss_plots=_loss_plots(values, best),
        rate_plot=_rate_plot(values),
        rows=_class_rows(values, classes, plan, best, scores),
        classes_left=max(0, len(classes) - MAX_CLASSES),
        scores=scores,
        samples=_samples(folder),
        record=JsonView(dict(record)),
        width=plot.WIDTH,
        height=plot.HEIGHT,
        left=plot.LEFT,
        right=plot.WIDTH - plot.RIGHT,
        top=plot.TOP,
        floor=plot.HEIGHT - plot.BOTTOM,
        updated=datetime.now().astimezone().isoformat(" ", "seconds"),
        files=[(name, does) for name, does in FILES.items() if (folder / name).exists()],
    )
    write_whole(folder / REPORT, text)


def _scores(folder: Path) -> Any:
    """Return the scores of the best checkpoint, which it has when the run is finished."""
    try:
        return read(folder / "best").record.get("scores", {})
    except CheckpointError:
        return {}


def _pace(values: Mapping[str, NDArray[np.float64]]) -> float | None:
    """Return the seconds that the newest steps took, validations included; None after one step."""
    seconds = values["seconds"]
    count = min(len(seconds) - 1, max(10, int(RECENT * len(seconds))))
    return float(seconds[-1] - seconds[-1 - count]) / count if count > 0 else None


def _at(values: Mapping[str, NDArray[np.float64]], name: str, step: int) -> float | None:
    """Return a column's value at a step; None without one."""
    if name not in values:
        return None
    found = values[name][values["step"] == step]
    return float(found[0]) if len(found) and math.isfinite(found[0]) else None


def _dice_plot(values: Mapping[str, NDArray[np.float64]], classes: Classes, best: int) -> Plot | None:
    lines = [(name, values[f"dice_{name}"]) for name, _ in classes[:MAX_CLASSES] if f"dice_{name}" in values]
    title, unit = "Dice coefficient of each class", "Dice, validation images"
    return draw(title, unit, values["step"], lines, limits=(0.0, 1.0), mark=best)


def _loss_plots(values: Mapping[str, NDArray[np.float64]], best: int) -> list[Plot]:
    """Draw the validation loss, then each loss of the training by itself: their scales differ."""
    validation = [("", values["validation_loss"])]
    plots = [draw("validation loss", "loss, validation images", values["step"], validation, mark=best)]
    for name, column in values.items():
        if name not in ("step", "seconds") and not name.startswith(("validation_", "dice_", "rate_")):
            plots.append(draw(name, "loss, training crops", values["step"], [("", column)]))
    return [one for one in plots if one is not None]


def _rate_plot(values: Mapping[str, NDArray[np.float64]]) -> Plot | None:
    """Draw the learning rates; optimisers that have the same share a line."""
    lines: dict[bytes, tuple[list[str], NDArray[np.float64]]] = {}
    for name, column in values.items():
        if name.startswith("rate_"):
            lines.setdefault(column.tobytes(), ([], column))[0].append(name.removeprefix("rate_"))
    named = [(", ".join(names), column) for names, column in lines.values()]
    return draw("Learning rate", "learning rate", values["step"], named[:MAX_CLASSES])


def _class_rows(
    values: Mapping[str, NDArray[np.float64]], classes: Classes, plan: Plan, best: int, scores: JsonView
) -> list[ClassRow]:
    validated = values["step"][np.isfinite(values["validation_dice"])]
    newest = int(validated[-1]) if len(validated) else 0
    test = scores.at("test", "f_score").numbers()
    return [
        ClassRow(
            name,
            color,
            plan.shares.get(name),
            plan.weights[i] if plan.weights else None,
            _at(values, f"dice_{name}", newest),
            _at(values, f"dice_{name}", best),
            test[i] if i < len(test) else None,
        )
        for i, (name, color) in enumerate(classes)
    ]


@dataclass(frozen=True, slots=True)
class Samples:
    """The newest sheet of samples as a ``data:`` URI, its size and step, and the names of all sheets."""

    uri: str
    width: int
    height: int
    step: int
    names: list[str]


def _samples(folder: Path) -> Samples | None:
    sheets = sorted((folder / "samples").glob("step-*.png"))
    if not sheets:
        return None
    data, kind = sheets[-1].read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as page:
        size = page.size
        if len(data) > MAX_PNG_BYTES:
            smaller = io.BytesIO()
            page.convert("RGB").save(smaller, "JPEG", quality=88, subsampling=0)
            data, kind = smaller.getvalue(), "jpeg"
    uri = f"data:image/{kind};base64," + base64.b64encode(data).decode()
    return Samples(uri, *size, int(sheets[-1].stem.removeprefix("step-")), [sheet.name for sheet in sheets])

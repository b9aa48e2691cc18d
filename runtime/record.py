"""What run.json says of a run, and what tells two runs apart."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.crf.options import CrfOptions
from histostream.runtime.options import Options
from histostream.runtime.stream.column_band import Counts, StageSeconds
from histostream.wsi.outputs.folder import RUN_FILE
from histostream.wsi.outputs.label_rows import ClassInfo
from histostream.wsi.slides.reader import SlideReader
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.slides.staging import SlideVersion

# Of a model card, beside its classes.
CARD_FACTS = ("note", "channels", "tile_px", "align_px", "halo_px", "tile_statistics", "score_kind", "opset")
TRAINING_FACTS = ("images", "scores", "data_sha256", "commit", "histostream")
MAX_CLASSES = 255  # figures in a list are one for each class
MAX_FACT = 300  # characters


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    names = (
        "histostream",
        "numpy",
        "onnxruntime-gpu",
        "onnxruntime",
        "tensorrt",
        "tensorrt-rtx",
        "cuda-python",
        "pycuda",
        "large-image",
        "tifffile",
        "zarr",
        "highdicom",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def inputs_of(version: SlideVersion, card: ModelCard, options: Options, asked: Mapping[str, str]) -> dict[str, Any]:
    """Return what decides the result of a run, as plain JSON.

    Parameters
    ----------
    version
        Of the slide.
    card, options
        The model, and how it is run.
    asked
        What else was asked for, as ``{"precision": "auto"}``.
    """
    said = {
        "slide": asdict(version),
        "model": card.digest(),
        "options": {**options.deciding(), **asked},
        "histostream": metadata.version("histostream"),
    }
    found: dict[str, Any] = json.loads(json.dumps(said))  # tuples become lists, as when read back
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in which entries two runs differ, as "options.blend (hann, now crop)"."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{name} ({_short(old.get(name))}, now {_short(new.get(name))})"
        for name in (*old, *(n for n in new if n not in old))
        if old.get(name) != new.get(name)
    ]


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return what the run.json of an output folder says; None if there is none, or it is broken."""
    return read_json(folder / RUN_FILE)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a file of JSON says; None if it is not there, broken, or no object."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def slide_record(slide: SlideReader, view: SlideView, version: SlideVersion) -> dict[str, Any]:
    """Say what the slide is, and at which resolution it was seen."""
    return {
        "path": str(slide.path),
        **asdict(version),
        "reader": slide.name,
        "mpp": slide.mpp,
        "level": view.level,
        "scale": view.scale,
        "downsample": view.downsample,
        "width": view.width,
        "height": view.height,
        "result_mpp": view.mpp,
    }


def seen_record(source: str, view: SlideView, classes: Sequence[ClassInfo]) -> dict[str, Any]:
    """Say what the viewer needs to show a run that is not finished; ``width`` is the result's."""
    return {
        "source": source,
        "width": view.width,
        "height": view.height,
        "result_mpp": view.mpp,
        "downsample": view.downsample,
        "classes": [{"name": c.name, "color": list(c.color)} for c in classes],
    }


def time_record(seconds: StageSeconds, counts: Counts, total: float) -> dict[str, Any]:
    """Say where the time went; time in which another slide had the device does not count."""
    stages = {name: round(value, 3) for name, value in asdict(seconds).items()}
    waited = stages.pop("wait")
    pixels = counts.pixels - counts.pixels_before
    return {
        "seconds": {"total": round(total - waited, 3), **stages, "wait": waited},
        "mpx": round(counts.pixels / 1e6, 3),
        "mpx_per_s": round(pixels / 1e6 / max(total - waited, 1e-9), 3),
        "bound_by": bound_by(stages),
    }


def bound_by(stages: Mapping[str, float]) -> str:
    """Return the stage that a run of these seconds waited for most."""
    return max(stages, key=lambda name: stages[name])


def card_record(card: ModelCard) -> dict[str, Any]:
    """Say what the model is and how it was judged, so that a report needs no bundle.

    Of the training record, which methods write as they like, only figures are taken.
    """
    return {
        "classes": [entry.name for entry in card.classes],
        **{name: getattr(card, name) for name in CARD_FACTS},
        "parity": _figures(card.parity),
        "training": _figures({n: v for n, v in card.training.items() if n in TRAINING_FACTS}),
    }


def crf_record(options: CrfOptions, bands: list[dict[str, int]]) -> dict[str, Any]:
    """Say how the CRF was run."""
    return {
        "halo_px": options.halo_px,
        "cell_px": options.cell_px,
        **{n: sum(band.get(n, 0) for band in bands) for n in ("cells", "cells_skipped")},
    }


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with paths as text."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _figures(value: Any, depth: int = 3) -> Any:
    """Return names and figures of a card as run.json can hold them; lists only of figures."""
    if isinstance(value, dict):
        found = {str(k): _figures(v, depth - 1) for k, v in value.items()} if depth else {}
        return {k: v for k, v in found.items() if v is not None}
    if isinstance(value, list):
        return value if len(value) <= MAX_CLASSES and all(map(_is_figure, value)) else None
    if isinstance(value, str):
        return value[:MAX_FACT]
    return value if _is_figure(value) else None


def _is_figure(value: Any) -> bool:
    # Compared with numbers: an integer of a card may be too long to be made a float.
    return isinstance(value, int | float) and abs(value) < math.inf

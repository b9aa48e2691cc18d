"""Small engines and slides whose right result is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard, Scores
from histostream.runtime.cohort.worker import CohortRecord, Executor
from histostream.runtime.outcome import Outcome
from histostream.runtime.slide_job import SlideJob
from histostream.wsi.outputs.label_rows import ClassInfo

CARD = ModelCard(
    method="identity",
    classes=tuple(ClassInfo(n, c) for n, c in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255)))),
    mpp=0.5,
    channels=3,
    tile_px=64,
    align_px=1,
    halo_px=0,
    tile_statistics=False,
    score_kind="probability",
    files={},
    opset=18,
)


def as_scores(values: NDArray[np.uint8], card: ModelCard = CARD) -> Scores:
    """Return v / 256, which float16 and 14 bits hold exactly; or, of schema 1, the bytes themselves."""
    if card.schema == 1:
        return values
    scores: Scores = (values / np.float32(256)).astype(np.float16)
    return scores


def as_shares(values: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return the file's value of a score v / 256: round(65535 v / 256)."""
    shares: NDArray[np.uint16] = np.floor(values * (65535 / 256) + 0.5).astype(np.uint16)
    return shares


@dataclass
class IdentityEngine:
    """Scores are the pixels divided by 256: blending must give the slide back, exactly."""

    card: ModelCard = field(default_factory=lambda: CARD)
    name: str = "identity"
    batch: int = 4
    tiles: int = 0
    batches: list[int] = field(default_factory=list)

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        self.tiles += len(tiles)
        self.batches.append(len(tiles))
        return as_scores(np.ascontiguousarray(np.moveaxis(tiles, -1, 1)), self.card)

    def close(self) -> None:
        pass


@dataclass
class PlaceDependentEngine(IdentityEngine):
    """Scores depend on the place in the tile, so that overlapping tiles disagree."""

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        super().infer(tiles)
        side = self.card.tile_px
        pattern = (np.add.outer(7 * np.arange(side), 13 * np.arange(side)) % 97).astype(np.uint8)
        return as_scores(np.moveaxis(tiles, -1, 1) // 2 + pattern, self.card)


def identity_engine(tile_px: int = 64, align_px: int = 1) -> IdentityEngine:
    return IdentityEngine(replace(CARD, tile_px=tile_px, align_px=align_px))


def write_slide(path: Path, pixels: NDArray[np.uint8], mpp: float | None = 0.5, tile_px: int = 64) -> Path:
    """Write a tiled, uncompressed TIFF: what comes back is what went in."""
    resolution: dict[str, Any] = (
        {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    )
    tifffile.imwrite(path, pixels, tile=(tile_px, tile_px), photometric="rgb", **resolution)
    return path


def random_pixels(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def noise_slide(tmp_path: Path) -> tuple[Path, NDArray[np.uint8]]:
    pixels = random_pixels(301, 217)
    return write_slide(tmp_path / "noise.tif", pixels), pixels


def run_cohort(
    jobs: Sequence[SlideJob],
    executor: Executor,
    *,
    stopping: Callable[[], bool] = lambda: False,
    record: Path | None = None,
) -> dict[int, Outcome]:
    """Run slides as the command does; return their outcomes by number."""
    outcomes = {}
    with nullcontext() if record is None else CohortRecord(record, jobs) as cohort:
        for i, outcome in executor.segment_all(jobs, report=lambda i: lambda done, total: None, stopping=stopping):
            outcomes[i] = outcome
            if cohort is not None:
                cohort.add(i, outcome)
    return outcomes

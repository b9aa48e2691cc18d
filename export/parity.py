"""Parity: whether what was exported is the network that was trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from histostream.runtime.engine import Engine
from histostream.wsi.errors import HistoError
from histostream.wsi.synthetic import SyntheticSlide

FP32_AGREEMENT = 0.9999  # share of labels that must agree; methods.md section 8
TILES = 6


class ParityError(HistoError, ValueError):
    """An exported file does not compute what the trained network does."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Scores of an exported file beside those of the network in torch, on the same tiles.

    Attributes
    ----------
    engine
        What ran the file.
    tiles, pixels
        How much was compared.
    max_difference, mean_difference
        Of the uint8 scores.
    label_agreement
        Share of the pixels with the same label.
    dark_label_agreement
        The same among the darkest tenth of the pixels, where iMEMS's margin is smallest.
    dice
        Dice of each class between the two label maps; None where neither has it.
    """

    engine: str
    tiles: int
    pixels: int
    max_difference: int
    mean_difference: float
    label_agreement: float
    dark_label_agreement: float
    dice: tuple[float | None, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for the card."""
        return asdict(self)


def compare(
    module: nn.Module, engine: Engine, tiles: NDArray[np.uint8], *, agreement: float
) -> ParityReport:
    """Run both on ``tiles`` (N, H, W, C) and compare.

    Raises
    ------
    ParityError
        If fewer labels agree than ``agreement``.
    """
    with torch.no_grad():
        wanted = np.concatenate([module(torch.from_numpy(t[None])).numpy() for t in tiles])
    found = np.concatenate([engine.infer(t[None]) for t in tiles])
    difference = np.abs(wanted.astype(np.int16) - found)
    labels, other = wanted.argmax(axis=1), found.argmax(axis=1)
    same = labels == other
    grey = tiles.mean(axis=-1)
    dark = grey <= np.quantile(grey, 0.1)
    report = ParityReport(
        engine=engine.name,
        tiles=len(tiles),
        pixels=same.size,
        max_difference=int(difference.max()),
        mean_difference=float(difference.mean()),
        label_agreement=float(same.mean()),
        dark_label_agreement=float(same[dark].mean()),
        dice=tuple(_dice(labels == k, other == k) for k in range(wanted.shape[1])),
    )
    if report.label_agreement < agreement:
        raise ParityError(
            f"{engine.name}: {report.label_agreement:.4%} of the labels agree with torch, "
            f"{agreement:.2%} are needed; nothing was written"
        )
    return report


def demo_tiles(tile_px: int, channels: int, mpp: float) -> NDArray[np.uint8]:
    """Tiles of the synthetic slide, (TILES, tile_px, tile_px, channels), for want of a real one."""
    side = 8 * tile_px
    slide = SyntheticSlide(side, side, mpp=mpp, seed=0)
    # Along the diagonal: glass, borders and tissue.
    starts = np.linspace(0, side - tile_px, TILES).astype(int)
    tiles = np.stack([slide.region(int(s), int(s), tile_px, tile_px)[0] for s in starts])
    return tiles if channels == 3 else tiles[..., :1]


def _dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float | None:
    total = int(a.sum()) + int(b.sum())
    return float(2 * (a & b).sum() / total) if total else None

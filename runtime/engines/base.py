"""Engine: a network that is ready to run on tiles; and what a module that opens engines offers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard, Scores
from histostream.runtime.errors import EngineError
from histostream.runtime.finding import Finding


@runtime_checkable
class Engine(Protocol):
    """A network behind the tile contract.

    Attributes
    ----------
    card
        The model's card.
    name
        Library, version, device and precision, for the record.
    batch
        Tiles per inference that suit the device: 1 on a CPU, where more only take more memory.
    """

    card: ModelCard
    name: str
    batch: int

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        """Map tiles (N, H, W, C), raw pixels, to scores (N, K, H, W) of type ``card.score_dtype``."""

    def close(self) -> None:
        """Release the device and its memory."""


class EngineModule(Protocol):
    """What a module in this folder offers, or one that an entry point of ``histostream.engines`` names.

    Its file name, or the entry point's, is the name for ``--backend``. Importing it must be quick:
    the library that it is for is imported by its functions.

    Attributes
    ----------
    PRECISIONS
        The precisions that it runs, best first: ``--precision auto`` takes the first that the
        bundle has.
    AUTO_PRIORITY
        ``--backend auto`` tries the engines from the highest on; 0: only used by name. The CPU's 10
        is the last resort.
    EXTRA
        The extra of HistoStream that installs its library; "" if none does.
    """

    PRECISIONS: tuple[str, ...]
    AUTO_PRIORITY: int
    EXTRA: str

    def available_hardware(self) -> str:
        """Return what it would run on here, as "a GPU"; "" if there is no such hardware. Must be quick."""

    def open(self, bundle: Path, card: ModelCard, *, precision: str, threads: int | None, device: int) -> Engine:
        """Open the network of a bundle.

        Parameters
        ----------
        bundle, card
            The model.
        precision
            One of `PRECISIONS`.
        threads
            CPU threads; None leaves it to the library.
        device
            Which GPU, as the driver counts.

        Raises
        ------
        ImportError
            If its library is not installed.
        EngineError
            If it is not usable here, or cannot load the network.
        CardError
            If the bundle is damaged, or has no graph of this precision.
        """

    def check(self) -> Iterator[Finding]:
        """Check what it needs, for ``histo-bench doctor``."""


def check_tiles(card: ModelCard, tiles: NDArray[np.uint8]) -> None:
    """Refuse tiles that do not keep the tile contract.

    Raises
    ------
    ValueError
        If the type or shape is not that of the card.
    """
    wanted = (card.tile_px, card.tile_px, card.channels)
    if tiles.dtype != np.uint8 or tiles.shape[1:] != wanted:
        raise ValueError(
            f"tiles are {tiles.dtype} {tiles.shape}; this model takes uint8 (N, {wanted[0]}, {wanted[1]}, {wanted[2]})"
        )


def check_scores(card: ModelCard, name: str, scores: NDArray[Any], n: int) -> None:
    """Refuse scores of ``n`` tiles that do not keep the tile contract, whatever the graph declares.

    Raises
    ------
    EngineError
        If the type or shape is not that of the card.
    """
    wanted = (n, len(card.classes), card.tile_px, card.tile_px)
    if scores.dtype != card.score_dtype or scores.shape != wanted:
        raise EngineError(
            f"{name}: the network gives {scores.dtype} {scores.shape}, the card says {card.score_dtype} "
            f"{wanted}; export the model again"
        )


def to_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Turn grey pixels (..., 1) into RGB by repetition, or RGB into grey (ITU-R 601).

    Of two or more than three channels, the first, or the first three, are shown as RGB.

    Raises
    ------
    ValueError
        If there is no such conversion.
    """
    given = pixels.shape[-1]
    if given == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels[..., :1], 3, axis=-1) if given < 3 else pixels[..., :3]
    if (given, channels) != (3, 1):
        raise ValueError(f"pixels of {given} channels are not those of a model for {channels}")
    grey = pixels.astype(np.float32) @ np.array((0.299, 0.587, 0.114), np.float32)
    return np.asarray(np.floor(grey + 0.5), np.uint8)[..., None]

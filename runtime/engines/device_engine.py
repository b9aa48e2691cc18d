"""Engines that run on tiles in device memory, and what they share: buffers of a batch, and copies."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard, Scores
from histostream.runtime.cuda.base import Device, DeviceError, DeviceMemoryError, Stream
from histostream.runtime.engines.base import Engine, check_tiles


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine that also runs on tiles in the memory of its device.

    Attributes
    ----------
    device
        Where it runs.
    stream
        The stream that the network runs on; other work queued there runs in order with it.
    max_batch
        Largest number of tiles per inference.
    """

    device: Device
    stream: Stream
    max_batch: int

    def buffers(self, batch: int) -> tuple[int, int]:
        """Return the addresses for the tiles and the scores of a batch; they stay the same.

        Raises
        ------
        DeviceMemoryError
            If the device has not enough memory for them.
        """

    def infer_device(self, tiles: int, scores: int, n: int, stream: Stream) -> None:
        """Queue the inference of n tiles (n, H, W, C) at an address to scores (n, K, H, W)."""


class BatchBuffers:
    """Device memory for the tiles and scores of one batch, reused for all slides.

    Captured graphs hold its addresses, so it moves only for a larger batch.
    """

    def __init__(self, device: Device, card: ModelCard) -> None:
        self._device, self._card = device, card
        self._allocated: tuple[int, int, int] | None = None  # batch, address of tiles, of scores

    def get(self, batch: int) -> tuple[int, int]:
        """Return the addresses for at least ``batch`` tiles and for their scores."""
        if self._allocated is None or self._allocated[0] < batch:
            self.close()
            tiles = self._device.alloc(batch * tile_bytes(self._card))
            try:
                scores = self._device.alloc(batch * score_bytes(self._card))
            except DeviceMemoryError:
                self._device.free(tiles)
                raise
            self._allocated = batch, tiles, scores
        return self._allocated[1:]

    def close(self) -> None:
        """Free the memory."""
        if self._allocated is not None:
            self._device.synchronize()
            _, tiles, scores = self._allocated
            self._allocated = None
            self._device.free(tiles)
            self._device.free(scores)


def tile_bytes(card: ModelCard) -> int:
    """Return the size of one tile of the network's input."""
    return card.tile_px**2 * card.channels


def score_bytes(card: ModelCard) -> int:
    """Return the size of the scores of one tile."""
    return card.tile_px**2 * len(card.classes) * card.score_dtype.itemsize


def infer_arrays(engine: DeviceEngine, tiles: NDArray[np.uint8]) -> Scores:
    """Run an engine on tiles in host memory, batch by batch, with copies to the device and back.

    Parameters
    ----------
    engine
        The network.
    tiles
        (N, H, W, C), any N.

    Returns
    -------
    (N, K, H, W) scores.
    """
    card, device, stream = engine.card, engine.device, engine.stream
    check_tiles(card, tiles)
    device.activate()
    batch = max(1, min(engine.batch, engine.max_batch))
    tiles_at, scores_at = engine.buffers(batch)
    shape = len(tiles), len(card.classes), card.tile_px, card.tile_px
    scores: Scores = np.empty(shape, card.score_dtype)
    up, down = device.pinned(batch * tile_bytes(card)), device.pinned(batch * score_bytes(card))
    try:
        for first in range(0, len(tiles), batch):
            part = tiles[first : first + batch]
            n = len(part)
            up[: part.size] = part.reshape(-1)
            device.upload(tiles_at, up[: part.size], stream)
            engine.infer_device(tiles_at, scores_at, n, stream)
            size = n * score_bytes(card)
            device.download(down[:size], scores_at, stream)
            stream.synchronize()
            scores[first : first + n] = down[:size].view(card.score_dtype).reshape(n, *shape[1:])
    finally:
        with suppress(DeviceError):  # a failed inference matters more
            stream.synchronize()
        device.unpin(up)
        device.unpin(down)
    return scores

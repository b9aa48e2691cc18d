"""What an engine offers that runs on tiles in device memory, and a batch on its way there and back."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.cuda.base import Device, DeviceError, DeviceMemoryError, Stream
from histostream.runtime.engines.base import Engine, check_tiles


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine that also runs on memory of its device.

    Attributes
    ----------
    device
        Where it runs.
    stream
        Its stream; work queued there needs no waiting between the network and what is around it.
    max_batch
        Most tiles per inference.
    """

    device: Device
    stream: Stream
    max_batch: int

    def buffers(self, batch: int) -> tuple[int, int]:
        """Addresses for the tiles and the scores of a batch; the same ones in every call.

        Raises
        ------
        DeviceMemoryError
            If there is no room for them.
        """

    def infer_device(self, tiles: int, scores: int, n: int, stream: Stream) -> None:
        """Queue the inference of n tiles (n, H, W, C) at an address to scores (n, K, H, W)."""


class BatchBuffers:
    """Tiles and scores of one batch in device memory, kept from slide to slide.

    A captured graph holds their addresses, so they may not move.
    """

    def __init__(self, device: Device, card: ModelCard) -> None:
        self._device, self._card = device, card
        self._taken: tuple[int, int, int] | None = None  # batch, tiles, scores

    def get(self, batch: int) -> tuple[int, int]:
        """Addresses for at least ``batch`` tiles and their scores."""
        if self._taken is None or self._taken[0] < batch:
            self.close()
            tiles = self._device.alloc(batch * tile_bytes(self._card))
            try:
                scores = self._device.alloc(batch * score_bytes(self._card))
            except DeviceMemoryError:
                self._device.free(tiles)
                raise
            self._taken = batch, tiles, scores
        return self._taken[1:]

    def close(self) -> None:
        """Give them back."""
        if self._taken is not None:
            self._device.synchronize()
            _, tiles, scores = self._taken
            self._taken = None
            self._device.free(tiles)
            self._device.free(scores)


def tile_bytes(card: ModelCard) -> int:
    """Size of one tile of the network's input."""
    return card.tile_px**2 * card.channels


def score_bytes(card: ModelCard) -> int:
    """Size of the scores of one tile."""
    return card.tile_px**2 * len(card.classes)


def infer_arrays(engine: DeviceEngine, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Run an engine on tiles in host memory: up, through the network, down, and wait.

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
    scores = np.empty((len(tiles), len(card.classes), card.tile_px, card.tile_px), np.uint8)
    up, down = device.pinned(batch * tile_bytes(card)), device.pinned(batch * score_bytes(card))
    try:
        for first in range(0, len(tiles), batch):
            some = tiles[first : first + batch]
            n = len(some)
            up[: some.size] = some.reshape(-1)
            device.upload(tiles_at, up[: some.size], stream)
            engine.infer_device(tiles_at, scores_at, n, stream)
            size = n * score_bytes(card)
            device.download(down[:size], scores_at, stream)
            stream.synchronize()
            scores[first : first + n] = down[:size].reshape(n, *scores.shape[1:])
    finally:
        with suppress(DeviceError):  # a failed inference matters more
            stream.synchronize()
        device.unpin(up)
        device.unpin(down)
    return scores

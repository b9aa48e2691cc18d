"""The reference that a wrapped graph has to reproduce: the file in ONNX Runtime, the rest in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.export.external.activation import LABELS, TOLERANCE
from histostream.export.external.network import ExternalNetwork, Tiles
from histostream.export.external.output import OutputFormat
from histostream.export.external.scoring import Scoring
from histostream.export.graph.model import GraphError


@dataclass(frozen=True, slots=True)
class Reference:
    """The unchanged network with pre- and post-processing in NumPy."""

    network: ExternalNetwork
    output_format: OutputFormat
    scoring: Scoring

    def __call__(self, tiles: Tiles) -> NDArray[np.float32]:
        """Map tiles (N, H, W, C) to scores (N, K, H, W), one tile at a time; they are not rounded.

        Raises
        ------
        GraphError
            If the network's output for a tile is not what it was taken for.
        """
        return np.concatenate([self._scores(tile[None]) for tile in tiles])

    def _scores(self, tile: Tiles) -> NDArray[np.float32]:
        output = self.network.run(self.network.source.normalised(tile))
        self._check(output)
        scores = self.scoring.scores(self.output_format.to_tile(output))
        return place(scores, self.output_format.border_px, self.network.source.tile_px)

    def _check(self, output: NDArray[Any]) -> None:
        """Refuse values that contradict what was decided on other tiles."""
        low, high, classes = output.min(), output.max(), len(self.scoring.classes)
        if self.scoring.activation == LABELS and (low < 0 or high >= classes):
            raise GraphError(
                f"the network gives the label {int(low if low < 0 else high)}, and {classes} classes were named (0 to "
                f"{classes - 1}): name as many with --classes as it has labels"
            )
        if self.scoring.activation == "none" and not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            raise GraphError(
                f"the output was taken for probabilities, and goes from {low:.3g} to {high:.3g} on a further tile: "
                "pass --activation softmax or --activation sigmoid"
            )


def place(scores: NDArray[np.float32], border_px: int, tile_px: int) -> NDArray[np.float32]:
    """Lay scores (N, K, h, w) on a tile at a distance from its top left corner; the rim repeats the nearest score."""
    more = max(tile_px - border_px - scores.shape[2], 0)
    scores = np.pad(scores, ((0, 0), (0, 0), (border_px, more), (border_px, more)), mode="edge")
    return scores[:, :, :tile_px, :tile_px]

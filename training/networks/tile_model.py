"""The tile contract that deployed networks keep: uint8 tiles in, float16 scores out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Scores that are not the largest of their pixel stay at least m / 512 + 1 / 8192 below the largest, m. Two numbers so
# far apart differ after rounding to float16 and then to 14 bits, so rounding never changes the label.
MARGIN_RATIO, MARGIN_STEP = 2**-9, 2**-13


class TileModel(nn.Module):
    """Maps tiles, uint8 (N, H, W, C), to float16 (N, K, H, W) in [0, 1]; the arg-max over K is the label.

    A method's subclass gives `scores`. Its first child is the network that is deployed.
    """

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the scores, rounded so that their arg-max stays."""
        return rounded(self.unrounded(tiles))

    def unrounded(self, tiles: Tensor) -> Tensor:
        """Return the scores in float32, whose arg-max is the label of the trained network."""
        # Cast before transpose: TensorRT refuses a uint8 transpose.
        return self.scores(tiles.to(torch.float32).permute(0, 3, 1, 2))

    def scores(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W), 0..255, to scores (N, K, H, W) in [0, 1], as a probability of each class."""
        raise NotImplementedError


def rounded(scores: Tensor) -> Tensor:
    """Round scores (N, K, H, W) in [0, 1] to float16, so that the arg-max over K stays.

    Only scores within 0.2 % of the largest of their pixel (and 0.0001) are changed by more than float16 rounds.
    """
    largest = scores.amax(dim=1, keepdim=True)
    below = largest.clamp(max=1) * (1 - MARGIN_RATIO) - MARGIN_STEP
    apart = torch.where(scores < largest, torch.minimum(scores, below), scores.clamp(min=MARGIN_STEP))
    return apart.clamp(0, 1).to(torch.float16)

"""The tile contract that deployed networks keep: uint8 tiles in, uint8 scores out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TileModel(nn.Module):
    """Maps tiles, uint8 (N, H, W, C), to uint8 (N, K, H, W); the arg-max over K is the label.

    A method's subclass gives `scores`. Its first child is the network that is deployed.
    """

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the rounded scores."""
        # Cast before transpose: TensorRT refuses a uint8 transpose.
        scores = self.scores(tiles.to(torch.float32).permute(0, 3, 1, 2))
        return torch.clamp(scores + 0.5, 0, 255).to(torch.uint8)

    def scores(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W), 0..255, to scores (N, K, H, W) in 0..255: 255 times a probability."""
        raise NotImplementedError

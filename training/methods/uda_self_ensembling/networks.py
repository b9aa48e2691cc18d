"""The U-Net of CellSegUDA: transposed convolutions, batch normalisation."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from histostream.training.networks.unet import check_sides, double_conv

STRIDE_PX = 16  # four poolings


class BatchNormUNet(nn.Module):
    """The U-Net that CellSegUDA (Haq and Huang 2020) segments and reconstructs with.

    Double convolutions of 1, 2, 4, 8 and 8 times ``base_width`` with 2x2 max pooling between
    them; back up, transposed convolutions that keep the channels, the encoder's map beside it, and
    double convolutions of 4, 2, 1 and 1 times ``base_width``; a linear 1x1 head. With width 64 it
    has 14.8 M parameters. Weights start as PyTorch makes them, as in the cited code.

    H and W must be multiples of 16, so that no map has to be padded to meet its counterpart.

    Parameters
    ----------
    in_channels, out_channels
        Channels of the input and of the output.
    base_width
        Channels of the finest stage.
    """

    def __init__(self, in_channels: int, out_channels: int, *, base_width: int) -> None:
        super().__init__()
        down = tuple(base_width * times for times in (1, 2, 4, 8, 8))
        up = tuple(base_width * times for times in (8, 4, 2, 1, 1))
        self.first = double_conv(in_channels, base_width, norm="batch")
        self.down = nn.ModuleList(double_conv(a, b, norm="batch") for a, b in pairwise(down))
        self.pool = nn.MaxPool2d(2)
        self.rise = nn.ModuleList(nn.ConvTranspose2d(a, a, 2, stride=2) for a in up[:-1])
        self.up = nn.ModuleList(double_conv(2 * a, b, norm="batch") for a, b in pairwise(up))
        self.head = nn.Conv2d(base_width, out_channels, 1)
        self.stride_px = STRIDE_PX

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H, W), without an activation."""
        check_sides(x, self.stride_px)
        maps = [self.first(x)]
        for stage in self.down:
            maps.append(stage(self.pool(maps[-1])))
        y = maps.pop()
        for rise, stage in zip(self.rise, self.up, strict=True):
            y = stage(torch.cat([maps.pop(), rise(y)], dim=1))
        out: Tensor = self.head(y)
        return out

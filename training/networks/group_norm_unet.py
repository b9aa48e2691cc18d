"""The U-Net of APMA-Net: one encoder, a segmentation decoder with skips, one without for the image.

Layers and normalisation are those of DAMT-Net, the same first author's next paper: the page of
the APMA-Net paper that describes its networks is lost to us.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from histostream.training.networks.unet import check_sides, init_he_normal

NORMS = ("group", "none")
GROUPS = 32  # DAMT-Net
POOLINGS = 4


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm without affine part, in 32 groups; in fewer where the channels do not allow 32.

    Groups are gcd(32, channels): for the narrow networks of tests (a power of two below 32) that is
    one channel a group.
    """
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels, affine=False)


def double_conv(in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    """Twice conv3 (zero padding), GroupNorm, ReLU."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers.append(nn.Conv2d(channels, out_channels, 3, padding=1))
        if norm == "group":
            layers.append(group_norm(out_channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def widths_of(base_width: int) -> tuple[int, ...]:
    """Channels of the five stages, 64 to 1024 at the paper's scale."""
    return tuple(base_width << i for i in range(POOLINGS + 1))


class Encoder(nn.Module):
    """E: five double convolutions, 2x2 max pooling between them."""

    def __init__(self, in_channels: int, base_width: int, norm: str) -> None:
        super().__init__()
        widths = widths_of(base_width)
        self.stages = nn.ModuleList(double_conv(a, b, norm) for a, b in pairwise((in_channels, *widths)))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (N, C, H, W) to (N, width * 2^i, H / 2^i, W / 2^i), i = 0 to 4, finest first."""
        maps = [self.stages[0](x)]
        for stage in self.stages[1:]:
            maps.append(stage(self.pool(maps[-1])))
        return maps


class SegmentationDecoder(nn.Module):
    """GE: bilinear x2, conv1 that halves the channels, concatenation with the skip, double conv."""

    def __init__(self, base_width: int, classes: int, norm: str) -> None:
        super().__init__()
        coarse_to_fine = list(pairwise(reversed(widths_of(base_width))))
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in coarse_to_fine)
        self.stages = nn.ModuleList(double_conv(a, b, norm) for a, b in coarse_to_fine)
        self.head = nn.Conv2d(base_width, classes, 1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Map the encoder's maps to scores (N, K, H, W), without an activation, and f.

        f, (N, width, H, W), is the map before the last convolution.
        """
        x = maps[-1]
        for halve, stage, skip in zip(self.halve, self.stages, maps[-2::-1], strict=True):
            x = stage(torch.cat([halve(self.up(x)), skip], dim=1))
        return self.head(x), x


class GroupNormUNet(nn.Module):
    """E and GE: the plain U-Net that is deployed. H and W must be multiples of 16.

    Parameters
    ----------
    in_channels, classes
        Channels of the image and of the scores.
    base_width
        Channels of the finest stage, 64 in the paper; each coarser stage doubles them.
    norm
        "group", or "none".
    """

    stride_px = 1 << POOLINGS

    def __init__(self, in_channels: int, classes: int, *, base_width: int, norm: str = "group") -> None:
        super().__init__()
        self.encoder = Encoder(in_channels, base_width, norm)
        self.segmenter = SegmentationDecoder(base_width, classes, norm)
        self.apply(init_he_normal)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (N, C, H, W) to scores, features and the encoding.

        Returns
        -------
        scores
            (N, K, H, W), without an activation.
        features
            (N, width, H, W), f of the paper.
        encoding
            (N, 16 * width, H / 16, W / 16), all that the reconstruction decoder sees.
        """
        check_sides(x, self.stride_px)
        maps = self.encoder(x)
        scores, features = self.segmenter(maps)
        return scores, features, maps[-1]


class ReconstructionDecoder(nn.Module):
    """The decoder that makes E an auto-encoder: bilinear x2 and double conv, a linear 1x1 head.

    It takes the encoding alone: skips would make the reconstruction trivial.
    """

    def __init__(self, base_width: int, out_channels: int, norm: str = "group") -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for a, b in pairwise(reversed(widths_of(base_width))):
            stages.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            stages.append(double_conv(a, b, norm))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Conv2d(base_width, out_channels, 1)
        self.apply(init_he_normal)

    def forward(self, encoding: Tensor) -> Tensor:
        """Map (N, 16 * width, H / 16, W / 16) to the image, (N, C, H, W)."""
        image: Tensor = self.head(self.stages(encoding))
        return image

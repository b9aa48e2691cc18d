"""Discriminators that several methods use: one logit for each patch of what they judge."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from histostream.training.networks.unet import group_norm, init_he_normal


class DomainDiscriminator(nn.Module):
    """The fully convolutional discriminator of AdaptSegNet (Tsai et al. 2018, section 3.3).

    Five 4x4 convolutions of stride 2, 64-128-256-512-1, LeakyReLU 0.2 between them:
    (N, C, H, W) to logits (N, 1, H/32, W/32).

    Parameters
    ----------
    in_channels
        Channels of the predictions or features that it judges.
    widths
        Channels after each convolution but the last.
    norm
        "none", or "group": GroupNorm between them (DAMT-Net).
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        *,
        norm: str = "none",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise((in_channels, *widths))):
            layers.append(nn.Conv2d(a, b, 4, stride=2, padding=1))
            if norm == "group" and i:
                layers.append(group_norm(b))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=2, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the logit of "source" for each patch."""
        logits: Tensor = self.layers(maps)
        return logits


class Pix2PixDiscriminator(nn.Module):
    """The 70 x 70 PatchGAN of Isola et al. 2017, C64-C128-C256-C512.

    (N, C, H, W) to logits (N, 1, H/8 - 2, W/8 - 2).
    """

    def __init__(self, in_channels: int, *, base_width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, base_width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for i, stride in ((0, 2), (1, 2), (2, 1)):
            layers += [
                nn.Conv2d(base_width << i, base_width << (i + 1), 4, stride=stride, padding=1),
                nn.BatchNorm2d(base_width << (i + 1)),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(base_width << 3, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(init_he_normal)

    def forward(self, pair: Tensor) -> Tensor:
        """Return the logit of "real" for each patch."""
        logits: Tensor = self.layers(pair)
        return logits


class MultiScaleDiscriminator(nn.Module):
    """Discriminators of an input, of its half, of its quarter, ...: pix2pixHD (Wang et al. 2018).

    Parameters
    ----------
    scales
        The discriminator of each scale, finest first.
    """

    def __init__(self, scales: Iterable[nn.Module]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(scales)

    def forward(self, x: Tensor) -> list[Any]:
        """Return what the discriminator of each scale returns, finest first."""
        results = []
        for i, scale in enumerate(self.scales):
            if i:
                x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
            results.append(scale(x))
        return results

"""Domain classifiers with full connections, which fix the size of the crop; gradient reversal."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

GROUPS = 4  # of each GroupNorm; DAMT-Net


class CropClassifier(nn.Module):
    """conv3-GroupNorm-ReLU-pool2 some times, then full connections to two outputs.

    Parameters
    ----------
    in_channels, side_px
        Channels and side of the square maps that it takes.
    conv, full
        Channels after each convolution, outputs of each full connection but the last.
    """

    def __init__(self, in_channels: int, side_px: int, conv: tuple[int, ...], full: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in pairwise((in_channels, *conv)):
            layers += [nn.Conv2d(a, b, 3, padding=1), *_norm_relu(b), nn.MaxPool2d(2)]
        layers.append(nn.Flatten())
        left_px = side_px >> len(conv)
        for a, b in pairwise((conv[-1] * left_px**2, *full)):
            layers += [nn.Linear(a, b), *_norm_relu(b)]
        layers.append(nn.Linear(full[-1], 2))
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the logit of "source", (N, 1).

        It is the difference of the two outputs: the cross-entropy of two classes is the binary
        one of that logit.
        """
        source, target = self.layers(maps).split(1, dim=1)
        logit: Tensor = source - target
        return logit


def _norm_relu(channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(GROUPS, channels, affine=False), nn.ReLU(inplace=True)]


def damt_classifier(in_channels: int, side_px: int) -> CropClassifier:
    """D_feat of DAMT-Net: at 512 px its first full connection alone has 56.6 M weights."""
    return CropClassifier(in_channels, side_px, (48, 48, 48), (288, 144))


def ganin_classifier(in_channels: int, side_px: int) -> CropClassifier:
    """Roels's classifier for Ganin's method.

    His full connections are followed by BatchNorm; here it is GroupNorm, since a batch of one
    domain (two crops in the paper's schedule) would lose its domain in the batch's mean.
    """
    return CropClassifier(in_channels, side_px, (16,) * 5, (128, 32))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def reverse_gradient(x: Tensor, strength: float) -> Tensor:
    """Return ``x``; its gradient is multiplied by ``-strength`` (Ganin et al. 2016, eq. 18)."""
    reversed_: Tensor = _Reversed.apply(x, strength)  # type: ignore[no-untyped-call]
    return reversed_

"""Encoder, decoder and U-Net that methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

GROUPS = 32  # of a GroupNorm; DAMT-Net


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm without affine part, in gcd(32, channels) groups, as in DAMT-Net.

    For the narrow networks of tests (a power of two below 32) that is one channel a group.
    """
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels, affine=False)


NORMS: dict[str, Callable[[int], list[nn.Module]]] = {  # layers after a convolution, by its channels
    "none": lambda channels: [],
    "instance": lambda channels: [nn.InstanceNorm2d(channels, affine=True)],
    "batch": lambda channels: [nn.BatchNorm2d(channels)],
    "group": lambda channels: [group_norm(channels)],
}


def double_conv(
    in_channels: int, out_channels: int, *, norm: str = "none", dropout: float | None = None
) -> nn.Sequential:
    """Twice conv3, normalisation, ReLU, with dropout between; zero padding keeps H and W."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        *NORMS[norm](out_channels),
        nn.ReLU(inplace=True),
        *([] if dropout is None else [nn.Dropout(dropout)]),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        *NORMS[norm](out_channels),
        nn.ReLU(inplace=True),
    )


def widths_of(base_width: int, depth: int) -> tuple[int, ...]:
    """Channels of the stages of a U-Net, finest first: each coarser one has twice as many."""
    return tuple(base_width << i for i in range(depth + 1))


class Encoder(nn.Module):
    """Stages of double convolutions with 2x2 max pooling after each but the last.

    Maps (N, C, H, W) to one feature map per stage, finest first:
    (N, width * 2^i, H / 2^i, W / 2^i).
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], *, norm: str = "none", dropout: float | None = None
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            double_conv(a, b, norm=norm, dropout=dropout) for a, b in pairwise((in_channels, *widths))
        )
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the feature map of every stage."""
        maps = [self.stages[0](x)]
        for stage in self.stages[1:]:
            maps.append(stage(self.pool(maps[-1])))
        return maps


class Decoder(nn.Module):
    """Nearest x2 and conv3-ReLU, concatenation with the encoder's map, double convolution."""

    def __init__(self, widths: Sequence[int], *, norm: str = "none", dropout: float | None = None) -> None:
        super().__init__()
        coarse_to_fine = list(pairwise(reversed(widths)))
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(a, b, 3, padding=1),
                *NORMS[norm](b),
                nn.ReLU(inplace=True),
            )
            for a, b in coarse_to_fine
        )
        self.stages = nn.ModuleList(double_conv(2 * b, b, norm=norm, dropout=dropout) for _, b in coarse_to_fine)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the decoded map of every stage, coarsest first, shaped as the encoder's."""
        decoded = []
        x = maps[-1]
        for up, stage, skip in zip(self.up, self.stages, maps[-2::-1], strict=True):
            x = stage(torch.cat([up(x), skip], dim=1))
            decoded.append(x)
        return decoded


class UNet(nn.Module):
    """U-Net with a linear 1x1 head; without normalisation a tile's result is local.

    H and W must be multiples of ``2 ** depth``.

    Parameters
    ----------
    in_channels, out_channels
        Channels of the image and of the output.
    base_width
        Channels of the finest stage; each coarser stage doubles them.
    depth
        Number of poolings.
    dropout
        Rate of the dropout inside each double convolution, in training only.
    norm
        Name of the normalisation after each convolution, of `NORMS`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        base_width: int,
        depth: int,
        dropout: float,
        norm: str = "none",
    ) -> None:
        super().__init__()
        widths = widths_of(base_width, depth)
        self.encoder = Encoder(in_channels, widths, norm=norm, dropout=dropout)
        self.decoder = Decoder(widths, norm=norm, dropout=dropout)
        self.head = nn.Conv2d(base_width, out_channels, 1)
        self.stride_px = 1 << depth
        self.apply(init_he_normal)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H, W), without an activation."""
        check_sides(x, self.stride_px)
        out: Tensor = self.head(self.decoder(self.encoder(x))[-1])
        return out


def check_sides(x: Tensor, stride_px: int) -> None:
    """Raise ValueError unless height and width are multiples of ``stride_px``."""
    if x.shape[-2] % stride_px or x.shape[-1] % stride_px:
        raise ValueError(
            f"input is {tuple(x.shape)}; this network takes multiples of {stride_px}: pad height and width"
        )


def init_he_normal(module: nn.Module) -> None:
    """He et al. 2015 normal initialisation of a convolution, zero bias."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)

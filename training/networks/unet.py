"""The plain U-Net that iMEMS and its comparators share, and its encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def double_conv(in_channels: int, out_channels: int, dropout: float) -> nn.Sequential:
    """conv3-ReLU, dropout, conv3-ReLU; zero padding keeps H and W."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class Encoder(nn.Module):
    """Stages of double convolutions with 2x2 max pooling after each but the last.

    Maps (N, C, H, W) to one feature map per stage, finest first:
    (N, width * 2^i, H / 2^i, W / 2^i).
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        inputs = (in_channels, *widths)
        self.stages = nn.ModuleList(
            double_conv(a, b, dropout) for a, b in zip(inputs, widths, strict=False)
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

    def __init__(self, widths: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        coarse_to_fine = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(a, b, 3, padding=1),
                nn.ReLU(inplace=True),
            )
            for a, b in coarse_to_fine
        )
        self.stages = nn.ModuleList(double_conv(2 * b, b, dropout) for _, b in coarse_to_fine)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return the finest decoded map, (N, widths[0], H, W)."""
        x = maps[-1]
        for up, stage, skip in zip(self.up, self.stages, maps[-2::-1], strict=True):
            x = stage(torch.cat([up(x), skip], dim=1))
        return x


class UNet(nn.Module):
    """U-Net with a linear 1x1 head; no normalisation layer, so a tile's result is local.

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
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, base_width: int, depth: int, dropout: float
    ) -> None:
        super().__init__()
        widths = tuple(base_width << i for i in range(depth + 1))
        self.encoder = Encoder(in_channels, widths, dropout)
        self.decoder = Decoder(widths, dropout)
        self.head = nn.Conv2d(base_width, out_channels, 1)
        self.out_channels = out_channels
        self.stride_px = 1 << depth
        self.apply(init_he_normal)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H, W), without an activation."""
        if x.shape[-2] % self.stride_px or x.shape[-1] % self.stride_px:
            raise ValueError(
                f"input is {tuple(x.shape)}; this network takes multiples of {self.stride_px}: "
                "pad height and width"
            )
        out: Tensor = self.head(self.decoder(self.encoder(x)))
        return out


def init_he_normal(module: nn.Module) -> None:
    """He et al. 2015 normal initialisation of a convolution, zero bias."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)

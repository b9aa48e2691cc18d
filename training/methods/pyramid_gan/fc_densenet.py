"""FC-DenseNet (Jegou et al. 2017, "The one hundred layers tiramisu"), as small as m-FCDenseNet."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from histostream.training.networks.unet import check_sides


class FCDenseNet(nn.Module):
    """A U-Net of dense blocks: each layer sees the maps of all layers before it.

    The defaults are m-FCDenseNet, the segmenter of the pyramid GAN (Li et al. 2021):
    1 + 7 x 5 + 3 + 3 = 42 layers, 966,050 parameters with 5 input channels and 2 classes. The
    paper says "42 layers, roughly 1 M parameters"; the layers are those of the authors' code of
    FC-DenseNet. H and W must be multiples of ``2 ** poolings``.

    Parameters
    ----------
    in_channels, out_channels
        Channels of the input and of the scores.
    first_width
        Channels of the first convolution.
    growth
        Maps that each layer adds.
    layers
        Of each dense block.
    poolings
        Blocks on the way down; as many again on the way up, one between.
    dropout
        Rate of the dropout after each convolution, in training only.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        first_width: int = 48,
        growth: int = 12,
        layers: int = 5,
        poolings: int = 3,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        added = growth * layers
        skips = [first_width + added * (i + 1) for i in range(poolings)]
        risen = [added + skip for skip in reversed(skips)]
        self.first = nn.Conv2d(in_channels, first_width, 3, padding=1)
        self.down = nn.ModuleList(DenseBlock(skip - added, growth, layers, dropout) for skip in skips)
        self.shrink = nn.ModuleList(_transition_down(skip, dropout) for skip in skips)
        self.middle = DenseBlock((first_width, *skips)[-1], growth, layers, dropout)
        # Stride 2 with these paddings doubles H and W exactly: nothing has to be cropped.
        self.rise = nn.ModuleList(
            nn.ConvTranspose2d(added, added, 3, stride=2, padding=1, output_padding=1) for _ in skips
        )
        self.up = nn.ModuleList(DenseBlock(width, growth, layers, dropout) for width in risen)
        self.head = nn.Conv2d((first_width, *risen)[-1] + added, out_channels, 1)
        self.stride_px = 1 << poolings
        self.apply(_init_he_uniform)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H, W), without an activation."""
        check_sides(x, self.stride_px)
        x = self.first(x)
        skips = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            skips.append(torch.cat([x, block(x)], dim=1))
            x = shrink(skips[-1])
        new = self.middle(x)
        for rise, block in zip(self.rise, self.up, strict=True):
            x = torch.cat([rise(new), skips.pop()], dim=1)
            new = block(x)
        scores: Tensor = self.head(torch.cat([x, new], dim=1))
        return scores


class DenseBlock(nn.Module):
    """Layers of BN, ReLU, conv3, dropout, each on what came in and all maps added so far."""

    def __init__(self, in_channels: int, growth: int, layers: int, dropout: float) -> None:
        super().__init__()
        widths = range(in_channels, in_channels + growth * (layers + 1), growth)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(before),
                nn.ReLU(inplace=True),
                nn.Conv2d(before, after - before, 3, padding=1),
                nn.Dropout(dropout),
            )
            for before, after in pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the maps that the block adds, (N, growth * layers, H, W)."""
        added: list[Tensor] = []
        for layer in self.layers:
            added.append(layer(torch.cat([x, *added], dim=1)))
        return torch.cat(added, dim=1)


def _transition_down(channels: int, dropout: float) -> nn.Sequential:
    """BN, ReLU, conv1 of the same width, dropout, 2x2 max pooling."""
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 1),
        nn.Dropout(dropout),
        nn.MaxPool2d(2),
    )


def _init_he_uniform(module: nn.Module) -> None:
    """He et al. 2015 uniform initialisation, zero bias; as in the authors' code."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)

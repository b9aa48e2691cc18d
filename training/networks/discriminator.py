"""Patch discriminators of conditional GANs: one logit for each patch of an image-output pair."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from histostream.training.networks.unet import double_conv, init_he_normal


class EncoderDiscriminator(nn.Module):
    """The U-Net's encoder with a convolutional head: (N, C, H, W) to logits (N, 1, H/16, W/16).

    Four stages of double convolution and max pooling, conv3-ReLU, conv3. "Same operations as the
    generator's encoder" (iMEMS, section III-B); the sigmoid is in the loss.
    """

    def __init__(self, in_channels: int, *, base_width: int, dropout: float) -> None:
        super().__init__()
        widths = [in_channels, *(base_width << i for i in range(4))]
        stages: list[nn.Module] = []
        for a, b in pairwise(widths):
            stages += [double_conv(a, b, dropout), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(
            *stages,
            nn.Conv2d(widths[-1], widths[-1], 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(widths[-1], 1, 3, padding=1),
        )
        self.apply(init_he_normal)

    def forward(self, pair: Tensor) -> Tensor:
        """Return the logit of "real" for each patch."""
        logits: Tensor = self.layers(pair)
        return logits


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
                layers.append(nn.GroupNorm(min(32, b), b, affine=False))
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

"""The networks of APMA-Net: one encoder, a segmentation decoder with skips, one without for the image.

Layers and normalisation are those of DAMT-Net, the same first author's next paper: the page of
the APMA-Net paper that describes its networks is missing from our copy.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from histostream.training.networks.unet import Encoder, check_sides, double_conv, init_he_normal, widths_of

POOLINGS = 4
CLASSIFIER_GROUPS = 4  # of each GroupNorm of a classifier; DAMT-Net


class SegmentationDecoder(nn.Module):
    """GE: bilinear x2, conv1 that halves the channels, concatenation with the skip, double conv."""

    def __init__(self, base_width: int, classes: int, norm: str) -> None:
        super().__init__()
        coarse_to_fine = list(pairwise(reversed(widths_of(base_width, POOLINGS))))
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in coarse_to_fine)
        self.stages = nn.ModuleList(double_conv(a, b, norm=norm) for a, b in coarse_to_fine)
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
        self.encoder = Encoder(in_channels, widths_of(base_width, POOLINGS), norm=norm)
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
        for a, b in pairwise(reversed(widths_of(base_width, POOLINGS))):
            stages.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            stages.append(double_conv(a, b, norm=norm))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Conv2d(base_width, out_channels, 1)
        self.apply(init_he_normal)

    def forward(self, encoding: Tensor) -> Tensor:
        """Map (N, 16 * width, H / 16, W / 16) to the image, (N, C, H, W)."""
        image: Tensor = self.head(self.stages(encoding))
        return image


# ----------------------------------------------------------------------------- classifiers of domains


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
    return [nn.GroupNorm(CLASSIFIER_GROUPS, channels, affine=False), nn.ReLU(inplace=True)]


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

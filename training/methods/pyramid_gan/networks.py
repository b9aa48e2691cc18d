"""Networks of the pyramid GAN: generators, the discriminators that judge them, both pyramids.

Level 0 is the finest; level n has 1 / 2^n of its height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histostream.training.losses import one_hot
from histostream.training.methods.pyramid_gan.fc_densenet import FCDenseNet
from histostream.training.networks.discriminator import MultiScaleDiscriminator, Pix2PixDiscriminator

SINGAN_LAYERS = 5  # convolutions of SinGAN's trunk


# ----------------------------------------------------------------------------- levels


def halved(x: Tensor, levels: int) -> list[Tensor]:
    """Return (N, C, H, W) and its halves, finest first: the mean of 2 x 2 pixels each time."""
    images = [x]
    for _ in range(levels - 1):
        images.append(F.avg_pool2d(images[-1], 2))
    return images


def up2(x: Tensor) -> Tensor:
    """Bilinear x2, half-pixel centres: the arrow of equation 1."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def one_hot_levels(labels: Tensor, classes: int, levels: int) -> list[Tensor]:
    """Return labels (N, H, W) and their nearest down-samplings as masks (N, K, h, w), finest first.

    An ignored label has no class: its mask is 0.

    The centre of a coarse pixel is a corner of four fine ones; that below it on the right is taken.
    """
    steps = [1 << level for level in range(levels)]
    return [one_hot(labels[:, step // 2 :: step, step // 2 :: step], classes).float() for step in steps]


# ----------------------------------------------------------------------------- generators


class Generator(nn.Module):
    """G_n of equation 1: what the coarser level painted, and what a trunk Phi_n adds to it.

    Parameters
    ----------
    trunk
        Phi_n: mask and image in, an image of the same size out.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.apply(_init_gan)

    def forward(self, mask: Tensor, noise: Tensor, coarser: Tensor) -> Tensor:
        """Paint a mask.

        Parameters
        ----------
        mask
            y_n, (N, K, H, W), one-hot.
        noise
            z_n, (N, C, H, W), with its amplitude.
        coarser
            The image of the coarser level, brought to this size; zeros at the coarsest.

        Returns
        -------
        (N, C, H, W), about [-1, 1]; it is cut to that only where it leaves the pyramid.
        """
        painted: Tensor = coarser + self.trunk(torch.cat([mask, noise + coarser], dim=1))
        return painted


def singan_trunk(in_channels: int, out_channels: int, width: int) -> nn.Sequential:
    """Make SinGAN's five conv3 of ``width`` channels, BN and LeakyReLU 0.2 between them, tanh."""
    layers: list[nn.Module] = []
    for before in (in_channels, *[width] * (SINGAN_LAYERS - 2)):
        layers += [
            nn.Conv2d(before, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(width, out_channels, 3, padding=1), nn.Tanh())


def resnet_trunk(in_channels: int, out_channels: int, width: int, downs: int, blocks: int) -> nn.Sequential:
    """Make the global generator of pix2pixHD (Wang et al. 2018): down, residual blocks, up.

    H and W must be multiples of ``2 ** downs``.
    """
    widths = [width << i for i in range(downs + 1)]
    layers: list[nn.Module] = [
        nn.ReflectionPad2d(3),
        nn.Conv2d(in_channels, width, 7),
        *_norm_relu(width),
    ]
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), *_norm_relu(b)]
    layers += [ResidualBlock(widths[-1]) for _ in range(blocks)]
    for a, b in pairwise(reversed(widths)):
        layers += [
            nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1),
            *_norm_relu(b),
        ]
    layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, out_channels, 7), nn.Tanh()]
    return nn.Sequential(*layers)


class ResidualBlock(nn.Module):
    """Two mirrored conv3 with instance normalisation, added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            *_norm_relu(channels),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        out: Tensor = x + self.layers(x)
        return out


def _norm_relu(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)


class Pix2PixUNet(nn.Module):
    """The U-Net generator of pix2pix (Isola et al. 2017, section 6.1.1).

    ``downs`` conv4 of stride 2, C64-C128-C256-C512-...-C512, and as many transposed ones back up,
    with skips; BN but at the two ends, dropout in the first three on the way up. H and W must be
    multiples of ``2 ** downs``: 256 with the paper's eight.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, downs: int) -> None:
        super().__init__()
        widths = [width << min(i, 3) for i in range(downs)]
        down: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1)]
        for i, (a, b) in enumerate(pairwise(widths), start=2):
            norm = [nn.BatchNorm2d(b)] if i < downs else []  # the last map may have one pixel
            layers = [nn.LeakyReLU(0.2), nn.Conv2d(a, b, 4, stride=2, padding=1), *norm]
            down.append(nn.Sequential(*layers))
        up: list[nn.Module] = []
        into = widths[-1]
        for i, b in enumerate(reversed(widths[:-1])):
            up.append(
                nn.Sequential(
                    nn.ReLU(),
                    nn.ConvTranspose2d(into, b, 4, stride=2, padding=1),
                    nn.BatchNorm2d(b),
                    nn.Dropout(0.5 if i < 3 else 0.0),
                )
            )
            into = 2 * b
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.head = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(into, out_channels, 4, stride=2, padding=1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, K + C, H, W) to an image (N, C, H, W) in [-1, 1]."""
        maps = []
        for stage in self.down:
            x = stage(x)
            maps.append(x)
        maps.pop()
        for stage in self.up:
            x = torch.cat([stage(x), maps.pop()], dim=1)
        image: Tensor = self.head(x)
        return image


def _init_gan(module: nn.Module) -> None:
    """Draw weights of deviation 0.02, those of batch normalisation about 1; as DCGAN."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


# ----------------------------------------------------------------------------- discriminators

Judged = list[list[Tensor]]  # the maps of each scale, the last of them logits of "real"


class PatchFeatures(nn.Module):
    """One discriminator of pix2pixHD: five conv4, of stride 2 three times; returns all its maps."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        widths = (in_channels, width, 2 * width, 4 * width, 8 * width)
        stages: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            conv = nn.Conv2d(a, b, 4, stride=2 if i < 3 else 1, padding=2)
            norm = [nn.InstanceNorm2d(b)] if i else []
            stages.append(nn.Sequential(conv, *norm, nn.LeakyReLU(0.2)))
        stages.append(nn.Conv2d(widths[-1], 1, 4, padding=2))
        self.stages = nn.ModuleList(stages)

    def forward(self, pair: Tensor) -> list[Tensor]:
        """Map (N, C, H, W) to the map of each stage; the last is (N, 1, about H/8, W/8) logits."""
        maps = [pair]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


def multi_scale_discriminator(in_channels: int, width: int, scales: int) -> MultiScaleDiscriminator:
    """Make D_n, on the pair and on its halves (pix2pixHD); it returns the maps of each scale.

    Parameters
    ----------
    in_channels
        Of image and mask together.
    width
        Channels of the first map, 64 in the cited code.
    scales
        Three in the paper: full size, 1/2 and 1/4.
    """
    discriminator = MultiScaleDiscriminator(PatchFeatures(in_channels, width) for _ in range(scales))
    discriminator.apply(_init_gan)
    return discriminator


class PatchDiscriminator(nn.Module):
    """Pix2pix's discriminator: one scale, and no maps but its logits."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.judge = Pix2PixDiscriminator(in_channels, base_width=width)
        self.apply(_init_gan)

    def forward(self, pair: Tensor) -> Judged:
        """Map (N, C, H, W) to logits (N, 1, H/8 - 2, W/8 - 2)."""
        return [[self.judge(pair)]]


# ----------------------------------------------------------------------------- pyramids


class SegmenterPyramid(nn.Module):
    """S_N to S_n as one network: (N, C, H, W) in [-1, 1] to probabilities (N, K, H, W).

    Each level sees the image at its size and the coarser level's probabilities, equation 5 without
    noise. Down-sampling is average pooling alone, which is exact area averaging in any runtime.

    Parameters
    ----------
    segmenters
        Coarsest first; S_0 may be missing where training has not come so far, the result is then
        brought to the size of the image.
    levels
        How many there are when all are trained.
    """

    def __init__(self, segmenters: Sequence[FCDenseNet], levels: int) -> None:
        super().__init__()
        self.segmenters = nn.ModuleList(segmenters)
        self.levels = levels
        self.classes = segmenters[0].head.out_channels
        self.stride_px = segmenters[0].stride_px << (levels - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Segment at every level, coarse to fine."""
        images = halved(x, self.levels)[::-1]
        # Padded channels are zeros, which the coarsest level has in place of a coarser one.
        padded = F.pad(images[0], (0, 0, 0, 0, 0, self.classes))
        probability: Tensor = self.segmenters[0](padded).softmax(dim=1)
        for image, segmenter in zip(images[1:], self.segmenters[1:], strict=False):
            probability = segmenter(torch.cat([image, up2(probability)], dim=1)).softmax(dim=1)
        for _ in range(self.levels - len(self.segmenters)):
            probability = up2(probability)
        return probability


class GeneratorPyramid(nn.Module):
    """G_N to G_0 as one network: masks and noise of each level in, pictures out.

    Nothing in it is random, so that it can be exported; equal noise gives equal pictures.

    Parameters
    ----------
    generators
        Coarsest first.
    amplitudes
        Of the noise of each, coarsest first.
    """

    def __init__(self, generators: Sequence[nn.Module], amplitudes: Sequence[float]) -> None:
        super().__init__()
        self.generators = nn.ModuleList(generators)
        self.amplitudes = tuple(amplitudes)

    def forward(self, masks: list[Tensor], noises: list[Tensor]) -> Tensor:
        """Paint masks.

        Parameters
        ----------
        masks
            One-hot (N, K, h, w) of each level, coarsest first.
        noises
            Of standard deviation 1, (N, C, h, w), coarsest first.

        Returns
        -------
        (N, H, W, C) uint8.
        """
        image = torch.zeros_like(noises[0])
        parts = zip(self.generators, self.amplitudes, masks, noises, strict=True)
        for i, (generator, amplitude, mask, noise) in enumerate(parts):
            coarser = up2(image) if i else image
            image = generator(mask, amplitude * noise, coarser)
        # Cast after the transpose: TensorRT refuses a uint8 transpose.
        levels = (image.clamp(-1, 1) * 127.5 + 127.5 + 0.5).permute(0, 2, 3, 1)
        return levels.clamp(0, 255).to(torch.uint8)

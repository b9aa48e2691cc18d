"""The networks of segmentation by image-to-image translation: encoder, decoders, discriminators.

Layers are those of tables 2 to 9 of Vorontsov et al. Every normalisation is of one image, so that
a result does not depend on the batch that an image is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histostream.training.networks.discriminator import MultiScaleDiscriminator

EPSILON = 1e-5  # beside a standard deviation; PyTorch's of instance normalisation
FIRST_ITERATIONS = 15  # of a new weight's power iteration, as PyTorch's spectral_norm
SLOPE = 0.2  # of the leaky ReLU; paper
SCALES = 3  # of a discriminator; paper

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Norm = Callable[[int, Tensor], Tensor]  # (number of the map in its decoder, map) -> normalised map


class Conv(nn.Conv2d):
    """A convolution with mirrored borders that keeps H and W, or halves them with ``stride=2``.

    Where a map is too small to be mirrored its border is zeros, as in the authors' code.

    With ``spectral`` the weight is divided by its largest singular value (Miyato et al. 2018), from
    one power iteration at each pass in training. The vectors of the iteration are buffers ``u`` and
    ``v``, so that a run goes on from its checkpoint as it was.
    """

    u: Tensor
    v: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, spectral: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride)
        nn.init.kaiming_normal_(self.weight)
        # An even kernel has one pixel more behind, unless the stride takes it away.
        self.border = (kernel - 1) // 2, (kernel - (stride > 1)) // 2
        self.spectral = spectral
        if spectral:
            matrix = self.weight.detach().flatten(1)
            # Not random: the weights of a seed are the same without spectral normalisation.
            self.register_buffer("u", torch.ones(matrix.shape[0]))
            self.register_buffer("v", torch.ones(matrix.shape[1]))
            for _ in range(0 if matrix.is_meta else FIRST_ITERATIONS):  # without storage there is nothing to do
                self._iterate(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H / stride, W / stride), rounded up."""
        return F.conv2d(mirrored(x, *self.border), self.normalised(), self.bias, self.stride)

    def normalised(self) -> Tensor:
        """Return the weight that is used: with ``spectral``, of largest singular value 1."""
        if not self.spectral:
            return self.weight
        # In single precision whatever the networks compute in: u and v are.
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            if self.training:
                self._iterate(matrix.detach())
            # Copies: the next pass changes u and v, and the gradient of this one needs them.
            sigma = torch.dot(self.u.clone(), torch.mv(matrix, self.v.clone()))
            normalised: Tensor = self.weight / sigma
            return normalised

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> None:
        self.v.copy_(F.normalize(torch.mv(matrix.t(), self.u), dim=0))
        self.u.copy_(F.normalize(torch.mv(matrix, self.v), dim=0))

    @torch.no_grad()
    def fold(self) -> None:
        """Put the normalised weight in the place of the weight, for export."""
        if self.spectral:
            self.eval()
            self.weight.copy_(self.normalised())
            self.spectral = False
            del self.u, self.v


def fold_spectral_norm(module: AnyModule) -> AnyModule:
    """Make plain convolutions of all normalised ones in a module; returns it."""
    for layer in module.modules():
        if isinstance(layer, Conv):
            layer.fold()
    return module


def mirrored(x: Tensor, before: int, after: int) -> Tensor:
    """Mirror a map (N, C, H, W) at its four borders; zeros where it has too few pixels."""
    if not (before or after):
        return x
    pads = [before, after, before, after]
    if min(x.shape[-2:]) <= max(before, after):
        return F.pad(x, pads)
    if not torch.are_deterministic_algorithms_enabled():
        return F.pad(x, pads, mode="reflect")
    # The gradient of the above has no deterministic implementation on GPUs.
    for axis in (-2, -1):
        size = x.shape[axis]
        first = x.narrow(axis, 1, before).flip(axis)
        last = x.narrow(axis, size - 1 - after, after).flip(axis)
        x = torch.cat([first, x, last], dim=axis)
    return x


def doubled(x: Tensor) -> Tensor:
    """Repeat every row and every column."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class LayerNorm(nn.Module):
    """gamma (x - mean) / (std + 1e-5) + beta, over all of an image, with gamma, beta per channel.

    As in the authors' code, and not as in ``torch.nn.LayerNorm``: gamma starts uniform in (0, 1),
    the standard deviation is the unbiased one and epsilon is outside of its root.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        x = x.to(torch.float32)  # half precision loses such long sums
        count = math.prod(x.shape[1:])
        centred = x - x.mean((1, 2, 3), keepdim=True)
        # By the norm, whose gradient PyTorch defines where all is 0, in a flat map.
        norm: Tensor = torch.linalg.vector_norm(centred, dim=(1, 2, 3), keepdim=True)
        std = norm / math.sqrt(count - 1)
        return centred / (std + EPSILON) * self.gamma + self.beta


class DownBlock(nn.Module):
    """Instance norm, ReLU, conv3 of stride 2; added to every second pixel through conv1."""

    def __init__(self, in_channels: int, out_channels: int, *, spectral: bool) -> None:
        super().__init__()
        self.conv = Conv(in_channels, out_channels, 3, stride=2, spectral=spectral)
        self.short = Conv(in_channels, out_channels, 1, spectral=spectral)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H / 2, W / 2), rounded up."""
        # Not conv1 of stride 2, which is the same: its gradient corrupts memory on CPUs (channels
        # last; oneDNN 3.12 in PyTorch 2.13).
        second = x[..., ::2, ::2]
        y: Tensor = self.conv(F.relu(F.instance_norm(x))) + self.short(second)
        return y


class Encoder(nn.Module):
    """f: conv3 to ``width`` channels, then ``depth`` blocks that double channels and halve sides.

    Tables 2 (width 32, depth 4) and 5 (16, 5) of the paper.

    Attributes
    ----------
    stride_px
        What the sides of deployed tiles are multiples of; other images may have any.
    """

    def __init__(self, channels: int, width: int, depth: int, *, spectral: bool) -> None:
        super().__init__()
        self.stride_px = 1 << depth
        self.first = Conv(channels, width, 3, spectral=spectral)
        self.blocks = nn.ModuleList(DownBlock(width << i, width << (i + 1), spectral=spectral) for i in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map (N, C, H, W) to its code, and to the maps before each halving.

        Returns
        -------
        code
            (N, width 2^depth, H / 2^depth, W / 2^depth), sides rounded up; not negative. The last
            channels are the unique code u, all before them the common code c.
        maps
            (N, width 2^i, H / 2^i, W / 2^i), i = 0 to depth - 1: for the long skips.

        Raises
        ------
        ValueError
            If the code would be one pixel wide, which has no instance norm.
        """
        least = 2 * self.stride_px
        if min(x.shape[-2:]) < least:
            raise ValueError(f"input is {tuple(x.shape)}; this network takes {least} px or more")
        maps = [self.first(x)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return F.relu(F.instance_norm(maps.pop())), maps


class Decoder(nn.Module):
    """g: from a code to an image or to scores, with the encoder's maps beside its own.

    Each layer repeats rows and columns, convolves, and takes the long skip of its size; the last
    one only convolves. Tables 3 and 6 of the paper (kernel 3, short skips), 4 and 7 (kernel 5,
    none).

    Parameters
    ----------
    in_channels, out_channels
        Channels of the code and of the output.
    width, depth
        As of the encoder.
    kernel
        Side of the convolutions.
    short_skips
        Whether a layer adds its input, through conv1, to its output; never the first.
    skips
        The encoder's maps are "compress"ed to one channel and concatenated (paper), "concat"enated
        or "sum"med as they are, or not used ("none").
    normalise_skips
        Instance norm of the maps that "concat" and "sum" take; "compress" always has it.
    head
        "paper", or "authors_code": one more layer of constant width, and a last one of 7 x 7.
    bounded
        Whether a tanh bounds the output.
    spectral
        Whether its convolutions are normalised.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        depth: int,
        *,
        kernel: int,
        short_skips: bool,
        skips: str = "compress",
        normalise_skips: bool = True,
        head: str = "paper",
        bounded: bool = False,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        widths = [width << i for i in reversed(range(depth))]
        more = {"compress": [1] * depth, "concat": widths}.get(skips, [0] * depth)
        self.merged = [a + b for a, b in zip(widths, more, strict=True)]
        inputs = [in_channels, *self.merged[:-1]]
        self.convs = nn.ModuleList(Conv(a, b, kernel, spectral=spectral) for a, b in zip(inputs, widths, strict=True))
        self.shorts = nn.ModuleList(
            Conv(a, b, 1, spectral=spectral) for a, b in zip(inputs[1:], widths[1:], strict=True) if short_skips
        )
        self.compress = nn.ModuleList(
            Conv(channels, 1, 1, spectral=spectral) for channels in widths if skips == "compress"
        )
        self.norms = nn.ModuleList(LayerNorm(channels) for channels in self.merged)
        last = self.merged[-1]
        if head == "paper":
            self.refine: nn.Module = nn.Identity()
            self.head: nn.Module = Conv(last, out_channels, kernel, spectral=spectral)
        else:
            self.refine = Conv(last, last, kernel, spectral=spectral)
            self.head = wide_head(last, out_channels, spectral=spectral)
        self.skips, self.normalise_skips, self.bounded = skips, normalise_skips, bounded

    def forward(self, code: Tensor, maps: list[Tensor]) -> Tensor:
        """Map a code and the encoder's maps to (N, out_channels, H, W)."""
        y: Tensor = self.head(self.trunk(code, maps, lambda i, x: self.norms[i](x)))
        return torch.tanh(y) if self.bounded else y

    def trunk(self, code: Tensor, maps: list[Tensor], norm: Norm) -> Tensor:
        """Return the maps before the last layer, (N, C, H, W), normalised by ``norm``."""
        x = self._merge(self.convs[0](doubled(code)), maps, 0)
        for i in range(1, len(self.convs)):
            y = self.convs[i](doubled(F.relu(norm(i - 1, x))))
            if self.shorts:
                y = y + doubled(self.shorts[i - 1](x))  # 1 x 1: as good before the repetition
            x = self._merge(y, maps, i)
        refined: Tensor = self.refine(F.relu(norm(len(self.convs) - 1, x)))
        return refined

    def _merge(self, x: Tensor, maps: list[Tensor], i: int) -> Tensor:
        """Cut what twice a rounded side has too much, and take the long skip."""
        skip = maps[-1 - i]
        if x.shape[-2:] != skip.shape[-2:]:
            x = x[..., : skip.shape[-2], : skip.shape[-1]]
        if self.skips == "none":
            return x
        if self.normalise_skips or self.skips == "compress":
            skip = F.instance_norm(skip)
        if self.skips == "sum":
            return x + skip
        return torch.cat([x, self.compress[i](skip) if self.compress else skip], dim=1)


def wide_head(in_channels: int, out_channels: int, *, spectral: bool) -> nn.Sequential:
    """Layer norm, ReLU and conv7: the last layer of the authors' decoders."""
    conv = Conv(in_channels, out_channels, 7, spectral=spectral)
    return nn.Sequential(LayerNorm(in_channels), nn.ReLU(), conv)


class AdaptiveNorms(nn.Module):
    """Instance norms of a decoder's maps whose scales and shifts an MLP makes from the code.

    Equation 5 of the paper: AdaIN (Huang and Belongie 2017). Four linear layers of 256 units read
    the whole code, c and u, so that the size of the image is fixed.

    Parameters
    ----------
    code_channels, code_px
        Channels and side of the square code.
    channels
        Of each map.
    width
        Units of the inner layers.
    layout
        "paper": ReLU between four layers, which begin with scales about 1 and shifts about 0
        (ours). "authors_code": no activation, and the two inner layers are one.
    """

    def __init__(self, code_channels: int, code_px: int, channels: list[int], *, width: int, layout: str) -> None:
        super().__init__()
        self.counts = [2 * c for c in channels]
        inner = 2 if layout == "paper" else 1
        sizes = [code_channels * code_px**2, *[width] * (inner + 1), sum(self.counts)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.order = (0, 1, inner, inner + 1)  # of the layers; the authors' second is used twice
        self.activation: nn.Module = nn.ReLU() if layout == "paper" else nn.Identity()
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight)
        if layout == "paper":
            assert isinstance(layer, nn.Linear)
            _start_as_identity(layer, channels)

    def forward(self, code: Tensor) -> list[Tensor]:
        """Map a code to the scales and shifts of each map, (N, 2 C, 1, 1)."""
        numbers = self.layers[0](code.flatten(1))
        for i in self.order[1:]:
            numbers = self.layers[i](self.activation(numbers))
        return list(numbers[..., None, None].split(self.counts, dim=1))


def _start_as_identity(layer: nn.Linear, channels: list[int]) -> None:
    """Make a layer give scales near 1 and shifts near 0, map after map."""
    ones_and_zeros = [torch.tensor([1.0] * c + [0.0] * c) for c in channels]
    with torch.no_grad():
        layer.weight.mul_(0.01)
        layer.bias.copy_(torch.cat(ones_and_zeros))


class SeparateNorms(nn.Module):
    """Layer norms of a decoder's maps for segmentation, beside those for translation."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(c) for c in channels)

    def forward(self, i: int, x: Tensor) -> Tensor:
        """Normalise map number ``i``."""
        y: Tensor = self.norms[i](x)
        return y


class ResidualDecoder(nn.Module):
    """g_res and g_seg, which share all convolutions but the last (equation 4).

    Equation 4 prints the classification layer inside of the decoder; it is applied to its result.

    Parameters
    ----------
    image
        The decoder of the residual.
    norms
        Of the maps in segmentation.
    targets
        Number of classes without the background.
    head
        "paper": conv1 of the last maps. "authors_code": conv7 to the image's channels, then conv1.
    channels
        Of the image.
    """

    def __init__(
        self, image: Decoder, norms: AdaptiveNorms | SeparateNorms, targets: int, *, head: str, channels: int
    ) -> None:
        super().__init__()
        self.image = image
        self.norms = norms
        last = image.merged[-1]
        if head == "paper":
            self.classify: nn.Module = Conv(last, targets, 1)
        else:
            wide = wide_head(last, channels, spectral=False)
            self.classify = nn.Sequential(*wide, Conv(channels, targets, 1))

    def forward(self, code: Tensor, maps: list[Tensor], task: str = "image") -> Tensor:
        """Map code (c and u) and maps to the residual ("image"), or to logits ("labels").

        Returns
        -------
        (N, C, H, W), or (N, targets, H, W) without an activation.
        """
        if task == "image":
            residual: Tensor = self.image(code, maps)
            return residual
        logits: Tensor = self.classify(self.image.trunk(code, maps, self._norm_of(code)))
        return logits

    def _norm_of(self, code: Tensor) -> Norm:
        norms = self.norms
        if isinstance(norms, SeparateNorms):
            return norms
        numbers = norms(code)

        def adaptive(i: int, x: Tensor) -> Tensor:
            scale, shift = numbers[i].chunk(2, dim=1)
            y: Tensor = F.instance_norm(x) * scale + shift
            return y

        return adaptive


def multi_scale_discriminator(
    channels: int, width: int, stages: int, *, layout: str = "paper", spectral: bool
) -> MultiScaleDiscriminator:
    """Make a discriminator of an image, of its half and of its quarter.

    Tables 8 (width 128, 3 stages) and 9 (64, 4) of the paper: conv4, then so many times layer norm
    (not the first time, as in the authors' code), leaky ReLU and conv4 of stride 2, then conv1. It
    returns the scores of patches, (N, 1, h, w), of each scale; above 0 is real.

    Parameters
    ----------
    channels
        Of the image.
    width, stages
        Channels of the first halving, doubled by each further one, and their number.
    layout
        "paper", or "authors_code": the first convolution takes the place of the first halving, and
        normalisation and activation come before the last one too.
    spectral
        Whether the convolutions are normalised.
    """
    widths = [width << i for i in range(stages)]
    layers = _layers if layout == "paper" else _authors_layers
    return MultiScaleDiscriminator(nn.Sequential(*layers(channels, widths, spectral)) for _ in range(SCALES))


def _layers(channels: int, widths: list[int], spectral: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [Conv(channels, widths[0], 4, spectral=spectral)]
    for i, (a, b) in enumerate(pairwise([widths[0], *widths])):
        layers += _activated(a, norm=i > 0)
        layers.append(Conv(a, b, 4, stride=2, spectral=spectral))
    return [*layers, Conv(widths[-1], 1, 1, spectral=spectral)]


def _authors_layers(channels: int, widths: list[int], spectral: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [Conv(channels, widths[0], 4, stride=2, spectral=spectral)]
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += _activated(a, norm=i > 0)
        layers.append(Conv(a, b, 4, stride=2, spectral=spectral))
    layers += _activated(widths[-1], norm=True)
    return [*layers, Conv(widths[-1], 1, 1, spectral=spectral)]


def _activated(channels: int, *, norm: bool) -> list[nn.Module]:
    return [*([LayerNorm(channels)] if norm else []), nn.LeakyReLU(SLOPE)]

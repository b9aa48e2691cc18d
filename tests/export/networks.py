"""Small untrained networks with the operators of every method, each behind the tile contract."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from histostream.training.networks.tile_model import TileModel


class TileNetwork(TileModel):
    """The tile contract: uint8 (N, H, W, C) in, float16 (N, K, H, W) out; ``probs`` is in between."""

    channels: int
    classes: int

    def probs(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) in -1..1 to probabilities (N, K, H, W)."""
        raise NotImplementedError

    def scores(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) in 0..255 to probabilities."""
        return self.probs(images / 127.5 - 1)


def with_running_statistics(network: nn.Module) -> None:
    """Give every batch normalisation statistics and an affine part that are not the identity."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            nn.init.normal_(part.running_mean, 0.0, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0.0, 0.3)


def train_briefly(network: TileNetwork, tiles: Tensor, truth: Tensor, steps: int = 80) -> None:
    """Teach a network of two classes, so that its label map is one and not noise.

    Parameters
    ----------
    tiles
        (N, H, W, C) uint8.
    truth
        (N, H, W), 0 or 1.
    """
    x = tiles.to(torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    wanted = functional.one_hot(truth.long(), 2).movedim(-1, 1).to(torch.float32)
    weight = 1 + 3 * wanted[:, 1:]  # nuclei are few
    network.train()
    for _ in range(steps):
        loss = functional.binary_cross_entropy(network.probs(x), wanted, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


def bn_relu_conv(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2),
    )


class DenseBlock(nn.Module):
    """Layers that each see all maps before them; returns only the new maps."""

    def __init__(self, in_channels: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(bn_relu_conv(in_channels + i * growth, growth, 3) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        made: list[Tensor] = []
        for layer in self.layers:
            made.append(layer(torch.cat([x, *made], dim=1)))
        return torch.cat(made, dim=1)


class DenseUNet(nn.Module):
    """FC-DenseNet with one pooling; the transposed convolution is one pixel long and is cropped."""

    def __init__(self, in_channels: int, classes: int, growth: int, layers: int) -> None:
        super().__init__()
        width, made = 6, growth * layers
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down_block = DenseBlock(width, growth, layers)
        self.down = nn.Sequential(bn_relu_conv(width + made, width + made, 1), nn.MaxPool2d(2))
        self.bottom = DenseBlock(width + made, growth, layers)
        self.up = nn.ConvTranspose2d(made, made, 3, stride=2)
        self.up_block = DenseBlock(width + 2 * made, growth, layers)
        self.last = nn.Conv2d(width + 3 * made, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skip = torch.cat([x, self.down_block(x)], dim=1)
        up = self.up(self.bottom(self.down(skip)))[..., : skip.shape[-2], : skip.shape[-1]]
        x = torch.cat([up, skip], dim=1)
        out: Tensor = self.last(torch.cat([x, self.up_block(x)], dim=1))
        return out


class PyramidNet(TileNetwork):
    """Coarse to fine: each level sees its image and the softmax of the level below, enlarged."""

    def __init__(self, levels: int = 2, classes: int = 2, growth: int = 3, layers: int = 2) -> None:
        super().__init__()
        self.channels, self.classes = 3, classes
        self.levels = nn.ModuleList(DenseUNet(3 + classes, classes, growth, layers) for _ in range(levels))
        self.softmax = nn.Softmax(dim=1)
        with_running_statistics(self)

    def probs(self, x: Tensor) -> Tensor:
        images = [x]
        for _ in self.levels[1:]:
            images.append(functional.avg_pool2d(images[-1], 2))
        n, _, h, w = images[-1].shape
        below = x.new_zeros((n, self.classes, h, w))
        for level, image in zip(reversed(self.levels), reversed(images), strict=True):
            if below.shape[-1] != image.shape[-1]:
                below = functional.interpolate(below, scale_factor=2, mode="bilinear")
            below = self.softmax(level(torch.cat([image, below], dim=1)))
        return below


class LayerNorm(nn.Module):
    """Over C, H and W, with an affine part per channel; std unbiased, epsilon outside the root."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        std = x.std(dim=(1, 2, 3), keepdim=True)
        return self.weight * (x - mean) / (std + 1e-5) + self.bias


class EncoderBlock(nn.Module):
    """IN, ReLU, conv3 of stride 2 with reflection; added to every second pixel."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, padding_mode="reflect")
        self.short = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.relu(self.norm(x))) + self.short(x[..., ::2, ::2])
        return out


class TranslationNet(TileNetwork):
    """The segmentation path of image-to-image translation: encoder, residual decoder, AdaIN.

    Parameters
    ----------
    tile_px
        H and W; the MLP takes the flattened code, so they are fixed.
    norm
        Of the decoder: ``adain`` from an MLP, or ``layer`` with parameters of its own.
    """

    def __init__(self, tile_px: int = 32, norm: Literal["adain", "layer"] = "adain") -> None:
        super().__init__()
        self.channels, self.classes = 1, 2
        widths = (4, 6, 8)
        self.first = nn.Conv2d(1, widths[0], 3, padding=1, padding_mode="reflect")
        self.blocks = nn.ModuleList(EncoderBlock(a, b) for a, b in pairwise(widths))
        self.compress = nn.ModuleList(
            nn.Sequential(nn.InstanceNorm2d(width), nn.Conv2d(width, 1, 1)) for width in widths[:-1]
        )
        up = list(zip((widths[-1], widths[-2] + 1), widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.Conv2d(a, b, 5, padding=2, padding_mode="reflect") for a, b in up)
        self.normed = tuple(b + 1 for _, b in up)
        if norm == "adain":
            code = widths[-1] * (tile_px // 4) ** 2
            self.mlp = nn.Sequential(nn.Linear(code, 8), nn.ReLU(), nn.Linear(8, 2 * sum(self.normed)))
            last = self.mlp[-1]
            assert isinstance(last, nn.Linear)
            nn.init.constant_(last.bias[: sum(self.normed)], 1.0)
            nn.init.zeros_(last.bias[sum(self.normed) :])
        else:
            self.layer_norms = nn.ModuleList(LayerNorm(width) for width in self.normed)
        self.norm = norm
        self.code_norm = nn.InstanceNorm2d(widths[-1])
        self.instance_norms = nn.ModuleList(nn.InstanceNorm2d(width) for width in self.normed)
        self.head = nn.Conv2d(self.normed[-1], 2, 1)
        for conv in (self.first, *self.up, *(m for b in self.blocks for m in b.children())):
            if isinstance(conv, nn.Conv2d):
                parametrizations.spectral_norm(conv)

    def fold(self) -> TranslationNet:
        """Replace each spectrally normalised weight by its value, as export needs; return self."""
        self.eval()
        for part in self.modules():
            if parametrize.is_parametrized(part, "weight"):
                parametrize.remove_parametrizations(part, "weight")
        return self

    def probs(self, x: Tensor) -> Tensor:
        maps = [self.first(x)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        code = torch.relu(self.code_norm(maps[-1]))
        affine = self._affine(code)
        x = code
        for i, conv in enumerate(self.up):
            skip = self.compress[-1 - i](maps[-2 - i])
            x = torch.cat([conv(functional.interpolate(x, scale_factor=2)), skip], dim=1)
            if affine:
                weight, bias = affine[i]
                x = self.instance_norms[i](x) * weight + bias
            else:
                x = self.layer_norms[i](x)
            x = torch.relu(x)
        return torch.sigmoid(self.head(x))

    def _affine(self, code: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias (N, C, 1, 1) of every normalised layer; none without the MLP."""
        if self.norm == "layer":
            return []
        numbers = self.mlp(code.flatten(1))[..., None, None]
        parts = torch.split(numbers, [*self.normed, *self.normed], dim=1)
        return list(zip(parts[: len(self.normed)], parts[len(self.normed) :], strict=True))


def double_conv_group_norm(in_channels: int, out_channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.GroupNorm(groups, out_channels, affine=False),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.GroupNorm(groups, out_channels, affine=False),
        nn.ReLU(),
    )


class GroupNormNet(TileNetwork):
    """A U-Net of grey EM tiles: GroupNorm without affine part, bilinear x2, 1x1, concatenation."""

    def __init__(self, depth: int = 1, width: int = 4) -> None:
        super().__init__()
        self.channels, self.classes = 1, 2
        widths = tuple(width << i for i in range(depth + 1))
        self.down = nn.ModuleList(double_conv_group_norm(a, b, 2) for a, b in zip((1, *widths), widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)
        self.up = nn.ModuleList(double_conv_group_norm(2 * b, b, 2) for _, b in pairs)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, 2, 1)
        self.softmax = nn.Softmax(dim=1)

    def probs(self, x: Tensor) -> Tensor:
        maps = [self.down[0](x)]
        for block in self.down[1:]:
            maps.append(block(self.pool(maps[-1])))
        x = maps.pop()
        for halve, up in zip(self.halve, self.up, strict=True):
            x = halve(functional.interpolate(x, scale_factor=2, mode="bilinear"))
            x = up(torch.cat([maps.pop(), x], dim=1))
        out: Tensor = self.softmax(self.head(x))
        return out


def double_conv_batch_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class TransposedNet(TileNetwork):
    """A U-Net with batch normalisation and 2x2 transposed convolutions; one sigmoid, or softmax."""

    def __init__(self, depth: int = 1, classes: int = 1, width: int = 4) -> None:
        super().__init__()
        self.channels, self.classes = 3, classes
        widths = tuple(width << i for i in range(depth + 1))
        self.down = nn.ModuleList(double_conv_batch_norm(a, b) for a, b in zip((3, *widths), widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(a, a, 2, stride=2) for a, _ in pairs)
        self.up = nn.ModuleList(double_conv_batch_norm(a + b, b) for a, b in pairs)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, classes, 1)
        self.last = nn.Sigmoid() if classes == 1 else nn.Softmax(dim=1)
        with_running_statistics(self)

    def probs(self, x: Tensor) -> Tensor:
        maps = [self.down[0](x)]
        for block in self.down[1:]:
            maps.append(block(self.pool(maps[-1])))
        x = maps.pop()
        for enlarge, up in zip(self.enlarge, self.up, strict=True):
            x = up(torch.cat([maps.pop(), enlarge(x)], dim=1))
        out: Tensor = self.last(self.head(x))
        return out

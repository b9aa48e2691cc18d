"""The plain U-Net that iMEMS and its comparators share, and its encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORMS = ("none", "instance")


def double_conv(in_channels: int, out_channels: int, dropout: float, norm: str = "none") -> nn.Sequential:
    """conv3-ReLU, dropout, conv3-ReLU; zero padding keeps H and W.

    With ``norm="instance"`` an affine instance normalisation follows each convolution.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        *_norm(norm, out_channels),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        *_norm(norm, out_channels),
        nn.ReLU(inplace=True),
    )


def _norm(norm: str, channels: int) -> list[nn.Module]:
    return [nn.InstanceNorm2d(channels, affine=True)] if norm == "instance" else []


class Encoder(nn.Module):
    """Stages of double convolutions with 2x2 max pooling after each but the last.

    Maps (N, C, H, W) to one feature map per stage, finest first:
    (N, width * 2^i, H / 2^i, W / 2^i).
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...], dropout: float, norm: str = "none") -> None:
        super().__init__()
        inputs = (in_channels, *widths)
        self.stages = nn.ModuleList(double_conv(a, b, dropout, norm) for a, b in zip(inputs, widths, strict=False))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the feature map of every stage."""
        maps = [self.stages[0](x)]
        for stage in self.stages[1:]:
            maps.append(stage(self.pool(maps[-1])))
        return maps


class Decoder(nn.Module):
    """Nearest x2 and conv3-ReLU, concatenation with the encoder's map, double convolution."""

    def __init__(self, widths: tuple[int, ...], dropout: float, norm: str = "none") -> None:
        super().__init__()
        coarse_to_fine = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(a, b, 3, padding=1),
                *_norm(norm, b),
                nn.ReLU(inplace=True),
            )
            for a, b in coarse_to_fine
        )
        self.stages = nn.ModuleList(double_conv(2 * b, b, dropout, norm) for _, b in coarse_to_fine)

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
        "none" or "instance", after each convolution.
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
        widths = tuple(base_width << i for i in range(depth + 1))
        self.encoder = Encoder(in_channels, widths, dropout, norm)
        self.decoder = Decoder(widths, dropout, norm)
        self.head = nn.Conv2d(base_width, out_channels, 1)
        self.out_channels = out_channels
        self.stride_px = 1 << depth
        self.apply(init_he_normal)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H, W), without an activation."""
        check_sides(x, self.stride_px)
        out: Tensor = self.head(self.decoder(self.encoder(x))[-1])
        return out


class TwoDecoderUNet(nn.Module):
    """A U-Net whose encoder serves two decoders, both with skips: labels, and the image itself.

    The multi-task comparator of iMEMS (section IV). ``forward`` runs both; ``segmenter`` is the
    plain U-Net inside, which is all that is deployed.

    Parameters
    ----------
    in_channels, out_channels
        Channels of the image and of the label scores.
    base_width, depth, dropout, norm
        As `UNet`.
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
        self.segmenter = UNet(in_channels, out_channels, base_width=base_width, depth=depth, dropout=dropout, norm=norm)
        widths = tuple(base_width << i for i in range(depth + 1))
        self.image_decoder = Decoder(widths, dropout, norm)
        self.image_head = nn.Conv2d(base_width, in_channels, 1)
        self.image_decoder.apply(init_he_normal)
        self.image_head.apply(init_he_normal)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Map (N, C, H, W) to label scores, image, and the two sides of each inner level.

        Returns
        -------
        scores
            (N, K, H, W), without an activation.
        image
            (N, C, H, W), the reconstruction.
        encoded, decoded
            The encoder's and the image decoder's maps, level by level of one shape, coarsest
            first; the bottleneck, which has no counterpart, is left out.
        """
        check_sides(x, self.segmenter.stride_px)
        maps = self.segmenter.encoder(x)
        scores = self.segmenter.head(self.segmenter.decoder(maps)[-1])
        decoded = self.image_decoder(maps)
        return scores, self.image_head(decoded[-1]), maps[-2::-1], decoded


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

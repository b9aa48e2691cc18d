"""Networks of iMEMS beside the U-Net: the two-task comparator and the discriminator."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from histostream.training.networks.unet import Decoder, UNet, check_sides, double_conv, init_he_normal, widths_of


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
        self.image_decoder = Decoder(widths_of(base_width, depth), norm=norm, dropout=dropout)
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


class EncoderDiscriminator(nn.Module):
    """The U-Net's encoder with a convolutional head: (N, C, H, W) to logits (N, 1, H/16, W/16).

    Four stages of double convolution and max pooling, conv3-ReLU, conv3. "Same operations as the
    generator's encoder" (iMEMS, section III-B); the sigmoid is in the loss.
    """

    def __init__(self, in_channels: int, *, base_width: int, dropout: float) -> None:
        super().__init__()
        widths = [in_channels, *widths_of(base_width, 3)]
        stages: list[nn.Module] = []
        for a, b in pairwise(widths):
            stages += [double_conv(a, b, dropout=dropout), nn.MaxPool2d(2)]
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

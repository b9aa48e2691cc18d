"""Scores of generated images: Fréchet distance of features (FID) and MS-SSIM.

A Fréchet distance is a number about its feature extractor as much as about the images: papers'
values with another extractor are not comparable, only the order of methods under one. So a result
carries the extractor's name.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from histostream.training import checkpoint
from histostream.training.methods.imems import method as imems
from histostream.training.steps import HALF_RANGE

SHIPPED_WEIGHTS = Path(str(resources.files("histostream.training"))) / "weights" / "imems"
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest scale first
SSIM_WINDOW_PX = 11  # Wang et al. 2004: Gaussian, sigma 1.5 px
# The window must fit in the coarsest of the scales, each half as fine as the one before.
MS_SSIM_MIN_PX = SSIM_WINDOW_PX << (len(MS_SSIM_WEIGHTS) - 1)


class Extractor(nn.Module):
    """A frozen network from images to features, and the name that its scores are reported with.

    Parameters
    ----------
    name
        Names the network and its weights.
    network
        Maps (N, 3, H, W) uint8 to (N, D) floating; it is set to evaluation.
    num_features
        D.
    """

    def __init__(self, name: str, network: nn.Module, num_features: int) -> None:
        super().__init__()
        self.name = name
        self.network = network.eval().requires_grad_(False)
        self.num_features = num_features  # the name under which torchmetrics looks for it

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images (N, 3, H, W) uint8: (N, D) float64; ValueError for other images."""
        _check_uint8("images", images)
        features: Tensor = self.network(images)
        return features.to(torch.float64)


@dataclass(frozen=True, slots=True)
class FrechetScore:
    """A Fréchet distance between sets of images; it is printed with its extractor.

    Attributes
    ----------
    distance
        Squared Fréchet distance, in units of the features; 0 for equal mean and covariance.
    extractor
        Name of what made the features.
    real, generated
        Number of images in each set. A small set gives too large a distance, so compare scores of
        equal numbers only.
    """

    distance: float
    extractor: str
    real: int
    generated: int

    def __str__(self) -> str:
        return f"FID {self.distance:.4g} on {self.extractor} ({self.real} real, {self.generated} generated images)"


def nuclei_encoder(folder: Path = SHIPPED_WEIGHTS) -> Extractor:
    """Extractor of the shipped nucleus model: its encoder's coarsest map, averaged over H and W.

    It was trained on H&E at 0.5 um per pixel; images are taken as they are, at any resolution.
    Its name is ``histostream-nuclei-encoder-`` and 8 digits of the SHA-256 of the weights.

    Parameters
    ----------
    folder
        Checkpoint of an iMEMS model of RGB images.

    Raises
    ------
    CheckpointError
        If there is none, or it is damaged.
    ValueError
        If it is of another method, or of grey images.
    """
    header = checkpoint.read(folder)
    if header.method != "imems" or header.channels != 3:
        raise ValueError(f"{folder}: {header.method!r} of {header.channels} channels; give an 'imems' of 3")
    state = imems.build(imems.Config(**header.config), len(header.classes), header.channels)
    checkpoint.load(folder, state)
    generator = state.modules["generator"]
    digest = hashlib.sha256((folder / "checkpoint.safetensors").read_bytes()).hexdigest()
    width = state.config.base_width << state.config.depth
    network = _PooledEncoder(generator.get_submodule("encoder"), 1 << state.config.depth)
    return Extractor(f"histostream-nuclei-encoder-{digest[:8]}", network, width)


def frechet_inception_distance(
    real: Iterable[Tensor], generated: Iterable[Tensor], extractor: Extractor
) -> FrechetScore:
    """FID: Fréchet distance between the features of two sets of images, each taken as a Gaussian.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, with means m and unbiased covariances C, in
    float64.

    Parameters
    ----------
    real, generated
        Batches (N, 3, H, W) uint8; H and W may differ from batch to batch.
    extractor
        Such as `nuclei_encoder`; the images are brought to its device.

    Raises
    ------
    ValueError
        If a set has fewer than 2 images, or the extractor refuses a batch.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    device = next((p.device for p in extractor.parameters()), torch.device("cpu"))
    metric = FrechetInceptionDistance(feature=extractor).to(device)
    counts = {}
    for is_real, batches in ((True, real), (False, generated)):
        counts[is_real] = 0
        for batch in batches:
            metric.update(batch.to(device), real=is_real)
            counts[is_real] += len(batch)
    if min(counts.values()) < 2:
        raise ValueError(f"{counts[True]} real and {counts[False]} generated images: 2 of each needed")
    # torchmetrics' square root of a rank-deficient covariance may leave -1e-6 of the trace.
    distance = max(0.0, float(metric.compute()))
    return FrechetScore(distance, extractor.name, counts[True], counts[False])


def ms_ssim(images_a: Tensor, images_b: Tensor) -> Tensor:
    """Multi-scale structural similarity of pairs of images (Wang et al. 2003), 5 scales.

    The mean over the colour channels; a negative contrast term counts as 0, since its fractional
    power is not real.

    Parameters
    ----------
    images_a, images_b
        (N, C, H, W) uint8.

    Returns
    -------
    (N,) float32 in [0, 1]; 1 for equal images. Against float64, which takes 15 times as long on a
    CPU, it was 1e-5 off on H&E and 8e-4 at worst, on plain white.

    Raises
    ------
    ValueError
        If the shapes differ, the images are not uint8, or a side is under 176 pixels: the 11-pixel
        window would not fit in the coarsest scale.
    """
    if images_a.shape != images_b.shape:
        raise ValueError(f"images are {tuple(images_a.shape)} and {tuple(images_b.shape)}")
    _check_uint8("images", images_a)
    _check_uint8("images", images_b)
    if min(images_a.shape[-2:]) < MS_SSIM_MIN_PX:
        raise ValueError(
            f"images are {images_a.shape[-1]}x{images_a.shape[-2]} px; MS-SSIM of "
            f"{len(MS_SSIM_WEIGHTS)} scales takes sides of {MS_SSIM_MIN_PX} px or more"
        )
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    score = multiscale_structural_similarity_index_measure(
        images_a.to(torch.float32),
        images_b.to(torch.float32),
        kernel_size=SSIM_WINDOW_PX,
        reduction="none",
        data_range=255.0,
        betas=MS_SSIM_WEIGHTS,
        normalize="relu",
    )
    return score.reshape(-1)  # torchmetrics drops the axis of a single image


def ms_ssim_among(samples: Tensor) -> float:
    """Mean MS-SSIM over all pairs of images: 1 if a generator gives the same image each time.

    Parameters
    ----------
    samples
        (N, C, H, W) uint8, N at least 2; as `ms_ssim`.

    Raises
    ------
    ValueError
        As `ms_ssim`, or if there are fewer than 2 images.
    """
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} images make no pair: give 2 or more")
    pairs = itertools.combinations(range(len(samples)), 2)
    # one pair at a time, for the maps of 45 pairs of 512 px images are gigabytes
    scores = [float(ms_ssim(samples[i : i + 1], samples[j : j + 1])) for i, j in pairs]
    return sum(scores) / len(scores)


class _PooledEncoder(nn.Module):
    """An encoder behind the normalisation of iMEMS; global average of its coarsest map."""

    def __init__(self, encoder: nn.Module, stride_px: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.stride_px = stride_px

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < self.stride_px:
            raise ValueError(
                f"images are {images.shape[-1]}x{images.shape[-2]} px; "
                f"this encoder takes sides of {self.stride_px} px or more"
            )
        coarsest: Tensor = self.encoder(images.to(torch.float32) / HALF_RANGE - 1)[-1]
        return coarsest.mean(dim=(2, 3))


def _check_uint8(name: str, images: Tensor) -> None:
    if images.ndim != 4 or images.dtype != torch.uint8:
        raise ValueError(f"{name} are {tuple(images.shape)} {images.dtype}: give (N, C, H, W) uint8, 0 to 255")

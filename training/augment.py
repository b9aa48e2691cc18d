"""Random variations of stained images: position, size, stain, light, focus, coding, warps.

Variations of stained tissue are computed here for one crop, in numpy, from the generator that is
passed in. Rotations, elastic warps, colour jitter and motion blur are kornia's, on whole batches on
their device (`warp`). Both repeat exactly from a run's seed.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from histostream.training.checks import Range, Share, check_fields
from histostream.training.data import IGNORED, Sample

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]

# Optical densities of the stains in R, G, B; Ruifrok & Johnston 2001.
HAEMATOXYLIN = np.array((0.650, 0.704, 0.286), np.float32)
EOSIN = np.array((0.072, 0.990, 0.105), np.float32)
DAB = np.array((0.268, 0.570, 0.776), np.float32)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How crops are drawn and varied; the defaults vary the position of the crop alone.

    Attributes
    ----------
    flips
        Flips and quarter turns.
    object_px
        Zoom each image so that its median object has this diameter in pixels (sets without a
        pixel size); 0 keeps the size.
    zoom
        Further random zoom, log-uniform between 1/zoom and zoom.
    stain
        Strength of random gains and offsets of the haematoxylin, eosin and residual channels
        (Tellez et al. 2018); 0 is off.
    restain
        Share of crops whose ground is replaced: the labelled objects keep their own density
        in haematoxylin, on a synthetic ground of eosin, fibres, bundles and gaps, so that a
        network learns nuclei and not everything purple or dark.
    light
        Strength of random brightness, contrast and gamma; 0 is off.
    focus
        Largest Gaussian blur, in pixels.
    noise
        Largest standard deviation of pixel noise, in grey levels.
    jpeg
        Share of crops that are coded as JPEG of random quality.
    rotate
        Largest rotation, in degrees, besides the quarter turns; the image is mirrored outside.
    elastic
        Strength of a smooth random warp, about its largest displacement in pixels; 0 is off.
    color_jitter
        Strength of kornia's jitter of brightness, contrast, saturation (each by this share) and
        hue (a quarter of it, in turns); grey images: brightness and contrast.
    motion_blur
        Length in pixels of a random linear blur, in half of the crops; 0 is off, else 3 or more.
    """

    flips: bool = False
    object_px: Annotated[float, Range(1, 4096, off=0)] = 0.0
    zoom: Annotated[float, Range(1, 8)] = 1.0
    stain: Share = 0.0
    restain: Share = 0.0
    light: Share = 0.0
    focus: Annotated[float, Range(0, 64)] = 0.0
    noise: Annotated[float, Range(0, 255)] = 0.0
    jpeg: Share = 0.0
    rotate: Annotated[float, Range(0, 180)] = 0.0
    elastic: Annotated[float, Range(0, 256)] = 0.0
    color_jitter: Share = 0.0
    motion_blur: Annotated[int, Range(3, 255, off=0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)


def draw_crop(
    sample: Sample,
    crop_px: int,
    augmentation: Augmentation,
    typical_object_px: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Cut and vary one square crop.

    Parameters
    ----------
    sample
        The image.
    crop_px
        Side of the crop.
    augmentation
        What to vary.
    typical_object_px
        Object diameter to assume where the image itself has no object.
    rng
        Source of all randomness.

    Returns
    -------
    (crop_px, crop_px, C) uint8 pixels and (crop_px, crop_px) uint8 labels.
    """
    factor = object_zoom(sample.object_px, augmentation, typical_object_px) * augmentation.zoom ** rng.uniform(-1, 1)
    image, labels = zoom(sample.image, sample.labels, factor)
    image, labels = _crop(image, labels, crop_px, rng)
    return _vary(image, labels, augmentation, rng)


def draw_whole(
    sample: Sample,
    augmentation: Augmentation,
    typical_object_px: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Vary a whole image, as `draw_crop` does, without cutting it; returns (H, W, C) and (H, W)."""
    factor = object_zoom(sample.object_px, augmentation, typical_object_px)
    image, labels = zoom(sample.image, sample.labels, factor)
    return _vary(image, labels, augmentation, rng)


def warp(images: Tensor, labels: Tensor, augmentation: Augmentation) -> tuple[Tensor, Tensor]:
    """Rotate, warp, jitter and blur a batch by kornia, on its device, from torch's seed.

    Parameters
    ----------
    images
        (N, C, H, W) uint8.
    labels
        (N, H, W) int64; warped with the images, without interpolation.

    Returns
    -------
    Both, of the same types.
    """
    a = augmentation
    if not (a.rotate or a.elastic or a.color_jitter or a.motion_blur):
        return images, labels
    pixels, maps = _warps(a, images.shape[1])(images.float() / 255, labels[:, None].float())
    return (
        (pixels * 255).round().clamp(0, 255).to(images.dtype),
        maps[:, 0].round().to(labels.dtype),
    )


@functools.cache
def _warps(a: Augmentation, channels: int) -> Any:
    import kornia.augmentation as kornia
    from kornia.constants import DataKey, Resample, SamplePadding

    steps: list[Any] = []
    if a.rotate:
        steps.append(kornia.RandomAffine(a.rotate, p=1.0, padding_mode=SamplePadding.REFLECTION.name))
    if a.elastic:
        # sigma is a quarter of the kernel's side, so that the displacement is smooth.
        steps.append(
            kornia.RandomElasticTransform(
                (63, 63),
                (16.0, 16.0),
                (a.elastic / 16, a.elastic / 16),
                p=1.0,
                padding_mode="reflection",
            )
        )
    if a.color_jitter:
        j = a.color_jitter
        color = (j, j / 4) if channels == 3 else (0.0, 0.0)
        steps.append(kornia.ColorJiggle(j, j, *color, p=1.0))
    if a.motion_blur:
        steps.append(kornia.RandomMotionBlur((3, a.motion_blur | 1), 180.0, 0.5, p=0.5))
    nearest = {"resample": Resample.NEAREST, "align_corners": False}
    return kornia.AugmentationSequential(*steps, data_keys=["input", "mask"], extra_args={DataKey.MASK: nearest})


def _vary(
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    a: Augmentation,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Vary a crop in all but its position."""
    if a.flips:
        image, labels = _dihedral(image, labels, rng)
    pixels = image.astype(np.float32)
    if image.shape[2] == 3:
        if rng.random() < a.restain:
            pixels = restain(pixels, labels, rng)
        if a.stain:
            pixels = _jitter_stains(pixels, a.stain, rng)
    pixels = _vary_light(pixels, a.light, rng)
    return _degrade(pixels, a, rng), labels


def object_zoom(object_px: float, augmentation: Augmentation, typical_object_px: float) -> float:
    """Zoom factor that gives an image's median object, of ``object_px``, the wanted diameter, within 1/4 to 2."""
    if not augmentation.object_px:
        return 1.0
    own = typical_object_px if np.isnan(object_px) else object_px
    return float(np.clip(augmentation.object_px / own, 0.25, 2.0))


def zoom(
    image: NDArray[np.uint8], labels: NDArray[np.uint8], factor: float
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Resize an image (area average down, bilinear up) and its labels (nearest)."""
    if factor == 1.0:
        return image, labels
    height, width = (max(1, round(n * factor)) for n in labels.shape)
    method = Image.Resampling.BOX if factor < 1 else Image.Resampling.BILINEAR
    planes = [np.asarray(Image.fromarray(image[..., c]).resize((width, height), method)) for c in range(image.shape[2])]
    small = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    return np.stack(planes, axis=-1), np.asarray(small)


def restain(pixels: Floats, labels: NDArray[np.uint8], rng: np.random.Generator) -> Floats:
    """Paint a new ground of synthetic H&E under the objects of an image.

    The objects (label > 0) keep the shape and texture of their optical density, which becomes
    haematoxylin; everything else is replaced by eosin of random strength with fibres, haze of
    haematoxylin and bright gaps.

    Parameters
    ----------
    pixels
        (H, W, 3) in 0..255.
    labels
        (H, W) class of each pixel; what is not annotated counts as ground, and tells nothing of its
        density.

    Returns
    -------
    (H, W, 3) float32 in 0..255.
    """
    density = -np.log((pixels + 1) / 256).mean(axis=-1)
    inside, outside = (labels > 0) & (labels != IGNORED), labels == 0
    if inside.sum() < 20 or outside.sum() < 20:
        relative = np.zeros_like(density)
    else:
        low, high = np.median(density[outside]), np.median(density[inside])
        relative = np.clip((density - low) / max(high - low, 0.05), 0, 1.6)
    soft = _blur(inside.astype(np.float32), rng.uniform(0.6, 1.2))
    objects = relative * (soft + (1 - soft) * rng.uniform(0, 0.3))

    h_stain = _unit(HAEMATOXYLIN + rng.normal(0, 0.06, 3).astype(np.float32))
    e_stain = _unit(EOSIN + np.abs(rng.normal(0, 0.12, 3)).astype(np.float32))
    ground = _ground(labels.shape, rng)
    haze = rng.uniform(0, 0.9) * ground * _noise(labels.shape, rng.uniform(8, 40), rng)
    contrast = rng.uniform(0.3, 1.3)
    optical = (haze + contrast * objects)[..., None] * h_stain + (ground * (1 - rng.uniform(0, 0.6) * soft))[
        ..., None
    ] * e_stain
    if rng.random() < 0.15:
        optical = optical + (1 - soft[..., None]) * _ink(labels.shape, rng)
    white = rng.uniform(225, 255, 3) if rng.random() < 0.3 else rng.uniform(238, 252)
    return np.asarray(white * np.exp(-optical), np.float32)


def _ground(shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Density of the ground, (H, W): smooth strength, fibres, dense bundles, bright gaps."""
    smooth = _noise(shape, rng.uniform(10, 60), rng)
    fibres = _fibres(shape, 1.2, rng.uniform(4, 20), rng)
    grain = _noise(shape, 1.0, rng)
    ground: Floats = rng.uniform(0.1, 1.1) * (
        0.5
        + rng.uniform(0, 0.7) * (smooth - 0.5)
        + rng.uniform(0, 0.8) * (fibres - 0.5)
        + rng.uniform(0, 0.4) * (grain - 0.5)
    )
    if rng.random() < 0.5:  # dense, sharp-edged bundles: collagen, muscle, red cells
        bundles = _fibres(shape, rng.uniform(2, 8), rng.uniform(6, 40), rng)
        ground = ground * (1 + rng.uniform(0, 2) * _above(bundles, rng.uniform(0.4, 0.7), rng))
    if rng.random() < 0.6:  # tears and lumina
        gaps = _fibres(shape, rng.uniform(2, 15), rng.uniform(4, 30), rng)
        ground = ground * _above(gaps, rng.uniform(0.1, 0.6), rng)
    return np.asarray(np.clip(ground, 0, None), np.float32)


def _ink(shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Optical density (H, W, 3) of scattered pigment or marking ink of any colour."""
    where = _above(_noise(shape, rng.uniform(2, 12), rng), rng.uniform(0.6, 0.9), rng)
    color = rng.uniform(0.1, 1.0, 3) * rng.uniform(0.4, 2.0)
    return np.asarray(where[..., None] * color, np.float32)


def _fibres(shape: tuple[int, ...], across: float, along: float, rng: np.random.Generator) -> Floats:
    """Noise that is stretched along one of the two axes, (H, W) in 0..1."""
    return _noise(shape, (across, along) if rng.random() < 0.5 else (along, across), rng)


def _above(noise: Floats, level: float, rng: np.random.Generator) -> Floats:
    """1 where noise is above a level, 0 where it is below, with an edge of random sharpness."""
    return np.asarray(np.clip((noise - level) * rng.uniform(5, 30) + 0.5, 0, 1), np.float32)


def _noise(shape: tuple[int, ...], scale: float | tuple[float, float], rng: np.random.Generator) -> Floats:
    """Smooth noise, (H, W) stretched to 0..1: white noise at 1/scale, enlarged bicubically."""
    height, width = shape
    sy, sx = scale if isinstance(scale, tuple) else (scale, scale)
    small = rng.random((int(height / sy) + 3, int(width / sx) + 3), np.float32)
    big = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    noise = np.asarray(big)
    return np.asarray((noise - noise.min()) / max(float(np.ptp(noise)), 1e-6), np.float32)


def _unit(stain: Floats) -> Floats:
    stain = np.clip(stain, 0.02, None)
    return np.asarray(stain / np.linalg.norm(stain), np.float32)


def _jitter_stains(pixels: Floats, strength: float, rng: np.random.Generator) -> Floats:
    stains: NDArray[np.floating] = np.stack([_unit(s) for s in (HAEMATOXYLIN, EOSIN, DAB)])
    optical = -np.log((pixels + 1) / 256)
    amounts = optical @ np.linalg.inv(stains).astype(np.float32)
    gain = rng.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    offset = rng.uniform(-strength, strength, 3).astype(np.float32) * 0.2
    stains = stains * rng.uniform(1 - strength / 2, 1 + strength / 2, stains.shape)
    varied = (amounts * gain + offset) @ stains.astype(np.float32)
    return np.asarray(np.clip(256 * np.exp(-varied) - 1, 0, 255), np.float32)


def _vary_light(pixels: Floats, strength: float, rng: np.random.Generator) -> Floats:
    if not strength:
        return pixels
    gamma = np.exp(rng.uniform(-strength, strength))
    gain = 1 + rng.uniform(-strength, strength / 2)
    offset = 255 * rng.uniform(-strength, strength) / 4
    tint = rng.uniform(1 - strength / 4, 1, pixels.shape[-1])
    light = 255 * (np.clip(pixels, 0, 255) / 255) ** gamma * gain * tint + offset
    return np.asarray(np.clip(light, 0, 255), np.float32)


def _degrade(pixels: Floats, augmentation: Augmentation, rng: np.random.Generator) -> NDArray[np.uint8]:
    a = augmentation
    if a.focus and rng.random() < 0.5:
        pixels = _blur(pixels, rng.uniform(0, a.focus))
    if a.noise:
        pixels = pixels + rng.normal(0, rng.uniform(0, a.noise), pixels.shape).astype(np.float32)
    image: NDArray[np.uint8] = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    if image.shape[2] == 3 and rng.random() < a.jpeg:
        coded = io.BytesIO()
        Image.fromarray(image).save(coded, "JPEG", quality=int(rng.integers(40, 95)))
        image = np.asarray(Image.open(coded))
    return image


def _blur(pixels: Floats, sigma_px: float) -> Floats:
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    eight_bit = planes.max() > 1.5
    scale = 1 if eight_bit else 255
    blurred = np.stack(
        [
            np.asarray(
                Image.fromarray(np.clip(planes[..., c] * scale, 0, 255).astype(np.uint8)).filter(
                    ImageFilter.GaussianBlur(sigma_px)
                )
            )
            for c in range(planes.shape[-1])
        ],
        axis=-1,
    )
    return np.asarray(blurred.reshape(pixels.shape) / scale, np.float32)


def _crop(
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    crop_px: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    short = [max(0, crop_px - n) for n in labels.shape]
    if any(short):  # a small image is mirrored at a random place
        pad = [(before := int(rng.integers(0, n + 1)), n - before) for n in short]
        image = np.pad(image, [*pad, (0, 0)], mode="reflect")
        labels = np.pad(labels, pad, mode="reflect")
    y, x = (int(rng.integers(0, n - crop_px + 1)) for n in labels.shape)
    window = np.s_[y : y + crop_px, x : x + crop_px]
    return image[window], labels[window]


def _dihedral(
    image: NDArray[np.uint8], labels: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    turns = int(rng.integers(4))
    image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    if rng.random() < 0.5:
        image, labels = image[::-1], labels[::-1]
    return np.ascontiguousarray(image), np.ascontiguousarray(labels)

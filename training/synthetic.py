"""Synthetic data sets, deterministic by seed, each with a task that a method must be able to learn.

They serve tests; results are reported on real data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from histostream.training.data import Classes, DataSet, StoredSample

TEXTURE_COLORS = ((230, 75, 53), (77, 187, 213), (0, 160, 135))
REGIONS = 3  # of an image, one of each texture
GROUND_COLOR, NUCLEUS_COLOR = (226, 190, 214), (120, 120, 170)
FIBRE_COLOR = (4.0, 50.0, 10.0)  # one standard deviation of the ground: eosin absorbs green
RADII_PX, OTHER_RADII_PX = (4.0, 8.0), (2.5, 5.5)
HUE_TURN = -2 * np.pi / 3  # brings the fibres to red, by which the source's nuclei are told
BLUR_PX, NOISE = 0.9, 8.0  # of the target


def textures(count: int, test: int, *, side_px: int = 128, seed: int = 0) -> DataSet:
    """Make tissue of three textures: stripes at two angles, and blobs, in regions of random brightness.

    Brightness does not depend on the class, so that a network has to learn the texture.

    Parameters
    ----------
    count, test
        Images to train on, and to test on.
    side_px
        Height and width of each.
    seed
        Source of all randomness.
    """
    rng = np.random.default_rng(seed)
    samples = [_textured(f"texture {i}", side_px, rng) for i in range(count + test)]
    classes = tuple(zip(("rising", "falling", "blobs"), TEXTURE_COLORS, strict=True))
    return _set("textures", classes, samples, count)


def nuclei_pair(count: int, target: int, test: int, *, side_px: int = 64, seed: int = 0) -> DataSet:
    """Make dark nuclei on pale textured ground, and a target domain as of another laboratory.

    The target's images are drawn as the source's, with the hue turned, 0.6 of the contrast, a blur,
    noise, and smaller nuclei. The pool's images keep their labels, which training leaves out, so
    that they may serve as the data of an oracle.

    Parameters
    ----------
    count, target, test
        Source images to train on, target images in the pool "target", and target images to test on.
    side_px
        Height and width of each.
    seed
        Source of all randomness.
    """
    rng = np.random.default_rng(seed)
    source = tuple(_nuclei(f"source {i}", side_px, rng, other=False) for i in range(count))
    other = tuple(_nuclei(f"target {i}", side_px, rng, other=True) for i in range(target + test))
    classes = (("ground", GROUND_COLOR), ("nucleus", NUCLEUS_COLOR))
    pools = {"target": other[:target]}
    return DataSet("nuclei pair", classes, None, source, test=other[target:], pools=pools)


def _nuclei(name: str, side: int, rng: np.random.Generator, *, other: bool) -> StoredSample:
    y, x = np.mgrid[:side, :side].astype(np.float32)
    instances = np.zeros((side, side), np.int32)
    low, high = OTHER_RADII_PX if other else RADII_PX
    wanted = rng.uniform(0.15, 0.3) * side**2
    number = 0
    while (instances > 0).sum() < wanted:
        number += 1
        (cy, cx), angle = rng.uniform(0, side, 2), rng.uniform(0, np.pi)
        a, b = np.sort(rng.uniform(low, high, 2))
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        instances[(along / b) ** 2 + (across / a) ** 2 <= 1] = number
    inside = (instances > 0).astype(np.float32)[..., None]
    fibres = _smooth(side, (1.0, 4.0), rng)[..., None] * np.array(FIBRE_COLOR)
    chromatin = _smooth(side, (1.0, 1.0), rng)[..., None] * 14
    ground, nucleus = np.array(GROUND_COLOR) + fibres, np.array(NUCLEUS_COLOR) + chromatin
    pixels = ground * (1 - inside) + nucleus * inside
    if other:
        pixels = _of_another_laboratory(pixels, rng)
    else:
        pixels = gaussian_filter(pixels, (0.6, 0.6, 0)) + rng.normal(0, 3, pixels.shape)
    image: NDArray[np.uint8] = np.clip(pixels, 0, 255).astype(np.uint8)
    labels = (instances > 0).astype(np.uint8)
    return StoredSample(name, name, image, labels, instances, low + high)


def _of_another_laboratory(pixels: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Turn the hue about the grey axis, lower the contrast, blur, and add noise."""
    c, s = np.cos(HUE_TURN), np.sin(HUE_TURN) / np.sqrt(3)
    third = (1 - c) / 3
    turn = np.array(
        [
            [c + third, third - s, third + s],
            [third + s, c + third, third - s],
            [third - s, third + s, c + third],
        ]
    )
    flat = 128 + 0.6 * (pixels @ turn.T - 128)
    blurred = gaussian_filter(flat, (BLUR_PX, BLUR_PX, 0))
    noisy: NDArray[np.float64] = blurred + rng.normal(0, NOISE, pixels.shape)
    return noisy


def _smooth(side: int, scale: tuple[float, float], rng: np.random.Generator) -> NDArray[np.float64]:
    """Noise of about unit variance, stretched along one of the axes."""
    turned = scale if rng.random() < 0.5 else scale[::-1]
    noise = gaussian_filter(rng.normal(size=(side, side)), turned, mode="wrap")
    unit: NDArray[np.float64] = noise / noise.std()
    return unit


def _textured(name: str, side: int, rng: np.random.Generator) -> StoredSample:
    y, x = np.mgrid[:side, :side].astype(np.float32)
    seeds = rng.uniform(0, side, (REGIONS, 2))
    region = np.argmin([(y - sy) ** 2 + (x - sx) ** 2 for sy, sx in seeds], axis=0)
    kinds = rng.permutation(REGIONS)
    labels = kinds[region].astype(np.uint8)
    phase = rng.uniform(0, 2 * np.pi, 3)
    wave = 2 * np.pi / 6
    maps = np.stack(
        [
            np.sin(wave * (x + y) / np.sqrt(2) + phase[0]),
            np.sin(wave * (x - y) / np.sqrt(2) + phase[1]),
            np.sin(wave * x + phase[2]) * np.sin(wave * y + phase[2]) * 1.4,
        ]
    )
    pattern = np.take_along_axis(maps, labels[None].astype(np.int64), axis=0)[0]
    brightness = rng.uniform(45, 210, REGIONS)[region]
    grey = brightness + 40 * pattern + rng.normal(0, 6, (side, side))
    tint = np.array((1.0, 0.85, 0.95), np.float32)
    image: NDArray[np.uint8] = np.clip(grey[..., None] * tint, 0, 255).astype(np.uint8)
    return StoredSample(name, name, image, labels, None, float("nan"))


EM_COLORS = ((255, 255, 255), (230, 75, 53))
EM_TURN = 0.5  # brightness below which the contrast curve of the target falls
EM_INVERTED = 0.77  # and from which it is subtracted there
EM_GAIN, EM_TARGET_GAIN = 190.0, 50.0  # grey levels between brightness 0 and 1
EM_NOISE, EM_TARGET_NOISE = 4.0, 22.0  # grey levels
EM_TARGET_BLUR_PX = 0.8


def em_pair(count: int, test: int, *, side_px: int = 96, seed: int = 0) -> DataSet:
    """Make electron micrographs of mitochondria, and a target domain as of another microscope.

    Ellipses with a dark rim and dark cristae in grey texture with membranes. In the target the
    contrast curve is inverted in the dark half, so that rims and cristae are brighter than the rest
    of the organelle; contrast is lower, and there are blur and noise.

    Parameters
    ----------
    count, test
        Source images to train on and as many of the target, in the pool "target"; target images to
        test on. The pool's images have labels too, so that they serve an oracle.
    side_px
        Height and width of each.
    seed
        Source of all randomness.

    Returns
    -------
    Grey images, (side_px, side_px, 1), of classes "rest" and "mitochondrion".
    """
    rng = np.random.default_rng(seed)
    train = tuple(_micrograph(f"source {i}", side_px, rng, target=False) for i in range(count))
    pool = tuple(_micrograph(f"target {i}", side_px, rng, target=True) for i in range(count))
    held = tuple(_micrograph(f"test {i}", side_px, rng, target=True) for i in range(test))
    classes = tuple(zip(("rest", "mitochondrion"), EM_COLORS, strict=True))
    return DataSet("em pair", classes, None, train, test=held, pools={"target": pool})


def _micrograph(name: str, side: int, rng: np.random.Generator, *, target: bool) -> StoredSample:
    brightness, labels = _mitochondria(side, rng)
    if target:
        falling = EM_INVERTED - brightness
        curved = np.where(brightness < EM_TURN, falling, brightness)
        grey = 90 + EM_TARGET_GAIN * gaussian_filter(curved, EM_TARGET_BLUR_PX)
        grey += rng.normal(0, EM_TARGET_NOISE, labels.shape)
    else:
        grey = 30 + EM_GAIN * brightness + rng.normal(0, EM_NOISE, labels.shape)
    image: NDArray[np.uint8] = np.clip(grey, 0, 255).astype(np.uint8)[..., None]
    return StoredSample(name, name, image, labels)


def _mitochondria(side: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Brightness, about 0 to 1, and labels, (side, side) each."""
    y, x = np.mgrid[:side, :side].astype(np.float64)
    brightness = 0.62 + 0.05 * grain(side, 5, rng) + 0.04 * grain(side, 1.2, rng)
    brightness[np.abs(grain(side, 6, rng)) < 0.08] -= 0.25  # membranes
    labels = np.zeros((side, side), np.uint8)
    for _ in range(3 * side**2 // 96**2 + int(rng.integers(1, 3))):
        centre_y, centre_x = rng.uniform(0, side, 2)
        long = rng.uniform(9, 17)
        short, angle = long * rng.uniform(0.5, 0.9), rng.uniform(0, np.pi)
        along = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
        across = (y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)
        radius = np.hypot(along / long, across / short)
        cristae = np.sin(2 * np.pi * along / 5 + rng.uniform(0, 2 * np.pi)).clip(0)
        body = 0.38 + 0.04 * grain(side, 1.2, rng) - 0.14 * cristae
        body[radius > 0.85] = 0.2  # the rim
        brightness[radius < 1] = body[radius < 1]
        labels[radius < 1] = 1
    return brightness.clip(0, 1), labels


def grain(side: int, sigma_px: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Smooth noise of mean 0 and variance 1."""
    noise = gaussian_filter(rng.normal(size=(side, side)), sigma_px, mode="wrap")
    smooth: NDArray[np.float64] = (noise - noise.mean()) / noise.std()
    return smooth


CUE_COLORS = ((255, 255, 255), (230, 75, 53), (77, 187, 213))
CUES = ((190.0, 30.0, 40.0), (40.0, 60.0, 190.0))  # RGB of the patch: the disc is "warm", "cold"
CUE_PX = 4


def long_range_cue(count: int, test: int, *, side_px: int = 128, seed: int = 0) -> DataSet:
    """Make striped discs whose class a patch of 4 px at the other side of the image shows.

    The disc lies on the right and looks the same in both classes; the patch is at the left border,
    red for "warm" and blue for "cold". A network whose receptive field is less than half of the
    image finds the disc and guesses its class. Classes alternate.

    Parameters
    ----------
    count, test
        Images to train on, and to test on.
    side_px
        Height and width of each.
    seed
        Source of all randomness.
    """
    rng = np.random.default_rng(seed)
    samples = [_cued(f"cue {i}", side_px, i % 2, rng) for i in range(count + test)]
    classes = tuple(zip(("ground", "warm", "cold"), CUE_COLORS, strict=True))
    return _set("long range cue", classes, samples, count)


def _cued(name: str, side: int, kind: int, rng: np.random.Generator) -> StoredSample:
    y, x = np.mgrid[:side, :side].astype(np.float32)
    center_y, center_x = side * rng.uniform(0.3, 0.7), side * rng.uniform(0.7, 0.8)
    disc = np.hypot(y - center_y, x - center_x) < side * rng.uniform(0.12, 0.16)
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    stripes = np.sin(2 * np.pi / 5 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    pixels = np.array(GROUND_COLOR) + 8 * grain(side, 1.5, rng)[..., None]
    pixels[disc] = (150 + 30 * stripes[disc])[:, None]
    top, left = int(rng.integers(side - CUE_PX + 1)), int(rng.integers(CUE_PX))
    pixels[top : top + CUE_PX, left : left + CUE_PX] = CUES[kind]
    pixels += rng.normal(0, 4, pixels.shape)
    image: NDArray[np.uint8] = np.clip(pixels, 0, 255).astype(np.uint8)
    return StoredSample(name, name, image, np.where(disc, 1 + kind, 0).astype(np.uint8))


def _set(name: str, classes: Classes, samples: list[StoredSample], count: int) -> DataSet:
    """Train on the first ``count`` images, test on the others."""
    return DataSet(name, classes, None, tuple(samples[:count]), test=tuple(samples[count:]))

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from histostream.benchmarks.accuracy.image_metrics import (
    MS_SSIM_WEIGHTS,
    SHIPPED_WEIGHTS,
    Extractor,
    FrechetScore,
    frechet_inception_distance,
    ms_ssim,
    ms_ssim_among,
    nuclei_encoder,
)
from histostream.training.checkpoint import CheckpointError


def noise(n: int, side: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


class MeanColor(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.float64).mean(dim=(2, 3))


def test_fid_is_the_distance_of_the_equation_whatever_the_batches() -> None:
    real, generated = noise(20), noise(30, seed=1) // 2
    extractor = Extractor("mean colour", MeanColor(), 3)
    score = frechet_inception_distance(real.split(7), [generated], extractor)
    x, y = extractor(real).numpy(), extractor(generated).numpy()
    ca, cb = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert score.distance == pytest.approx(expected, rel=1e-9)
    assert (score.extractor, score.real, score.generated) == ("mean colour", 20, 30)


def test_a_set_is_at_no_distance_from_itself() -> None:
    same = frechet_inception_distance([noise(20)], [noise(20)], Extractor("mean colour", MeanColor(), 3))
    assert same.distance == pytest.approx(0, abs=1e-5)


def test_a_score_is_never_printed_without_its_extractor() -> None:
    said = str(FrechetScore(1.23456, "some-net-0123abcd", 10, 12))
    assert said == "FID 1.235 on some-net-0123abcd (10 real, 12 generated images)"


def test_the_shipped_extractor_is_named_by_its_weights_and_tells_images_apart() -> None:
    extractor = nuclei_encoder()
    weights = (SHIPPED_WEIGHTS / "checkpoint.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    assert extractor.name == f"histostream-nuclei-encoder-{digest[:8]}"
    images = noise(6, side=40)
    features = extractor(images)
    assert features.shape == (6, extractor.num_features) == (6, 256)
    assert not features.requires_grad
    torch.testing.assert_close(extractor(images), features)  # no dropout
    same = frechet_inception_distance([images], [images], extractor)
    other = frechet_inception_distance([images], [images // 4], extractor)
    assert same.distance == pytest.approx(0, abs=1e-5 * float(torch.cov(features.T).trace()))
    assert other.distance > 100 * max(same.distance, 1e-6)
    assert other.extractor == extractor.name


def test_what_is_no_image_for_the_extractor_is_refused() -> None:
    extractor = nuclei_encoder()
    with pytest.raises(ValueError, match=r"float32: give \(N, C, H, W\) uint8"):
        extractor(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="40x8 px; this encoder takes sides of 16"):
        extractor(torch.zeros(2, 3, 8, 40, dtype=torch.uint8))


def test_one_image_is_no_set() -> None:
    with pytest.raises(ValueError, match="20 real and 1 generated images: 2 of each"):
        frechet_inception_distance([noise(20)], [noise(1)], Extractor("colour", MeanColor(), 3))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in it"):
        nuclei_encoder(tmp_path)


def test_an_image_is_wholly_similar_to_itself_and_less_to_others() -> None:
    images = noise(3, 176)
    assert ms_ssim(images, images).tolist() == pytest.approx([1.0] * 3)
    assert ms_ssim(images[:1], images[:1]).shape == (1,)
    near = (images.to(torch.int16) + noise(3, 176, seed=1) // 8).clamp(0, 255).to(torch.uint8)
    far = noise(3, 176, seed=2)
    assert (ms_ssim(images, near) > 0.8).all()
    assert (ms_ssim(images, far) < 0.2).all()
    assert (ms_ssim(images, far) >= 0).all()


def test_ms_ssim_of_flat_images_is_the_luminance_term_of_the_coarsest_scale() -> None:
    a = torch.full((1, 3, 176, 200), 100, dtype=torch.uint8)
    b = torch.full((1, 3, 176, 200), 150, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    luminance = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert float(ms_ssim(a, b)) == pytest.approx(luminance ** MS_SSIM_WEIGHTS[-1], abs=1e-3)


def test_images_of_another_shape_size_or_type_are_refused() -> None:
    images = noise(2, 176)
    with pytest.raises(ValueError, match="176x175 px; MS-SSIM of 5 scales takes sides of 176 px"):
        ms_ssim(images[:, :, 1:], images[:, :, 1:])
    with pytest.raises(ValueError, match=re.escape("(1, 3, 176, 176) and (2, 3, 176, 176)")):
        ms_ssim(images[:1], images)
    with pytest.raises(ValueError, match="float32: give"):
        ms_ssim(images.to(torch.float32), images.to(torch.float32))


def test_similarity_among_samples_is_the_mean_over_pairs() -> None:
    a, b = noise(2, 176)
    pair = float(ms_ssim(a[None], b[None]))
    assert ms_ssim_among(torch.stack([a, a, a])) == pytest.approx(1)
    assert ms_ssim_among(torch.stack([a, a, b])) == pytest.approx((1 + 2 * pair) / 3)
    with pytest.raises(ValueError, match="1 images make no pair"):
        ms_ssim_among(a[None])

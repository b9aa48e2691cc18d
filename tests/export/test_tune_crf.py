"""Parameters of the CRF are learnt from images, and kept in the card."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from histostream.export import tune_crf as tuning
from histostream.export.tune_crf import CANDIDATES, START, TuneError, keep_params, search, tune_crf
from histostream.runtime.bundle.card import read_card
from histostream.runtime.crf import CrfParams, dense_crf
from histostream.training.data import StoredSample

pytestmark = pytest.mark.full

pytest.importorskip("numba", reason="numba is not installed")


def noisy(seed: int, side: int = 96) -> tuning.Scored:
    """Two colours, and probabilities that are right but for noise of single pixels."""
    rng = np.random.default_rng(seed)
    truth = (gaussian_filter(rng.normal(size=(side, side)), 8) > 0).astype(np.uint8)
    image = np.where(truth[..., None] > 0, (110, 80, 150), (225, 170, 200)).astype(np.uint8)
    p = np.clip(0.5 + 0.15 * (2.0 * truth - 1) + rng.normal(0, 0.25, truth.shape), 0.01, 0.99)
    return image, np.stack([1 - p, p]).astype(np.float32), truth


def test_a_search_finds_parameters_that_raise_dice() -> None:
    said: list[str] = []
    scored = [noisy(1)]
    tuned = search(scored, start=CrfParams(w1=0.0, w2=0.0), say=said.append)
    assert tuned.params is not None
    assert tuned.dice_without < 0.8
    assert tuned.dice > tuned.dice_without + 0.1
    image, p, truth = scored[0]
    labels = dense_crf(image, p, tuned.params).argmax(axis=0)
    both = ((labels == 1) & (truth == 1)).sum()
    assert tuned.dice == pytest.approx(2 * both / ((labels == 1).sum() + (truth == 1).sum()))
    assert len(said) > 0
    assert tuned.tried <= 2 * sum(map(len, CANDIDATES.values())) + 1


def test_where_no_crf_helps_there_is_none() -> None:
    image, _, truth = noisy(2, side=48)
    sure = np.stack([1 - truth, truth]).astype(np.float32)
    tuned = search([(image, sure, truth)])
    assert tuned.params is None
    assert tuned.dice_without == 1


def test_the_card_keeps_what_is_found(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    before = read_card(bundle)
    found = CrfParams(w1=3.0, theta_alpha=7.0)
    keep_params(bundle, found)
    card = read_card(bundle)
    assert card.crf == asdict(found)
    assert card.digest() == before.digest()  # engines stay good
    assert sorted(p.name for p in bundle.iterdir()) == sorted(p.name for p in tiny_bundle.iterdir())


def test_images_that_do_not_fit_the_model_are_named(tiny_bundle: Path) -> None:
    bundle = tiny_bundle
    image, _, truth = noisy(3, side=128)
    with pytest.raises(TuneError, match="no annotated images"):
        tune_crf(bundle, [], None)
    bad = StoredSample("b", "b", image, truth + 5)
    with pytest.raises(TuneError, match="b: label 6; the model has 3 classes"):
        tune_crf(bundle, [bad], None)
    grey = StoredSample("c", "c", image[..., :1].copy(), truth)
    with pytest.raises(TuneError, match="c: 1 channels; the model takes 3"):
        tune_crf(bundle, [grey], None)


@pytest.mark.full
def test_the_command_tunes_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, folder = tmp_path / "bundle", tmp_path / "set"
    shutil.copytree(tiny_bundle, bundle)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for seed in (1, 2):
        image, _, truth = noisy(seed, side=64)
        Image.fromarray(image).save(folder / "images" / f"{seed}.png")
        Image.fromarray(truth).save(folder / "labels" / f"{seed}.png")
    (folder / "dataset.toml").write_text(
        "mpp = 0.5\n" + "".join(f'[[classes]]\nname = "c{k}"\ncolor = [{k}, 0, 0]\n' for k in (0, 1, 2))
    )
    command = [sys.executable, "-m", "histostream.export.cli", "tune-crf", str(bundle)]
    done = subprocess.run([*command, "--data", str(folder)], capture_output=True, text=True, check=False)
    card = read_card(bundle)
    # An untrained network may or may not be helped; either is said, and the card agrees.
    if done.returncode == 0:
        assert "with the CRF" in done.stdout
        assert set(card.crf) == set(asdict(START))
    else:
        assert "is better than no CRF; the card is unchanged" in done.stderr
        assert card.crf == {}
    missing = subprocess.run(
        [*command, "--data", str(tmp_path / "nowhere")], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 1
    assert "there is no such folder" in missing.stderr

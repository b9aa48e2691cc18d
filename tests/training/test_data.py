"""Sets divide by group, resample by area, and images that cannot be used are refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from histostream.training import data, splits
from histostream.training.data import DataError, DataSet, Picture, StoredPicture, StoredSample
from histostream.training.image_files import read_image, read_labels
from histostream.training.splits import Split
from histostream.wsi.slides.resolution import at_mpp
from tests.wsi.slides.test_resolution import ArraySlide


def pictures(groups: list[str]) -> list[StoredPicture]:
    blank = np.zeros((1, 1, 1), np.uint8)
    return [StoredPicture(f"{i}.png", group, blank) for i, group in enumerate(groups)]


def alone(count: int) -> list[StoredPicture]:
    return pictures([str(i) for i in range(count)])


def patients(seed: int) -> list[StoredPicture]:
    """8 to 15 patients of 1 to 9 images each, in a random order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 10, rng.integers(8, 16))
    return pictures([str(g) for g in rng.permutation(np.repeat(np.arange(len(sizes)), sizes))])


def parts(split: Split) -> tuple[tuple[int, ...], ...]:
    return split.train, split.validation, split.test


def check_division(split: Split, samples: list[StoredPicture]) -> None:
    """Every image is in one part, and so is every group; no part that was asked for is empty."""
    assert sorted(i for part in parts(split) for i in part) == list(range(len(samples)))
    groups = [{samples[i].group for i in part} for part in parts(split)]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert all(part == tuple(sorted(part)) for part in parts(split))


# ----------------------------------------------------------------------------- splits


@pytest.mark.parametrize("shares", [(0.12, 0.2), (0.2, 0.0), (0.25, 0.25), (0.0, 0.5)])
@pytest.mark.parametrize("count", [4, 8, 50, 107])
def test_images_of_their_own_are_divided_as_the_shipped_model_was(count: int, shares: tuple[float, float]) -> None:
    """The division of the first release, written out; the shipped weights' test images need it."""
    validation, test = shares
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(count)
        n_test, n_validation = round(test * count), max(1, round(validation * count))
        cut = [sorted(p) for p in np.split(order, [n_test, n_test + n_validation])]
        found = splits.split(alone(count), validation=validation, test=test, seed=seed)
        assert [list(part) for part in (found.test, found.validation, found.train)] == cut


@pytest.mark.parametrize("seed", range(100))
def test_no_group_is_in_two_parts_of_a_split(seed: int) -> None:
    samples = patients(seed)
    found = splits.split(samples, validation=0.2, test=0.2, seed=seed)
    check_division(found, samples)
    assert all(parts(found))
    assert found == splits.split(samples, validation=0.2, test=0.2, seed=seed)
    largest = max(sum(s.group == g.group for s in samples) for g in samples)
    assert abs(len(found.test) - 0.2 * len(samples)) <= largest / 2 + 0.5


@pytest.mark.parametrize("seed", range(50))
def test_each_image_is_tested_in_exactly_one_fold(seed: int) -> None:
    samples = patients(seed)
    folds = [splits.fold(samples, folds=5, fold=i, validation=0.1, seed=seed) for i in range(5)]
    for found in folds:
        check_division(found, samples)
        assert all(parts(found))
    assert sorted(i for found in folds for i in found.test) == list(range(len(samples)))
    sizes = [len(found.test) for found in folds]
    assert max(sizes) - min(sizes) <= 9  # the largest group


def test_folds_of_single_images_are_equal_and_differ_by_seed() -> None:
    samples = alone(42)
    folds = [splits.fold(samples, folds=5, fold=i, validation=0.1, seed=1) for i in range(5)]
    assert sorted(len(found.test) for found in folds) == [8, 8, 8, 9, 9]
    assert all(len(found.validation) == 4 for found in folds)
    assert folds[0] != splits.fold(samples, folds=5, fold=0, validation=0.1, seed=2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: splits.split(alone(3), validation=0.5, test=0.5, seed=0),
            "test=0.5: of 3 images none is left to train on; set smaller",
        ),
        (lambda: splits.split(alone(3), validation=0.2, test=0.1, seed=0), "test=0.1: .* set 0, or 0.334 or more"),
        (lambda: splits.split(alone(1), validation=0.2, test=0.0, seed=0), "1 images cannot be divided"),
        (lambda: splits.split([], validation=0.2, test=0.0, seed=0), "0 images cannot be divided"),
        (
            lambda: splits.split(pictures(list("aaabbb")), validation=0.3, test=0.3, seed=0),
            "6 images of 2 groups cannot be divided",
        ),
        (
            lambda: splits.fold(pictures(list("aabbc")), folds=4, fold=0, validation=0.1, seed=0),
            "folds=4: 5 images of 3 groups can make 2 to 3 folds",
        ),
        (lambda: splits.fold(alone(5), folds=1, fold=0, validation=0.1, seed=0), "folds=1"),
        (lambda: splits.fold(alone(5), folds=5, fold=5, validation=0.1, seed=0), "numbered 0 to 4"),
        (lambda: splits.fold(alone(5), folds=5, fold=-1, validation=0.1, seed=0), "fold=-1"),
        (lambda: splits.fold(alone(5), folds=5, fold=0, validation=0.9, seed=0), "5 images none is left to train on"),
    ],
)
def test_an_impossible_division_is_refused(make: Callable[[], Split], words: str) -> None:
    with pytest.raises(DataError, match=words):
        make()


# ----------------------------------------------------------------------------- sets


def noise(height: int, width: int, channels: int = 3, *, name: str = "a.png") -> StoredSample:
    rng = np.random.default_rng((height, width))
    labels = rng.integers(0, 3, (height, width)).astype(np.uint8)
    image = rng.integers(0, 256, (height, width, channels)).astype(np.uint8)
    return StoredSample(name, "g", image, labels, labels.astype(np.int32) * 1000, 12.0)


def test_half_the_resolution_is_the_mean_of_each_four_pixels() -> None:
    sample = noise(40, 60)
    pool = {"target": (StoredPicture("t.png", "t", sample.image),)}
    small = DataSet("s", (), 0.25, (sample,), pools=pool).at_mpp(0.5)
    (found,), (target,) = small.train, small.pools["target"]
    means = sample.image.reshape(20, 2, 30, 2, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(found.image, np.floor(means + 0.5))
    np.testing.assert_array_equal(found.labels, sample.labels[1::2, 1::2])
    assert found.instances is not None
    np.testing.assert_array_equal(found.instances, found.labels.astype(np.int32) * 1000)
    np.testing.assert_array_equal(target.image, found.image)
    assert (found.object_px, found.shape, small.mpp) == (6.0, (20, 30), 0.5)
    assert (found.name, found.group) == ("a.png", "g")


def test_twice_the_resolution_keeps_each_label_four_times() -> None:
    sample = noise(10, 11)
    (found,) = DataSet("s", (), 0.5, (sample,)).at_mpp(0.25).train
    np.testing.assert_array_equal(found.labels, np.kron(sample.labels, np.ones((2, 2), np.uint8)))
    assert found.image.shape == (20, 22, 3)
    np.testing.assert_array_equal(found.image[0, 0], sample.image[0, 0])
    assert found.object_px == 24.0


@pytest.mark.parametrize("mpp", [0.31, 0.62005, 0.1999])
def test_images_are_resampled_as_slides_are(mpp: float) -> None:
    sample = noise(77, 50)
    (found,) = DataSet("s", (), 0.25, (sample,)).at_mpp(mpp).train
    view = at_mpp(ArraySlide(sample.image, mpp=0.25), mpp)
    np.testing.assert_array_equal(found.image, view.read(0, 0, view.width, view.height))
    assert found.labels.shape == found.shape == found.image.shape[:2]


def test_a_set_of_that_or_of_unknown_resolution_stays_as_it_is() -> None:
    for mpp in (None, 0.5, 0.5 * (1 + 1e-7)):
        found = DataSet("s", (), mpp, (noise(20, 20),))
        assert found.at_mpp(0.5) is found
    with pytest.raises(DataError, match="positive"):
        DataSet("s", (), 0.5, (noise(20, 20),)).at_mpp(0)


def test_pictures_that_are_read_on_demand_are_resampled_on_demand() -> None:
    stored = noise(50, 40)

    class Lazy:
        name, group, object_px, instances = "l", "g", 12.0, stored.instances
        image, labels, shape = stored.image, stored.labels, stored.shape
        digest = stored.digest

    both = DataSet("s", (), 0.3, (stored,), (Lazy(),)).at_mpp(0.5)
    (eager,), (lazy,) = both.train, both.validation
    np.testing.assert_array_equal(lazy.image, eager.image)
    np.testing.assert_array_equal(lazy.labels, eager.labels)
    np.testing.assert_array_equal(lazy.instances, eager.instances)
    assert (lazy.shape, lazy.object_px, lazy.name) == (eager.shape, eager.object_px, "l")
    other = DataSet("s", (), 0.3, (stored,), (Lazy(),)).at_mpp(0.6)
    assert lazy.digest() != other.validation[0].digest()


def test_the_checksum_tells_every_change() -> None:
    sample, more = noise(20, 20), noise(21, 20, name="b.png")
    pixel, label, object_ = sample.image.copy(), sample.labels.copy(), np.array(sample.instances)
    pixel[3, 3, 0] ^= 1
    label[3, 3] ^= 1
    object_[3, 3] ^= 1
    changed = [
        [sample, more],
        [more, sample],
        [sample],
        *(
            [replace(sample, **change), more]
            for change in (
                {"image": pixel},
                {"labels": label},
                {"instances": object_},
                {"instances": None},
                {"name": "c.png"},
                {"group": "h"},
            )
        ),
    ]
    assert len({data.checksum(samples) for samples in changed}) == len(changed)
    assert data.checksum([noise(20, 20), more]) == data.checksum([sample, more])
    picture: Picture = StoredPicture("a.png", "g", sample.image)
    assert picture.digest() == StoredPicture("a.png", "g", sample.image.copy()).digest()


def test_a_set_without_images_or_with_a_name_twice_is_refused() -> None:
    with pytest.raises(DataError, match="no labelled image"):
        DataSet("s", (), None, ())
    with pytest.raises(DataError, match=r"two images have the name a\.png"):
        DataSet("s", (), None, (noise(20, 20),), (), (noise(21, 20),))


def test_labels_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match=r"a\.png: labels are"):
        StoredSample("a.png", "g", np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8))


def test_classes_are_counted_up_to_the_largest_label() -> None:
    sample = noise(20, 20)
    assert data.class_count([sample]) == 3
    with pytest.raises(DataError, match="nothing to learn"):
        data.class_count([replace(sample, labels=np.zeros((20, 20), np.uint8))])


def test_channels_are_those_of_the_images() -> None:
    assert DataSet("s", (), None, (noise(20, 20, 1),)).channels == 1
    assert DataSet("s", (), None, (), (), (noise(20, 20, 3),)).channels == 3


def test_an_object_is_as_wide_as_the_circle_of_its_area() -> None:
    ys, xs = np.mgrid[:60, :60]
    disk = ((ys - 30) ** 2 + (xs - 30) ** 2 <= 20**2).astype(np.int32)
    assert data.median_diameter(disk) == pytest.approx(40, rel=0.02)
    assert math.isnan(data.median_diameter(np.zeros((3, 3), np.int32)))


# ----------------------------------------------------------------------------- files


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK", "LA"])
def test_images_of_any_mode_become_grey_or_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(np.full((20, 30, 3), 255, np.uint8)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (20, 30, 1 if mode in ("L", "1", "LA") else 3)
    assert image.dtype == np.uint8
    assert image.min() >= 250


def write_deep(path: Path, pixels: NDArray[np.uint16]) -> None:
    path.write_bytes(imagecodecs.png_encode(pixels))


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    for shape in ((20, 20), (20, 20, 3)):
        write_deep(path, np.full(shape, 40_000, np.uint16))
        with pytest.raises(DataError, match=r"deep\.png: more than 8 bits.*convert it to 8 bit"):
            read_image(path)
    Image.fromarray(np.ones((20, 20), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="convert it to 8 bit"):
        read_image(tmp_path / "float.tif")


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.png: the file is empty"):
        read_image(tmp_path / "empty.png")
    (tmp_path / "text.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"text\.png: cannot be read as an image"):
        read_image(tmp_path / "text.png")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(tmp_path / "cut.png")
    for suffix in (".png", ".tif", ".jpg", ".webp", ".bmp"):
        path = tmp_path / f"cut{suffix}"
        Image.open(tmp_path / "cut.png").save(path) if suffix != ".png" else None
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=f"broken{suffix}: cannot be read as an image"):
            read_image(broken)
    with pytest.raises(DataError, match=r"none\.png: cannot be read"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("limit", [300, 150], ids=["warning", "error"])
def test_an_image_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Pillow warns above its limit, and raises above twice the limit."""
    Image.new("L", (20, 20)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"large\.png: too large.*cut it into parts"):
        read_image(tmp_path / "large.png")


def test_several_images_in_a_file_are_refused(tmp_path: Path) -> None:
    pages = [Image.new("L", (20, 20), value) for value in (0, 9)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"stack\.tif: 2 images in one file"):
        read_image(tmp_path / "stack.tif")


def test_a_label_image_has_one_channel_of_whole_numbers(tmp_path: Path) -> None:
    for dtype in (np.uint8, np.uint16, np.int32, bool):
        Image.fromarray(np.ones((20, 20), dtype)).save(tmp_path / "ok.tif")
        assert read_labels(tmp_path / "ok.tif").max() == 1
    Image.new("RGB", (20, 20)).save(tmp_path / "rgb.png")
    with pytest.raises(DataError, match=r"rgb\.png: 3 channels"):
        read_labels(tmp_path / "rgb.png")
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="whole numbers"):
        read_labels(tmp_path / "float.tif")

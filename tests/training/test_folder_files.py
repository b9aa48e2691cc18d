"""Folders as people have them are read, or refused with a remedy; each remedy is applied, and then they train."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from histostream.training import checkpoint, cli
from histostream.training.data import IGNORED, DataSet
from histostream.training.datasets import open_dataset
from histostream.training.image_files import Reading, read_image
from tests.commands import call

SIDE = 48
NAMES = tuple("abcdef")
RED, BLACK, BLUE = (255, 0, 0), (0, 0, 0), (0, 0, 255)
TINY = (
    "schedule.steps=1",
    "schedule.crop_px=32",
    "method.depth=2",
    "method.base_width=4",
    "method.discriminator_width=4",
)


def pixels(seed: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, channels)).astype(np.uint8)


def circles(seed: int, count: int = 12) -> NDArray[np.uint8]:
    """Labels of objects: 0, and 1, 2, ... for each disk."""
    rng, ys, xs = np.random.default_rng(seed), *np.mgrid[:SIDE, :SIDE]
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for number in range(1, count + 1):
        row, column = divmod(number - 1, 4)
        y, x = 6 + 12 * row + rng.uniform(-1, 1), 6 + 12 * column + rng.uniform(-1, 1)
        labels[(ys - y) ** 2 + (xs - x) ** 2 < 16] = number
    return labels


def regions(seed: int, classes: int = 2) -> NDArray[np.uint8]:
    """Labels 0..K-1 of smooth regions, each class of several blobs."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(SIDE, SIDE)), 3)
    labels: NDArray[np.uint8] = np.digitize(noise, np.quantile(noise, np.arange(1, classes) / classes)).astype(np.uint8)
    return labels


def save(path: Path, values: NDArray[np.generic], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(np.squeeze(values)).save(path, **options)


Maker = Callable[[int], NDArray[np.generic]]


def folder_of(
    root: Path,
    *,
    image: Maker = pixels,
    label: Maker = regions,
    images: str = "images/{}.png",
    labels: str = "labels/{}.png",
) -> Path:
    for seed, name in enumerate(NAMES):
        save(root / images.format(name), image(seed))
        save(root / labels.format(name), label(seed))
    return root


def say(root: Path, *lines: str) -> None:
    with (root / "dataset.toml").open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def train(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [word for setting in TINY for word in ("--set", setting)]
    run = root.parent / "run"
    shutil.rmtree(run, ignore_errors=True)
    return call(cli.main, "--data", root, "--out", run, "--mpp", "0.5", "--device", "cpu", *words, *more)


def refused(root: Path, *said: str) -> str:
    """Return the one line with which the command refuses a set, before anything is written."""
    done = train(root)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (root.parent / "run").exists()
    for words in said:
        assert re.search(words, done.stderr), done.stderr
    return done.stderr.strip()


def trains(root: Path, *more: str) -> DataSet:
    done = train(root, *more)
    assert done.returncode == 0, done.stderr
    return open_dataset(str(root))


def labels_of(found: DataSet) -> list[NDArray[np.uint8]]:
    return [s.labels for s in sorted(found.train, key=lambda s: s.name)]


# ----------------------------------------------------------------------------- layouts that are read as they are


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images/{}.png", "masks/{}.png"),
        ("images/{}.jpg", "labels/{}.png"),
        ("images/{}.png", "masks/{}_mask.png"),
        ("images/{}.png", "labels/{}_seg.tif"),
        ("images/{}.jpg", "images/{}_mask.png"),
        ("{}.png", "{}_mask.png"),
        ("images/{}.npy", "labels/{}.npy"),
    ],
)
def test_folders_and_names_that_people_use_are_read(tmp_path: Path, images: str, labels: str) -> None:
    found = trains(folder_of(tmp_path / "set", images=images, labels=labels))
    assert len(found.train) == len(NAMES)
    for seed, own in enumerate(labels_of(found)):
        np.testing.assert_array_equal(own, regions(seed))


@pytest.mark.parametrize(
    "layout",
    [
        "{part}/images/{name}.png {part}/masks/{name}.png",
        "images/{part}/{name}.png labels/{part}/{name}.png",
        "{part}/{name}.jpg {part}/{name}_mask.png",
    ],
)
@pytest.mark.parametrize(
    "words", [("train", "val", "test"), ("training", "validation", "testing"), ("train", "valid", "test")]
)
def test_folders_of_parts_are_the_parts(tmp_path: Path, layout: str, words: tuple[str, str, str]) -> None:
    """The same name may be in two parts: it is another image."""
    image, label = layout.split()
    root = tmp_path / "set"
    for seed, (part, name) in enumerate([(p, n) for p in words for n in "ab"]):
        save(root / image.format(part=part, name=name), pixels(seed))
        save(root / label.format(part=part, name=name), regions(seed))
    found = trains(root)
    parts = (found.train, found.validation, found.test)
    assert [len(part) for part in parts] == [2, 2, 2]
    for i, samples in enumerate(parts):
        for j, one in enumerate(samples):
            np.testing.assert_array_equal(one.labels, regions(2 * i + j))
    assert len({s.name for part in parts for s in part}) == 6
    say(root, "[splits]", 'test = ["a"]')
    refused(root, r"\[splits\] and folders of parts")


def test_two_label_files_of_one_image_are_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set")
    save(root / "labels" / "c_mask.png", regions(2))
    refused(root, r"c\.png: two label files, c\.png and c_mask\.png; keep one")
    (root / "labels" / "c_mask.png").unlink()
    save(root / "masks" / "c.png", regions(2))
    refused(root, "labels in labels and in masks; keep one of the folders")
    shutil.rmtree(root / "masks")
    trains(root)


# ----------------------------------------------------------------------------- objects


def test_objects_in_labels_are_recognised_and_moving_the_folder_helps(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", label=circles)
    line = refused(root, "each is one blob")
    command = re.search(r"mv \S+ \S+labels_instance", line)
    assert command, line
    subprocess.run(shlex.split(command[0]), check=True)
    found = trains(root)
    np.testing.assert_array_equal(found.train[0].instances, circles(0))
    assert found.train[0].object_px == pytest.approx(7.5, abs=1)


@pytest.mark.parametrize(
    "label",
    [
        lambda seed: circles(seed, 12 - seed).astype(np.uint16) * 700,  # sparse
        lambda seed: circles(seed, 6 + seed % 3),  # few, another number in each image
        lambda seed: (
            np.random.default_rng(seed).permutation(60000)[circles(seed)].astype(np.uint16) * (circles(seed) > 0)
        ),
    ],
    ids=["sparse", "few", "random numbers"],
)
def test_numbers_of_objects_are_recognised_however_they_are_given(tmp_path: Path, label: Maker) -> None:
    refused(folder_of(tmp_path / "set", label=label), "each is one blob.*labels_instance")


@pytest.mark.parametrize(
    "label",
    [lambda s: regions(s, 6), lambda s: (np.mgrid[:SIDE, :SIDE][0] // 6).astype(np.uint8)],
    ids=["regions", "layers"],
)
def test_classes_are_not_taken_for_objects(tmp_path: Path, label: Maker) -> None:
    """Neither classes of several blobs, nor layers, which are one blob each and in every image."""
    found = trains(folder_of(tmp_path / "set", label=label))
    np.testing.assert_array_equal(found.train[3].labels, label(3))


def test_classes_that_are_named_are_taken_even_if_each_is_one_blob(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", label=circles)
    refused(root, r"if they are classes, name them all as \[\[classes\]\]")
    say(root, *(f'[[classes]]\nname = "class {k}"' for k in range(13)))
    np.testing.assert_array_equal(trains(root).train[0].labels, circles(0))


def test_masks_among_the_objects_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder_of(
        tmp_path / "set", label=lambda s: (circles(s) > 0).astype(np.uint8), labels="labels_instance/{}.png"
    )
    done = train(root)
    assert done.returncode == 0
    assert "all objects of an image have one number" in caplog.text


# ----------------------------------------------------------------------------- masks and colours


def test_a_mask_of_0_and_255_asks_for_a_threshold(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", label=lambda seed: regions(seed) * np.uint8(255))
    line = refused(root, "the values are 0 and 255")
    say(root, advice(line, "threshold"))
    np.testing.assert_array_equal(trains(root).train[1].labels, regions(1))


def test_a_mask_of_0_and_255_may_also_name_its_classes(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", label=lambda seed: regions(seed) * np.uint8(255))
    say(root, '[[classes]]\nname = "ground"\n[[classes]]\nname = "gland"')
    refused(root, "the values are 0 and 255")
    (root / "dataset.toml").write_text('[[classes]]\nname = "a"\n[[classes]]\nname = "b"\nvalue = 255\n')
    np.testing.assert_array_equal(trains(root).train[1].labels, regions(1))


def test_soft_edges_ask_for_a_threshold(tmp_path: Path) -> None:
    def soft(seed: int) -> NDArray[np.uint8]:
        edges: NDArray[np.uint8] = ndimage.uniform_filter(regions(seed) * 255.0, 3).astype(np.uint8)
        return edges

    root = folder_of(tmp_path / "set", label=soft)
    say(root, advice(refused(root, "soft edges"), "threshold"))
    trains(root)


def test_labels_as_jpeg_are_refused_and_png_or_a_threshold_helps(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", label=lambda seed: regions(seed) * np.uint8(255), labels="labels/{}.jpg")
    line = refused(root, "JPEG changes values")
    say(root, advice(line, "threshold"))
    found = trains(root)
    agree = [float((own == regions(seed)).mean()) for seed, own in enumerate(labels_of(found))]
    assert min(agree) > 0.95
    (root / "dataset.toml").unlink()
    shutil.rmtree(root / "labels")
    for seed, name in enumerate(NAMES):
        save(root / "labels" / f"{name}.png", regions(seed))
    np.testing.assert_array_equal(trains(root).train[0].labels, regions(0))


def test_a_jpeg_is_found_under_another_name_and_in_a_tiff(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set")
    save(root / "labels" / "x.jpg", regions(0) * np.uint8(255))
    (root / "labels" / "x.jpg").rename(root / "labels" / "a.png")
    refused(root, r"a\.png: JPEG changes values")
    (root / "labels" / "a.png").unlink()
    save(root / "labels" / "a.webp", np.stack([regions(0) * 255] * 3, -1).astype(np.uint8))
    refused(root, r"a\.webp: lossy WebP changes values")
    save(root / "labels" / "a.webp", np.stack([regions(0)] * 3, -1), lossless=True)
    trains(root)


def painted(seed: int, colors: tuple[tuple[int, int, int], ...] = (BLACK, RED, BLUE)) -> NDArray[np.uint8]:
    return np.asarray(colors, np.uint8)[regions(seed, len(colors))]


def test_labels_in_colour_ask_for_the_table_and_take_it(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", label=painted)
    line = refused(root, "labels in colour: ", 'e.g. name = "gland"')
    told = re.findall(r"\[(\d+), (\d+), (\d+)\]", line.partition(";")[0])
    assert {tuple(map(int, color)) for color in told} == {BLACK, RED, BLUE}
    say(root, *(f'[[classes]]\nname = "{color}"\ncolor = {list(color)}' for color in (BLACK, RED)))
    refused(root, r"colour \[0, 0, 255\] is no class of dataset\.toml", "or as ignore = ")
    say(root, f'[[classes]]\nname = "blue"\ncolor = {list(BLUE)}')
    for seed, own in enumerate(labels_of(trains(root))):
        np.testing.assert_array_equal(own, regions(seed, 3))


def test_a_colour_may_mean_not_annotated(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", label=painted)
    say(root, f"ignore = {list(BLUE)}")
    say(root, *(f'[[classes]]\nname = "{color}"\ncolor = {list(color)}' for color in (BLACK, RED)))
    for seed, own in enumerate(labels_of(trains(root))):
        np.testing.assert_array_equal(own, np.where(regions(seed, 3) == 2, IGNORED, regions(seed, 3)))


def save_palette(path: Path, indices: NDArray[np.uint8], colors: dict[int, tuple[int, int, int]]) -> None:
    image = Image.new("P", indices.shape[::-1])
    image.putdata(indices.ravel().tolist())
    image.putpalette([v for i in range(256) for v in colors.get(i, (7, 7, 7))])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_a_palette_gives_the_numbers_or_if_these_are_none_the_colours(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set")
    table = "\n".join(f'[[classes]]\nname = "{c}"\ncolor = {list(c)}' for c in (BLACK, RED))
    for seed, name in enumerate(NAMES):
        save_palette(root / "labels" / f"{name}.png", regions(seed), {0: BLACK, 1: RED})
    np.testing.assert_array_equal(trains(root).train[0].labels, regions(0))
    say(root, table)
    np.testing.assert_array_equal(trains(root).train[0].labels, regions(0))
    for seed, name in enumerate(NAMES):  # indices 40 and 9, as after a quantisation
        save_palette(root / "labels" / f"{name}.png", np.array([40, 9], np.uint8)[regions(seed)], {40: BLACK, 9: RED})
    np.testing.assert_array_equal(trains(root).train[0].labels, regions(0))
    for seed, name in enumerate(NAMES):  # indices say 0 and 1, colours 1 and 0
        save_palette(root / "labels" / f"{name}.png", regions(seed), {1: BLACK, 0: RED})
    refused(root, "its numbers name other classes than the colours", "leave the colors out")
    (root / "dataset.toml").write_text('[[classes]]\nname = "a"\n[[classes]]\nname = "b"\n')
    np.testing.assert_array_equal(trains(root).train[0].labels, regions(0))


def test_labels_saved_as_grey_rgb_are_numbers(tmp_path: Path) -> None:
    found = trains(folder_of(tmp_path / "set", label=lambda seed: np.stack([regions(seed, 3)] * 3, -1)))
    np.testing.assert_array_equal(found.train[2].labels, regions(2, 3))


def test_a_photograph_among_the_labels_is_named(tmp_path: Path) -> None:
    refused(folder_of(tmp_path / "set", label=pixels), r"a\.png: \d+ colours, too many for classes.*as PNG")


# ----------------------------------------------------------------------------- not annotated


def test_255_is_not_annotated_and_another_value_may_be(tmp_path: Path) -> None:
    def partly(seed: int, value: int) -> NDArray[np.integer]:
        labels = regions(seed).astype(np.int32)
        labels[:10] = value
        return labels

    root = folder_of(tmp_path / "set", label=lambda s: partly(s, 255).astype(np.uint8))
    wanted = np.where(np.arange(SIDE)[:, None] < 10, IGNORED, regions(1))
    np.testing.assert_array_equal(trains(root).train[1].labels, wanted)
    shutil.rmtree(root)
    folder_of(root, label=lambda s: partly(s, -1), labels="labels/{}.tif")
    say(root, advice(refused(root, "value -1 in it"), "ignore"))
    np.testing.assert_array_equal(trains(root).train[1].labels, wanted)
    shutil.rmtree(root)
    folder_of(root, label=lambda s: partly(s, 99).astype(np.uint8))
    refused(root, "values 0, 1, 99 are no labels", "not annotated, as ignore")
    say(root, "ignore = 99")
    np.testing.assert_array_equal(trains(root).train[1].labels, wanted)


def test_an_absent_class_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder_of(tmp_path / "set")
    say(root, *(f'[[classes]]\nname = "{name}"' for name in ("ground", "gland", "lumen")))
    done = train(root)
    assert done.returncode == 0
    assert "no training image shows lumen: it cannot be learned" in caplog.text
    assert "no validation image shows lumen" in caplog.text
    assert "ground" not in caplog.text


# ----------------------------------------------------------------------------- images


def advice(line: str, key: str) -> str:
    """Return the line for ``dataset.toml`` that a message gives."""
    match = re.search(rf'{key} = (\[[^\]]*\]|"\w+"|-?[\d.]+)', line)
    assert match, line
    return match[0]


def deep_png(path: Path, values: NDArray[np.uint16]) -> None:
    path.write_bytes(imagecodecs.png_encode(values))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_16_bit_images_are_scaled_as_it_is_said(tmp_path: Path, suffix: str, channels: int) -> None:
    root, values = folder_of(tmp_path / "set"), []
    for seed, name in enumerate(NAMES):
        values.append(np.random.default_rng(seed).integers(0, 4096, (SIDE, SIDE, channels)).astype(np.uint16))
        (root / "images" / f"{name}.png").unlink()
        path = root / "images" / f"{name}{suffix}"
        if suffix == ".png":
            deep_png(path, np.squeeze(values[-1]))
        elif suffix == ".tif":
            tifffile.imwrite(path, np.squeeze(values[-1]), photometric="rgb" if channels == 3 else "minisblack")
        else:
            np.save(path, values[-1])
    line = refused(root, r"more than 8 bits per channel \(uint16")
    assert advice(line, "intensity") == "intensity = [0, 4095]"
    say(root, advice(line, "intensity"))
    found = trains(root)
    for one, deep in zip(found.train, values, strict=True):
        np.testing.assert_allclose(one.image, deep / 4095 * 255, atol=0.5001)


def test_floats_are_scaled_and_cut_off(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[[-1.0], [0.0]], [[0.5], [2.0]]], np.float32))
    np.testing.assert_array_equal(read_image(tmp_path / "a.npy", Reading((0.0, 1.0)))[..., 0], [[0, 0], [128, 255]])


@pytest.mark.parametrize("kind", ["png", "palette", "grey", "webp"])
def test_transparent_pixels_get_the_colour_that_is_said(tmp_path: Path, kind: str) -> None:
    root = folder_of(tmp_path / "set")
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:20] = 0
    for seed, name in enumerate(NAMES):
        path = root / "images" / f"{name}.png"
        if kind == "grey":
            Image.fromarray(np.dstack([pixels(seed, 1), alpha])).save(path)
        elif kind == "palette":
            image = Image.new("P", (SIDE, SIDE))
            image.putdata((alpha // 255).ravel().tolist())
            image.putpalette([9, 9, 9, 40, 50, 60] + [0] * 750)
            image.save(path, transparency=0)
        else:
            path.unlink()
            Image.fromarray(np.dstack([pixels(seed), alpha])).save(path.with_suffix(f".{kind}"), lossless=True)
    line = refused(root, r"41\.7 % of its pixels are transparent")
    say(root, advice(line, "transparent"))
    for seed, one in enumerate(trains(root).train):
        assert (one.image[:20] == 255).all()
        if kind == "png":
            np.testing.assert_array_equal(one.image[20:], pixels(seed)[20:])
    (root / "dataset.toml").write_text('transparent = "channel"\n')
    channels = 2 if kind == "grey" else 4
    found = trains(root, "--set", "method.target=labels")
    assert found.channels == channels
    np.testing.assert_array_equal(found.train[0].image[..., -1], alpha)


def test_an_opaque_alpha_channel_is_left_out(tmp_path: Path) -> None:
    found = trains(
        folder_of(tmp_path / "set", image=lambda s: np.dstack([pixels(s), np.full((SIDE, SIDE), 255, np.uint8)]))
    )
    np.testing.assert_array_equal(found.train[0].image, pixels(0))


# ----------------------------------------------------------------------------- channels

WRITERS = {
    "npy": lambda path, values: np.save(path.with_suffix(".npy"), values),
    "interleaved": lambda path, values: tifffile.imwrite(
        path.with_suffix(".tif"), values, photometric="minisblack", planarconfig="contig"
    ),
    "planar": lambda path, values: tifffile.imwrite(
        path.with_suffix(".tif"), np.moveaxis(values, -1, 0), photometric="minisblack", planarconfig="separate"
    ),
    "imagej": lambda path, values: tifffile.imwrite(
        path.with_suffix(".tif"), np.moveaxis(values, -1, 0), imagej=True, metadata={"axes": "CYX"}
    ),
    "ome": lambda path, values: tifffile.imwrite(
        path.with_suffix(".ome.tif"), np.moveaxis(values, -1, 0), ome=True, metadata={"axes": "CYX"}
    ),
}


@pytest.mark.parametrize("channels", [2, 4, 7])
@pytest.mark.parametrize("form", WRITERS)
def test_images_of_several_channels_are_read_as_they_were_written(tmp_path: Path, form: str, channels: int) -> None:
    WRITERS[form](tmp_path / "a", pixels(3, channels))
    (path,) = tmp_path.iterdir()
    np.testing.assert_array_equal(read_image(path), pixels(3, channels))


def test_pages_that_are_not_called_channels_are_refused_and_an_array_helps(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set")
    for seed, name in enumerate(NAMES):
        (root / "images" / f"{name}.png").unlink()
        tifffile.imwrite(root / "images" / f"{name}.tif", np.moveaxis(pixels(seed, 4), -1, 0), photometric="minisblack")
    refused(root, r"a\.tif: 4 images in one file.*array \(H, W, C\) with numpy\.save")
    for path in sorted((root / "images").iterdir()):
        np.save(path.with_suffix(".npy"), np.moveaxis(tifffile.imread(path), 0, -1))
        path.unlink()
    assert trains(root, "--set", "method.target=labels").channels == 4


def four_channels(tmp_path: Path) -> Path:
    root = folder_of(tmp_path / "set", image=lambda s: pixels(s, 4), images="images/{}.npy")
    for pool in ("target", "unlabelled", "presence", "absence"):
        for seed in range(3):
            save(root / pool / f"{seed}.npy", pixels(seed + 10, 4))
    return root


def test_imems_says_that_it_needs_a_grey_value(tmp_path: Path) -> None:
    root = four_channels(tmp_path)
    line = refused(root, "images of 4 channels: iMEMS embeds the grey value")
    assert 'set method.target="labels"' in line
    trains(root, "--set", "method.target=labels")
    assert checkpoint.read(tmp_path / "run" / "best").channels == 4


SMALL = {
    "apma_net": ("base_width=4", "discriminator_width=4", "source_only_steps=0.0"),
    "pyramid_gan": ("levels=1", "first_width=4", "growth=2", "layers=1", "g_width=4", "d_width=4", "poolings=2"),
    "translation": ("width=4", "depth=3", "unique_channels=8", "mlp_width=8", "discriminator_width=4", "image_px=32"),
    "uda_self_ensembling": ("base_width=4", "discriminator_width=4"),
}


@pytest.mark.parametrize("method", SMALL)
def test_the_other_methods_train_on_four_channels(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With warps and jitter, at another resolution; the run's sheets and scores are made too."""
    root = four_channels(tmp_path)
    say(root, "mpp = 0.4")
    chosen = [f"method.{s}" for s in SMALL[method]] + ["schedule.steps=1", "schedule.crop_px=32", "schedule.batch=1"]
    chosen += ["augmentation.rotate=5", "augmentation.color_jitter=0.1", "augmentation.motion_blur=3"]
    chosen += ["augmentation.light=0.1", "augmentation.focus=1", "augmentation.stain=0.1"]
    words = [word for setting in chosen for word in ("--set", setting)]
    run = tmp_path / "run"
    done = call(cli.main, "--method", method, "--data", root, "--out", run, "--mpp", "0.5", "--device", "cpu", *words)
    assert done.returncode == 0, done.stderr
    assert "augmentation.stain: of RGB images only" in caplog.text
    assert checkpoint.read(run / "best").channels == 4
    assert any((run / "samples").iterdir())


def test_images_of_several_numbers_of_channels_are_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set")
    (root / "images" / "c.png").unlink()
    save(root / "images" / "c.npy", pixels(0, 5))
    refused(root, r"1 images are of 5 channels \(c\.npy\), 5 are RGB")


def test_an_array_that_holds_objects_is_not_unpickled(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set")
    (root / "images" / "c.png").unlink()
    np.save(root / "images" / "c.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(root, r"c\.npy: cannot be read")

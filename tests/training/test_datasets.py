"""Sets are read as they lie on disk, and what is wrong with them is said before training starts."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histostream.training import command, data, datasets
from histostream.training.data import DataError, StoredSample
from histostream.training.datasets import _layout, _slides, folder, open_dataset, open_pool
from histostream.training.datasets._slides import SlideSample, filled
from histostream.training.datasets.folder import read_folder
from histostream.wsi.errors import SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.synthetic import SyntheticSlide
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.strips import cut, read_strips
from histostream.wsi.tiling.tissue import find_tissue
from tests.conftest import REPOSITORY


def save(path: Path, pixels: NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(seed: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def classes_of(seed: int, height: int, width: int, count: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, count, (height, width)).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a set of six images of 40 x 48, classes 0 to 2, named a1 a2 b1 b2 c1 c2."""
    root = tmp_path / "mine"
    for i, name in enumerate(("a1", "a2", "b1", "b2", "c1", "c2")):
        save(root / "images" / f"{name}.png", noise(i, 40, 48, 3))
        save(root / "labels" / f"{name}.png", classes_of(i, 40, 48))
    return root


def say(root: Path, text: str) -> None:
    (root / "dataset.toml").write_text(text, encoding="utf-8")


THREE = """
[[classes]]
name = "stroma"
[[classes]]
name = "gland"
color = [200, 30, 60]
[[classes]]
name = "lumen"
"""


# ----------------------------------------------------------------------------- the folder layout


def test_a_folder_is_read_with_nothing_said_about_it(root: Path) -> None:
    found = open_dataset(str(root))
    assert (found.name, found.classes, found.mpp, found.channels) == ("mine", (), None, 3)
    assert [s.name for s in found.train] == [f"{n}.png" for n in ("a1", "a2", "b1", "b2", "c1", "c2")]
    assert [s.group for s in found.train] == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert not found.validation
    assert not found.test
    assert not found.pools
    for i, sample in enumerate(found.train):
        np.testing.assert_array_equal(sample.image, noise(i, 40, 48, 3))
        np.testing.assert_array_equal(sample.labels, classes_of(i, 40, 48))
        assert sample.instances is None
        assert np.isnan(sample.object_px)


def test_objects_are_two_classes(tmp_path: Path) -> None:
    objects = np.zeros((30, 30), np.uint16)
    objects[2:12, 2:12], objects[15:25, 15:25] = 300, 7
    save(tmp_path / "images" / "a.png", noise(0, 30, 30))
    save(tmp_path / "labels_instance" / "a.png", objects)
    (sample,) = open_dataset(str(tmp_path)).train
    np.testing.assert_array_equal(sample.labels, objects > 0)
    np.testing.assert_array_equal(sample.instances, objects)
    assert sample.object_px == pytest.approx(2 * np.sqrt(100 / np.pi))
    assert sample.image.shape == (30, 30, 1)


def test_both_kinds_of_labels_give_classes_and_objects(root: Path) -> None:
    for i, path in enumerate(sorted((root / "labels").iterdir())):
        save(root / "labels_instance" / path.name, classes_of(i, 40, 48) * np.uint16(500))
    for i, sample in enumerate(open_dataset(str(root)).train):
        np.testing.assert_array_equal(sample.labels, classes_of(i, 40, 48))
        np.testing.assert_array_equal(sample.instances, sample.labels * np.int32(500))


def test_the_file_names_classes_and_their_values(root: Path) -> None:
    values = np.array([90, 0, 255], np.uint8)
    for i, path in enumerate(sorted((root / "labels").iterdir())):
        save(path, values[classes_of(i, 40, 48)])
    say(
        root,
        """
        name = "glands"
        mpp = 0.5
        group = "^([a-z])"
        classes = [{name = "stroma", value = 90}, {name = "gland", color = [1, 2, 3], value = 0},
                   {name = "lumen", value = 255}]
        """.replace("\n                  ", ""),
    )
    found = open_dataset(str(root))
    assert (found.name, found.mpp) == ("glands", 0.5)
    assert [name for name, _ in found.classes] == ["stroma", "gland", "lumen"]
    assert found.classes[1][1] == (1, 2, 3)
    assert [s.group for s in found.train] == list("aabbcc")
    for i, sample in enumerate(found.train):
        np.testing.assert_array_equal(sample.labels, classes_of(i, 40, 48))


def test_official_parts_are_patterns_of_names(root: Path) -> None:
    say(root, '[splits]\ntest = ["c*"]\nvalidation = ["b1"]')
    found = open_dataset(str(root))
    parts = (found.train, found.validation, found.test)
    named = [[s.name.removesuffix(".png") for s in part] for part in parts]
    assert named == [["a1", "a2", "b2"], ["b1"], ["c1", "c2"]]
    assert [s.name for s in read_folder(root)] == sorted(s.name for p in parts for s in p)
    say(root, '[splits]\ntrain = ["a1"]\ntest = ["c*"]')
    found = open_dataset(str(root))
    assert [len(part) for part in (found.train, found.validation, found.test)] == [1, 0, 2]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (2, 3), (1, 2)])
def test_parts_cover_each_image_and_stay_in_its_group(root: Path, rows: int, columns: int) -> None:
    for i, path in enumerate(sorted((root / "labels").iterdir())):
        save(root / "labels_instance" / path.name, classes_of(i, 40, 48))
    whole = open_dataset(str(root)).train
    say(root, f"parts = [{rows}, {columns}]")
    cut_up = open_dataset(str(root)).train
    assert len(cut_up) == 6 * rows * columns
    assert len({s.name for s in cut_up}) == len(cut_up)
    for i, one in enumerate(whole):
        parts = cut_up[i * rows * columns :][: rows * columns]
        assert {p.group for p in parts} == {one.group}
        for what in ("image", "labels", "instances"):
            pieces = [getattr(p, what) for p in parts]
            lines = [np.concatenate(pieces[r * columns :][:columns], axis=1) for r in range(rows)]
            np.testing.assert_array_equal(np.concatenate(lines), getattr(one, what))


def test_parts_are_measured_on_their_own() -> None:
    objects = np.zeros((40, 40), np.int32)
    objects[0:10, 0:10], objects[30:34, 30:34] = 1, 2
    image = noise(0, 40, 40, 3)
    whole = StoredSample("a.png", "p", image, (objects > 0).astype(np.uint8), objects)
    widths = [part.object_px for part in folder.cut(whole, 2, 2)]
    assert widths[0] == pytest.approx(2 * np.sqrt(100 / np.pi))
    assert widths[3] == pytest.approx(2 * np.sqrt(16 / np.pi))
    assert np.isnan(widths[1])


def test_pools_are_pictures_without_labels(root: Path) -> None:
    save(root / "target" / "t.png", noise(9, 30, 30, 3))
    save(root / "absence" / "n.jpg", noise(9, 30, 30, 3))
    found = open_dataset(str(root))
    assert sorted(found.pools) == ["absence", "target"]
    assert [p.name for p in found.pools["target"]] == ["t.png"]
    np.testing.assert_array_equal(found.pools["target"][0].image, noise(9, 30, 30, 3))


def test_the_documented_file_is_read(root: Path) -> None:
    """Every key is shown in the documentation, and the example works."""
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    example, further = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert tomllib.loads(example).keys() | tomllib.loads(further).keys() == set(_layout.KEYS)
    (root / "dataset.toml").write_text(further, encoding="utf-8")
    layout = _layout.read_layout(root)
    assert (layout.reading.intensity, layout.reading.transparent) == ((0.0, 4095.0), (255, 255, 255))
    assert (layout.threshold, layout.ignored_value) == (128.0, 255)
    for i, path in enumerate(sorted((root / "images").iterdir())):
        path.rename(path.with_name(f"P0{4 + i}_1.png"))
        labels = root / "labels" / path.name
        save(labels, classes_of(i, 40, 48, 2) * np.uint8(255))
        labels.rename(labels.with_name(f"P0{4 + i}_1.png"))
    say(root, example)
    found = open_dataset(str(root))
    assert (found.name, found.mpp, len(found.train), len(found.test)) == ("my-glands", 0.5, 16, 8)
    assert {s.group for s in found.test} == {"P08", "P09"}
    assert {name: f"`{name}`" in text for name in datasets.DATASETS.names()} == dict.fromkeys(
        datasets.DATASETS.names(), True
    )


# ----------------------------------------------------------------------------- what is refused


def break_sizes(root: Path) -> None:
    save(root / "labels" / "a2.png", classes_of(0, 40, 47))


def break_values(root: Path) -> None:
    say(root, THREE)
    labels = classes_of(0, 40, 48)
    labels[0, 0], labels[0, 1] = 7, 9
    save(root / "labels" / "b1.png", labels)


def break_far_values(root: Path) -> None:
    for i, path in enumerate(sorted((root / "labels").iterdir())):
        save(path, classes_of(i, 40, 48) * np.uint8(100))


def break_high_values(root: Path) -> None:
    save(root / "labels" / "b1.png", classes_of(0, 40, 48, 2) * np.uint16(256))


def break_channels(root: Path) -> None:
    save(root / "labels" / "c2.png", noise(0, 40, 48, 3))


def break_empty(root: Path) -> None:
    (root / "images" / "a1.png").write_bytes(b"")


def break_corrupt(root: Path) -> None:
    for name in ("a1", "b2"):
        (root / "images" / f"{name}.png").write_bytes(b"no picture")


def break_stems(root: Path) -> None:
    save(root / "images" / "a1.jpg", noise(0, 40, 48, 3))


def break_label_stems(root: Path) -> None:
    save(root / "labels" / "a1.tif", classes_of(0, 40, 48))


def break_mixed(root: Path) -> None:
    save(root / "images" / "c1.png", noise(0, 40, 48))


def break_mixed_pool(root: Path) -> None:
    save(root / "target" / "t.png", noise(0, 40, 48))


def break_background(root: Path) -> None:
    for path in (root / "labels").iterdir():
        save(path, np.zeros((40, 48), np.uint8))


def break_deep(root: Path) -> None:
    save(root / "images" / "a1.png", np.full((40, 48), 4000, np.uint16))


def break_float(root: Path) -> None:
    (root / "images" / "a1.png").unlink()
    save(root / "images" / "a1.tif", np.ones((40, 48), np.float32))


def break_small(root: Path) -> None:
    save(root / "images" / "a1.png", noise(0, 15, 48, 3))
    save(root / "labels" / "a1.png", classes_of(0, 15, 48))


def break_one_label(root: Path) -> None:
    (root / "labels" / "b2.png").unlink()


def break_three_labels(root: Path) -> None:
    for name in ("a1", "b2", "c1"):
        (root / "labels" / f"{name}.png").unlink()


def break_no_labels(root: Path) -> None:
    shutil.rmtree(root / "labels")


def break_no_images(root: Path) -> None:
    shutil.rmtree(root / "images")


def break_all_images(root: Path) -> None:
    shutil.rmtree(root / "images")
    (root / "images").mkdir()


def break_negative(root: Path) -> None:
    (root / "labels" / "a1.png").unlink()
    save(root / "labels" / "a1.tif", np.full((40, 48), -1, np.int32))


def break_empty_pool(root: Path) -> None:
    (root / "unlabelled").mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_sizes, r"a2\.png: 47 x 40 px, its image 48 x 40.*export them again"),
        (break_values, r"b1\.png: value 7, 9 is no class of dataset\.toml \(0, 1, 2\); add it"),
        (break_far_values, r"labels: the values 0, 100, 200 are no labels"),
        (break_high_values, r"labels: the values 0, 1, 2, 256 are no labels.*\[\[classes\]\]"),
        (break_channels, r"c2\.png: \d+ colours, too many for classes"),
        (break_empty, r"a1\.png: the file is empty"),
        (break_corrupt, r"a1\.png: cannot be read.*b2\.png: cannot be read"),
        (break_stems, r"images: more than one file of a name: a1\.jpg and a1\.png"),
        (break_label_stems, r"labels: more than one file of a name: a1\.png and a1\.tif"),
        (break_mixed, r"1 images are grey \(c1\.png\), 5 are RGB; convert"),
        (break_mixed_pool, r"1 images are grey \(target/t\.png\), 6 are RGB"),
        (break_background, r"every label of its 6 images is 0"),
        (break_deep, r"a1\.png: more than 8 bits per channel \(uint16, 4000 to 4000\): .*intensity = \[0, 4095\]"),
        (break_float, r"a1\.tif: more than 8 bits per channel \(float32, 1 to 1\): .*intensity = \[0\.0, 1\.0\]"),
        (break_small, r"a1\.png: 48 x 15 px; at least 16 x 16"),
        (break_one_label, r"b2\.png: no label file .*labels.b2\.png"),
        (break_three_labels, r"labels: 3 label files are missing: a1\.png, b2\.png, c1\.png"),
        (break_no_labels, r"no labels; put them in .*labels or /labels_instance"),
        (break_no_images, r"no folder 'images' in it"),
        (break_all_images, r"images: no image in it"),
        (break_negative, r"a1\.tif: value -1 in it; labels begin at 0"),
        (break_empty_pool, r"unlabelled: no image and no slide in it"),
    ],
)
def test_a_broken_set_is_refused_by_file(root: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(root)
    with pytest.raises(DataError, match=words) as error:
        open_dataset(str(root))
    assert "\n" not in str(error.value)


def test_only_the_first_of_many_problems_are_told(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="and 2 more like these"):
        open_dataset(str(root))


def test_an_image_above_the_limit_is_refused_without_a_warning(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with pytest.raises(DataError, match=r"a1\.png: too large"):
        open_dataset(str(root))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mpp == 1", r"dataset\.toml: not a TOML file \(.*line 1"),
        ('resolution = 1\ncolour = "red"', "unknown key 'resolution', 'colour'; known: name, mpp"),
        ("mpp = -1", "mpp=-1: expected a positive number"),
        ("mpp = true", "mpp=True"),
        ("name = 3", "name=3: expected a text"),
        ("tile_px = 8", "tile_px=8: expected a whole number from 32"),
        ("parts = [2]", r"parts=\[2\]: expected \[rows, columns\]"),
        ("parts = [0, 2]", r"parts=\[0, 2\]"),
        ("parts = [3, 2]", r"a1\.png: 48 x 40 px cannot be cut into 3 x 2 parts"),
        ("group = '('", "is no regular expression"),
        ("group = 'a'", "put the group's name in parentheses"),
        ("group = '(a)'", "does not match 'b1'"),
        ("[classes]\nname = 'x'", r"write each class as \[\[classes\]\]"),
        ("[[classes]]\nname = 'x'", "one class only"),
        ("[[classes]]\nname = 'x'\n[[classes]]\ncolor = [1, 2, 3]", "class number 1 has no name"),
        ("[[classes]]\nname = 'x'\n[[classes]]\nname = 'x'", "the same name: x, x"),
        (THREE + "value = 1", "the same value: 0, 1, 1"),
        (THREE + "color = [1, 2]", r"classes.color=\[1, 2\]"),
        (THREE + "color = [1, 2, 256]", r"classes.color=\[1, 2, 256\]"),
        (THREE + "colour = 'red'", "unknown key 'classes.colour'"),
        ("[splits]\ntest = 'a'", "splits.test='a': expected a list"),
        ("[splits]\ntrial = ['a*']", "unknown key 'splits.trial'"),
        ("[splits]\ntest = ['d*']", "splits.test: 'd\\*' matches no image"),
        ("[splits]\ntest = ['a*']\nvalidation = ['a1']", "in two splits: a1"),
        ("group = '(.)'\n[splits]\ntest = ['a1']", "group 'a' is in train and in test"),
    ],
)
def test_a_wrong_word_in_the_file_is_named(root: Path, text: str, words: str) -> None:
    say(root, text)
    with pytest.raises(DataError, match=words) as error:
        open_dataset(str(root))
    assert "\n" not in str(error.value)


def test_three_classes_need_more_than_objects(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", noise(0, 30, 30))
    save(tmp_path / "labels_instance" / "a.png", classes_of(0, 30, 30))
    say(tmp_path, THREE)
    with pytest.raises(DataError, match="3 classes, but labels_instance/ alone tells two apart"):
        open_dataset(str(tmp_path))


# ----------------------------------------------------------------------------- the registry


def test_the_folder_is_the_registry() -> None:
    assert datasets.DATASETS.names() == ["brats", "dsb2018", "epfl", "glas", "mnist", "monuseg", "tnbc", "vnc"]


def patient(folder: Path, seed: int) -> None:
    """Volumes of 40 x 30 x 4 voxels; the left half of slices 1 and 2 has a tumour."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    brain = np.zeros((40, 30, 4), bool)
    brain[4:36, 3:27, :3] = True  # the last slice has none
    tumour = np.zeros(brain.shape, np.uint8)
    tumour[6:14, 5:15, 1:3] = 2
    tumour[8:12, 8:12, 1] = 4
    for k, name in enumerate(("flair", "t1ce", "t1", "t2")):
        volume = rng.normal(300 + 100 * k, 30, brain.shape) + 100 * (tumour > 0)
        nibabel.save(
            nibabel.Nifti1Image(np.where(brain, volume, 0).astype(np.float32), np.eye(4)),
            folder / f"{folder.name}_{name}.nii.gz",
        )
    nibabel.save(nibabel.Nifti1Image(tumour, np.eye(4)), folder / f"{folder.name}_seg.nii.gz")


def test_volumes_become_half_slices_with_and_without_the_tumour(tmp_path: Path) -> None:
    for grade, count in (("HGG", 10), ("LGG", 3)):
        for i in range(count):
            patient(tmp_path / grade / f"Brats17_{grade}_{i}", i)
    found = open_dataset(f"brats:{tmp_path}?labelled=0.2")
    assert (found.channels, found.mpp) == (3, 1000.0)
    parts = {name: {s.group for s in getattr(found, name)} for name in ("validation", "test")}
    pools = {name: {p.group for p in pool} for name, pool in found.pools.items()}
    assert [len(groups) for groups in parts.values()] == [1, 2]  # 1 of HGG; 1 of each
    assert pools["presence"] == pools["absence"]
    assert len(pools["presence"]) == 10
    assert not pools["presence"] & (parts["validation"] | parts["test"])
    train = {s.group for s in found.train}
    assert len(train) == 2
    assert train < pools["presence"]
    assert len(found.pools["presence"]) == 20  # left of slices 1 and 2
    assert len(found.pools["absence"]) == 40  # left of slice 0, right of three
    one = found.train[0]
    assert one.image.shape == (30, 20, 3)
    assert one.image[0, 0].tolist() == [128] * 3
    assert one.labels[5:15, 6:14].all()
    assert one.labels.sum() == 80
    inside = one.image[one.labels > 0].mean()
    assert inside > one.image[(one.labels == 0) & (one.image[..., 0] != 128)].mean() + 20
    grey = open_dataset(f"brats:{tmp_path}?sequences=t2")
    assert grey.channels == 1
    (tmp_path / "HGG" / "Brats17_HGG_3" / "Brats17_HGG_3_seg.nii.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"_seg\.nii\.gz: cannot be read"):
        open_dataset(f"brats:{tmp_path}")
    (tmp_path / "HGG" / "Brats17_HGG_3" / "Brats17_HGG_3_seg.nii.gz").unlink()
    with pytest.raises(DataError, match=r"no Brats17_HGG_3_seg\.nii\.gz in it"):
        open_dataset(f"brats:{tmp_path}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("glass:{0}", "no data set is called 'glass': did you mean 'glas'"),
        ("zzz:{0}", "known: brats, dsb2018, epfl"),
        ("glas:{0}/nowhere", "nowhere: there is no such folder"),
        ("{0}/nowhere", "nowhere: there is no such folder"),
        ("C:\\data\\mine", "there is no such folder"),
        ("glas:{0}?part=b", "glas: unknown option 'part'; it has none"),
        ("mnist:{0}?side=3", "unknown option 'side'; it has variant, count, seed, labelled"),
        ("mnist:{0}?count=many", "mnist: count='many': expected int"),
        ("mnist:{0}?count", "write option=value"),
        ("mnist:{0}?variant=huge", "variant='huge': use simple, hard or large"),
        ("mnist:{0}?seed=-1", "seed=-1"),
        ("mnist:{0}", "no train-images-idx3-ubyte or"),
        ("monuseg:{0}?organ=liver", "organ='liver': use kirc, other or all"),
        ("dsb2018:{0}?kind=dark", "kind='dark': use brightfield or fluorescence"),
        ("brats:{0}?sequences=flair,t2", "sequences='flair,t2': give one or three of flair, t1ce"),
        ("brats:{0}?sequences=t2,t2,t2", "give one or three of"),
        ("brats:{0}?labelled=0", "labelled=0.0"),
        ("brats:{0}", "no patient to train on in its HGG or LGG"),
        ("tnbc:{0}", "no folder 'images' in it"),
        ("glas:{0}", "no train_1, train_2"),
        ("vnc:{0}", "no folder 'raw' in it"),
        ("epfl:{0}", "no folder 'images' in it"),
    ],
)
def test_a_wrong_name_or_option_is_told(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_dataset(text.format(tmp_path))


def test_a_folder_whose_name_has_a_colon_is_a_folder(root: Path) -> None:
    odd = root.rename(root.parent / "my:set?x=1")
    assert len(open_dataset(str(odd)).train) == 6


# ----------------------------------------------------------------------------- slides

SIDE_PX, TILE = 1500, 256


def polygon(name: str, *rings: list[tuple[float, float]]) -> dict[str, object]:
    closed = [[*ring, ring[0]] for ring in rings]
    return {
        "type": "Feature",
        "properties": {"objectType": "annotation", "classification": {"name": name}},
        "geometry": {"type": "Polygon", "coordinates": closed},
    }


def rectangle(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def annotate(root: Path, name: str, *features: dict[str, object]) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    text = json.dumps({"type": "FeatureCollection", "features": features})
    (root / "annotations" / f"{name}.geojson").write_text(text)


@pytest.fixture(scope="session")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "one.tif"
    SyntheticSlide(SIDE_PX, SIDE_PX - 100, mpp=0.5, seed=2).write(path, compression="deflate")
    return path


@pytest.fixture
def slides(tmp_path: Path, slide_file: Path) -> Path:
    """Return a set of one slide with a region of glands, which has a hole and a lumen."""
    root = tmp_path / "regions"
    (root / "slides").mkdir(parents=True)
    shutil.copy(slide_file, root / "slides" / "one.tif")
    say(root, f"mpp = 0.5\ntile_px = {TILE}\n{THREE}")
    gland = polygon("gland", rectangle(100, 200, 900, 700), rectangle(300, 300, 400, 400))
    annotate(root, "one", polygon("lumen", rectangle(500, 250, 600, 350)), gland)
    return root


@pytest.mark.parametrize("mpp", [0.5, 0.8, 1.0])
def test_training_sees_the_tiles_that_inference_reads(slides: Path, mpp: float) -> None:
    say(slides, f"mpp = {mpp}\ntile_px = {TILE}\n{THREE}")
    samples = iter(open_dataset(str(slides)).train)
    with open_slide(slides / "slides" / "one.tif") as slide:
        view = at_mpp(slide, mpp)
        grid = TileGrid.cover(view.width, view.height, tile_px=TILE, overlap_px=0)
        grid = grid.where(find_tissue(view).tiles(grid))
        assert len(grid) > 2
        for tiles, strip in read_strips(view, grid):
            for tile in tiles:
                sample = next(samples)
                pixels = cut(strip, tile, width=view.width, height=view.height)
                np.testing.assert_array_equal(sample.image, pixels)
                assert sample.name == f"one_x{tile.read.x}_y{tile.read.y}"
                assert sample.shape == sample.labels.shape == (TILE, TILE)
                assert (sample.group, sample.instances) == ("one", None)
    assert next(samples, None) is None


def test_labels_are_the_smallest_polygon_at_each_pixel(slides: Path) -> None:
    truth = np.zeros((SIDE_PX - 100, SIDE_PX), np.uint8)
    truth[200:700, 100:900] = 1
    truth[300:400, 300:400] = 0
    truth[250:350, 500:600] = 2
    found = open_dataset(str(slides))
    assert [name for name, _ in found.classes] == ["stroma", "gland", "lumen"]
    assert data.class_count(found.train) == 3
    for sample in found.train:
        x, y = map(int, re.findall(r"_[xy](\d+)", sample.name))
        np.testing.assert_array_equal(sample.labels, truth[y : y + TILE, x : x + TILE])


def test_labels_follow_the_resolution(slides: Path) -> None:
    say(slides, f"mpp = 1.0\ntile_px = {TILE}\n{THREE}")
    for sample in open_dataset(str(slides)).train:
        if sample.name == "one_x0_y0":
            assert (sample.labels[100:, 50:] == 1).sum() == 156 * 206 - 50 * 50 - 6 * 50
            return
    pytest.fail("the first tile has tissue")


def test_a_region_of_interest_limits_what_is_used(slides: Path) -> None:
    gland = polygon("gland", rectangle(100, 200, 900, 700))
    annotate(slides, "one", gland, polygon("ROI", rectangle(200, 300, 700, 600)))
    samples = open_dataset(str(slides)).train
    boxes = [s._box for s in samples if isinstance(s, SlideSample)]
    assert boxes
    assert all(200 <= b.x < b.right <= 700 and 300 <= b.y < b.bottom <= 600 for b in boxes)
    assert sum(b.width * b.height for b in boxes) == 500 * 300
    for sample, box in zip(samples, boxes, strict=True):
        assert sample.image.shape == (box.height, box.width, 3)
        assert sample.labels.all()
    triangle = [(0.0, 0.0), (SIDE_PX, 0.0), (0.0, 1400.0)]
    annotate(slides, "one", gland, polygon("roi", triangle))
    whole = [s._box for s in open_dataset(str(slides)).train if isinstance(s, SlideSample)]
    assert whole
    assert all(b.right / SIDE_PX + b.bottom / 1400 <= 1.01 for b in whole)


def test_slides_and_images_make_one_set(slides: Path, root: Path) -> None:
    shutil.copytree(root / "images", slides / "images")
    shutil.copytree(root / "labels", slides / "labels")
    say(slides, f'mpp = 0.5\ntile_px = {TILE}\n{THREE}\n[splits]\ntest = ["one", "a1"]')
    found = open_dataset(str(slides))
    assert [s.name for s in found.train] == ["a2.png", "b1.png", "b2.png", "c1.png", "c2.png"]
    assert {s.group for s in found.test} == {"a1", "one"}
    save(slides / "images" / "one.png", noise(0, 40, 48, 3))
    save(slides / "labels" / "one.png", classes_of(0, 40, 48))
    with pytest.raises(DataError, match="one is an image and a slide"):
        open_dataset(str(slides))


def test_slides_in_a_pool_give_their_tissue(root: Path, slide_file: Path) -> None:
    say(root, f"mpp = 0.5\ntile_px = {TILE}\n")
    (root / "target").mkdir()
    shutil.copy(slide_file, root / "target" / "far.tif")
    save(root / "target" / "plain.tif", noise(3, 50, 50, 3))
    pool = open_dataset(str(root)).pools["target"]
    assert pool[0].name == "plain.tif"
    assert len(pool) > 3
    assert {p.group for p in pool} == {"plain", "far"}
    assert pool[1].image.shape == (TILE, TILE, 3)


def test_a_small_slide_is_one_tile_of_its_size(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    pixels = SyntheticSlide(SIDE_PX, SIDE_PX, seed=2).region(0, 0, 300, 200)[0]
    tissue = np.minimum(pixels, 180)
    tifffile.imwrite(
        tmp_path / "slides" / "s.tif",
        tissue,
        photometric="rgb",
        tile=(64, 64),
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    annotate(tmp_path, "s", polygon("gland", rectangle(0, 0, 150, 200)))
    say(tmp_path, f"mpp = 0.5\n{THREE}")
    (sample,) = open_dataset(str(tmp_path)).train
    np.testing.assert_array_equal(sample.image, tissue)
    assert sample.shape == (200, 300)


def test_tiles_are_read_by_many_threads_and_few_slides_stay_open(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (annotations,) = (slides / "annotations").iterdir()
    for name in ("two", "three", "four"):
        shutil.copy(slides / "slides" / "one.tif", slides / "slides" / f"{name}.tif")
        shutil.copy(annotations, slides / "annotations" / f"{name}.geojson")
    monkeypatch.setattr(_slides, "OPEN_SLIDES", 2)
    monkeypatch.setattr(_slides, "CACHED_TILES", 3)
    samples = open_dataset(str(slides)).train
    assert len({s.group for s in samples}) == 4
    first = {s.name.partition("_")[2]: s.image for s in samples if s.group == "one"}
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(samples)), 3))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: (samples[i].name.partition("_")[2], samples[i].image), order))
    for place, image in read:
        np.testing.assert_array_equal(image, first[place])
    assert isinstance(samples[0], SlideSample)
    store = samples[0]._slide.store
    assert len(store._open) <= 2
    assert len(store._tiles) <= 3


def test_the_digest_tells_slide_place_and_annotation(slides: Path, tmp_path: Path) -> None:
    before = open_dataset(str(slides)).train
    assert data.checksum(before) == data.checksum(open_dataset(str(slides)).train)
    assert len({s.digest() for s in before}) == len(before)
    annotate(slides, "one", polygon("gland", rectangle(100, 200, 901, 700)))
    assert data.checksum(before) != data.checksum(open_dataset(str(slides)).train)
    say(slides, f"mpp = 0.5\ntile_px = {TILE // 2}\n{THREE}")
    other = open_dataset(str(slides)).train
    assert not {s.digest() for s in before} & {s.digest() for s in other}


def refuse_no_mpp(root: Path) -> None:
    say(root, THREE)


def refuse_no_classes(root: Path) -> None:
    say(root, "mpp = 0.5")


def refuse_too_fine(root: Path) -> None:
    say(root, f"mpp = 0.1\n{THREE}")


def refuse_no_annotation(root: Path) -> None:
    (root / "annotations" / "one.geojson").unlink()


def refuse_no_annotations(root: Path) -> None:
    shutil.rmtree(root / "annotations")


def refuse_class(root: Path) -> None:
    annotate(root, "one", polygon("glands", rectangle(0, 0, 99, 99)))


def refuse_no_class(root: Path) -> None:
    annotate(root, "one", polygon("", rectangle(0, 0, 99, 99)))


def refuse_background(root: Path) -> None:
    annotate(root, "one", polygon("stroma", rectangle(0, 0, 99, 99)))


def refuse_region(root: Path) -> None:
    region = polygon("ROI", [(0, 0), (20, 5), (3, 30)])
    annotate(root, "one", polygon("gland", rectangle(0, 0, 99, 99)), region)


def refuse_unknown_mpp(root: Path) -> None:
    pixels = noise(0, 600, 600, 3)
    tifffile.imwrite(root / "slides" / "one.tif", pixels, photometric="rgb", tile=(64, 64))


def refuse_glass(root: Path) -> None:
    SyntheticSlide(300, 300, 0.5).write(root / "slides" / "one.tif")
    glass = np.full((300, 300, 3), 243, np.uint8)
    tifffile.imwrite(
        root / "slides" / "one.tif",
        glass,
        photometric="rgb",
        tile=(64, 64),
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (refuse_no_mpp, r"dataset\.toml: slides need the resolution to train at"),
        (refuse_no_classes, r"dataset\.toml: slides need the names of the classes"),
        (refuse_too_fine, r"one\.tif: it has 0\.5 um per pixel, too coarse for mpp=0\.1"),
        (refuse_no_annotation, r"one\.tif: no label file .*one\.geojson"),
        (refuse_no_annotations, "no folder 'annotations' in it"),
        (refuse_class, "a polygon of class 'glands', which .*: did you mean 'gland'"),
        (refuse_no_class, "a polygon without a class, which .*: known: stroma, gland, lumen, ROI"),
        (refuse_background, "no polygon of any class but 'stroma'"),
        (refuse_region, "no tile of one.tif has tissue and lies in a region"),
        (refuse_unknown_mpp, r"one\.tif: no resolution in the file; add slide_mpp to"),
        (refuse_glass, r"one\.tif: no tissue found on it"),
    ],
)
def test_a_slide_that_cannot_be_trained_on_is_refused(slides: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(slides)
    with pytest.raises(DataError, match=words) as error:
        open_dataset(str(slides))
    assert "\n" not in str(error.value)


def test_a_damaged_slide_or_annotation_is_refused(slides: Path) -> None:
    (slides / "annotations" / "one.geojson").write_text("no JSON")
    with pytest.raises((DataError, SlideError), match=r"one\.geojson: not valid GeoJSON"):
        open_dataset(str(slides))
    (slides / "slides" / "one.tif").write_bytes(b"")
    with pytest.raises((DataError, SlideError), match=r"one\.tif: the file is empty"):
        open_dataset(str(slides))


def test_the_resolution_of_slides_can_be_told(slides: Path) -> None:
    refuse_unknown_mpp(slides)
    say(slides, f"mpp = 0.5\nslide_mpp = 0.25\n{THREE}")
    (sample,) = open_dataset(str(slides)).train
    assert sample.shape == (300, 300)


# ----------------------------------------------------------------------------- polygons


def test_a_pixel_is_inside_where_its_centre_is() -> None:
    """Against the winding of each centre, one at a time, for random polygons with a hole."""
    rng = np.random.default_rng(0)
    box = Box(3, 5, 40, 30)
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        outline = np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(8, 25, (9, 1)) + 20
        hole = (outline - 20) * 0.3 + 20
        found = filled([outline, hole], box)
        for y, x in rng.integers((30, 40), size=(60, 2)):
            centre = np.array([box.x + x + 0.5, box.y + y + 0.5])
            assert found[y, x] == (crossings(outline, centre) + crossings(hole, centre)) % 2


def crossings(ring: NDArray[np.float64], point: NDArray[np.float64]) -> int:
    """How many edges a ray to the left of a point crosses."""
    count = 0
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if (y0 <= point[1]) != (y1 <= point[1]):
            count += x0 + (point[1] - y0) * (x1 - x0) / (y1 - y0) <= point[0]
    return count


def test_a_rectangle_covers_its_pixels_exactly_and_neighbours_share_none() -> None:
    left, right = (np.array(rectangle(x, 2, x + 5, 9), float) for x in (1, 6))
    box = Box(0, 0, 12, 12)
    expected = np.zeros((12, 12), int)
    expected[2:9, 1:11] = 1
    np.testing.assert_array_equal(filled([left], box) + filled([right], box) * 1, expected)
    assert not filled([left], Box(50, 50, 4, 4)).any()


# ----------------------------------------------------------------------------- real sets


def real(data_dir: Path, name: str) -> Path:
    if not (data_dir / name).is_dir():
        pytest.skip(f"no {name} in {data_dir}")
    return data_dir / name


@pytest.mark.parametrize(
    ("text", "counts", "groups", "channels", "mpp"),
    [
        ("glas:glands-glas", (85, 0, 20), 15, 3, 0.62005),
        ("tnbc:nuclei-tnbc", (50, 0, 0), 11, 3, 0.25),
        ("monuseg:nuclei-monuseg", (6, 0, 14), 6, 3, 0.25),
        ("monuseg:nuclei-monuseg?organ=kirc", (3, 0, 14), 3, 3, 0.25),
        ("monuseg:nuclei-monuseg?organ=other", (3, 0, 14), 3, 3, 0.25),
        ("dsb2018:nuclei-dsb2018", (107, 0, 0), 107, 3, None),
        ("dsb2018:nuclei-dsb2018/brightfield", (107, 0, 0), 107, 3, None),
        ("dsb2018:nuclei-dsb2018?kind=fluorescence", (60, 0, 0), 60, 1, None),
        ("epfl:em-epfl-hippocampus", (14, 0, 14), 14, 1, 0.005),
        ("vnc:em-vnc-sstem", (20, 0, 20), 20, 1, 0.0046),
    ],
)
def test_a_real_set_is_read_whole(
    data_dir: Path,
    text: str,
    counts: tuple[int, int, int],
    groups: int,
    channels: int,
    mpp: float | None,
) -> None:
    name, _, place = text.partition(":")
    real(data_dir, re.split(r"[?/]", place)[0])
    found = open_dataset(f"{name}:{data_dir / place}")
    assert (len(found.train), len(found.validation), len(found.test)) == counts
    assert len({s.group for s in found.train}) == groups
    assert (found.name, found.channels, found.mpp) == (name, channels, mpp)
    assert len(found.classes) == data.class_count(found.train) == 2
    for sample in (*found.train, *found.test):
        assert (sample.instances is None) == (name in ("epfl", "vnc"))
        if sample.instances is not None:
            np.testing.assert_array_equal(sample.labels, sample.instances > 0)
            assert 5 < sample.object_px < 700


def test_glas_groups_are_patients_in_the_order_of_numbers(data_dir: Path) -> None:
    found = open_dataset(f"glas:{real(data_dir, 'glands-glas')}")
    names = [s.name.partition(".")[0] for s in found.train]
    assert names == [f"train_{i}" for i in range(1, 86)]
    assert [s.name.partition(".")[0] for s in found.test] == [f"testB_{i}" for i in range(1, 21)]
    assert Counter(s.group for s in found.train)["patient 2"] == 16
    assert {s.group for s in found.test} == {f"patient {i}" for i in (1, 2, 3, 5, 7)}


def test_glas_is_read_as_published_in_one_folder(tmp_path: Path) -> None:
    for name in ("train_1", "train_2", "testA_1", "testB_1"):
        save(tmp_path / f"{name}.bmp", noise(0, 20, 20, 3))
        save(tmp_path / f"{name}_anno.bmp", classes_of(0, 20, 20))
    found = open_dataset(f"glas:{tmp_path}")
    assert [s.name for s in found.train] == ["train_1.bmp", "train_2.bmp"]
    assert [s.name for s in found.test] == ["testA_1.bmp", "testB_1.bmp"]
    assert [s.group for s in found.train] == ["train_1", "train_2"]
    (tmp_path / "testB_1_anno.bmp").unlink()
    with pytest.raises(DataError, match=r"no annotation \(NAME_anno\) for testB_1\.bmp"):
        open_dataset(f"glas:{tmp_path}")


def test_em_masks_are_mitochondria_of_a_known_share(data_dir: Path) -> None:
    """5.3 % and 5.4 % of the pixels, as the sets' own descriptions say."""
    for name, place in (("epfl", "em-epfl-hippocampus"), ("vnc", "em-vnc-sstem")):
        found = open_dataset(f"{name}:{real(data_dir, place)}")
        labels = np.concatenate([s.labels.ravel() for s in (*found.train, *found.test)])
        assert 0.045 < labels.mean() < 0.065


def test_vnc_sections_are_cut_between_columns_685_and_686(data_dir: Path) -> None:
    path = real(data_dir, "em-vnc-sstem")
    found = open_dataset(f"vnc:{path}")
    raw = np.asarray(Image.open(path / "stack1" / "raw" / "07.png"))
    left, right = found.train[7], found.test[7]
    assert (left.shape, right.shape) == ((1024, 686), (1024, 338))
    assert left.group == right.group == "section 07"
    np.testing.assert_array_equal(np.hstack([left.image, right.image])[..., 0], raw)
    again = open_dataset(f"vnc:{path / 'stack1'}")
    assert data.checksum(again.train) == data.checksum(found.train)


# ----------------------------------------------------------------------------- cluttered MNIST


def write_mnist(folder: Path, count: int = 700, *, packed: bool = False) -> None:
    """Write digits that are bars: a digit's name is the brightness of its bar."""
    folder.mkdir(exist_ok=True)
    for fold in ("train", "t10k"):
        names = np.arange(count, dtype=np.uint8) % 10
        digits = np.zeros((count, 28, 28), np.uint8)
        digits[:, 4:24, 11:17] = (255 - names)[:, None, None]
        for name, values in (("images-idx3", digits), ("labels-idx1", names)):
            head = bytes((0, 0, 8, values.ndim))
            raw = head + np.array(values.shape, ">u4").tobytes() + values.tobytes()
            path = folder / f"{fold}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(raw) if packed else raw)


@pytest.mark.parametrize(("variant", "side"), [("simple", 48), ("hard", 48), ("large", 128)])
def test_cluttered_digits_are_the_same_each_time(tmp_path: Path, variant: str, side: int) -> None:
    write_mnist(tmp_path / "plain")
    write_mnist(tmp_path / "packed", packed=True)
    text = f"?variant={variant}&count=30&seed=4"
    one, other = (open_dataset(f"mnist:{tmp_path / kind}{text}") for kind in ("plain", "packed"))
    for name in ("train", "validation", "test"):
        assert data.checksum(getattr(one, name)) == data.checksum(getattr(other, name))
    for name in ("presence", "absence"):
        assert data.checksum(one.pools[name]) == data.checksum(other.pools[name])
        assert len(one.pools[name]) == 30
    assert (len(one.train), len(one.validation), len(one.test)) == (30, 500, 700)
    assert one.train[0].image.shape == (side, side, 1)
    reseeded = open_dataset(f"mnist:{tmp_path / 'plain'}?variant={variant}&count=30&seed=5")
    assert data.checksum(reseeded.train) != data.checksum(one.train)


def test_a_digit_is_whole_under_its_clutter(tmp_path: Path) -> None:
    """The mask is the digit's ink wherever it was put; clutter covers it and is not in the mask."""
    write_mnist(tmp_path)
    found = open_dataset(f"mnist:{tmp_path}?count=50")
    for sample in found.train:
        ys, xs = np.nonzero(sample.labels)
        assert len(ys) == 20 * 6
        assert (int(np.ptp(ys)), int(np.ptp(xs))) == (19, 5)
        assert sample.image[..., 0][sample.labels == 1].min() >= 246
    tops = {int(np.nonzero(s.labels)[0][0]) for s in found.train}
    assert min(tops) >= 4
    assert max(tops) <= 48 - 28 + 4
    assert len(tops) > 10


def test_absence_images_have_clutter_and_no_digit(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    found = open_dataset(f"mnist:{tmp_path}?count=200")
    bright = {name: np.mean([(p.image > 200).mean() for p in found.pools[name]]) for name in ("presence", "absence")}
    assert bright["absence"] > 0.01
    digit = 120 / 48**2
    assert bright["presence"] - bright["absence"] == pytest.approx(digit, rel=0.35)
    ground = found.pools["absence"][0].image
    assert 0 <= np.median(ground) <= 3


def test_few_masks_are_all_of_nines(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    found = open_dataset(f"mnist:{tmp_path}?count=200&labelled=0.02")
    whole = open_dataset(f"mnist:{tmp_path}?count=200")
    assert len(found.train) == 4
    assert len(found.pools["presence"]) == len(whole.train) == 200
    for sample in found.train:
        # A nine's bar is of 255 - 9; where a scrap of a brighter digit lies on it, it is brighter.
        assert np.median(sample.image[sample.labels == 1]) == 246
    assert {s.name for s in found.train} <= {s.name for s in whole.train}
    with pytest.raises(DataError, match="100 images of the digit 9"):
        open_dataset(f"mnist:{tmp_path}?count=200&labelled=0.5")
    with pytest.raises(DataError, match="labelled=0"):
        open_dataset(f"mnist:{tmp_path}?count=200&labelled=0")
    with pytest.raises(DataError, match="count=201: use 1 to 200"):
        open_dataset(f"mnist:{tmp_path}?count=201")


def test_a_damaged_digit_file_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot be read.*fetch it again"):
        open_dataset(f"mnist:{tmp_path}")
    file.write_bytes(b"not packed")
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(f"mnist:{tmp_path}")
    file.write_bytes(gzip.compress(gzip.decompress(whole)[:-5]))
    with pytest.raises(DataError, match="cut off"):
        open_dataset(f"mnist:{tmp_path}")
    file.write_bytes(gzip.compress(b"\0\0\x0d\x03" + bytes(40)))
    with pytest.raises(DataError, match="not an idx file of uint8"):
        open_dataset(f"mnist:{tmp_path}")


def test_real_digits_make_2000_images(data_dir: Path) -> None:
    found = open_dataset(f"mnist:{real(data_dir, 'mnist')}")
    assert (len(found.train), len(found.validation), len(found.test)) == (2000, 500, 1000)
    assert len(found.pools["presence"]) == len(found.pools["absence"]) == 2000
    share = np.mean([s.labels.mean() for s in found.train])
    assert 0.02 < share < 0.06  # a digit has about 100 pixels of ink, the image 2304
    for seen, sample in zip(found.pools["presence"], found.train, strict=True):
        np.testing.assert_array_equal(seen.image, sample.image)


# ----------------------------------------------------------------------------- pools


def test_a_pool_is_a_folder_of_pictures_an_image_or_a_set(root: Path, tmp_path: Path) -> None:
    save(tmp_path / "plain" / "t.png", noise(9, 30, 30, 3))
    save(tmp_path / "plain" / "u.jpg", noise(8, 30, 30, 3))
    assert [p.name for p in open_pool(str(tmp_path / "plain"), "target", 0.5)] == ["t.png", "u.jpg"]
    (one,) = open_pool(str(tmp_path / "plain" / "t.png"), "target", 0.5)
    np.testing.assert_array_equal(one.image, noise(9, 30, 30, 3))
    assert len(open_pool(str(root), "target", 0.5)) == len(open_dataset(str(root)).train)
    save(root / "target" / "t.png", noise(9, 30, 30, 3))
    assert [p.name for p in open_pool(str(root), "target", 0.5)] == ["t.png"]


def test_a_pool_is_brought_to_the_resolution_of_the_set(tmp_path: Path) -> None:
    save(tmp_path / "t.png", noise(9, 40, 60, 3))
    assert open_pool(str(tmp_path), "target", 0.5)[0].shape == (40, 60)  # no resolution of its own
    (tmp_path / "dataset.toml").write_text("mpp = 0.25\n")
    assert open_pool(str(tmp_path), "target", 0.5)[0].shape == (20, 30)


def test_a_slide_is_a_pool(wsi_slides: Path) -> None:
    tiles = open_pool(str(wsi_slides / "CMU-1-Small-Region.svs"), "target", 1.0)
    assert len(tiles) > 4
    assert tiles[0].image.shape == (512, 512, 3)
    assert len({t.group for t in tiles}) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("notes.txt", "not an image or slide"),
        ("none", "there is no such folder"),
        ("empty", "no folder 'images'"),
    ],
)
def test_what_is_no_pool_is_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=said):
        open_pool(str(tmp_path / name), "target", 0.5)


def test_grey_and_coloured_sets_are_not_mixed(root: Path, tmp_path: Path) -> None:
    save(tmp_path / "grey" / "t.png", noise(9, 30, 30, 3)[..., 0])
    with pytest.raises(DataError, match=r"its images are grey, those of .* RGB"):
        command.with_pools(open_dataset(str(root)), (f"target={tmp_path / 'grey'}",), 0.5)


def test_sets_that_know_no_resolution_are_met_at_that_of_the_run(root: Path, tmp_path: Path) -> None:
    save(tmp_path / "t.png", noise(9, 40, 60, 3))
    (tmp_path / "dataset.toml").write_text("mpp = 0.25\n")
    assert open_dataset(str(root)).mpp is None
    found = command.with_pools(open_dataset(str(root)), (f"target={tmp_path}",), 0.5)
    assert found.pools["target"][0].shape == (20, 30)

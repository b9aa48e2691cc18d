"""Every setting has a range: what is outside is refused before any work, in one line that names it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histostream.training import batches, checks, cli, methods, preflight
from histostream.training.augment import Augmentation
from histostream.training.checks import Range
from histostream.training.data import DataError, DataSet, StoredPicture, StoredSample
from histostream.training.datasets._files import sample
from histostream.training.methods import METHODS, hook, load_method
from histostream.training.recipe import RecipeError, read_recipe
from histostream.training.schedule import Schedule
from tests.commands import call

SIDE = 64
COMMON = (f"schedule.crop_px={SIDE}", "schedule.batch=2", "schedule.steps=8")
NARROW = {  # settings with which each method's networks are small
    "apma_net": ("base_width=4", "discriminator_width=4", "feat_crop=64"),
    "imems": ("base_width=4", "depth=2", "discriminator_width=4"),
    "pyramid_gan": ("levels=2", "first_width=4", "growth=2", "layers=1", "g_width=4", "d_width=4", "poolings=2"),
    "translation": ("width=4", "depth=3", "unique_channels=8", "mlp_width=8", "discriminator_width=4", "image_px=64"),
    "uda_self_ensembling": ("base_width=4", "discriminator_width=4"),
}
WRONG = (  # for some field each; what fits is a setting like any other
    "-1",
    "0",
    "1",
    "-0.5",
    "0.5",
    "1.5",
    "17",
    "4096",
    "65536",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-320",
    "1" + "0" * 30,
    "9" * 5000,
    "",
    "''",
    "'x'",
    "true",
    "[]",
    "{}",
    "1979-05-27",
)
SHARED = (("schedule", Schedule), ("augmentation", Augmentation))


def picture(number: object, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(int(str(number))).integers(0, 256, (SIDE, SIDE, channels)).astype(np.uint8)


@cache
def data(channels: int = 3) -> DataSet:
    objects = np.zeros((SIDE, SIDE), np.int32)
    objects[8:24, 8:24] = 1
    train = tuple(
        sample(f"{i}.png", str(i), picture(i, channels), (objects > 0).astype(np.uint8), objects) for i in range(6)
    )
    pool = tuple(StoredPicture(f"p{i}", str(i), picture(i, channels)) for i in range(2))
    names = {name for m in METHODS.names() for name in hook(load_method(m), "pools")(load_method(m).Config())}
    return DataSet("d", (), 0.5, train, pools=dict.fromkeys((*names, batches.UNLABELLED), pool))


def set_up(name: str, *settings: str) -> None:
    """Do all that comes before the first step of a run, and draw its batch."""
    method = load_method(name)
    narrow = (f"method.{setting}" for setting in NARROW[name])
    recipe = read_recipe(name, method, (), (*COMMON, *narrow, *settings), own_mpp=0.5)
    preflight.check_resolution(data(), recipe.mpp)
    found = data().at_mpp(recipe.mpp)
    parts = batches.divide(found, recipe.schedule)
    pools = hook(method, "pools")(recipe.config)
    batches.check_pools(parts, pools, name)
    preflight.check_run(recipe, method, found, parts)
    if recipe.schedule.crop_px in (0, SIDE) and recipe.schedule.batch <= 4:
        align = method.align_px(recipe.config)
        batch = next(batches.Batches(parts, recipe.schedule, recipe.augmentation, pools, align_px=align)(0, 1))
        assert batch.images.shape == (recipe.schedule.batch, 3, *batch.images.shape[-2:])


def fields_of(name: str) -> list[tuple[str, str]]:
    kinds = (("method", load_method(name).Config), *(SHARED if name == "imems" else ()))
    return [(table, field.name) for table, kind in kinds for field in dataclasses.fields(kind)]


def test_every_field_says_what_it_allows() -> None:
    """A new field without a range fails here, and so does a default outside of its range."""
    for kind in (Schedule, Augmentation, *(load_method(name).Config for name in METHODS.names())):
        types = checks.field_types(kind)
        assert types.keys() == {field.name for field in dataclasses.fields(kind)}
        unranged = [name for name, hint in types.items() if not checks.has_range(hint)]
        assert not unranged, f"{kind.__module__}: fields without a range: {unranged}"
        for name, hint in types.items():
            with pytest.raises(ValueError, match=f"^{name}="):  # so the range is checked when it is made
                kind(**{name: object() if hint is not bool else 2})
        kind()


def refusal(settle: Callable[[], object]) -> RecipeError | DataError | None:
    """Return what a setting is refused with; None: it is taken. Any other exception is a traceback."""
    try:
        settle()
    except (RecipeError, DataError) as error:
        return error
    return None


@pytest.mark.parametrize("name", METHODS.names())
def test_a_wrong_value_of_any_field_is_refused_by_name(name: str) -> None:
    method, refused = load_method(name), 0
    for table, field in fields_of(name):
        for value in WRONG:
            setting = f"{table}.{field}={value}"
            error = refusal(lambda s=setting: preflight.check_settings(name, method, (), (s,)))  # type: ignore[misc]
            if error:
                refused += 1
                names_it(error, table, field)
    assert refused > 10 * len(fields_of(name))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) for n in METHODS.names()])
def test_the_ends_of_every_range_train_or_are_refused_by_name(name: str) -> None:
    """What a range allows may still not fit the data, the memory or another setting."""
    taken = 0
    for table, field in fields_of(name):
        kind = load_method(name).Config if table == "method" else dict(SHARED)[table]
        for value in ends(checks.field_types(kind)[field]):
            setting = f"{table}.{field}={value}"
            error = refusal(lambda s=setting: set_up(name, s))  # type: ignore[misc]
            taken += error is None
            if error:
                names_it(error, table, field)
    assert taken > len(fields_of(name))


def names_it(error: RecipeError | DataError, table: str, field: str) -> None:
    text = str(error)
    assert error.exit_status == 2, text
    # A value that fits may ask for other crops.
    assert re.search(rf"\b({table}\.)?{field}=|^(schedule\.crop_px|method\.image_px)=", text), text
    assert "\n" not in text
    assert len(text) < 400


def ends(hint: Any) -> list[object]:
    """Return the values at the ends of what a field allows."""
    if hint is bool:
        return ["true", "false"]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    plain, allowed = get_args(hint)
    if not isinstance(allowed, Range):
        return ["''"]
    inner = [allowed.least, allowed.most, *([] if allowed.off is None else [allowed.off])]
    return [int(v) if plain is int else v for v in inner if v in allowed]


@given(st.text(), st.text())
@settings(max_examples=40, deadline=None)
def test_no_text_after_set_is_a_traceback(key: str, value: str) -> None:
    method = load_method("imems")
    for start in (f"{key}=", f"schedule.{key}=", "schedule.steps=", f"{key}.{key}=", f"{key}"):
        setting = start + value
        refusal(lambda s=setting: read_recipe("imems", method, (), (s,), own_mpp=0.5))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (["schedule.seed=-1"], "schedule.seed=-1: use a whole number, 0 to 4294967295"),
        (["method.learning_rate=0"], "method.learning_rate=0: use more than 0, up to 1"),
        (["method.beta1=1"], "method.beta1=1: use 0 or more, less than 1"),
        (["method.dropout=nan"], "method.dropout=nan: use 0 or more, less than 1"),
        (["method.norm=batch"], "method.norm='batch': use 'none' or 'instance'"),
        (["method.adversarial=1"], "method.adversarial=1: use true or false"),
        (["method.dept=3"], "unknown key 'method.dept'; did you mean 'depth'?"),
        (
            ["schedule.crop_px=100"],
            "schedule.crop_px=100: the networks take multiples of 16 px from 16 px on: use 96 or 112",
        ),
        (["augmentation.motion_blur=2"], "augmentation.motion_blur=2: use a whole number, 0 .off., or 3 to 255"),
        (["schedule=3"], "schedule=3: it is a table; set one key of it"),
        (["schedule=3", "schedule.steps=4"], "'schedule' is no table"),
        (["mpp=nan"], "mpp=nan: use 0.0001 to 100000 um per pixel"),
        (
            ["mpp=0.01"],
            "mpp=0.01: the images have 0.5 um per pixel, and are enlarged up to 8 times: pass --mpp 0.06256 or",
        ),
        (["mpp=9"], r"mpp=9: 0.png would have fewer than 16 px; pass --mpp 2.5 or less"),
        (["classes=[1, 2]"], "classes=1: write each as name = "),
        (["schedule.test=0.9"], "schedule.test=0.9: with validation=0.2 nothing is left"),
        (["method.base_width=4096", "method.depth=8"], "base_width=4096, method.depth=8: the weights alone take more"),
        (["schedule.folds=9"], "schedule.folds=9: 8 images can make 2 to 8 folds"),
        (["augmentation.object_px=2", "schedule.crop_px=0"], "augmentation.object_px=2: .* would have"),
    ],
    ids=str,
)
def test_the_command_refuses_a_setting_in_one_line_and_writes_nothing(
    chosen: list[str], said: str, nuclei_folder: Path, tmp_path: Path
) -> None:
    (folder := tmp_path / "set").mkdir()
    for name in ("images", "labels_instance"):
        (folder / name).symlink_to(nuclei_folder / name)
    (folder / "dataset.toml").write_text("mpp = 0.5\n")
    if "object_px" in chosen[0]:
        chosen = [*chosen, "method.norm=instance", "method.depth=5"]
    words = [word for setting in chosen for word in ("--set", setting)]
    done = call(cli.main, "--data", folder, "--out", tmp_path / "run", "--device", "cpu", *words)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert re.search(said, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", METHODS.names())
def test_a_crop_that_the_advice_names_is_taken(name: str) -> None:
    method = load_method(name)
    narrow = tuple(f"method.{setting}" for setting in NARROW[name])

    def settle(side: object, *more: str) -> None:
        preflight.check_settings(name, method, (), (*narrow, f"schedule.crop_px={side}", *more))

    for side in (4, 40, 1000):
        error = refusal(lambda s=side: settle(s))  # type: ignore[misc]
        advised = str(error).rpartition("use ")[2] if error else str(side)
        if advised == "the same":
            assert "(method.image_px)" in str(error)
            settle(96, "method.image_px=96")
            continue
        for one in advised.split(" or "):
            settle(one)


def test_a_range_says_what_it_holds() -> None:
    assert (0.5 in Range(0, 1), 1 in Range(0, 1), 1 in Range(0, 1, below=True), 0 in Range(0, 1, above=True)) == (
        True,
        True,
        False,
        False,
    )
    assert (0 in Range(2, 9, off=0), 1 in Range(2, 9, off=0), float("nan") in Range(0, 1)) == (True, False, False)
    assert str(Range(0, 1, above=True, below=True)) == "more than 0, less than 1"
    assert str(Range(2, 9, off=0)) == "0 (off), or 2 to 9"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """The configuration of a method from elsewhere, some of whose fields have no range."""

    width: int = 3
    rate: Annotated[float, Range(0, 1)] = 0.5
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    where: Path = Path()


def test_the_config_of_a_method_from_elsewhere_is_checked_as_far_as_it_can_be() -> None:
    method = ModuleType("foreign")
    method.Config = Foreign  # type: ignore[attr-defined]

    def read(setting: str) -> Any:
        return read_recipe("foreign", method, (), (setting,), own_mpp=0.5).config

    assert read("method.width=-5").width == -5
    assert read("method.rate=1").rate == 1.0
    assert isinstance(read("method.rate=1").rate, float)
    for setting, said in (
        ("width=1.5", "width=1.5: use a whole number"),
        ("rate=2", "use 0 to 1"),
        ("kind=c", "'a' or 'b'"),
    ):
        with pytest.raises(RecipeError, match=f"method.{said}" if said.startswith("width") else said):
            read(f"method.{setting}")


def test_shipped_recipes_are_within_the_ranges() -> None:
    for name in methods.recipes():
        owner = next(m for m in METHODS.names() if (Path(methods.__path__[0]) / m / f"{name}.toml").is_file())
        first = {"imems": (), "uda_self_ensembling": ("uda-paper",), "apma_net": ("apma-paper",)}
        base = first.get(owner, (f"{owner.partition('_')[0]}-paper",))
        read_recipe(owner, load_method(owner), (*base, name), own_mpp=0.5)


def test_a_recipe_with_fewer_classes_than_the_labels_is_refused() -> None:
    labels = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 3
    found = DataSet(
        "d", (), 0.5, tuple(StoredSample(f"{i}", f"{i}", picture(i), labels.astype(np.uint8)) for i in "12")
    )
    two = 'classes=[{name="a", color=[0, 0, 0]}, {name="b", color=[9, 9, 9]}]'
    recipe = read_recipe("imems", load_method("imems"), (), (*COMMON, two), own_mpp=0.5)
    parts = batches.divide(found, recipe.schedule)
    with pytest.raises(DataError, match="label 2, but the recipe has 2 classes"):
        preflight.check_run(recipe, load_method("imems"), found, parts)

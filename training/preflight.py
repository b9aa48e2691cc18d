"""What is checked before a run starts, so that nothing is refused after the first step's work."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from types import ModuleType

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from histostream.training.augment import object_zoom
from histostream.training.batches import Parts, typical_object_px
from histostream.training.class_weights import ClassWeightsError
from histostream.training.data import (
    IGNORED,
    MIN_PX,
    DataError,
    DataSet,
    Picture,
    Sample,
    annotated,
    class_count,
    listed,
)
from histostream.training.device import is_out_of_memory
from histostream.training.methods import hook
from histostream.training.recipe import Recipe, RecipeError, read_recipe

log = logging.getLogger(__name__)

GIB = 1 << 30
MAX_ENLARGED = 8  # times; beyond, a mistake in mpp is more likely than a wish
COPIES = 4  # of each weight in training: itself, its gradient, and the two means of Adam
RGB_ONLY = ("stain", "restain", "jpeg")  # of the augmentation


def check_settings(method_name: str, method: ModuleType, configs: tuple[str, ...], settings: tuple[str, ...]) -> None:
    """Refuse wrong recipes and settings before the data is read, which may take minutes.

    Raises
    ------
    RecipeError
        As `read_recipe`, but for an unknown resolution; or if the networks do not take the crops.
    ClassWeightsError
        If the method takes no class weights.
    """
    recipe = read_recipe(method_name, method, configs, settings, own_mpp=1.0)
    check_crops(recipe, method)
    check_class_weights(recipe, method)


def check_resolution(data: DataSet, mpp: float) -> None:
    """Refuse a resolution at which the images would be too large or too small to train on.

    Raises
    ------
    RecipeError
        If it is.
    """
    if data.mpp is None:
        return
    if data.mpp / mpp > MAX_ENLARGED:
        raise RecipeError(
            f"mpp={mpp:g}: the images have {data.mpp:g} um per pixel, and are enlarged up to {MAX_ENLARGED} times: "
            f"pass --mpp {1.001 * data.mpp / MAX_ENLARGED:.4g} or more"
        )
    for picture in chain(data.train, data.validation, data.test, *data.pools.values()):
        if (side := min(picture.shape)) * data.mpp / mpp < MIN_PX:
            raise RecipeError(
                f"mpp={mpp:g}: {picture.name} would have fewer than {MIN_PX} px; "
                f"pass --mpp {0.999 * side * data.mpp / MIN_PX:.3g} or less"
            )


def check_run(recipe: Recipe, method: ModuleType, data: DataSet, parts: Parts) -> None:
    """Refuse settings that the networks or the images of a run do not allow, and warn of what is likely wrong.

    Parameters
    ----------
    recipe, method
        What to train.
    data
        The data set, at the resolution of the recipe.
    parts
        The same, divided.

    Raises
    ------
    RecipeError
        If a setting does not fit.
    DataError
        If images or labels do not.
    """
    check_crops(recipe, method)
    check_class_weights(recipe, method)
    if recipe.augmentation.object_px and np.isnan(typical_object_px(parts.samples)):
        raise RecipeError(
            f"augmentation.object_px={recipe.augmentation.object_px:g}: the data has no objects (labels_instance/) "
            "to measure: set it to 0"
        )
    _check_images(recipe, method, parts)
    _check_labels(recipe, data, parts)
    unused = [name for name in RGB_ONLY if getattr(recipe.augmentation, name)]
    if unused and data.channels != 3:
        log.warning(
            "augmentation.%s: of RGB images only; no effect on images of %d channels",
            " and augmentation.".join(unused),
            data.channels,
        )
    names = [name for name, _ in recipe.classes or data.classes]
    names = names or [f"class {label}" for label in range(class_count(parts.samples))]
    check_memory(recipe, method, len(names), data.channels)
    _warn_of_absent_classes(names, parts)


def check_crops(recipe: Recipe, method: ModuleType) -> None:
    """Refuse crops that the networks do not take.

    Raises
    ------
    RecipeError
        If the side is not what they take; the message names the nearest sides that are.
    """
    side = recipe.schedule.crop_px
    if side and (problem := _problem(recipe, method, side, side)):
        raise RecipeError(f"schedule.crop_px={side}: {problem}")


def check_class_weights(recipe: Recipe, method: ModuleType) -> None:
    """Refuse class weights where the losses of the method do not weigh pixels.

    Raises
    ------
    ClassWeightsError
        If they do not; the message says why.
    """
    if recipe.class_weights and (cause := hook(method, "takes_class_weights")(recipe.config)):
        raise ClassWeightsError(f"class_weights: {recipe.method} does not take them: {cause}")


def _problem(recipe: Recipe, method: ModuleType, height: int, width: int) -> str:
    """Return what is wrong with the size of an image for the networks, "" if nothing is."""
    align, least = method.align_px(recipe.config), hook(method, "least_px")(recipe.config)
    only = hook(method, "only_px")(recipe.config)
    if only:
        named = [f.name for f in dataclasses.fields(recipe.config) if getattr(recipe.config, f.name) == only]
        built = f"the networks are built for {only} px ({', '.join(f'method.{name}' for name in named)}): use the same"
        return "" if (height, width) == (only, only) else built
    if not height % align and not width % align and min(height, width) >= least:
        return ""
    first = -(-least // align) * align
    side = min(height, width)
    near = sorted({max(first, side // align * align), max(first, -(-side // align) * align)})
    return f"the networks take multiples of {align} px from {first} px on: use {' or '.join(map(str, near))}"


def _check_images(recipe: Recipe, method: ModuleType, parts: Parts) -> None:
    """Refuse images that the networks do not take whole: to train on, without crops, and to be judged on."""
    align, least = method.align_px(recipe.config), hook(method, "least_px")(recipe.config)
    judged = [parts.samples[i] for i in (*parts.split.validation, *parts.split.test)]
    for (height, width), name in _sizes(recipe, judged, parts, align).items():
        if min(height, width) < least:
            zoomed = recipe.augmentation.object_px
            if zoomed:
                raise RecipeError(
                    f"augmentation.object_px={zoomed:g}: {name} would have {width} x {height} px, the networks take "
                    f"{least} px or more; set it higher, or to 0"
                )
            raise DataError(f"{name}: {width} x {height} px; the networks take {least} px or more: leave it out")
    if recipe.schedule.crop_px:
        return
    train = [parts.samples[i] for i in parts.split.train]
    for pictures in (train, *(parts.pools[name] for name in hook(method, "pools")(recipe.config))):
        sizes = _sizes(recipe, pictures, parts, align)
        for (height, width), name in sizes.items():
            if problem := _problem(recipe, method, height, width):
                raise DataError(f"{name}: {width} x {height} px, but {problem}, as schedule.crop_px")
        if len(sizes) > 1 and recipe.schedule.batch > 1:
            shown = listed([f"{width} x {height}" for height, width in sorted(sizes)])
            raise DataError(
                f"whole images of different sizes ({shown}) do not stack: set schedule.batch=1, or a schedule.crop_px"
            )


def _sizes(recipe: Recipe, pictures: Sequence[Picture], parts: Parts, align: int) -> dict[tuple[int, int], str]:
    """Return the sizes of whole images as the networks get them, zoomed and mirrored, each with a name."""
    typical = typical_object_px(parts.samples)
    sizes: dict[tuple[int, int], str] = {}
    for picture in pictures:
        zoom = object_zoom(getattr(picture, "object_px", float("nan")), recipe.augmentation, typical)
        height, width = (-(-max(1, round(side * zoom)) // align) * align for side in picture.shape)
        sizes.setdefault((height, width), picture.name)
    return sizes


def _check_labels(recipe: Recipe, data: DataSet, parts: Parts) -> None:
    """Refuse labels that are no class of the recipe."""
    if not recipe.classes:
        return
    if data.classes and len(data.classes) != len(recipe.classes):
        raise RecipeError(
            f"the recipe has {len(recipe.classes)} classes, the data {len(data.classes)} "
            f"({', '.join(name for name, _ in data.classes)}): give the same, or leave [[classes]] out of the recipe"
        )
    if data.classes:
        return
    for sample in parts.samples:
        if (highest := int(annotated(sample.labels).max(initial=0))) >= len(recipe.classes):
            raise DataError(
                f"{sample.name}: label {highest}, but the recipe has {len(recipe.classes)} classes; "
                "add it to [[classes]] of the recipe, or correct the file"
            )


def check_memory(recipe: Recipe, method: ModuleType, classes: int, channels: int) -> None:
    """Refuse networks whose weights alone need more memory than there is, before they are made.

    Networks that are no larger than by default are not looked at. Others are built without storage (torch's
    meta device), as far as there is memory for.

    Raises
    ------
    RecipeError
        If they need more.
    """
    if not (larger := _enlarged(recipe)):
        return
    count, there = 0, _memory()

    def add(_module: nn.Module, _name: str, weight: nn.Parameter | None) -> None:
        nonlocal count
        count += 0 if weight is None else weight.numel()
        if COPIES * 4 * count > there:
            raise MemoryError

    counting = register_module_parameter_registration_hook(add)
    try:
        with torch.device("meta"):
            method.build(recipe.config, classes, channels)
    except (MemoryError, OverflowError) as error:
        raise RecipeError(
            f"{larger}: the weights alone take more than the {there / GIB:.1f} GiB of memory; set smaller ones"
        ) from error
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return  # a method from elsewhere whose networks cannot be built so; what is wrong, the build itself says
    finally:
        counting.remove()


@contextmanager
def memory_named(recipe: Recipe) -> Iterator[None]:
    """Turn a lack of memory while networks are made into an error that says so.

    Raises
    ------
    RecipeError
        If there is none left.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        larger = _enlarged(recipe) or "the widths and depths of the method"
        raise RecipeError(f"{larger}: there is no memory for the networks; set smaller ones") from error


def _enlarged(recipe: Recipe) -> str:
    """Return the whole numbers of a method's configuration that are larger than by default, "" without any."""
    larger = [
        f"method.{field.name}={value}"
        for field in dataclasses.fields(recipe.config)
        if isinstance(field.default, int) and type(value := getattr(recipe.config, field.name)) is int
        if value > field.default
    ]
    return ", ".join(larger)


def _memory() -> int:
    """Bytes of memory of this machine, or of its largest GPU where that is more."""
    sizes = [int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))] if hasattr(os, "sysconf") else [1 << 62]
    if torch.cuda.is_available():
        sizes += [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return max(sizes)


def _warn_of_absent_classes(names: Sequence[str], parts: Parts) -> None:
    """Warn of classes that no training image, or no validation image, shows."""
    wanted = set(range(len(names)))
    for part, indices in (("training", parts.split.train), ("validation", parts.split.validation)):
        missing = wanted - _shown((parts.samples[i] for i in indices), len(names)) if indices else set()
        if missing:
            log.warning(
                "no %s image shows %s: %s",
                part,
                listed([names[label] for label in sorted(missing)]),
                "it cannot be learned; check the labels, or the split"
                if part == "training"
                else "its scores say nothing; try another schedule.seed, or name the parts as [splits]",
            )


def _shown(samples: Iterable[Sample], classes: int) -> set[int]:
    """Return the classes that labels show; it ends as soon as all were found."""
    found: set[int] = set()
    for sample in samples:
        found |= set(np.unique(sample.labels).tolist()) - {IGNORED}
        if len(found) == classes:
            break
    return found

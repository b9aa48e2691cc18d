"""Count objects per class, and how many of them are probably several that touch.

Objects are connected regions of one class, so nuclei that touch are one object, and a count is too low where they do.
The share of such objects says how far a count can be trusted. An object is taken for several where it is large and
concave: more than `LARGE` times as large as the median of its class on the slide, and filling less than `CONCAVE` of
the ellipse with its second moments. docs/objects.md has the error, measured where every nucleus is known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from histostream.wsi.outputs.label_rows import ClassInfo, SlideInfo, background_label
from histostream.wsi.outputs.object_rule import ObjectRule
from histostream.wsi.outputs.objects.components import Complete, Components
from histostream.wsi.outputs.objects.ellipse import filled

LARGE, CONCAVE = 1.5, 0.92
BINS_PER_OCTAVE = 64  # of areas, for their median: 1 % wide
BINS = 40 * BINS_PER_OCTAVE  # up to 2^40 pixels


@dataclass(frozen=True, slots=True)
class ObjectCount:
    """The objects of a class on a slide.

    Attributes
    ----------
    objects
        How many there are.
    mean_um2
        Their mean area; None if there is none.
    touching_share
        Share of the objects that are probably several; None if there is none, or the class has no such rule.
    """

    objects: int
    mean_um2: float | None
    touching_share: float | None


def with_rules(
    classes: tuple[ClassInfo, ...], min_area_um2: float | None = None, *, count_all: bool = False
) -> tuple[ClassInfo, ...]:
    """Return classes with the rules that a run uses.

    Parameters
    ----------
    classes
        The classes of a model, with its rules.
    min_area_um2
        Replaces the smallest area of every class, and counts those without a rule too; None: as the model says.
    count_all
        Whether classes without a rule are counted.

    Returns
    -------
    The classes. One without a rule is not counted.

    Raises
    ------
    ValueError
        If the smallest area is not below the largest of a class.
    """
    background = background_label(classes)
    usual = ObjectRule() if count_all or min_area_um2 is not None else None
    counted = []
    for label, entry in enumerate(classes):
        rule = None if label == background else entry.rule or usual
        if rule is not None and min_area_um2 is not None:
            rule = replace(rule, min_area_um2=min_area_um2)
        counted.append(replace(entry, rule=rule))
    return tuple(counted)


def counted_labels(classes: tuple[ClassInfo, ...]) -> list[int]:
    """Return the labels of the classes whose objects are counted."""
    return [label for label, entry in enumerate(classes) if entry.rule is not None and entry.rule.counted]


def find_components(info: SlideInfo, labels: list[int], *, outlines: bool) -> Components:
    """Return what finds the objects of some classes, within the areas of their rules."""
    rules = [info.classes[label].rule or ObjectRule() for label in labels]
    pixel_um2 = info.mpp**2
    areas = [
        (rule.min_area_um2 / pixel_um2, np.inf if rule.max_area_um2 is None else rule.max_area_um2 / pixel_um2)
        for rule in rules
    ]
    return Components(info.width, info.height, labels, areas, outlines=outlines)


class ObjectCounter:
    """Counts objects; its memory does not depend on how many there are.

    Parameters
    ----------
    info
        The label map; rules are those of its classes.
    """

    def __init__(self, info: SlideInfo) -> None:
        self._info = info
        self._labels = counted_labels(info.classes)
        self._objects = np.zeros(len(info.classes), np.int64)
        self._pixels = np.zeros(len(info.classes), np.int64)
        # How many objects have each area, of all and of the concave ones.
        self._areas = {label: np.zeros((2, BINS), np.int64) for label in self._labels if self._rule(label).touching}

    def add(self, complete: Complete) -> None:
        """Count objects that are complete."""
        np.add.at(self._objects, complete.value, 1)
        np.add.at(self._pixels, complete.value, complete.area)
        for label, areas in self._areas.items():
            chosen = np.flatnonzero(complete.value == label)
            bins = np.floor(BINS_PER_OCTAVE * np.log2(complete.area[chosen])).astype(np.int64)
            concave = filled(complete.area[chosen], complete.moments[chosen]) < CONCAVE
            np.add.at(areas[0], bins, 1)
            np.add.at(areas[1], bins[concave], 1)

    def count(self, label: int) -> ObjectCount | None:
        """Return the objects of a class so far; None if they are not counted."""
        if label not in self._labels:
            return None
        objects = int(self._objects[label])
        if not objects:
            return ObjectCount(0, None, None)
        mean_um2 = round(int(self._pixels[label]) * self._info.mpp**2 / objects, 2)
        return ObjectCount(objects, mean_um2, self._touching_share(label))

    def _touching_share(self, label: int) -> float | None:
        if label not in self._areas:
            return None
        every, concave = self._areas[label]
        total = int(every.sum())
        median = int(np.searchsorted(np.cumsum(every), (total + 1) // 2))
        large = median + round(BINS_PER_OCTAVE * np.log2(LARGE))
        return round(int(concave[large + 1 :].sum()) / total, 4)

    def _rule(self, label: int) -> ObjectRule:
        rule = self._info.classes[label].rule
        assert rule is not None
        return rule

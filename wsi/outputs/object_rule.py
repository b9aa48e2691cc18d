"""Which regions of a class are counted as objects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

# By these names a class has the rule of nuclei where its model says nothing else; compared without regard to case.
# fmt: off
NUCLEUS_NAMES = frozenset((
    "nucleus", "nuclei", "cell nucleus", "cell nuclei", "kern", "kerne", "zellkern", "zellkerne", "noyau", "noyaux",
    "núcleo", "núcleos", "nucleo", "kjerne", "kjerner", "kärna", "kärnor", "kerner", "celkern", "celkernen", "tuma",
    "tumat", "jądro", "jądra", "jádro", "jádra", "sejtmag", "sejtmagok", "ядро", "ядра", "细胞核", "細胞核", "細胞核",
    "세포핵",
))
# fmt: on


@dataclass(frozen=True, slots=True)
class ObjectRule:
    """Which connected regions of a class are objects, and whether they are counted.

    Attributes
    ----------
    counted
        Whether objects of the class are counted. Classes that are areas, as stroma, are not; files of objects have
        their outlines all the same.
    min_area_um2
        Smaller regions are no objects.
    max_area_um2
        Larger regions are no objects; None: no region is too large.
    touching
        Whether one object is compact, as a nucleus is, so that a large and concave one is probably several that touch;
        see `histostream.wsi.outputs.objects.counting`.

    Raises
    ------
    ValueError
        If an area is negative or not a number, or the largest is below the smallest.

    Examples
    --------
    >>> ObjectRule(min_area_um2=-1)
    Traceback (most recent call last):
    ValueError: min_area_um2=-1: use 0 or more
    """

    counted: bool = True
    min_area_um2: float = 0.0
    max_area_um2: float | None = None
    touching: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_area_um2 < math.inf:
            raise ValueError(f"min_area_um2={self.min_area_um2}: use 0 or more")
        if self.max_area_um2 is not None and not self.min_area_um2 < self.max_area_um2 < math.inf:
            raise ValueError(f"max_area_um2={self.max_area_um2}: use more than min_area_um2={self.min_area_um2}")

    def __str__(self) -> str:
        """Return the rule in words."""
        most = "" if self.max_area_um2 is None else f" to {self.max_area_um2:g}"
        counted = "counted" if self.counted else "not counted"
        touching = ", large concave ones are several" if self.touching else ""
        return f"objects of {self.min_area_um2:g}{most or ' or more'} um2, {counted}{touching}"


NUCLEI = ObjectRule(min_area_um2=8.0, touching=True)  # a disc of 3.2 um: smaller regions are rarely nuclei
NOT_COUNTED = ObjectRule(counted=False)


def rule_by_name(name: str) -> ObjectRule | None:
    """Return the rule of a class whose model has none for it: that of nuclei if it is called so, else None.

    Examples
    --------
    >>> rule_by_name("Nuclei").min_area_um2
    8.0
    >>> rule_by_name("tumour") is None
    True
    """
    return NUCLEI if " ".join(name.casefold().split()) in NUCLEUS_NAMES else None


def rule_to_json(rule: ObjectRule) -> bool | dict[str, Any]:
    """Return a rule as a model card has it: False if objects are not counted, else the values that are not usual."""
    if not rule.counted:
        return False
    values = {entry.name: (getattr(rule, entry.name), entry.default) for entry in fields(rule)}
    return {name: value for name, (value, usual) in values.items() if value != usual}


def rule_from_json(value: object) -> ObjectRule:
    """Read a rule of a model card.

    Raises
    ------
    ValueError
        If it is none.
    """
    if value is False:
        return NOT_COUNTED
    known = {entry.name for entry in fields(ObjectRule)} - {"counted"}
    if not isinstance(value, Mapping) or not value.keys() <= known:
        raise ValueError(
            f"objects {str(value)[:60]!r} of a class: use false, or an object of {', '.join(sorted(known))}"
        )
    for name, entry in value.items():
        kind = {"touching": bool, "max_area_um2": int | float | None}.get(name, int | float)
        if not isinstance(entry, kind) or (kind is not bool and isinstance(entry, bool)):
            raise ValueError(f"{name}={str(entry)[:60]!r} of a class has the wrong type")
    return ObjectRule(**value)

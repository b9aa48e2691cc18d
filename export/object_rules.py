"""Which regions of each class are objects, as ``histo-export`` is told: ``nucleus=8,touching``, ``stroma=no``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from histostream.runtime.bundle.card import ModelCard, read_card, write_card
from histostream.wsi.errors import HistoError
from histostream.wsi.outputs.label_rows import ClassInfo, background_label
from histostream.wsi.outputs.object_rule import NOT_COUNTED, ObjectRule, rule_by_name

TOUCHING = ",touching"
NUMBER = r"\d+(?:\.\d+)?"


class RuleError(HistoError, ValueError):
    """A rule cannot be, or is of a class that the model does not have."""

    exit_status = 2


def parse_rules(texts: Sequence[str]) -> dict[str, ObjectRule]:
    """Read rules, each ``NAME=no``, ``NAME=MIN`` or ``NAME=MIN-MAX`` in um2, the last two also with ``,touching``.

    Returns
    -------
    The rules by the names of their classes.

    Raises
    ------
    RuleError
        If one cannot be read.

    Examples
    --------
    >>> parse_rules(["gland=500-90000", "stroma=no"])["gland"].max_area_um2
    90000.0
    """
    rules = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        areas, touching = value.removesuffix(TOUCHING), value.endswith(TOUCHING)
        matched = re.fullmatch(f"({NUMBER})(?:-({NUMBER}))?", areas, re.ASCII)
        if not (name and equals) or not (matched or value == "no"):
            raise RuleError(
                f"rule {text!r}: write NAME=8 for the smallest area in um2, NAME=8-400 for the largest too, "
                f"NAME=8{TOUCHING} for nuclei, or NAME=no for areas that are not counted"
            )
        if matched is None:
            rules[name] = NOT_COUNTED
            continue
        least, most = matched.groups()
        try:
            rules[name] = ObjectRule(True, float(least), None if most is None else float(most), touching)
        except ValueError as error:
            raise RuleError(f"rule {text!r}: {error}") from error
    return rules


def with_object_rules(classes: tuple[ClassInfo, ...], rules: Mapping[str, ObjectRule]) -> tuple[ClassInfo, ...]:
    """Return classes with some rules; the others keep theirs, or get that of their name.

    Raises
    ------
    RuleError
        If a rule is of no class, or of the background.
    """
    names, background = [entry.name for entry in classes], background_label(classes)
    for name in rules:
        if name not in names:
            raise RuleError(f"rule of {name!r}: the classes are {', '.join(names)}; pass one of them")
        if background is not None and names.index(name) == background:
            raise RuleError(f"rule of {name!r}: it is the background, which has no objects; leave it out")
    usual = [
        None if label == background else entry.rule or rule_by_name(entry.name) for label, entry in enumerate(classes)
    ]
    return tuple(replace(entry, rule=rules.get(entry.name, rule)) for entry, rule in zip(classes, usual, strict=True))


def set_object_rules(bundle: Path, texts: Sequence[str]) -> ModelCard:
    """Write rules into the card of a bundle; its graphs and engines stay as they are.

    Raises
    ------
    CardError
        If it is no bundle.
    RuleError
        As `parse_rules` and `with_object_rules`.
    OutputError
        If the card cannot be written.
    """
    card = read_card(bundle)
    card = replace(card, classes=with_object_rules(card.classes, parse_rules(texts)))
    write_card(card, bundle)
    return card

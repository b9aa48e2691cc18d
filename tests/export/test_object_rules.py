"""Rules of objects as ``histo-export`` is told them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from histostream.export.cli import main
from histostream.export.object_rules import RuleError, parse_rules, with_object_rules
from histostream.runtime.bundle.card import default_bundle, read_card
from histostream.wsi.outputs.label_rows import ClassInfo
from histostream.wsi.outputs.object_rule import NUCLEI, ObjectRule
from tests.commands import call

CLASSES = tuple(ClassInfo(name, (1, 2, 3)) for name in ("background", "nucleus", "gland", "a=b"))


def test_rules_are_read() -> None:
    texts = ["nucleus=12.5,touching", "gland=500-90000", "a=b=no"]
    assert parse_rules(texts) == {
        "nucleus": ObjectRule(min_area_um2=12.5, touching=True),
        "gland": ObjectRule(min_area_um2=500, max_area_um2=90000),
        "a=b": ObjectRule(counted=False),
    }


@pytest.mark.parametrize(
    "text", ["nucleus", "=8", "nucleus=", "nucleus=-8", "nucleus=nan", "nucleus=9-8", "nucleus=8,many", "nucleus=1e999"]
)
def test_a_rule_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(RuleError, match=f"rule '{text}': "):
        parse_rules([text])


def test_classes_without_a_rule_get_that_of_their_name() -> None:
    _, nucleus, gland, other = with_object_rules(CLASSES, parse_rules(["gland=no"]))
    assert (nucleus.rule, gland.rule, other.rule) == (NUCLEI, ObjectRule(counted=False), None)
    assert with_object_rules(CLASSES, parse_rules(["nucleus=3"]))[1].rule == ObjectRule(min_area_um2=3)


def test_a_rule_of_no_class_is_refused() -> None:
    with pytest.raises(RuleError, match="the classes are background, nucleus, gland, a=b"):
        with_object_rules(CLASSES, parse_rules(["nuclei=8"]))
    with pytest.raises(RuleError, match="it is the background"):
        with_object_rules(CLASSES, parse_rules(["background=8"]))


def test_a_command_sets_the_rules_of_a_bundle_and_nothing_else(tmp_path: Path) -> None:
    bundle = shutil.copytree(default_bundle(), tmp_path / "bundle")
    before = read_card(bundle)
    done = call(main, "object-rules", bundle, "nucleus=20-400")
    assert done.returncode == 0, done.stderr
    assert "nucleus: objects of 20 to 400 um2, counted" in done.stdout
    after = read_card(bundle)
    assert after.classes[1].rule == ObjectRule(min_area_um2=20, max_area_um2=400)
    assert (after.files, after.digest(), after.training) == (before.files, before.digest(), before.training)
    assert "nucleus: objects of 20 to 400 um2" in call(main, "inspect", bundle).stdout

    wrong = call(main, "object-rules", bundle, "stroma=no")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert read_card(bundle) == after


def test_a_wrong_rule_is_refused_before_the_export(tmp_path: Path) -> None:
    done = call(main, "--method", "imems", "--out", tmp_path / "out", "--object-rule", "nucleus=x")
    assert done.returncode == 2
    assert "rule 'nucleus=x'" in done.stderr
    assert not (tmp_path / "out").exists()

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from histostream.runtime.bundle.card import CardError, default_bundle, read_card, read_file, write_card
from histostream.wsi.outputs.object_rule import NUCLEI, ObjectRule
from tests.runtime.conftest import CARD


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    write_card(replace(CARD, files={"model.onnx": sha256}), tmp_path)
    return tmp_path


def change(bundle: Path, **entries: Any) -> None:
    path = bundle / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_card_comes_back_as_it_was_written(bundle: Path) -> None:
    card = read_card(bundle)
    assert card == replace(CARD, files=card.files)
    assert read_file(bundle, card, "model.onnx") == b"weights"


def test_unknown_keys_are_written_again_and_are_no_part_of_the_digest(bundle: Path) -> None:
    digest = read_card(bundle).digest()
    change(bundle, colour_space={"a": [1]}, further="x")
    card = read_card(bundle)
    assert card.digest() == digest
    write_card(replace(card, crf={"w1": 2.0}), bundle)
    content = json.loads((bundle / "card.json").read_text())
    assert (content["colour_space"], content["further"], content["crf"]) == ({"a": [1]}, "x", {"w1": 2.0})


def test_a_role_is_kept_and_cards_without_one_keep_their_digest(bundle: Path) -> None:
    card = read_card(bundle)
    assert all("role" not in entry for entry in json.loads((bundle / "card.json").read_text())["classes"])
    first, *others = card.classes
    with_role = replace(card, classes=(replace(first, role="background"), *others))
    write_card(with_role, bundle)
    assert read_card(bundle) == with_role
    assert with_role.digest() != card.digest()


def test_a_rule_of_objects_is_kept_and_is_no_part_of_the_digest(bundle: Path) -> None:
    card = read_card(bundle)
    rules = (ObjectRule(min_area_um2=20, max_area_um2=400), ObjectRule(counted=False), ObjectRule())
    classes = tuple(replace(entry, rule=rule) for entry, rule in zip(card.classes, rules, strict=True))
    with_rules = replace(card, classes=classes)
    write_card(with_rules, bundle)
    content = json.loads((bundle / "card.json").read_text())["classes"]
    assert [entry["objects"] for entry in content] == [{"min_area_um2": 20, "max_area_um2": 400}, False, {}]
    assert read_card(bundle) == with_rules
    assert with_rules.digest() == card.digest()  # engines of the bundle stay valid


def test_a_card_without_rules_has_that_of_nuclei_for_nuclei_alone(bundle: Path) -> None:
    names = ["background", "Nuclei", "tumour"]
    change(bundle, classes=[{"name": name, "color": [1, 2, 3]} for name in names])
    assert [entry.rule for entry in read_card(bundle).classes] == [None, NUCLEI, None]
    off = {"name": "Nuclei", "color": [1, 2, 3], "objects": False}
    change(bundle, classes=[off, {"name": "tumour", "color": [1, 2, 3]}])
    assert read_card(bundle).classes[0].rule == ObjectRule(counted=False)


@pytest.mark.parametrize("rule", [True, None, 8, {"min_area_um2": -1}, {"least": 8}, {"min_area_um2": float("nan")}])
def test_a_rule_of_objects_that_cannot_be_is_refused(bundle: Path, rule: object) -> None:
    classes = [{"name": name, "color": [1, 2, 3], "objects": rule} for name in "ab"]
    change(bundle, classes=classes)
    with pytest.raises(CardError, match=r"card\.json: .*export the model again"):
        read_card(bundle)


def test_the_card_that_ships_says_what_a_nucleus_is() -> None:
    path = default_bundle() / "card.json"
    background, nucleus = json.loads(path.read_text())["classes"]
    assert nucleus["objects"] == {"min_area_um2": 8.0, "touching": True}
    assert "objects" not in background


def test_a_changed_file_is_refused(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"other weights")
    with pytest.raises(CardError, match=r"does not match card\.json"):
        read_file(bundle, read_card(bundle), "model.onnx")


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    with pytest.raises(CardError, match=r"model\.onnx: cannot be read"):
        read_file(bundle, read_card(bundle), "model.onnx")
    with pytest.raises(CardError, match=r"has no model\.fp16\.onnx; it has model\.onnx"):
        read_file(bundle, read_card(bundle), "model.fp16.onnx")


@pytest.mark.parametrize("schema", [None, 0, 3, "1", True])
def test_another_schema_is_refused(bundle: Path, schema: object) -> None:
    change(bundle, schema=schema)
    with pytest.raises(CardError, match="this version reads 1 and 2; export the model again"):
        read_card(bundle)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"files": {"../../etc/passwd": "0"}}, "not the name of a file in the bundle"),
        ({"files": {"/etc/passwd": "0"}}, "not the name of a file in the bundle"),
        ({"mpp": -1}, "mpp=-1 is not a positive number"),
        ({"mpp": "0.5"}, "mpp='0.5' has the wrong type"),
        ({"channels": 65}, "channels=65 is not 1 to 64"),
        ({"channel_names": ["dapi"]}, "is not 3 names, one for each channel"),
        ({"tile_px": 15, "align_px": 16}, "align_px or more"),
        ({"halo_source": "guessed"}, "halo_source='guessed'"),
        ({"align_px": 0}, "align_px=0"),
        ({"score_kind": "logits"}, "score_kind='logits'"),
        ({"classes": []}, "2 to 254 classes"),
        ({"classes": [{"name": "a"}, {"name": "b"}]}, "color"),
        ({"classes": [{"name": "a", "color": [0, 0, 0], "role": "glass"}] * 2}, "role 'glass'"),
        ({"classes": [{"name": "a", "color": [0, 0, 900]}] * 2}, "0 to 255"),
    ],
)
def test_a_wrong_entry_is_named(bundle: Path, entries: dict[str, Any], message: str) -> None:
    change(bundle, **entries)
    with pytest.raises(CardError, match=message) as caught:
        read_card(bundle)
    assert "card.json" in str(caught.value)


def test_a_missing_entry_is_named(bundle: Path) -> None:
    path = bundle / "card.json"
    content = json.loads(path.read_text())
    del content["halo_px"]
    path.write_text(json.dumps(content))
    with pytest.raises(CardError, match="halo_px is missing"):
        read_card(bundle)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\x01"])
def test_a_damaged_card_is_refused(bundle: Path, text: str) -> None:
    (bundle / "card.json").write_text(text)
    with pytest.raises(CardError, match=r"card\.json"):
        read_card(bundle)


def test_a_folder_without_a_card_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"not a model bundle \(no card\.json"):
        read_card(tmp_path)

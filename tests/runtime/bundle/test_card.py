from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from histostream.runtime.bundle.card import CardError, read_card, read_file, write_card
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

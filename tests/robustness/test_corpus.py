"""Input that broke histo-infer, or came near it, is refused clearly now, or accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.robustness.hostile import Case, seed_case
from tests.robustness.hostile.case import card_case, graph_case, roi_case, slide_case
from tests.robustness.hostile.seeds import MPP, seed_slides
from tests.robustness.sandbox import Sandbox

CORPUS = Path(__file__).parent / "corpus"
ACCEPTED = ""
UNKNOWN_MPP = r"no resolution in the file; pass --mpp"
CUT_OFF = "the file was cut off"
EXPECTED = {
    "slides/loop.tif": "its directories form a loop at byte 8",
    "slides/sub-loop.tif": "its directories form a loop at byte 8",
    "slides/width-twice.tif": "a directory has tag 256 twice",
    "slides/width-2-to-24.tif": "an image of 3145728 tiles lists 9 places",
    "slides/width-0.tif": "it says that an image has 0 x 40 px",
    "slides/width-halved.tif": "an image of 6 tiles lists 9",
    "slides/length-absurd.tif": "it says that an image has 48 x 4294967295 px",
    "slides/tile-width-0.tif": "it says that a tile has 0 x 16 px",
    "slides/tile-absurd.tif": "an image of 3 tiles lists 9",
    "slides/tile-bomb.tif": "tiles of 589824 bytes cannot come out of [0-9]+",
    "slides/strip-bomb.tif": "strips of 3600000000 bytes cannot come out of [0-9]+",
    "slides/channels-absurd.tif": "it says that an image has 65535 channels",
    "slides/offset-outside.tif": CUT_OFF,
    "slides/few-offsets.tif": "an image of 9 tiles lists 2 places and 9 sizes",
    "slides/values-outside.tif": CUT_OFF,
    "slides/no-values.tif": "its tag 256 has no value",
    "slides/mpp-1.2.3.svs": UNKNOWN_MPP,
    "slides/mpp-of-dots.svs": UNKNOWN_MPP,
    "slides/mpp-huge.svs": UNKNOWN_MPP,
    "slides/resolution-0-0.tif": UNKNOWN_MPP,
    "slides/ome-laughs.ome.tif": "its XML defines entities",
    "slides/ome-entity.ome.tif": "its XML defines entities",
    "slides/ome-planes.ome.tif": r"its XML says that it has 3e\+09 planes",
    "slides/ome-file-elsewhere.ome.tif": "its XML names a file in another folder",
    "slides/ome-size-of-letters.ome.tif": ACCEPTED,
    "slides/shape-of-brackets.tif": ACCEPTED,
    "slides/jpeg-claims-65500.tif": r"block 0, 0 .* says that it has 65500 x 65500 px",
    "slides/jpeg-small.tif": "block 0, 0 of level 0 cannot be decoded",
    "slides/jpeg-scans.tif": "block 0, 0 .*it has 1009 scans",
    "slides/jpeg-noise.tif": "block 0, 0 of level 0 cannot be decoded",
    "slides/deflate-bomb.tif": "block 0, 0 of level 0 cannot be decoded",
    "slides/tile-of-nothing.tif": ACCEPTED,  # it was never written
    "slides/strip-decoder.tif": "an image of 20 strips lists 1 places",
    "slides/claims-65500.jpg": "65500 x 65500 px, which its [0-9]+ bytes cannot hold",
    "slides/claims-30000.png": "30000 x 30000 px, which its [0-9]+ bytes cannot hold",
    "slides/claims-60000.ppm": "60000 x 60000 px, which its [0-9]+ bytes cannot hold",
    "slides/claims-60000.bmp": "60000 x 60000 px, which its [0-9]+ bytes cannot hold",
    "slides/cut.png": "no reader opens this file",
    "slides/postscript.png": "EPS is no format for slides",
    "slides/pickle.npy": "no reader opens this file",
    "regions/deep.geojson": "nested too deeply",
    "regions/corner-of-one.geojson": "a corner is no pair of numbers",
    "regions/nan.geojson": "a corner lies more than .* px away, or is not a number",
    "regions/infinite.geojson": "a corner lies more than .* px away, or is not a number",
    "regions/far.geojson": "a corner lies more than .* px away, or is not a number",
    "regions/far-hole.geojson": "a corner lies more than .* px away, or is not a number",
    "regions/not-utf-8.geojson": "not valid GeoJSON",
    "regions/long-number.geojson": "not valid GeoJSON",
    "regions/long-text.geojson": "not valid GeoJSON",
    "regions/crosses-itself.geojson": ACCEPTED,
    "cards/deep.json": r"card\.json: cannot be read \(maximum recursion depth",
    "cards/mpp-of-400-digits.json": r"mpp=10+\.\.\.0+ is not a positive number",
    "cards/tile-of-5000-digits.json": r"card\.json: cannot be read",
    "cards/tile-absurd.json": "tile_px=2147483648 is not at most 8192",
    "cards/color-infinite.json": "cannot convert float infinity to integer",
    "cards/name-control.json": r"'\\n\\x1b\[2J' is no name for a class",
    "cards/name-surrogate.json": r"'\\ud800' is no name for a class",
    "cards/name-markup.json": ACCEPTED,
    "cards/name-long.json": "is no name for a class",
    "cards/method-long.json": "is not a line of up to 200 characters",
    "cards/checksum-of-no-text.json": "sha256 1 of 'model.onnx' has the wrong type",
    "cards/file-above.json": r"'\.\./model\.onnx' is not the name of a file in the bundle",
    "cards/file-absolute.json": "'/etc/passwd' is not the name of a file in the bundle",
    "cards/file-of-engines-above.json": "is not the name of a file in the bundle",
    "cards/crf-huge.json": r"theta_alpha=1e\+308 is not a number up to 1000000",
    "cards/crf-endless.json": "n_iter=1000000000 is not a number up to 1000000",
    "cards/crf-of-400-digits.json": "is not a number up to 1000000",
    "graphs/external-absolute.onnx": "its weights are in another file",
    "graphs/external-above.onnx": "its weights are in another file",
    "graphs/external-beside.onnx": "its weights are in another file",
    "graphs/loop.onnx": "a node is a 'Loop': a deployed graph has no control flow",
    "graphs/laughs.onnx": "it has functions, which a deployed graph does not have",
    "graphs/smaller-scores.onnx": r"gives uint8 \(1, 2, 63, 63\), the card says uint8",
    "graphs/no-rank.onnx": ACCEPTED,
    "graphs/custom-operator.onnx": "ONNX Runtime cannot load it",
    "graphs/cut.onnx": "it is damaged, or was cut off",
    "graphs/noise.onnx": "it is damaged, or not an ONNX file",
}
DAMAGED = ("jpeg-", "deflate-", "tile-of-")  # in one tile, which is left out but for --strict
OWN_RESOLUTION = ("mpp-", "resolution-", "ome-size-")  # slides that are run without --mpp


def slide(path: Path) -> Case:
    case = slide_case("tiff", path.name, path.name, path.read_bytes())
    if path.name.startswith(DAMAGED):
        return replace(case, args=("--strict", *case.args))
    if path.name.startswith(OWN_RESOLUTION):
        return replace(case, args=tuple(a for a in case.args if a not in ("--mpp", str(MPP))))
    return case


def card(path: Path) -> Case:
    options = ("--crf",) if path.name.startswith("crf-") else ()
    return card_case(path.name, path.read_bytes(), *options)


MAKERS: dict[str, Callable[[Path], Case]] = {
    "slides": slide,
    "regions": lambda path: roi_case(path.name, path.read_bytes()),
    "cards": card,
    "graphs": lambda path: graph_case(path.name, path.read_bytes()),
}


def test_every_file_of_the_corpus_is_expected_to_do_something() -> None:
    found = {path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*") if path.is_file()}
    assert found == set(EXPECTED)


# Cards with parameters of the CRF are run with it, and that needs numba.
NEEDS_NUMBA = {name for name in EXPECTED if name.startswith("cards/crf-")}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.full] * (n in NEEDS_NUMBA)) for n in EXPECTED],
)
def test_what_broke_once_is_refused_clearly_or_accepted(sandbox: Sandbox, name: str) -> None:
    path = CORPUS / name
    outcome = sandbox.run(MAKERS[path.parent.name](path))
    if EXPECTED[name] == ACCEPTED:
        assert outcome.verdict == "accepted", outcome.message
        return
    assert outcome.verdict == "refused", outcome.message
    assert re.search(EXPECTED[name], outcome.message)
    assert not outcome.out_of_memory


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("...svs", "'..' cannot be the name of a folder of results"),
        ("..svs", "'.' cannot be the name of a folder of results"),
        ("\udcff\udcfe.tif", ACCEPTED),
        ("a\nb\x1b[2J.tif", ACCEPTED),
        ("[/x].tif", ACCEPTED),
        ("-rf.tif", ACCEPTED),
    ],
    ids=ascii,
)
def test_strange_names_of_slides_stay_in_the_output_folder(sandbox: Sandbox, name: str, message: str) -> None:
    outcome = sandbox.run(slide_case("name", name, name, seed_slides()["jpeg"]))
    assert outcome.verdict == ("refused" if message else "accepted"), outcome.message
    assert message in outcome.message


def test_a_damaged_tile_is_left_out_and_said(sandbox: Sandbox) -> None:
    path = CORPUS / "slides/deflate-bomb.tif"
    outcome = sandbox.run(slide_case("tiff", path.name, path.name, path.read_bytes()))
    assert outcome.status == 3
    assert outcome.verdict == "refused"  # the results are whole, the status says that not all is well
    assert "1 damaged block" in outcome.message


def test_a_seed_slide_of_every_kind_is_accepted(sandbox: Sandbox) -> None:
    for kind, content in seed_slides().items():
        outcome = sandbox.run(slide_case("tiff", kind, "slide.tif", content))
        # 16 bits a channel is no damage, but nothing that we read.
        assert outcome.verdict == ("refused" if kind == "deep" else "accepted"), (kind, outcome)


def test_the_cap_on_memory_holds(sandbox: Sandbox) -> None:
    assert 500 < sandbox.cap_mib < 6000
    assert sandbox.run(seed_case()).address_mib < sandbox.cap_mib

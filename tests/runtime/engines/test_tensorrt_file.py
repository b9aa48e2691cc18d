from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from histostream.runtime.engines.tensorrt.file import (
    LENGTH,
    MAGIC,
    MAX_HEADER_BYTES,
    EngineFileError,
    EngineHeader,
    Profile,
    describe,
    read_engine,
    read_header,
    write_engine,
)
from histostream.wsi.errors import OutputError

PLAN = bytes(range(256)) * 40
HEADER = EngineHeader(
    card="ab" * 32,
    onnx="model.fp16.onnx",
    onnx_sha256="cd" * 32,
    precision="fp16",
    library="tensorrt-rtx",
    library_version="1.7.1.116",
    targets=("sm80", "sm86"),
    compatibility="none",
    profile=Profile(1, 8, 16, 512, 512, 3),
    precision_map={"fp32_nodes": ["Softmax_1", "Größe"], "steps": 3},
)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "model.fp16.rtx.engine"
    write_engine(path, HEADER, PLAN)
    return path


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    start = len(MAGIC) + LENGTH.size
    (length,) = LENGTH.unpack_from(content, len(MAGIC))
    header: dict[str, Any] = json.loads(content[start : start + length])
    return header


def with_header(text: bytes) -> bytes:
    return MAGIC + LENGTH.pack(len(text)) + text + PLAN


def test_what_is_written_is_read_back(engine: Path) -> None:
    header, plan = read_engine(engine)
    assert plan == PLAN
    assert header == read_header(engine)
    assert replace(header, plan_sha256="", plan_bytes=0) == HEADER
    assert header.plan_bytes == len(PLAN)
    assert [path.name for path in engine.parent.iterdir()] == [engine.name]


def test_the_same_plan_gives_the_same_file(engine: Path, tmp_path: Path) -> None:
    write_engine(tmp_path / "again", HEADER, PLAN)
    assert (tmp_path / "again").read_bytes() == engine.read_bytes()


def test_the_header_is_plain_json_after_the_magic(engine: Path) -> None:
    assert engine.read_bytes().startswith(b"\x89HSENG\r\n")
    assert header_of(engine)["targets"] == ["sm80", "sm86"]
    assert not {"created", "time", "host"} & header_of(engine).keys()


def test_reading_the_header_leaves_the_plan_alone(engine: Path) -> None:
    content = bytearray(engine.read_bytes())
    content[-1] ^= 1
    engine.write_bytes(content)
    assert read_header(engine).precision == "fp16"
    with pytest.raises(EngineFileError, match=r"is damaged \(sha256 of its plan .* build the engine"):
        read_engine(engine)


@pytest.mark.parametrize("kept", [0, 5, 8, 12, 16, 40, 700, -1])
def test_a_truncated_file_is_refused(engine: Path, kept: int) -> None:
    engine.write_bytes(engine.read_bytes()[:kept])
    with pytest.raises(EngineFileError, match=r"rtx\.engine.*(truncated|not a HistoStream engine)"):
        read_header(engine)


def test_bytes_that_do_not_belong_are_refused(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes() + b"more")
    with pytest.raises(EngineFileError, match="bytes instead of"):
        read_header(engine)


@pytest.mark.parametrize("content", [b"vtrt" * 100, b"", b"\x89HSENG\n" * 10])
def test_another_file_is_not_an_engine(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan").write_bytes(content)
    with pytest.raises(EngineFileError, match="plan: not a HistoStream engine"):
        read_header(tmp_path / "plan")


@pytest.mark.parametrize("name", ["missing", "."])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(EngineFileError, match="cannot be read"):
        read_header(tmp_path / name)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_an_absurd_header_is_not_allocated(tmp_path: Path, length: int) -> None:
    (tmp_path / "huge").write_bytes(MAGIC + LENGTH.pack(length) + b"{}" + PLAN)
    with pytest.raises(EngineFileError, match=f"a header of {length} bytes"):
        read_header(tmp_path / "huge")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"schema": NaN}', b"9" * 10_000],
    ids=["empty", "open", "not utf-8", "deep", "nan", "long number"],
)
def test_a_header_that_is_not_json_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "bad").write_bytes(with_header(text))
    with pytest.raises(EngineFileError, match="bad is damaged"):
        read_header(tmp_path / "bad")


@pytest.mark.parametrize("text", [b"[]", b"null", b'{"schema": 2}', b'{"schema": true}', b"{}"])
def test_another_schema_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "old").write_bytes(with_header(text))
    with pytest.raises(EngineFileError, match="this version reads 1"):
        read_header(tmp_path / "old")


@pytest.mark.parametrize("name", list(asdict(HEADER)))
def test_every_entry_is_needed(engine: Path, name: str) -> None:
    header = header_of(engine)
    del header[name]
    engine.write_bytes(with_header(json.dumps(header).encode()))
    with pytest.raises(EngineFileError, match=f"{name} is missing"):
        read_header(engine)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("card", "ab"),
        ("card", 7),
        ("card", ["ab" * 32]),
        ("onnx", "../model.onnx"),
        ("onnx", {}),
        ("onnx_sha256", None),
        ("precision", "fp8"),
        ("precision", []),
        ("library", "tensorrt_rtx"),
        ("library", {}),
        ("library_version", ""),
        ("library_version", "1\x1b[2J"),
        ("library_version", "1" * 500),
        ("targets", []),
        ("targets", "sm86"),
        ("targets", ["sm86\n"]),
        ("targets", [86]),
        ("targets", None),
        ("compatibility", "all"),
        ("precision_map", []),
        ("plan_sha256", ""),
        ("plan_bytes", 0),
        ("plan_bytes", -1),
        ("plan_bytes", True),
        ("plan_bytes", 1.5),
        ("profile", None),
        ("profile", {}),
        ("profile", {**asdict(HEADER.profile), "min_batch": 0}),
        ("profile", {**asdict(HEADER.profile), "min_batch": True}),
        ("profile", {**asdict(HEADER.profile), "height": "512"}),
        ("profile", {**asdict(HEADER.profile), "max_batch": 2}),
    ],
)
def test_an_entry_of_a_wrong_kind_is_refused(engine: Path, name: str, value: Any) -> None:
    engine.write_bytes(with_header(json.dumps({**header_of(engine), name: value}).encode()))
    with pytest.raises(EngineFileError, match=rf"rtx\.engine: .*{name.split('_')[0]}"):
        read_header(engine)


def test_entries_that_are_not_known_do_no_harm(engine: Path) -> None:
    header = {**header_of(engine), "news": 1}
    header["profile"]["depth"] = 3
    engine.write_bytes(with_header(json.dumps(header).encode()))
    assert read_engine(engine)[0].profile == HEADER.profile


def test_a_header_too_long_to_read_is_not_written(tmp_path: Path) -> None:
    header = replace(HEADER, precision_map={"nodes": ["x" * MAX_HEADER_BYTES]})
    with pytest.raises(EngineFileError, match="shorten"):
        write_engine(tmp_path / "long", header, PLAN)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_engine(tmp_path / "no" / "engine", HEADER, PLAN)


def test_identity_is_what_was_asked_for_and_not_what_came_out(engine: Path) -> None:
    assert read_header(engine).identity == HEADER.identity
    assert replace(HEADER, targets=("sm86",)).identity != HEADER.identity
    assert len(replace(HEADER, precision_map={"nodes": ["x" * 5000]}).identity) < 4096


def test_a_description_says_everything_once_a_line(engine: Path) -> None:
    text = describe(engine)
    for part in (
        "tensorrt-rtx 1.7.1.116",
        "precision     fp16\n",
        "sm80, sm86",
        "512 x 512 x 3",
        "1 to 16, best 8",
        "ab" * 32,
        "model.fp16.onnx",
        "whole",
        "Softmax_1",
    ):
        assert text.count(part) == 1, part
    assert all(line[12:14] == "  " and line[14] != " " for line in text.splitlines())


def test_a_description_says_that_the_plan_is_damaged(engine: Path) -> None:
    content = bytearray(engine.read_bytes())
    content[-1] ^= 1
    engine.write_bytes(content)
    assert "DAMAGED" in describe(engine)


def test_a_description_cannot_steer_the_terminal(tmp_path: Path) -> None:
    header = replace(HEADER, precision_map={"a\x1b[2J": "\x1b]0;x\x07\n\u202e"})
    write_engine(tmp_path / "evil", header, PLAN)
    lines = describe(tmp_path / "evil").split("\n")
    assert len(lines) == 10
    assert all(line.isprintable() and line.isascii() for line in lines[1:])

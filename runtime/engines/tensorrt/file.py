"""The file of a TensorRT engine: a header with what it was built from and for, then the plan.

A plan runs only on the library version and the GPUs that it was built for, which cannot be seen
before it is loaded. The layout is 8 magic bytes, the header's length (uint64, little endian), the
header (JSON, UTF-8) and the plan. It has no time and no host name: the same plan gives the same
file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from histostream.runtime.choices import PRECISIONS
from histostream.wsi.errors import HistoError
from histostream.wsi.files import write_whole

MAGIC = b"\x89HSENG\r\n"  # as in PNG, so that a transfer as text is detected
LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 1 << 20  # a header is a few kB; its precision map names nodes
SCHEMA = 1
LIBRARIES = ("tensorrt", "tensorrt-rtx")
COMPATIBILITIES = ("none", "ampere_plus")
REBUILD = "build the engine again"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TARGET = re.compile(r"sm[0-9]{2,3}")


class EngineFileError(HistoError, ValueError):
    """A file is not an engine, is damaged, or has another schema."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The shapes that an engine accepts: tiles (N, height, width, channels), N from min to max.

    The library tunes for ``opt_batch``. If all three are equal the engine is static; only then does
    a build for Ampere or later give the same bytes each time (TensorRT-RTX 1.7.1).
    """

    min_batch: int
    opt_batch: int
    max_batch: int
    height: int
    width: int
    channels: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not _is_int(value) or value < 1:
                raise EngineFileError(f"profile: {name}={value!r} is not a positive number")
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise EngineFileError(f"profile: batch {self.batches} is not min <= opt <= max; order them")

    @property
    def batches(self) -> str:
        """The smallest, best and largest batch, as "1/8/16"."""
        return f"{self.min_batch}/{self.opt_batch}/{self.max_batch}"

    @property
    def tile(self) -> str:
        """The shape of one tile, as "512 x 512 x 3"."""
        return f"{self.height} x {self.width} x {self.channels}"


@dataclass(frozen=True, slots=True)
class EngineHeader:
    """What an engine was built from, by which library, and for which GPUs and shapes.

    Attributes
    ----------
    card
        `ModelCard.digest` of the bundle's card.
    onnx
        Name of the ONNX file in the bundle.
    onnx_sha256
        SHA-256 of that file.
    precision
        "fp32", "fp16" or "int8".
    library
        "tensorrt" or "tensorrt-rtx".
    library_version
        Full version of the library; the plan runs only with this one.
    targets
        Compute capabilities that it was built for, as "sm86"; of "tensorrt", the GPU that it was
        built on.
    compatibility
        "ampere_plus" if it runs on every GPU from Ampere on, else "none".
    profile
        Tile shapes that it accepts.
    precision_map
        How the graph was converted: the entry under ``precision`` in the card.
    plan_sha256, plan_bytes
        SHA-256 and size of the plan; "" and 0 before it is built.
    """

    card: str
    onnx: str
    onnx_sha256: str
    precision: str
    library: str
    library_version: str
    targets: tuple[str, ...]
    compatibility: str
    profile: Profile
    precision_map: dict[str, Any] = field(default_factory=dict)
    plan_sha256: str = ""
    plan_bytes: int = 0

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("card", _matches(_SHA256, self.card), "a SHA-256"),
            ("precision", _is_text(self.precision) and self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
            ("onnx", self.onnx in PRECISIONS.values(), f"one of {', '.join(PRECISIONS.values())}"),
            ("onnx_sha256", _matches(_SHA256, self.onnx_sha256), "a SHA-256"),
            ("library", self.library in LIBRARIES, f"one of {', '.join(LIBRARIES)}"),
            ("library_version", _is_text(self.library_version), "a version"),
            (
                "targets",
                isinstance(self.targets, tuple)
                and len(self.targets) > 0
                and all(_matches(_TARGET, t) for t in self.targets),
                "a list of names like 'sm86'",
            ),
            ("compatibility", self.compatibility in COMPATIBILITIES, f"one of {', '.join(COMPATIBILITIES)}"),
            ("profile", isinstance(self.profile, Profile), "a profile"),
            ("precision_map", isinstance(self.precision_map, dict), "an object"),
            ("plan_sha256", self.plan_sha256 == "" or _matches(_SHA256, self.plan_sha256), "a SHA-256"),
            ("plan_bytes", _is_int(self.plan_bytes) and self.plan_bytes >= 0, "a size"),
        ):
            if not valid:
                raise EngineFileError(f"header: {name}={_short(getattr(self, name))} is not {wanted}")

    @property
    def identity(self) -> str:
        """JSON of the header without the plan, equal for two builds of the same engine.

        The precision map is left out, because it may be long and the card's digest covers it.
        """
        content = asdict(self)
        for name in ("precision_map", "plan_sha256", "plan_bytes"):
            del content[name]
        return _json(content)


def write_engine(path: Path, header: EngineHeader, plan: bytes) -> EngineHeader:
    """Write an engine, and return its header with the size and SHA-256 of the plan filled in.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    header = replace(header, plan_sha256=hashlib.sha256(plan).hexdigest(), plan_bytes=len(plan))
    text = _json({"schema": SCHEMA, **asdict(header)}).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise EngineFileError(
            f"{path}: its header would have {len(text)} bytes, at most {MAX_HEADER_BYTES} can be "
            "read back; shorten the precision entry of card.json"
        )
    write_whole(path, MAGIC, LENGTH.pack(len(text)), text, plan)
    return header


def read_header(path: Path) -> EngineHeader:
    """Read the header of an engine; the plan is not read.

    Raises
    ------
    EngineFileError
        If it is missing, not an engine, truncated, or its header is not valid.
    """
    try:
        with path.open("rb") as file:
            return _read_header(file, path)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_engine(path: Path) -> tuple[EngineHeader, bytes]:
    """Read an engine and check its plan against the header.

    Raises
    ------
    EngineFileError
        As `read_header`, and if the plan's SHA-256 differs.
    """
    try:
        with path.open("rb") as file:
            header = _read_header(file, path)
            plan = file.read(header.plan_bytes)
    except OSError as error:
        raise _unreadable(path, error) from error
    sha256 = hashlib.sha256(plan).hexdigest()
    if sha256 != header.plan_sha256:
        raise EngineFileError(
            f"{path} is damaged (sha256 of its plan {sha256[:8]}... is not {header.plan_sha256[:8]}...): {REBUILD}"
        )
    return header, plan


def describe(path: Path) -> str:
    """Return a description of an engine as lines of text; they also report a damaged plan.

    Raises
    ------
    EngineFileError
        As `read_header`.
    """
    header = read_header(path)
    try:
        read_engine(path)
        state = "whole"
    except EngineFileError:
        state = f"DAMAGED: {REBUILD}"
    targets = ", ".join(header.targets)
    if header.compatibility == "ampere_plus":
        targets += " (any GPU from Ampere on)"
    profile = header.profile
    rows = [
        ("engine", str(path)),
        ("model card", header.card),
        ("built from", f"{header.onnx}, sha256 {header.onnx_sha256}"),
        ("precision", header.precision),
        ("built by", f"{header.library} {header.library_version}"),
        ("targets", targets),
        ("tiles", f"{profile.tile}, uint8"),
        ("batch", f"{profile.min_batch} to {profile.max_batch}, best {profile.opt_batch}"),
        ("plan", f"{header.plan_bytes / 1e6:.2f} MB, sha256 {header.plan_sha256}, {state}"),
    ]
    rows += [(f"  {_printable(k)}", _short(v)) for k, v in sorted(header.precision_map.items())]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _read_header(file: BinaryIO, path: Path) -> EngineHeader:
    size = os.fstat(file.fileno()).st_size
    start = file.read(len(MAGIC) + LENGTH.size)
    if not start.startswith(MAGIC):
        raise EngineFileError(f"{path}: not a HistoStream engine; {REBUILD}")
    if len(start) < len(MAGIC) + LENGTH.size:
        raise EngineFileError(f"{path} is truncated ({size} bytes): {REBUILD}")
    (length,) = LENGTH.unpack_from(start, len(MAGIC))
    if length > MAX_HEADER_BYTES:
        raise EngineFileError(f"{path} is damaged (a header of {length} bytes; at most {MAX_HEADER_BYTES}): {REBUILD}")
    text = file.read(length)
    if len(text) < length:
        raise EngineFileError(f"{path} is truncated ({size} bytes, in its header): {REBUILD}")
    try:
        content = json.loads(text.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise EngineFileError(f"{path} is damaged (its header is not JSON): {REBUILD}") from error
    schema = content.pop("schema", None) if isinstance(content, dict) else None
    if not _is_int(schema) or schema != SCHEMA:
        raise EngineFileError(f"{path}: engine schema {_short(schema)}, this version reads {SCHEMA}; {REBUILD}")
    try:
        header = _parse_header(content)
    except EngineFileError as error:
        raise EngineFileError(f"{path}: {error}; {REBUILD}") from error
    expected = len(start) + length + header.plan_bytes
    if size != expected:
        kind = "truncated" if size < expected else "damaged"
        raise EngineFileError(f"{path} is {kind} ({size} bytes instead of {expected}): {REBUILD}")
    return header


def _parse_header(content: dict[str, Any]) -> EngineHeader:
    """Make a header of untrusted JSON."""
    names = EngineHeader.__dataclass_fields__
    profile_names = Profile.__dataclass_fields__
    missing = [name for name in names if name not in content]
    if missing:
        raise EngineFileError(f"header: {missing[0]} is missing")
    profile, targets = content["profile"], content["targets"]
    if not isinstance(profile, dict) or not profile_names.keys() <= profile.keys():
        raise EngineFileError(f"header: profile={_short(profile)} lacks one of {', '.join(profile_names)}")
    if not isinstance(targets, list):
        raise EngineFileError(f"header: targets={_short(targets)} is not a list")
    others = {name: content[name] for name in names if name not in ("profile", "targets")}
    header = EngineHeader(
        targets=tuple(targets),
        profile=Profile(**{name: profile[name] for name in profile_names}),
        **others,
    )
    if not header.plan_sha256 or not header.plan_bytes:
        raise EngineFileError("header: plan_sha256 or plan_bytes is empty")
    return header


def _unreadable(path: Path, error: OSError) -> EngineFileError:
    return EngineFileError(f"{path}: cannot be read ({error.strerror}); {REBUILD}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _short(value: Any) -> str:
    """Return a value as short JSON; ASCII only, so that a file cannot control the terminal."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 72 else f"{text[:60]}... ({len(text)} characters)"


def _printable(value: str) -> str:
    return value if value.isascii() and value.isprintable() else _short(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) < 100 and value.isprintable()


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None

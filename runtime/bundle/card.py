"""The model card: what a model bundle says of itself.

A bundle is a folder with ``card.json`` and ONNX files. It is data: reading one runs no code, every
file in it is named in the card with its SHA-256, and a name may not lead out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from histostream.runtime.choices import BF16, PRECISIONS
from histostream.wsi.errors import HistoError, reason
from histostream.wsi.outputs.label_rows import ClassInfo

SCHEMA = 1
ENGINES = "engines"  # the one folder that a bundle may have: TensorRT engines
SCORE_KINDS = ("probability", "embedding")
MAX_TILE_PX = 8192  # 0.2 GB of RGB pixels; networks in use take 128 to 2048
MAX_MPP = 1e6  # um: a pixel of a metre
MAX_NAME = 200  # characters of a class or a method; the legend shows about 25


class CardError(HistoError, ValueError):
    """A model bundle is missing something, damaged, or of another schema."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Everything that running a model needs to know, and where the model comes from.

    Attributes
    ----------
    method
        Name of the method that trained it.
    classes
        Name and display colour of each class, in label order.
    mpp
        Resolution that the network expects, in micrometres per pixel.
    channels
        3 for RGB, 1 for grey.
    tile_px
        Side of the network's input.
    align_px
        Tiles must start at multiples of this for the network's pooling to have one phase.
    halo_px
        How far into its input an output pixel sees; computed from the network.
    tile_statistics
        Whether the result depends on statistics of the whole tile (instance or group norm).
    score_kind
        "probability": scores are round(255 p); "embedding": iMEMS's embedding, 0..255. The label
        is the arg-max of both.
    files
        SHA-256 of each file, by name: the ONNX files of `PRECISIONS` and ``engines/...``.
    opset
        ONNX operator set of the files.
    parity
        How far each file is from the network that was trained.
    precision
        For "fp16" and "int8", how the graph was converted: the nodes that stay in single
        precision, and the steps that found them.
    training
        Training record: recipe, data checksum, scores on held-out images, versions.
    note
        What the model is for, and where it fails.
    crf
        Parameters of the dense CRF that ``histo-export tune-crf`` found; thetas in pixels of
        ``mpp``. Empty: none were looked for.
    """

    method: str
    classes: tuple[ClassInfo, ...]
    mpp: float
    channels: int
    tile_px: int
    align_px: int
    halo_px: int
    tile_statistics: bool
    score_kind: str
    files: dict[str, str]
    opset: int
    parity: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    crf: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            (
                "method",
                self.method.isprintable() and len(self.method) <= MAX_NAME,
                f"a line of up to {MAX_NAME} characters",
            ),
            ("mpp", 0 < self.mpp < MAX_MPP, "a positive number"),
            ("channels", self.channels in (1, 3), "1 or 3"),
            ("align_px", self.align_px > 0, "a positive number"),
            (
                "tile_px",
                self.tile_px > 0 and self.tile_px % max(self.align_px, 1) == 0,
                "a positive multiple of align_px",
            ),
            ("tile_px", self.tile_px <= MAX_TILE_PX, f"at most {MAX_TILE_PX}"),
            ("halo_px", self.halo_px >= 0, "0 or more"),
            ("classes", 2 <= len(self.classes) <= 254, "2 to 254 classes"),
            ("score_kind", self.score_kind in SCORE_KINDS, f"one of {SCORE_KINDS}"),
        ):
            if not valid:
                raise CardError(f"card: {name}={_short(getattr(self, name))} is not {wanted}")
        for file in self.files:
            name = file.removeprefix(f"{ENGINES}/")
            if Path(name).name != name or name in ("", ".", "..", "card.json"):
                raise CardError(f"card: {_short(file)} is not the name of a file in the bundle")

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that the bundle has a graph of."""
        return tuple(name for name, file in PRECISIONS.items() if file in self.files)

    def digest(self) -> str:
        """SHA-256 of what the card says of the network, engines left out.

        An engine names the card that it was built for by this digest, so adding an engine to a
        bundle does not change it, and any other change does.
        """
        said = _plain(self)
        del said["crf"]  # what is done with scores is not the network's
        for entry in ("files", "parity"):
            said[entry] = {k: v for k, v in said[entry].items() if not k.startswith(f"{ENGINES}/")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def graph_file(precision: str) -> str:
    """Return the name of the ONNX file that is run in a precision."""
    return PRECISIONS["fp32" if precision == BF16 else precision]


def default_bundle() -> Path:
    """Return the folder of the nucleus model that ships with HistoStream."""
    return Path(str(resources.files("histostream.runtime"))) / "models" / "nuclei"


def read_card(bundle: Path) -> ModelCard:
    """Read ``card.json`` of a bundle.

    Raises
    ------
    CardError
        If it is missing, not JSON, of another schema, or has a wrong or missing entry.

    Examples
    --------
    >>> card = read_card(default_bundle())
    >>> [entry.name for entry in card.classes], card.mpp, card.tile_px
    (['background', 'nucleus'], 0.5, 512)
    """
    path = bundle / "card.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CardError(
            f"{bundle}: not a model bundle (no card.json in it); name a folder that histo-export wrote"
        ) from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise CardError(f"{path}: cannot be read ({reason(error)}); export the model again") from error
    schema = said.pop("schema", None) if isinstance(said, dict) else None
    if schema != SCHEMA or isinstance(schema, bool):
        raise CardError(f"{path}: schema {_short(schema)}, this version reads {SCHEMA}; export the model again")
    try:
        return _from_plain(said)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise CardError(f"{path}: {reason(error)}; export the model again") from error


def write_card(card: ModelCard, bundle: Path) -> None:
    """Write ``card.json`` into a bundle's folder."""
    text = json.dumps(_plain(card), indent=1, allow_nan=False)
    (bundle / "card.json").write_text(text + "\n", encoding="utf-8")


def read_file(bundle: Path, card: ModelCard, name: str) -> bytes:
    """Read a file of a bundle and check it against the card.

    The bytes that were checked are the bytes to use: a file that changes afterwards does no harm.

    Raises
    ------
    CardError
        If the card does not name the file, it is missing, or its SHA-256 differs.
    """
    if name not in card.files:
        raise CardError(
            f"{bundle}: has no {name}; it has {', '.join(card.files) or 'no files'}: export the model again"
        )
    path = bundle / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CardError(
            f"{path}: cannot be read ({error.strerror}); check its permissions, or export the model again"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != card.files[name]:
        raise CardError(
            f"{path} does not match card.json (sha256 {found[:8]}... is not "
            f"{card.files[name][:8]}...): export again or fetch both files"
        )
    return content


def _plain(card: ModelCard) -> dict[str, Any]:
    return {"schema": SCHEMA, **asdict(card)}


def _from_plain(said: dict[str, Any]) -> ModelCard:
    types: dict[str, Any] = {
        "method": str,
        "mpp": (int, float),
        "channels": int,
        "tile_px": int,
        "align_px": int,
        "halo_px": int,
        "tile_statistics": bool,
        "score_kind": str,
        "files": dict,
        "opset": int,
        "parity": dict,
        "precision": dict,
        "training": dict,
        "note": str,
        "classes": list,
        "crf": dict,
    }
    for name in ("precision", "crf"):  # which older cards do not have
        said.setdefault(name, {})
    for name, kind in types.items():
        if name not in said:
            raise KeyError(f"{name} is missing")
        if not isinstance(said[name], kind) or (kind is not bool and isinstance(said[name], bool)):
            raise TypeError(f"{name}={_short(said[name])} has the wrong type")
    for file, digest in said["files"].items():
        if not isinstance(digest, str):
            raise TypeError(f"sha256 {_short(digest)} of {_short(file)} has the wrong type")
    known = {f.name for f in fields(ModelCard)}
    classes = tuple(ClassInfo(_name(c["name"]), _color(c["color"])) for c in said.pop("classes"))
    return ModelCard(classes=classes, **{k: v for k, v in said.items() if k in known})


def _name(value: Any) -> str:
    name = str(value)
    # Lines and tabs do no harm; what a terminal obeys, and half characters, do.
    if not "".join(name.split()).isprintable() or len(name) > MAX_NAME:
        raise ValueError(f"{_short(name)} is no name for a class: use up to {MAX_NAME} characters that can be printed")
    return name


def _color(values: Any) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in values)
    if not all(0 <= v <= 255 for v in (red, green, blue)):
        raise ValueError(f"color {_short(values)} is not three numbers from 0 to 255")
    return red, green, blue


def _short(value: Any) -> str:
    """Return a value as a message quotes it."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"

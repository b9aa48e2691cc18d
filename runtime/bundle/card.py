"""The model card, ``card.json`` of a model bundle: all that is needed to run the model.

A bundle is a folder with the card and ONNX files. It is data: reading one runs no code, the card
has the SHA-256 of every file, and a file name must not lead out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.choices import BF16, PRECISIONS
from histostream.wsi.errors import HistoError, reason
from histostream.wsi.files import write_whole
from histostream.wsi.outputs.label_rows import ROLES, ClassInfo
from histostream.wsi.outputs.object_rule import ObjectRule, rule_by_name, rule_from_json, rule_to_json

SCHEMA = 2
OLD_SCHEMA = 1  # its scores are bytes, round(255 s), which loses labels where classes are close
ENGINES = "engines"  # the only folder in a bundle: TensorRT engines
SCORE_KINDS = ("probability", "embedding", "label")
HALO_SOURCES = ("computed", "measured")
MAX_TILE_PX = 8192  # 0.2 GB of RGB pixels; networks in use take 128 to 2048
MAX_MPP = 1e6  # um per pixel: a pixel of a metre
MAX_CHANNELS = 64
MAX_NAME = 200  # characters of a class or a method; the legend shows about 25


# Of the tile contract: float16 in [0, 1], or the bytes of schema 1.
Scores = NDArray[np.float16] | NDArray[np.uint8]


class CardError(HistoError, ValueError):
    """A model bundle is incomplete, damaged, or of another schema."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is needed to run a model, and how the model was made.

    Attributes
    ----------
    method
        Name of the method that trained it.
    classes
        Name and display colour of each class, in label order; the role "background" of one, unless its name says so;
        and which regions are objects. Cards without such a rule are read as if classes called nuclei had theirs.
    mpp
        Resolution that the network expects, in micrometres per pixel.
    channels
        3 for RGB, 1 for grey, or any other number.
    tile_px
        Side of the network's input.
    align_px
        Tiles start at multiples of this, so that the network's pooling has the same phase in all.
    halo_px
        Half the receptive field: the pixels beyond its own position that an output pixel depends on.
    tile_statistics
        Whether the result depends on more than the pixels within the halo: on statistics of the whole tile (instance or
        group norm, pooling over the tile), or on where in its tile a pixel lies (aligned corners).
    score_kind
        "probability"; "embedding": iMEMS's embedding divided by 255; "label": 1 for the label that the network gives,
        else 0. The label is the arg-max of all.
    files
        SHA-256 of each file, by name: the ONNX files of `PRECISIONS` and ``engines/...``.
    opset
        ONNX operator set of the files.
    parity
        Results of the parity check of each file against the trained network.
    precision
        For "fp16" and "int8", how the graph was converted: the nodes that stay in single
        precision, and the steps that found them.
    training
        Training record: recipe, data checksum, scores on held-out images, versions.
    note
        What the model is for, and where it fails.
    crf
        Parameters of the dense CRF that ``histo-export tune-crf`` found; thetas in pixels of
        ``mpp``. Empty if it was not run.
    channel_names
        Name of each channel; empty for RGB and grey.
    border_px
        Pixels at each side of a tile for which the network gives no scores; those there repeat the nearest.
    halo_source
        "computed" from the graph; "measured" by perturbation, if a node of the graph has no rule.
    schema
        Version of the tile contract.
    further
        Unknown keys of ``card.json``, written again as they are.
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
    channel_names: tuple[str, ...] = ()
    border_px: int = 0
    halo_source: str = "computed"
    schema: int = SCHEMA
    further: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            (
                "method",
                self.method.isprintable() and len(self.method) <= MAX_NAME,
                f"a line of up to {MAX_NAME} characters",
            ),
            ("mpp", 0 < self.mpp < MAX_MPP, "a positive number"),
            ("channels", 1 <= self.channels <= MAX_CHANNELS, f"1 to {MAX_CHANNELS}"),
            (
                "channel_names",
                len(self.channel_names) in (0, self.channels) and all(map(_is_name, self.channel_names)),
                f"{self.channels} names, one for each channel",
            ),
            ("align_px", self.align_px > 0, "a positive number"),
            (
                "tile_px",
                self.tile_px >= self.align_px,
                "align_px or more",
            ),
            ("tile_px", self.tile_px <= MAX_TILE_PX, f"at most {MAX_TILE_PX}"),
            ("halo_px", self.halo_px >= 0, "0 or more"),
            ("border_px", self.border_px >= 0 and 2 * self.border_px < self.tile_px, "less than half a tile"),
            ("classes", 2 <= len(self.classes) <= 254, "2 to 254 classes"),
            ("score_kind", self.score_kind in SCORE_KINDS, f"one of {SCORE_KINDS}"),
            ("halo_source", self.halo_source in HALO_SOURCES, f"one of {HALO_SOURCES}"),
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

    @property
    def score_dtype(self) -> np.dtype[np.generic]:
        """The type of the scores."""
        return np.dtype(np.uint8 if self.schema == OLD_SCHEMA else np.float16)

    @property
    def unblendable(self) -> str | None:
        """Why overlapping tiles of the model cannot be averaged; None if they can."""
        if self.score_kind == "label":
            return "this model gives labels, which cannot be averaged"
        if self.border_px:
            return f"this model gives no scores within {self.border_px} px of a tile's border"
        return None

    @property
    def default_blend(self) -> str:
        """The blending that suits the model: hann, unless its scores cannot be averaged."""
        if self.unblendable is None:
            return "hann"
        return "exact" if self.border_px and not self.tile_statistics and 2 * self.halo_px < self.tile_px else "crop"

    def digest(self) -> str:
        """Return the SHA-256 of the card's content that describes the network.

        An engine names the card that it was built for by this digest, so engines in the bundle do
        not change it. Parameters of the CRF, where the halo comes from, which regions are objects, and unknown keys do
        not belong to the network.
        """
        content = _content(self)
        del content["crf"], content["halo_source"], content["further"]
        for entry in content["classes"]:
            entry.pop("objects", None)
        if self.schema == OLD_SCHEMA:  # as engines of that time have it
            del content["channel_names"], content["border_px"]
        for name in ("files", "parity"):
            content[name] = {k: v for k, v in content[name].items() if not k.startswith(f"{ENGINES}/")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CardError(
            f"{bundle}: not a model bundle (no card.json in it); name a folder that histo-export wrote"
        ) from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise CardError(f"{path}: cannot be read ({reason(error)}); export the model again") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in (OLD_SCHEMA, SCHEMA) or isinstance(schema, bool):
        raise CardError(
            f"{path}: schema {_short(schema)}, this version reads {OLD_SCHEMA} and {SCHEMA}; export the model again"
        )
    try:
        return _parse(content)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise CardError(f"{path}: {reason(error)}; export the model again") from error


def write_card(card: ModelCard, bundle: Path) -> None:
    """Write ``card.json`` into a bundle's folder, whole or not at all.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    content = _content(card)
    content |= content.pop("further")
    text = json.dumps(content, indent=1, allow_nan=False)
    write_whole(bundle / "card.json", text + "\n")


def read_file(bundle: Path, card: ModelCard, name: str) -> bytes:
    """Read a file of a bundle and check it against the card.

    Use the returned bytes, not the file: it may change after the check.

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
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != card.files[name]:
        raise CardError(
            f"{path} does not match card.json (sha256 {sha256[:8]}... is not "
            f"{card.files[name][:8]}...): export again or fetch both files"
        )
    return content


def _content(card: ModelCard) -> dict[str, Any]:
    """Return the content of ``card.json``; an empty role and a rule that is missing are left out, as in older cards."""
    content = {"schema": card.schema, **asdict(card)}
    content["classes"] = [_class_content(entry) for entry in card.classes]
    return content


def _class_content(entry: ClassInfo) -> dict[str, Any]:
    content: dict[str, Any] = {"name": entry.name, "color": entry.color}
    if entry.role:
        content["role"] = entry.role
    if entry.rule is not None:
        content["objects"] = rule_to_json(entry.rule)
    return content


def _parse(content: dict[str, Any]) -> ModelCard:
    """Make a card of untrusted JSON."""
    types = get_type_hints(ModelCard)
    further = {name: content.pop(name) for name in list(content) if name not in types or name == "further"}
    del types["further"]
    for name, default in (
        ("precision", {}),
        ("crf", {}),
        ("channel_names", []),
        ("border_px", 0),
        ("halo_source", "computed"),
    ):  # which older cards do not have
        content.setdefault(name, default)
    for name, hint in types.items():
        kind: Any = get_origin(hint) or hint
        kind = {tuple: list, float: (int, float)}.get(kind, kind)
        if name not in content:
            raise KeyError(f"{name} is missing")
        if not isinstance(content[name], kind) or (kind is not bool and isinstance(content[name], bool)):
            raise TypeError(f"{name}={_short(content[name])} has the wrong type")
    for file, digest in content["files"].items():
        if not isinstance(digest, str):
            raise TypeError(f"sha256 {_short(digest)} of {_short(file)} has the wrong type")
    classes = tuple(
        ClassInfo(_class_name(c["name"]), _color(c["color"]), _role(c.get("role", "")), _rule(c))
        for c in content.pop("classes")
    )
    names = tuple(content.pop("channel_names"))
    return ModelCard(classes=classes, channel_names=names, further=further, **content)


def _is_name(value: Any) -> bool:
    """Whether a value can be shown as a name."""
    # Line breaks and tabs are harmless; control sequences of terminals and surrogates are not.
    return isinstance(value, str) and "".join(value.split()).isprintable() and 0 < len(value) <= MAX_NAME


def _class_name(value: Any) -> str:
    name = str(value)
    if name and not _is_name(name):
        raise ValueError(f"{_short(name)} is no name for a class: use up to {MAX_NAME} printable characters")
    return name


def _role(value: Any) -> str:
    if value not in ROLES:
        raise ValueError(f"role {_short(value)} of a class is not one of {ROLES}")
    return str(value)


def _rule(entry: dict[str, Any]) -> ObjectRule | None:
    """Return which regions of a class are objects; that of its name, where the card does not say."""
    return rule_from_json(entry["objects"]) if "objects" in entry else rule_by_name(str(entry["name"]))


def _color(values: Any) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in values)
    if not all(0 <= v <= 255 for v in (red, green, blue)):
        raise ValueError(f"color {_short(values)} is not three numbers from 0 to 255")
    return red, green, blue


def _short(value: Any) -> str:
    """Return a value as text for a message."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to write numbers of thousands of digits
        return "a number of thousands of digits"

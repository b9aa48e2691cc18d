"""Write a bundle as a model repository of the NVIDIA Triton Inference Server.

Each graph of the bundle becomes one model; a client sends tiles and receives scores::

    REPOSITORY/imems_fp32/config.pbtxt   labels.txt   1/model.onnx
    REPOSITORY/imems_tensorrt/config.pbtxt   labels.txt   1/model.plan

Resolution, halo and classes, which a client needs to cut tiles from a slide, are parameters in ``config.pbtxt``, which
Triton serves with the model's configuration.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from histostream.runtime.bundle.card import OLD_SCHEMA, CardError, ModelCard, read_file
from histostream.runtime.choices import PRECISIONS
from histostream.wsi.errors import OutputError

MAX_BATCH = 32  # tiles; the profile of a TensorRT plan must allow as many
QUEUE_DELAY_US = 2000  # a GPU takes longer for a tile of 512 px, so waiting costs little
VERSION = "1"
ONNX_MODEL, PLAN_MODEL, LABELS, CONFIG = "model.onnx", "model.plan", "labels.txt", "config.pbtxt"
HEADER = "# Written by HistoStream; SHA-256 of what follows: "


def write_triton(
    bundle: Path,
    card: ModelCard,
    repository: Path,
    *,
    plan: bytes | None = None,
    max_batch: int = MAX_BATCH,
) -> list[Path]:
    """Write every graph of a bundle, and a TensorRT plan, as models of a Triton repository.

    A model's name is the bundle's folder and its precision: ``nuclei_fp16``.

    Parameters
    ----------
    bundle
        Folder of the bundle.
    card
        Its card; files that do not match its checksums are refused.
    repository
        Triton's model repository; it is created if missing, and other models in it are not changed.
    plan
        A serialised engine of TensorRT (not of TensorRT-RTX, which Triton cannot load), for the
        server's GPU and version of TensorRT.
    max_batch
        Largest number of tiles that Triton may put in one inference.

    Returns
    -------
    The folders that were written.

    Raises
    ------
    CardError
        If a file of the bundle does not match the card.
    OutputError
        If the folder of a model was not written by this function, was edited since, or cannot be written. Then nothing
        is changed, unless the disk fails while folders are moved.
    """
    if max_batch < 1:
        raise OutputError(f"max_batch={max_batch!r} is not a number of tiles: use 1 or more")
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", bundle.resolve().name).lstrip("._-") or card.method
    models = [
        (f"{stem}_{precision}", ONNX_MODEL, read_file(bundle, card, PRECISIONS[precision]))
        for precision in card.precisions
    ]
    if plan is not None:
        if not plan:
            raise OutputError("the TensorRT plan is empty: build the engine again")
        models.append((f"{stem}_tensorrt", PLAN_MODEL, plan))
    if not models:
        raise CardError(f"{bundle}: has no graph to serve; export the model again")
    for name, _, _ in models:
        _check_replaceable(repository / name)
    try:
        repository.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".histostream.", dir=_work_folder(repository)))
    except OSError as error:
        raise OutputError(
            f"{repository}: cannot be written ({error.strerror}); check its permissions and room"
        ) from error
    try:
        for name, file, content in models:
            _write_model(part / name, card, file, content, max_batch)
        for name, _, _ in models:
            _move_into_place(part / name, repository / name)
    except OSError as error:
        raise OutputError(
            f"{repository}: cannot be written ({error.strerror}); check its permissions and room"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [repository / name for name, _, _ in models]


def _write_model(folder: Path, card: ModelCard, file: str, content: bytes, max_batch: int) -> None:
    (folder / VERSION).mkdir(parents=True)
    (folder / VERSION / file).write_bytes(content)
    # One line for each class; a line break in a name would shift the labels after it.
    names = [" ".join(c.name.split()) for c in card.classes]
    labels = "".join(f"{name}\n" for name in names)
    (folder / LABELS).write_bytes(labels.encode(errors="replace"))
    config = _config(folder.name, card, file, max_batch)
    digest = hashlib.sha256(config.encode()).hexdigest()
    (folder / CONFIG).write_bytes(f"{HEADER}{digest}\n{config}".encode())


def _config(name: str, card: ModelCard, file: str, max_batch: int) -> str:
    platform, backend = {
        ONNX_MODEL: ("onnxruntime_onnx", "onnxruntime"),
        PLAN_MODEL: ("tensorrt_plan", "tensorrt"),
    }[file]
    side, classes = card.tile_px, len(card.classes)
    preferred = sorted({size for size in (8, 16, 32) if size < max_batch} | {max_batch})
    parameters = {
        "method": card.method,
        "mpp": repr(card.mpp),
        "tile_px": str(card.tile_px),
        "halo_px": str(card.halo_px),
        "align_px": str(card.align_px),
        "tile_statistics": json.dumps(card.tile_statistics),
        "score_kind": card.score_kind,
        "classes": json.dumps([{"name": c.name, "color": c.color} for c in card.classes]),
        "card_sha256": card.digest(),
    }
    scores = "TYPE_UINT8" if card.schema == OLD_SCHEMA else "TYPE_FP16"
    lines = [
        f"name: {_quoted(name)}",
        f"platform: {_quoted(platform)}",
        f"backend: {_quoted(backend)}",
        f"default_model_filename: {_quoted(file)}",
        f"max_batch_size: {max_batch}",
        f'input {{ name: "tiles" data_type: TYPE_UINT8 dims: [{side}, {side}, {card.channels}] }}',
        f'output {{ name: "scores" data_type: {scores} dims: [{classes}, {side}, {side}] '
        f"label_filename: {_quoted(LABELS)} }}",
        f"dynamic_batching {{ preferred_batch_size: {preferred} max_queue_delay_microseconds: {QUEUE_DELAY_US} }}",
        "instance_group { count: 1 kind: KIND_AUTO }",
        *(
            f"parameters {{ key: {_quoted(key)} value: {{ string_value: {_quoted(value)} }} }}"
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a string in protobuf's text format: UTF-8, with octal escapes for everything but printable ASCII."""
    characters = (
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in text.encode(errors="replace")
    )
    return f'"{"".join(characters)}"'


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but an unchanged model written by `write_triton`."""
    if not folder.exists() and not folder.is_symlink():
        return
    our_files = {CONFIG, LABELS, VERSION, f"{VERSION}/{ONNX_MODEL}", f"{VERSION}/{PLAN_MODEL}"}
    try:
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        first, _, rest = (folder / CONFIG).read_bytes().partition(b"\n")
    except OSError:  # no folder, or no config in it
        files, first, rest = set(), b"", b""
    if folder.is_symlink() or not first.startswith(HEADER.encode()):
        raise OutputError(f"{folder}: exists and was not written by HistoStream; move it away")
    if first != f"{HEADER}{hashlib.sha256(rest).hexdigest()}".encode():
        raise OutputError(f"{folder / CONFIG}: was edited since it was written; move it away")
    if files - our_files:
        raise OutputError(f"{folder / min(files - our_files)}: was not written by HistoStream; move it away")


def _work_folder(repository: Path) -> Path:
    """Return a folder on the same disk to build models in, outside the repository, which a server may be polling."""
    parent = repository.resolve().parent
    return parent if parent.stat().st_dev == repository.stat().st_dev else repository


def _move_into_place(part: Path, folder: Path) -> None:
    old = part.with_name(f"{part.name}.old")
    part.chmod(0o755)
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        with suppress(OSError):
            old.rename(folder)
        raise

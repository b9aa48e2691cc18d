"""A hostile input, and how one is made from a seed input."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from tests.robustness.hostile.seeds import GRAPH, MPP, seed_card, seed_graph, seed_slides


@dataclass(frozen=True, slots=True)
class Case:
    """One input of ``histo-infer``.

    Attributes
    ----------
    kind
        One of `KINDS`.
    what
        What was done to it.
    files
        Contents by name, in the folder that the command runs in.
    args
        Of the command.
    """

    kind: str
    what: str
    files: dict[str, bytes]
    args: tuple[str, ...]


def slide_case(kind: str, what: str, name: str, content: bytes, *options: str) -> Case:
    """Return a case of one slide and the seed bundle; all of the slide is read."""
    args = ("--no-tissue", "--mpp", str(MPP), *options)
    return _case(kind, what, {name: content}, name, args)


def roi_case(what: str, content: bytes) -> Case:
    """Return a case of a seed slide and a file of regions."""
    files = {"slide.tif": seed_slides()["deflate"], "roi.geojson": content}
    return _case("roi", what, files, "slide.tif", ("--roi", "roi.geojson", "--no-tissue"))


def card_case(what: str, card: bytes, *options: str, graph: bytes | None = None) -> Case:
    """Return a case of a seed slide and a bundle with this card."""
    files = {"slide.tif": seed_slides()["deflate"], "bundle/card.json": card}
    if graph is not None:
        files[f"bundle/{GRAPH}"] = graph
    return _case("card", what, files, "slide.tif", ("--no-tissue", *options))


def graph_case(what: str, graph: bytes, *options: str, **entries: Any) -> Case:
    """Return a case of a seed slide and a bundle with this graph, whose checksum is right."""
    card = json.dumps({**seed_card(graph), **entries}).encode()
    return replace(card_case(what, card, *options, graph=graph), kind="onnx")


def seed_case() -> Case:
    """Return an input that has to be accepted."""
    return slide_case("tiff", "seed", "slide.tif", seed_slides()["jpeg"])


def _case(kind: str, what: str, files: dict[str, bytes], slide: str, args: tuple[str, ...]) -> Case:
    bundle = {f"bundle/{GRAPH}": seed_graph()}
    bundle["bundle/card.json"] = json.dumps(seed_card(seed_graph())).encode()
    always = ("--model", "bundle", "--out", "out", "--backend", "cpu", "--threads", "2")
    return Case(kind, what, {**bundle, **files}, (*always, *args, "--", slide))

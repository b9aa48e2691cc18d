"""Cards of models that are wrong somewhere."""

from __future__ import annotations

import json
import random

from histostream.runtime.crf.options import read_params
from histostream.wsi.errors import HistoError
from tests.robustness.hostile.case import Case, card_case
from tests.robustness.hostile.edit import some_bytes
from tests.robustness.hostile.seeds import MPP, seed_card, seed_graph

VALUES: tuple[str, ...] = (
    "null",
    "true",
    "0",
    "-1",
    "1",
    "2",
    "3",
    "0.5",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "1e-320",
    "1e308",
    "2147483648",
    "1" + "0" * 400,
    "9" * 5000,
    "65536",
    "1000000",
    "[]",
    "{}",
    '""',
    '"x"',
    '"../../etc/passwd"',
    '"\\u0000"',
    '"\\ud800"',
    '"\\n\\u001b[2J"',
    '"[/b]"',
    '"[bold]"',
    "[1, 2]",
    '{"a": 1}',
    "[[[[]]]]",
    f'"{"x" * 50_000}"',
    '"é組織"',
    '":skull:"',
)
FILES = (
    "../model.onnx",
    "/etc/passwd",
    "engines/../../x",
    "engines/",
    "engines/..",
    "..",
    ".",
    "",
    "card.json",
    "model.onnx\\u0000",
    "C:\\\\x",
    "a/b",
    "engines/a/b",
    "\\ud800",
    "model.fp16.onnx",
    "engines/engine.plan",
)
COLORS = (
    "[0, 0, 0]",
    "[0, 0]",
    "[1e999, 0, 0]",
    "[NaN, 0, 0]",
    "[256, 0, 0]",
    '["1", 0, 0]',
    "null",
    '"abc"',
    "[-1, 0, 0]",
    "[0, 0, 0, 0]",
    "[[], 0, 0]",
    "{}",
)
CRF = ("w1", "theta_alpha", "theta_beta", "w2", "theta_gamma", "n_iter", "../x", "eval")


def make_card(rng: random.Random) -> Case:
    """Make a card that is wrong somewhere; the graph beside it is valid."""
    card = {name: json.dumps(value) for name, value in seed_card(seed_graph()).items()}
    said: list[str] = []
    options: tuple[str, ...] = ()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        way = rng.randrange(8)
        if way == 0:
            del card[name := rng.choice(sorted(card))]
            said.append(f"no {name}")
            continue
        if way in (1, 2):
            entry = f'{{"{rng.choice(FILES)}": {rng.choice(("null", "1", json.dumps("0" * 64)))}}}'
            card["files"] = _merged(card.get("files", "{}"), entry, rng)
            said.append(f"files {card['files'][-200:]}")
        elif way == 3:
            card["classes"] = _classes(rng)
            said.append(f"classes {card['classes'][:200]}")
        elif way == 4:
            card["crf"] = f'{{"{rng.choice(CRF)}": {rng.choice(VALUES)}}}'
            options = rng.choice(((), ("--crf",)))
            said.append(f"crf {card['crf'][:100]}")
        else:
            name = rng.choice(sorted(card))
            card[name] = rng.choice(VALUES)
            said.append(f"{name}={card[name][:60]}")
    if options and "crf" in card and _may_run(card["crf"]):
        options = ()  # a valid CRF is slow to compile, and not hostile
    content = ("{" + ", ".join(f'"{k}": {v}' for k, v in card.items()) + "}").encode()
    if rng.random() < 0.1:
        what, content = some_bytes(content, rng)
        options = ()
        said.append(what)
    elif rng.random() < 0.05:
        content = rng.choice((b"[" * 100_000, b'{"a":' * 100_000, b"", b"\xff", b"null", b"[]"))
        said.append(f"all of it {content[:10]!r}")
    return card_case("; ".join(said), content, *options)


def _merged(files: str, entry: str, rng: random.Random) -> str:
    if rng.random() < 0.3 or not files.startswith("{") or files == "{}":
        return entry
    return files[:-1] + ", " + entry[1:]


def _classes(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(
            (
                "[]",
                "[1, 2]",
                '["a", "b"]',
                "[null, null]",
                "[[], []]",
                "{}",
                "[" + '{"name": "a", "color": [0, 0, 0]}, ' * 299 + "1]",
            )
        )
    named = [f'{{"name": {rng.choice(VALUES)}, "color": {rng.choice(COLORS)}}}' for _ in "ab"]
    if rng.random() < 0.6:
        named = [f'{{"name": {rng.choice(VALUES)}, "color": [0, 0, 0]}}' for _ in "ab"]
    return f"[{', '.join(named)}]"


def _may_run(crf: str) -> bool:
    """Whether CRF parameters would be run, and not refused."""
    try:
        read_params("", json.loads(crf), mpp=MPP)
    except (HistoError, ValueError, TypeError, AttributeError):
        return False
    return True

"""An option that several commands have is the same words in all of them."""

from __future__ import annotations

import importlib
import re

import click
import pytest
from click.testing import CliRunner

from histostream.wsi.option_types import CountList, DeviceList, WordList
from tests.test_hints import COMMANDS, options

# One name, two meanings: a file of options (histo-infer) and a recipe (histo-train).
DIFFERENT = {"--config"}
CASES = [(command, name) for command in COMMANDS for name in options()[command]]


def shared() -> dict[str, list[click.Option]]:
    """Return the options that are declared more than once, by name."""
    found: dict[str, list[click.Option]] = {}
    for command in options().values():
        for name, parameters in command.items():
            found.setdefault(name, []).extend(p for p in parameters if isinstance(p, click.Option))
    return {name: several for name, several in found.items() if len(several) > 1 and name not in DIFFERENT}


def words(option: click.Option) -> tuple[str, ...]:
    """Return the words that an option takes, if they are listed."""
    return tuple(getattr(option.type, "choices", ()))


def kind(option: click.Option) -> str:
    """Return what an option's value is; a list is what its items are."""
    if option.is_flag:
        return "flag"
    if isinstance(option.type, CountList):
        return "integer"
    if isinstance(option.type, WordList | click.Choice):
        return "word"
    return "device" if isinstance(option.type, DeviceList) else option.type.name.removesuffix(" range")


def test_the_options_that_matter_are_shared() -> None:
    assert {"--tile", "--device", "--backend", "--precision", "--batch", "--threads", "--mpp", "--out"} <= set(shared())


def test_a_shared_option_takes_values_of_one_kind() -> None:
    kinds = {name: {kind(option) for option in several} for name, several in shared().items()}
    # A bundle's and a run's resolution are numbers; --out is a file or a folder, and always a path.
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


def test_a_shared_option_takes_the_same_words_in_the_same_order() -> None:
    for name, several in shared().items():
        lists = sorted((words(option) for option in several), key=len)
        known = lists[-1]
        for part in lists:
            if name == "--part" and part:  # tests are scored first, parameters are tuned on validation images
                assert set(part) <= set(known)
            else:
                assert part == tuple(word for word in known if word in part), name


@pytest.mark.parametrize(("command", "name"), CASES, ids=lambda value: str(value))
def test_a_default_that_is_told_is_told_in_one_form(command: str, name: str) -> None:
    for parameter in options()[command][name]:
        text = getattr(parameter, "help", None) or ""
        assert not re.search(r"\bdefault\b(?!:)", text), text
        assert "[default" not in text, text
        assert parameter.metavar != "LIST"


def test_an_older_name_is_taken_and_not_listed() -> None:
    main = importlib.import_module("histostream.runtime.cli").main
    values, _, _ = main.make_parser(click.Context(main)).parse_args(["--devices", "0,1", "slide.svs"])
    assert values["devices"] == "0,1"
    shown = CliRunner().invoke(main, ["--help"]).output
    assert "--device " in shown
    assert "--devices" not in shown

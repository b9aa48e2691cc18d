"""What a message advises exists: every option that it names, with the value that it names, is one that a command takes.

Messages are the string constants of the product's code, f-strings with their gaps, docstrings left out. A message of a
folder belongs to the folder's command, unless it names others; what lies in ``wsi`` serves all of them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.conftest import REPOSITORY

COMMANDS = {
    "histo-infer": ("histostream.runtime.cli", "main"),
    "histo-train": ("histostream.training.cli", "main"),
    "histo-export": ("histostream.export.cli", "main"),
    "histo-bench": ("histostream.benchmarks.cli", "main"),
    "histo-infer view": ("histostream.runtime.viewer.command", "view"),
    "histo-infer qupath": ("histostream.runtime.qupath.command", "qupath"),
    "histo-infer dsa": ("histostream.runtime.dsa.command", "dsa"),
}
# Messages of what a folder's code does for a command; that of another command names it.
OF_FOLDER = {
    "wsi": tuple(COMMANDS),
    "runtime": tuple(name for name in COMMANDS if name.startswith("histo-infer")),
    "training": ("histo-train",),
    "export": ("histo-export",),
    "benchmarks": ("histo-bench",),
}
# Options of other programs, by the word beside which they stand.
OTHER_PROGRAMS = {
    "--yes": "pip",
    "--editable": "pip",
    "--head": "ray",
    "--gpus": "docker",
    "--restrict": "nvrtc",
    "--std": "nvrtc",
    "--gpu-architecture": "nvrtc",
    "--nproc-per-node": "torchrun",
    "--standalone": "torchrun",
    "--porcelain": "git",
    "--saved-model": "tf2onnx",
    "--list": "slicer_cli_web",  # --list_cli
}
OPTION = re.compile(r"(?<![\w/{-])--[a-z][a-z-]*[a-z]")
DECLARED = re.compile(r"--[a-z-]+(/--[a-z-]+)?(=.*)?")
# An option and the word after it, which is a value if it is none of a sentence.
VALUE = re.compile(r"(?<![\w/{-])(--[a-z][a-z-]*[a-z])[ =]([\w.:+-][\w.,:+-]*)")
GAP = "\N{WHITE SQUARE}"  # what an f-string fills in
NUMBERS = ("integer", "integer range", "float", "memory_mib")
SENTENCE = {
    "also",
    "and",
    "counts",
    "exclude",
    "has",
    "is",
    "needs",
    "of",
    "or",
    "out",
    "says",
    "starts",
    "takes",
    "that",
    "to",
}


def options_of(command: click.Command) -> dict[str, list[click.Parameter]]:
    """Return the parameters of a command and its sub-commands, by every name that its parser takes."""
    found: dict[str, list[click.Parameter]] = {"--help": [], "--version": []}
    for parameter in command.params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            found.setdefault(name, []).append(parameter)
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            for name, parameters in options_of(inner).items():
                found.setdefault(name, []).extend(parameters)
    return found


def messages(source: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every string constant of a module that is no docstring."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(value) for value in node.values}
            yield node.lineno, "".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


@functools.cache
def hints() -> tuple[tuple[str, str, str], ...]:
    """Return the place, the folder and the text of every message that names an option.

    A constant that is an option alone declares it, or passes it to a program, and is no message.
    """
    found = []
    for folder in OF_FOLDER:
        for source in sorted((REPOSITORY / folder).rglob("*.py")):
            for line, text in messages(source):
                if OPTION.search(text) and not DECLARED.fullmatch(text):
                    found.append((f"{source.relative_to(REPOSITORY)}:{line}", folder, text))
    return tuple(found)


@functools.cache
def options() -> dict[str, dict[str, list[click.Parameter]]]:
    """Return what the parser of every command takes."""
    return {name: options_of(getattr(importlib.import_module(module), of)) for name, (module, of) in COMMANDS.items()}


def takers(folder: str, text: str) -> dict[str, list[click.Parameter]]:
    """Return the options that a message of a folder may name."""
    named = [name for name in COMMANDS if name in text]
    found: dict[str, list[click.Parameter]] = {}
    for command in (*OF_FOLDER[folder], *named):
        for name, parameters in options()[command].items():
            found.setdefault(name, []).extend(parameters)
    return found


def test_messages_with_options_are_found() -> None:
    assert len(hints()) > 100
    assert any("--max-memory" in text for _, _, text in hints())


@pytest.mark.parametrize("folder", OF_FOLDER)
def test_every_option_that_a_message_names_is_one_of_the_command_that_prints_it(folder: str) -> None:
    unknown = [
        f"{place}: {option} in {text!r}"
        for place, of, text in hints()
        if of == folder
        for option in OPTION.findall(text)
        if option not in OTHER_PROGRAMS and option not in takers(folder, text)
    ]
    assert not unknown, "\n".join(unknown)


def refusal(option: click.Option, value: str) -> str:
    """Return why the parser does not take a value of an option; nothing if it takes it."""
    context = click.Context(click.Command("test"))
    try:
        converted = option.type_cast_value(context, [value] if option.multiple else value)
        if option.callback is not None:
            option.callback(context, option, converted)
    except click.ClickException as error:
        return error.message
    return ""


def test_every_value_that_a_message_names_is_one_that_its_option_takes() -> None:
    refused, tried = [], 0
    for place, folder, text in hints():
        for option, value in VALUE.findall(text):
            word = value.rstrip(".,:;")
            valued = [p for p in takers(folder, text).get(option, []) if isinstance(p, click.Option) and not p.is_flag]
            numeric = any(parameter.type.name in NUMBERS for parameter in valued)
            if option in OTHER_PROGRAMS or word in SENTENCE or not valued or (numeric and word.isalpha()):
                continue
            tried += 1
            errors = [error for parameter in valued if (error := refusal(parameter, word))]
            if len(errors) == len(valued):
                refused.append(f"{place}: {option} {word} in {text!r}: {errors[0]}")
    assert tried > 30
    assert not refused, "\n".join(refused)


def test_every_setting_of_a_recipe_that_a_message_names_exists() -> None:
    from histostream.training.schedule import Schedule

    fields = {field.name for field in dataclasses.fields(Schedule)}
    named = {
        (f"{source.name}:{line}", name)
        for source in (REPOSITORY / "training").rglob("*.py")
        for line, text in messages(source)
        for name in re.findall(r"\bschedule\.([a-z_]+)", text)
    }
    assert named
    assert {name for _, name in named} <= fields, sorted(named)

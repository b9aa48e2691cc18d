"""What these pages need beyond Sphinx: the commands' help, names in docstrings."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import click
from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.directives.other import TocTree
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.util.docstrings import prepare_docstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).parents[2]
ARRAY = re.compile(r"~?numpy\.ndarray\[tuple\[~?typing\.Any, \.\.\.\], ~?numpy\.dtype\[([^\]]*)\]\]")
SHORT = r"~numpy.typing.NDArray[\1]"
HELP_COLUMNS = 84  # of text in a page's block


class PagesThere(TocTree):
    """A toctree that leaves out pages which this checkout, or this build, does not have."""

    content: StringList

    def run(self) -> list[nodes.Node]:
        """Return the toctree of the others."""
        there = [name for name in self.content if name in self.env.found_docs]
        self.content = StringList(there, self.env.docname)
        return super().run()


class CommandHelp(SphinxDirective):
    """``{command-help} histo-infer histostream.runtime.cli``: what ``--help`` prints."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        """Return the help of the command, and of each command below it."""
        name, module = self.arguments
        found = importlib.import_module(module)
        self.env.note_dependency(str(found.__file__))
        return _helps(found.main, name)


def _helps(command: click.Command, name: str) -> list[nodes.Node]:
    context = click.Context(command, info_name=name, terminal_width=HELP_COLUMNS, **command.context_settings)
    text = command.get_help(context)
    out: list[nodes.Node] = [nodes.literal_block(text, text, language="text")]
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            inner = command.get_command(context, below)
            assert inner is not None
            full = f"{name} {below}"
            out += [nodes.rubric("", "", nodes.literal("", full)), *_helps(inner, full)]
    return out


def keep_the_first_sentence(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Undo Napoleon's work on a property: it takes what stands before a colon for its type."""
    if what == "property" and "----" not in (text := getattr(obj, "__doc__", None) or ""):
        lines[:] = prepare_docstring(text)


def write_types_as_the_source_does(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    args: str | None,
    returns: str | None,
) -> tuple[str | None, str | None] | None:
    """Write NDArray[uint8], not what it is short for; and nothing for what a Protocol takes."""
    if args is None:
        return None
    if args == "(*args, **kwargs)" and getattr(obj, "_is_protocol", False):
        return "", None
    args = args.replace("<factory>", "...")
    return ARRAY.sub(SHORT, args), returns and ARRAY.sub(SHORT, returns)


def tidy(app: Sphinx, doctree: nodes.document) -> None:
    """Leave out that a class is an object, and write dashes as dashes, which smartquotes did."""
    for paragraph in list(doctree.findall(nodes.paragraph)):
        if paragraph.astext() == "Bases: object":
            paragraph.parent.remove(paragraph)
    for text in list(doctree.findall(nodes.Text)):
        if text.startswith(" -- "):
            text.parent.replace(text, nodes.Text(f" \N{EN DASH} {text.removeprefix(' -- ')}"))


def name_as_the_module_does(app: Sphinx, doctree: nodes.document) -> None:
    """Make a name in a docstring mean what it means in the code of its module."""
    for node in doctree.findall(addnodes.pending_xref):
        module = sys.modules.get(node.get("py:module") or "")
        if node.get("refdomain") == "py" and module is not None:
            found = getattr(module, node["reftarget"], None)
            home, name = getattr(found, "__module__", ""), getattr(found, "__qualname__", "")
            if str(home).startswith("histostream."):
                node["reftarget"] = f"{home}.{name}"


def find_by_last_part(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, shown: nodes.TextElement
) -> nodes.Element | None:
    """Resolve a name that a docstring uses without its module, where just one object has it."""
    if node.get("refdomain") != "py":
        return None
    domain: PythonDomain = env.domains.python_domain
    found = domain.find_obj(env, "", "", node["reftarget"], None, searchmode=1)
    if len({entry.node_id for _, entry in found}) != 1:
        return None
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, shown, name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("toctree-of-pages-there", PagesThere)
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-signature", write_types_as_the_source_does)
    after_napoleon = 600
    app.connect("autodoc-process-docstring", keep_the_first_sentence, after_napoleon)
    app.connect("doctree-read", tidy)
    app.connect("doctree-read", name_as_the_module_does)
    app.connect("missing-reference", find_by_last_part)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

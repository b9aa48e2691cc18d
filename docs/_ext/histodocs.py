"""Sphinx extension: the help of the commands, and references by short names in docstrings."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import click
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.util.docstrings import prepare_docstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

ARRAY = re.compile(r"~?numpy\.ndarray\[tuple\[~?typing\.Any, \.\.\.\], ~?numpy\.dtype\[([^\]]*)\]\]")
SHORT = r"~numpy.typing.NDArray[\1]"
HELP_COLUMNS = 84  # width of a text block on a page


class CommandHelp(SphinxDirective):
    """Directive ``{command-help} histostream.runtime.cli:main histo-infer``: the output of ``--help``."""

    required_arguments = 2
    final_argument_whitespace = True  # the name of a command can have two words

    def run(self) -> list[nodes.Node]:
        """Return the help of the command and of its sub-commands."""
        location, name = self.arguments
        module, _, attribute = location.partition(":")
        cli = importlib.import_module(module)
        self.env.note_dependency(str(cli.__file__))
        return _help_nodes(getattr(cli, attribute), name)


def _help_nodes(command: click.Command, name: str) -> list[nodes.Node]:
    context = click.Context(command, info_name=name, terminal_width=HELP_COLUMNS, **command.context_settings)
    text = command.get_help(context)
    result: list[nodes.Node] = [nodes.literal_block(text, text, language="text")]
    if isinstance(command, click.Group):
        for name_below, sub_command in command.commands.items():
            full = f"{name} {name_below}"
            result += [nodes.rubric("", "", nodes.literal("", full)), *_help_nodes(sub_command, full)]
    return result


def restore_property_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Restore the docstring of a property: Napoleon takes the text before a colon for its type."""
    if what == "property" and "----" not in (text := getattr(obj, "__doc__", None) or ""):
        lines[:] = prepare_docstring(text)


def shorten_types(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    args: str | None,
    returns: str | None,
) -> tuple[str | None, str | None] | None:
    """Write ``NDArray[uint8]`` as in the source, and no arguments for a Protocol."""
    if args is None:
        return None
    if args == "(*args, **kwargs)" and getattr(obj, "_is_protocol", False):
        return "", None
    args = args.replace("<factory>", "...")
    return ARRAY.sub(SHORT, args), returns and ARRAY.sub(SHORT, returns)


def clean_text(app: Sphinx, doctree: nodes.document) -> None:
    """Remove "Bases: object", and replace " -- " by a dash, because smartquotes is off."""
    for paragraph in list(doctree.findall(nodes.paragraph)):
        if paragraph.astext() == "Bases: object":
            paragraph.parent.remove(paragraph)
    for text in list(doctree.findall(nodes.Text)):
        if text.startswith(" -- "):
            text.parent.replace(text, nodes.Text(f" \N{EN DASH} {text.removeprefix(' -- ')}"))


def resolve_short_names(app: Sphinx, doctree: nodes.document) -> None:
    """Resolve a name in a docstring as the code of its module does."""
    for node in doctree.findall(addnodes.pending_xref):
        module = sys.modules.get(node.get("py:module") or "")
        if node.get("refdomain") == "py" and module is not None:
            target = getattr(module, node["reftarget"], None)
            origin, name = getattr(target, "__module__", ""), getattr(target, "__qualname__", "")
            if str(origin).startswith("histostream."):
                node["reftarget"] = f"{origin}.{name}"


def find_unique_name(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.Element | None:
    """Resolve a name without its module if exactly one object has this name."""
    if node.get("refdomain") != "py":
        return None
    domain: PythonDomain = env.domains.python_domain
    matches = domain.find_obj(env, "", "", node["reftarget"], None, searchmode=1)
    if len({entry.node_id for _, entry in matches}) != 1:
        return None
    name, entry = matches[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-signature", shorten_types)
    after_napoleon = 600
    app.connect("autodoc-process-docstring", restore_property_docstring, after_napoleon)
    app.connect("doctree-read", clean_text)
    app.connect("doctree-read", resolve_short_names)
    app.connect("missing-reference", find_unique_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Every message that HistoStream can end with, read from its source: what was printed can be found.

Nothing is imported or run. A message is the text that an exception of ours, or of click's, is made
with; what stands in braces in an f-string becomes a placeholder, named as in the code.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

AREAS = {
    "wsi": "Slides, regions and results",
    "runtime": "Models, devices and options",
    "export": "Export",
    "training": "Training",
    "benchmarks": "Measuring",
}
USAGE = {"BadParameter", "UsageError", "ClickException"}  # click's, for what is typed
SAID = {"fail": 1, "_fail": 0, "Outcome": 1}  # calls that show a text: which argument it is
WARNINGS = {"log.warning", "_log.warning"}
# Recipes are checked by their dataclasses; `histo-train` prints what those say.
RECIPES = re.compile(r"training/(methods/.*|schedule|augment)\.py")
PLACEHOLDER = re.compile(r"⟨[^⟩]*⟩")
MOST_CHOICES = 4  # texts that stand for one placeholder
QUOTED = {"error", "reason", "first_line", "_last_line", "strerror", "said", "joined", "refused"}


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """A text that a user may see.

    Attributes
    ----------
    area
        Folder of the code that says it, one of `AREAS`.
    kind
        Name of the exception, "usage" for click's, "warning", or "text" for what is only printed.
    text
        Placeholders are ``⟨name⟩``: braces may be a part of what is printed.
    source
        File and line, as ``wsi/reader.py:138``.
    """

    area: str
    kind: str
    text: str
    source: str = field(compare=False)

    def matches(self, printed: str) -> bool:
        """Whether it may have been printed as ``printed``; parts before and after do not matter."""
        parts = PLACEHOLDER.split(self.text)
        return re.search(".*?".join(map(re.escape, parts)), printed, re.DOTALL) is not None


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All messages.

    Attributes
    ----------
    messages
        Sorted, each text once in an area.
    forwarded
        ``file: expression`` where an exception is made with a text that is not written there: that
        of another message, or of a library.
    classes
        First line of the docstring of each exception, by its name.
    """

    messages: tuple[Message, ...]
    forwarded: tuple[str, ...]
    classes: Mapping[str, str]


@functools.cache
def read_catalogue(root: Path) -> Catalogue:
    """Read all messages of a checkout.

    Parameters
    ----------
    root
        The folder that holds the folders of `AREAS`.
    """
    trees = {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for area in AREAS
        for path in sorted((root / area).rglob("*.py"))
    }
    classes = _exceptions(trees.values())
    constants = _constants(trees.values())
    found: dict[Message, None] = {}
    forwarded: dict[str, None] = {}
    for name, tree in trees.items():
        area = name.split("/")[0]
        for kind, expression, scope in _told(name, tree, set(classes)):
            texts = list(_Texts(tree, scope, constants).of(expression))
            if not texts:
                forwarded[f"{name}: {ast.unparse(expression)}"] = None
            for text in filter(None, texts):
                found.setdefault(Message(area, kind, text, f"{name}:{expression.lineno}"))
    return Catalogue(tuple(sorted(found)), tuple(forwarded), classes)


def _exceptions(trees: Iterable[ast.Module]) -> dict[str, str]:
    """Return the names of all exceptions of the source, and what they are."""
    bases: dict[str, set[str]] = {}
    docs: dict[str, str] = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base) for base in node.bases}
                docs[node.name] = (ast.get_docstring(node) or "").split("\n\n")[0]
    known = {"Exception", "ValueError"}
    while more := {name for name, of in bases.items() if of & known} - known:
        known |= more
    return {name: docs[name] for name in sorted(known & set(docs))}


def _constants(trees: Iterable[ast.Module]) -> dict[str, str]:
    """Return the texts, numbers and lists of names that modules define; not what is not unique."""
    found: dict[str, set[str]] = {}
    for tree in trees:
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.setdefault(node.targets[0].id, set()).add(_plain(node.value))
    return {name: text for name, (text, *more) in found.items() if text and not more}


def _plain(value: ast.expr) -> str:
    """Return what a message shows of a constant; nothing if it is no plain value."""
    try:
        plain = ast.literal_eval(value)
    except ValueError:
        return ""
    if isinstance(plain, (str, int, float)):
        return str(plain)
    if isinstance(plain, (tuple, list, dict)) and all(isinstance(name, str) for name in plain):
        return ", ".join(plain)
    return ""


def _told(
    name: str, tree: ast.Module, classes: set[str]
) -> Iterator[tuple[str, ast.expr, ast.AST]]:
    """Yield (kind, expression of the text, function that it stands in)."""
    recipe = RECIPES.fullmatch(name)
    for scope, node in _in_functions(tree, tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        if last in classes or (recipe and last == "ValueError"):
            yield last, node.args[0], scope
        elif last in USAGE:
            yield "usage", node.args[0], scope
        elif called in WARNINGS:
            yield "warning", _filled_in(node), scope
        elif called in SAID and len(node.args) > SAID[called]:
            yield "text", node.args[SAID[called]], scope
        elif called == "super().__init__" and (own := _class_of(tree, scope)) in classes:
            yield own, node.args[0], scope


def _in_functions(node: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield every node with the innermost function that it stands in."""
    for child in ast.iter_child_nodes(node):
        yield scope, child
        inner = child if isinstance(child, ast.FunctionDef) else scope
        yield from _in_functions(child, inner)


def _class_of(tree: ast.Module, function: ast.AST) -> str:
    """Return the name of the class that a method belongs to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and function in node.body:
            return node.name
    return ""


def _filled_in(call: ast.Call) -> ast.expr:
    """Return the text of a warning as an f-string: logging fills it in later."""
    text, *values = call.args
    if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
        return text
    left = iter(values)
    parts: list[ast.expr] = []
    for part in re.split(r"(%[sdg]|%\.\d[fg])", text.value):
        if part.startswith("%"):
            parts.append(ast.FormattedValue(next(left), -1, None))
        else:
            parts.append(ast.Constant(part))
    return ast.copy_location(ast.JoinedStr(parts), text)


@dataclass(frozen=True, slots=True)
class _Texts:
    """Finds what an expression may say, where it stands."""

    tree: ast.Module
    scope: ast.AST
    constants: Mapping[str, str]

    def of(self, value: ast.expr, depth: int = 0) -> Iterator[str]:
        """Yield each text that the expression may be; nothing if none is written in the source."""
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value
        elif isinstance(value, ast.JoinedStr):
            yield from self._joined(value.values, depth)
        elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            for left in self.of(value.left, depth) or ():
                for right in self.of(value.right, depth) or ():
                    yield left + right
        elif isinstance(value, ast.IfExp):
            yield from self.of(value.body, depth)
            yield from self.of(value.orelse, depth)
        elif isinstance(value, ast.Name) and depth < 2:
            for given in self._given(value.id):
                yield from self.of(given, depth + 1)
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and depth < 2:
            for node in self.tree.body:
                if isinstance(node, ast.FunctionDef) and node.name == value.func.id:
                    inner = _Texts(self.tree, node, self.constants)
                    for part in ast.walk(node):
                        if isinstance(part, ast.Return) and part.value is not None:
                            yield from inner.of(part.value, depth + 1)

    def _joined(self, parts: list[ast.expr], depth: int) -> Iterator[str]:
        texts = [""]
        for part in parts:
            if isinstance(part, ast.FormattedValue):
                choices = self._filled(part.value, depth)
            else:
                assert isinstance(part, ast.Constant)
                choices = [str(part.value)]
            texts = [text + choice for text in texts for choice in choices]
        if any(re.search(r"[a-z]{2}", PLACEHOLDER.sub("", text)) for text in texts):
            yield from texts

    def _given(self, name: str) -> list[ast.expr]:
        """Return all that the function assigns to a name."""
        nodes = (node for node in ast.walk(self.scope) if isinstance(node, ast.Assign))
        return [given for node in nodes if (given := _assigned(node, name)) is not None]

    def _parameters(self) -> set[str]:
        """Return the names that the function gets from its caller."""
        if not isinstance(self.scope, ast.FunctionDef):
            return set()
        given = self.scope.args
        return {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)}

    def _filled(self, value: ast.expr, depth: int) -> list[str]:
        """Return what may stand for a placeholder: constants as they are, else a name."""
        if isinstance(value, ast.Call) and ast.unparse(value.func).endswith(".join"):
            value = value.args[0]
        if isinstance(value, ast.Name) and value.id in self.constants:
            return [self.constants[value.id]]
        if isinstance(value, ast.IfExp):
            sides = [self._filled(side, depth) for side in (value.body, value.orelse)]
            return list(dict.fromkeys([*sides[0], *sides[1]]))
        if isinstance(value, ast.Constant):
            return [str(value.value)]
        if isinstance(value, ast.Subscript) and (texts := _entries(self.tree, value)):
            return texts
        texts = []
        if isinstance(value, ast.Name) and depth < 2 and value.id not in self._parameters():
            said = [list(self.of(given, depth + 1)) for given in self._given(value.id)]
            texts = [text for each in said for text in each] if all(said) else []
        return list(dict.fromkeys(texts))[:MOST_CHOICES] or [f"⟨{_named(value)}⟩"]


def _entries(tree: ast.Module, entry: ast.Subscript) -> list[str]:
    """Return the texts that an entry of one of the module's dictionaries may be."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(entry.value, ast.Name):
            table = _assigned(node, entry.value.id)
            if isinstance(table, ast.Dict):
                found = {_plain(key): _plain(text) for key, text in _pairs(table)}
                wanted = found.get(_plain(entry.slice))
                texts = [wanted] if wanted else list(dict.fromkeys(found.values()))
                return texts if all(texts) else []
    return []


def _pairs(table: ast.Dict) -> Iterator[tuple[ast.expr, ast.expr]]:
    for key, value in zip(table.keys, table.values, strict=True):
        if key is not None:
            yield key, value


def _assigned(node: ast.Assign, name: str) -> ast.expr | None:
    """Return what an assignment gives a name, also one of several."""
    for target in node.targets:
        if isinstance(target, ast.Name) and target.id == name:
            return node.value
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for left, right in zip(target.elts, node.value.elts, strict=False):
                if isinstance(left, ast.Name) and left.id == name:
                    return right
    return None


def _named(value: ast.expr) -> str:
    """Name a placeholder after what the code calls it."""
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func).rpartition(".")[2]
        if called in QUOTED:
            return "reason"
        if called == "len":
            return "number"
        if called in {"install_command", "engine_command", "either_engine"}:
            return "pip install ..."
        if called == "getattr":
            return "value"
        return _named(value.args[0]) if value.args else called.strip("_")
    if isinstance(value, ast.Attribute):
        return "reason" if value.attr in QUOTED else value.attr.strip("_")
    if isinstance(value, ast.Name):
        return "reason" if value.id in QUOTED else value.id
    if isinstance(value, ast.Subscript):
        return _named(value.value)
    if isinstance(value, (ast.BinOp, ast.BoolOp)):
        left = value.left if isinstance(value, ast.BinOp) else value.values[0]
        return _named(left)
    if isinstance(value, (ast.GeneratorExp, ast.ListComp)):
        return _named(value.generators[0].iter)
    return "value"

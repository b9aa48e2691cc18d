"""Pages: templates in which everything is text until it is said to be more.

Names of slides, classes and files come from anywhere. They are escaped by Jinja2, after control
characters, characters that change the direction of writing, and bytes that are no text were
written as Python's escapes.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup

from histostream.runtime.report.json_view import duration, figure, percent, size
from histostream.wsi.errors import printable

if TYPE_CHECKING:
    import jinja2


def render(template: str, **said: Any) -> str:
    """Return a page as HTML.

    Parameters
    ----------
    template
        Name of a file of this package.
    said
        What the template names; it may leave nothing out.
    """
    style = Markup(_file("style.css"))
    return _templates().get_template(template).render(style=style, **said)


def link(*names: str) -> str:
    """Return a relative link to a file, whatever bytes its name has."""
    return "./" + "/".join(quote(name, safe="", errors="surrogateescape") for name in names)


@functools.cache
def _templates() -> jinja2.Environment:
    import jinja2  # 37 ms of start-up, and needed only when a slide is done

    found = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"figure": figure, "percent": percent, "duration": duration, "size": size}
    found.globals["link"] = link
    return found


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

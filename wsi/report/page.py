"""HTML pages from Jinja2 templates, in which every text is escaped.

Names of slides, classes and files may hold anything. Control characters, characters that change the
direction of writing, and bytes that are not text are written as Python's escapes, then Jinja2 escapes HTML.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup

from histostream.wsi.errors import printable
from histostream.wsi.report.figures import duration, figure, percent, size
from histostream.wsi.report.json_view import JsonView

if TYPE_CHECKING:
    import jinja2

OWN = "histostream.wsi.report"
SHARED = ("page.html", "parts.html")


def render(package: str, template: str, **values: Any) -> str:
    """Return a page as HTML.

    Parameters
    ----------
    package, template
        File name of a template, and the package that has it; ``page.html`` and ``parts.html`` of this
        package can be used in it.
    values
        Everything that the template names; a missing value is an error.
    """
    style = Markup(read_file(OWN, "style.css"))
    return _templates(package).get_template(template).render(style=style, **values)


def read_file(package: str, name: str) -> str:
    """Return the text of a file of a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def css_color(color: Sequence[int]) -> str:
    """Return red, green, blue of 0 to 255 as a colour in CSS; anything else as gray."""
    values = [min(255, max(0, value)) for value in color]
    return f"rgb({values[0]} {values[1]} {values[2]})" if len(values) == 3 else "gray"


def link(*names: str) -> str:
    """Return a relative link to a file; its name may hold any bytes."""
    return "./" + "/".join(quote(name, safe="", errors="surrogateescape") for name in names)


@functools.cache
def _templates(package: str) -> jinja2.Environment:
    import jinja2  # takes 37 ms, and is needed only when a slide is finished

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: read_file(OWN if name in SHARED else package, name)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "percent": percent, "duration": duration, "size": size}
    environment.filters["css"] = css_color
    environment.filters["shown"] = lambda value: JsonView(value).shown()
    environment.globals["link"] = link
    return environment


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

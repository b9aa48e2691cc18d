"""Configuration of Sphinx: the pages of this folder and the API reference from the docstrings."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import histostream.export
import histostream.runtime
import histostream.training
import histostream.wsi

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "HistoStream"
author = "the HistoStream authors"
copyright = author  # Sphinx's name for it
release = version = metadata.version("histostream")

extensions = [
    "myst_nb",  # Markdown and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "histodocs",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_ext", "_templates"]

# Pages are Markdown that a git host shows too: headings get the same anchors as there.
myst_heading_anchors = 4
smartquotes = False  # keeps the dashes of --options

nb_execution_mode = "off"  # the notebook is shown with its stored output

# In docstrings a name in single backticks is a reference, and types are in the signature.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "ignore-module-all": True,  # each object is documented where it is defined
}
autosummary_generate = True
# The page of a package with public names has a table of them, with links to their definitions.
autosummary_context = {
    "public": {
        package.__name__: [
            f"~{getattr(package, name).__module__.removeprefix(package.__name__ + '.')}.{name}"
            for name in package.__all__
            if hasattr(getattr(package, name), "__module__")
        ]
        for package in (histostream.wsi, histostream.runtime, histostream.training, histostream.export)
    }
}
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False
# "Returns" is text with shapes and units, without a type; one line of "Attributes" can have several names.
napoleon_custom_sections = ["Returns", "Yields", ("Attributes", "params_style")]
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# `make docs` reports references to names that do not exist. Names of other projects are ignored, because
# their inventories would have to be downloaded.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!histostream\b).*\..*"),
    (r"py:obj", r"[A-Z][A-Z0-9_]+"),  # constants have comments instead of docstrings
    (r"py:class", r"Tensor|Axes|.*\[.*|.*\.(AnySink|Item|Label|Record|Result|Score|T|_Outputs)"),  # aliases
]

# `-t pages` leaves out the API reference, which takes minutes. A test builds the other pages.
if globals()["tags"].has("pages"):  # `tags` is defined by Sphinx
    exclude_patterns += ["api.md", "_api"]
    suppress_warnings = ["toc.not_readable"]

html_theme = "furo"
html_title = f"HistoStream {release}"
html_static_path = ["_static"]
html_css_files = ["histostream.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_copy_empty_lines = False

linkcheck_anchors = False
linkcheck_timeout = 20

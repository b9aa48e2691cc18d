"""How Sphinx builds the pages of this folder, and the reference of the code's docstrings."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import histostream.runtime
import histostream.wsi

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "HistoStream"
author = "the HistoStream authors"
copyright = author  # Sphinx's name for it
release = version = metadata.version("histostream")

extensions = [
    # Notebooks are shown as they were run.
    "myst_nb" if any(HERE.glob("*.ipynb")) else "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "histodocs",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_ext", "_templates"]

# Pages are plain Markdown that a git host shows too: headings get the anchors that it gives them.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
smartquotes = False  # --options stay what they are

nb_execution_mode = "off"

# Docstrings: a name in single backticks is a reference, types are in the signature.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "ignore-module-all": True,  # each thing where it is defined
}
autosummary_generate = True
# A package that re-exports its nouns has a table of them, which leads to where they are defined.
autosummary_context = {
    "public": {
        package.__name__: [
            f"~{getattr(package, name).__module__.removeprefix(package.__name__ + '.')}.{name}"
            for name in package.__all__
            if hasattr(getattr(package, name), "__module__")
        ]
        for package in (histostream.wsi, histostream.runtime)
    }
}
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False
# Returns is prose with shapes and units, no type; a line of attributes may name several.
napoleon_custom_sections = ["Returns", "Yields", ("Attributes", "params_style")]
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# `make docs` is nitpicky: what a docstring refers to must exist. Other projects' names are theirs:
# their inventories are on the network, which a build does not need.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!histostream\b).*\..*"),
    (r"py:obj", r"[A-Z][A-Z0-9_]+"),  # constants: a comment beside them says what they are
    (r"py:class", r"Tensor|Axes|.*\[.*|.*\.(AnySink|Label|Result|Score)"),  # aliases
]

# -t pages: without the reference, which takes a minute; a test builds the rest.
if globals()["tags"].has("pages"):  # a name that Sphinx gives this file
    exclude_patterns += ["api.md", "_api"]

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

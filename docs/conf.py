"""Sphinx's settings: the Markdown pages beside this file, and the reference from the docstrings. `make docs` builds it.

What is built needs no network: no fonts, scripts or images from elsewhere. The pages are plain Markdown, so that they
read as well where nothing is built; what only a site needs, its tables of contents, is added here as they are read.
"""

import re
from importlib.metadata import version as installed
from typing import Any

project = "Secateur"
version = release = installed("secateur")
html_title = "Secateur"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
default_role = "code"  # docstrings put single backticks around code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"exclude-members": "model_config"}  # pydantic's, of no use to a reader
add_module_names = False
suppress_warnings = ["misc.highlighting_failure"]

TREES = {
    "index": (
        "Contents",
        [
            "first_compression",
            "result_card",
            "comparing",
            "own_data",
            "tasks",
            "which_method",
            "add_a_method",
            "decisions",
            "methods/index",
            "api",
        ],
    ),
    "methods/index": ("Methods", ["*"]),
}  # fmt: skip


def add_tree(app: Any, name: str, source: list[str]) -> None:
    if name in TREES:
        caption, pages = TREES[name]
        options = f":caption: {caption}\n:hidden:\n" + (":glob:\n" if "*" in pages else "")
        source[0] += "\n```{toctree}\n" + options + "\n" + "\n".join(pages) + "\n```\n"


def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: |x|, * and names_ mean themselves, where reStructuredText has other uses for them."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"([*|\\])", r"\\\1", re.sub(r"(?<=\w)_(?!\w)", r"\\_", part)) for part in parts[::2]]
        lines[number] = "".join(parts)


def setup(app: Any) -> None:
    app.connect("source-read", add_tree)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before sections are read

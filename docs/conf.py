"""Sphinx configuration: MyST pages, pages made from code and cards, and an API reference made from the docstrings."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cells import write_ipynbs
from generate import write_pages

write_pages(Path(__file__).parent / "generated")
write_ipynbs(Path(__file__).parent / "generated/notebooks")

project = "rlkit2"
author = "rlkit2 developers"
version = release = installed_version("rlkit2")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "cells",
    "formulas",
    "links",
]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "README.md"]
html_theme = "furo"
html_math_renderer = "drawn"
html_title = f"rlkit2 {version}"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_use_ivar = True


def escape_bars(app, what, name, obj, options, lines):
    """Absolute values and conditional probabilities in docstrings are no substitutions."""
    lines[:] = [line.replace("|", "\\|") for line in lines]


def setup(app):
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", escape_bars)

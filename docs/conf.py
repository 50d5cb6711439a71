"""Sphinx configuration: MyST pages and an API reference made from the docstrings."""

from importlib.metadata import version as installed_version

project = "rlkit2"
author = "rlkit2 developers"
version = release = installed_version("rlkit2")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
exclude_patterns = ["_build"]
html_theme = "furo"
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

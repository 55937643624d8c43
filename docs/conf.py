"""Sphinx reads this file; `make docs` builds the site from the pages of this folder and the public docstrings."""

from megatron_mtp import __version__
from megatron_mtp.observe.logs import silence_noise

silence_noise()  # autodoc imports torch and Megatron-Core

project = "megatron-mtp"
author = "the megatron-mtp authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["site"]

html_theme = "furo"
html_title = f"megatron-mtp {release}"

# Anchors of headings as GitHub makes them, so that one link works on both.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_use_type_comments = False
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = False

"""Sphinx settings: MyST pages, numpydoc docstrings, the furo theme."""

import kvcompress

project = "kvcompress"
author = "The kvcompress developers"
project_copyright = f"2026, {author}"
release = version = kvcompress.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

default_role = "literal"  # `name` in a docstring is code
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes, dtypes, units
napoleon_google_docstring = False
napoleon_use_param = False  # types are prose, not names to link
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"{project} {release}"

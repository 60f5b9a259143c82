"""How the site is built: `make docs`, without network. docs/decisions/0010-site.md says why it is Sphinx."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "emsplat"
author = "The emsplat developers"
copyright = "2026, The emsplat developers. BSD 3-Clause licence"
try:
    release = version("emsplat")
except PackageNotFoundError:  # nothing has to be installed to build the pages
    release = ""
version = release.split("+")[0]

extensions = ["myst_parser", "api", "mathml", "notebook"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
smartquotes = False  # "--option" is no dash
nitpicky = True  # the functions that docs/mathematics.md names are there
nitpick_ignore_regex = [("py:(class|data|exc)", ".*")]  # types of other packages, in signatures
myst_heading_anchors = 4  # links to headings are checked, and so are all others within the site
exclude_patterns = ["_ext"]
html_theme = "furo"
html_title = f"emsplat {version}".strip()
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False

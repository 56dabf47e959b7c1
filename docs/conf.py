"""The site: which pages there are, and how docstrings are read.

The source folder is the root of the repository, so that the links between the pages and the README, the studies and the examples are the
same on the site and in the repository. `make docs` builds it; it needs no network, and no page asks for anything from outside.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from pygments.lexers.shell import BashLexer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

project = "bnnp"
author = "The bnnp contributors"
copyright = "The bnnp contributors"
version = release = re.findall(r'__version__ = "(.+)"', (ROOT / "src/bnnp/__init__.py").read_text("utf-8"))[0]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md", "experiments/*/README.md", "experiments/*/results/*.md"]
exclude_patterns = ["docs/_build", ".*", "**/.*", "src", "tests", "benchmarks", "build", "dist", "demo-output", "runs", "shared"]
suppress_warnings = ["toc.not_included", "myst.header"]  # tables of results, which the studies link to

# Pages link to headings of other pages as repositories show them.
myst_heading_anchors = 4
myst_links_external_new_tab = False

# A page is one column of text; signatures are long, so they are broken.
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False
default_role = "code"

html_theme = "furo"
html_title = f"bnnp {version}"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options: dict[str, Any] = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"

SECTION = re.compile(r"^\s*(Arguments|Attributes|Returns|Raises|References|Example|Examples|Yields):\s*$")
FIELD = re.compile(r"^(\s+\w+: )")


def escape(lines: list[str]) -> list[str]:
    """Return a docstring whose text is plain, but for `code` and **bold**: what reStructuredText would take for markup is escaped."""
    found, doctest, section = [], False, ""
    for line in lines:
        if match := SECTION.match(line):
            section = match[1]
        doctest = line.lstrip().startswith(">>>") or (doctest and bool(line.strip()))
        if doctest:
            found.append(line)
            continue
        name = FIELD.match(line) if section in ("Arguments", "Attributes", "Raises") else None
        start = name[1] if name else ""
        parts = re.split(r"(`[^`]+`|\*\*[^*\s][^*]*\*\*)", line[len(start) :])
        found.append(start + "".join(part if i % 2 else re.sub(r"([\\*|]|_(?!\w))", r"\\\1", part) for i, part in enumerate(parts)))
    return found


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape a docstring before its sections are read."""
    lines[:] = escape(lines)


def signature(app: Any, what: str, name: str, obj: Any, options: Any, given: str | None, returned: str | None) -> Any:
    """Show a default that is made anew each time in a way that can be read as Python, so that the rest is shown as it should be."""
    return (given.replace("<factory>", "..."), returned) if given else None


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the methods that scikit-learn adds to its estimators, whose pages are elsewhere."""
    return True if re.fullmatch(r"set_\w+_request", name) else None


def front_door(app: Any, exception: Exception | None) -> None:
    """Leave an index.html at the top of the site that leads to its first page."""
    if exception is None and app.builder.format == "html":
        page = '<!doctype html><meta charset="utf-8"><title>bnnp</title><meta http-equiv="refresh" content="0; url=docs/index.html">'
        (Path(app.outdir) / "index.html").write_text(page + '<a href="docs/index.html">bnnp</a>\n', "utf-8")


def setup(app: Any) -> None:
    """Register what is done to docstrings and to the finished site."""
    app.connect("autodoc-process-docstring", plain, priority=400)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
    app.connect("build-finished", front_door)
    app.add_lexer("console", BashLexer)  # commands stand without a prompt, so that they can be copied

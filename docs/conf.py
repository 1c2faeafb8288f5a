"""Sphinx configuration: `python -m sphinx -W --keep-going docs docs/_build`."""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import figures  # noqa: E402

import granet_jax  # noqa: E402

project = "granet_jax"
author = "The granet_jax developers"
release = granet_jax.__version__
html_title = f"granet_jax {release}"
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings put code in single backquotes.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Without this, napoleon takes the text before a colon for a type.
napoleon_custom_sections = ["Returns"]

# Browsers draw MathML themselves, without a script from the network.
html_math_renderer = "mathml"


def setup(app: Sphinx) -> None:
    """Draw the figures at every build, so that they cannot become stale."""
    app.connect("builder-inited", lambda _: figures.draw_all(HERE / "_generated"))
    app.connect("autodoc-skip-member", _skip_member)
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))


def _skip_member(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Skip fields of named tuples, which their class already lists as attributes."""
    is_field = (getattr(obj, "__doc__", None) or "").startswith("Alias for field")
    return True if is_field else None


def _visit_inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _visit_block(writer: Any, node: nodes.math_block) -> None:
    math = tex2mathml(node.astext(), as_block=True)
    writer.body.append(f'<div class="math">{math}</div>')
    raise nodes.SkipNode

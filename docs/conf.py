"""How Sphinx builds the site: `make docs`. Building and viewing it need no network."""

import os
import re
from typing import Any

import motet
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

project = "motet"
author = "The motet developers"
copyright = author
version = release = motet.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]

html_theme = "furo"
html_title = f"motet {version}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The kernels of notebooks show their pictures, whatever the environment says.
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # such as tqdm's notice that there are no widgets; errors still count

default_role = "code"  # of docstrings, which set names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

nitpicky = True
# Types of other projects, whose inventories a build without a network cannot read, and types in
# signatures that are not public names of motet.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|np|pandas|pd|pathlib|os|collections|typing|nn|PIL|zarr)\b.*"),
    ("py:class", r"motet\.(\w+\.)+\w+"),
    (
        "py:class",
        "ArrayLike|CohortSource|Floats|Image|Mask|NDArray|PathLike|Size|SlideFeatures|Tensor|Tiled|"
        "Encoded",
    ),
]


def setup(app: Sphinx) -> None:
    """Add what is written below."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.add_post_transform(LinkPublicNames)


def visit_math(translator: Any, node: nodes.math) -> None:
    """Write a formula in a line."""
    write_math(translator, node, as_block=False)


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    """Write a formula in a paragraph."""
    write_math(translator, node, as_block=True)


def write_math(translator: Any, node: nodes.Element, *, as_block: bool) -> None:
    """Write a formula as MathML, which browsers show without a script."""
    # Sizes that fit: docutils knows \left and \right, and not \big and \Big.
    code = re.sub(r"\\[Bb]ig([(\[])", r"\\left\1", node.astext())
    code = re.sub(r"\\[Bb]ig([)\]])", r"\\right\1", code)
    translator.body.append(tex2mathml(code, as_block=as_block))
    raise nodes.SkipNode


class LinkPublicNames(SphinxPostTransform):
    """Make a link of every public name that stands in text, such as `motet.HEALNet`."""

    default_priority = 5

    def run(self, **_: Any) -> None:
        names = self.env.domains.python_domain.objects
        for node in list(self.document.findall(nodes.literal)):
            entry = names.get(node.astext().partition("(")[0])
            if entry is not None and not isinstance(node.parent, nodes.reference):
                name = node.astext()
                link = make_refnode(
                    self.app.builder, self.env.docname, entry.docname, entry.node_id,
                    node.deepcopy(), name,
                )  # fmt: skip
                node.replace_self(link)

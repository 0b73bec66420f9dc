"""The book: README, notebooks with the outputs they were committed with, figures, as one static site (`make book`).

Sources are read where they lie, the repository's root. Nothing is executed, and nothing is fetched when the book is
read: formulas become MathML, which browsers draw themselves.
"""

import re
from itertools import starmap
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

project = "spear"
author = "the spear authors"
copyright = f"{author}, Apache-2.0"
extensions = ["myst_nb"]
root_doc = "README"
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
BESIDE = {
    "Figures": "figures/README",
    "Figures at full size": "figures/paper/README",
    "Data sets": "data/README",
    "Findings about libraries": "findings/README",
    "Changelog": "CHANGELOG",
}
include_patterns = ["README.md", "notebooks/*.ipynb", *(f"{page}.md" for page in BESIDE.values())]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # links in outputs lead to pages, as those in text
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "sphinx_book_theme"
html_title = "spear"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],
    "use_download_button": False,
}
html_copy_source = False
html_math_renderer = "mathml"
CONTENTS = "\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


FOLDER_LINK = re.compile(r"\[([^\]]+)\]\([\w./]+/\)")  # a place in the repository that is no page


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """The side bar, which the first page holds; links to folders become their names."""
    source[0] = FOLDER_LINK.sub(r"\1", source[0])
    if page == root_doc:
        notebooks = "\n".join(f"notebooks/{name}" for name in NOTEBOOKS)
        source[0] += CONTENTS.format(caption="Notebooks", pages=notebooks)
        source[0] += CONTENTS.format(
            caption="Figures and files", pages="\n".join(starmap("{} <{}>".format, BESIDE.items()))
        )


def visit_math(writer, node: nodes.math | nodes.math_block) -> None:
    block = isinstance(node, nodes.math_block)
    writer.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def add_front_door(app: Sphinx, error: Exception | None) -> None:
    """Who opens the folder lands on the first page."""
    Path(app.outdir, "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n')


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_front_door)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))

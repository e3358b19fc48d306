"""Pictures by matplotlib as SVG inside a page: text stays text, and colours and fonts come from the page.

matplotlib is an extra. Nothing here imports it before a picture is drawn.
"""

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOW_TO_INSTALL = "pip install matplotlib"
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"

# Colours that stand for a variable of the page's stylesheet, which has one value for light and one for dark pages.
INK, LINE, BEFORE, AFTER = "#010203", "#010204", "#010205", "#010206"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216", "#010217", "#010218")
VARIABLES = {
    INK: "currentColor", LINE: "var(--line)", BEFORE: "var(--before)", AFTER: "var(--after)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)},
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "font.size": 9, "text.color": INK, "text.parse_math": False, "axes.titlesize": 9,
    "axes.labelcolor": INK, "axes.edgecolor": LINE, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.6, "xtick.color": LINE, "ytick.color": LINE,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False, "axes.unicode_minus": False,
}  # fmt: skip

ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", XLINK)


def installed() -> bool:
    """Whether pictures can be drawn."""
    return find_spec("matplotlib") is not None


def picture(
    name: str,
    label: str,
    size: tuple[float, float],
    draw: Callable[["Figure"], None],
    titles: Sequence[str] = (),
) -> Markup:
    """What `draw` puts on a figure of `size` (inches) as an `<svg>` element; the same input gives the same bytes.

    `name` is unique on its page, `label` says for screen readers what is seen, and `titles` are shown over the cells of the
    mesh that has the gid `cells`, row by row.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    file = BytesIO()
    with style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    _give_titles(root, titles)
    _tidy(root, name, label)
    return Markup(_themed(ElementTree.tostring(root, encoding="unicode")))


def _give_titles(root: ElementTree.Element, titles: Sequence[str]) -> None:
    cells = root.findall(f".//{{{SVG}}}g[@id='cells']/{{{SVG}}}path")
    for cell, title in zip(cells, titles if len(cells) == len(titles) else (), strict=False):
        ElementTree.SubElement(cell, f"{{{SVG}}}title").text = title


def _tidy(root: ElementTree.Element, name: str, label: str) -> None:
    """Remove what only a file needs; keep an id only where something refers to it, and make it unique on the page."""
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style")]:
            parent.remove(child)
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in used:
            element.set("id", f"{name}-{own}")
        for key, value in element.attrib.items():
            element.set(key, re.sub(r"^(url\()?#", rf"\g<1>#{name}-", value))
    root.attrib.pop("width"), root.attrib.pop("height")
    root.attrib |= {"role": "img", "aria-label": label, "class": "picture"}


def _themed(svg: str) -> str:
    """Colours of `VARIABLES` become variables, and fonts the page's."""
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)

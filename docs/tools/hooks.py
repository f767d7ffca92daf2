"""What mkdocs does to a page beyond Markdown: formulas, links into the repository, options, and bars in tables."""

from __future__ import annotations

import re
from typing import Any

MATH = re.compile(r"^```math\n(.*?)\n```$", re.S | re.M)
OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+((?:src|recipes|benchmarks|tests|docker|CONTRIBUTING\.md)(?:/[^)\s]*)?)\)"
)
BAR, CLOSE_BAR = '<mo stretchy="false">&#x0007C;', '<mo stretchy="false" lspace="0.1em" rspace="0.1em">&#x0007C;'
LOG = re.compile("<mi>log</mi>(?!<mo)")
INLINE = re.compile(r"<code>([^<]*--[^<]*)</code>")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
CELL = re.compile(r"<td\b.*?</td>", re.S)


def mathml(latex: str) -> str:
    """A formula as MathML, which browsers draw themselves: no script, no font from elsewhere.

    What `\\qquad` separates becomes parts of its own, which the page may put below each other.
    """
    from latex2mathml.converter import convert

    parts = "".join(f"<div>{convert(part.strip(), display='block')}</div>" for part in latex.split("\\qquad"))
    spaced = LOG.sub('<mi>log</mi><mspace width="0.17em"/>', parts.replace(BAR, CLOSE_BAR))
    return f'<div class="math">{spaced}</div>'


def named(match: re.Match[str]) -> str:
    """A link to a file of the repository as its name and place, or its place alone where that says the name."""
    text, path = match.groups()
    same = path.removesuffix(".md").endswith(text.strip("`").removesuffix(".md"))
    return f"`{path}`" if same else f"{text} (`{path}`)"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for every page."""
    return OUTSIDE.sub(named, MATH.sub(lambda m: mathml(m[1]), markdown))


def on_page_content(html: str, **_: Any) -> str:
    """An option's name is not broken at its hyphens, and a bar that GitHub wants escaped in a table loses its backslash."""
    html = CELL.sub(lambda m: m[0].replace("\\|", "|"), html)
    return INLINE.sub(lambda m: OPTION.sub(r'<span class="option">\g<0></span>', m[0]), html)

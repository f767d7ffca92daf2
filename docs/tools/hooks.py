"""mkdocs hooks: render formulas as MathML, and fix repository links, option names and bars in tables."""

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
    """Convert a formula to MathML, which browsers render without scripts or external fonts.

    Parts separated by `\\qquad` become separate elements, which the page may stack.
    """
    from latex2mathml.converter import convert

    parts = "".join(f"<div>{convert(part.strip(), display='block')}</div>" for part in latex.split("\\qquad"))
    spaced = LOG.sub('<mi>log</mi><mspace width="0.17em"/>', parts.replace(BAR, CLOSE_BAR))
    return f'<div class="math">{spaced}</div>'


def named(match: re.Match[str]) -> str:
    """Replace a link to a repository file by its text and path, or by the path alone if it ends with the text."""
    text, path = match.groups()
    same = path.removesuffix(".md").endswith(text.strip("`").removesuffix(".md"))
    return f"`{path}`" if same else f"{text} (`{path}`)"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs hook on the Markdown of every page: formulas and repository links."""
    return OUTSIDE.sub(named, MATH.sub(lambda m: mathml(m[1]), markdown))


def on_page_content(html: str, **_: Any) -> str:
    """mkdocs hook on the HTML of every page: keep option names unbroken at hyphens, and unescape bars in table cells."""
    html = CELL.sub(lambda m: m[0].replace("\\|", "|"), html)
    return INLINE.sub(lambda m: OPTION.sub(r'<span class="option">\g<0></span>', m[0]), html)

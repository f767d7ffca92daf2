"""What mkdocs does to a page beyond Markdown: formulas become MathML, and links into the repository become names of files."""

from __future__ import annotations

import re
from typing import Any

MATH = re.compile(r"^```math\n(.*?)\n```$", re.S | re.M)
OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+((?:src|recipes|benchmarks|tests|docker|CONTRIBUTING\.md)(?:/[^)\s]*)?)\)"
)


def mathml(latex: str) -> str:
    """A formula as MathML, which browsers draw themselves: no script, no font from elsewhere."""
    from latex2mathml.converter import convert

    return f'<div class="math">{convert(latex.strip(), display="block")}</div>'


def named(match: re.Match[str]) -> str:
    """A link to a file of the repository as its name and place."""
    text, path = match.groups()
    return text if text.endswith(path.rsplit("/", 1)[-1]) and "`" in text else f"{text} (`{path}`)"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for every page."""
    return OUTSIDE.sub(named, MATH.sub(lambda m: mathml(m[1]), markdown))

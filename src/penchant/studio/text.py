"""Renders model output as inert HTML: Markdown without links, images or HTML, with hidden characters made visible."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

from penchant.report.html import text_html

LONGEST = 60_000  # characters; longer text is shown as plain text, not as Markdown
CUT = 400_000  # characters; the rest is left out, with a note
FOLD_CHARACTERS, FOLD_LINES = 1400, 26  # longer answers are folded, along with the one beside them


@lru_cache
def _markdown() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False, "breaks": True})
    parser.enable(["table", "strikethrough"])
    parser.disable(["link", "image", "autolink", "html_inline", "html_block", "reference"])

    def text(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        return text_html(tokens[index].content)

    def code(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        return f"<code>{text_html(tokens[index].content)}</code>"

    def block(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        return f'<pre tabindex="0"><code>{text_html(tokens[index].content)}</code></pre>\n'

    for name, rule in (("text", text), ("code_inline", code), ("code_block", block), ("fence", block)):
        parser.add_render_rule(name, rule)
    return parser


@lru_cache(maxsize=256)
def render_markdown(text: str) -> Markup:
    """Render a text as HTML."""
    if not text.strip():
        return Markup('<p class="soft">(an empty answer)</p>')
    hidden_count = len(text) - CUT
    start = text[:CUT]
    if len(text) > LONGEST:
        html = f'<div class="plain">{text_html(start)}</div>'
    else:
        try:
            # turn headings into paragraphs, since they would become headings of the page, and drop the inline styles of cells
            html = re.sub(r"<(/?)h[1-6]>", lambda m: "</p>" if m[1] else '<p class="head">', _markdown().render(start))
            html = re.sub(r'<(t[hd]) style="text-align:\w+">', r"<\1>", html)
        except (RecursionError, ValueError):
            html = f'<div class="plain">{text_html(start)}</div>'
    note = f'<p class="soft">({hidden_count:,} more characters are not shown)</p>' if hidden_count > 0 else ""
    return Markup(html + note)


def should_fold(*texts: str) -> bool:
    """Return True if texts shown side by side are folded: all of them are if any is long."""
    return any(len(t) > FOLD_CHARACTERS or t.count("\n") > FOLD_LINES for t in texts)

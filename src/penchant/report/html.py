"""HTML as a tree of elements. All text is escaped, with control and direction marks made visible."""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

VOID = frozenset({"br", "hr", "input", "meta"})  # no closing tag
LEAVES = frozenset({"circle", "line", "path", "rect"})  # of SVG
FORBIDDEN = frozenset({"base", "embed", "form", "frame", "iframe", "img", "link", "object", "script", "style"})
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # controls, directions, lone surrogates, private use, line separators
JOINED = ("Lo", "Mn", "Mc", "So", "Sk")  # categories a joiner may connect: Arabic, Indic scripts, emoji
JOINERS = "\u200c\u200d"


@dataclass(frozen=True, slots=True)
class Element:
    """A tag with its attributes and children."""

    tag: str
    attributes: tuple[tuple[str, str], ...]
    children: tuple[Element | str, ...]

    def __str__(self) -> str:
        parts: list[str] = []
        _write(self, parts)
        return "".join(parts)


Node = Element | str | None


def el(tag: str, *children: Node | Iterable[Node], **attributes: str | float | bool | None) -> Element:
    """Make an element.

    Args:
        children: elements, text, None (nothing), or iterables of them.
        attributes: ``class_`` for class, ``_`` for ``-``; None and False omit the attribute, True gives it an empty value.

    Raises:
        ValueError: a tag or attribute that could load or run something. This is a programming error, never caused by text.
    """
    if tag in FORBIDDEN:
        raise ValueError(f"<{tag}> is not made here")
    return Element(tag, tuple(_attributes(attributes)), tuple(_flat(children)))


def _attributes(attributes: dict[str, str | float | bool | None]) -> Iterable[tuple[str, str]]:
    for key, value in attributes.items():
        name = key.rstrip("_").replace("_", "-")
        if name.startswith("on") or name in ("style", "src", "srcdoc", "action"):
            raise ValueError(f"attribute {name} is not made here")
        if name == "href" and not str(value).startswith("#"):
            raise ValueError(f"a link to {value!r} would leave the page")
        if value is not None and value is not False:
            yield name, "" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def _flat(children: Iterable[Any]) -> Iterable[Element | str]:
    for child in children:
        if isinstance(child, (Element, str)):
            yield child
        elif child is not None:
            yield from _flat(child)


def accessible_text(node: Element | str) -> str:
    """The text of a node as a screen reader reads it."""
    if isinstance(node, str):
        return node
    return "" if ("aria-hidden", "true") in node.attributes else "".join(map(accessible_text, node.children))


def _write(node: Element | str, parts: list[str]) -> None:
    if isinstance(node, str):
        parts.append(text_html(node))
        return
    parts.append(f"<{node.tag}")
    parts += [f' {name}="{escape(escape_hidden(value), quote=True)}"' for name, value in node.attributes]
    if node.tag in LEAVES and not node.children:
        parts.append("/>")
        return
    parts.append(">")
    for child in node.children:
        _write(child, parts)
    if node.tag not in VOID:
        parts.append(f"</{node.tag}>")


def split_hidden(text: str) -> list[tuple[str, bool]]:
    """Split text into (piece, hidden): a hidden piece is a single character that must be shown by its code point."""
    pieces: list[tuple[str, bool]] = []
    text = text.replace("\r\n", "\n")
    start = 0
    for i, c in enumerate(text):
        if c.isascii() and (c >= " " or c in "\n\t") and c != "\x7f":
            continue
        if unicodedata.category(c) not in HIDDEN or (c in JOINERS and _is_joiner(text, i)):
            continue
        pieces += [(text[start:i], False)] if i > start else []
        pieces.append((c, True))
        start = i + 1
    return [*pieces, (text[start:], False)] if start < len(text) else pieces


def _is_joiner(text: str, i: int) -> bool:
    neighbors = text[i - 1 : i] + text[i + 1 : i + 2]
    return len(neighbors) == 2 and all(unicodedata.category(c) in JOINED for c in neighbors)


def text_html(text: str) -> str:
    """Escape text as HTML, with hidden characters as small marks with their code point."""
    if text.isascii() and text.isprintable():
        return escape(text, quote=False)
    return "".join(
        f"<i class=cp>U+{ord(p):04X}</i>" if hidden else escape(p, quote=False) for p, hidden in split_hidden(text)
    )


def escape_hidden(text: str) -> str:
    """Plain text with hidden characters replaced by their code point, for attributes and titles."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"\u27e8U+{ord(p):04X}\u27e9" if hidden else p for p, hidden in split_hidden(text))


def user_text(text: Any, tag: str = "bdi", **attributes: str | float | bool | None) -> Element:
    """Text from a user, a model or a file, isolated so that its direction does not affect the text around it."""
    return el(tag, str(text), dir="auto", **attributes)


def json_html(value: Any) -> str:
    """JSON that is safe inside ``<script type="application/json">``: nothing in it can close the element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def table(
    head: Sequence[Node],
    rows: Iterable[Sequence[Node]],
    *,
    numeric: Iterable[int] = (),
    caption: Node = None,
    first_is_head: bool = True,
    class_: str | None = None,
) -> Element:
    """A table that scrolls horizontally if it is too wide.

    Args:
        numeric: right-aligned columns; first_is_head: whether the first cell of each row is its header.
    """
    right_aligned = set(numeric)

    def cell(i: int, value: Node, head_row: bool = False) -> Element:
        kind = "n" if i in right_aligned else None
        if head_row:
            return el("th", value, scope="col", class_=kind)
        return el("th", value, scope="row", class_=kind) if first_is_head and i == 0 else el("td", value, class_=kind)

    return el(
        "div",
        el(
            "table",
            None if caption is None else el("caption", caption),
            el("thead", el("tr", [cell(i, h, True) for i, h in enumerate(head)])) if head else None,
            el("tbody", [el("tr", [cell(i, v) for i, v in enumerate(row)]) for row in rows]),
            class_=class_,
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=f"table: {caption}" if isinstance(caption, str) else "table",
    )


def labeled(key: str, name: str) -> list[Node]:
    """A setting's letter followed by its name."""
    return [el("b", key, class_="key"), " ", user_text(name)]


def panel(head: Sequence[Node], rows: Iterable[Sequence[Node]], **options: Any) -> Element:
    """A table in a panel; options as for `table`."""
    return el("div", table(head, rows, **options), class_="panel")


def note(*children: Node | Iterable[Node]) -> Element:
    """A remark in small print."""
    return el("p", *children, class_="soft small")


def muted(*children: Node | Iterable[Node]) -> Element:
    """A paragraph in muted color."""
    return el("p", *children, class_="soft")


def join_nodes(parts: Iterable[Node], separator: str = " \u00b7 ") -> list[Node]:
    """Join parts with a separator."""
    return [node for i, part in enumerate(parts) for node in ((separator, part) if i else (part,))]


def fold(summary: Node | Iterable[Node], *children: Node | Iterable[Node], key: str, open_: bool = False) -> Element:
    """A part that is folded until opened; `key` keeps it open when the page reloads itself."""
    return el("details", el("summary", summary), *children, data_key=key, open=open_)


# ---- the document: one file with its stylesheet and script inline, and a policy that blocks everything else ----


@cache
def asset(name: str) -> str:
    """The content of an asset file (stylesheet or script)."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def csp_hash(content: str) -> str:
    """The source expression of a content security policy that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def styles() -> str:
    """The page's stylesheet: the part shared with the studio, then its own."""
    return asset("shared.css") + asset("page.css")


def content_security_policy() -> str:
    """The page's content security policy."""
    return (
        f"default-src 'none'; style-src {csp_hash(styles())}; script-src {csp_hash(asset('page.js'))}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def document(title: str, body: str, head: str = "") -> str:
    """A self-contained HTML page with its stylesheet and content security policy.

    Args:
        title: escaped here; body, head: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(content_security_policy(), quote=False)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="generator" content="penchant">\n'
        f"{head}<title>{escape(escape_hidden(title))}</title>\n<style>{styles()}</style>\n</head>\n<body>\n{body}"
        "</body>\n</html>\n"
    )

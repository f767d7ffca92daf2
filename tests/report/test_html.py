"""HTML elements: text is always escaped or refused."""

from __future__ import annotations

import json

import pytest

from penchant.report.html import el, escape_hidden, json_html, table, text_html, user_text


def test_text_and_attributes_are_escaped() -> None:
    made = str(el("p", "<b>&", el("i", "x"), None, ["y", ["z"]], title='"<'))
    assert made == '<p title="&quot;&lt;">&lt;b&gt;&amp;<i>x</i>yz</p>'
    assert str(el("input", hidden=True, checked=False, data_f="a")) == '<input hidden="" data-f="a">'
    assert str(el("circle", cx=1.5)) == '<circle cx="1.5"/>' and str(el("circle", el("title", "t"))).endswith(
        "</circle>"
    )


@pytest.mark.parametrize("tag", ["script", "style", "iframe", "img", "link", "form", "object", "base"])
def test_elements_that_could_load_or_run_are_not_made(tag: str) -> None:
    with pytest.raises(ValueError, match="not made here"):
        el(tag)


@pytest.mark.parametrize(
    "attributes", [{"onclick": "x"}, {"style": "x"}, {"src": "x"}, {"href": "javascript:x"}, {"href": "https://x"}]
)
def test_attributes_that_could_load_or_run_are_not_made(attributes: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        el("a", **attributes)


def test_hidden_characters_are_shown_and_line_breaks_kept() -> None:
    assert escape_hidden("a\u200fb\nc\x1b\x00") == "a\u27e8U+200F\u27e9b\nc\u27e8U+001B\u27e9\u27e8U+0000\u27e9"
    assert text_html("a\u202eb\u2028<") == "a<i class=cp>U+202E</i>b<i class=cp>U+2028</i>&lt;"
    assert text_html("a\r\nb\rc") == "a\nb<i class=cp>U+000D</i>c"
    assert escape_hidden("\ud800\ufeff\u00ad") == "\u27e8U+D800\u27e9\u27e8U+FEFF\u27e9\u27e8U+00AD\u27e9"


def test_joiners_stay_where_scripts_and_emoji_need_them() -> None:
    for kept in ("\u0645\u06cc\u200c\u062e", "\U0001f468\u200d\U0001f469"):
        assert text_html(kept) == kept
    assert "U+200D" in text_html("pay\u200dpal")


def test_json_cannot_end_its_element() -> None:
    value = {"a": "</script><!--\u2028\u2029&\ud800"}
    text = json_html(value)
    assert not set("<>&\u2028\u2029") & set(text) and json.loads(text) == value


def test_text_of_others_is_isolated() -> None:
    assert str(user_text("x")) == '<bdi dir="auto">x</bdi>'


def test_tables_name_their_rows_and_columns() -> None:
    made = str(table(["a", "b"], [["x", "1"]], numeric=(1,), caption="of what"))
    assert '<th scope="col">a</th>' in made and '<th scope="row">x</th><td class="n">1</td>' in made
    assert "<caption>of what</caption>" in made and 'tabindex="0"' in made

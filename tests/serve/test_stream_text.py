"""Streaming tokens to text: pieces join to the whole, characters stay intact, stop texts may span tokens."""

from __future__ import annotations

import codecs
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from penchant.serve.stream import Detokenizer, StopFilter, token_bytes, token_text

TOKENIZER = tiny_tokenizer()


def _pieces(ids: list[int], freeze: int = 64) -> list[str]:
    made = Detokenizer(TOKENIZER, freeze=freeze)
    return [*(made.add(i) for i in ids), made.flush()]


@given(st.text(max_size=30), st.sampled_from([1, 2, 5, 64]))
def test_pieces_joined_are_the_text_and_no_character_is_split(text: str, freeze: int) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    pieces = _pieces(ids, freeze)
    assert "".join(pieces) == text
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece, byte in zip(pieces, text.encode(), strict=False):  # as early as possible
        if "\ufffd" not in text:
            assert piece == decoder.decode(bytes([byte]))


@given(st.lists(st.integers(0, 258), max_size=40), st.sampled_from([1, 2, 5, 64]))
def test_any_tokens_give_what_decoding_them_at_once_gives(ids: list[int], freeze: int) -> None:
    whole = TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(_pieces(ids, freeze)) == whole


@given(st.text("ab é€日😀", max_size=20), st.sampled_from([1, 2, 5, 64]))
def test_words_and_bytes_of_a_fallback(text: str, freeze: int) -> None:
    """A tokenizer that encodes unknown characters as bytes, which only form a character together."""
    ids = BYTES_TOO(text, add_special_tokens=False)["input_ids"]
    made = Detokenizer(BYTES_TOO, freeze=freeze)
    pieces = [*(made.add(i) for i in ids), made.flush()]
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces)


def _with_byte_fallback() -> Any:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "a": 1, "b": 2, " ": 3} | {f"<0x{b:02X}>": 4 + b for b in range(256)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


BYTES_TOO = _with_byte_fallback()


def test_a_byte_of_a_fallback_has_its_byte() -> None:
    assert [token_bytes(BYTES_TOO, 4 + b) for b in (0x41, 0x80, 0xFF)] == [[0x41], [0x80], [0xFF]]


def _with_space_markers() -> Any:
    """A tokenizer like Llama 2's: a word's leading space is a marker, dropped at the start of a text."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁good": 1, "▁day": 2, "s": 3, "▁": 4} | {f"<0x{b:02X}>": 5 + b for b in range(256)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


MARKED = _with_space_markers()


@pytest.mark.parametrize("before", [[1], [5 + b for b in "日本語".encode()]])
def test_a_continued_text_keeps_its_first_space(before: list[int]) -> None:
    alone, continued = Detokenizer(MARKED), Detokenizer(MARKED, before)
    assert [alone.add(2), alone.add(3), alone.add(1)] == ["day", "s", " good"]
    assert [continued.add(2), continued.add(3), continued.add(1)] == [" day", "s", " good"]


def test_tokens_by_themselves_keep_their_space() -> None:
    assert [token_text(MARKED, i) for i in (1, 3, 4)] == [" good", "s", " "]
    assert token_bytes(MARKED, 1) == list(b" good") and token_bytes(MARKED, 5 + 0xE6) == [0xE6]


@given(st.lists(st.text("ab\n", max_size=3), max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_stops_cut_at_the_first_stop_text(pieces: list[str], texts: list[str]) -> None:
    whole = "".join(pieces)
    found = [at for at in (whole.find(t) for t in texts) if at >= 0]
    stops, shown, met = StopFilter(texts), "", False
    for piece in pieces:
        text, met = stops.add(piece)
        shown += text
        if met:
            break
        assert not any(t in shown for t in texts)
    shown += "" if met else stops.flush()
    assert met == bool(found)
    if found:
        # a longer stop text that begins earlier may be incomplete when a shorter one is complete
        assert whole.startswith(shown) and any(whole[len(shown) :].startswith(t) for t in texts)
    else:
        assert shown == whole


def test_nothing_is_held_back_longer_than_needed() -> None:
    stops = StopFilter(["\n\nHuman:"])
    assert [stops.add(p)[0] for p in ("Hi\n", "\n", "Hu", "go", "\n\nHuman")] == ["Hi", "", "", "\n\nHugo", ""]
    assert stops.add(": no") == ("", True)


@pytest.mark.parametrize("text", ["a", " ", "\n"])
def test_a_token_and_its_bytes(text: str) -> None:
    (token,) = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert token_text(TOKENIZER, token) == text and token_bytes(TOKENIZER, token) == list(text.encode())


def test_half_a_character_has_its_byte() -> None:
    ids = TOKENIZER("€\xad", add_special_tokens=False)["input_ids"]
    assert [token_bytes(TOKENIZER, i) for i in ids] == [[b] for b in "€\xad".encode()]
    assert {len(token_bytes(TOKENIZER, i) or []) for i in range(3, 259)} == {1}
    assert all(a != b for a, b in pairwise(sorted((token_bytes(TOKENIZER, i) or [0])[0] for i in range(3, 259))))


def test_special_tokens_are_named() -> None:
    assert token_text(TOKENIZER, 1) == "</s>"

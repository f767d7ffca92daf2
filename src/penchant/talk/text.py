"""Tokens to text as they come: no character is ever split, no space is lost, and what may yet become a stop text is held back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

BROKEN = "\ufffd"  # what bytes decode to that are no whole character yet
CONTEXT = 8  # tokens of the prompt that are decoded along where text is continued


class Detokeniser:
    """The text of a growing list of tokens; the pieces joined are exactly what decoding all tokens at once gives.

    Args:
        before: the prompt's tokens where its text is continued: some tokenizers write a first token without its space.
        freeze: tokens after which their text is settled and only the last few are decoded along with new ones.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), freeze: int = 64) -> None:
        self._tokenizer, self._freeze = tokenizer, freeze
        self._before: list[int] = []
        self._skip = ""
        self._ids: list[int] = []
        self._given = ""  # of the tokens in _ids
        self._settle(list(before))

    def _decode(self, ids: Sequence[int]) -> str:
        # clean-up would take spaces away that an earlier piece has shown
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _settle(self, ids: list[int]) -> None:
        """From here on these tokens' text is known."""
        last = ids[-CONTEXT:]
        skip = self._decode(last) if last else ""
        if BROKEN not in skip:  # else a character may yet change
            self._before, self._skip, self._ids, self._given = last, skip, [], ""

    def _text(self) -> str:
        """The text of the tokens in _ids, half characters as U+FFFD."""
        return self._decode([*self._before, *self._ids])[len(self._skip) :]

    def add(self, token: int) -> str:
        """The characters that one more token completes; may be empty."""
        self._ids.append(token)
        text = self._text()
        piece = self._up_to(text.rstrip(BROKEN))
        if len(self._ids) >= self._freeze and self._given == text:
            self._settle([*self._before, *self._ids])
        return piece

    def flush(self) -> str:
        """What is left when no token follows: half characters."""
        return self._up_to(self._text())

    def _up_to(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        new = text[len(self._given) :]
        self._given = text
        return new


class Stops:
    """Text until the first of some stop texts, which is itself left out.

    Args:
        texts: none of them empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """(what can be shown for certain, whether a stop text was met)."""
        text = self._held + piece
        found = [at for at in (text.find(t) for t in self._texts) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, t) for t in self._texts), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back and did not become a stop text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop text begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# ---------------------------------------------------------------------------------------------------------------------
# single tokens


def token_text(tokenizer: Any, token: int) -> str:
    """A token by itself, special ones included; U+FFFD where it holds half a character."""
    return str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_bytes(tokenizer: Any, token: int) -> list[int] | None:
    """The bytes of a token, also where they are half a character; None where its tokenizer does not tell."""
    text = token_text(tokenizer, token)
    if BROKEN not in text:
        return list(text.encode())
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return [int(piece[3:5], 16)]
    table = _byte_of()
    return [table[c] for c in piece] if all(c in table for c in piece) else None


@lru_cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones for themselves, the others from U+0100 on."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in themselves]
    return {chr(b): b for b in themselves} | {chr(0x100 + i): b for i, b in enumerate(others)}

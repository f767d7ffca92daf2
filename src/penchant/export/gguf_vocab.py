"""A tokenizer's vocabulary as GGUF holds it; tokenizers whose splitting llama.cpp does not have under a name are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penchant.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # GGUF's token types
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>$")
SPACE = "▁"

# how a text is cut before merging, as `tokenizers` writes it down, and what llama.cpp calls the same
_DIGITS = {"type": "Digits", "individual_digits": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What GGUF's ``tokenizer.ggml`` keys say.

    Args:
        model: gpt2 (bytes as letters, merges) or llama (pieces with scores); pre: how a text is cut before; tokens, types, scores: by id.
        special: ids of bos, eos, unk and pad, where there are such tokens; notes: what a person should know.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    chat_template: str | None
    notes: tuple[str, ...] = ()


def vocabulary_of(tokenizer: Any, rows: int, where: str) -> Vocabulary:
    """A tokenizer's vocabulary.

    Args:
        rows: of the model's embedding, which may have more than the tokenizer has tokens; where: for errors.

    Raises:
        ModelError: not a BPE, or one that cuts texts in a way that is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(where, "its tokenizer is not of the tokenizers library", "use --to safetensors")
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise ModelError(where, f"GGUF export knows BPE tokenizers, not {model['type']}", "use --to safetensors")
    kind, pre, adds_space, notes = _kind(definition, where)
    by_id = {int(i): str(t) for t, i in backend.get_vocab(with_added_tokens=True).items()}
    added = {int(t["id"]): bool(t["special"]) for t in definition["added_tokens"]}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [_type(i, tokens[i], i in by_id, added, model.get("unk_token"), kind) for i in range(rows)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ids = {k: getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "unk", "pad")}
    first = tokenizer("a")["input_ids"]
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=_scores(tokens, types, merges) if kind == "llama" else [],
        merges=[] if kind == "llama" else merges,
        special={k: int(v) for k, v in ids.items() if v is not None},
        adds_bos=bool(first) and first[0] == tokenizer.bos_token_id,
        adds_eos=bool(first) and first[-1] == tokenizer.eos_token_id,
        adds_space=adds_space,
        chat_template=template if isinstance(template, str) else None,
        notes=notes,
    )


def _kind(definition: Mapping[str, Any], where: str) -> tuple[str, str, bool, tuple[str, ...]]:
    """(model, pre, a space put before a text, notes) of a BPE."""
    cut, normal, model = definition["pre_tokenizer"], definition["normalizer"], definition["model"]
    marked = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("byte_fallback"):
        if not marked and cut is None and _spaces(normal) is not None:
            return "llama", "default", bool(_spaces(normal)), ()
    else:
        name = _named(cut)
        # of these, llama.cpp looks up whole words before it merges for Llama 3 alone
        if bool(model.get("ignore_merges")) != (name == "llama-bpe") or marked:
            name = None
        if name is not None and (normal is None or normal == {"type": "NFC"}):
            told = "texts are not normalised (NFC) by llama.cpp before they are cut, as they are in transformers"
            return "gpt2", name, False, (told,) if normal else ()
    raise ModelError(
        where,
        "its tokenizer cuts texts in a way that llama.cpp has no verified name for here",
        "use --to safetensors; llama.cpp's own converter may know it",
    )


def _spaces(normal: Any) -> bool | None:
    """Whether a space is put before a text, of a normalizer that writes spaces as pieces do; None: it is another one."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    parts = normal.get("normalizers", [normal]) if isinstance(normal, Mapping) else []
    prepend = {"type": "Prepend", "prepend": SPACE}
    known: dict[str, bool] = {json.dumps([prepend, replace]): True, json.dumps([replace]): False}
    return known.get(json.dumps(parts))


def _named(cut: Any) -> str | None:
    """llama.cpp's name of a pre-tokenizer."""
    parts = cut.get("pretokenizers", [cut]) if isinstance(cut, Mapping) else []
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    before, regex = parts[:-1], bool(parts[-1].get("use_regex", True))
    if not before and regex:
        return "gpt-2"
    if before == [_DIGITS] and regex:
        return "smollm"
    if len(before) == 1 and not regex and before[0].get("type") == "Split" and before[0].get("behavior") == "Isolated":
        pattern = before[0].get("pattern", {}).get("Regex")
        return {_QWEN2: "qwen2", _LLAMA3: "llama-bpe"}.get(pattern)
    return None


def _type(i: int, token: str, there: bool, added: Mapping[int, bool], unknown: str | None, kind: str) -> int:
    if not there:
        return UNUSED
    if kind == "llama" and BYTE_TOKEN.match(token):
        return BYTE
    if token == unknown:
        return UNKNOWN
    if i in added:
        return CONTROL if added[i] else USER_DEFINED
    return NORMAL


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """Pieces by the rank of their earliest merge: who merges first has the higher score; those that no merge makes come last."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    last = len(merges)
    return [
        -float(rank.get(token, last + i)) if kind in (NORMAL, USER_DEFINED) else 0.0
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]

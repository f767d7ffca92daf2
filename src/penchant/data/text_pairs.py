"""Prompt trees to token trees for BERT-type encoders: prompt and completion as the text pair that the encoder was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from penchant.data.converters import RowError
from penchant.data.load import IDENTICAL, Dataset, Quarantined, prompt_text
from penchant.data.tokenise import TokenisedDataset, raw_row
from penchant.errors import DataError, ModelError
from penchant.types import TokenTree

Ids = list[int]


@dataclass(frozen=True, slots=True)
class PairFormat:
    """How a tokenizer lays out a text pair: ``before A between B after``, e.g. ``[CLS] A [SEP] B [SEP]``.

    Args:
        types: token types of the part up to B and of the rest; None where the model takes none.
        pad: id of padding.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[int, int] | None
    pad: int

    @property
    def specials(self) -> int:
        """Tokens beside the two texts."""
        return len(self.before) + len(self.between) + len(self.after)


def pair_format(tokenizer: Any) -> PairFormat:
    """The layout, read off the tokenizer's own encoding of a pair.

    Raises:
        ModelError: the tokenizer lays pairs out in another order, is no fast tokenizer, or has no padding.
    """
    name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
        raise ModelError(name, "an encoder needs a fast tokenizer with a padding token", "give the encoder's own one")
    encoded = tokenizer("a b", "b a", return_token_type_ids=True)
    ids, parts = encoded["input_ids"], encoded.sequence_ids()
    a = [i for i, part in enumerate(parts) if part == 0]
    b = [i for i, part in enumerate(parts) if part == 1]
    kinds = list(encoded["token_type_ids"])
    if not a or not b or a[-1] > b[0] or len({*kinds[: b[0]]}) > 1 or len({*kinds[b[0] :]}) > 1:
        raise ModelError(
            name, "the tokenizer lays out text pairs in a way that is not known here", "use a BERT-type one"
        )
    takes_types = "token_type_ids" in tokenizer.model_input_names
    return PairFormat(
        tuple(ids[: a[0]]),
        tuple(ids[a[-1] + 1 : b[0]]),
        tuple(ids[b[-1] + 1 :]),
        (kinds[0], kinds[-1]) if takes_types else None,
        tokenizer.pad_token_id,
    )


def tokenise_text_pairs(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int,
    truncation: str = "prompt_then_completion",
    on_bad_row: str = "error",
    identical: str = "bad_row",
) -> TokenisedDataset:
    """Tokenise a data set for an encoder: the texts themselves, with its own tokenizer, whatever model wrote them.

    Chat prompts become lines ``role: content``. A row longer than `max_length` (prompt, longest completion and special tokens) loses the
    start of its prompt, all of it if need be, and only then the ends of its completions; both are counted.

    Args:
        truncation, on_bad_row, identical: as for `tokenise`.

    Returns:
        Trees whose prompt ids end with the separator and whose completion ids end the row: prompt + completion is the row that
        ``tokenizer(prompt, completion)`` gives.

    Raises:
        DataError: a bad row and ``on_bad_row="error"``.
    """
    layout = pair_format(tokenizer)
    texts = list(
        dict.fromkeys(s for t in dataset.trees for s in (prompt_text(t.prompt), *(c.text for c in t.completions)))
    )
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    by_text = dict(zip(texts, ids, strict=True))
    trees: list[TokenTree] = []
    aside: list[Quarantined] = []
    cut_prompts: list[str] = []
    cut_completions: list[str] = []
    for tree in dataset.trees:
        prompt, completions = by_text[prompt_text(tree.prompt)], [by_text[c.text] for c in tree.completions]
        kept_prompt, kept = fit(prompt, completions, max_length - layout.specials)
        cut = tuple(len(k) < len(c) for k, c in zip(kept, completions, strict=True))
        try:
            if truncation == "bad_row" and (any(cut) or len(kept_prompt) < len(prompt)):
                raise RowError(f"it has more than max_length {max_length} tokens", "raise data.max_length")
            if identical != "keep" and len(kept) == 2 and kept[0] == kept[1]:
                where = f"after the cut to {max_length} tokens" if any(cut) else "in tokens"
                raise RowError(f"{IDENTICAL} {where}", "raise data.max_length, drop it, or set data.identical=keep")
        except RowError as error:
            if on_bad_row == "error":
                raise DataError(tree.source, error.what, f"{error.how} (or set data.on_bad_row=skip)") from error
            aside.append(Quarantined(tree.source, error.what, error.how, raw_row(tree)))
            continue
        cut_prompts += [tree.source] if len(kept_prompt) < len(prompt) else []
        cut_completions += [tree.source] if any(cut) else []
        made = TokenTree(
            len(trees),
            np.array([*layout.before, *kept_prompt, *layout.between], np.int32),
            tuple(np.array([*k, *layout.after], np.int32) for k in kept),
            cut,
            tree.source,
        )
        labels, scores = tuple(c.label for c in tree.completions), tuple(c.score for c in tree.completions)
        trees.append(replace(made, labels=labels, scores=scores))
    return TokenisedDataset(
        tuple(trees), len(dataset.trees), tuple(aside), tuple(cut_prompts), tuple(cut_completions), 0, "text pair"
    )


def fit(prompt: Ids, completions: Sequence[Ids], room: int) -> tuple[Ids, list[Ids]]:
    """Prompt and completions within `room` tokens: the prompt loses its start first, then the completions their ends."""
    longest = max(map(len, completions), default=0)
    keep = min(len(prompt), max(0, room - longest))
    return prompt[len(prompt) - keep :], [c[:room] for c in completions]


def same_tokens(a: Any, b: Any) -> bool:
    """Whether two tokenizers turn every text into the same ids: all of their definition but padding and truncation."""
    return _definition(a) == _definition(b)


def _definition(tokenizer: Any) -> object:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(tokenizer.get_vocab().items())
    parts = json.loads(backend.to_str())
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    only_padding = tokenizer.pad_token_id if tokenizer.pad_token_id not in used else None
    kept = {k: v for k, v in parts.items() if k not in ("padding", "truncation", "added_tokens")}
    added = [t for t in parts.get("added_tokens", []) if t["id"] != only_padding]
    return kept, added, tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)

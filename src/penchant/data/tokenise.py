"""Prompt trees to token trees: the boundary cannot move, BOS never doubles, EOS is there unless the text was cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from penchant.data.converters import RowError
from penchant.data.load import IDENTICAL, Dataset, Quarantined
from penchant.data.stored import StoredTokens
from penchant.data.templates import Rendered, renderer
from penchant.errors import DataError, ModelError
from penchant.types import PromptTree, TokenTree

Ids = list[int]
CHUNK = 1024  # rows that are tokenised in one call; the tokenizer keeps about 100 bytes a token while it lasts
MARKS = CUT_PROMPT, CUT_COMPLETION, SPLIT, ASIDE = 1, 2, 4, 8  # what can happen to a row


@dataclass(frozen=True, slots=True)
class TokenisedDataset:
    """Token trees and what happened on the way.

    Args:
        trees: accepted; total: trees given; quarantined: trees kept aside (``accepted + quarantined == total``, where a
            plain document that was split into chunks counts once).
        cut_prompts: sources of rows whose prompt lost its start; cut_completions: of rows with a completion that lost its end.
        split_documents: plain documents that became several chunks.
        template: ``chat`` or ``plain``.
    """

    trees: Sequence[TokenTree]
    total: int
    quarantined: tuple[Quarantined, ...]
    cut_prompts: tuple[str, ...]
    cut_completions: tuple[str, ...]
    split_documents: int
    template: str

    @property
    def accepted(self) -> int:
        return self.total - len(self.quarantined)

    def summary(self) -> str:
        """One line for the log."""
        trees = self.trees
        tokens = trees.total if isinstance(trees, StoredTokens) else sum(t.shared_tokens for t in trees)
        parts = [
            f"{self.total:,} rows = {self.accepted:,} tokenised + {len(self.quarantined):,} quarantined",
            f"{tokens:,} tokens",
        ]
        if self.split_documents:
            parts.append(f"{self.split_documents:,} long documents split into chunks")
        if self.cut_prompts:
            parts.append(f"{len(self.cut_prompts):,} prompts lost their start")
        if self.cut_completions:
            parts.append(f"{len(self.cut_completions):,} rows have a cut completion (no EOS)")
        return f"{self.template} template: " + ", ".join(parts)


def tokenise(
    dataset: Dataset,
    tokenizer: Any,
    *,
    template: str = "auto",
    max_length: int = 1024,
    truncation: str = "prompt_then_completion",
    on_bad_row: str = "error",
    identical: str = "bad_row",
    add_eos: bool = True,
) -> TokenisedDataset:
    """Tokenise a data set.

    Prompt and completion are tokenised apart and joined as ids, so that no token spans the boundary. BOS stands once, at the
    start, where the tokenizer uses one. A row longer than `max_length` (prompt + longest completion) loses the start of its
    prompt first, down to half of `max_length`, then the ends of its completions; plain documents are split into chunks.

    Args:
        truncation: ``prompt_then_completion``, or ``bad_row`` to keep long rows aside.
        on_bad_row, identical: as for `load_preferences`; ``identical`` also for pairs that become equal by the cut.
        add_eos: False for a tokenizer without EOS.

    Raises:
        ModelError: the tokenizer has no EOS. DataError: a bad row and ``on_bad_row="error"``.
    """
    if add_eos and tokenizer.eos_token_id is None:
        raise ModelError(
            getattr(tokenizer, "name_or_path", "") or "tokenizer",
            "the tokenizer has no EOS token, so a model could not learn to stop",
            "set eos_token in its tokenizer_config.json",
        )
    making = Tokenising(tokenizer, dataset.kind, template, max_length, truncation, on_bad_row, identical, add_eos)
    trees = tuple(making.trees(dataset.trees))
    return making.result(trees, len(dataset.trees))


class Tokenising:
    """Tokenising as it goes on: trees come out one by one, what else is to be told is there at the end."""

    def __init__(
        self,
        tokenizer: Any,
        kind: str,
        template: str,
        max_length: int,
        truncation: str,
        on_bad_row: str,
        identical: str,
        add_eos: bool,
    ) -> None:
        self.tokenizer, self.on_bad_row = tokenizer, on_bad_row
        self.render, self.name = renderer(template, tokenizer, kind)
        if kind == "scored":  # two answers with equal scores or texts are no pair
            identical = "keep"
        self.fit = _Fitter(tokenizer, max_length, truncation, identical, add_eos, kind == "text")
        self.aside: list[Quarantined] = []
        self.row = 0

    def trees(self, rows: Sequence[PromptTree]) -> Iterator[TokenTree]:
        """All trees, in order."""
        for made, _ in self.by_row(rows):
            yield from made

    def by_row(self, rows: Sequence[PromptTree]) -> Iterator[tuple[list[TokenTree], int]]:
        """The trees of each row, in order, and what happened to it: a sum of `MARKS`.

        `CHUNK` rows at a time are rendered and given to the tokenizer, which uses all cores.
        """
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            encoded = _encode(self.tokenizer, [_try(self.render, tree) for tree in part])
            for tree, ids in zip(part, encoded, strict=True):
                before = self._happened()
                made = self._row(tree, ids)
                yield made, sum(m for m, a, b in zip(MARKS, before, self._happened(), strict=True) if a != b)

    def _happened(self) -> tuple[int, ...]:
        return len(self.fit.cut_prompts), len(self.fit.cut_completions), self.fit.split, len(self.aside)

    def _row(self, tree: PromptTree, ids: tuple[Ids, list[Ids]] | RowError) -> list[TokenTree]:
        try:
            if isinstance(ids, RowError):
                raise ids
            made = self.fit(tree.source, *ids)
        except RowError as error:
            if self.on_bad_row == "error":
                raise DataError(tree.source, error.what, f"{error.how} (or set data.on_bad_row=skip)") from error
            self.aside.append(Quarantined(tree.source, error.what, error.how, raw_row(tree)))
            return []
        labels, scores = tuple(c.label for c in tree.completions), tuple(c.score for c in tree.completions)
        first, self.row = self.row, self.row + len(made)
        return [replace(one, row=first + i, labels=labels, scores=scores) for i, one in enumerate(made)]

    def result(self, trees: Sequence[TokenTree], total: int) -> TokenisedDataset:
        """The whole, when all trees have come out."""
        cut = tuple(self.fit.cut_prompts), tuple(self.fit.cut_completions)
        return TokenisedDataset(trees, total, tuple(self.aside), *cut, self.fit.split, self.name)


def _try(render: Any, tree: PromptTree) -> Rendered | RowError:
    try:
        result: Rendered = render(tree)
        return result
    except RowError as error:
        return error


def _encode(tokenizer: Any, rendered: Sequence[Rendered | RowError]) -> list[tuple[Ids, list[Ids]] | RowError]:
    """All texts in one call of the fast tokenizer; equal prompts are encoded once."""
    texts = list(dict.fromkeys(t for r in rendered if not isinstance(r, RowError) for t in (r[0], *r[1])))
    by_text = dict(zip(texts, encode_texts(tokenizer, texts), strict=True))
    return [r if isinstance(r, RowError) else (by_text[r[0]], [by_text[t] for t in r[1]]) for r in rendered]


def encode_texts(tokenizer: Any, texts: list[str]) -> list[Ids]:
    """Ids of each text without special tokens, as ``tokenizer(texts, add_special_tokens=False)`` gives them.

    A plain fast tokenizer's backend is asked directly: masks and offsets, which nobody looks at, take as long as the ids.
    """
    from transformers import PreTrainedTokenizerFast

    if not texts:
        return []
    plain = all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, tokenizer)
        for name in ("__call__", "_encode_plus")
    )
    if not plain:
        found: list[Ids] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found
    tokenizer(texts[0], add_special_tokens=False, verbose=False)  # sets the backend as a call does: no padding, no cut
    return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def uses_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts BOS at the start of a text."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


class _Fitter:
    """Specials and length: ids of one row to its token tree (several for a split document)."""

    def __init__(
        self, tokenizer: Any, max_length: int, truncation: str, identical: str, add_eos: bool, text: bool
    ) -> None:
        self.bos = tokenizer.bos_token_id if uses_bos(tokenizer) else None
        self.bos_id, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id if add_eos else None
        self.max_length, self.truncation, self.identical, self.text = max_length, truncation, identical, text
        self.is_space = _white_space_ids(tokenizer)
        self.cut_prompts: list[str] = []
        self.cut_completions: list[str] = []
        self.split = 0

    def __call__(self, source: str, prompt: Ids, completions: list[Ids]) -> list[TokenTree]:
        prompt = self._start(prompt)
        completions = [self._end(c) for c in completions]
        if any(not c for c in completions):
            raise RowError("a completion has no tokens", "drop the row")
        if self.text:
            return self._chunks(source, prompt, completions[0])
        longest = max(map(len, completions), default=0)
        cut = (False,) * len(completions)
        if len(prompt) + longest > self.max_length:
            prompt, completions, cut = self._cut(source, prompt, completions, longest)
        if self.identical != "keep" and len(completions) == 2 and completions[0] == completions[1]:
            raise RowError(
                f"{IDENTICAL} after the cut to {self.max_length} tokens" if any(cut) else f"{IDENTICAL} in tokens",
                "raise data.max_length, drop it, or set data.identical=keep",
            )
        return [_tree(source, prompt, completions, cut)]

    def _start(self, prompt: Ids) -> Ids:
        """BOS once where the tokenizer uses it; an empty prompt gets BOS, or EOS as document separator."""
        if self.bos is not None and prompt[:1] != [self.bos]:
            prompt = [self.bos, *prompt]
        if prompt:
            return prompt
        first = self.bos_id if self.bos_id is not None else self.eos
        if first is None:
            raise RowError("the prompt is empty and the tokenizer has neither BOS nor EOS", "give it a prompt")
        return [first]

    def _end(self, completion: Ids) -> Ids:
        """EOS once at the end; white space that a template puts behind EOS is not part of the answer."""
        if self.eos is None:
            return completion
        end = len(completion)
        while end and completion[end - 1] in self.is_space:
            end -= 1
        if end and completion[end - 1] == self.eos:
            return completion[:end]
        return [*completion, self.eos]

    def _cut(
        self, source: str, prompt: Ids, completions: list[Ids], longest: int
    ) -> tuple[Ids, list[Ids], tuple[bool, ...]]:
        if self.truncation == "bad_row":
            raise RowError(
                f"{len(prompt) + longest} tokens are more than max_length {self.max_length}", "raise data.max_length"
            )
        keep = min(len(prompt), max(self.max_length - longest, self.max_length // 2))
        if keep < len(prompt):
            bos = prompt[:1] if prompt[0] == self.bos_id else []
            prompt = [*bos, *prompt[len(prompt) - keep + len(bos) :]]
            self.cut_prompts.append(source)
        room = self.max_length - len(prompt)
        if room < 1:
            raise RowError(
                f"max_length {self.max_length} leaves no room for a completion token", "raise data.max_length"
            )
        cut = tuple(len(c) > room for c in completions)
        if any(cut):
            self.cut_completions.append(source)
        return prompt, [c[:room] for c in completions], cut

    def _chunks(self, source: str, prompt: Ids, document: Ids) -> list[TokenTree]:
        room = self.max_length - len(prompt)
        parts = [document[i : i + room] for i in range(0, len(document), room)]
        self.split += len(parts) > 1
        return [_tree(source, prompt, [part], (i < len(parts) - 1,)) for i, part in enumerate(parts)]


def _white_space_ids(tokenizer: Any) -> frozenset[int]:
    ids = (tokenizer(s, add_special_tokens=False)["input_ids"] for s in ("\n", "\n\n", " ", " \n"))
    return frozenset(i[0] for i in ids if len(i) == 1 and i[0] != tokenizer.eos_token_id)


def _tree(source: str, prompt: Ids, completions: list[Ids], cut: tuple[bool, ...]) -> TokenTree:
    arrays = tuple(np.array(c, dtype=np.int32) for c in completions)
    return TokenTree(0, np.array(prompt, dtype=np.int32), arrays, cut, source)


def raw_row(tree: PromptTree) -> dict[str, Any]:
    """A tree as a row of a quarantine file."""
    prompt = (
        tree.prompt if isinstance(tree.prompt, str) else [{"role": m.role, "content": m.content} for m in tree.prompt]
    )
    return {"prompt": prompt, "completions": [c.text for c in tree.completions]}

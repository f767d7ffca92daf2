"""Prompt trees to token trees: boundaries, BOS and EOS, truncation; text pairs for encoders."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from penchant.base.text import any_of, counted
from penchant.data.layouts import RowError
from penchant.data.load import IDENTICAL, Dataset, Quarantined, prompt_json, prompt_text
from penchant.data.mapped import StoredTokens
from penchant.data.templates import (
    DATE,
    Rendered,
    chat,
    conversation,
    cut_after_end,
    end_ids,
    excerpt,
    plain,
    split_answers,
    uses_chat,
)
from penchant.errors import ConfigError, DataError, ModelError
from penchant.types import PromptTree, TokenTree

# ---- Token trees: the boundary cannot move, BOS never doubles, EOS is present unless the text was cut ----


Ids = list[int]
Turns = Sequence[Sequence[int]]
CONTEXT = 64  # characters at the prompt's end that an answer is encoded with
CHUNK = 1024  # rows tokenized in one call, during which the tokenizer holds about 100 bytes a token


class Encoded(NamedTuple):
    """The ids of a prompt and its completions; `turns`: tokens of each part of each completion (see `Rendered`)."""

    prompt: Ids
    completions: list[Ids]
    turns: Turns = ()


class Mark:
    """Flags for what can happen to a row; its mark is their sum."""

    CUT_PROMPT, CUT_COMPLETION, SPLIT, ASIDE, MOVED, APART, FORCED = 1, 2, 4, 8, 16, 32, 64


def is_moved(marks: Any) -> Any:
    """Whether the template changed the prompt of a row that is trained on, from its mark or an array of marks."""
    return marks & (Mark.MOVED | Mark.ASIDE) == Mark.MOVED


def is_forced(marks: Any) -> Any:
    """Likewise, whether the row's answer was appended to the prompt for generation."""
    return marks & (Mark.FORCED | Mark.ASIDE) == Mark.FORCED


def is_split(marks: Any) -> Any:
    """Likewise, whether the row is a conversation that was split into one tree per answer."""
    return marks & (Mark.APART | Mark.ASIDE) == Mark.APART


@dataclass(frozen=True, slots=True)
class TokenizedDataset:
    """Token trees, and what happened to the rows.

    Args:
        trees: accepted; total: trees given; quarantined: trees kept aside (``accepted + quarantined == total``; a plain
            document that was split into chunks counts once).
        cut_prompts: sources of rows whose prompt lost its start; cut_completions: of rows with a completion that lost its end.
        split_documents: plain documents that became several chunks.
        moved_prompts: rows whose prompt the chat template renders differently once an answer follows (see `templates.chat`).
        forced_prompts: those of them whose answer is appended to the prompt; the other prompts are cut to what both renderings share.
        apart: conversations split into a tree per answer, since no single text serves all of them (see `templates.conversation`).
        template: ``chat`` or ``plain``.
    """

    trees: Sequence[TokenTree]
    total: int
    quarantined: tuple[Quarantined, ...]
    cut_prompts: tuple[str, ...]
    cut_completions: tuple[str, ...]
    split_documents: int
    template: str
    moved_prompts: int = 0
    apart: int = 0
    forced_prompts: int = 0

    @property
    def accepted(self) -> int:
        return self.total - len(self.quarantined)

    def summary(self) -> str:
        """One line for the log."""
        trees = self.trees
        tokens = trees.total if isinstance(trees, StoredTokens) else sum(t.shared_tokens for t in trees)
        parts = [
            f"{counted(self.total, 'row')} = {self.accepted:,} tokenized + {len(self.quarantined):,} kept aside",
            f"{tokens:,} tokens",
        ]
        if self.split_documents:
            parts.append(f"{counted(self.split_documents, 'long document')} split into chunks")
        if self.moved_prompts:
            prompts = counted(self.moved_prompts, "prompt")
            parts.append(f"{prompts} that the template renders differently once an answer follows")
            kinds = (
                (self.moved_prompts - self.forced_prompts, "cut to what both share"),
                (self.forced_prompts, "kept, with the answer put behind"),
            )
            parts[-1] += f" ({'; '.join(f'{n:,} {kind}' for n, kind in kinds if n)})"
        if self.apart:
            conversations = counted(self.apart, "conversation")
            parts.append(f"{conversations} learned answer by answer (one text would not match what the model sees)")
        if self.cut_prompts:
            parts.append(f"{counted(len(self.cut_prompts), 'prompt')} without the start (cut)")
        if self.cut_completions:
            parts.append(f"{counted(len(self.cut_completions), 'row')} with a cut answer (no EOS)")
        return f"{self.template} template: " + ", ".join(parts)


def tokenize(dataset: Dataset, tokenizer: Any, **how: Any) -> TokenizedDataset:
    """Tokenize a data set; arguments and errors as for `CausalTokenization`."""
    return CausalTokenization(tokenizer, dataset.kind, **how).all(dataset.trees)


class Tokenization:
    """Base class: yields token trees row by row, and collects counts and bad rows for `result`.

    Subclasses define a tree's texts (`render`, with `template` as its name) and how a row's ids become token trees (`fit_row`).
    """

    template: str

    def __init__(self, tokenizer: Any, max_length: int, truncation: str, identical: str, on_bad_row: str) -> None:
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.identical, self.on_bad_row = identical, on_bad_row
        self.mark = 0  # of the current row
        self._number = self._split = self._moved = self._apart = self._forced = 0
        self._aside: list[Quarantined] = []
        self._cut_prompts: list[str] = []
        self._cut_completions: list[str] = []

    def render(self, tree: PromptTree) -> list[Rendered]:
        """The texts of a tree's prompt and completions; several items if a row becomes several trees."""
        raise NotImplementedError

    def encode(self, rendered: Sequence[Rendered | RowError]) -> list[Encoded | RowError]:
        """Encode each text by itself, in one call of the fast tokenizer; equal texts are encoded once."""
        texts = list(
            dict.fromkeys(t for r in rendered if not isinstance(r, RowError) for t in (r.prompt, *r.completions))
        )
        by_text = dict(zip(texts, encode_texts(self.tokenizer, texts), strict=True))
        return [
            r if isinstance(r, RowError) else Encoded(by_text[r.prompt], [by_text[t] for t in r.completions])
            for r in rendered
        ]

    def fit_row(self, source: str, prompt: Ids, completions: list[Ids], turns: Turns = ()) -> list[TokenTree]:
        """Make the token tree of one row from its ids (several if it is a document that is split).

        Args:
            turns: tokens of each part of each completion, alternately trained on and not; empty: all are trained on.

        Raises:
            RowError: the row cannot be used.
        """
        raise NotImplementedError

    def all(self, rows: Sequence[PromptTree]) -> TokenizedDataset:
        """Tokenize all rows, in memory."""
        return self.result(tuple(tree for trees, _ in self.by_row(rows) for tree in trees), len(rows))

    def by_row(self, rows: Sequence[PromptTree]) -> Iterator[tuple[list[TokenTree], int]]:
        """Yield the trees and the mark of each row, in order.

        `CHUNK` rows at a time are rendered and passed to the tokenizer, which uses all cores.
        """
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            rendered = [self._render_or_error(tree) for tree in part]
            encoded = iter(self.encode([r for items in rendered for r in items]))
            for tree, items in zip(part, rendered, strict=True):
                moves = {r.moved for r in items if isinstance(r, Rendered)}
                self.mark = Mark.MOVED * any(moves) | Mark.FORCED * ("forced" in moves)
                self.mark |= Mark.APART * (len(items) > 1)
                trees = self._tokenize_row(tree, [next(encoded) for _ in items])
                self._cut_prompts += [tree.source] * bool(self.mark & Mark.CUT_PROMPT)
                self._cut_completions += [tree.source] * bool(self.mark & Mark.CUT_COMPLETION)
                self._split += bool(self.mark & Mark.SPLIT)
                self._moved += is_moved(self.mark)
                self._forced += is_forced(self.mark)
                self._apart += is_split(self.mark)
                yield trees, self.mark

    def _render_or_error(self, tree: PromptTree) -> Sequence[Rendered | RowError]:
        try:
            return self.render(tree)
        except RowError as error:
            return [error]

    def _tokenize_row(self, tree: PromptTree, of_row: Sequence[Encoded | RowError]) -> list[TokenTree]:
        trees: list[TokenTree] = []
        try:
            for encoded in of_row:
                if isinstance(encoded, RowError):
                    raise encoded
                trees += self.fit_row(tree.source, *encoded)
        except RowError as error:
            if self.on_bad_row == "error":
                raise DataError(tree.source, error.what, f"{error.how} (or set data.on_bad_row=skip)") from error
            raw = {"prompt": prompt_json(tree.prompt), "completions": [c.whole for c in tree.completions]}
            self._aside.append(Quarantined(tree.source, error.what, error.how, raw))
            self.mark |= Mark.ASIDE
            return []
        labels, scores = tuple(c.label for c in tree.completions), tuple(c.score for c in tree.completions)
        first, self._number = self._number, self._number + len(trees)
        fields: dict[str, Any] = {"labels": labels, "scores": scores, "origin": tree.origin, "weight": tree.weight}
        return [replace(t, row=first + i, **fields) for i, t in enumerate(trees)]

    def check_different(self, completions: Sequence[Ids], was_cut: bool) -> None:
        """Reject a pair whose answers are the same tokens, unless such pairs are kept."""
        if self.identical != "keep" and len(completions) == 2 and completions[0] == completions[1]:
            where = f"after the cut to {self.max_length} tokens" if was_cut else "in tokens"
            raise RowError(f"{IDENTICAL} {where}", "raise data.max_length, drop it, or set data.identical=keep")

    def result(self, trees: Sequence[TokenTree], total: int) -> TokenizedDataset:
        """The tokenized data set, once all rows are done."""
        cut = tuple(self._cut_prompts), tuple(self._cut_completions)
        return TokenizedDataset(
            trees, total, tuple(self._aside), *cut, self._split, self.template, self._moved, self._apart, self._forced
        )


def encode_in_context(
    tokenizer: Any, rendered: Sequence[Rendered | RowError], *, strict: bool = True
) -> list[Encoded | RowError]:
    """Encode prompts, and completions as they are tokenized after their prompt; equal texts are encoded once.

    A SentencePiece-type tokenizer puts a dummy space before a separate text, which would be missing in context.

    Args:
        strict: a row whose ids do not decode to its text is a bad row; False: its completion is encoded by itself.
    """
    specials = any_of(t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values())
    contexts = {p: _context_of(p, specials) for p in {r.prompt: None for r in rendered if not isinstance(r, RowError)}}
    texts: dict[str, None] = {}
    for r in rendered:
        if not isinstance(r, RowError):
            context = contexts[r.prompt]
            texts |= dict.fromkeys((r.prompt, context, *(context + t for t in r.completions)))
    by_text = dict(zip(texts, encode_texts(tokenizer, list(texts)), strict=True))

    def encode_row(rendered_row: Rendered | RowError) -> Encoded | RowError:
        if isinstance(rendered_row, RowError):
            return rendered_row
        context, completions = contexts[rendered_row.prompt], []
        context_ids = by_text[context]
        for text in rendered_row.completions:
            ids = by_text[context + text]
            if ids[: len(context_ids)] == context_ids:
                completions.append(ids[len(context_ids) :])
                continue
            completion = _split_at(tokenizer, context_ids, ids, context, text)
            if completion is None and strict:
                return RowError(
                    f"prompt and answer do not decode to their text: {excerpt(context)} and {excerpt(text)}",
                    "move white space between the prompt's end and the answer's start",
                )
            completions.append(encode_texts(tokenizer, [text])[0] if completion is None else completion)
        return Encoded(by_text[rendered_row.prompt], completions)

    return [encode_row(r) for r in rendered]


def _context_of(prompt: str, start_pattern: re.Pattern[str]) -> str:
    """The end of a prompt that the ids after it depend on: from its last special token or, in plain text, a word's start."""
    if len(prompt) <= CONTEXT:
        return prompt
    tail = prompt[-CONTEXT:]
    specials = [m.start() for m in start_pattern.finditer(tail)]
    word = re.search(r"\s\S", tail)
    return tail[specials[-1] :] if specials else tail[word.start() :] if word else tail


def _split_at(tokenizer: Any, context_ids: Ids, joint_ids: Ids, context: str, text: str) -> Ids | None:
    """The ids of `text` after `context`, if `joint_ids` (the ids of both) does not start with `context_ids` (those of `context`).

    Either the context is encoded differently by itself and a token still starts at the boundary, or a token spans the boundary and
    the text is encoded after another anchor. The result must decode to the whole; None if nothing does.
    """
    candidates = []
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(context + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        boundary = next(
            (i for i, (start, _) in enumerate(offsets["offset_mapping"]) if start >= len(context)), len(joint_ids)
        )
        candidates.append(joint_ids[boundary:])
    for anchor in ("\n", ".", tokenizer.eos_token or "", ""):
        anchor_ids, joined_ids = encode_texts(tokenizer, [anchor, anchor + text])
        if joined_ids[: len(anchor_ids)] == anchor_ids:
            candidates.append(joined_ids[len(anchor_ids) :])
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    expected = tokenizer.decode(joint_ids, **options)
    return next((c for c in candidates if tokenizer.decode([*context_ids, *c], **options) == expected), None)


def encode_texts(tokenizer: Any, texts: list[str]) -> list[Ids]:
    """Ids of each text without special tokens, as ``tokenizer(texts, add_special_tokens=False)`` gives them.

    A plain fast tokenizer's backend is called directly: the masks and offsets, which are not used, take as long as the ids.
    """
    from transformers import PreTrainedTokenizerFast

    if not texts:
        return []
    is_plain = all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, tokenizer)
        for name in ("__call__", "_encode_plus")
    )
    if not is_plain:
        ids: list[Ids] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
    tokenizer(texts[0], add_special_tokens=False, verbose=False)  # resets the backend: no padding, no truncation
    return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def uses_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts BOS at the start of a text."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


class CausalTokenization(Tokenization):
    """Prompts and completions for a language model.

    A completion's ids are those it has after its prompt. A token that would span the boundary is split there, and prompt +
    completion must decode to the text. BOS stands once, at the start, if the tokenizer uses one; EOS once, at the end, unless the
    completion ends with another of `end_ids`. A row longer than `max_length` (prompt + longest completion) loses the start of its
    prompt first, down to half of `max_length`, then the ends of its completions; plain documents are split into chunks.

    Args:
        kind: of the data set.
        template: ``auto`` (the chat template if the tokenizer has one), ``chat`` or ``plain``. Documents never get a template.
        truncation: ``prompt_then_completion``, or ``bad_row`` to keep long rows aside.
        on_bad_row, identical: as for `load_preferences`; ``identical`` also applies to pairs that truncation makes equal.
        add_eos: end completions with EOS; must be False for a tokenizer without EOS.
        template_options: passed to the chat template, e.g. ``{"enable_thinking": False}``.
        strict: False for completions that a model wrote, see `templates.chat`.

    Raises:
        ModelError: the tokenizer has no EOS. ConfigError: it has no chat template for ``chat`` or for `template_options`.
        DataError (later): a bad row and ``on_bad_row="error"``.
    """

    def __init__(
        self,
        tokenizer: Any,
        kind: str,
        *,
        template: str = "auto",
        max_length: int = 1024,
        truncation: str = "prompt_then_completion",
        on_bad_row: str = "error",
        identical: str = "bad_row",
        add_eos: bool = True,
        template_options: Mapping[str, Any] | None = None,
        strict: bool = True,
    ) -> None:
        if kind == "scored":  # two answers with equal scores or texts are not a pair
            identical = "keep"
        super().__init__(tokenizer, max_length, truncation, identical, on_bad_row)
        if add_eos and tokenizer.eos_token_id is None:
            name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
            what = "the tokenizer has no EOS token, so a model could not learn to stop"
            raise ModelError(name, what, "set eos_token in its tokenizer_config.json")
        use_chat = uses_chat(template, tokenizer)
        if template == "chat" and not use_chat:
            raise ConfigError("data.template", "the tokenizer has no chat template", "set data.template=plain or auto")
        self.template = "chat" if use_chat and kind != "text" else "plain"
        if set(template_options or ()) - {DATE} and self.template != "chat":
            what = "no chat template is in use"
            raise ConfigError("data.template_options", what, "leave them out")
        self.options, self.strict = template_options, strict
        self.text = kind == "text"
        self.bos = tokenizer.bos_token_id if uses_bos(tokenizer) else None
        self.bos_id, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id if add_eos else None
        self.ends = end_ids(tokenizer)
        self.end_texts = tuple(tokenizer.convert_ids_to_tokens(sorted(self.ends)))

    def render(self, tree: PromptTree) -> list[Rendered]:
        """Render the answers, each up to its first end: white space or a second EOS that a template writes after it is dropped."""
        several = any(c.more for c in tree.completions)
        if several and self.template == "chat":
            rendered = conversation(tree, self.tokenizer, self.options, self.end_texts, end=self.eos is not None)
            if rendered is not None:
                return [rendered]
        if several and len(tree.completions) > 1:
            raise RowError(
                "its answers differ in several turns, which needs a chat template that leaves earlier turns as they are",
                "give conversations that are equal before their last answer, or take a model with another chat template",
            )
        return [self._render_single(t) for t in (split_answers(tree) if several else [tree])]

    def _render_single(self, tree: PromptTree) -> Rendered:
        if self.template == "chat":
            rendered = chat(tree, self.tokenizer, self.options, strict=self.strict)
        else:
            rendered = plain(tree)
        return rendered._replace(completions=tuple(cut_after_end(c, self.end_texts) for c in rendered.completions))

    def encode(self, rendered: Sequence[Rendered | RowError]) -> list[Encoded | RowError]:
        """Encode each part of a conversation after what precedes it, so that no token spans the edge of a part to train on."""
        parts = [_parts(r) if isinstance(r, Rendered) else [r] for r in rendered]
        encoded = iter(
            encode_in_context(self.tokenizer, [p for row_parts in parts for p in row_parts], strict=self.strict)
        )
        return [
            _join_parts(r, [next(encoded) for _ in row_parts]) for r, row_parts in zip(rendered, parts, strict=True)
        ]

    def fit_row(self, source: str, prompt: Ids, completions: list[Ids], turns: Turns = ()) -> list[TokenTree]:
        prompt = self._start(prompt)
        completions = [self._end(c) for c in completions]
        if any(not c for c in completions):
            raise RowError("a completion has no tokens", "drop the row")
        if self.text:
            document, room = completions[0], self.max_length - len(prompt)
            parts = [document[i : i + room] for i in range(0, len(document), room)]
            self.mark |= Mark.SPLIT * (len(parts) > 1)
            return [_tree(source, prompt, [part], (i < len(parts) - 1,)) for i, part in enumerate(parts)]
        longest = max(map(len, completions), default=0)
        cut = (False,) * len(completions)
        if len(prompt) + longest > self.max_length:
            prompt, completions, cut = self._cut(prompt, completions, longest)
        self.check_different(completions, any(cut))
        return [_tree(source, prompt, completions, cut, turns)]

    def _start(self, prompt: Ids) -> Ids:
        """Ensure one BOS if the tokenizer uses it; an empty prompt gets BOS, or EOS as document separator."""
        if self.bos is not None and prompt[:1] != [self.bos]:
            prompt = [self.bos, *prompt]
        if prompt:
            return prompt
        first = self.bos_id if self.bos_id is not None else self.eos
        if first is None:
            raise RowError("the prompt is empty and the tokenizer has neither BOS nor EOS", "give it a prompt")
        return [first]

    def _end(self, completion: Ids) -> Ids:
        if self.eos is None or (completion and completion[-1] in self.ends):
            return completion
        return [*completion, self.eos]

    def _cut(
        self, prompt: Ids, completions: list[Ids], longest_completion: int
    ) -> tuple[Ids, list[Ids], tuple[bool, ...]]:
        if self.truncation == "bad_row":
            tokens = f"{len(prompt) + longest_completion} tokens"
            raise RowError(f"{tokens} are more than max_length {self.max_length}", "raise data.max_length")
        # the whole prompt, if there are no completions
        keep = min(len(prompt), max(self.max_length - longest_completion, self.max_length // 2))
        if keep < len(prompt):
            bos = prompt[:1] if prompt[0] == self.bos_id else []
            prompt = [*bos, *prompt[len(prompt) - keep + len(bos) :]]
            self.mark |= Mark.CUT_PROMPT
        room = self.max_length - len(prompt)
        if room < 1 and completions:
            what = f"max_length {self.max_length} leaves no room for a completion token"
            raise RowError(what, "raise data.max_length")
        cut = tuple(len(c) > room for c in completions)
        self.mark |= Mark.CUT_COMPLETION * any(cut)
        return prompt, [c[:room] for c in completions], cut


def _parts(rendered: Rendered) -> list[Rendered]:
    """A conversation's parts, each as the answer to the text before it; after the first, only the end of that text is kept."""
    parts: list[Rendered] = []
    for turns in rendered.turns:
        before = rendered.prompt
        for text in turns:
            parts.append(Rendered(before[-CONTEXT - 1 :] if before != rendered.prompt else before, (text,)))
            before += text
    return parts or [rendered]


def _join_parts(rendered: Rendered | RowError, parts: Sequence[Encoded | RowError]) -> Encoded | RowError:
    """Join the ids of a row's parts."""
    if isinstance(rendered, RowError) or not rendered.turns:
        return parts[0]
    part_ids: list[Ids] = []
    for part in parts:
        if isinstance(part, RowError):
            return part
        part_ids += part.completions
    assert isinstance(parts[0], Encoded)
    remaining = iter(part_ids)
    completions = [[next(remaining) for _ in turns] for turns in rendered.turns]
    lengths = tuple(tuple(map(len, ids)) for ids in completions)
    return Encoded(parts[0].prompt, [list(itertools.chain(*ids)) for ids in completions], lengths)


def _tree(
    source: str, prompt: Ids, completions: list[Ids], truncated: tuple[bool, ...], turns: Turns = ()
) -> TokenTree:
    arrays = tuple(np.array(c, dtype=np.int32) for c in completions)
    masks: list[np.ndarray] = []
    # the last part is trained on, and so is an EOS after it
    for ids, parts in zip(completions, turns, strict=bool(turns)):
        mask = np.repeat(np.arange(len(parts)) % 2 == 0, parts)[: len(ids)]
        masks.append(np.pad(mask, (0, len(ids) - len(mask)), constant_values=True))
    return TokenTree(0, np.array(prompt, dtype=np.int32), arrays, truncated, source, masks=tuple(masks))


# ---- Encoders: prompt and completion as the text pair that a BERT-type model was trained on ----


@dataclass(frozen=True, slots=True)
class PairFormat:
    """How a tokenizer lays out a text pair: ``before A between B after``, e.g. ``[CLS] A [SEP] B [SEP]``.

    Args:
        types: token types of the part up to B and of the rest; None if the model takes none.
        pad: the padding id.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[int, int] | None
    pad: int

    @property
    def specials(self) -> int:
        """Number of tokens besides the two texts."""
        return len(self.before) + len(self.between) + len(self.after)


def pair_format(tokenizer: Any) -> PairFormat:
    """Infer the layout of text pairs from the tokenizer's own encoding of one.

    Raises:
        ModelError: the tokenizer lays pairs out in another order, is not a fast tokenizer, or has no padding.
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
        what = "the tokenizer lays out text pairs in a way that is not known here"
        raise ModelError(name, what, "use a BERT-type one")
    takes_types = "token_type_ids" in tokenizer.model_input_names
    return PairFormat(
        tuple(ids[: a[0]]),
        tuple(ids[a[-1] + 1 : b[0]]),
        tuple(ids[b[-1] + 1 :]),
        (kinds[0], kinds[-1]) if takes_types else None,
        tokenizer.pad_token_id,
    )


def tokenize_text_pairs(dataset: Dataset, tokenizer: Any, **how: Any) -> TokenizedDataset:
    """Tokenize a data set for an encoder; arguments and errors as for `PairTokenization`."""
    return PairTokenization(tokenizer, **how).all(dataset.trees)


class PairTokenization(Tokenization):
    """Rows for an encoder: the bare texts in the encoder's own tokens, whichever model wrote them.

    Chat prompts become lines ``role: content``. A row longer than `max_length` (prompt, longest completion and special tokens) loses the
    start of its prompt, all of it if necessary, and only then the ends of its completions; both are counted. A tree's prompt ids end with
    the separator and its completion ids end the row: prompt + completion is the row that ``tokenizer(prompt, completion)`` gives.

    Args:
        truncation, on_bad_row, identical: as for `CausalTokenization`.

    Raises:
        ModelError: see `pair_format`. DataError (later): a bad row and ``on_bad_row="error"``.
    """

    template = "text pair"

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        truncation: str = "prompt_then_completion",
        on_bad_row: str = "error",
        identical: str = "bad_row",
    ) -> None:
        super().__init__(tokenizer, max_length, truncation, identical, on_bad_row)
        self.layout = pair_format(tokenizer)

    def render(self, tree: PromptTree) -> list[Rendered]:
        prompt = f"tools: {tree.tools}\n" * bool(tree.tools) + prompt_text(tree.prompt)
        return [Rendered(prompt, tuple(c.whole for c in tree.completions))]

    def fit_row(self, source: str, prompt: Ids, completions: list[Ids], turns: Turns = ()) -> list[TokenTree]:
        layout = self.layout
        kept_prompt, kept_completions = cut_to_fit(prompt, completions, self.max_length - layout.specials)
        cut = tuple(len(k) < len(c) for k, c in zip(kept_completions, completions, strict=True))
        if self.truncation == "bad_row" and (any(cut) or len(kept_prompt) < len(prompt)):
            raise RowError(f"it has more than max_length {self.max_length} tokens", "raise data.max_length")
        self.check_different(kept_completions, any(cut))
        self.mark = Mark.CUT_PROMPT * (len(kept_prompt) < len(prompt)) | Mark.CUT_COMPLETION * any(cut)
        prompt_ids = [*layout.before, *kept_prompt, *layout.between]
        return [_tree(source, prompt_ids, [[*k, *layout.after] for k in kept_completions], cut)]


def cut_to_fit(prompt: Ids, completions: Sequence[Ids], max_tokens: int) -> tuple[Ids, list[Ids]]:
    """Cut prompt and completions to `max_tokens` tokens: first the start of the prompt, then the ends of the completions."""
    longest = max(map(len, completions), default=0)
    keep = min(len(prompt), max(0, max_tokens - longest))
    return prompt[len(prompt) - keep :], [c[:max_tokens] for c in completions]


def same_tokens(a: Any, b: Any, *, template: bool = True) -> bool:
    """Whether two tokenizers turn every text into the same ids: compares all of their definition but padding and truncation.

    Args:
        template: compare the chat templates too.
    """
    return _definition(a, template) == _definition(b, template)


def only_padding(tokenizer: Any) -> int | None:
    """The id of a token that only pads rows and so never stands in a text; None if padding has no token of its own."""
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    return tokenizer.pad_token_id if tokenizer.pad_token_id not in used else None


def _definition(tokenizer: Any, template: bool) -> object:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(tokenizer.get_vocab().items())
    definition, padding = json.loads(backend.to_str()), only_padding(tokenizer)
    settings = {k: v for k, v in definition.items() if k not in ("padding", "truncation", "added_tokens")}
    added = [t for t in definition.get("added_tokens", []) if t["id"] != padding]
    chat_template = getattr(tokenizer, "chat_template", None) if template else None
    return settings, added, tokenizer.bos_token_id, tokenizer.eos_token_id, chat_template

"""Prompt trees to token trees: templates, boundaries, BOS and EOS, truncation; text pairs for encoders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from penchant.data.layouts import RowError
from penchant.data.load import IDENTICAL, Dataset, Quarantined, prompt_json, prompt_text
from penchant.data.mapped import StoredTokens
from penchant.errors import ConfigError, DataError, ModelError
from penchant.types import PromptTree, TokenTree

# ---------------------------------------------------------------------------------------------------------------------
# templates: the tokenizer's chat template where there is one, plain text otherwise


PLAIN_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}

CUT_PROMPT, CUT_COMPLETION, SPLIT, ASIDE, MOVED = 1, 2, 4, 8, 16  # what can happen to a row: its mark is the sum


class Rendered(NamedTuple):
    """A row as text. `mark` is MOVED where the chat template renders the prompt differently once an answer follows."""

    prompt: str
    completions: tuple[str, ...]
    mark: int = 0


def renderer(
    template: str, tokenizer: Any, kind: str, options: Mapping[str, Any] | None = None, *, strict: bool = True
) -> tuple[Callable[[PromptTree], Rendered], str]:
    """The function that turns a tree into (prompt text, completion texts), and its name.

    ``auto`` is the chat template where the tokenizer has one; plain documents (kind ``text``) never get a template.

    Args:
        options: handed to the chat template, e.g. ``{"enable_thinking": False}``; strict: see `chat`.

    Raises:
        ConfigError: ``chat`` was asked for and the tokenizer has no chat template; or options without a chat template.
    """
    has_chat = getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not has_chat:
        raise ConfigError("data.template", "the tokenizer has no chat template", "set data.template=plain or auto")
    if kind == "text" or template == "plain" or not has_chat:
        if options:
            raise ConfigError(
                "data.template_options", "no chat template is used that could take them", "leave them out"
            )
        return plain, "plain"
    return lambda tree: chat(tree, tokenizer, options, strict=strict), "chat"


def plain(tree: PromptTree) -> Rendered:
    """Text prompts as they are; chat prompts as a ``\\n\\nHuman: ...\\n\\nAssistant:`` transcript."""
    texts = tuple(c.text for c in tree.completions)
    if isinstance(tree.prompt, str):
        return Rendered(tree.prompt, texts)
    turns = "".join(f"\n\n{PLAIN_NAMES[m.role]}: {m.content}" for m in tree.prompt)
    return Rendered(f"{turns}\n\nAssistant:", tuple(f" {t.lstrip()}" for t in texts))


def chat(
    tree: PromptTree, tokenizer: Any, options: Mapping[str, Any] | None = None, *, strict: bool = True
) -> Rendered:
    """The tokenizer's chat template; a text prompt is one user turn.

    The prompt is what the template writes for generation. Where that is not how the whole conversation begins (a template that
    opens a thought, or moves the system text), the prompt ends where both begin to differ, or the answer is put behind the
    prompt for generation; such rows are counted.

    Args:
        strict: False takes answers as the template changes them: what a model wrote is no bad row.

    Raises:
        RowError: the template refuses the turns or leaves out a part of an answer, or the prompt is answered already.
    """
    asked = prompt_json(tree.prompt)
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if strict and turns and turns[-1]["role"] == "assistant":
        raise RowError(
            f"the prompt ends with an assistant turn ({_short(turns[-1]['content'])}), so the answer would follow an answer",
            "let the prompt end with what is to be answered",
        )

    def render(more: Sequence[Mapping[str, Any]], generate: bool) -> str:
        found = tokenizer.apply_chat_template(
            [*turns, *more], tokenize=False, add_generation_prompt=generate, **(options or {})
        )
        return str(found)

    try:
        prompt = render((), True)
        wholes = [render(({"role": "assistant", "content": c.text},), False) for c in tree.completions]
        moved = not all(whole.startswith(prompt) for whole in wholes)
        unanswered = render((), False) if moved else ""
    except Exception as error:  # templates raise jinja errors of their own, e.g. for a system turn they do not know
        raise RowError(f"the chat template refuses it ({error})", "fix the turns or set data.template=plain") from error
    if moved and all(whole.startswith(unanswered) for whole in wholes):
        shared = os.path.commonprefix([prompt, *wholes])  # noqa: RUF071 (characters, not paths)
        word_end = re.match(r"(?s).*[\s>\])}:]", shared)  # "<" of "<think>" and of "<b>" is no place to stop
        prompt = shared[: max(len(unanswered), word_end.end() if word_end else 0)]
    elif moved:
        answers = [c.text.strip() for c in tree.completions]
        wholes = [prompt + _behind(prompt, whole, answer) for whole, answer in zip(wholes, answers, strict=True)]
    texts = tuple(whole[len(prompt) :] for whole in wholes)
    for text, c in zip(texts, tree.completions, strict=True):
        if strict and "".join(c.text.split()) not in "".join(text.split()):
            raise RowError(
                f"the chat template changes the answer: {_short(c.text)} becomes {_short(text)}",
                "take out of the answer what the template removes, set data.template_options, or use data.template=plain",
            )
    return Rendered(prompt, texts, MOVED * moved)


def _behind(prompt: str, whole: str, answer: str) -> str:
    """What follows the prompt's last words in a conversation that begins otherwise: a template that moves the system text."""
    at = whole.rfind(answer)
    for n in range(min(len(prompt), 32), 3, -1):
        found = whole.rfind(prompt[-n:], 0, max(at, 0))
        if found >= 0:
            return whole[found + n :]
    raise RowError(
        f"the chat template renders the prompt differently when an answer follows: {_short(prompt[-40:])} is not in {_short(whole)}",
        "set data.template_options to what makes both equal, or data.template=plain",
    )


def _short(text: str) -> str:
    """A text for a message: its start and its end."""
    return repr(text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}")


# ---------------------------------------------------------------------------------------------------------------------
# token trees: the boundary cannot move, BOS never doubles, EOS is there unless the text was cut


Ids = list[int]
CONTEXT = 64  # characters of the prompt's end with which a completion is encoded
CHUNK = 1024  # rows that are tokenized in one call; the tokenizer keeps about 100 bytes a token while it lasts


@dataclass(frozen=True, slots=True)
class TokenizedDataset:
    """Token trees and what happened on the way.

    Args:
        trees: accepted; total: trees given; quarantined: trees kept aside (``accepted + quarantined == total``, where a
            plain document that was split into chunks counts once).
        cut_prompts: sources of rows whose prompt lost its start; cut_completions: of rows with a completion that lost its end.
        split_documents: plain documents that became several chunks.
        moved_prompts: rows whose prompt the chat template renders differently once an answer follows (see `chat`).
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

    @property
    def accepted(self) -> int:
        return self.total - len(self.quarantined)

    def summary(self) -> str:
        """One line for the log."""
        trees = self.trees
        tokens = trees.total if isinstance(trees, StoredTokens) else sum(t.shared_tokens for t in trees)
        parts = [
            f"{self.total:,} rows = {self.accepted:,} tokenized + {len(self.quarantined):,} quarantined",
            f"{tokens:,} tokens",
        ]
        if self.split_documents:
            parts.append(f"{self.split_documents:,} long documents split into chunks")
        if self.moved_prompts:
            parts.append(f"{self.moved_prompts:,} prompts that the template renders differently once an answer follows")
        if self.cut_prompts:
            parts.append(f"{len(self.cut_prompts):,} prompts lost their start")
        if self.cut_completions:
            parts.append(f"{len(self.cut_completions):,} rows have a cut completion (no EOS)")
        return f"{self.template} template: " + ", ".join(parts)


def tokenize(dataset: Dataset, tokenizer: Any, **how: Any) -> TokenizedDataset:
    """Tokenize a data set; arguments and errors as for `tokenizing`."""
    making = tokenizing(tokenizer, dataset.kind, **how)
    return making.result(tuple(making.trees(dataset.trees)), len(dataset.trees))


def tokenizing(
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
) -> Tokenizing:
    """How the rows of a data set of this kind are tokenized.

    A completion's ids are those that the tokenizer gives it behind its prompt; where a token would span the boundary, it is
    split there, and prompt + completion must decode to the text. BOS stands once, at the start, where the tokenizer uses one;
    EOS once, at the end, unless the completion ends with another of `end_ids`. A row longer than `max_length` (prompt + longest completion) loses the start of its
    prompt first, down to half of `max_length`, then the ends of its completions; plain documents are split into chunks.

    Args:
        truncation: ``prompt_then_completion``, or ``bad_row`` to keep long rows aside.
        on_bad_row, identical: as for `load_preferences`; ``identical`` also for pairs that become equal by the cut.
        add_eos: False for a tokenizer without EOS.
        template_options: for the chat template; strict: False for what a model wrote, see `chat`.

    Raises:
        ModelError: the tokenizer has no EOS. DataError (later): a bad row and ``on_bad_row="error"``.
    """
    if add_eos and tokenizer.eos_token_id is None:
        raise ModelError(
            getattr(tokenizer, "name_or_path", "") or "tokenizer",
            "the tokenizer has no EOS token, so a model could not learn to stop",
            "set eos_token in its tokenizer_config.json",
        )
    render, name = renderer(template, tokenizer, kind, template_options, strict=strict)
    if kind == "scored":  # two answers with equal scores or texts are no pair
        identical = "keep"
    fitter = _Fitter(tokenizer, max_length, truncation, identical, add_eos, kind == "text")
    return Tokenizing(tokenizer, render, name, fitter, on_bad_row)


@dataclass(slots=True)
class Tokenizing:
    """Tokenizing as it goes on: trees come out one by one, what else is to be told is there at the end.

    Args:
        render: a tree to its texts; name: of that; fit: the ids of one row to its token trees.
    """

    tokenizer: Any
    render: Callable[[PromptTree], Rendered]
    name: str
    fit: _Fitter | _PairFitter
    on_bad_row: str
    row: int = 0
    aside: list[Quarantined] = field(default_factory=list)
    cut_prompts: list[str] = field(default_factory=list)
    cut_completions: list[str] = field(default_factory=list)
    split: int = 0
    moved: int = 0

    def trees(self, rows: Sequence[PromptTree]) -> Iterator[TokenTree]:
        """All trees, in order."""
        for made, _ in self.by_row(rows):
            yield from made

    def by_row(self, rows: Sequence[PromptTree]) -> Iterator[tuple[list[TokenTree], int]]:
        """The trees of each row, in order, and what happened to it: its mark.

        `CHUNK` rows at a time are rendered and given to the tokenizer, which uses all cores.
        """
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            rendered = [_try(self.render, tree) for tree in part]
            encoded = self.fit.encode(rendered)
            for tree, texts, ids in zip(part, rendered, encoded, strict=True):
                self.fit.mark = 0 if isinstance(texts, RowError) else texts.mark
                made = self._row(tree, ids)
                self.cut_prompts += [tree.source] * bool(self.fit.mark & CUT_PROMPT)
                self.cut_completions += [tree.source] * bool(self.fit.mark & CUT_COMPLETION)
                self.split += bool(self.fit.mark & SPLIT)
                self.moved += self.fit.mark & (MOVED | ASIDE) == MOVED
                yield made, self.fit.mark

    def _row(self, tree: PromptTree, ids: tuple[Ids, list[Ids]] | RowError) -> list[TokenTree]:
        try:
            if isinstance(ids, RowError):
                raise ids
            made = self.fit(tree.source, *ids)
        except RowError as error:
            if self.on_bad_row == "error":
                raise DataError(tree.source, error.what, f"{error.how} (or set data.on_bad_row=skip)") from error
            self.aside.append(Quarantined(tree.source, error.what, error.how, raw_row(tree)))
            self.fit.mark |= ASIDE
            return []
        labels, scores = tuple(c.label for c in tree.completions), tuple(c.score for c in tree.completions)
        first, self.row = self.row, self.row + len(made)
        return [replace(one, row=first + i, labels=labels, scores=scores) for i, one in enumerate(made)]

    def result(self, trees: Sequence[TokenTree], total: int) -> TokenizedDataset:
        """The whole, when all trees have come out."""
        cut = tuple(self.cut_prompts), tuple(self.cut_completions)
        return TokenizedDataset(trees, total, tuple(self.aside), *cut, self.split, self.name, self.moved)


def _try(render: Any, tree: PromptTree) -> Rendered | RowError:
    try:
        result: Rendered = render(tree)
        return result
    except RowError as error:
        return error


Encoded = tuple[Ids, list[Ids]]


def encode_apart(tokenizer: Any, rendered: Sequence[Rendered | RowError]) -> list[Encoded | RowError]:
    """Prompts and completions as texts of their own, in one call of the fast tokenizer; equal texts are encoded once."""
    texts = list(dict.fromkeys(t for r in rendered if not isinstance(r, RowError) for t in (r.prompt, *r.completions)))
    by_text = dict(zip(texts, encode_texts(tokenizer, texts), strict=True))
    return [
        r if isinstance(r, RowError) else (by_text[r.prompt], [by_text[t] for t in r.completions]) for r in rendered
    ]


def encode_in_context(tokenizer: Any, rendered: Sequence[Rendered | RowError]) -> list[Encoded | RowError]:
    """Prompts, and completions as the tokenizer encodes them behind their prompt; equal texts are encoded once.

    A SentencePiece-type tokenizer puts a dummy space before a text of its own, which nothing puts there in context.
    """
    special = [t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values()]
    begins = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    contexts = {p: _end_of(p, begins) for p in {r.prompt: None for r in rendered if not isinstance(r, RowError)}}
    texts: dict[str, None] = {}
    for r in rendered:
        if not isinstance(r, RowError):
            context = contexts[r.prompt]
            texts |= dict.fromkeys((r.prompt, context, *(context + t for t in r.completions)))
    by_text = dict(zip(texts, encode_texts(tokenizer, list(texts)), strict=True))

    def encoded(r: Rendered | RowError) -> Encoded | RowError:
        if isinstance(r, RowError):
            return r
        context, found = contexts[r.prompt], []
        before = by_text[context]
        for text in r.completions:
            whole = by_text[context + text]
            if whole[: len(before)] == before:
                found.append(whole[len(before) :])
                continue
            completion = _split_at(tokenizer, before, whole, context, text)
            if completion is None:
                return RowError(
                    f"prompt and answer do not decode to their text: {_short(context)} and {_short(text)}",
                    "move white space between the prompt's end and the answer's start",
                )
            found.append(completion)
        return by_text[r.prompt], found

    return [encoded(r) for r in rendered]


def _end_of(prompt: str, begins: re.Pattern[str]) -> str:
    """The end of a prompt on which the ids behind it depend: from its last special token or, in plain text, a word's start."""
    if len(prompt) <= CONTEXT:
        return prompt
    tail = prompt[-CONTEXT:]
    specials = [m.start() for m in begins.finditer(tail)]
    word = re.search(r"\s\S", tail)
    return tail[specials[-1] :] if specials else tail[word.start() :] if word else tail


def _split_at(tokenizer: Any, before: Ids, whole: Ids, context: str, text: str) -> Ids | None:
    """The ids of `text` behind `context`, whose ids are `before`, where `whole`, those of both, do not begin with them.

    Either the context alone is encoded differently and a token begins at the boundary all the same, or a token spans it: then the
    text is encoded behind something else. What is found must decode to the whole; None where nothing does.
    """
    candidates = []
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(context + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        at = next((i for i, (start, _) in enumerate(offsets["offset_mapping"]) if start >= len(context)), len(whole))
        candidates.append(whole[at:])
    for anchor in ("\n", ".", tokenizer.eos_token or "", ""):
        head, both = encode_texts(tokenizer, [anchor, anchor + text])
        if both[: len(head)] == head:
            candidates.append(both[len(head) :])
    how = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    wanted = tokenizer.decode(whole, **how)
    return next((c for c in candidates if tokenizer.decode([*before, *c], **how) == wanted), None)


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


def end_ids(tokenizer: Any, model: Any = None) -> frozenset[int]:
    """The ids that end an answer: one definition for training, sampling, evaluation, chat and serving.

    The tokenizer's EOS; the special token that its chat template writes behind an answer; and those of the model's generation
    config that are special tokens (a model's end of turn).
    """
    found = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i: token.content for i, token in added.items() if token.special}
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = [named] if isinstance(named, int) else list(named or ())
    found |= {i for i in named if i in special or i in tokenizer.all_special_ids}
    behind = _behind_an_answer(tokenizer)
    return frozenset(found | {i for i, content in special.items() if behind.startswith(content)})


def _behind_an_answer(tokenizer: Any) -> str:
    """What the chat template writes behind an answer; nothing without a template, or with one that takes no such turns."""
    if getattr(tokenizer, "chat_template", None) is None:
        return ""
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Zebra4711."}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("Zebra4711.")[2].lstrip()
    except Exception:  # a template's own jinja errors; `chat` reports them row by row
        return ""


class _Fitter:
    """Specials and length: the texts of one row to its token tree (several for a split document)."""

    def __init__(
        self, tokenizer: Any, max_length: int, truncation: str, identical: str, add_eos: bool, text: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id if uses_bos(tokenizer) else None
        self.bos_id, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id if add_eos else None
        self.max_length, self.truncation, self.identical, self.text = max_length, truncation, identical, text
        self.ends = end_ids(tokenizer)
        self.end_texts = tuple(tokenizer.convert_ids_to_tokens(sorted(self.ends)))
        self.mark = 0  # of the row in hand

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
            prompt, completions, cut = self._cut(prompt, completions, longest)
        if self.identical != "keep":
            _check_different(completions, any(cut), self.max_length)
        return [_tree(source, prompt, completions, cut)]

    def encode(self, rendered: Sequence[Rendered | RowError]) -> list[Encoded | RowError]:
        """Ids of the texts, each ended once."""
        ended = [
            r if isinstance(r, RowError) else r._replace(completions=tuple(map(self._ended_once, r.completions)))
            for r in rendered
        ]
        return encode_in_context(self.tokenizer, ended)

    def _ended_once(self, text: str) -> str:
        """A completion without what stands behind its end: a template's white space, an end of the row's own beside the template's."""
        whole = text
        while (bare := text.rstrip()).endswith(self.end_texts):
            end = next(e for e in self.end_texts if bare.endswith(e))
            whole, text = bare, bare[: -len(end)]
        return whole

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
        """An end, once."""
        if self.eos is None or (completion and completion[-1] in self.ends):
            return completion
        return [*completion, self.eos]

    def _cut(self, prompt: Ids, completions: list[Ids], longest: int) -> tuple[Ids, list[Ids], tuple[bool, ...]]:
        if self.truncation == "bad_row":
            tokens = f"{len(prompt) + longest} tokens"
            raise RowError(f"{tokens} are more than max_length {self.max_length}", "raise data.max_length")
        keep = min(len(prompt), max(self.max_length - longest, self.max_length // 2))
        if keep < len(prompt):
            bos = prompt[:1] if prompt[0] == self.bos_id else []
            prompt = [*bos, *prompt[len(prompt) - keep + len(bos) :]]
            self.mark |= CUT_PROMPT
        room = self.max_length - len(prompt)
        if room < 1:
            what = f"max_length {self.max_length} leaves no room for a completion token"
            raise RowError(what, "raise data.max_length")
        cut = tuple(len(c) > room for c in completions)
        self.mark |= CUT_COMPLETION * any(cut)
        return prompt, [c[:room] for c in completions], cut

    def _chunks(self, source: str, prompt: Ids, document: Ids) -> list[TokenTree]:
        room = self.max_length - len(prompt)
        parts = [document[i : i + room] for i in range(0, len(document), room)]
        self.mark |= SPLIT * (len(parts) > 1)
        return [_tree(source, prompt, [part], (i < len(parts) - 1,)) for i, part in enumerate(parts)]


def _check_different(completions: Sequence[Ids], cut: bool, max_length: int) -> None:
    """Refuses a pair whose answers are the same tokens."""
    if len(completions) == 2 and completions[0] == completions[1]:
        where = f"after the cut to {max_length} tokens" if cut else "in tokens"
        raise RowError(f"{IDENTICAL} {where}", "raise data.max_length, drop it, or set data.identical=keep")


def _tree(source: str, prompt: Ids, completions: list[Ids], cut: tuple[bool, ...]) -> TokenTree:
    arrays = tuple(np.array(c, dtype=np.int32) for c in completions)
    return TokenTree(0, np.array(prompt, dtype=np.int32), arrays, cut, source)


def raw_row(tree: PromptTree) -> dict[str, Any]:
    """A tree as a row of a quarantine file."""
    return {"prompt": prompt_json(tree.prompt), "completions": [c.text for c in tree.completions]}


# ---------------------------------------------------------------------------------------------------------------------
# encoders: prompt and completion as the text pair that a BERT-type model was trained on


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


def tokenize_text_pairs(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int,
    truncation: str = "prompt_then_completion",
    on_bad_row: str = "error",
    identical: str = "bad_row",
) -> TokenizedDataset:
    """Tokenize a data set for an encoder: the texts themselves, with its own tokenizer, whatever model wrote them.

    Chat prompts become lines ``role: content``. A row longer than `max_length` (prompt, longest completion and special tokens) loses the
    start of its prompt, all of it if need be, and only then the ends of its completions; both are counted.

    Args:
        truncation, on_bad_row, identical: as for `tokenize`.

    Returns:
        Trees whose prompt ids end with the separator and whose completion ids end the row: prompt + completion is the row that
        ``tokenizer(prompt, completion)`` gives.

    Raises:
        DataError: a bad row and ``on_bad_row="error"``.
    """
    fitter = _PairFitter(tokenizer, pair_format(tokenizer), max_length, truncation, identical)
    making = Tokenizing(tokenizer, _as_they_are, "text pair", fitter, on_bad_row)
    return making.result(tuple(making.trees(dataset.trees)), len(dataset.trees))


def _as_they_are(tree: PromptTree) -> Rendered:
    return Rendered(prompt_text(tree.prompt), tuple(c.text for c in tree.completions))


@dataclass(slots=True)
class _PairFitter:
    """Ids of one row to its token tree, as the tokenizer lays out a pair."""

    tokenizer: Any
    layout: PairFormat
    max_length: int
    truncation: str
    identical: str
    mark: int = 0  # of the row in hand

    def encode(self, rendered: Sequence[Rendered | RowError]) -> list[Encoded | RowError]:
        return encode_apart(self.tokenizer, rendered)

    def __call__(self, source: str, prompt: Ids, completions: list[Ids]) -> list[TokenTree]:
        layout = self.layout
        kept_prompt, kept = fit(prompt, completions, self.max_length - layout.specials)
        cut = tuple(len(k) < len(c) for k, c in zip(kept, completions, strict=True))
        if self.truncation == "bad_row" and (any(cut) or len(kept_prompt) < len(prompt)):
            raise RowError(f"it has more than max_length {self.max_length} tokens", "raise data.max_length")
        if self.identical != "keep":
            _check_different(kept, any(cut), self.max_length)
        self.mark = CUT_PROMPT * (len(kept_prompt) < len(prompt)) | CUT_COMPLETION * any(cut)
        before = [*layout.before, *kept_prompt, *layout.between]
        return [_tree(source, before, [[*k, *layout.after] for k in kept], cut)]


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

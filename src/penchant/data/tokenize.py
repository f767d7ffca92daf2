"""Prompt trees to token trees: templates, boundaries, BOS and EOS, truncation; text pairs for encoders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from penchant.data.layouts import RowError
from penchant.data.load import IDENTICAL, Dataset, Quarantined, prompt_json, prompt_text
from penchant.data.mapped import StoredTokens
from penchant.errors import ConfigError, DataError, ModelError
from penchant.types import PromptTree, TokenTree

# ---------------------------------------------------------------------------------------------------------------------
# templates: the tokenizer's chat template where there is one, plain text otherwise


PLAIN_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}

Rendered = tuple[str, tuple[str, ...]]


def renderer(template: str, tokenizer: Any, kind: str) -> tuple[Callable[[PromptTree], Rendered], str]:
    """The function that turns a tree into (prompt text, completion texts), and its name.

    ``auto`` is the chat template where the tokenizer has one; plain documents (kind ``text``) never get a template.

    Raises:
        ConfigError: ``chat`` was asked for and the tokenizer has no chat template.
    """
    has_chat = getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not has_chat:
        raise ConfigError("data.template", "the tokenizer has no chat template", "set data.template=plain or auto")
    if kind == "text" or template == "plain" or not has_chat:
        return plain, "plain"
    return lambda tree: chat(tree, tokenizer), "chat"


def plain(tree: PromptTree) -> Rendered:
    """Text prompts as they are; chat prompts as a ``\\n\\nHuman: ...\\n\\nAssistant:`` transcript."""
    texts = tuple(c.text for c in tree.completions)
    if isinstance(tree.prompt, str):
        return tree.prompt, texts
    turns = "".join(f"\n\n{PLAIN_NAMES[m.role]}: {m.content}" for m in tree.prompt)
    return f"{turns}\n\nAssistant:", tuple(f" {t.lstrip()}" for t in texts)


def chat(tree: PromptTree, tokenizer: Any) -> Rendered:
    """The tokenizer's chat template; a text prompt is one user turn. The prompt's text must be a prefix of the whole."""
    asked = prompt_json(tree.prompt)
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    try:
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        wholes = [
            tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": c.text}], tokenize=False)
            for c in tree.completions
        ]
    except Exception as error:  # templates raise jinja errors of their own, e.g. for a system turn they do not know
        raise RowError(f"the chat template refuses it ({error})", "fix the turns or set data.template=plain") from error
    for whole in wholes:
        if not whole.startswith(prompt):
            raise RowError("the chat template changes the prompt when an answer follows", "set data.template=plain")
    return prompt, tuple(whole[len(prompt) :] for whole in wholes)


# ---------------------------------------------------------------------------------------------------------------------
# token trees: the boundary cannot move, BOS never doubles, EOS is there unless the text was cut


Ids = list[int]
CHUNK = 1024  # rows that are tokenized in one call; the tokenizer keeps about 100 bytes a token while it lasts
CUT_PROMPT, CUT_COMPLETION, SPLIT, ASIDE = 1, 2, 4, 8  # what can happen to a row: its mark is the sum


@dataclass(frozen=True, slots=True)
class TokenizedDataset:
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
            f"{self.total:,} rows = {self.accepted:,} tokenized + {len(self.quarantined):,} quarantined",
            f"{tokens:,} tokens",
        ]
        if self.split_documents:
            parts.append(f"{self.split_documents:,} long documents split into chunks")
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
) -> Tokenizing:
    """How the rows of a data set of this kind are tokenized.

    Prompt and completion are tokenized apart and joined as ids, so that no token spans the boundary. BOS stands once, at the
    start, where the tokenizer uses one. A row longer than `max_length` (prompt + longest completion) loses the start of its
    prompt first, down to half of `max_length`, then the ends of its completions; plain documents are split into chunks.

    Args:
        truncation: ``prompt_then_completion``, or ``bad_row`` to keep long rows aside.
        on_bad_row, identical: as for `load_preferences`; ``identical`` also for pairs that become equal by the cut.
        add_eos: False for a tokenizer without EOS.

    Raises:
        ModelError: the tokenizer has no EOS. DataError (later): a bad row and ``on_bad_row="error"``.
    """
    if add_eos and tokenizer.eos_token_id is None:
        raise ModelError(
            getattr(tokenizer, "name_or_path", "") or "tokenizer",
            "the tokenizer has no EOS token, so a model could not learn to stop",
            "set eos_token in its tokenizer_config.json",
        )
    render, name = renderer(template, tokenizer, kind)
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
            encoded = _encode(self.tokenizer, [_try(self.render, tree) for tree in part])
            for tree, ids in zip(part, encoded, strict=True):
                self.fit.mark = 0
                made = self._row(tree, ids)
                self.cut_prompts += [tree.source] * bool(self.fit.mark & CUT_PROMPT)
                self.cut_completions += [tree.source] * bool(self.fit.mark & CUT_COMPLETION)
                self.split += bool(self.fit.mark & SPLIT)
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
        return TokenizedDataset(trees, total, tuple(self.aside), *cut, self.split, self.name)


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


def _white_space_ids(tokenizer: Any) -> frozenset[int]:
    ids = (tokenizer(s, add_special_tokens=False)["input_ids"] for s in ("\n", "\n\n", " ", " \n"))
    return frozenset(i[0] for i in ids if len(i) == 1 and i[0] != tokenizer.eos_token_id)


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
    fitter = _PairFitter(pair_format(tokenizer), max_length, truncation, identical)
    making = Tokenizing(tokenizer, _as_they_are, "text pair", fitter, on_bad_row)
    return making.result(tuple(making.trees(dataset.trees)), len(dataset.trees))


def _as_they_are(tree: PromptTree) -> Rendered:
    return prompt_text(tree.prompt), tuple(c.text for c in tree.completions)


@dataclass(slots=True)
class _PairFitter:
    """Ids of one row to its token tree, as the tokenizer lays out a pair."""

    layout: PairFormat
    max_length: int
    truncation: str
    identical: str
    mark: int = 0  # of the row in hand

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

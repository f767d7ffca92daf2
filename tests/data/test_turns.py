"""Conversations with several trained answers: which tokens are trained, and their loss."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from rows import from_rows
from tiny import tiny_tokenizer

from penchant.data.cached import DataCache
from penchant.data.layouts.page import preview
from penchant.data.load import load_preferences
from penchant.data.mapped import RowWriter, StoredRows, StoredTokens, TokenWriter
from penchant.data.packing import pack
from penchant.data.tokenize import TokenizedDataset, tokenize
from penchant.download.convert import WRITERS
from penchant.errors import DataError
from penchant.logprobs import Scorer
from penchant.logprobs.reference import hash_trees
from penchant.models.folder import bound_templates
from penchant.types import TokenTree

TALK = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yo."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "Five."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Four."},
]


def _template(answer: str) -> str:
    """Turns of a role, a text and an end token, each followed by a line break that is not trained."""
    return (
        "{% for m in messages %}{{ '<s>' + m.role + ':' }}{% if m.role == 'assistant' %}" + answer + "{% else %}"
        "{{ m.content + '</s>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
    )


TAGGED = _template("{% generation %}{{ m.content + '</s>' }}{% endgeneration %}")
END_OUTSIDE = _template("{% generation %}{{ m.content }}{% endgeneration %}{{ '</s>' }}")
UNTAGGED = _template("{{ m.content + '</s>' }}")
CUTS_THOUGHTS = _template(
    "{% set answer = m.content if loop.last else m.content.split('</think>')[-1] %}{{ answer + '</s>' }}"
)
EMPTY_THOUGHT_LAST = _template("{{ ('<think></think>' if loop.last else '') + m.content + '</s>' }}")  # Qwen3's
ENDS_ONCE = _template("{{ m.content + ('</s>' if loop.last else '') }}")


def _tokenizer(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _learned(
    template: str | None, talk: list[dict[str, Any]] = TALK, turns: str = "all", **how: Any
) -> tuple[Any, TokenizedDataset]:
    tokenizer = _tokenizer(template)
    rows = from_rows([{"messages": talk}], layout_options={"turns": turns})
    return tokenizer, tokenize(rows, tokenizer, **{"max_length": 512, **how})


def _trained(tokenizer: Any, tree: TokenTree) -> list[str]:
    """The spans of trained tokens as text."""
    (ids,), mask = tree.completion_ids, tree.masks[0] if tree.masks else np.ones(len(tree.completion_ids[0]), bool)
    runs: list[list[int]] = []
    for i, (token, on) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        if on and (not i or not mask[i - 1]):
            runs.append([])
        if on:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("bounded", [False, True])
def test_tagged_templates_are_trained_where_transformers_says(bounded: bool) -> None:
    """Compared token by token. The template's last line break is not trained."""
    if bounded:
        bound_templates()  # as for every tokenizer of a run
    tokenizer, made = _learned(TAGGED)
    (tree,) = made.trees
    told = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    ids = [*tree.prompt_ids.tolist(), *tree.completion_ids[0].tolist()]
    mask = [0] * len(tree.prompt_ids) + tree.masks[0].astype(int).tolist()
    assert sum(told["assistant_masks"]) == len("Yo.Five.Four.") + 3
    assert ids == told["input_ids"][:-1] and mask == told["assistant_masks"][:-1] and made.apart == 0


@pytest.mark.parametrize("template", [TAGGED, END_OUTSIDE, UNTAGGED])
def test_every_answer_is_trained_with_its_end_once(template: str) -> None:
    tokenizer, made = _learned(template)
    (tree,) = made.trees
    assert _trained(tokenizer, tree) == ["Yo.</s>", "Five.</s>", "Four.</s>"]
    assert tokenizer.decode(tree.prompt_ids) == "<s>system:Be terse.</s>\n<s>user:Hi?</s>\n<s>assistant:"
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode([*tree.prompt_ids, *tree.completion_ids[0]]) == whole.rstrip("\n")
    assert made.apart == 0 and tree.trained == (len("Yo.Five.Four.") + 3,)


@pytest.mark.parametrize(
    ("answer", "opened", "learned", "moved"),
    [
        ("{% generation %}{{ '<think></think>' + m.content + '</s>' }}", "<think>", "</think>", 0),
        ("{% generation %}{{ '<think></think>' + m.content + '</s>' }}", "<think>\n", "</think>", 1),
        ("{% generation %}{{ '<think></think>' + m.content + '</s>' }}", "<think></think>", "", 0),
        ("{% generation %}{{ m.content + '</s>' }}", "", "", 0),
    ],
)
def test_what_the_prompt_opens_within_the_tags_is_not_learned(
    answer: str, opened: str, learned: str, moved: int
) -> None:
    """With one answer or several, since the model never has to write it."""
    template = _template(answer + "{% endgeneration %}").replace(
        "'<s>assistant:' }}{% endif %}", f"'<s>assistant:{opened}' }}}}{{% endif %}}".replace("\n", "\\n")
    )
    for talk, wanted in ((TALK, ["Yo.</s>", "Five.</s>", "Four.</s>"]), (TALK[:3], ["Yo.</s>"])):
        tokenizer, made = _learned(template, talk)
        assert _trained(tokenizer, made.trees[0]) == [learned + text for text in wanted]
        assert tokenizer.decode(made.trees[0].prompt_ids).endswith(f"<s>assistant:{opened.strip()}")
        assert (made.moved_prompts, made.forced_prompts, made.apart) == (moved, 0, 0)


def test_answers_that_share_other_parts_of_what_the_prompt_opens_have_one_prompt() -> None:
    template = TAGGED.replace("'<s>assistant:' }}{% endif %}", "'<s>assistant:<think> ' }}{% endif %}")
    said = {}
    for name, texts in (("chosen", ("<think> Hm.", "Yes.")), ("rejected", ("<think>Bah.", "No."))):
        said[name] = [*TALK[:2], {"role": "assistant", "content": texts[0]}, TALK[3]]
        said[name].append({"role": "assistant", "content": texts[1]})
    tokenizer = _tokenizer(template)
    (tree,) = tokenize(from_rows([said]), tokenizer, max_length=512).trees
    assert tokenizer.decode(tree.prompt_ids).endswith("<s>assistant:<think>")
    learned = [tokenizer.decode(ids[mask]) for ids, mask in zip(tree.completion_ids, tree.masks, strict=True)]
    assert learned == [" Hm.</s>Yes.</s>", "Bah.</s>No.</s>"]


@pytest.mark.parametrize("flags", [{"weight": 0}, {"train": False}, {"training": False}])
def test_flags_of_turns_are_honored(flags: dict[str, Any]) -> None:
    """Flags of OpenAI and Mistral (weight), and Axolotl (train, training)."""
    talk = [dict(turn) for turn in TALK]
    talk[4] |= flags
    tokenizer, made = _learned(UNTAGGED, talk)
    assert _trained(tokenizer, made.trees[0]) == ["Yo.</s>", "Four.</s>"]
    talk[2] |= flags  # an answer before the first trained one is part of the prompt
    tokenizer, made = _learned(UNTAGGED, talk)
    assert _trained(tokenizer, made.trees[0]) == ["Four.</s>"]
    assert "Five." in tokenizer.decode(made.trees[0].prompt_ids) and made.trees[0].masks == ()
    talk[2].pop(next(iter(flags)))
    talk[6] |= flags  # and turns after the last one are not read
    tokenizer, made = _learned(UNTAGGED, talk)
    assert _trained(tokenizer, made.trees[0]) == ["Yo.</s>"]


def test_a_template_that_rewrites_earlier_turns_has_each_answer_learned_as_it_is_asked_for() -> None:
    talk = [dict(turn) for turn in TALK]
    talk[2]["content"] = "<think>hm</think>Yo."
    tokenizer, made = _learned(CUTS_THOUGHTS, talk)
    assert [_trained(tokenizer, t) for t in made.trees] == [["<think>hm</think>Yo.</s>"], ["Five.</s>"], ["Four.</s>"]]
    assert "<s>assistant:Yo.</s>" in tokenizer.decode(made.trees[1].prompt_ids)
    assert made.apart == 1 and "1 conversation learned answer by answer" in made.summary()
    assert made.accepted == made.total == 1
    assert _learned(CUTS_THOUGHTS)[1].apart == 0  # nothing was removed from these


def test_a_prompt_that_the_template_writes_otherwise_later_is_learned_from_as_it_is_asked() -> None:
    """With texts of the same length, such as a count or a date, so that only the text itself differs."""
    questions = "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    tokenizer, made = _learned(questions + UNTAGGED)
    assert [tokenizer.decode(t.prompt_ids[:1]) for t in made.trees] == ["1", "2", "3"] and made.apart == 1


def test_a_template_that_writes_the_last_turn_otherwise_has_each_answer_learned_as_the_last() -> None:
    tokenizer, made = _learned(EMPTY_THOUGHT_LAST)
    texts = ["<think></think>Yo.</s>", "<think></think>Five.</s>", "<think></think>Four.</s>"]
    assert [_trained(tokenizer, t) for t in made.trees] == [[text] for text in texts] and made.apart == 1


@pytest.mark.parametrize("template", [ENDS_ONCE, None])
def test_where_turns_have_no_end_each_answer_is_learned_with_its_own(template: str | None) -> None:
    tokenizer, made = _learned(template)
    assert [_trained(tokenizer, t)[0].strip() for t in made.trees] == ["Yo.</s>", "Five.</s>", "Four.</s>"]


def test_a_cut_conversation_keeps_the_answers_that_fit() -> None:
    tokenizer, made = _learned(UNTAGGED, max_length=96)
    (tree,) = made.trees
    assert len(tree.prompt_ids) + len(tree.completion_ids[0]) <= 96 and tree.truncated == (True,)
    assert _trained(tokenizer, tree)[0] == "Yo.</s>" and len(made.cut_completions) == 1
    assert len(tree.masks[0]) == len(tree.completion_ids[0])


@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_is_the_models_own_over_the_trained_tokens(shared: bool) -> None:
    """Two conversations in one row, compared with `labels` that are -100 elsewhere, in fp64."""
    model = tiny_model("llama")
    tokenizer = _tokenizer(TAGGED)
    rows = [{"messages": TALK}, {"messages": TALK[3:]}]
    trees = tokenize(from_rows(rows, layout_options={"turns": "all"}), tokenizer, max_length=512).trees
    vocab = model.config.vocab_size
    trees = [
        TokenTree(i, t.prompt_ids % vocab, (t.completion_ids[0] % vocab,), t.truncated, masks=t.masks)
        for i, t in enumerate(trees)
    ]
    batch = pack(trees, shared=shared)
    model.zero_grad()
    found = Scorer(model, "shared" if shared else "separate").logps(batch)
    (-found.sums.sum() / batch.lengths.sum()).backward()
    mine = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    nats, tokens = torch.zeros((), dtype=torch.float64), 0
    for talk, tree in zip(rows, trees, strict=True):
        told = tokenizer.apply_chat_template(talk["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor(told["input_ids"]) % vocab
        on = torch.tensor(told["assistant_masks"], dtype=torch.bool)
        labels = torch.where(on, ids, -100)[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1]  # its own `loss` would use float32
        nats = nats + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        tokens += int(on.sum())
        assert tree.trained == (int(on.sum()),)
    (nats / tokens).backward()
    assert found.sums.sum().item() == pytest.approx(-nats.item(), rel=1e-12) and batch.lengths.sum() == tokens
    assert torch.allclose(mine, model.get_input_embeddings().weight.grad, rtol=1e-9, atol=1e-14)


def test_all_at_once_is_what_each_by_itself_adds_up_to() -> None:
    tokenizer = _tokenizer(UNTAGGED)
    model = tiny_model("llama")
    of = {}
    for turns in ("all", "every"):
        made = tokenize(from_rows([{"messages": TALK}], layout_options={"turns": turns}), tokenizer, max_length=512)
        small = [
            TokenTree(i, t.prompt_ids % 90, (t.completion_ids[0] % 90,), t.truncated, masks=t.masks)
            for i, t in enumerate(made.trees)
        ]
        of[turns] = Scorer(model, "shared").logps(pack(small)).sums.sum().item()
        assert len(small) == (1 if turns == "all" else 3)
    assert of["all"] == pytest.approx(of["every"], rel=1e-12)


def test_masks_are_kept_on_disk_and_are_part_of_what_a_reference_depends_on(tmp_path: Path) -> None:
    tokenizer = _tokenizer(UNTAGGED)
    rows = from_rows([{"messages": TALK[:3]}, {"messages": TALK}], layout_options={"turns": "all"})
    trees = tokenize(rows, tokenizer, max_length=512).trees
    writer = TokenWriter(tmp_path)
    for tree in trees:
        writer.write(tree)
        writer.end_row(1, 0)
    writer.close()
    stored = StoredTokens(tmp_path)
    assert stored.masked and [t.trained for t in stored] == [t.trained for t in trees] == [(4,), (16,)]
    assert np.array_equal(stored[1].masks[0], trees[1].masks[0]) and stored[0].masks[0].all()
    assert stored.first_completions()[1].trained == (16,)
    digests = []
    for some in (stored, [TokenTree(0, t.prompt_ids, t.completion_ids, t.truncated) for t in trees]):
        digests.append(hashlib.sha256())
        hash_trees(digests[-1], some)
    assert digests[0].digest() != digests[1].digest()


def test_a_cached_file_gives_the_same_rows_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.data.cached.AUTO_BYTES", 0)
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in (TALK, TALK[:3], TALK[3:])))
    how: dict[str, Any] = {"layout_options": {"turns": "all"}}
    plain, kept = load_preferences(str(path), **how), DataCache().load(str(path), **how)
    assert tuple(kept.trees) == tuple(plain.trees) and kept.fingerprint == plain.fingerprint
    tokenizer = _tokenizer(CUTS_THOUGHTS)
    settings: dict[str, Any] = {
        "template": "auto", "template_options": {}, "max_length": 512, "truncation": "prompt_then_completion",
        "on_bad_row": "error", "identical": "bad_row", "add_eos": True,
    }  # fmt: skip
    made = DataCache().tokenize(kept, tokenizer, **settings)
    assert made.summary() == tokenize(plain, tokenizer, **settings).summary()
    assert [t.trained for t in made.trees] == [t.trained for t in tokenize(plain, tokenizer, **settings).trees]


def test_show_says_which_turns_are_learned(tmp_path: Path) -> None:
    talk = [dict(turn) for turn in TALK]
    talk[4]["weight"] = 0
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": talk}) + "\n")
    shown = preview(str(path), layout_options={"turns": "all"}).to_text()
    assert [line.strip() for line in shown.splitlines() if line.startswith("  ")] == [
        "system: Be terse.", "user: Hi?", "-> answer: Yo.", "user: 2+2?", "assistant (not learned): Five.", "user: Sure?",
        "-> answer: Four.",
    ]  # fmt: skip


def test_the_last_answer_stays_the_default() -> None:
    tokenizer, made = _learned(UNTAGGED, turns="last")
    assert [_trained(tokenizer, t) for t in made.trees] == [["Four.</s>"]]
    with pytest.raises(DataError, match="does not end with an assistant turn"):
        _learned(UNTAGGED, TALK[:-1])


# ---- reasoning in a separate field ----------------------------------------------------------------------------------------

WRITES_REASONING = _template(
    "{{ ('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m.content + '</s>' }}"
)
OF_THE_LAST_TURN = _template(
    "{{ ('<think>' + m.reasoning_content + '</think>' if m.reasoning_content and loop.last else '') + m.content + '</s>' }}"
)


def _thoughtful(name: str = "reasoning_content") -> list[dict[str, Any]]:
    talk = [dict(turn) for turn in TALK]
    talk[2][name], talk[6][name] = "A greeting.", "Count again."
    return talk


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_learned_where_the_template_writes_it(name: str) -> None:
    tokenizer, made = _learned(WRITES_REASONING, _thoughtful(name))
    first, last = "<think>A greeting.</think>Yo.</s>", "<think>Count again.</think>Four.</s>"
    assert _trained(tokenizer, made.trees[0]) == [first, "Five.</s>", last] and made.apart == 0
    tokenizer, made = _learned(WRITES_REASONING, _thoughtful(name), turns="last")
    assert _trained(tokenizer, made.trees[0]) == [last] and first in tokenizer.decode(made.trees[0].prompt_ids)
    tokenizer, made = _learned(OF_THE_LAST_TURN, _thoughtful(name))  # earlier turns are rendered without reasoning
    assert [_trained(tokenizer, t) for t in made.trees] == [[first], ["Five.</s>"], [last]] and made.apart == 1


def test_reasoning_that_the_template_leaves_out_makes_a_bad_row() -> None:
    with pytest.raises(DataError, match=r"leaves out the answer's reasoning.*A greeting"):
        _learned(UNTAGGED, _thoughtful())
    with pytest.raises(DataError, match="only a chat template"):
        _learned(None, _thoughtful(), turns="last")
    with pytest.raises(DataError, match="not text of an assistant"):
        _learned(UNTAGGED, [{**TALK[1], "thinking": "hm"}, TALK[2]])
    with pytest.raises(DataError, match="differ"):
        _learned(UNTAGGED, [TALK[1], {**TALK[2], "thinking": "hm", "reasoning_content": "oh"}])


def test_answers_of_a_pair_have_reasoning_of_their_own_and_are_written_with_it(tmp_path: Path) -> None:
    answers = [
        {"role": "assistant", "content": c, "reasoning_content": r} for c, r in (("Four.", "2+2"), ("Five.", "2+3"))
    ]
    row = {"prompt": [TALK[3]], "chosen": answers[:1], "rejected": answers[1:]}
    rows = from_rows([row])
    (tree,) = tokenize(rows, _tokenizer(WRITES_REASONING), max_length=256).trees
    texts = [_tokenizer(None).decode(c) for c in tree.completion_ids]
    assert texts == ["<think>2+2</think>Four.</s>", "<think>2+3</think>Five.</s>"]
    (written,) = WRITERS["pairs"](rows.trees[0])
    assert from_rows([written]).trees[0].completions == rows.trees[0].completions
    stored = RowWriter(tmp_path)
    stored.write(rows.trees)
    stored.close()
    assert tuple(StoredRows(tmp_path, "key")) == tuple(rows.trees)
    bare = {**row, "chosen": [{**answers[0], "reasoning_content": None}]}
    assert from_rows([bare]).fingerprint != rows.fingerprint

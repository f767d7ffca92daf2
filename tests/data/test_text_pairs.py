"""Text pairs for encoders: the tokenizer's own encoding, counted truncation, chat prompts, and what is cut first."""

from __future__ import annotations

import pytest
from encoders import encoder_tokenizer
from rows import from_rows
from tiny import tiny_tokenizer

from penchant.data.tokenize import cut_to_fit, pair_format, same_tokens, tokenize_text_pairs
from penchant.errors import DataError, ModelError


@pytest.mark.parametrize("style", ["bert", "roberta"])
def test_rows_are_the_tokenizers_own(style: str) -> None:
    prompt = "Why not?"
    tokenizer = encoder_tokenizer(style)
    data = from_rows([{"prompt": prompt, "chosen": "yes, it is", "rejected": "no"}])
    (tree,) = tokenize_text_pairs(data, tokenizer, max_length=64).trees
    for text, ids in zip(("yes, it is", "no"), tree.completion_ids, strict=True):
        assert [*tree.prompt_ids, *ids] == tokenizer(prompt, text)["input_ids"]
    layout = pair_format(tokenizer)
    assert layout.types == ((0, 1) if style == "bert" else None) and layout.pad == tokenizer.pad_token_id


def test_chat_prompts_are_lines() -> None:
    tokenizer = encoder_tokenizer()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    data = from_rows([{"prompt": messages, "chosen": "Hello", "rejected": "What"}])
    (tree,) = tokenize_text_pairs(data, tokenizer, max_length=64).trees
    assert [*tree.prompt_ids, *tree.completion_ids[0]] == tokenizer("system: Be kind.\nuser: Hi", "Hello")["input_ids"]


def test_the_prompt_loses_its_start_before_a_completion_loses_its_end() -> None:
    assert cut_to_fit([1, 2, 3, 4], [[5, 6], [7]], 10) == ([1, 2, 3, 4], [[5, 6], [7]])
    assert cut_to_fit([1, 2, 3, 4], [[5, 6], [7]], 4) == ([3, 4], [[5, 6], [7]])
    assert cut_to_fit([1, 2, 3, 4], [[5, 6, 8, 9, 10], [7]], 4) == ([], [[5, 6, 8, 9], [7]])


def test_cuts_are_counted_and_rows_that_become_equal_are_kept_aside() -> None:
    tokenizer = encoder_tokenizer()
    rows = [
        {"prompt": "p" * 20, "chosen": "abcd", "rejected": "ab"},
        {"prompt": "p", "chosen": "x" * 20, "rejected": "y"},
        {"prompt": "p", "chosen": "z" * 20 + "1", "rejected": "z" * 20 + "2"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    made = tokenize_text_pairs(from_rows(rows), tokenizer, max_length=16, on_bad_row="skip")
    assert made.cut_prompts == ("rows:1", "rows:2") and made.cut_completions == ("rows:2",)
    assert [q.where for q in made.quarantined] == ["rows:3"] and made.accepted == 3
    assert [t.truncated for t in made.trees] == [(False, False), (True, False), (False, False)]
    assert all(len(t.prompt_ids) + max(map(len, t.completion_ids)) <= 16 for t in made.trees)
    assert "1 row with a cut answer" in made.summary()
    with pytest.raises(DataError, match="more than max_length 16"):
        tokenize_text_pairs(from_rows(rows), tokenizer, max_length=16, truncation="bad_row")


def test_a_tokenizer_without_padding_is_refused() -> None:
    with pytest.raises(ModelError, match="padding token"):
        pair_format(tiny_tokenizer())


def test_same_tokens_looks_past_padding_alone() -> None:
    plain, padded, other = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer(chat=True)
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    padded(["a", "bc"], padding=True)
    assert same_tokens(plain, padded)
    assert not same_tokens(plain, other) and not same_tokens(plain, encoder_tokenizer())

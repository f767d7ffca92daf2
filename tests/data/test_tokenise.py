"""Tokenizing: the prompt boundary, BOS and EOS, truncation, and the audit that counts it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rows import from_rows
from tiny import tiny_tokenizer

from penchant.data.audit import audit
from penchant.data.split import split_by_prompt
from penchant.data.templates import end_ids
from penchant.data.tokenize import encode_texts, tokenize
from penchant.errors import ConfigError, DataError, ModelError

BOS, EOS = 0, 1


def _pair(prompt: str = "hello", chosen: str = "good", rejected: str = "bad") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _only(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> Any:
    return tokenize(from_rows(rows), tokenizer, **{"max_length": 64, **options}).trees[0]


@pytest.mark.parametrize("pad", [False, True])
def test_bos_once_eos_once(pad: bool) -> None:
    """Also if pad == eos: nothing is padded, so EOS is never masked."""
    tokenizer = tiny_tokenizer(pad=pad)
    tokenizer._tokenizer.post_processor = _bos_first()
    tree = _only([_pair()], tokenizer)
    assert tree.prompt_ids.tolist().count(BOS) == 1 and tree.prompt_ids[0] == BOS
    for ids, text in zip(tree.completion_ids, ("good", "bad"), strict=True):
        assert ids.tolist().count(EOS) == 1 and ids[-1] == EOS
        assert BOS not in ids
        assert tokenizer.decode(ids[:-1]) == text


def _bos_first() -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])


def test_a_tokenizer_that_does_not_add_bos_gets_none() -> None:
    assert BOS not in _only([_pair()], tiny_tokenizer()).prompt_ids


def test_chat_template_with_bos_and_eos_of_its_own_doubles_neither() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer._tokenizer.post_processor = _bos_first()
    tree = _only([_pair()], tokenizer)
    assert tokenizer.decode(tree.prompt_ids) == "<s>user: hello</s>\n<s>assistant: "
    assert tree.prompt_ids.tolist().count(BOS) == 2  # one per turn by the template, none added
    assert tokenizer.decode(tree.completion_ids[0]) == "good</s>"  # the line break after EOS is not part of it


def test_the_boundary_cannot_move() -> None:
    """A tokenizer with a merge across the boundary, where 'o' + 'g' would become one token if the texts were joined first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<s>", "</s>", *letters, "og"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("o", "g")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    assert len(tokenizer("og")["input_ids"]) == 1
    tree = _only([_pair("hello", "good")], tokenizer)
    assert tokenizer.decode(tree.prompt_ids) == "hello"
    assert tokenizer.decode(tree.completion_ids[0]) == "good</s>"


def test_no_room_cuts_the_prompts_start_first_then_the_ends() -> None:
    tokenizer = tiny_tokenizer()
    done = tokenize(from_rows([_pair("0123456789" * 3, "abcdef", "xy")]), tokenizer, max_length=20)
    tree = done.trees[0]
    assert tokenizer.decode(tree.prompt_ids) == "7890123456789"[-13:]
    assert tokenizer.decode(tree.completion_ids[0]) == "abcdef</s>"
    assert tree.truncated == (False, False)
    assert (len(done.cut_prompts), len(done.cut_completions)) == (1, 0)
    done = tokenize(from_rows([_pair("0123456789" * 3, "abcdefghijklmnop", "xy")]), tokenizer, max_length=20)
    tree = done.trees[0]
    assert len(tree.prompt_ids) == 10
    assert tokenizer.decode(tree.completion_ids[0]) == "abcdefghij"  # truncated, so no EOS is added
    assert tokenizer.decode(tree.completion_ids[1]) == "xy</s>"
    assert tree.truncated == (True, False)
    assert (len(done.cut_prompts), len(done.cut_completions)) == (1, 1)


def test_pairs_that_become_equal_by_the_cut_do_not_train() -> None:
    rows = [_pair("p" * 10, "same start, good end", "same start, bad end"), _pair()]
    with pytest.raises(DataError, match='"chosen" equals "rejected" after the cut'):
        tokenize(from_rows(rows), tiny_tokenizer(), max_length=12)
    done = tokenize(from_rows(rows), tiny_tokenizer(), max_length=12, on_bad_row="skip")
    assert (done.accepted, len(done.quarantined), done.total) == (1, 1, 2)
    kept = tokenize(from_rows(rows), tiny_tokenizer(), max_length=12, identical="keep")
    assert kept.accepted == 2


def test_long_rows_can_be_bad_rows() -> None:
    with pytest.raises(DataError, match="more than max_length 12"):
        tokenize(from_rows([_pair("p" * 30)]), tiny_tokenizer(), max_length=12, truncation="bad_row")


def test_plain_documents_are_split_without_losing_a_token() -> None:
    tokenizer = tiny_tokenizer()
    done = tokenize(from_rows([{"text": "0123456789" * 5}, {"text": "short"}]), tokenizer, max_length=16)
    chunks = [t for t in done.trees if t.source == "rows:1"]
    assert all(t.prompt_ids.tolist() == [BOS] for t in done.trees)
    assert all(len(t.prompt_ids) + len(t.completion_ids[0]) <= 16 for t in done.trees)
    joined = [i for t in chunks for i in t.completion_ids[0].tolist()]
    assert tokenizer.decode(joined) == "0123456789" * 5 + "</s>"
    assert [t.completion_ids[0][-1] == EOS for t in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [t.row for t in done.trees] == list(range(len(done.trees)))
    assert (done.total, done.accepted, done.split_documents) == (2, 2, 1)


def test_open_ended_completions_get_no_eos() -> None:
    assert EOS not in _only([_pair()], tiny_tokenizer(), add_eos=False).completion_ids[0]


def test_a_tokenizer_without_eos_is_met_with_a_sentence() -> None:
    with pytest.raises(ModelError, match="no EOS token"):
        _only([_pair()], tiny_tokenizer(eos=False))


def test_chat_is_refused_without_a_template() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        _only([_pair()], tiny_tokenizer(), template="chat")


def test_hh_in_the_plain_template_is_the_transcript() -> None:
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    tokenizer = tiny_tokenizer()
    tree = _only([{"chosen": text + " d", "rejected": text + " e"}], tokenizer, template="plain")
    assert tokenizer.decode(tree.prompt_ids) == text
    assert tokenizer.decode(tree.completion_ids[0]) == " d</s>"


# ---- audit ----------------------------------------------------------------------------------------------------------


def test_the_audit_counts_what_is_planted() -> None:
    rows = [
        _pair("a", "long answer", "short"),
        _pair("a", "long answer", "short"),  # duplicate of row 1
        _pair("a", "short", "long answer"),  # contradicts row 1
        _pair("b", "x", "x"),  # identical
        _pair("c", "", "x"),  # empty
        _pair("d", "tie", "tea"),
        _pair("e", "the long one", "no"),
    ]
    dataset = from_rows(rows, on_bad_row="skip")
    found = audit(dataset, tokenize(dataset, tiny_tokenizer(), max_length=12)).findings
    assert (found["identical_pairs"].count, found["identical_pairs"].where) == (1, ("rows:4",))
    assert (found["empty_completions"].count, found["empty_completions"].where) == (1, ("rows:5",))
    assert (found["duplicates"].count, found["duplicates"].where) == (1, ("rows:2 (as rows:1)",))
    assert (found["contradictions"].count, found["contradictions"].where) == (1, ("rows:3 (against rows:1)",))
    assert (found["length_bias"].count, found["length_bias"].of) == (3, 4)
    assert "1 ties" in found["length_bias"].note
    assert found["bad_rows"].count == 2
    assert found["cut_completions"].count == 4
    assert found["cut_completions"].of == 5


def test_the_audit_finds_leakage_and_a_split_by_prompt_has_none() -> None:
    dataset = from_rows([_pair(f"p{i % 10}", f"good {i}", "bad") for i in range(40)])
    by_row = {"train": dataset.subset(range(30)), "held": dataset.subset(range(30, 40))}
    assert audit(dataset, splits=by_row).findings["leakage_train_held"].count == 10
    train, held = split_by_prompt(dataset, validation_rows=8)
    assert audit(dataset, splits={"train": train, "held": held}).findings["leakage_train_held"].count == 0


def test_text_and_json_tell_the_same() -> None:
    dataset = from_rows([_pair(), _pair("b", "x", "x")], on_bad_row="skip")
    result = audit(dataset)
    assert '"chosen" equals "rejected"' in result.to_text()
    assert result.to_json()["findings"]["identical_pairs"]["count"] == 1


def test_hh_rows_are_packed_full(shared_dir: Path) -> None:
    from transformers import AutoTokenizer

    from penchant.data.load import load_preferences
    from penchant.data.packing import plan_microbatches

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models/stories260k")
    dataset = load_preferences(str(shared_dir / "data/hh-harmless-1700.jsonl"), on_bad_row="skip", limit=600)
    trees = tokenize(dataset, tokenizer, max_length=512, on_bad_row="skip").trees
    plan = plan_microbatches([t.shared_tokens for t in trees], 4096)
    assert sum(t.shared_tokens for t in trees) / (len(plan) * 4096) >= 0.95


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_backend_is_asked_as_a_call_asks_it(side: str) -> None:
    tokenizer = tiny_tokenizer(pad=True)
    tokenizer.padding_side = side
    texts = ["a", "longer text", "</s> <s>special", "", "\u00e9\u4e2d"]
    tokenizer(texts, padding=True, truncation=True, max_length=3)  # leaves truncation and padding on in the backend
    made = encode_texts(tokenizer, texts)
    assert made == tokenizer(texts, add_special_tokens=False)["input_ids"] and max(map(len, made)) > 3
    assert encode_texts(tokenizer, []) == []


def test_a_tokenizer_with_a_call_of_its_own_is_called() -> None:
    class Own(type(tiny_tokenizer())):  # type: ignore[misc]
        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[7] for _ in texts]}

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Own
    assert encode_texts(tokenizer, ["a", "b"]) == [[7], [7]]


def test_a_cut_prompt_keeps_its_bos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = _bos_first()
    tree = _only([_pair("0123456789" * 3, "abcdef", "xy")], tokenizer, max_length=20)
    assert tokenizer.decode(tree.prompt_ids) == "<s>890123456789"
    assert len(tree.prompt_ids) + max(map(len, tree.completion_ids)) == 20


def test_what_just_fits_is_not_cut() -> None:
    """Six letters and EOS after a prompt of ten tokens: complete at 17, without EOS at 16, and counted as such."""
    for max_length, cut in ((17, False), (16, True)):
        done = tokenize(from_rows([_pair("p" * 8, "abcdefgh", "xy")]), tiny_tokenizer(), max_length=max_length)
        (tree,) = done.trees
        assert tree.truncated == (cut, False) and len(done.cut_completions) == cut and not done.cut_prompts
        assert (tree.completion_ids[0][-1] == EOS) != cut and len(tree.completion_ids[0]) == max_length - 8
        assert tree.completion_ids[1][-1] == EOS


def test_the_last_chunk_of_a_document_is_whole() -> None:
    done = tokenize(from_rows([{"text": "0123456789" * 5}, {"text": "short"}]), tiny_tokenizer(), max_length=16)
    flags = [t.truncated for t in done.trees]
    assert flags == [(True,)] * (len(flags) - 2) + [(False,)] * 2


# ---- the answer in the context of its prompt, and its end -------------------------------------------------------------


def _words(*extra: str) -> list[str]:
    return ["<s>", "</s>", "<unk>", *extra]


def _sentencepiece(scheme: str) -> Any:
    """A SentencePiece-like tokenizer of single letters and two words, which prepends a dummy space to a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz.:|<>/\n", "\u2581", "\u2581g", "\u2581gi", "\u2581girl", "gi", "girl"]
    pairs = [("\u2581", "g"), ("\u2581g", "i"), ("g", "i")]
    vocab = {t: i for i, t in enumerate(_words(*letters, "\u2581l", "rl"))}
    merges = [*pairs, ("r", "l"), ("\u2581gi", "rl"), ("gi", "rl")]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    if scheme == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
        inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["prepend", "always", "first"])
@pytest.mark.parametrize("prompt, answer", [("a", " girl."), ("a\n", "girl."), ("a ", "girl."), ("a gi", "rl.")])
def test_an_answer_is_encoded_as_behind_its_prompt(scheme: str, prompt: str, answer: str) -> None:
    """No dummy space at the boundary: the ids equal those of the joined text, or at least decode to it."""
    tokenizer = _sentencepiece(scheme)
    tree = _only([_pair(prompt, answer, " b")], tokenizer, add_eos=False)
    ours = [*tree.prompt_ids.tolist(), *tree.completion_ids[0].tolist()]
    assert tokenizer.decode(ours) == prompt + answer
    whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    if prompt in ("a", "a\n"):  # no token spans the boundary
        assert ours == whole


def test_special_tokens_before_an_answer_are_its_context() -> None:
    tokenizer = _sentencepiece("always")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    )
    tree = _only([{"prompt": "abc", "chosen": "girl", "rejected": "b"}], tokenizer)
    text = "<s>user\nabc</s>\n<s>assistant\ngirl</s>"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [*tree.prompt_ids.tolist(), *tree.completion_ids[0].tolist()] == whole


def test_eos_stands_once_whatever_the_template_and_the_row_write_behind_an_answer() -> None:
    """A SentencePiece-like tokenizer writes a line break after EOS with two ids, so dropping one whitespace id is not enough."""
    tokenizer = _sentencepiece("always")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '</s>\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    for answer in ("girl", "girl</s>", "girl</s>\n"):
        tree = _only([{"prompt": "abc", "chosen": answer, "rejected": "b"}], tokenizer)
        ids = tree.completion_ids[0].tolist()
        assert ids.count(EOS) == 1 and ids[-1] == EOS and tokenizer.decode(ids) == "girl</s>"


def _turn_template(end: str) -> str:
    return (
        "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '" + end + "\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
    )


def test_a_turn_that_ends_with_another_token_gets_no_eos_behind_it() -> None:
    """Gemma, Phi: the template's end-of-turn token is not the tokenizer's EOS."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = _turn_template("<end_of_turn>")
    turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end_ids(tokenizer) == {EOS, turn}
    ids = _only([_pair()], tokenizer).completion_ids[0].tolist()
    assert tokenizer.decode(ids) == "good<end_of_turn>"


def test_the_ends_of_an_answer_are_those_of_tokenizer_template_and_generation_config() -> None:
    from types import SimpleNamespace

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>", "<|other|>"]})
    eot, other = tokenizer.convert_tokens_to_ids(["<|eot|>", "<|other|>"])
    letter = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[eot, letter]))
    assert end_ids(tokenizer) == {EOS}
    assert end_ids(tokenizer, model) == {EOS, eot}  # a letter is not an end token
    tokenizer.chat_template = _turn_template("<|other|>")
    assert end_ids(tokenizer, model) == {EOS, eot, other}


# ---- templates that render a prompt differently once it is answered -----------------------------------------------------

OPENS_A_THOUGHT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + ('</s>' if m['role'] == 'assistant' else '') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' + ('' if quick else '<think>\n') }}{% endif %}"
)
MOVES_SYSTEM = (
    "{% set sys = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (sys + '\n\n' if loop.last and sys else '') + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
CUTS_THOUGHTS = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'].split('</think>')[-1] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def _chat_row(answer: str = "yes") -> dict[str, Any]:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Odd?"}]
    return {
        "prompt": turns,
        "chosen": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }


def _tokenizer_with(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_prompt_that_opens_a_thought_ends_where_the_answer_differs() -> None:
    tokenizer = _tokenizer_with(OPENS_A_THOUGHT)
    done = tokenize(from_rows([_chat_row()]), tokenizer, max_length=96)
    tree = done.trees[0]
    assert tokenizer.decode(tree.prompt_ids) == "<s>system:Be kind.<s>user:Odd?<s>assistant:"
    assert tokenizer.decode(tree.completion_ids[0]) == "yes</s>"
    assert done.moved_prompts == 1 and "1 prompt that the template" in done.summary()
    answered = tokenize(from_rows([_chat_row("<think>\nhm</think>yes")]), tokenizer, max_length=96)
    assert tokenizer.decode(answered.trees[0].completion_ids[0]) == "<think>\nhm</think>yes</s>"
    both = _chat_row("<think>\nhm</think>yes")
    both["rejected"][0]["content"] = "<think>\nno</think>no"
    done = tokenize(from_rows([both]), tokenizer, max_length=96)
    assert done.moved_prompts == 0 and tokenizer.decode(done.trees[0].prompt_ids).endswith("<think>\n")
    assert tokenizer.decode(done.trees[0].completion_ids[0]) == "hm</think>yes</s>"


def test_template_options_reach_the_template() -> None:
    tokenizer = _tokenizer_with(OPENS_A_THOUGHT)
    done = tokenize(from_rows([_chat_row()]), tokenizer, max_length=96, template_options={"quick": True})
    assert done.moved_prompts == 0
    assert tokenizer.decode(done.trees[0].prompt_ids).endswith("<s>assistant:")
    with pytest.raises(ConfigError, match="template_options"):
        _only([_pair()], tiny_tokenizer(), template_options={"quick": True})


def test_a_system_text_that_moves_leaves_the_prompt_as_generation_has_it() -> None:
    tokenizer = _tokenizer_with(MOVES_SYSTEM)
    done = tokenize(from_rows([_chat_row()]), tokenizer, max_length=96)
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Odd?"}]
    tree = done.trees[0]
    assert tokenizer.decode(tree.prompt_ids) == tokenizer.apply_chat_template(asked, tokenize=False)
    assert [tokenizer.decode(c) for c in tree.completion_ids] == [" yes</s>", " no</s>"]
    assert done.moved_prompts == 1


def test_a_template_that_cuts_the_answer_makes_a_bad_row_that_shows_both() -> None:
    row = _chat_row("<think>because</think>yes")
    with pytest.raises(DataError) as error:
        _only([row], _tokenizer_with(CUTS_THOUGHTS), max_length=96)
    assert "<think>because</think>yes" in str(error.value) and "'yes</s>'" in str(error.value)
    done = tokenize(from_rows([row, _chat_row()]), _tokenizer_with(CUTS_THOUGHTS), max_length=96, on_bad_row="skip")
    assert (done.accepted, len(done.quarantined)) == (1, 1)


@pytest.mark.parametrize("turns", ["last", "all"])
def test_a_template_that_leaves_out_a_turn_makes_a_bad_row(turns: str) -> None:
    """A template without system turns silently renders only the others."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("in messages", "in messages if m.role != 'system'")
    talk = [{"role": r, "content": c} for r, c in (("system", "Be kind."), ("user", "Odd?"), ("assistant", "yes"))]
    rows = from_rows([{"messages": talk}, {"messages": talk[1:]}], layout_options={"turns": turns})
    done = tokenize(rows, tokenizer, max_length=96, on_bad_row="skip")
    assert done.accepted == 1 and "leaves out a turn of the system ('Be kind.')" in done.quarantined[0].what


def test_an_answer_that_is_put_behind_the_prompt_brings_no_earlier_turns_with_it() -> None:
    """A template that ends an assistant turn only if it is the last one: the prompt's end also follows the question."""
    tokenizer = _tokenizer_with(
        "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content }}{% if m.role == 'user' or loop.last %}{{ '</s>\n\n' }}"
        "{% endif %}{% endfor %}"
    )
    talk = [{"role": r, "content": c} for r, c in (("user", "Odd?"), ("assistant", "Why?"), ("tool", "7"))]
    done = tokenize(
        from_rows([{"messages": [*talk, {"role": "assistant", "content": "yes"}]}]),
        tokenizer,
        max_length=256,
        on_bad_row="skip",
    )
    assert not done.accepted and "renders the prompt differently" in done.quarantined[0].what


def test_what_a_model_wrote_is_taken_as_the_template_leaves_it() -> None:
    row = _chat_row("<think>because</think>yes")
    tree = _only([row], tokenizer := _tokenizer_with(CUTS_THOUGHTS), max_length=96, strict=False)
    assert tokenizer.decode(tree.completion_ids[0]) == "yes</s>"


def _wordpieces() -> Any:
    """A tokenizer whose word pieces decode differently when decoded separately."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(_words("play", "ing", "playing", "good"))}
    inner = Tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_ids_that_do_not_decode_to_their_text_are_a_bad_row_but_what_a_model_wrote_is_judged() -> None:
    tokenizer, row = _wordpieces(), _pair("play", "ing", "good")
    with pytest.raises(DataError, match="do not decode to their text"):
        _only([row], tokenizer)
    tree = _only([row], tokenizer, strict=False)
    assert tokenizer.convert_ids_to_tokens(tree.completion_ids[0].tolist()) == ["ing", "</s>"]


def test_an_answer_that_follows_an_answer_is_a_bad_row() -> None:
    turns = [*_chat_row()["prompt"], *({"role": "assistant", "content": c} for c in ("an answer", "another"))]
    with pytest.raises(DataError, match="two assistant turns"):
        _only([{"messages": turns}], _tokenizer_with(CUTS_THOUGHTS), max_length=96)

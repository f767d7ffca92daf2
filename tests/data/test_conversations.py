"""Tools, continued turns and unusual templates: rendering compared with transformers', and which tokens are trained."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from rows import from_rows
from tiny import tiny_model_folder, tiny_tokenizer, write_jsonl

from penchant.config import config_from_mapping
from penchant.data.adapt import repeated_prompts
from penchant.data.cached import DataCache
from penchant.data.load import load_preferences, template_variables
from penchant.data.packing import pack
from penchant.data.templates import end_ids
from penchant.data.tokenize import TokenizedDataset, tokenize
from penchant.download.convert import written_rows
from penchant.errors import DataError
from penchant.logprobs import Scorer
from penchant.runs.rows import Rows
from penchant.runs.sharing import Uncached
from penchant.serve.model import TemplateRefused, choose_style
from penchant.serve.openai import ChatMessage, ChatRequest, read_request
from penchant.training.console import console
from penchant.types import TokenTree

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What the weather is like.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
ASKED = [{"role": "user", "content": "Rain?"}]
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "content": '{"rain": true}'}
TALK = [*ASKED, CALLED, RESULT, {"role": "assistant", "content": "It rains."}]

HEAD = "{% if tools %}<s>tools: {% for t in tools %}{{ t | tojson }}{% endfor %}</s>\n{% endif %}"
TAIL = "{% if add_generation_prompt %}<s>assistant:{% endif %}"


def _turns(calls: str, content: str = "m.content") -> str:
    return (
        "{% for m in messages %}<s>{{ m.role }}:{{ CONTENT }}CALLS</s>\n{% endfor %}".replace(
            "CONTENT", content
        ).replace("CALLS", calls)
        + TAIL
    )


AS_OBJECTS = HEAD + _turns(
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
)
AS_TEXT = HEAD + _turns(  # like DeepSeek's, where only turns without content show calls, and arguments must be strings
    "{% if m.content is not defined %}{% for c in m.tool_calls %}{{ '<call>' + c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endif %}",
    "m.content if m.content is defined",
)
NO_TOOLS = AS_OBJECTS.removeprefix(HEAD)
NO_CALLS = HEAD + _turns("")
NO_RESULTS = AS_OBJECTS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
PARTS = (
    "{% for m in messages %}<s>{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}</s>\n{% endfor %}" + TAIL
)


def _tokenizer(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _made(
    template: str | None, row: dict[str, Any], options: dict[str, Any] | None = None, **how: Any
) -> TokenizedDataset:
    rows = from_rows([row], layout_options=options or {})
    return tokenize(rows, _tokenizer(template), **{"max_length": 2048, **how})


def _text(ids: Any) -> str:
    return str(tiny_tokenizer().decode(ids))


# ---- tools ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", ["last", "all", "every"])
def test_a_conversation_with_tools_is_what_transformers_renders(turns: str) -> None:
    own = _tokenizer(AS_OBJECTS).apply_chat_template(TALK, tools=TOOLS, tokenize=False)
    trees = _made(AS_OBJECTS, {"messages": TALK, "tools": TOOLS}, {"turns": turns}).trees
    assert len(trees) == (2 if turns == "every" else 1)
    assert _text([*trees[-1].prompt_ids, *trees[-1].completion_ids[0]]) == own.rstrip("\n")
    call = f"<call>weather {json.dumps(CALL['function']['arguments'], ensure_ascii=False)}</call></s>"
    learned = [_text(t.completion_ids[0][t.masks[0]] if t.masks else t.completion_ids[0]) for t in trees]
    assert (
        learned == {"last": ["It rains.</s>"], "all": [f"{call}It rains.</s>"], "every": [call, "It rains.</s>"]}[turns]
    )


OTHER_WAYS: dict[str, dict[str, Any]] = {
    "arguments as text": {
        "messages": [*ASKED, {**CALLED, "content": None, "tool_calls": [{"type": "function", "function": {
            "name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])}}]}, *TALK[2:]],
        "tools": json.dumps(TOOLS),
    },
    "OpenAI's older names": {
        "messages": [*ASKED, {"role": "assistant", "content": None, "function_call": CALL["function"]},
                     {**RESULT, "role": "function"}, *TALK[3:]],
        "functions": [TOOLS[0]["function"]],
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "Rain?"}, {"from": "function_call", "value": json.dumps(CALL["function"])},
                          {"from": "observation", "value": RESULT["content"], "name": "weather"}, {"from": "gpt", "value": "It rains."}],
        "tools": json.dumps([TOOLS[0]["function"]]),
    },
    "nulls of a file that knows every key": {
        "messages": [{**m, "tool_call_id": None} for m in (*ASKED, {**CALLED, "name": None, "tool_calls": [
            {**CALL, "id": None, "function": {**CALL["function"], "arguments": CALL["function"]["arguments"]}}]}, *TALK[2:])],
        "tools": [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": None}}],
    },
}  # fmt: skip


@pytest.mark.parametrize("row", OTHER_WAYS.values(), ids=list(OTHER_WAYS))
def test_other_ways_to_write_tools_are_the_same_row(row: dict[str, Any]) -> None:
    wanted, found = (
        from_rows([r], layout_options={"turns": "all"}).trees for r in ({"messages": TALK, "tools": TOOLS}, row)
    )
    assert found == wanted


def test_null_arguments_are_kept_where_json_says_so_and_not_where_a_table_fills_them_in(tmp_path: Path) -> None:
    def row(**arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        return {
            "prompt": ASKED,
            "completion": [{"role": "assistant", "content": "", "tool_calls": [call]}],
            "tools": TOOLS,
        }

    rows = [row(city="Rome", unit=None), row(city="Bern", unit="C")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    said = {}
    for name in ("a.jsonl", "a.parquet"):
        trees = load_preferences(str(tmp_path / name)).trees
        said[name] = [json.loads(t.completions[0].tool_calls)[0]["function"]["arguments"] for t in trees]
    assert said["a.jsonl"] == [{"city": "Rome", "unit": None}, {"city": "Bern", "unit": "C"}]
    assert said["a.parquet"] == [{"city": "Rome"}, {"city": "Bern", "unit": "C"}]


def test_parts_of_a_text_follow_each_other_in_files_and_in_requests() -> None:
    parts = [{"type": "text", "text": "One, "}, {"type": "text", "text": "two"}]
    (tree,) = from_rows([{"prompt": [{"role": "user", "content": parts}], "completion": "three"}]).trees
    asked = ChatMessage.model_validate({"role": "user", "content": parts}).message
    assert tree.prompt == (asked,) and asked.content == "One, two"


def test_calls_behind_each_other_are_calls_at_once() -> None:
    two = [{"from": "function_call", "value": json.dumps({"name": n, "arguments": {}})} for n in ("a", "b")]
    talk = [
        {"from": "human", "value": "Go."},
        *two,
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "Done."},
    ]
    (tree,) = from_rows([{"conversations": talk}]).trees
    assert [c["function"]["name"] for c in json.loads(tree.prompt[1].tool_calls)] == ["a", "b"]  # type: ignore[union-attr]


@pytest.mark.parametrize("turns", ["all", "every"])
def test_weights_stay_with_their_turns_where_calls_are_at_once(turns: str) -> None:
    call = {"from": "function_call", "value": json.dumps({"name": "a", "arguments": {}})}
    talk = [
        {"from": "human", "value": "Hi."},
        {"from": "gpt", "value": "Not learned.", "weight": 0},
        {"from": "human", "value": "Go."},
        call,
        call,
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "Done."},
    ]
    trees = from_rows([{"conversations": talk}], layout_options={"turns": turns}).trees
    learned = [c for t in trees for a in t.completions for c in (a, *(m for m in a.more if m.trained))]
    assert len(learned) == 2 and learned[0].tool_calls
    assert "Not learned." not in [c.text for t in trees for c in t.completions]


def test_a_template_that_takes_arguments_as_text_gets_text() -> None:
    (tree,) = _made(AS_TEXT, {"messages": TALK[:2], "tools": TOOLS}).trees
    assert (
        _text(tree.completion_ids[0])
        == f"<call>weather {json.dumps(CALL['function']['arguments'], ensure_ascii=False)}</s>"
    )


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize(
    "template,what",
    [
        (NO_TOOLS, "the tools"),
        (NO_CALLS, "tool calls"),
        (NO_RESULTS, "what tools answer"),
        (None, "only a chat template"),
    ],
)
def test_what_a_template_leaves_out_makes_a_bad_row(template: str | None, what: str, turns: str) -> None:
    with pytest.raises(DataError, match=what):
        _made(template, {"messages": TALK, "tools": TOOLS}, {"turns": turns})


def test_a_call_that_is_left_out_in_one_place_is_noticed() -> None:
    last_alone = AS_OBJECTS.replace("m.tool_calls or []", "((m.tool_calls or []) if m.content != 'Wait.' else [])")
    row = {"messages": [*ASKED, {**CALLED, "content": "Wait."}, *TALK[2:]], "tools": TOOLS}
    assert _made(AS_OBJECTS, row).accepted == 1
    with pytest.raises(DataError, match="leaves out a call of weather"):
        _made(last_alone, row)
    no_arguments = AS_OBJECTS.replace(
        " {{ c.function.arguments | tojson }}", " {{ c.function.arguments | tojson if m.content != 'Wait.' }}"
    )
    with pytest.raises(DataError, match="leaves out a call of weather"):
        _made(no_arguments, row)


@pytest.mark.parametrize(
    "row",
    [
        {"tools": "no JSON"}, {"tools": [{"type": "function"}]}, {"tools": 5}, {"chat_template_kwargs": "x"},
        {"chat_template_kwargs": {"tokenize": True}}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"messages": [*ASKED, {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        {"messages": [*ASKED, {**CALLED, "tool_calls": [{"function": {"arguments": {}}}]}]},
        {"messages": [*ASKED, {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": '{"a":' * 500 + "1" + "}" * 500}}]}]},
        {"messages": [*ASKED, CALLED, {**RESULT, "name": "half \ud83d"}, TALK[-1]]},
        {"messages": [{**CALLED, "role": "user"}, TALK[-1]]}, {"messages": [*ASKED, RESULT, TALK[-1]]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, TALK[-1]]},
    ],
)  # fmt: skip
def test_what_is_no_tool_is_said_with_the_row(row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        from_rows([{"messages": TALK, **row}])
    assert "rows:1" in str(caught.value) and caught.value.how


def test_pairs_thumbs_and_prompts_have_tools_too(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "No idea."}
    pair = {"prompt": ASKED, "chosen": [CALLED], "rejected": [said], "tools": TOOLS}
    (tree,) = _made(AS_OBJECTS, pair).trees
    asked = _tokenizer(AS_OBJECTS).apply_chat_template(ASKED, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert _text(tree.prompt_ids) == asked and _text(tree.completion_ids[0]).startswith("<call>weather")
    (prompt,) = _made(AS_OBJECTS, {"prompt": ASKED, "tools": TOOLS}).trees
    assert _text(prompt.prompt_ids) == asked
    (thumb,) = _made(AS_OBJECTS, {"prompt": ASKED, "completion": [CALLED], "label": True, "tools": TOOLS}).trees
    assert list(thumb.completion_ids[0]) == list(tree.completion_ids[0])
    for row, kind in ((pair, "pairs"), ({"messages": TALK, "tools": TOOLS}, "sft")):
        rows = from_rows([row], layout_options={"turns": "all"} if kind == "sft" else {})
        (written,) = written_rows(kind, rows.trees[0])
        assert from_rows([written], layout_options={"turns": "all"} if kind == "sft" else {}).trees == rows.trees


def test_a_server_asks_a_model_as_it_was_trained() -> None:
    rows = from_rows([{"prompt": TALK[:3], "tools": TOOLS}])
    (tree,) = rows.trees
    tokenizer = _tokenizer(AS_OBJECTS)
    style = choose_style("auto", tokenizer, fallback_style="plain")
    text = style.render(tokenizer, list(tree.prompt), {"tools": TOOLS})  # type: ignore[arg-type]
    assert text == _text(tokenize(rows, tokenizer, max_length=2048).trees[0].prompt_ids)
    with pytest.raises(TemplateRefused, match="leaves out the tools"):
        style.render(_tokenizer(NO_TOOLS), list(tree.prompt), {"tools": TOOLS})  # type: ignore[arg-type]


def test_a_request_to_a_server_is_read_as_a_row_is() -> None:
    turns = [*ASKED, {**CALLED, "content": None}, {**RESULT, "tool_call_id": "call_1"}]
    body = {"model": "m", "messages": turns, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    asked = read_request(ChatRequest, json.dumps(body).encode())
    (tree,) = from_rows([{"prompt": turns, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}]).trees
    assert asked.prompts == [tree.prompt] and asked.template_variables == template_variables(tree) == {
        "enable_thinking": False,
        "tools": TOOLS,
    }
    assert (
        "tools"
        not in read_request(ChatRequest, json.dumps({**body, "tool_choice": "none"}).encode()).template_variables
    )


# ---- options of a row ---------------------------------------------------------------------------------------------------------

THINKS = _turns("").replace("<s>assistant:{%", "<s>assistant:{{ '' if enable_thinking else '<think></think>' }}{%")


def test_a_rows_options_go_before_the_configs() -> None:
    row = {"prompt": ASKED, "chat_template_kwargs": {"enable_thinking": True}}
    texts = [_text(_made(THINKS, r, template_options={"enable_thinking": False}).trees[0].prompt_ids)
             for r in (row, {"prompt": ASKED})]  # fmt: skip
    assert texts == ["<s>user:Rain?</s>\n<s>assistant:", "<s>user:Rain?</s>\n<s>assistant:<think></think>"]


def test_options_that_the_template_never_names_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, model = {"prompt": "Rain?", "completion": "No."}, tiny_model_folder(tmp_path / "model", chat=True)
    said = "the chat template does not read documents and enable_thinkng (data.template_options"
    for more, options, told_of in (
        ({"chat_template_kwargs": {"documents": []}}, {"enable_thinkng": False, "role": "x"}, True),
        ({"chat_template_kwargs": {"role": "y"}}, {"role": "x"}, False),
    ):
        path = write_jsonl(tmp_path / "rows.jsonl", [row | more] * 2)
        data = {"path": path, "template_options": options}
        config = config_from_mapping({"model": {"path": model}, "data": data, "loss": "sft", "output": "run"})
        _ = Rows(config, Uncached(), console(quiet=False)).tokenized
        assert (said in "".join(capsys.readouterr())) is told_of


def test_tools_and_options_are_part_of_what_rows_and_tokens_are_known_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penchant.data.cached.AUTO_BYTES", 0)
    bare = {"prompt": ASKED}
    kinds = [bare, {**bare, "tools": TOOLS}, {**bare, "chat_template_kwargs": {"enable_thinking": True}}]
    assert len({from_rows([r]).fingerprint for r in kinds}) == 3
    whole = from_rows(kinds)
    assert repeated_prompts(whole) == ""  # a model sees three different prompts
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in kinds))
    plain, kept = load_preferences(str(path)), DataCache().load(str(path))
    assert tuple(kept.trees) == tuple(plain.trees) and kept.fingerprint == plain.fingerprint
    how: dict[str, Any] = {
        "template": "auto", "template_options": {}, "max_length": 2048, "truncation": "prompt_then_completion",
        "on_bad_row": "error", "identical": "bad_row", "add_eos": True,
    }  # fmt: skip
    stored = DataCache().tokenize(kept, _tokenizer(HEAD + THINKS), **how).trees
    assert [_text(t.prompt_ids) for t in stored] == [
        _tokenizer(HEAD + THINKS).apply_chat_template(
            ASKED, tools=r.get("tools"), tokenize=False, add_generation_prompt=True, **r.get("chat_template_kwargs", {})
        )
        for r in kinds
    ]


# ---- turns that are continued -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [AS_OBJECTS, PARTS, AS_OBJECTS.replace("m.content", "m.content | trim")])
def test_a_prompt_that_ends_in_an_assistant_turn_is_continued(template: str) -> None:
    begun = [*ASKED, {"role": "assistant", "content": "It is "}]
    shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} if template == PARTS else m for m in begun]
    own = _tokenizer(template).apply_chat_template(shown, tokenize=False, continue_final_message=True)
    (tree,) = _made(template, {"prompt": begun, "completion": "wet."}).trees
    assert _text(tree.prompt_ids) == own
    assert _text([*tree.prompt_ids, *tree.completion_ids[0]]).endswith("<s>assistant:It is wet.</s>")
    (asked,) = _made(template, {"prompt": begun}).trees
    assert list(asked.prompt_ids) == list(tree.prompt_ids)


def test_a_call_cannot_be_continued() -> None:
    with pytest.raises(DataError, match="ends with a tool call"):
        _made(AS_OBJECTS, {"prompt": TALK[:2], "completion": "Hm."})


# ---- pairs that differ in several turns ----------------------------------------------------------------------------------------

SIDES = [
    [{"role": "system", "content": "Be terse."}, *ASKED, {"role": "assistant", "content": c},
     {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": d}]
    for c, d in (("Yes.", "Quite."), ("No.", "Hm?"))
]  # fmt: skip
DIFFERENT = {"chosen": SIDES[0], "rejected": SIDES[1]}


def test_conversations_that_differ_in_several_turns_are_compared_from_there_on() -> None:
    tree = _made(AS_OBJECTS, DIFFERENT).trees[0]
    assert _text(tree.prompt_ids) == "<s>system:Be terse.</s>\n<s>user:Rain?</s>\n<s>assistant:"
    learned = [_text(ids[mask]) for ids, mask in zip(tree.completion_ids, tree.masks, strict=True)]
    assert learned == ["Yes.</s>Quite.</s>", "No.</s>Hm?</s>"] and tree.labels == (True, False)
    for ids, side in zip(tree.completion_ids, SIDES, strict=True):
        own = _tokenizer(AS_OBJECTS).apply_chat_template(side, tokenize=False)
        assert _text([*tree.prompt_ids, *ids]) == own.rstrip("\n")
    (written,) = written_rows("pairs", from_rows([DIFFERENT]).trees[0])
    assert from_rows([written]).trees[0].completions == from_rows([DIFFERENT]).trees[0].completions
    with pytest.raises(DataError, match="differ in several turns"):
        _made(None, DIFFERENT)
    with pytest.raises(DataError, match="before the two answers differ"):
        from_rows(
            [{"chosen": SIDES[0], "rejected": [SIDES[0][0], {"role": "user", "content": "Snow?"}, *SIDES[1][2:]]}]
        )


@pytest.mark.parametrize("shared", [True, False])
def test_their_log_probs_are_the_models_own(shared: bool) -> None:
    model = tiny_model("llama")
    vocab = model.config.vocab_size
    tree = _made(AS_OBJECTS, DIFFERENT).trees[0]
    small = TokenTree(
        0, tree.prompt_ids % vocab, tuple(c % vocab for c in tree.completion_ids), tree.truncated, masks=tree.masks
    )
    found = Scorer(model, "shared" if shared else "separate").logps(pack([small], shared=shared)).sums
    for at, (ids, mask) in enumerate(zip(small.completion_ids, small.masks, strict=True)):
        whole = torch.tensor([*small.prompt_ids, *ids])
        logps = torch.log_softmax(model(input_ids=whole[None]).logits[0, :-1], -1)
        own = logps.gather(1, whole[1:, None])[-len(ids) :, 0][torch.from_numpy(mask)].sum()
        assert found[at].item() == pytest.approx(own.item(), rel=1e-12)


# ---- kinds of templates that models ship ----------------------------------------------------------------------------------------

OPENS_THOUGHT = _turns("").replace(TAIL, TAIL.replace("assistant:", "assistant:<think>\n"))  # DeepSeek-R1's
TWO_ENDS = _turns("").replace("</s>\n", "<unk></s>")  # Cohere's: the answer ends, then the turn
END_AND_EOS = _turns("").replace("</s>\n", "<unk>\n") + "{% if not add_generation_prompt %}</s>{% endif %}"  # Phi-3's


def test_a_template_that_takes_parts_gets_parts() -> None:
    """Idefics3, LLaVA-NeXT, SmolVLM: given plain text they write nothing, or fail."""
    talk = [*ASKED, TALK[-1]]
    tree = _made(PARTS, {"messages": talk}).trees[0]
    shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
    own = _tokenizer(PARTS).apply_chat_template(shown, tokenize=False)
    assert _text([*tree.prompt_ids, *tree.completion_ids[0]]) == own.rstrip("\n")
    assert end_ids(_tokenizer(PARTS)) == {_tokenizer(PARTS).eos_token_id}


def test_a_thought_that_is_opened_for_an_answer_is_cut_where_both_part() -> None:
    made = _made(OPENS_THOUGHT, {"messages": [*ASKED, TALK[-1]]})
    assert (
        _text(made.trees[0].prompt_ids).endswith("<s>assistant:")
        and made.moved_prompts == 1
        and not made.forced_prompts
    )
    assert "once an answer follows (1 cut to what both share)" in made.summary()


@pytest.mark.parametrize("template,end", [(TWO_ENDS, "</s>"), (END_AND_EOS, "<unk>"), (AS_OBJECTS, "</s>")])
def test_an_answer_ends_with_the_token_that_ends_turns(template: str, end: str) -> None:
    tokenizer = _tokenizer(template)
    assert end_ids(tokenizer) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    tree = _made(template, {"messages": [*ASKED, TALK[-1]]}).trees[0]
    assert _text(tree.completion_ids[0]) == "It rains." + ("<unk></s>" if template == TWO_ENDS else end)


def test_a_call_may_end_with_a_token_of_its_own() -> None:
    """gpt-oss's."""
    template = AS_OBJECTS.replace("</s>\n{% endfor %}", "{{ '<unk>' if m.tool_calls else '</s>\n' }}{% endfor %}")
    tokenizer = _tokenizer(template)
    assert end_ids(tokenizer) == {tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert _text(_made(template, {"messages": TALK[:2], "tools": TOOLS}).trees[0].completion_ids[0]).endswith(
        "</call><unk>"
    )


def test_a_developers_turn_keeps_its_role_where_the_template_knows_it() -> None:
    row = {"prompt": [{"role": "developer", "content": "Be terse."}, *ASKED]}
    assert _text(_made(NO_CALLS, row).trees[0].prompt_ids).startswith("<s>system:")
    knows = NO_CALLS + "{# developer #}"
    assert _text(_made(knows, row).trees[0].prompt_ids).startswith("<s>developer:")


COLLECTION = Path(__file__).parents[2] / "benchmarks" / ".venv-trl"


@pytest.mark.slow
@pytest.mark.skipif(not COLLECTION.is_dir(), reason="benchmarks/.venv-trl is not installed")
def test_every_template_that_trl_ships_trains_and_ends() -> None:
    tool = _tool()
    (folder,) = COLLECTION.glob("lib/python*/site-packages/trl/chat_templates")
    for path in sorted(folder.glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        found, tokenizer = tool.judge(template), tool.tokenizer_of(template)
        assert found.takes["answers"] == "", path.stem
        for made in (found.last, found.every):
            for tree in made.trees:
                (ids,) = tree.completion_ids
                assert int(ids[-1]) in end_ids(tokenizer), path.stem
        answer = tokenizer.decode(found.last.trees[0].completion_ids[0])
        assert "It is four." in answer and "Good" not in answer and "two and" not in answer, path.stem
        learned = [t.completion_ids[0][t.masks[0]] if t.masks else t.completion_ids[0] for t in found.every.trees]
        text = "".join(map(tokenizer.decode, learned))
        assert "Good morning." in text and "It is four." in text and "two and" not in text, path.stem


def _tool() -> Any:
    path = Path(__file__).parents[2] / "docs" / "tools" / "templates.py"
    spec = importlib.util.spec_from_file_location("templates_tool", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["templates_tool"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_templates_says_what_is_trained() -> None:
    tool = _tool()
    found = tool.judge(AS_OBJECTS)
    assert found.takes["answers"] == found.takes["system"] == found.takes["tools"] == ""
    assert "leaves out" in found.takes["reasoning"] and "leaves out the tools" in tool.judge(NO_TOOLS).takes["tools"]

"""Chat sessions: conversations, commands, preferences, and terminal output."""

from __future__ import annotations

import io
import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import forked
from rich.cells import cell_len
from serving import model_of, random_folder, writer_folder
from tiny import tiny_tokenizer

from penchant.cli import main
from penchant.data.load import load_preferences
from penchant.data.tokenize import tokenize
from penchant.errors import ConfigError
from penchant.serve.chat import (
    Chat,
    ChatOptions,
    Conversation,
    Terminal,
    TooLong,
    Turn,
    TwoColumns,
    Wrapper,
    fit_prompt,
    safe,
)
from penchant.serve.model import ChatModel, TemplateRefused, load_chat_model
from penchant.serve.stream import Sampling
from penchant.types import Message


def _session(
    models: list[ChatModel], lines: list[Any], *, live: bool = False, width: int = 80, tokens: int = 24, **wanted: Any
) -> tuple[Chat, str, str]:
    """Run a session and return its output and its notes. An exception in `lines` is raised at that point."""
    given = iter(lines)

    def read() -> str:
        line = next(given, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    out, notes = io.StringIO(), io.StringIO()
    sampling = Sampling(tokens, temperature=wanted.pop("temperature", 1.0))
    chat = Chat(models, ChatOptions(sampling, **wanted), Terminal(read, out, notes, live, lambda: width))
    chat.rng = random.Random(0)
    assert chat.run() == 0
    return chat, out.getvalue(), notes.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ChatModel]:
    folders = [random_folder(tmp_path_factory.mktemp("model"), seed=s, context=512) for s in (0, 1)]
    return [model_of(f) for f in folders]


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return model_of(random_folder(tmp_path_factory.mktemp("plain"), chat=False))


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> list[ChatModel]:
    """Two models with fixed answers."""
    return [model_of(writer_folder(tmp_path_factory.mktemp("w"), text)) for text in ("Yes!\x1b[2J", "no-way")]


# ---- one model ----------------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_training(models: list[ChatModel], plain_model: ChatModel, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    messages += [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Tea?"}]
    file = tmp_path / "sft.jsonl"
    file.write_text(json.dumps({"messages": [*messages, {"role": "assistant", "content": "Yes"}]}) + "\n")
    data = load_preferences(str(file))
    ours = tuple(Message(m["role"], m["content"]) for m in messages)
    for chat_model in (models[0], model_of(plain_model.name, template="transcript")):
        (tree,) = tokenize(data, chat_model.tokenizer).trees
        assert chat_model.encode_messages(ours) == tree.prompt_ids.tolist()
    (tree,) = tokenize(
        load_preferences(_rows(tmp_path, [{"prompt": "Once", "completion": " upon"}])), plain_model.tokenizer
    ).trees
    assert plain_model.encode_messages([Message("user", "Once")]) == tree.prompt_ids.tolist()


def _rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def test_turns_are_remembered_and_a_seed_repeats_them(models: list[ChatModel], asked: list[list[str]]) -> None:
    chat, out, notes = _session(models[:1], ["Hello", "And then?"], system="Be kind.")
    assert _session(models[:1], ["Hello", "And then?"], system="Be kind.")[1] == out
    (turn,) = chat.conversation.turns
    assert turn.message == "Hello" and turn.answer and chat.last is not None and chat.last.texts[0] != turn.answer
    assert asked[:2] == [
        ["system: Be kind.", "user: Hello"],
        ["system: Be kind.", "user: Hello", f"assistant: {turn.answer}", "user: And then?"],
    ]
    assert "tokens/s" in notes


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Collects the messages of every prompt that a chat_model receives."""
    seen: list[list[str]] = []
    encode_messages = ChatModel.encode_messages

    def spy(self: ChatModel, messages: Any, told: Any) -> list[int]:
        seen.append([f"{m.role}: {m.content}" for m in messages])
        return encode_messages(self, messages, told)

    monkeypatch.setattr(ChatModel, "encode_messages", spy)
    return seen


def test_retry_undo_reset_system(models: list[ChatModel], asked: list[list[str]]) -> None:
    chat, _, notes = _session(models[:1], ["Hello", "/retry"])
    assert chat.last is not None and not chat.conversation.turns and chat.attempt == 1
    fresh, _, _ = _session(models[:1], ["Hello"])
    assert fresh.last is not None and fresh.last.texts != chat.last.texts
    chat, _, notes = _session(
        models[:1], ["/undo", "One", "Two", "/undo", "/undo", "/system Be kind.", "Three", "/reset"]
    )
    assert "nothing to undo" in notes and "(the last turn is gone; 0 left)" in notes
    assert asked[-1] == ["system: Be kind.", "user: Three"] and not chat.conversation.turns and chat.last is None


def test_commands_that_are_none_and_messages_that_look_like_some(models: list[ChatModel]) -> None:
    chat, _, notes = _session(models[:1], ["/foo\x1b[2J", "/left", "//left", "/help", "/quit", "never"])
    assert "/foo\\x1b[2J is not a command" in notes and "only one model" in notes
    assert chat.last is not None and chat.last.message == "/left"
    assert all(f"/{c}" in notes for c in ("retry", "undo", "save", "tie", "quit"))


def test_a_block_of_lines_is_one_message(models: list[ChatModel]) -> None:
    chat, _, _ = _session(models[:1], ['"""', "one", "", "two", '"""'])
    assert chat.last is not None and chat.last.message == "one\n\ntwo"


def test_a_block_may_begin_with_a_slash(models: list[ChatModel]) -> None:
    for text in ("/quit", "//comment", "/tmp is full"):
        chat, _, notes = _session(models[:1], ['"""', text, '"""'])
        assert chat.last is not None and chat.last.message == text and "not a command" not in notes


def test_a_retry_that_cannot_be_sent_keeps_the_answer(models: list[ChatModel]) -> None:
    chat, _, notes = _session(models[:1], ["One", "Two", "/system " + "long " * 2000, "/retry"])
    assert "not sent" in notes and chat.last is not None and chat.last.message == "Two" and chat.last.texts[0]
    # the last answer was undone, so that the one before it is the last
    chat, _, notes = _session(models[:1], ["One", "Two", "/undo", "/system " + "long " * 2000, "/retry"])
    assert "not sent" in notes and [turn.message for turn in chat.conversation.turns] == ["One"]


def test_rows_after_a_line_that_an_editor_left_unended(models: list[ChatModel], tmp_path: Path) -> None:
    file = tmp_path / "saved.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}')
    _session(models[:1], ["One", f"/save {file}", f"/save {file}"])
    first, *others = [json.loads(line) for line in file.read_text().splitlines()]
    assert first == {"prompt": "a", "completion": "b"} and len(others) == 2


def test_plain_text_is_continued(plain_model: ChatModel) -> None:
    chat, _, _ = _session([plain_model], ["", "Once upon", "", "A new one"])
    first, second = chat.conversation.turns
    assert second.message == first.message + first.answer and chat.last is not None and chat.last.message == "A new one"
    assert len(chat.conversation.messages("x")) == 1
    _, _, notes = _session([plain_model], ["/system Be kind."])
    assert "no system prompt" in notes


def test_control_characters_of_a_model_are_written_out(writers: list[ChatModel]) -> None:
    _, out, _ = _session(writers[:1], ["Hello"])
    assert out == "Yes!\\x1b[2J\n"


def test_ctrl_c_stops_the_answer_and_not_the_session(models: list[ChatModel], monkeypatch: pytest.MonkeyPatch) -> None:
    from penchant.serve import stream

    step, calls = stream.Completions.step, []

    def interrupted(self: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(stream.Completions, "step", interrupted)
    chat, _, notes = _session(models[:1], ["Hello", KeyboardInterrupt(), "Again"])
    assert "2 tokens" in notes and "stopped" in notes and "Ctrl-D or /quit leaves" in notes
    assert [t.message for t in chat.conversation.turns] == ["Hello"] and chat.last is not None


def test_save_gives_rows_that_penchant_reads(models: list[ChatModel], plain_model: ChatModel, tmp_path: Path) -> None:
    file = tmp_path / "saved.jsonl"
    chat, _, notes = _session(
        models[:1], [f"/save {file}", "One", "Two", f"/save {file}", "/save here"], system="Be kind."
    )
    assert "nothing to save" in notes and "give a file" in notes
    data = load_preferences(str(file))
    assert data.kind == "sft" and len(data.trees) == 1
    assert [m.role for m in data.trees[0].prompt] == ["system", "user", "assistant", "user"]  # type: ignore[union-attr]
    assert chat.last is not None and data.trees[0].completions[0].text == chat.last.texts[0]
    file = tmp_path / "plain.jsonl"
    _session([plain_model], ["One", "Two", f"/save {file}"])
    assert [t.prompt for t in load_preferences(str(file)).trees] == ["One", "Two"]
    _, _, notes = _session(models[:1], ["One", f"/save {tmp_path}/no/where.jsonl"])
    assert "cannot be written" in notes


# ---- the context ------------------------------------------------------------------------------------------------------


def test_the_oldest_turns_leave_a_full_context_and_it_says_so(models: list[ChatModel]) -> None:
    chat, _, notes = _session(models[:1], [c * 100 for c in "abcdefg"], tokens=40)
    assert "context of 512 tokens is full: the oldest turn is left out" in notes
    assert "oldest turns are left out" in notes
    assert len(chat.conversation.turns) == 6  # nothing is forgotten


def test_what_fits_is_the_longest_that_does(models: list[ChatModel]) -> None:
    chat_model = models[0]
    talk = Conversation(True, "Be kind.", [Turn(c * 60, "ok") for c in "abcdef"])
    found = fit_prompt(chat_model, talk, "now", 100)
    assert 0 < found.dropped < 6 and len(found.ids) + 100 <= chat_model.context
    assert len(chat_model.encode_messages(talk.messages("now", found.dropped - 1))) + 100 > chat_model.context
    assert found.ids == chat_model.encode_messages(talk.messages("now", found.dropped))
    # the answer is shortened before the message is refused
    assert fit_prompt(chat_model, talk, "x" * 400, 100).room < 100
    with pytest.raises(TooLong, match="nothing was sent"):
        fit_prompt(chat_model, talk, "x" * 600, 100)
    _, _, notes = _session([chat_model], ["x" * 600])
    assert "not sent" in notes


# ---- two models -------------------------------------------------------------------------------------------------------


def test_preferences_are_rows_that_penchant_reads(models: list[ChatModel], tmp_path: Path) -> None:
    file = tmp_path / "prefs.jsonl"
    chat, _, notes = _session(
        models, ["/left", "One", "/left", "/left", "Two", "/right", "Three", "/tie", "Four"], prefer=str(file)
    )
    assert "ask something first" in notes and "already judged" in notes
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    data = load_preferences(str(file))
    assert data.kind == "pairs" and len(data.trees) == 2 and not data.quarantined
    names = [v.name for v in models]
    assert [r["chosen_by"] for r in rows] == names and rows[0]["rejected_by"] == names[1]
    assert rows[0]["prompt"] == [{"role": "user", "content": "One"}]
    # the conversation continues with the better answer
    assert [m["content"] for m in rows[1]["prompt"]] == ["One", rows[0]["chosen"], "Two"]
    assert [t.answer for t in chat.conversation.turns[:2]] == [r["chosen"] for r in rows]
    (tie,) = [json.loads(line) for line in (tmp_path / "prefs.ties.jsonl").read_text().splitlines()]
    assert {"left", "right"} < set(tie) and chat.conversation.turns[2].answer == tie["left"]
    assert f"{names[0]} 1" in notes and f"{names[1]} 1" in notes and "neither 1" in notes
    assert f"left: {names[0]}" in notes and f"right: {names[1]}" in notes


def test_equal_and_empty_answers_are_no_preference(writers: list[ChatModel], tmp_path: Path) -> None:
    file = tmp_path / "prefs.jsonl"
    _, _, notes = _session([writers[0], writers[0]], ["One", "/right"], prefer=str(file))
    assert "counts as a tie" in notes and not file.exists()
    empty = ChatModel("empty", writers[0].model, writers[0].tokenizer, writers[0].style, frozenset(range(264)), 4096)
    _, _, notes = _session([writers[0], empty], ["One", "/left", "/right"], prefer=str(file))
    assert "the other answer is empty" in notes and "that answer is empty" in notes and not file.exists()


def test_blind_sides_are_shuffled_and_names_hidden_until_the_end(writers: list[ChatModel], tmp_path: Path) -> None:
    file = tmp_path / "prefs.jsonl"
    lines = [x for i in range(12) for x in (f"Message {i}", "/left")]
    _, out, notes = _session(writers, lines, prefer=str(file), blind=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {r["chosen_by"] for r in rows} == {v.name for v in writers}
    # the row names the model of each answer
    text = {writers[0].name: "Yes!\x1b[2J", writers[1].name: "no-way"}
    assert all(text[r["chosen_by"]] == r["chosen"] and text[r["rejected_by"]] == r["rejected"] for r in rows)
    before_end = (out + notes).rsplit("preferred:", 1)[0]
    assert not any(v.name in before_end for v in writers)


def test_both_models_leave_out_the_same_turns(models: list[ChatModel], asked: list[list[str]]) -> None:
    small = ChatModel("small", models[1].model, models[1].tokenizer, models[1].style, models[1].eos_token_ids, 300)
    chat, _, _ = _session([models[0], small], [c * 60 for c in "abcd"], tokens=20)
    assert chat.last is not None and chat.last.dropped > 0
    # the larger one's, then the smaller one's
    assert asked[-2] == asked[-1] and len(asked[-1]) == 2 * (3 - chat.last.dropped) + 1
    assert chat.conversation.prompt_row("x", chat.last.dropped)[0]["content"][0] != "a"


def test_two_columns_on_a_wide_terminal_one_below_the_other_on_a_narrow_one(writers: list[ChatModel]) -> None:
    _, wide, _ = _session(writers, ["Hello"], live=True, width=100)
    last = wide.rstrip("\n").splitlines()[-1].rsplit("\x1b[K", 1)[1]
    assert last.startswith("Yes!\\x1b[2J ") and last.endswith("│ no-way")
    _, narrow, _ = _session(writers, ["Hello"], live=True, width=60)
    assert narrow == "Yes!\\x1b[2J\nno-way\n"


def test_columns_end_as_the_wrapped_texts_whatever_the_order() -> None:
    texts = ["The quick brown fox jumps over the lazy dog. " * 4, "short\n\n日本語のテキスト" * 3]
    frames = []
    for seed in range(3):
        rng, out = random.Random(seed), io.StringIO()
        columns, at = TwoColumns(out, 60, ("a", "b")), [0, 0]
        while any(at[i] < len(texts[i]) for i in (0, 1)):
            side = rng.randrange(2)
            step = rng.randrange(1, 9)
            columns.add(side, texts[side][at[side] : at[side] + step])
            at[side] += step
        columns.end()
        shown = [line.rsplit("\r\x1b[K", 1)[-1] for line in out.getvalue().split("\n")]
        frames.append(shown)
        assert all(cell_len(line) < 60 for line in shown)
        left = " ".join(line.split("│")[0].strip() for line in shown[2:]).split()
        assert left == texts[0].split()
    assert frames[0] == frames[1] == frames[2]


@given(st.lists(st.text("ab 日\n", max_size=6), max_size=10), st.integers(2, 12))
def test_wrapping_does_not_depend_on_the_pieces(pieces: list[str], width: int) -> None:
    grown, whole = Wrapper(width), Wrapper(width)
    for piece in pieces:
        before = grown.lines[:-1]
        grown.add(piece)
        assert grown.lines[: len(before)] == before  # lines above the last never change
    whole.add("".join(pieces))
    assert [line.rstrip(" ") for line in grown.lines] == [line.rstrip(" ") for line in whole.lines]
    assert all(cell_len(line.rstrip(" ")) <= width for line in whole.lines)
    assert "".join("".join(whole.lines).split()) == "".join("".join(pieces).split())


@given(st.text())
def test_nothing_a_terminal_acts_on_comes_through(text: str) -> None:
    assert all(c.isprintable() or c == "\n" for c in safe(text))


# ---- the command ------------------------------------------------------------------------------------------------------


def test_piped_lines_and_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = writer_folder(tmp_path / "yes", "Yes!")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\r\nAgain"))
    assert main(["chat", folder, "--temperature", "0"]) == 0
    out, notes = capsys.readouterr()
    assert out == "Yes!\nYes!\n" and "the model's own chat template" in notes
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/left\n"))
    monkeypatch.chdir(tmp_path)
    other = writer_folder(tmp_path / "no", "no-way")
    assert main(["chat", folder, "--against", other, "--temperature", "0", "--prefer", "p.jsonl"]) == 0
    assert json.loads((tmp_path / "p.jsonl").read_text())["chosen"] == "Yes!"


@pytest.mark.parametrize(
    "options,message",
    [
        (["--blind"], "--blind: is given without a second model"),
        (["--prefer", "a.jsonl"], "--prefer: is given without a second model"),
        (["--against", "MODEL", "--prefer", "a.csv"], "does not end in .jsonl"),
        (["--against", "MODEL", "--prefer", "nowhere/a.jsonl"], "--prefer: nowhere: no such folder"),
        (["--template", "plain", "--system", "Be kind."], "plain text has no system prompt"),
        (["--step", "best"], "is not a run, so it has no steps"),
        (["--against", "MODEL-away"], "no such run"),
    ],
)
def test_mistakes_are_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    folder = random_folder(tmp_path / "model")
    assert main(["chat", folder, *(o.replace("MODEL", folder) for o in options)]) == 2
    assert message in capsys.readouterr().err


def test_a_chat_template_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, chat = random_folder(tmp_path / "plain", chat=False), random_folder(tmp_path / "chat")
    assert main(["chat", plain, "--template", "chat"]) == 2
    assert main(["chat", plain, "--against", chat]) == 2
    err = capsys.readouterr().err
    assert "the tokenizer has no chat template" in err and "one model has a chat template and the other has none" in err


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_in_a_pseudo_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pty

    monkeypatch.setenv("TERM", "xterm")
    folder = writer_folder(tmp_path / "model", "one&up", endless=True)
    parent, child = pty.openpty()
    process = forked(
        lambda: main(["chat", folder, "--max-new-tokens", "4000", "--temperature", "0"]), streams=[child] * 3
    )
    os.close(child)
    seen = ""

    def until(text: str, seconds: float = 240.0) -> None:
        """Read until new output contains a text."""
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            ready, _, _ = select.select([parent], [], [], max(0.0, end - time.monotonic()))
            assert ready, seen
            seen += os.read(parent, 4096).decode("utf-8", "replace")
        seen = seen.partition(text)[2]

    try:
        until("> ")
        os.write(parent, b"Hello\n")
        until("Hello\r\n")
        until("&")  # it has started to write
        os.kill(process.pid or 0, signal.SIGINT)
        until("stopped)")
        until("> ")  # bytes that arrive before line editing starts are read differently
        os.write(parent, b"/undo\n")
        until("(the last turn is gone; 0 left)")
        until("> ")
        os.write(parent, b"\x04")  # Ctrl-D
        process.join(120)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        os.close(parent)


def test_a_run_and_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA run's last checkpoint is its merged adapter, step 0 the base; a run on plain text continues a text."""
    import torch

    from penchant import api
    from penchant.models.merge import merged_model
    from penchant.models.options import ModelConfig

    model = random_folder(tmp_path / "model", chat=True)
    rows = [{"prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)]
    config = {
        "model": {"path": model, "dtype": "fp32"},
        "lora": {"r": 2},
        "data": {"path": _rows(tmp_path, rows), "validation_rows": 4, "max_length": 64, "template": "plain"},
        "train": {"max_steps": 2, "batch_size": 4, "lr": 0.05},
        "evaluation": {"samples": 0},
        "output": str(tmp_path / "run"),
    }
    run = api.train(config, quiet=True)
    last, first = model_of(str(run.folder)), model_of(str(run.folder), step="0")
    assert last.style.name == "plain"
    ids = torch.tensor([last.encode("Say 3")])
    merged = merged_model(ModelConfig(path=model), run.folder / "checkpoints/step-2/model", torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(last.model(ids).logits, merged(ids).logits)
        assert torch.equal(first.model(ids).logits, model_of(model).model(ids).logits)
        assert not torch.equal(first.model(ids).logits, last.model(ids).logits)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 3\n/left\n"))
    monkeypatch.chdir(tmp_path)
    assert main(["chat", "run", "--against", "run", "--against-step", "0", "--max-new-tokens", "8"]) == 0
    row = json.loads((tmp_path / "preferences.jsonl").read_text())
    assert (row["chosen_by"], row["rejected_by"], row["prompt"]) == ("run (step last)", "run (step 0)", "Say 3")
    assert main(["chat", "."]) == 2
    assert "is not a run but a folder of runs; give one of them: run" in capsys.readouterr().err


def test_tools_reach_the_template_and_the_rows(tmp_path: Path) -> None:
    tools = ({"type": "function", "function": {"name": "forecast"}},)
    talk = Conversation(True, "", [Turn("Rain?", "No.")], tools)
    assert talk.rows()[0]["tools"] == list(tools) == talk.template_variables["tools"]
    model = model_of(writer_folder(tmp_path, "Yes!"))
    with pytest.raises(TemplateRefused, match="leaves out the tools"):
        fit_prompt(model, talk, "And now?", 8)


def test_a_model_that_does_not_run_in_bf16_is_a_sentence(tmp_path: Path) -> None:
    from transformers import XGLMConfig, XGLMForCausalLM

    made = XGLMConfig(vocab_size=260, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2)
    XGLMForCausalLM(made).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"xglm does not run in 16 bits here .* --dtype fp32"):
        load_chat_model(str(tmp_path), dtype="bf16", device="cpu")
    assert load_chat_model(str(tmp_path), dtype="fp32", device="cpu").decoder is None

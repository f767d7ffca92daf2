"""The HTTP endpoint, tested through the official OpenAI client."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from processes import forked
from serving import model_of, random_folder, serving, writer_folder

from penchant.base.lazy import lazy
from penchant.cli import main
from penchant.judges import JudgeOptions, Question, load_judge
from penchant.rollout.generate import sample
from penchant.serve.model import STYLES, ChatModel
from penchant.serve.openai import ChatRequest
from penchant.types import Message

pytest.importorskip("uvicorn")
if find_spec("openai") is None:
    pytest.skip("no openai here", allow_module_level=True)
openai = lazy("openai")  # its import takes a second, and only one worker needs it

HELLO: Any = [{"role": "user", "content": "Hello"}]
KEY = "a-long-random-text"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return model_of(random_folder(tmp_path_factory.mktemp("model")), fallback_style="transcript")


@pytest.fixture(scope="module")
def server(chat_model: ChatModel) -> Iterator[Any]:
    with serving(chat_model, max_tokens=3000, body=100_000) as made:
        yield made


def _client(server: Any, key: str = "none", **options: Any) -> Any:
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=240, **options)


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    return _client(server)


def _chat(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": HELLO, "max_tokens": 24, "seed": 7, **options}
    )


def _text(client: Any, prompt: Any = "Hello", **options: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": prompt, "max_tokens": 24, "seed": 7, **options})


# ---- answers ------------------------------------------------------------------------------------------------------------


def test_chat_is_what_sample_gives(client: Any, chat_model: ChatModel) -> None:
    prompt = chat_model.encode_messages([Message("system", "Be kind."), Message("user", "Hello")])
    (rows,) = sample(
        chat_model.model, [prompt], n=2, max_new_tokens=24, seed=7, temperature=1.3, top_p=0.9, eos_token_id=1
    )
    messages = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]}]
    reply = _chat(client, messages=[*messages, *HELLO], n=2, temperature=1.3, top_p=0.9)
    assert [c.message.content for c in reply.choices] == [
        chat_model.tokenizer.decode(r.ids, skip_special_tokens=True) for r in rows
    ]
    assert [c.finish_reason for c in reply.choices] == ["stop" if r.finished else "length" for r in rows]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), sum(len(r.ids) for r in rows))
    assert reply.object == "chat.completion" and reply.model == "tiny" and reply.choices[0].message.role == "assistant"


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"stop": ["a", "zz"], "max_tokens": 80}])
def test_a_stream_is_the_whole_in_pieces(client: Any, options: dict[str, Any]) -> None:
    whole = _chat(client, logprobs=True, **options)
    n = options.get("n", 1)
    texts, ends, tokens = [""] * n, [None] * n, [[] for _ in range(n)]
    chunks = list(_chat(client, stream=True, stream_options={"include_usage": True}, logprobs=True, **options))
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
        ends[choice.index] = choice.finish_reason or ends[choice.index]
        assert chunk.usage is None and chunk.object == "chat.completion.chunk"
    assert texts == [c.message.content for c in whole.choices] and any(texts)
    assert ends == [c.finish_reason for c in whole.choices]
    assert tokens == [c.logprobs.content for c in whole.choices]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1
    without = list(_chat(client, stream=True, **options))
    assert all(c.usage is None and c.choices for c in without)


def test_completions_continue_texts(client: Any, chat_model: ChatModel) -> None:
    ids = chat_model.encode("Hello")
    ((row,),) = sample(chat_model.model, [ids], max_new_tokens=24, seed=7, eos_token_id=1)
    expected = chat_model.tokenizer.decode(row.ids, skip_special_tokens=True)
    reply = _text(client)
    assert reply.choices[0].text == expected and reply.object == "text_completion"
    assert _text(client, ids).choices[0].text == expected
    several = _text(client, ["Hello", "Good bye", "Hello"], n=2)
    assert [c.index for c in several.choices] == list(range(6))
    texts = [c.text for c in several.choices]
    assert (
        texts[:2] == texts[4:]
        and texts[0] == expected
        and texts[2:4] == [c.text for c in _text(client, "Good bye", n=2).choices]
    )
    assert several.usage.prompt_tokens == 2 * len(ids) + len(chat_model.encode("Good bye"))
    assert [c.text for c in _text(client, [ids, ids]).choices] == [expected] * 2
    streamed = ["", "", ""]
    for chunk in _text(client, ["Hello", "Good bye", "Hello"], stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [texts[0], texts[2], texts[4]]
    assert _text(client, max_tokens=None).usage.completion_tokens <= 16


def test_seeds(client: Any) -> None:
    first = _chat(client).choices[0].message.content
    assert _chat(client).choices[0].message.content == first
    assert _chat(client, seed=8).choices[0].message.content != first
    assert _chat(client, seed=-8).choices[0].message.content != first
    unseeded = {_chat(client, seed=None, max_tokens=40).choices[0].message.content for _ in range(3)}
    assert len(unseeded) == 3


def test_log_probs_are_the_models(client: Any, chat_model: ChatModel) -> None:
    prompt = chat_model.encode_messages([Message("user", "Hello")])
    content = _chat(client, logprobs=True, top_logprobs=4, temperature=0.5).choices[0].logprobs.content
    ((row,),) = sample(chat_model.model, [prompt], max_new_tokens=24, seed=7, temperature=0.5, eos_token_id=1)
    ids = [i for i in row.ids if i != 1]
    assert len(content) == len(ids)
    with torch.no_grad():
        logps = chat_model.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for told, token, row_logps in zip(content, ids, logps, strict=True):
        assert told.logprob == pytest.approx(float(row_logps[token]), abs=1e-4)
        values, tokens = row_logps.topk(4)
        assert [t.logprob for t in told.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        assert [t.token for t in told.top_logprobs] == [chat_model.tokenizer.decode([t]) for t in tokens.tolist()]
    assert b"".join(bytes(t.bytes) for t in content).decode("utf-8", "replace") == chat_model.tokenizer.decode(ids)
    legacy = (
        _text(client, chat_model.encode_messages([Message("user", "Hello")]), logprobs=2, temperature=0.5)
        .choices[0]
        .logprobs
    )
    assert legacy.token_logprobs == pytest.approx([t.logprob for t in content], abs=1e-4)
    assert legacy.text_offset[0] == 0 and legacy.text_offset == sorted(legacy.text_offset)
    assert all(1 <= len(t) <= 3 for t in legacy.top_logprobs)
    assert all(token in top for token, top in zip(legacy.tokens, legacy.top_logprobs, strict=True))


def test_penalties_change_the_answer(client: Any) -> None:
    greedy = _chat(client, temperature=0, max_tokens=60).choices[0].message.content
    assert _chat(client, temperature=0, max_tokens=60, frequency_penalty=2).choices[0].message.content != greedy
    assert _chat(client, temperature=0, max_tokens=60, presence_penalty=0).choices[0].message.content == greedy


TEXT = "é€😀Thequickfox"


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A model that answers TEXT to everything, one byte per token."""
    with serving(model_of(writer_folder(tmp_path_factory.mktemp("writer"), TEXT))) as made:
        yield _client(made)


@pytest.mark.parametrize(
    "stop,text", [("quick", "é€😀The"), (["ox", "ckf"], "é€😀Thequi"), ("€", "é"), ("xy", TEXT), (["T", "é"], "")]
)
def test_characters_and_stop_texts_that_span_tokens(writer: Any, stop: Any, text: str) -> None:
    reply = _chat(writer, stop=stop, logprobs=True)
    (choice,) = reply.choices
    assert (choice.message.content, choice.finish_reason) == (text, "stop")
    assert b"".join(bytes(t.bytes) for t in choice.logprobs.content) == text.encode()
    pieces = [c.choices[0].delta.content or "" for c in _chat(writer, stop=stop, stream=True)]
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces)


def test_an_answer_that_is_cut(writer: Any) -> None:
    reply = _chat(writer, max_tokens=12, temperature=0)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("é€😀The", "length")
    assert reply.usage.completion_tokens == 12
    reply = _chat(writer, max_tokens=None, max_completion_tokens=12)
    assert reply.choices[0].message.content == "é€😀The"
    whole = _chat(writer, max_tokens=None)
    assert whole.choices[0].message.content == TEXT and whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == len(TEXT.encode()) + 1  # the end token counts


def test_without_a_chat_template_messages_are_a_transcript(tmp_path: Path) -> None:
    folder = writer_folder(tmp_path, "Yes!", after=":", chat=False)
    with serving(model_of(folder, fallback_style="transcript")) as server:
        assert _chat(_client(server)).choices[0].message.content == "Yes!"
    assert model_of(folder, fallback_style="transcript").style is STYLES["transcript"]


@pytest.mark.parametrize("style,continued", [("plain", True), ("transcript", False)])
def test_plain_text_is_continued_and_a_turn_is_not(
    server: Any, monkeypatch: pytest.MonkeyPatch, style: str, continued: bool
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(sys.modules[type(server.app).__module__], "Completions", lambda *_, **how: seen.update(how))
    monkeypatch.setattr(server.app, "chat_model", replace(server.app.chat_model, style=STYLES[style]))
    request = ChatRequest.model_validate({"model": "tiny", "messages": HELLO})
    server.app.completions(request, request.prompts[0])
    assert seen["continued"] is continued


def test_requests_at_once_give_what_they_give_alone(client: Any) -> None:
    asked = [
        dict(seed=i, max_tokens=16 + 3 * i, messages=[{"role": "user", "content": "x" * i + "?"}]) for i in range(6)
    ]
    alone = [_chat(client, **a).choices[0].message.content for a in asked]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda a: _chat(client, **a).choices[0].message.content, asked))
    assert together == alone and len(set(alone)) == 6


# ---- refusals ---------------------------------------------------------------------------------------------------------

CHAT_REFUSED = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"extra_body": {"min_p": 0.1}}, "min_p"),
    ({"extra_body": {"temprature": 0.1}}, "temprature"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3001}, "max_tokens"),
    ({"max_completion_tokens": 5}, "max_tokens"),
    ({"seed": 1.5}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
    ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
    ({"presence_penalty": 3}, "presence_penalty"),
]


@pytest.mark.parametrize("options,param", CHAT_REFUSED, ids=[f"{p}-{i}" for i, (_, p) in enumerate(CHAT_REFUSED)])
@pytest.mark.parametrize("stream", [False, True])
def test_what_would_change_the_answer_is_refused(
    client: Any, options: dict[str, Any], param: str, stream: bool
) -> None:
    streamed = {"stream": True} if stream and "stream_options" not in options else {}
    with pytest.raises(openai.BadRequestError) as caught:
        _chat(client, **streamed, **options)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


TEXT_REFUSED = [
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [5, -1]}, "prompt"),
    ({"prompt": [5, 260]}, "prompt"),
    ({"prompt": [[5], "x"]}, "prompt"),
    ({"prompt": ["x"] * 9, "n": 4}, "prompt"),
    ({"prompt": "x" * 5000}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
]


@pytest.mark.parametrize("options,param", TEXT_REFUSED, ids=[f"{p}-{i}" for i, (_, p) in enumerate(TEXT_REFUSED)])
def test_texts_that_are_refused(client: Any, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _text(client, options.pop("prompt", "x"), **options)
    assert caught.value.param == param


def test_values_that_change_nothing_are_taken(client: Any) -> None:
    plain = _chat(client).choices[0].message.content
    same = dict(tools=[], tool_choice="none", response_format={"type": "text"}, logit_bias={}, user="me", store=False)
    assert _chat(client, **same, extra_body={"top_k": 0}).choices[0].message.content == plain
    assert _chat(client, extra_body={"top_k": 1}).choices[0].message.content != plain


def test_the_name_of_who_speaks_is_ignored_as_in_training_rows(client: Any) -> None:
    def answer(**extra: str) -> str:
        turns = [{"role": role, "content": "x", **extra} for role in ("system", "user", "assistant", "user")]
        return str(_chat(client, messages=turns).choices[0].message.content)

    assert answer(name="Ann") == answer()


def test_models(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").owned_by == "penchant"
    with pytest.raises(openai.NotFoundError) as caught:
        _chat(client, model="other")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_slash_behind_models_is_the_list_too(server: Any) -> None:
    assert _raw(server, "GET", "/v1/models/")[2] == _raw(server, "GET", "/v1/models")[2]


def _raw(
    server: Any, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    reply = connection.getresponse()
    data = reply.read()
    connection.close()
    return reply.status, {k.lower(): v for k, v in reply.getheaders()}, json.loads(data)


def test_health_and_what_is_not_there(server: Any) -> None:
    assert _raw(server, "GET", "/health")[::2] == (200, {"status": "ok", "active": 0, "waiting": 0})
    assert _raw(server, "GET", "/v1/chat/completions")[0] == 405
    assert _raw(server, "POST", "/v1/models", b"{}")[0] == 405
    status, _, body = _raw(server, "GET", "/v1/embeddings")
    assert status == 404 and body["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"temperature": NaN}', b"[" * 50_000, b'{"model": "\\ud800"}']
)
def test_bodies_that_are_no_request(server: Any, body: bytes) -> None:
    status, _, reply = _raw(server, "POST", "/v1/chat/completions", body)
    assert status == 400 and set(reply["error"]) == {"message", "type", "param", "code"}


def test_large_bodies_and_other_kinds(server: Any) -> None:
    assert _raw(server, "POST", "/v1/chat/completions", b" " * 100_001)[0] == 413
    chunked = iter([b" " * 60_000, b" " * 60_000])
    assert _raw(server, "POST", "/v1/chat/completions", chunked)[0] == 413  # type: ignore[arg-type]
    assert _raw(server, "POST", "/v1/chat/completions", b"{}", **{"Content-Type": "text/plain"})[0] == 415


def test_names_of_other_machines_and_other_pages(server: Any) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1"):
        assert _raw(server, "GET", "/health", Host=host)[0] in (400, 403), host
    for host in ("localhost", "127.0.0.1:1", "[::1]:80"):
        assert _raw(server, "GET", "/health", Host=host)[0] == 200
    status, headers, _ = _raw(server, "OPTIONS", "/v1/chat/completions", Origin="http://evil.example")
    assert status == 405 and not any(h.startswith("access-control") for h in headers)


# ---- keys, timeouts, disconnects -----------------------------------------------------------------------------------------


def test_a_key(chat_model: ChatModel) -> None:
    with serving(chat_model, key=KEY) as server:
        assert _chat(_client(server, KEY), max_tokens=2).usage.completion_tokens <= 2
        for wrong in ("no", KEY[:-1], KEY + "x", "é"):
            status, headers, body = _raw(server, "GET", "/v1/models", Authorization=f"Bearer {wrong}")
            assert (
                status == 401 and body["error"]["code"] == "invalid_api_key" and headers["www-authenticate"] == "Bearer"
            )
            assert KEY not in json.dumps(body)
        with pytest.raises(openai.AuthenticationError):
            _chat(_client(server, "no"))
        assert _raw(server, "GET", "/v1/models")[0] == 401 and _raw(server, "GET", "/health")[0] == 200
        assert _raw(server, "GET", "/v1/models", Authorization=f"Basic {KEY}")[0] == 401


def _load(server: Any) -> tuple[int, int]:
    body = _raw(server, "GET", "/health")[2]
    return body["active"], body["waiting"]


def _until_idle(server: Any) -> None:
    end = time.monotonic() + 60
    while _load(server) != (0, 0):
        assert time.monotonic() < end, "a request whose client has gone goes on"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    """A chat_model that never stops by itself."""
    made = model_of(random_folder(tmp_path_factory.mktemp("endless"), seed=3, context=100_000))
    made.eos_token_ids = frozenset()
    return made


def test_a_client_that_leaves_ends_its_answer(endless: ChatModel) -> None:
    with serving(endless, max_tokens=90_000) as server:
        client = _client(server)
        stream = _chat(client, stream=True, max_tokens=90_000)
        next(iter(stream))
        assert _load(server) == (1, 0)
        stream.close()
        _until_idle(server)
        parts = urlsplit(server.url)
        body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 90_000}).encode()
        with socket.create_connection((parts.hostname, parts.port)) as sock:  # nothing has been sent yet
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            end = time.monotonic() + 60
            while _load(server) != (1, 0) and time.monotonic() < end:
                time.sleep(0.02)
            assert _load(server) == (1, 0)
        _until_idle(server)


def test_more_than_may_wait_are_turned_away_and_a_short_one_is_not_kept_waiting(endless: ChatModel) -> None:
    with serving(endless, max_tokens=90_000, at_once=2, waiting=1) as server:
        client = _client(server)
        long = _chat(client, stream=True, max_tokens=90_000)
        next(iter(long))
        assert _chat(client, max_tokens=3).usage.completion_tokens == 3  # while the long one is running
        second = _chat(client, stream=True, max_tokens=90_000)
        next(iter(second))
        with pytest.raises(openai.RateLimitError):
            _text(client, ["a", "b"])
        long.close()
        second.close()
        _until_idle(server)


def test_more_prompts_than_the_server_ever_holds_are_no_reason_to_try_again(chat_model: ChatModel) -> None:
    with (
        serving(chat_model, at_once=1, waiting=1) as server,
        pytest.raises(openai.BadRequestError, match="2 at a time"),
    ):
        _text(_client(server), ["a", "b", "c"])


def test_time_runs_out(endless: ChatModel) -> None:
    with serving(endless, max_tokens=90_000, seconds=0.5) as server:
        with pytest.raises(openai.InternalServerError) as caught:
            _chat(_client(server), max_tokens=90_000)
        assert caught.value.code == "timeout" and caught.value.status_code == 503
        with pytest.raises(openai.APIError, match=r"longer than 0\.5 seconds"):
            list(_chat(_client(server), max_tokens=90_000, stream=True))
        _until_idle(server)


def test_a_body_that_never_comes(chat_model: ChatModel) -> None:
    with serving(chat_model, body_seconds=0.3) as server:
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=60) as sock:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
            assert b" 408 " in sock.recv(4096).split(b"\r\n")[0]


def test_a_body_that_is_no_http_is_refused_once(chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP parser has already answered when the request is checked."""
    failed: list[Any] = []
    monkeypatch.setattr("penchant.serve.http.told", failed.append)
    with serving(chat_model) as server:
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=60) as sock:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            sock.sendall(f"{head}ZZ\r\n".encode())
            reply = b"".join(iter(lambda: sock.recv(4096), b""))
        assert reply.startswith(b"HTTP/1.1 400 ") and reply.count(b"HTTP/1.1") == 1
        assert _raw(server, "GET", "/health")[0] == 200
    assert not failed


def test_connections_that_are_not_used_are_given_up(chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from penchant.serve import server as module

    monkeypatch.setattr(module, "HEAD_TIMEOUT", 0.3)
    with serving(chat_model) as server:
        parts = urlsplit(server.url)
        for sent in (b"", b"POST /v1/comple", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "):
            with socket.create_connection((parts.hostname, parts.port), timeout=60) as sock:
                sock.sendall(sent)
                with suppress(ConnectionResetError):
                    assert sock.recv(4096) == b""
        with socket.create_connection((parts.hostname, parts.port), timeout=60) as sock:
            for _ in range(2):  # keep-alive, with half of the next head sent
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                reply = b""
                while b"}" not in reply:
                    reply += sock.recv(4096)
                assert b" 200 " in reply.split(b"\r\n")[0]
            sock.sendall(b"GET /he")
            with suppress(ConnectionResetError):
                assert sock.recv(4096) == b""


def test_a_packet_does_not_wait_for_the_client_to_acknowledge_the_one_before(chat_model: ChatModel) -> None:
    """Otherwise every answer of two packets, and every token of a stream, takes 40 ms longer."""
    with serving(chat_model) as server:
        client = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        client.request("GET", "/health")
        assert client.getresponse().status == 200
        (connection,) = server.uvicorn.server_state.connections
        options = connection.transport.get_extra_info("socket")
        assert options.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        client.close()


def test_idle_connections_do_not_turn_others_away(chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from penchant.serve import server as module

    monkeypatch.setattr(module, "MAX_CONNECTIONS", 4)
    with serving(chat_model) as server, ExitStack() as opened:
        parts = urlsplit(server.url)
        for sent in (b"", b"GET /hea", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n") * 3:
            sock = opened.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=60))
            sock.sendall(sent)
        body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1}).encode()
        for _ in range(3):
            assert _raw(server, "POST", "/v1/completions", body)[0] == 200


@pytest.mark.parametrize("number", ["5e-324", "1e-40", "1e-30", "1." + "3" * 400, "0." + "0" * 400 + "1"])
def test_a_temperature_of_any_size_is_one(server: Any, number: str) -> None:
    body = f'{{"model": "tiny", "prompt": "x", "max_tokens": 2, "temperature": {number}}}'
    assert _raw(server, "POST", "/v1/completions", body.encode())[0] == 200


def test_a_failure_of_the_model_is_one_requests_own(client: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from penchant.serve import routes

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a secret of the machine")

    with monkeypatch.context() as patch:
        patch.setattr(routes, "Completions", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            _chat(client)
        assert "secret" not in str(caught.value)
    assert _chat(client).choices


def test_a_template_that_refuses(tmp_path: Path) -> None:
    made = model_of(random_folder(tmp_path))
    made.tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with serving(made) as server, pytest.raises(openai.BadRequestError, match="no system turns"):
        _chat(_client(server))


# ---- the judge of `penchant compare` ---------------------------------------------------------------------------------------


def test_our_own_server_can_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    with serving(model_of(writer_folder(tmp_path, "A")), name="judge") as server:
        judge = load_judge(JudgeOptions(server.url, model="judge"))
        assert judge.check() is None
        assert judge.ask([Question("Tea?", "Yes.", "No."), Question("Tea?", "No.", "Yes.")]).values.tolist() == [
            1.0,
            1.0,
        ]


# ---- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    folder = random_folder(tmp_path / "small")
    monkeypatch.setenv("PENCHANT_API_KEY", KEY)
    reader, writer = os.pipe()
    with (tmp_path / "err").open("w+") as errors:
        process = forked(
            lambda: main(["serve", folder, "--port", "0", "--host", "0.0.0.0"]), (0, writer, errors.fileno())
        )
    os.close(writer)
    try:
        with os.fdopen(reader) as out:
            line = out.readline()
            assert line.startswith("serving small at http://0.0.0.0:") and line.endswith("(with a key); Ctrl-C ends\n")
            port = int(line.split(":")[2].split("/")[0])
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
            assert client.models.list().data[0].id == "small"
            stream = client.chat.completions.create(
                model="small", messages=HELLO, stream=True, max_tokens=4000, logprobs=True
            )
            next(iter(stream))
            assert process.pid is not None
            os.kill(process.pid, number)
            process.join(120)
        err = (tmp_path / "err").read_text()
        assert process.exitcode == 0 and "Traceback" not in err and KEY not in err
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_other_machines_need_a_key(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PENCHANT_API_KEY", raising=False)
    assert main(["serve", "nothing", "--host", host, "--port", "0"]) == 2
    assert "PENCHANT_API_KEY" in capsys.readouterr().err


def test_mistakes_of_the_command_are_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "nothing", "--port", str(taken.getsockname()[1])]) == 2
    assert "another program listens there already" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert "no such run" in capsys.readouterr().err
    monkeypatch.setenv("PENCHANT_API_KEY", "two words")
    assert main(["serve", "nothing", "--port", "0"]) == 2
    assert "holds characters that no key has" in capsys.readouterr().err


def test_a_server_without_uvicorn_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", random_folder(tmp_path), "--port", "0"]) == 2
    assert "pip install 'penchant[serve]'" in capsys.readouterr().err


def test_the_name_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from penchant.serve.server import served_name

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first/checkpoints/step-5/model").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text("{}")
    names = {"runs/first": "first", "runs/first/checkpoints/step-5/model": "first", "run.yaml": "run", "a/b": "a/b"}
    assert {given: served_name(given, None) for given in names} == names
    assert served_name("runs/first", "mine") == "mine"

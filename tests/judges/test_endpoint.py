"""Judging over HTTP: retries, caching, and keeping the API key private."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from endpoints import Asked, longer, serve

from penchant.errors import CheckpointError, ConfigError, RewardError
from penchant.judges import JudgeOptions, Question, load_judge
from penchant.judges.endpoint import MAX_SILENT, PARAMETERS, EndpointJudge, VerdictCache, cache_key, connect

PAIRS = [Question(f"prompt {i}", "x" * (1 + i % 3), "y" * 2) for i in range(12)]
EXPECTED = [0.0, 0.5, 1.0] * 4
SECRET = "sk-very-secret-1234567890"


def judge_at(url: str, **options: Any) -> EndpointJudge:
    made = load_judge(JudgeOptions(url, **{"model": "m", **options}))
    assert isinstance(made, EndpointJudge)
    return replace(made, connection=replace(made.connection, pause=0.001, timeout=120.0))


def test_a_judge_that_behaves_is_asked_once_and_never_again() -> None:
    seen: list[tuple[int, int]] = []
    with serve(longer) as server:
        judge = judge_at(server.url)
        found = judge.ask(PAIRS, lambda done, total: seen.append((done, total)))
        assert found.values.tolist() == EXPECTED and (found.asked, found.cached, found.unread) == (12, 0, [])
        assert not found.graded.any() and seen[-1] == (12, 12)
        request = server.asked[0]
        assert request.path == "/v1/chat/completions" and len(server.asked) == 12
        assert request.body["model"] == "m" and {k: request.body[k] for k in PARAMETERS} == dict(PARAMETERS)
        again = judge.ask([*PAIRS, Question("new", "aa", "b")])
        assert again.values.tolist() == [*EXPECTED, 1.0] and (again.asked, again.cached) == (13, 12)
        assert len(server.asked) == 13
        swapped = judge.ask([PAIRS[0].swapped])  # the order is part of the question
        assert (swapped.asked, swapped.cached) == (1, 0) and swapped.values.tolist() == [1.0]
    assert judge.ask(PAIRS).cached == 12  # also without a server


def test_its_sockets_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[httpx.Client] = []
    opened = httpx.Client.__init__

    def noted(self: httpx.Client, *args: Any, **options: Any) -> None:
        opened(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(httpx.Client, "__init__", noted)
    with serve(longer) as server:
        judge = judge_at(server.url)
        judge.check()
        judge.ask(PAIRS[:2])
        judge.ask(PAIRS[2:4])
    assert len(made) >= 3 and all(client.is_closed for client in made)


def test_a_cache_is_of_a_model_an_instruction_and_parameters() -> None:
    base = ("m", "i", {"t": 0}, PAIRS[0])
    others = [
        ("n", "i", {"t": 0}, PAIRS[0]),
        ("m", "j", {"t": 0}, PAIRS[0]),
        ("m", "i", {"t": 1}, PAIRS[0]),
        ("m", "i", {"t": 0}, PAIRS[1]),
        ("m", "i", {"t": 0}, PAIRS[0].swapped),
        ("m", "i", {"t": 0}, Question("prompt 0x", "", "yy")),
    ]
    assert len({cache_key(*args) for args in (base, *others)}) == 7
    with serve(longer) as server:
        judge_at(server.url).ask(PAIRS)
        for changed in ({"model": "n"}, {"parameters": '{"temperature": 1}'}):
            assert judge_at(server.url, **changed).ask(PAIRS).cached == 0


def test_a_damaged_cache_is_asked_anew(tmp_path: Path) -> None:
    replies = VerdictCache.open(tmp_path, "m", "i", {})
    replies.add("one", 1.0, "A")
    replies.path.write_bytes(replies.path.read_bytes() + b'{"key": "torn", "verd')
    again = VerdictCache.open(tmp_path, "m", "i", {})
    assert again.verdicts == {"one": 1.0}
    again.add("two", 0.0, "B\u2028")
    assert VerdictCache.open(tmp_path, "m", "i", {}).verdicts == {"one": 1.0, "two": 0.0}
    replies.path.write_text('{"key": "x", "verdict": 7}\n[1]\n{"key": "y", "verdict": null}\n')
    assert VerdictCache.open(tmp_path, "m", "i", {}).verdicts == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="replies cannot be kept"):
        VerdictCache.open(tmp_path / "file", "m", "i", {})


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_endpoint_that_fails_now_and_then_is_asked_again(status: int) -> None:
    with serve(lambda asked, n: status if n % 2 else longer(asked, n)) as server:
        found = judge_at(server.url, concurrency=1).ask(PAIRS)
        assert found.values.tolist() == EXPECTED and found.asked == 12 and len(server.asked) == 24


def test_back_off_grows_and_heeds_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    def busy(_: Asked, n: int) -> Any:
        return (429, {"Retry-After": "7"}) if n == 2 else 503 if n < 5 else "A"

    with serve(busy) as server:
        connection = replace(connect(server.url, None), pause=1.0)
        body = {"messages": [{"content": ""}]}
        assert connection.post("/chat/completions", body, Stop())["choices"]
    expected = [1.0, 7.0, 4.0, 8.0]
    assert all(0.75 * e <= w <= 1.25 * e for w, e in zip(waits, expected, strict=True)) and waits[1] == 7.0


def test_a_reply_that_cannot_be_read_is_asked_for_once_more() -> None:
    tries: dict[str, int] = {}

    def stubborn(asked: Asked, n: int) -> Any:
        at = tries[asked.texts[0]] = tries.get(asked.texts[0], 0) + 1
        if asked.texts[0] == "prompt 3":
            return "Well,\x1b[31m it depends"
        if asked.texts[0] == "prompt 4":
            return (200, {}, "<html>")
        if asked.texts[0] == "prompt 5":
            return (400, {}, json.dumps({"error": {"message": "too long"}}))
        return longer(asked, n) if at > 1 else "Hm."

    with serve(stubborn) as server:
        found = judge_at(server.url).ask(PAIRS)
        assert np.flatnonzero(np.isnan(found.values)).tolist() == [3, 4, 5]
        assert tries["prompt 3"] == tries["prompt 4"] == tries["prompt 0"] == 2 and tries["prompt 5"] == 1
        assert sorted(found.unread) == ["", "Well,\\x1b[31m it depends", "answered 400 Bad Request: too long"]
        assert judge_at(server.url).ask(PAIRS).cached == 9  # unreadable replies are not cached


def test_an_endpoint_that_refuses_ends_it_with_its_own_words() -> None:
    refusal = json.dumps({"error": {"message": "no model m\x1b]0;x"}})
    with serve(lambda a, n: (404, {}, refusal) if n > 3 else longer(a, n)) as server:
        judge = judge_at(server.url, concurrency=1)
        with pytest.raises(RewardError, match=r"answered 404 Not Found: no model m\\x1b\]0;x; fix that") as caught:
            judge.ask(PAIRS)
        assert "\x1b" not in str(caught.value) and len(server.asked) == 4
        with pytest.raises(RewardError, match="404"):
            judge.check()
    with serve(longer) as server:  # three verdicts were cached
        assert judge_at(server.url).ask(PAIRS).cached == 3


def test_nobody_there() -> None:
    with serve(longer) as server:
        url = server.url
    judge = judge_at(url)
    with pytest.raises(RewardError, match=r"judge http://127.0.0.1.*cannot be reached \(.*refused\) \(2 attempts\)"):
        judge.check()
    with serve(lambda *_: 503) as server:
        many = [Question(str(i), "a", "b") for i in range(40)]
        with pytest.raises(RewardError, match=r"answered 503 .*\(6 attempts\)"):
            judge_at(server.url).ask(many)
        assert len(server.asked) <= (MAX_SILENT + 8) * 6  # and then it stops


def test_a_slow_endpoint_is_not_waited_for_for_ever() -> None:
    gate = threading.Event()
    with serve(lambda *_: "A" if gate.wait(120) else "B") as server:
        judge = judge_at(server.url)
        judge = replace(judge, connection=replace(judge.connection, timeout=0.05, attempts=2))
        started = time.monotonic()
        with pytest.raises(RewardError, match=r"cannot be reached .*timed out"):
            judge.check()
        assert time.monotonic() - started < 60
        gate.set()


def test_so_many_questions_at_a_time() -> None:
    for n in (1, 3):
        together = threading.Barrier(n)  # replies wait for n requests; 24 questions are full groups of 3

        def decide(asked: Asked, number: int, together: threading.Barrier = together) -> str:
            if asked.texts[0] != "Say hello.":
                together.wait(timeout=100)
            return longer(asked, number)

        with serve(decide) as server:
            judge_at(server.url, concurrency=n, model=f"m{n}").ask(PAIRS)
            assert server.most == n


def test_a_trial_question_is_put_once_and_says_what_is_odd() -> None:
    with serve(lambda *_: "A") as server:
        assert judge_at(server.url).check() is None and judge_at(server.url).check() is None
        assert len(server.asked) == 1
        assert server.asked[0].texts[0] == "Say hello."
    with serve(lambda *_: "hm") as server:
        assert judge_at(server.url, model="n").check() == "The judge's reply to a trial question cannot be read: 'hm'."


# ---- the key --------------------------------------------------------------------------------------------------------


def test_a_key_goes_to_the_endpoint_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path))
    monkeypatch.setenv("MY_KEY", f"{SECRET}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")

    def parrot(asked: Asked, n: int) -> Any:
        said = f"wrong key: {asked.headers['authorization']}"
        return longer(asked, n) if n < 5 else (401, {}, json.dumps({"error": said}))

    with serve(parrot) as server:
        judge = judge_at(server.url, key_env="MY_KEY", concurrency=1)
        with pytest.raises(RewardError, match=r"wrong key: Bearer \[key\]") as caught:
            judge.ask(PAIRS)
        assert {a.headers["authorization"] for a in server.asked} == {f"Bearer {SECRET}"}
        assert all(SECRET not in json.dumps(a.body) for a in server.asked)
    kept = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert kept and SECRET not in kept + str(caught.value) + repr(judge) + json.dumps(judge.describe())


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_is_not_followed_with_a_key(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serve(longer) as other, serve(lambda *_: (status, {"Location": f"{other.url}/chat/completions"})) as server:
        with pytest.raises(RewardError, match=f"answered {status}"):
            judge_at(server.url).check()
        assert server.asked and not other.asked


def test_whose_key_goes_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert connect("https://example.org/v1/", None).key == SECRET
    assert connect("http://localhost:1/v1", None).key == SECRET
    assert connect("http://example.org/v1", None).key is None  # unencrypted: only an explicitly named key
    monkeypatch.setenv("MINE", SECRET)
    assert connect("http://example.org/v1", "MINE").key == SECRET
    assert connect("https://example.org/v1/chat/completions", None).url == "https://example.org/v1"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert connect("https://example.org/v1", None).key is None
    for url, env, match in (
        ("https://example.org/v1", "NOT_SET", "NOT_SET is not set"),
        ("http://", None, "is not an address"),
        ("http://h:port/v1", None, "is not an address"),
        (f"http://me:{SECRET}@h/v1", None, "holds more than an address"),
        (f"http://h/v1?key={SECRET}", None, "holds more than an address"),
    ):
        with pytest.raises(ConfigError, match=match) as caught:
            connect(url, env)
        assert SECRET not in str(caught.value)
    monkeypatch.setenv("MINE", f"{SECRET}\r\nX: y")
    with pytest.raises(ConfigError, match="holds characters that no key has") as caught:
        connect("http://h/v1", "MINE")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "verified", "through_proxies"),
    [
        ("https://example.org/v1", True, True),
        ("http://example.org/v1", True, True),  # a proxy may use TLS
        ("https://127.0.0.1:1/v1", True, False),
        ("HTTPS://localhost:1/v1", True, False),
        ("http://localhost:1/v1", False, False),
    ],
)
def test_certificates_are_checked_wherever_there_are_some(url: str, verified: bool, through_proxies: bool) -> None:
    options = connect(url, None).client_options
    assert (options["verify"], options["trust_env"]) == (verified, through_proxies)
    assert options["follow_redirects"] is False


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": None}, "--judge-model: is missing"),
        ({"concurrency": 0}, "--judge-concurrency: is below 1"),
        ({"parameters": "{"}, "--judge-parameters: is not JSON"),
        ({"parameters": "[1]"}, "--judge-parameters: is not a mapping"),
        ({"parameters": '{"messages": []}'}, "sets messages, which cannot be set"),
    ],
)
def test_mistakes_are_sentences(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_judge(JudgeOptions("http://127.0.0.1:1/v1", **{"model": "m", **options}))

"""Runs with completions from a vLLM server: equal to the built-in sampler's despite failures; stale weights are detected."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import Answer, FakeVLLM, served
from steps import train_until_killed
from tiny import tiny_model_folder, write_jsonl
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from penchant import api
from penchant.errors import ConfigError, PenchantError, RolloutError
from penchant.rollout.engines import InvalidReply, make_engine, parse_samples, request_seed, whole_weights_of
from penchant.rollout.generate import Settings
from penchant.rollout.options import RolloutConfig


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.judges.endpoint.random.uniform", lambda *_: 1e-3)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeVLLM]:
    with served(FakeVLLM(tiny_model_folder(tmp_path / "model"))) as made:
        yield made


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """Six prompts, two steps per epoch, and a reward that differs for nearly every completion."""
    reward = tmp_path / "rewards.py"
    reward.write_text(
        "def codes(prompts, completions):\n    assert any(completions), completions\n    return [sum(map(ord, c)) % 101 / 50 for c in completions]\n"
    )
    return {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "data": {
            "path": write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q" * (1 + i % 3) + str(i)} for i in range(6)]),
            "max_length": 64,
        },
        "algorithm": {"name": "grpo", "samples": 3, "max_new_tokens": 4, "beta": 0.02},
        "reward": f"{reward}:codes",
        "train": {"epochs": 2, "batch_size": 3, "tokens_per_step": 500, "lr": 1e-2, "warmup_fraction": 0.0},
        "evaluation": {"samples": 0, "every": None, "at_start": False},
        "output": str(tmp_path / "run"),
    }


def by_server(base: dict[str, Any], fake: FakeVLLM, **rollout: Any) -> dict[str, Any]:
    section = {"engine": "vllm", "url": fake.url, "attempts": 3, **rollout}
    return {**base, "rollout": section, "output": base["output"] + "-served"}


def lines(folder: Path | str) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def own_figures(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without the keys about the sampling engine."""
    return {k: v for k, v in line.items() if not k.startswith("rollout/")}


def alike(served_lines: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    assert len(served_lines) == len(own)
    for a, b in zip(served_lines, own, strict=True):
        assert set(own_figures(a)) == set(own_figures(b))
        for key, value in own_figures(b).items():
            assert a[key] == (pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value), key


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "grpo", "temperature": 0.8, "epochs": 2},
        pytest.param({"name": "ppo", "epochs": 1}, marks=pytest.mark.slow),
        pytest.param({"name": "online_dpo"}, marks=pytest.mark.slow),
        pytest.param({"name": "dapo"}, marks=pytest.mark.slow),
    ],
    ids=lambda a: a["name"],
)
def test_a_server_that_draws_as_we_do_trains_the_same_model(
    base: dict[str, Any], fake: FakeVLLM, algorithm: dict[str, Any]
) -> None:
    base["algorithm"] = {"samples": 3, "max_new_tokens": 4, "beta": 0.02, **algorithm}
    own = api.train(base, quiet=True)
    result = api.train(by_server(base, fake), quiet=True)
    alike(lines(result.folder), lines(own.folder))
    trained, by_own = ([x for x in lines(r.folder) if x["kind"] == "train"] for r in (result, own))
    # a step may have nothing to learn from, depending on the samples
    taken = [x for x in trained if "skipped" not in x]
    assert taken and all(x["grad_norm"] > 0 for x in taken)
    if algorithm["name"] != "online_dpo":
        assert all(0 <= x["rollout/logp_mismatch"] <= x["rollout/logp_mismatch_max"] < 1e-4 for x in taken)
        assert all(abs(x["rollout/kl_k3"]) < 1e-6 and x["rollout/lag"] == 0 for x in taken)
        assert all(x["rollout/logp_mismatch"] < 1e-4 and "rollout/lag" not in x for x in by_own if "skipped" not in x)
    asked = [b for b in fake.of("/v1/completions") if "seed" in b]
    assert all(isinstance(t, int) for b in asked for t in b["prompt"])
    assert all(b["ignore_eos"] and b["stop_token_ids"] == [1] and not b["add_special_tokens"] for b in asked)
    assert len({b["seed"] for b in asked}) == len(asked)


ENV = """
class Env:
    def reset(self, row):
        self.asked = 0
        return [{"role": "user", "content": row["prompt"][-1] + "?"}]

    def step(self, messages):
        self.asked += 1
        return [{"role": "user", "content": "[" + messages[-1]["content"][:2] + "]" * self.asked}] if self.asked < 3 else None
"""


def _ends_often(folder: Path) -> None:
    """Make more than half of the tokens end a turn, so that the environment gets to answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = [t for t in tokenizer.get_vocab() if len(t) == 1 and ord(t) > 127]
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ends], special_tokens=True)
    tokenizer.save_pretrained(folder)
    known = json.loads((folder / "generation_config.json").read_text())
    ids = [1, *tokenizer.convert_tokens_to_ids(ends)]
    (folder / "generation_config.json").write_text(json.dumps(known | {"eos_token_id": ids}))


@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_conversation_by_a_server_trains_the_same_model(
    base: dict[str, Any], fake: FakeVLLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lag: int
) -> None:
    """With a server whose context holds just prompt and completion. Killed and resumed, the run is the same."""
    (tmp_path / "env.py").write_text(ENV)
    base["algorithm"] |= {"samples": 2, "max_new_tokens": 40}
    for folder in {base["model"]["path"], fake.start}:
        _ends_often(Path(folder))
    fake.restart()
    fake.longest = 2 + 4 + 40  # BOS, three letters and a digit, and the text of reset
    how = {"environment": f"{tmp_path}/env.py:Env", "turns": 3, "lag": lag}
    own = api.train({**base, "rollout": how}, quiet=True)
    config = by_server(base, fake, **how) | {"checkpoint": {"every": 1}}
    result = api.train(config, quiet=True)
    alike(lines(result.folder), lines(own.folder))
    asked = [b for b in fake.of("/v1/completions") if "seed" in b]
    assert len({b["max_tokens"] for b in asked}) > 2 and all(b["n"] == 1 for b in asked)
    assert len({b["seed"] for b in asked}) == len(asked)
    config["output"] += "-again"
    fake.restart()
    train_until_killed(config, 3, monkeypatch)
    fake.restart()
    assert lines(api.train(config, quiet=True).folder) == lines(result.folder)


def test_a_run_by_a_server_is_evaluated_without_it(base: dict[str, Any], tmp_path: Path) -> None:
    base["data"] |= {"validation_rows": 2}
    base["train"]["epochs"] = 1
    with served(FakeVLLM(base["model"]["path"])) as fake:
        config = by_server(base, fake)
        trained = api.train(config, quiet=True)
        asked = len(fake.asked)
    later = api.evaluate(config, quiet=True)
    assert len(fake.asked) == asked
    for key, value in trained.after.items():
        if key.startswith("eval/") and isinstance(value, float):
            assert later[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_draws_of_a_request_belong_to_seed_and_row() -> None:
    seeds = {request_seed(s, r) for s in range(5) for r in range(50)}
    assert len(seeds) == 250 and max(seeds) < 2**62


# ---- what can go wrong ------------------------------------------------------------------------------------------------


def first(path: str, times: int, other: Answer) -> Callable[[str, dict[str, Any], Answer], Answer]:
    """Replace the first `times` answers of a route with `other`."""
    left = [times]

    def spoil(asked: str, body: dict[str, Any], right: Answer) -> Answer:
        if asked != path or "prompt_logprobs" in body or not left[0]:
            return right
        left[0] -= 1
        return other

    return spoil


@pytest.mark.parametrize(
    "path,other",
    [
        ("/v1/completions", (200, b'{"choices": [{"index": 0, "tok')),
        pytest.param("/v1/completions", (500, {"error": {"message": "CUDA out of memory"}}), marks=pytest.mark.slow),
        pytest.param("/weight_info", (503, {}), marks=pytest.mark.slow),
        pytest.param("/collective_rpc", (500, {}), marks=pytest.mark.slow),
    ],
    ids=["half an answer", "out of memory", "busy", "busy with weights"],
)
def test_what_a_server_does_once_loses_nothing(base: dict[str, Any], fake: FakeVLLM, path: str, other: Answer) -> None:
    base["train"]["epochs"] = 1
    own = api.train(base, quiet=True)
    fake.spoil = first(path, 2, other)
    alike(lines(api.train(by_server(base, fake), quiet=True).folder), lines(own.folder))


@pytest.mark.parametrize(
    "versions", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["by version", "by log-probs"]
)
def test_a_restarted_server_is_sent_the_weights_again_and_asked_again(
    base: dict[str, Any], fake: FakeVLLM, versions: bool
) -> None:
    own = api.train(base, quiet=True)
    fake.versions = versions
    if versions:
        fake.lose = 2
    else:
        seen = [0]

        def spoil(path: str, body: dict[str, Any], right: Answer) -> Answer:
            seen[0] += "seed" in body
            if seen[0] == 5:  # in the middle of the second batch
                seen[0] += 1
                fake.restart()
                return fake._right(path, body)
            return right

        fake.spoil = spoil
    alike(lines(api.train(by_server(base, fake), quiet=True).folder), lines(own.folder))
    assert len(fake.of("/collective_rpc")) > 4


def test_a_server_that_keeps_old_weights_is_found_out(base: dict[str, Any], fake: FakeVLLM) -> None:
    """At the first update, even if the change is far below the tolerance, or only some of the weights are stale."""
    fake.keeps = lambda _: True
    for name, lr in (("big", 1e-2), ("small", 1e-4)):
        base["train"]["lr"], base["output"] = lr, base["output"] + name
        with pytest.raises(RolloutError, match="after its weights were updated"):
            api.train(by_server(base, fake), quiet=True)
        assert len(lines(base["output"] + "-served")) == 1
        fake.restart()
    fake.keeps = lambda name: "embed_tokens" not in name
    base["output"] += "part"
    with pytest.raises(RolloutError, match="only some of the new weights"):
        api.train(by_server(base, fake), quiet=True)


def test_log_probs_of_another_temperature_are_refused(base: dict[str, Any], fake: FakeVLLM) -> None:
    base["algorithm"]["temperature"] = 0.5
    fake.raw = True
    with pytest.raises(RolloutError, match="processed_logprobs"):
        api.train(by_server(base, fake), quiet=True)


def test_a_server_that_is_away_or_another_one_is_one_sentence(base: dict[str, Any], fake: FakeVLLM) -> None:
    def said(**rollout: Any) -> str:
        with pytest.raises(PenchantError) as caught:
            api.train({**by_server(base, fake, **rollout), "output": base["output"] + str(len(fake.asked))}, quiet=True)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        return str(caught.value)

    assert "serves served, not mine" in said(model="mine")
    fake.longest = 5
    assert "holds 5" in said()
    fake.longest = 256
    fake.spoil = lambda path, _, right: right if path.startswith("/v1") else (404, {"detail": "Not Found"})
    assert "VLLM_SERVER_DEV_MODE=1" in said()
    fake.spoil = first("/v1/completions", 99, (200, {"choices": []}))
    assert "0 completions came back for 3 (3 attempts)" in said()
    assert "cannot be reached" in said(url="http://127.0.0.1:9") and "3 attempts" in said(url="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="is for engines other than own"):
        api.train({**base, "rollout": {"url": fake.url}}, quiet=True)


def right() -> dict[str, Any]:
    made = {"prompt_token_ids": [5, 6], "finish_reason": "length"}
    return {
        "choices": [
            {**made, "index": 1, "token_ids": [7, 8, 9], "logprobs": {"token_logprobs": [-1.0, -2.0, -3.0]}},
            {
                **made,
                "index": 0,
                "token_ids": [7, 1],
                "logprobs": {"token_logprobs": [-1.0, -2.0]},
                "finish_reason": "stop",
            },
        ]
    }


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "1 completions came back for 2": lambda a: a["choices"].pop(),
    "of another prompt": lambda a: a["choices"][0].update(prompt_token_ids=[5, 7]),
    "has 4 tokens": lambda a: a["choices"][0].update(token_ids=[7, 8, 9, 9]),
    "2 log-probs came back for 3 tokens": lambda a: a["choices"][0]["logprobs"]["token_logprobs"].pop(),
    "none of the model's 10 tokens": lambda a: a["choices"][0].update(token_ids=[7, 8, 10]),
    "invalid log-probs": lambda a: a["choices"][0]["logprobs"].update(token_logprobs=[-1.0, float("nan"), -3.0]),
    "after its end": lambda a: a["choices"][0].update(token_ids=[7, 1, 9]),
    "was broken off": lambda a: a["choices"][1].update(token_ids=[7, 8], finish_reason="abort"),
    "not a completion with token ids": lambda a: a["choices"][0].pop("token_ids"),
}


@pytest.mark.parametrize("what", WRONG)
def test_answers_are_looked_at_token_by_token(what: str) -> None:
    settings = Settings(2, 3, 1.0, 1.0, 0, frozenset([1]))
    one, two = parse_samples(right(), [5, 6], settings, 10)
    assert (one.ids, one.finished, two.ids, two.finished) == ([7, 1], True, [7, 8, 9], False)
    answer = right()
    WRONG[what](answer)
    with pytest.raises(InvalidReply, match=what):
        parse_samples(answer, [5, 6], settings, 10)


# ---- weights, resume, batches written ahead ------------------------------------------------------------------------------


def test_adapters_go_over_merged(tmp_path: Path, fake: FakeVLLM) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(fake.start, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    section = RolloutConfig(engine="vllm", url=fake.url)
    engine = make_engine(section, model, tmp_path, 20)
    engine.update(0)  # the probe compares the server's log-probs with the adapted policy's
    merged = dict(model.merge_and_unload().named_parameters())
    for name, weight in merged.items():
        assert torch.allclose(fake.model.state_dict()[name], weight, atol=1e-6), name
    assert {n for n, _ in whole_weights_of(plain)} == set(merged)


def test_a_server_with_a_short_context_is_probed_within_it(tmp_path: Path, fake: FakeVLLM) -> None:
    fake.longest = 9
    model = AutoModelForCausalLM.from_pretrained(fake.start, dtype=torch.float32)
    engine = make_engine(RolloutConfig(engine="vllm", url=fake.url), model, tmp_path, 9)
    engine.update(0)
    probed = [len(body["prompt"]) for path, body in fake.asked if path == "/v1/completions"]
    assert probed and set(probed) == {8}


@pytest.mark.parametrize("lag,own", [pytest.param(0, False, marks=pytest.mark.slow), (1, False), (1, True)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    base: dict[str, Any], fake: FakeVLLM, monkeypatch: pytest.MonkeyPatch, lag: int, own: bool
) -> None:
    base["algorithm"]["minibatches"] = 1 + lag
    how: dict[str, Any] = {"lag": lag, "correction": "tis" if lag else "none"}
    config = {**base, "rollout": how} if own else by_server(base, fake, **how)
    config["checkpoint"] = {"every": 1}
    whole = api.train(config, quiet=True)
    config["output"] += "-again"
    fake.restart()
    train_until_killed(config, 3, monkeypatch)
    fake.restart()
    resumed = api.train(config, quiet=True)
    assert lines(resumed.folder) == lines(whole.folder)
    last = [f / f"checkpoints/step-{whole.steps}/model/model.safetensors" for f in (whole.folder, resumed.folder)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_batches_written_ahead_are_those_of_older_weights_and_say_so(base: dict[str, Any], fake: FakeVLLM) -> None:
    base["train"]["epochs"] = 3
    late = api.train(by_server(base, fake, lag=1, correction="tis", correction_high=1.5), quiet=True)
    own = {"rollout": {"lag": 1, "correction": "tis", "correction_high": 1.5}, "output": base["output"] + "-own-late"}
    by_own, by_fake = lines(api.train({**base, **own}, quiet=True).folder), lines(late.folder)
    alike(by_fake, by_own)  # the built-in sampler draws the same as the server
    for a, b in zip(by_fake, by_own, strict=True):
        assert {k: v for k, v in a.items() if k.startswith("rollout/")} == pytest.approx(
            {k: v for k, v in b.items() if k.startswith("rollout/")}, rel=1e-2, abs=1e-4
        )
    trained = [x for x in lines(late.folder) if x["kind"] == "train"]
    assert [x["rollout/version"] for x in trained] == [0, 0, 1, 2, 3, 4]
    assert [x["rollout/lag"] for x in trained] == [0, 1, 1, 1, 1, 1]
    assert trained[0]["rollout/weight"] == pytest.approx(1.0, abs=1e-4)
    assert all(x["rollout/logp_mismatch"] > 1e-3 and x["rollout/weight"] != 1.0 for x in trained[1:])
    # with constant weights, a batch generated ahead equals one generated in time
    base["train"] |= {"lr": 1e-30, "epochs": 2}
    base["output"] += "-still"
    in_time = lines(api.train(by_server(base, fake, lag=0), quiet=True).folder)
    base["output"] += "-late"
    alike(lines(api.train(by_server(base, fake, lag=1), quiet=True).folder), in_time)
    alike(lines(api.train({**base, "rollout": {"lag": 1}}, quiet=True).folder), in_time)

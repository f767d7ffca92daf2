"""Judges and endpoints as rewards: grades, groups, caching, and every kind of failure."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoints import Asked, serve
from tiny import tiny_model_folder, write_jsonl

from penchant import api
from penchant.errors import ConfigError, RewardError
from penchant.rewards import load_reward
from penchant.rewards.remote import grade_of

FAST = {"attempts": 1, "timeout": 5.0}


def judge_at(url: str, **options: Any) -> Any:
    return load_reward({"judge": {"url": url, "model": "m", **FAST, **options}})


def graded(asked: Asked) -> str:
    """The answer in a request for a grade."""
    found = re.search(r"<<answer (\w+)>>\n(.*)\n<<end \1>>", asked.content, re.DOTALL)
    assert found is not None, asked.content
    return found[2]


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("7", 0.7),
        ("<think>3 or 4</think>\nGrade: **10/10**", 1.0),
        ("0", 0.0),
        ("Grade - 7", 0.7),
        ("8/10", 0.8),
        ("8 out of 10", 0.8),
        ("**Rating: 8.5 out of 10.**", 0.85),
        ("8 out of 100", None),
        ("8 out of 5", None),
        ("8 out of 10 or 9 out of 10", None),
        ("-3", None),
        ("Grade: -1", None),
        ("\u22122", None),
        ("8%", None),
        ("It is good.\nScore: 4.5", 0.45),
        ("11", None),
        ("good", None),
        ("3\n8", None),
        ("", None),
    ],
)
def test_a_grade_is_read_or_it_is_not(reply: str, grade: float | None) -> None:
    assert grade_of(reply) == grade


def test_a_judge_grades_each_completion_and_nothing_twice() -> None:
    with serve(lambda asked, n: str(len(graded(asked)))) as server:
        reward = judge_at(server.url, rubric="Shorter is better.")
        assert reward(["p"] * 3, ["abc", "a", "abc"]).tolist() == [0.3, 0.1, 0.3]
        assert reward(["p"], ["a"]).tolist() == [0.1]
        assert len(server.asked) == 2 and all("Shorter is better." in a.content for a in server.asked)


def test_a_judge_of_groups_gives_the_share_of_the_others_that_each_beats() -> None:
    def longer(asked: Asked, n: int) -> str:
        _, first, second = asked.texts
        return "A" if len(first) > len(second) else "B"

    with serve(longer) as server:
        reward = judge_at(server.url, against="group")
        found = reward(["p", "p", "p", "q", "q"], ["a", "bbb", "a", "c", "dd"])
    assert found.tolist() == [0.25, 1.0, 0.25, 0.0, 1.0]  # equal texts tie without a request


def test_a_judge_that_always_says_the_first_prefers_nobody() -> None:
    with serve(lambda asked, n: "A") as server:
        assert judge_at(server.url, against="group")(["p", "p"], ["a", "b"]).tolist() == [0.5, 0.5]


def test_a_run_whose_reward_compares_has_no_held_out_reward(tmp_path: Path) -> None:
    """Held-out prompts get one completion each, with nothing to compare it to. The run trains, without a held-out reward."""
    rows = [{"prompt": f"p{i}"} for i in range(6)]
    with serve(lambda asked, n: "A" if asked.texts[1] > asked.texts[2] else "B") as server:
        judge = {"url": server.url, "model": "m", "against": "group", **FAST}
        config = {
            "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
            "data": {"path": write_jsonl(tmp_path / "p.jsonl", rows), "max_length": 32, "validation_rows": 2},
            "algorithm": {"name": "grpo", "samples": 3, "max_new_tokens": 3},
            "reward": {"judge": judge},
            "train": {"max_steps": 1, "batch_size": 2},
            "evaluation": {"samples": 0},
            "output": str(tmp_path / "run"),
        }
        result = api.train(config, quiet=True)
        both = api.train(
            config | {"reward": {"judge": judge, "words": 1.0}, "output": str(tmp_path / "both")}, quiet=True
        )
    assert result.after["eval/rewards/judge/none"] == 1.0 and "eval/kl/k3" in result.after
    assert not {"eval/reward", "eval/loss", "eval/win_rate"} & set(result.after)
    assert (
        both.after["eval/rewards/judge/none"] == 1.0
        and both.after["eval/reward"] == both.after["eval/rewards/words/mean"]
    )


def test_a_reply_that_cannot_be_read_is_no_zero() -> None:
    with serve(lambda asked, n: "well" if graded(asked) == "b" else "5") as server:
        found = judge_at(server.url)(["p", "p"], ["a", "b"])
        assert found[0] == 0.5 and np.isnan(found[1])
        with pytest.raises(RewardError, match=r"none of 1 replies can be read, such as 'well'"):
            judge_at(server.url)(["q"], ["b"])


def test_a_judge_that_is_not_there_is_a_sentence() -> None:
    with serve(lambda asked, n: 401) as server, pytest.raises(RewardError, match="answered 401"):
        judge_at(server.url)(["p"], ["a"])
    with pytest.raises(RewardError, match="cannot be reached"):
        judge_at("http://127.0.0.1:9")(["p"] * 9, list("abcdefghi"))
    with pytest.raises(ConfigError, match=r"reward.judge.url: .* is not an address"):
        judge_at("nowhere")


def test_an_endpoint_gets_texts_and_columns_and_answers_with_numbers() -> None:
    def answer(asked: Asked, n: int) -> Any:
        said = [None if c == "b" else float(len(c)) for c in asked.body["completions"]]
        return 200, {}, json.dumps({"rewards": said})

    with serve(answer) as server:
        reward = load_reward({"http": {"url": f"{server.url}/score", "batch": 2, **FAST}})
        found = reward(["p"] * 3, ["aaa", "b", "cc"])
    assert found[[0, 2]].tolist() == [3.0, 2.0] and np.isnan(found[1])
    bodies = sorted((a.body for a in server.asked), key=lambda b: len(b["completions"]))
    assert [len(b["completions"]) for b in bodies] == [1, 2] and bodies[0]["columns"] == {}
    assert {a.path for a in server.asked} == {"/v1/score"}


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        ((200, {}, "[1.0]"), "answered 1 rewards for 2 completions"),
        ((200, {}, '{"rewards": [1.0, "good"]}'), r"answered \"good\" for completion 1: 'b'"),
        ((200, {}, '{"rewards": [1.0, true]}'), "answered true for completion 1"),
        ((200, {}, f'{{"rewards": [1.0, {10**400}]}}'), "answered 1000.* for completion 1"),
        ((200, {}, "fine"), "answered no JSON for 2 completions"),
        (500, r"answered 500"),
    ],
)
def test_an_endpoint_that_answers_nonsense_is_named(reply: Any, what: str) -> None:
    with serve(lambda asked, n: reply) as server:
        reward = load_reward({"http": {"url": server.url, **FAST}})
        with pytest.raises(RewardError, match=what):
            reward(["p", "p"], ["a", "b"])


def test_an_endpoint_that_fails_once_is_asked_again() -> None:
    with serve(lambda asked, n: 503 if n == 1 else (200, {}, "[2]")) as server:
        reward = load_reward({"http": {"url": server.url, "attempts": 2}})
        assert reward(["p"], ["a"]).tolist() == [2.0] and len(server.asked) == 2

"""Comparing models: against closed forms on models whose distribution is known, and what is said of the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from families import make_tree, tiny_model

from penchant.evaluation.compare_models import (
    FEW_PROMPTS,
    Compared,
    Setting,
    compare_models,
    sentences,
    table,
    win_rate_by_prompt,
)
from penchant.logprobs import Scorer
from penchant.types import TokenTree


class Letters:
    """A tokenizer whose tokens are numbers; 1 is EOS."""

    eos_token_id = 1

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(int(i)) for i in ids if not (skip_special_tokens and i == 1))


def scorer(seed: int) -> Scorer:
    return Scorer(tiny_model("llama", seed=seed, dtype=torch.float64), "shared")


def even(prompts: Sequence[str], completions: Sequence[str], trees: Sequence[TokenTree]) -> np.ndarray:
    """The share of even tokens."""
    assert [t.source for t in trees] == [f"row {i}" for i in range(len(trees))]
    return np.array([np.mean([int(t) % 2 == 0 for t in c.split()] or [0.0]) for c in completions])


def setting(**changes: Any) -> Setting:
    prompts = [[5, 6, 7 + i] for i in range(12)]
    answers = [
        TokenTree(i, np.array(p, np.int32), (np.array([9, 4], np.int32), np.array([8, 3, i], np.int32)), (False, False))
        for i, p in enumerate(prompts)
    ]
    values = {"prompts": prompts, "answers": answers, "judge": even, "samples": 2, "max_new_tokens": 5, "seed": 3}
    values["sources"] = [f"row {i}" for i in range(len(prompts))]
    return Setting(tokenizer=Letters(), **{**values, **changes})


@pytest.fixture(scope="module")
def compared() -> Compared:
    return compare_models(["a", "same", "b"], lambda name: scorer(1 if name == "b" else 0), setting())


def test_a_model_against_itself_is_a_draw(compared: Compared) -> None:
    same = compared.models["same"]
    assert same["win_rate"] == pytest.approx(0.5)
    assert same["kl"] == 0.0 == same["kl_per_token"]
    assert same["reward_change"] == 0.0
    assert same["preference_accuracy"] == 0.5
    assert same["perplexity"] == compared.models["a"]["perplexity"]
    assert "Between same and a there is no clear winner" in " ".join(compared.sentences)


def test_every_model_meets_the_same_prompts(compared: Compared) -> None:
    rows = compared.rows
    assert [(r["prompt"], r["sample"]) for r in rows] == [(f"5 6 {7 + i}", s) for i in range(12) for s in (0, 1)]
    for name in ("a", "same", "b"):
        judged = even([], [r["completions"][name]["text"] for r in rows], [])
        assert [r["completions"][name]["reward"] for r in rows] == pytest.approx(judged)
        assert compared.models[name]["reward"] == pytest.approx(judged.mean())
        lengths = [r["completions"][name]["tokens"] for r in rows]
        assert compared.models[name]["tokens"] == pytest.approx(np.mean(lengths))
        ended = [r["completions"][name]["ended"] for r in rows]
        assert compared.models[name]["ended"] == pytest.approx(np.mean(ended))


def test_likelihood_figures_equal_transformers_own(compared: Compared) -> None:
    models = {name: scorer(1 if name == "b" else 0).model for name in ("a", "b")}

    def logps(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            rows = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        return torch.stack([rows[len(prompt) + i - 1, t] for i, t in enumerate(answer)])

    s = setting()
    chosen, change = [], []
    for prompt, tree in zip(s.prompts, s.answers, strict=True):
        w, l = (tree.completion_ids[i].tolist() for i in (0, 1))  # noqa: E741
        chosen.append(logps(models["b"], list(prompt), w))
        gains = [
            float((logps(models["b"], list(prompt), x) - logps(models["a"], list(prompt), x)).sum()) for x in (w, l)
        ]
        change.append(gains[0] > gains[1])
    assert compared.models["b"]["perplexity"] == pytest.approx(float(torch.exp(-torch.cat(chosen).mean())), rel=1e-6)
    assert compared.models["b"]["preference_accuracy"] == pytest.approx(np.mean(change))
    low, high = compared.models["b"]["perplexity/ci"]
    assert low <= compared.models["b"]["perplexity"] <= high


def test_the_sampled_kl_agrees_with_the_exact_one() -> None:
    models = {name: scorer(i) for i, name in enumerate(("a", "b"))}
    got = compare_models(
        ["a", "b"],
        models.__getitem__,
        setting(prompts=[[5, 6]] * 400, sources=(), answers=[], samples=8, max_new_tokens=1, judge=None),
    )
    with torch.no_grad():
        q, p = (torch.log_softmax(m.model(torch.tensor([[5, 6]])).logits[0, -1], -1) for m in models.values())
    exact = float((p.exp() * (p - q)).sum())
    low, high = got.models["b"]["kl/ci"]
    assert low < exact < high and exact > 1e-3
    assert got.models["b"]["kl_per_token"] == pytest.approx(exact, rel=0.15)
    assert "win_rate" not in got.models["b"] and "preference_accuracy" not in got.models["b"]
    assert got.sentences == ["No winner is named: there is no compare.reward."]


def test_win_rate_by_prompt_counts_all_pairs_and_halves_ties() -> None:
    mine, theirs = np.array([1.0, 3.0, 0.0, 0.0]), np.array([2.0, 3.0, 0.0, 5.0])
    # prompt 1: (1,2) (1,3) lost, (3,2) won, (3,3) tied; prompt 2: (0,0) tied twice, (0,5) lost twice
    assert win_rate_by_prompt(mine, theirs, 2).estimate == pytest.approx((1.5 / 4 + 1.0 / 4) / 2)
    assert win_rate_by_prompt(mine, theirs, 1).estimate == pytest.approx((0 + 0.5 + 0.5 + 0) / 4)
    # clusters: the interval of two prompts reaches from one prompt's rate to the other's, however many samples there are
    many = win_rate_by_prompt(np.repeat([1.0, 0.0], 50), np.repeat([0.0, 1.0], 50), 50)
    assert (many.estimate, many.low, many.high) == (0.5, 0.0, 1.0)


def figures(**rates: tuple[float, float, float, float]) -> dict[str, Any]:
    made: dict[str, Any] = {"first": {"reward": 0.0}}
    for name, (low, high, change, reward) in rates.items():
        made[name] = {
            "win_rate": (low + high) / 2,
            "win_rate/ci": [low, high],
            "reward": reward,
            "reward_change/ci": [change - 0.1, change + 0.1],
        }
    return made


def said(made: dict[str, Any], n: int = 40) -> str:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=n) * 0.05
    rewards = {
        name: np.full(n, m["reward"]) + (rng.permutation(noise) if m["reward"] else 0) for name, m in made.items()
    }
    return " ".join(sentences(made, rewards))


def test_what_the_figures_say() -> None:
    assert "up is better than first" in said(figures(up=(0.6, 0.8, 0.5, 1.0)))
    assert "down is worse than first" in said(figures(down=(0.2, 0.4, -0.5, -1.0)))
    assert "Between near and first there is no clear winner" in said(figures(near=(0.45, 0.6, 0.2, 0.1)))
    # wins more often, and yet its mean reward fell: not a winner
    assert "but its mean reward says the opposite" in said(figures(mixed=(0.6, 0.8, -0.5, -1.0)))
    two = said(figures(x=(0.6, 0.8, 0.5, 1.0), y=(0.6, 0.8, 0.5, 0.5)))
    assert "x is better than y: their rewards differ by" in two
    level = said(figures(x=(0.6, 0.8, 0.5, 1.0), y=(0.6, 0.8, 0.5, 1.0001)))
    assert "Between y and x there is no clear winner" in level or "Between x and y there is no clear winner" in level
    assert "too few" in said(figures(up=(0.6, 0.8, 0.5, 1.0)), n=FEW_PROMPTS - 1)


def test_the_table_is_plain_and_whole(compared: Compared) -> None:
    lines = table(compared.models).splitlines()
    assert lines[0].split() == ["a", "same", "b"]
    by_name = {line[:38].strip(): line for line in lines[1:]}
    assert by_name["win rate against a (ties half)"].split("half)")[1].split()[0] == "-"
    b = compared.models["b"]
    assert (
        f"{b['kl']:.2f} [{b['kl/ci'][0]:.2f}, {b['kl/ci'][1]:.2f}]" in by_name["KL(policy || a), nats per completion"]
    )
    assert len(lines) == 11 and not any(line.endswith(" ") for line in lines)


def test_single_answers_have_a_perplexity_and_no_accuracy() -> None:
    answers = [make_tree(i, 3, (4,)) for i in range(3)]
    got = compare_models(["a", "b"], lambda name: scorer(name == "b"), setting(answers=answers, judge=None))
    assert "perplexity" in got.models["b"] and "preference_accuracy" not in got.models["b"]


def test_another_judge_has_figures_of_its_own() -> None:
    def opposite(prompts: Sequence[str], completions: Sequence[str], trees: Sequence[TokenTree]) -> np.ndarray:
        assert list(prompts) == [Letters().decode(t.prompt_ids) for t in trees for _ in t.completion_ids]
        return -even(prompts, completions, trees)

    made = compare_models(["a", "b"], lambda name: scorer(int(name == "b")), setting(also={"odd": opposite}))
    b, other = made.models["b"], made.models["b"]["also"]["odd"]
    assert abs(b["reward_change"]) > 1e-3 and b["win_rate"] != 0.5
    assert other["reward"] == pytest.approx(-b["reward"])
    assert other["reward_change"] == pytest.approx(-b["reward_change"])
    assert other["win_rate"] == pytest.approx(1 - b["win_rate"])
    assert other["reward_change/ci"] == pytest.approx([-v for v in reversed(b["reward_change/ci"])], abs=0.02)
    assert set(made.models["a"]["also"]["odd"]) == {"reward", "reward/ci"}
    for row in made.rows:
        of_b = row["completions"]["b"]
        assert of_b["also"] == {"odd": pytest.approx(-of_b["reward"])}
    lines = [line.split("  ")[0] for line in table(made.models).splitlines()]
    assert lines[4:7] == [
        "reward, by odd",
        "change of reward against a, by odd",
        "win rate against a (ties half), by odd",
    ]
    assert [s.startswith("By odd: ") for s in made.sentences] == [False, True]

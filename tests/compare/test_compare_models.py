"""Comparing models with known distributions against closed forms, and the sentences about the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from comparing import Letters, even, scorer, setting
from families import make_tree

from penchant.compare.measured import by_prompt
from penchant.compare.models import NO_OUTCOME, ComparisonResult, compare_models, table
from penchant.metrics.stats import holm
from penchant.types import TokenTree


@pytest.fixture(scope="module")
def compared() -> ComparisonResult:
    return compare_models(["a", "same", "b"], lambda name: scorer(1 if name == "b" else 0), setting())


def test_a_model_against_itself_is_a_draw(compared: ComparisonResult) -> None:
    same = compared.models["same"]
    assert same["win_rate"] == pytest.approx(0.5)
    assert same["kl"] == 0.0 == same["kl_per_token"]
    assert same["reward_change"] == 0.0
    assert same["preference_accuracy"] == 0.5
    assert same["perplexity"] == compared.models["a"]["perplexity"]
    assert "Between same and a there is no clear winner" in " ".join(s.text for s in compared.sentences)


def test_every_model_meets_the_same_prompts(compared: ComparisonResult) -> None:
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


def test_likelihood_figures_equal_transformers_own(compared: ComparisonResult) -> None:
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
    assert [(s.text, s.tone) for s in got.sentences] == [(NO_OUTCOME, "open")]


def test_the_table_is_plain_and_whole(compared: ComparisonResult) -> None:
    lines = table(compared.models).splitlines()
    assert lines[0].split() == ["a", "same", "b"]
    by_name = {line[:38].strip(): line for line in lines[1:]}
    assert by_name["win rate against a (ties half)"].split("half)")[1].split()[0] == "-"
    b = compared.models["b"]
    assert (
        f"{b['kl_k3']:.2f} [{b['kl_k3/ci'][0]:.2f}, {b['kl_k3/ci'][1]:.2f}]"
        in by_name["KL(policy || a), nats per completion"]
    )
    assert len(lines) == 12 and not any(line.endswith(" ") for line in lines)


def test_single_answers_have_a_perplexity_and_no_accuracy() -> None:
    answers = [make_tree(i, 3, (4,)) for i in range(3)]
    got = compare_models(["a", "b"], lambda name: scorer(name == "b"), setting(answers=answers, judge=None))
    assert "perplexity" in got.models["b"] and "preference_accuracy" not in got.models["b"]


def test_only_the_trained_tokens_of_a_conversation_have_a_perplexity() -> None:
    answer, mask = np.array([9, 4, 8, 3], np.int32), np.array([True, False, False, True])
    prompts = setting().prompts
    answers = [TokenTree(i, np.array(p, np.int32), (answer,), (False,), masks=(mask,)) for i, p in enumerate(prompts)]
    got = compare_models(["a", "b"], lambda name: scorer(name == "b"), setting(answers=answers, judge=None))
    nlls = []
    for prompt in prompts:
        ids = torch.tensor([[*prompt, *answer.tolist()]])
        with torch.no_grad():
            rows = torch.log_softmax(scorer(1).model(input_ids=ids).logits[0, len(prompt) - 1 : -1], -1)
        nlls += [-rows[0, 9], -rows[3, 3]]
    assert got.models["b"]["perplexity"] == pytest.approx(float(torch.stack(nlls).mean().exp()), rel=1e-6)


def test_without_a_reward_preferences_are_compared() -> None:
    got = compare_models(["a", "b"], lambda name: scorer(name == "b"), setting(judge=None))
    (pair,) = got.pairs
    assert got.outcome == "held-out preference accuracy" and pair.win_rate is None and "win_rate" not in got.models["b"]
    assert pair.difference.estimate == pytest.approx(got.models["b"]["preference_accuracy"] - 0.5)


def test_several_seeds_are_one_column_of_means() -> None:
    seeds = {"x": ["x1", "x2"], "y": ["y1"]}
    made = {"a": 0, "x1": 1, "x2": 2, "y1": 3}
    got = compare_models(list(made), lambda n: scorer(made[n]), setting(), seeds=seeds, fixed=True)
    assert list(got.models) == ["a", "x", "y"] and list(got.runs) == ["x1", "x2"]
    for figure in ("reward", "kl", "preference_accuracy", "tokens", "distinct_2", "kl_per_token"):
        one, other = (got.runs[n][figure] for n in ("x1", "x2"))
        assert got.models["x"][figure] == pytest.approx((one + other) / 2)
    assert got.models["x"]["perplexity"] == pytest.approx(
        np.sqrt(np.prod([r["perplexity"] for r in got.runs.values()]))
    )
    assert [(p.name, p.other) for p in got.pairs] == [("x", "a"), ("y", "a"), ("x", "y")]
    over = {(p.name, p.other): p.p_seeds is not None for p in got.pairs}
    assert over == {("x", "a"): True, ("y", "a"): False, ("x", "y"): False}
    low, high = got.models["x"]["reward/ci"]
    gap = abs(got.runs["x1"]["reward"] - got.runs["x2"]["reward"])
    assert high - low > gap > 0  # with two seeds the interval includes the distance between them
    assert "y has one seed: another seed" in got.sentences[-1].text
    assert all(set(r["completions"]) == set(made) for r in got.rows)


def test_preferences_of_prompts_with_more_pairs_count_more() -> None:
    answers = list(setting().answers)
    answers += [TokenTree(12 + i, answers[0].prompt_ids, answers[i].completion_ids, (False, False)) for i in (1, 2, 3)]
    got = compare_models(["a", "b"], lambda n: scorer(n == "b"), setting(judge=None, answers=answers))
    assert got.pairs[0].difference.estimate == pytest.approx(got.models["b"]["preference_accuracy"] - 0.5, abs=1e-12)


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
    assert lines[5:9] == [
        "reward, by odd",
        "change of reward against a, by odd",
        "win rate against a (ties half), by odd",
        "win rate at equal length, by odd",
    ]
    assert [s.text.startswith("By odd: ") for s in made.sentences] == [False, True, False]
    assert "have one seed each" in made.sentences[-1].text
    (pair,), (opposed,) = made.pairs, made.also["odd"]
    assert opposed.difference.estimate == pytest.approx(-pair.difference.estimate) and opposed.p == pair.p


def test_other_judges_are_corrected_for_all_of_their_comparisons_and_the_reward_for_its_own() -> None:
    models = {name: scorer(i) for i, name in enumerate(("a", "b", "c"))}

    def rising() -> Any:
        asked = iter(range(3))  # each model is judged once, slightly better than the one before

        def judge(prompts: Sequence[str], completions: Sequence[str], trees: Sequence[TokenTree]) -> np.ndarray:
            return even(prompts, completions, trees) + 0.1 * next(asked)

        return judge

    judges = {f"x{i}": rising() for i in range(3)}
    got = compare_models(list(models), models.__getitem__, setting(judge=rising(), also=judges))
    raw = [p.p for p in got.pairs]
    assert [p.corrected for p in got.pairs] == pytest.approx(holm(raw))
    together = [p.corrected for pairs in got.also.values() for p in pairs]
    assert together == pytest.approx(holm(raw * 3))
    assert min(together) > min(p.corrected for p in got.pairs)
    said = [s.text for s in got.sentences if s.text.startswith("By x")]
    assert len(said) == 9 and all("corrected for 9 comparisons" in s for s in said)


def test_seeds_are_averaged_by_another_judge_too() -> None:
    made = {"a": 0, "x1": 1, "x2": 2}
    got = compare_models(
        list(made), lambda n: scorer(made[n]), setting(also={"odd": even}), seeds={"x": ["x1", "x2"]}, fixed=True
    )
    for figure in ("reward", "reward/ci", "reward_change", "reward_change/ci", "win_rate", "win_rate/ci"):
        assert got.models["x"]["also"]["odd"][figure] == pytest.approx(got.models["x"][figure])
    assert got.also["odd"][0].p_seeds == got.pairs[0].p_seeds is not None


def test_a_prompts_share_of_a_mean_by_hand() -> None:
    """One row of 1 and three of 0: the mean is 1/4, and the two prompts' shares are 1/4 + 3/8 and 1/4 - 3/8."""
    parts = by_prompt(np.array([1.0, 0.0, 0.0, 0.0]), np.array([0, 1, 1, 1]))
    assert parts.tolist() == pytest.approx([0.625, -0.125]) and parts.mean() == pytest.approx(0.25)


def test_a_share_of_which_every_row_is_right_is_not_certain() -> None:
    """A percentile bootstrap of ones gives [1, 1] for any number of rows, unlike Wilson's interval for 24 of 24."""
    from penchant.compare.measured import _interval

    right = (np.ones(24), np.arange(24))
    found = _interval([right], 1000, share=True)
    assert found.high == 1.0 and found.low == pytest.approx(24 / (24 + 1.959964**2), abs=1e-6)

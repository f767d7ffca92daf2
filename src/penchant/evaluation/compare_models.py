"""Several models on the same held-out prompts: reward, win rate, KL, likelihood, each with its interval by prompt.

What each figure is, with the first model as the one that all others are compared with:

- reward: mean over completions sampled at temperature 1; `reward_change`: minus the first model's on the same prompts.
- also: the same by other rewards, each under its name: whether what was trained on is what was meant.
- win_rate: per prompt, the share of pairs (own completion, first model's completion) with the higher reward, ties half; the mean over prompts.
  `win_rate_equal_length`: what a logistic model makes of it at equal length in tokens (see `length_control.py`).
- judged: win rates by a judge that decides pair by pair (see `judged.py`).
- kl: KL(policy || first model) in nats per completion, from the policy's own completions (see `sampled_kl.py`).
- preference_accuracy: share of held-out pairs whose chosen answer gained more log-prob over the first model's than the rejected one.
- perplexity: of held-out chosen answers, ``exp(-sum log p / tokens)``.

Models that are one setting with several seeds have one column: means over the seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from penchant.evaluation.judged import WIN_RATE, Judgement, judge_pairs, lengths_of, sides, win_rates
from penchant.evaluation.measured import Measured, Metrics, Setting, clusters_of, figures, measure, named
from penchant.evaluation.verdict import (
    Candidate,
    Family,
    Pair,
    columns,
    compare_all,
    compare_each,
    comparisons_table,
    corrected,
    verdict,
)
from penchant.logprobs import Scorer

# name, label ({first} is the first model), digits; the first table is of every reward
JUDGED = (
    ("reward", "reward", 3),
    ("reward_change", "change of reward against {first}", 3),
    ("win_rate", "win rate against {first} (ties half)", 3),
    ("win_rate_equal_length", "win rate at equal length", 3),
)
ROWS = (
    ("kl", "KL(policy || {first}), nats per completion", 2),
    ("kl_per_token", "KL(policy || {first}), nats per token", 4),
    ("preference_accuracy", "held-out preference accuracy", 3),
    ("perplexity", "perplexity of held-out chosen answers", 2),
    ("ended", "share ended by EOS", 3),
    ("tokens", "tokens per completion", 1),
    ("distinct_2", "distinct-2", 3),
)
NO_OUTCOME = "No winner is named: there is neither a reward nor a held-out pair of answers."


@dataclass(frozen=True, slots=True)
class Compared:
    """What came out.

    Args:
        models: figures by setting, the first model first; runs: by model, where a setting has several.
        rows: every prompt's completions side by side; pairs: all comparisons; outcome: what they are of, in words.
        also: the same comparisons by other rewards, by name; judgement: by a pairwise judge; sentences: the verdict.
    """

    models: dict[str, Metrics]
    runs: dict[str, Metrics]
    rows: list[dict[str, Any]]
    pairs: list[Pair] = field(default_factory=list)
    outcome: str = ""
    also: dict[str, list[Pair]] = field(default_factory=dict)
    judgement: Judgement | None = None
    sentences: list[str] = field(default_factory=list)


def compare_models(
    names: Sequence[str],
    load: Callable[[str], Scorer],
    setting: Setting,
    *,
    seeds: Mapping[str, Sequence[str]] | None = None,
    fixed: bool = False,
) -> Compared:
    """Compare models by their names; the first is what the others are compared with.

    Args:
        load: the scorer of a model; the first is held throughout, of the others one at a time.
        seeds: which of the other models are one setting, by its name; default: each by itself.
        fixed: whether the first is what training starts from, rather than trained with a seed.
    """
    start = load(names[0])
    first = measure(names[0], start, setting)
    measured = {names[0]: first}
    for name in names[1:]:
        scorer = load(name)
        measured[name] = measure(name, scorer, setting, first, start)
        del scorer
    groups = {names[0]: [names[0]], **(seeds if seeds is not None else {n: [n] for n in names[1:]})}
    by_setting = {name: [measured[m] for m in members] for name, members in groups.items()}
    models = {name: figures(of_seeds) for name, of_seeds in by_setting.items()}
    runs = {m: figures([measured[m]]) for members in groups.values() if len(members) > 1 for m in members}
    candidates, outcome = _candidates(by_setting, fixed)
    pairs = compare_all(candidates) if candidates and candidates[0].outcome is not None else []
    also = _also(by_setting, fixed, setting.also)
    for pair in pairs[: len(models) - 1]:
        models[pair.name] |= _gain(pair)
    for judge, by_it in also.items():
        for pair in by_it[: len(models) - 1]:
            models[pair.name]["also"][judge] |= _gain(pair)
    judgement = None
    if setting.pairwise is not None:
        judgement = judge_pairs(setting.pairwise, by_setting, setting, fixed)
        for name, metrics in models.items():
            metrics["judged"] = {judgement.name: judgement.against(name, names[0])}
    together = sum(map(len, also.values()))
    families = [Family(judge, by_it, "mean reward", together) for judge, by_it in also.items()]
    families += [judgement.family] if judgement is not None else []
    said = verdict(candidates, pairs, outcome, families) if candidates else [NO_OUTCOME]
    return Compared(models, runs, _rows(measured, setting, judgement), pairs, outcome, also, judgement, said)


def _candidates(settings: Mapping[str, Sequence[Measured]], fixed: bool) -> tuple[list[Candidate], str]:
    """What is compared: mean rewards where there is a reward, else preferences; nothing where there are neither."""
    first = next(iter(settings))
    setting = settings[first][0].setting
    if setting.judge is not None:
        return _by_reward(settings, fixed, None), "mean reward"
    if setting.pairwise is not None:
        return sides(settings, fixed), WIN_RATE
    if not setting.paired:
        return [], ""
    return [
        Candidate(name, np.stack([_right(m) for m in seeds]), None, lengths_of(seeds), fixed and name == first)
        for name, seeds in settings.items()
    ], "held-out preference accuracy"


def _also(settings: Mapping[str, Sequence[Measured]], fixed: bool, names: Iterable[str]) -> dict[str, list[Pair]]:
    """The comparisons by the other rewards, corrected for the number of all of them; the reward's own stand by themselves."""
    by_judge = {judge: compare_each(_by_reward(settings, fixed, judge)) for judge in names}
    together = iter(corrected([pair for pairs in by_judge.values() for pair in pairs]))
    return {judge: [next(together) for _ in pairs] for judge, pairs in by_judge.items()}


def _by_reward(settings: Mapping[str, Sequence[Measured]], fixed: bool, judge: str | None) -> list[Candidate]:
    """Every setting with its mean rewards, by the reward or by another one."""
    first, found = next(iter(settings)), []
    for name, seeds in settings.items():
        rewards = np.stack([r for m in seeds if (r := m.rewards(judge)) is not None])
        found.append(Candidate(name, rewards.mean(2), rewards, lengths_of(seeds), fixed and name == first))
    return found


def _gain(pair: Pair) -> Metrics:
    """Figures of a setting against the first model; none without a reward."""
    return {} if pair.win_rate is None else named("reward_change", pair.difference) | win_rates(pair)


def _right(m: Measured) -> np.ndarray:
    """Preferences that a model got right by prompt, (prompts,); one half for the first, which gained nothing over itself.

    A prompt with more pairs counts more: the mean over prompts is the mean over pairs.
    """
    clusters = clusters_of(m.setting.answers)
    right = m.correct if m.correct is not None else np.full(len(clusters), 0.5)
    counts = np.bincount(clusters)
    return np.asarray(np.bincount(clusters, weights=right) / counts.mean())


def _rows(
    measured: Mapping[str, Measured], setting: Setting, judgement: Judgement | None = None
) -> list[dict[str, Any]]:
    rows = []
    for i, asked in enumerate(setting.asked):
        for s in range(setting.samples):
            at = i * setting.samples + s
            row: dict[str, Any] = {"prompt": asked, "sample": s, "completions": {}}
            for name, m in measured.items():
                w = m.written
                made = {"text": w.texts[at], "tokens": len(w.ids[at]), "ended": bool(w.ended[at])}
                made |= {} if w.rewards is None else {"reward": float(w.rewards[at])}
                made |= {"also": {judge: float(v[at]) for judge, v in m.also.items()}} if m.also else {}
                row["completions"][name] = made
            if judgement is not None:
                row["judged"] = judgement.of_row(i, s)
            rows.append(row)
    return rows


def table(models: Mapping[str, Metrics]) -> str:
    """Figures as a plain table: one line a figure, one column a model, 95% intervals in brackets."""
    first = next(iter(models))
    lines = [["", *models], *_lines(models, JUDGED, first)]
    for judge in models[first].get("also", {}):
        lines += _lines({n: m["also"][judge] for n, m in models.items()}, JUDGED, first, f", by {judge}")
    for judge in models[first].get("judged", {}):
        lines += _lines({n: m["judged"][judge] for n, m in models.items()}, JUDGED, first, f", by {judge}")
    return columns(lines + _lines(models, ROWS, first))


def _lines(
    models: Mapping[str, Metrics], rows: Sequence[tuple[str, str, int]], first: str, by: str = ""
) -> list[list[str]]:
    """The rows that any of the models has a figure for."""
    return [
        [label.format(first=first) + by, *(_cell(m, name, digits) for m in models.values())]
        for name, label, digits in rows
        if any(name in m for m in models.values())
    ]


def _cell(metrics: Metrics, name: str, digits: int) -> str:
    if name not in metrics:
        return "-"
    interval = metrics.get(f"{name}/ci")
    shown = f"{metrics[name]:.{digits}f}"
    return shown + (f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "")


__all__ = ["Compared", "Setting", "compare_models", "comparisons_table", "table"]

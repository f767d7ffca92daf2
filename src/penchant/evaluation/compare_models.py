"""Several models on the same held-out prompts: reward, win rate, KL, likelihood, each with its interval by prompt.

What each figure is, with the first model as the one that all others are compared with:

- reward: mean over completions sampled at temperature 1; `reward_change`: minus the first model's on the same prompts.
- win_rate: per prompt, the share of pairs (own completion, first model's completion) with the higher reward, ties half; the mean over prompts.
  `win_rate_equal_length`: what a logistic model makes of it at equal length in tokens (see `length_control.py`).
- kl: KL(policy || first model) in nats per completion, from the policy's own completions (see `sampled_kl.py`).
- preference_accuracy: share of held-out pairs whose chosen answer gained more log-prob over the first model's than the rejected one.
- perplexity: of held-out chosen answers, ``exp(-sum log p / tokens)``.

Models that are one setting with several seeds have one column: means over the seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from penchant.evaluation.measured import Measured, Metrics, Setting, clusters_of, figures, measure, named
from penchant.evaluation.verdict import Candidate, Pair, columns, compare_all, comparisons_table, verdict
from penchant.logprobs import Scorer

# name, label ({first} is the first model), digits
ROWS = (
    ("reward", "reward", 3),
    ("reward_change", "change of reward against {first}", 3),
    ("win_rate", "win rate against {first} (ties half)", 3),
    ("win_rate_equal_length", "win rate at equal length", 3),
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
        sentences: the verdict.
    """

    models: dict[str, Metrics]
    runs: dict[str, Metrics]
    rows: list[dict[str, Any]]
    pairs: list[Pair] = field(default_factory=list)
    outcome: str = ""
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
    pairs = compare_all(candidates) if candidates else []
    for pair in pairs[: len(models) - 1]:
        if pair.win_rate is not None and pair.equal_length is not None:
            models[pair.name] |= named("reward_change", pair.difference) | named("win_rate", pair.win_rate)
            models[pair.name] |= named("win_rate_equal_length", pair.equal_length)
    said = verdict(candidates, pairs, outcome) if candidates else [NO_OUTCOME]
    return Compared(models, runs, _rows(measured, setting), pairs, outcome, said)


def _candidates(settings: Mapping[str, Sequence[Measured]], fixed: bool) -> tuple[list[Candidate], str]:
    """What is compared: mean rewards where there is a reward, else preferences; nothing where there are neither."""
    first = next(iter(settings))
    setting = settings[first][0].setting
    if setting.judge is None and not setting.paired:
        return [], ""
    found = []
    for name, seeds in settings.items():
        rewards = None if setting.judge is None else np.stack([m.rewards for m in seeds])  # type: ignore[misc]
        outcome = np.stack([_right(m) for m in seeds]) if rewards is None else rewards.mean(2)
        lengths = np.stack([m.lengths for m in seeds])
        found.append(Candidate(name, outcome, rewards, lengths, fixed and name == first))
    return found, "mean reward" if setting.judge is not None else "held-out preference accuracy"


def _right(m: Measured) -> np.ndarray:
    """Preferences that a model got right by prompt, (prompts,); one half for the first, which gained nothing over itself.

    A prompt with more pairs counts more: the mean over prompts is the mean over pairs.
    """
    clusters = clusters_of(m.setting.answers)
    right = m.correct if m.correct is not None else np.full(len(clusters), 0.5)
    counts = np.bincount(clusters)
    return np.asarray(np.bincount(clusters, weights=right) / counts.mean())


def _rows(measured: Mapping[str, Measured], setting: Setting) -> list[dict[str, Any]]:
    rows = []
    for i, prompt in enumerate(setting.prompts):
        asked = setting.tokenizer.decode(list(prompt), skip_special_tokens=True)
        for s in range(setting.samples):
            at = i * setting.samples + s
            row: dict[str, Any] = {"prompt": asked, "sample": s, "completions": {}}
            for name, m in measured.items():
                w = m.written
                made = {"text": w.texts[at], "tokens": len(w.ids[at]), "ended": bool(w.ended[at])}
                row["completions"][name] = made | ({} if w.rewards is None else {"reward": float(w.rewards[at])})
            rows.append(row)
    return rows


def table(models: Mapping[str, Metrics]) -> str:
    """Figures as a plain table: one line a figure, one column a model, 95% intervals in brackets."""
    first = next(iter(models))
    lines = [["", *models]]
    for name, label, digits in ROWS:
        if any(name in m for m in models.values()):
            lines.append([label.format(first=first), *(_cell(m, name, digits) for m in models.values())])
    return columns(lines)


def _cell(metrics: Metrics, name: str, digits: int) -> str:
    if name not in metrics:
        return "-"
    interval = metrics.get(f"{name}/ci")
    shown = f"{metrics[name]:.{digits}f}"
    return shown + (f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "")


__all__ = ["Compared", "Setting", "compare_models", "comparisons_table", "table"]

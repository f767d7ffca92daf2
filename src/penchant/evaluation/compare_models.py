"""Several models on the same held-out prompts: reward, win rate, KL, likelihood, each with its interval by prompt.

What each figure is, with the first model as the one that all others are compared with:

- reward: mean over completions sampled at temperature 1; `reward_change`: minus the first model's on the same prompts.
- also: the same three by other rewards, each under its name: whether what was trained on is what was meant.
- win_rate: per prompt, the share of pairs (own completion, first model's completion) with the higher reward, ties half; the mean over prompts.
- kl: KL(policy || first model) in nats per completion, from the policy's own completions (see `sampled_kl.py`).
- preference_accuracy: share of held-out pairs whose chosen answer gained more log-prob over the first model's than the rejected one.
- perplexity: of held-out chosen answers, ``exp(-sum log p / tokens)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from penchant.evaluation.pairs import pair_change
from penchant.evaluation.sampled_kl import kl_on
from penchant.evaluation.stats import Interval, bootstrap_ci, paired_bootstrap
from penchant.evaluation.text import distinct_n
from penchant.evaluation.written import Judge, Written, judged, write
from penchant.logprobs import CompletionLogps, Scorer
from penchant.reference import LiveReference, compute_logps
from penchant.types import TokenTree

Metrics = dict[str, Any]

FEW_PROMPTS = 10  # below it a percentile bootstrap is too narrow to name a winner

# name, label ({first} is the first model), digits; the first table is of every judge
JUDGED = (
    ("reward", "reward", 3),
    ("reward_change", "change of reward against {first}", 3),
    ("win_rate", "win rate against {first} (ties half)", 3),
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


@dataclass(frozen=True, slots=True)
class Setting:
    """What every model meets alike.

    Args:
        tokenizer: of all models; prompts: token ids, each once; sources: where each came from; answers: held-out rows of those prompts, pairs (chosen first) or
            single answers; empty where there are none.
        judge: the reward, or None; also: other rewards by name; samples: completions of each prompt; seed: of the draws; tokens_per_step: of a forward pass.
    """

    tokenizer: Any
    prompts: Sequence[Sequence[int]]
    sources: Sequence[str]
    answers: Sequence[TokenTree]
    judge: Judge | None
    samples: int
    max_new_tokens: int
    seed: int
    tokens_per_step: int = 4096
    also: Mapping[str, Judge] = field(default_factory=dict)
    progress: Callable[[str], Callable[[int, int], None]] | None = None

    @property
    def paired(self) -> bool:
        """Whether the answers are pairs."""
        return bool(self.answers) and all(len(t.completion_ids) == 2 for t in self.answers)


@dataclass(frozen=True, slots=True)
class Compared:
    """Figures by model, the first model first; rows: every prompt's completions side by side; sentences: what they say."""

    models: dict[str, Metrics]
    rows: list[dict[str, Any]]
    sentences: list[str] = field(default_factory=list)


def compare_models(names: Sequence[str], load: Callable[[str], Scorer], setting: Setting) -> Compared:
    """Compare models by their names; the first is what the others are compared with.

    Args:
        load: the scorer of a model; the first is held throughout, of the others one at a time.
    """
    start = load(names[0])
    first = _Measured.of(names[0], start, setting)
    figures: dict[str, Metrics] = {names[0]: first.alone()}
    measured = {names[0]: first}
    for name in names[1:]:
        scorer = load(name)
        mine = _Measured.of(name, scorer, setting)
        kl = kl_on(
            LiveReference(scorer),
            LiveReference(start),
            mine.written.trees,
            tokens_per_step=setting.tokens_per_step,
        )
        of_kl = {"kl": kl["kl/policy_ref"], "kl/ci": kl["kl/policy_ref/ci"], "kl_per_token": kl["kl/per_token"]}
        figures[name] = mine.all(first) | of_kl
        measured[name] = mine
        del scorer
    said = sentences(figures, _rewards(measured))
    for judge in setting.also:
        by = {name: m["also"][judge] for name, m in figures.items()}
        said += [f"By {judge}: {s}" for s in sentences(by, _rewards(measured, judge))]
    return Compared(figures, _rows(measured, setting), said)


@dataclass(frozen=True, slots=True)
class _Measured:
    written: Written
    answers: CompletionLogps | None
    setting: Setting
    also: dict[str, np.ndarray]

    @staticmethod
    def of(name: str, scorer: Scorer, setting: Setting) -> _Measured:
        progress = setting.progress
        written = write(
            scorer.model,
            setting.tokenizer,
            setting.prompts,
            n=setting.samples,
            max_new_tokens=setting.max_new_tokens,
            seed=setting.seed,
            judge=setting.judge,
            sources=setting.sources,
            progress=progress(f"{name} writes, prompts") if progress else None,
        )
        answers = None
        if setting.answers:
            answers = compute_logps(LiveReference(scorer), setting.answers, tokens_per_step=setting.tokens_per_step)
        also = {n: judged(j, setting.tokenizer, written.trees, written.texts) for n, j in setting.also.items()}
        return _Measured(written, answers, setting, also)

    def rewards(self, judge: str | None = None) -> np.ndarray | None:
        """Of every completion, by the reward or by another judge; None where nobody judged."""
        return self.written.rewards if judge is None else self.also[judge]

    def alone(self) -> Metrics:
        """Figures that need no other model."""
        w = self.written
        metrics: Metrics = {}
        if w.rewards is not None:
            metrics |= _named("reward", bootstrap_ci(w.rewards, clusters=w.prompts))
        if self.also:
            metrics["also"] = {
                n: _named("reward", bootstrap_ci(values, clusters=w.prompts)) for n, values in self.also.items()
            }
        lengths = np.array([len(i) for i in w.ids], dtype=np.float64)
        metrics |= _named("ended", bootstrap_ci(w.ended, clusters=w.prompts))
        metrics |= _named("tokens", bootstrap_ci(lengths, clusters=w.prompts))
        metrics["distinct_2"] = distinct_n(w.ids)
        if self.answers is not None:
            metrics |= _named("perplexity", _perplexity(self.answers, self.setting.answers))
        return metrics

    def against(self, first: _Measured) -> Metrics:
        """Figures against the first model."""
        metrics: Metrics = self._gain(first, None)
        if self.setting.paired and self.answers is not None and first.answers is not None:
            correct = pair_change(self.answers.sums, first.answers.sums).correct
            metrics |= _named("preference_accuracy", bootstrap_ci(correct, clusters=_clusters(self.setting.answers)))
        return metrics

    def _gain(self, first: _Measured, judge: str | None) -> Metrics:
        mine, theirs = self.rewards(judge), first.rewards(judge)
        if mine is None or theirs is None:
            return {}
        change = _named("reward_change", paired_bootstrap(theirs, mine, clusters=self.written.prompts))
        return change | _named("win_rate", win_rate_by_prompt(mine, theirs, self.setting.samples))

    def all(self, first: _Measured) -> Metrics:
        """Everything but the KL, which needs both models at once."""
        metrics = self.alone() | self.against(first)
        for judge, of_it in metrics.get("also", {}).items():
            of_it |= self._gain(first, judge)
        return metrics


def win_rate_by_prompt(mine: np.ndarray, theirs: np.ndarray, samples: int) -> Interval:
    """Mean over prompts of ``P(a > b) + P(a = b) / 2``, a and b any two completions of the prompt; interval by prompt.

    Args:
        mine, theirs: rewards, (prompts x samples,), prompt by prompt.
    """
    a, b = mine.reshape(-1, samples, 1), theirs.reshape(-1, 1, samples)
    return bootstrap_ci(((a > b) + 0.5 * (a == b)).mean((1, 2)))


def _perplexity(logps: CompletionLogps, answers: Sequence[TokenTree]) -> Interval:
    """``exp(-sum log p / tokens)`` over the first answer of each row; the interval draws whole prompts."""
    sizes = [len(c) for t in answers for c in t.completion_ids]
    first = [i == 0 for t in answers for i in range(len(t.completion_ids))]
    parts = [p for p, chosen in zip(logps.tokens.double().split(sizes), first, strict=True) if chosen]
    clusters = np.repeat(_clusters(answers), [len(p) for p in parts])
    nll = bootstrap_ci(-np.concatenate([p.numpy() for p in parts]), clusters=clusters, draws=2000)
    return Interval(float(np.exp(nll.estimate)), float(np.exp(nll.low)), float(np.exp(nll.high)))


def _clusters(answers: Sequence[TokenTree]) -> np.ndarray:
    """The number of each row's prompt."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(t.prompt_ids.tobytes(), len(numbers)) for t in answers])


def _named(name: str, interval: Interval) -> Metrics:
    return {name: interval.estimate, f"{name}/ci": [interval.low, interval.high]}


def _rewards(measured: Mapping[str, _Measured], judge: str | None = None) -> dict[str, np.ndarray]:
    """Mean reward of each prompt, by model; empty where nobody judged."""
    return {
        name: values.reshape(-1, m.setting.samples).mean(1)
        for name, m in measured.items()
        if (values := m.rewards(judge)) is not None
    }


def _rows(measured: Mapping[str, _Measured], setting: Setting) -> list[dict[str, Any]]:
    rows = []
    for i, prompt in enumerate(setting.prompts):
        asked = setting.tokenizer.decode(list(prompt), skip_special_tokens=True)
        for s in range(setting.samples):
            at = i * setting.samples + s
            row: dict[str, Any] = {"prompt": asked, "sample": s, "completions": {}}
            for name, m in measured.items():
                w = m.written
                made = {"text": w.texts[at], "tokens": len(w.ids[at]), "ended": bool(w.ended[at])}
                made |= {} if w.rewards is None else {"reward": float(w.rewards[at])}
                made |= {"also": {judge: float(v[at]) for judge, v in m.also.items()}} if m.also else {}
                row["completions"][name] = made
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# in words


def sentences(figures: Mapping[str, Metrics], rewards: Mapping[str, np.ndarray]) -> list[str]:
    """Who won, as far as the 95% intervals say so.

    Args:
        figures: by model, the first first; rewards: mean reward of each prompt, (prompts,), by model, empty without a reward.
    """
    first, *others = figures
    if not rewards:
        return ["No winner is named: there is no compare.reward."]
    prompts = len(rewards[first])
    if prompts < FEW_PROMPTS:
        return [f"No winner is named: {prompts} prompts are too few for an interval (at least {FEW_PROMPTS})."]
    said, better = [], []
    for name in others:
        rate, (low, high) = figures[name]["win_rate"], figures[name]["win_rate/ci"]
        least, most = figures[name]["reward_change/ci"]
        shown = f"its win rate is {rate:.0%} [{low:.0%}, {high:.0%}]"
        if low > 0.5 and most >= 0:
            better.append(name)
            said.append(f"{name} is better than {first}: {shown}.")
        elif high < 0.5 and least <= 0:
            said.append(f"{name} is worse than {first}: {shown}.")
        else:
            why = "and the interval includes 50%" if low <= 0.5 <= high else "but its mean reward says the opposite"
            said.append(f"Between {name} and {first} there is no clear winner: {shown}, {why}.")
    better.sort(key=lambda n: -figures[n]["reward"])
    for other in better[1:]:
        best = better[0]
        gap = paired_bootstrap(rewards[other], rewards[best])
        shown = f"their rewards differ by {gap.estimate:.3f} [{gap.low:.3f}, {gap.high:.3f}]"
        verdict = (
            f"{best} is better than {other}" if gap.low > 0 else f"Between {best} and {other} there is no clear winner"
        )
        said.append(f"{verdict}: {shown}.")
    return said


def table(models: Mapping[str, Metrics]) -> str:
    """Figures as a plain table: one line a figure, one column a model, 95% intervals in brackets."""
    first = next(iter(models))
    lines = [["", *models], *_lines(models, JUDGED, first)]
    for judge in models[first].get("also", {}):
        lines += _lines({n: m["also"][judge] for n, m in models.items()}, JUDGED, first, f", by {judge}")
    lines += _lines(models, ROWS, first)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


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

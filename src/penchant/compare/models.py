"""Comparison of models on the same prompts, and the files that it writes."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from penchant.base.text import columns
from penchant.compare.judged import WIN_RATE, Judgement, judge_pairs, judged_candidates, stack_lengths, win_rates
from penchant.compare.measured import Measurement, Metrics, Setting, figures, measure
from penchant.compare.verdict import (
    Candidate,
    ComparisonGroup,
    Pair,
    Sentence,
    compare_all,
    compare_uncorrected,
    comparisons_table,
    correct_p_values,
    verdict,
)
from penchant.data.load import Dataset, first_text, turns_of
from penchant.data.split import prompt_key
from penchant.errors import ConfigError
from penchant.judges.judge import PairJudge
from penchant.logprobs import Scorer
from penchant.metrics.answers import is_answer
from penchant.metrics.figures import prompt_numbers
from penchant.metrics.names import all_tied
from penchant.rewards import load_reward
from penchant.rewards.reward_model import PolicyText, rows_by_source
from penchant.runfolder import COMPARISON, COMPARISON_ROWS, write_summed
from penchant.runfolder.values import FEW_ROWS, ci_of, format_decimals, format_interval
from penchant.runs import Run
from penchant.runs.find import Source
from penchant.runs.parts import prepare_for_inference
from penchant.runs.rows import Rows
from penchant.training.console import PlainConsole
from penchant.types import PromptTree, TokenTree

# ---- Several models on the same held-out prompts: reward, win rate, KL, likelihood, each with its interval by prompt ----
# All others are compared with the first model. Models that are seeds of one setting share a column.
# A win rate is, per prompt, the share of pairs (own completion, first model's completion) in which the own one has the higher reward,
# ties half, averaged over prompts. KL is estimated from the policy's own completions. A preference is right if the chosen answer gained
# more log-prob over the first model than the rejected one. Perplexity is ``exp(-sum log p / tokens)``.

# name, label ({first} is the first model), digits; JUDGED is repeated for every reward
JUDGED = (
    ("reward", "reward", 3),
    ("reward_change", "change of reward against {first}", 3),
    ("win_rate", "win rate against {first} (ties half)", 3),
    ("win_rate_equal_length", "win rate at equal length", 3),
)
ROWS = (
    ("kl_k3", "KL(policy || {first}), nats per completion", 2),
    ("kl_per_token", "KL(policy || {first}), nats per token", 4),
    ("preference_accuracy", "held-out preference accuracy", 3),
    ("perplexity", "perplexity of held-out chosen answers", 2),
    ("ended", "share ended by EOS", 3),
    ("tokens", "tokens per completion", 1),
    ("distinct_2", "distinct-2", 3),
)
NO_OUTCOME = "No winner is named: there is neither a reward nor a held-out pair of answers."


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """The result of a comparison.

    Args:
        models: figures by setting, starting with the first model; runs: figures by model, for settings with several seeds.
        prompts: their number; rows: every prompt's completions side by side; pairs: all comparisons; outcome: what they compare, in words.
        also: the same comparisons by other rewards, by name; judgement: by a pairwise judge; sentences: the verdict.
    """

    models: dict[str, Metrics]
    runs: dict[str, Metrics]
    rows: list[dict[str, Any]]
    prompts: int
    pairs: list[Pair] = field(default_factory=list)
    outcome: str = ""
    also: dict[str, list[Pair]] = field(default_factory=dict)
    judgement: Judgement | None = None
    sentences: list[Sentence] = field(default_factory=list)


def compare_models(
    names: Sequence[str],
    load: Callable[[str], Scorer],
    setting: Setting,
    *,
    seeds: Mapping[str, Sequence[str]] | None = None,
    fixed: bool = False,
) -> ComparisonResult:
    """Compare models with the first one and with each other.

    Args:
        load: loads the scorer of a model by name; the first stays in memory, the others one at a time.
        seeds: setting name -> the other models that are its seeds; default: each model is a setting of its own.
        fixed: whether the first is the model that training starts from, rather than one trained with a seed.
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
    models = {name: figures(group) for name, group in by_setting.items()}
    runs = {m: figures([measured[m]]) for members in groups.values() if len(members) > 1 for m in members}
    candidates, outcome = _candidates(by_setting, fixed)
    pairs = compare_all(candidates) if candidates and candidates[0].outcome is not None else []
    also = _compare_by_others(by_setting, fixed, setting.also)
    for pair in pairs[: len(models) - 1]:
        models[pair.name] |= _gain_metrics(pair)
    for judge, reward_pairs in also.items():
        for pair in reward_pairs[: len(models) - 1]:
            models[pair.name]["also"][judge] |= _gain_metrics(pair)
    judgement = None
    if setting.pairwise is not None:
        judgement = judge_pairs(setting.pairwise, by_setting, setting, fixed)
        for name, metrics in models.items():
            metrics["judged"] = {judgement.name: judgement.win_rates_against(name, names[0])}
    total = sum(map(len, also.values()))
    families = [ComparisonGroup(judge, reward_pairs, "mean reward", total) for judge, reward_pairs in also.items()]
    families += [judgement.comparison_group] if judgement is not None else []
    sentences = verdict(candidates, pairs, outcome, families) if candidates else [Sentence(NO_OUTCOME, "open")]
    rows = _comparison_rows(measured, setting, judgement)
    return ComparisonResult(models, runs, rows, len(setting.prompts), pairs, outcome, also, judgement, sentences)


def _candidates(settings: Mapping[str, Sequence[Measurement]], first_is_fixed: bool) -> tuple[list[Candidate], str]:
    """Candidates and outcome: mean rewards with a reward, else judged win rates or preference accuracy; empty without any of them."""
    first = next(iter(settings))
    setting = settings[first][0].setting
    if setting.judge is not None:
        return _reward_candidates(settings, first_is_fixed, None), "mean reward"
    if setting.pairwise is not None:
        return judged_candidates(settings, first_is_fixed), WIN_RATE
    if not setting.is_paired:
        return [], ""
    return [
        Candidate(
            name,
            np.stack([_accuracy_by_prompt(m) for m in seeds]),
            None,
            stack_lengths(seeds),
            first_is_fixed and name == first,
        )
        for name, seeds in settings.items()
    ], "held-out preference accuracy"


def _compare_by_others(
    settings: Mapping[str, Sequence[Measurement]], first_is_fixed: bool, names: Iterable[str]
) -> dict[str, list[Pair]]:
    """Comparisons by the other rewards, corrected together; those by the main reward are corrected separately."""
    by_judge = {judge: compare_uncorrected(_reward_candidates(settings, first_is_fixed, judge)) for judge in names}
    corrected = iter(correct_p_values([pair for pairs in by_judge.values() for pair in pairs]))
    return {judge: [next(corrected) for _ in pairs] for judge, pairs in by_judge.items()}


def _reward_candidates(
    settings: Mapping[str, Sequence[Measurement]], first_is_fixed: bool, judge: str | None
) -> list[Candidate]:
    """Every setting with its mean rewards, by the main reward or by the one named `judge`."""
    first, candidates = next(iter(settings)), []
    for name, seeds in settings.items():
        rewards = np.stack([r for m in seeds if (r := m.rewards(judge)) is not None])
        candidates.append(
            Candidate(name, rewards.mean(2), rewards, stack_lengths(seeds), first_is_fixed and name == first)
        )
    return candidates


def _gain_metrics(pair: Pair) -> Metrics:
    """A setting's gain over the first model as named figures; empty without a reward."""
    return {} if pair.win_rate is None else pair.difference.named("reward_change") | win_rates(pair)


def _accuracy_by_prompt(m: Measurement) -> np.ndarray:
    """Preference accuracy by prompt, (prompts,); one half for the first model, which cannot gain over itself.

    Prompts with more pairs are weighted up, so that the mean over prompts is the mean over pairs.
    """
    clusters = prompt_numbers(m.setting.answers)
    correct = m.correct if m.correct is not None else np.full(len(clusters), 0.5)
    counts = np.bincount(clusters)
    return np.asarray(np.bincount(clusters, weights=correct) / counts.mean())


def _comparison_rows(
    measurements: Mapping[str, Measurement], setting: Setting, judgement: Judgement | None = None
) -> list[dict[str, Any]]:
    rows = []
    for i, prompt in enumerate(setting.prompt_texts):
        for s in range(setting.samples):
            index = i * setting.samples + s
            turns = setting.turns[i] if setting.turns else {}
            row: dict[str, Any] = {"prompt": prompt, **turns, "sample": s, "completions": {}}
            for name, m in measurements.items():
                row["completions"][name] = {"text": m.written.texts[index], **m.written.row(index, m.also)}
            if judgement is not None:
                row["judged"] = judgement.verdicts_for(i, s)
            rows.append(row)
    return rows


def table(models: Mapping[str, Metrics], prompts: int = FEW_ROWS) -> str:
    """Format figures as a plain table: a row per figure, a column per model, 95% intervals in brackets unless prompts are too few."""
    if prompts < FEW_ROWS:
        models = {name: {k: v for k, v in m.items() if not k.endswith("/ci")} for name, m in models.items()}
    first = next(iter(models))
    lines = [["", *models], *_table_lines(models, JUDGED, first)]
    for judge in models[first].get("also", {}):
        lines += _table_lines({n: m["also"][judge] for n, m in models.items()}, JUDGED, first, f", by {judge}")
    for judge in models[first].get("judged", {}):
        lines += _table_lines({n: m["judged"][judge] for n, m in models.items()}, JUDGED, first, f", by {judge}")
    return columns(lines + _table_lines(models, ROWS, first))


def _table_lines(
    models: Mapping[str, Metrics], rows: Sequence[tuple[str, str, int]], first: str, suffix: str = ""
) -> list[list[str]]:
    """The rows for which any model has a figure."""
    return [
        [label.format(first=first) + suffix, *(_format_cell(m, name, digits) for m in models.values())]
        for name, label, digits in rows
        if any(name in m for m in models.values())
    ]


def _format_cell(metrics: Metrics, name: str, digits: int) -> str:
    if name not in metrics:
        return "-"
    if all_tied(metrics, name):
        return "all tied"
    form = f".{digits}f"
    return f"{format_decimals(metrics[name], form)} {format_interval(ci_of(metrics, name), form)}".rstrip()


# ---- Named models on held-out rows: loading them, their shared setting, and the files written ----


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are sampled; `place`: where these settings come from, for error messages."""

    prompts: int
    samples: int
    max_new_tokens: int
    seed: int
    place: str = "compare"

    def heading(self, prompts: int, rows: str) -> str:
        """Describe what the figures are based on."""
        if not self.samples:
            return (
                f"{prompts} held-out prompts of {rows} with their given answers (no answers are generated for pictures)"
            )
        return (
            f"{prompts} held-out prompts of {rows}, {self.samples} completion(s) each of at most "
            f"{self.max_new_tokens} tokens at temperature 1"
        )


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that no model was trained on, as read by the run `owner`; `leaked`: number of rows left out."""

    owner: str
    rows: Dataset
    leaked: int


def tree_key(tree: PromptTree) -> str:
    """The key by which prompts count as the same."""
    return prompt_key(tree.prompt, first_text(tree))


def trained_prompts(run: Run) -> set[str]:
    """Keys of the prompts that a run trains on; empty for texts without prompts."""
    rows = run.rows.datasets[0]
    return set() if rows.kind == "text" else {tree_key(t) for t in rows.trees}


def exclude_prompts(owner: str, rows: Dataset, trained: set[str]) -> HeldOut:
    """Keep the rows whose prompts are not in `trained`; may leave none."""
    unseen = [i for i, t in enumerate(rows.trees) if tree_key(t) not in trained]
    return HeldOut(owner, rows.subset(unseen), len(rows.trees) - len(unseen))


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same vocabulary, EOS and chat template."""
    return _vocabulary(one) == _vocabulary(other)


def _vocabulary(tokenizer: Any) -> tuple[Any, ...]:
    return tokenizer.get_vocab(), tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)


def make_setting(
    run: Run,
    tokenizer: Any,
    rows: Dataset,
    reward: Any,
    sampling: Sampling,
    console: PlainConsole,
    other_rewards: Mapping[str, Any] | None = None,
    pairwise: PairJudge | None = None,
) -> Setting:
    """Build the setting shared by all models: tokenizer, prompts, answers and rewards.

    Args:
        run: its config is used to tokenize the rows, and its precision and device to run the models.
        reward: as for `load_reward`, or None; other_rewards: by name; pairwise: the pairwise judge.
    """
    # the tokenizer is passed in because the run's config may name a model that does not exist yet
    trees = Rows(run.config, run.shared, run.console, tokenizer).tokenize(rows).trees
    first_tree = {t.prompt_key: t for t in reversed(trees)}
    keys = dict.fromkeys(itertools.islice(dict.fromkeys(t.prompt_key for t in trees), sampling.prompts))
    sources = [first_tree[key].source for key in keys]
    data = run.config.data
    by_source = rows_by_source(rows.trees)
    policy = PolicyText(tokenizer, data.template, by_source, data.template_options)
    return Setting(
        tokenizer=tokenizer,
        prompts=[tuple(first_tree[key].prompt_ids.tolist()) for key in keys],
        sources=sources,
        answers=_answers([t for t in trees if t.prompt_key in keys], rows.kind),
        judge=None if reward is None else load_reward(reward, policy, run.device),
        samples=sampling.samples,
        max_new_tokens=sampling.max_new_tokens,
        seed=sampling.seed,
        tokens_per_step=run.config.train.tokens_per_step,
        also={name: load_reward(r, policy, run.device) for name, r in (other_rewards or {}).items()},
        pairwise=pairwise,
        progress=console.counter,
        turns=[turns_of(r.prompt) if (r := by_source.get(s)) else {} for s in sources],
    )


def _answers(trees: Sequence[TokenTree], kind: str) -> list[TokenTree]:
    """Pairs and single good answers among held-out rows; rows with scores or only prompts do not mark an answer as good."""
    if kind not in ("pairs", "sft", "unpaired"):
        return []
    good = [t for t in trees if is_answer(t) and t.labels[:1] != (False,)]
    return [replace(t, row=i) for i, t in enumerate(good)]


def compare_sources(
    sources: Sequence[Source],
    run: Run,
    setting: Setting,
    sampling: Sampling,
    *,
    seeds: Mapping[str, Sequence[str]] | None = None,
    fixed: bool = False,
) -> ComparisonResult:
    """Compare models in the precision and on the device of `run`; see `compare_models`."""
    by_name = {s.name: s for s in sources}
    longest = max(map(len, setting.prompts)) + setting.max_new_tokens

    def load(name: str) -> Scorer:
        model = by_name[name].load(run.device)
        _check_context(model, name, longest, sampling.place)
        return prepare_for_inference(
            model, run.config, run.dtype, run.rows.processor if run.config.model.sees else None
        )

    return compare_models(list(by_name), load, setting, seeds=seeds, fixed=fixed)


def _check_context(model: Any, name: str, longest: int, place: str) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        what = f"the longest prompt and max_new_tokens make {longest} tokens, beyond {name}'s context of {context}"
        raise ConfigError(place, what, "lower max_new_tokens of the comparison, or data.max_length, which cuts prompts")


# ---- output ----


def comparison_json(result: ComparisonResult) -> dict[str, Any]:
    """A comparison as written to comparison.json."""
    judgement = result.judgement
    return {
        "models": result.models,
        **({"runs": result.runs} if result.runs else {}),
        "outcome": result.outcome,
        "comparisons": [p.to_json() for p in result.pairs or (judgement.pairs if judgement else [])],
        "comparisons_text": _comparison_tables(result),
        **({"also": {n: [p.to_json() for p in pairs] for n, pairs in result.also.items()}} if result.also else {}),
        **({"judge": judgement.to_json()} if judgement is not None else {}),
        "sentences": [s.text for s in result.sentences],
        "verdict": [{"tone": s.tone, "by": s.by} for s in result.sentences],
    }


def _comparison_tables(result: ComparisonResult) -> str:
    if result.prompts < FEW_ROWS:
        return ""
    tables = [comparisons_table(result.pairs, result.outcome)] if result.pairs else []
    total = sum(map(len, result.also.values()))
    for name, pairs in result.also.items():
        tables.append(f"By {name}:\n{comparisons_table(pairs, 'mean reward', total)}")
    if result.judgement is not None and result.judgement.pairs:
        tables.append(f"By {result.judgement.name}:\n{comparisons_table(result.judgement.pairs, WIN_RATE)}")
    return "\n\n".join(tables)


def format_comparison(figures: Mapping[str, Any], heading: str, notes: Iterable[str] = ()) -> str:
    """Format a comparison as text: heading, notes, tables and, at the end, the verdict."""
    main_table = table(figures["models"], int(figures.get("prompts") or FEW_ROWS))
    parts = [heading, "\n".join(notes), main_table, figures.get("comparisons_text", "")]
    return "\n\n".join(p for p in [*parts, "\n".join(figures["sentences"])] if p)


def write_files(folder: Path, figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write comparison.json and comparison.jsonl, each atomically."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_summed(folder / COMPARISON_ROWS, lines)
    write_summed(folder / COMPARISON, json.dumps(figures, indent=1, ensure_ascii=False))


def tokens_sha256(setting: Setting) -> str:
    """SHA-256 of the prompts and answers of a setting."""
    digest = hashlib.sha256()
    for ids in setting.prompts:
        digest.update(np.array(ids, dtype="<i4").tobytes() + b"|")
    for tree in setting.answers:
        for part in (tree.prompt_ids, *tree.completion_ids, *tree.masks):
            digest.update(part.astype("<i4").tobytes() + b"|")
    return digest.hexdigest()

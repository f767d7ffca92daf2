"""Sampled completions of a model and their figures: reward, length, diversity, overlap with references, KL."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penchant.base.machine import in_fp64, place_of
from penchant.base.text import counted
from penchant.data.packing import run_passes
from penchant.data.templates import end_ids
from penchant.distributed.world import current
from penchant.errors import ConfigError, RewardError
from penchant.logprobs import Scorer, per_completion
from penchant.logprobs.reference import LiveReference
from penchant.losses.divergences import kl_estimate
from penchant.metrics.answers import TokenScores, completion_sums, kl_figures
from penchant.metrics.figures import DRAWS, Figure, mean_figure, ratio_figure, share_figure
from penchant.metrics.stats import Interval, bootstrap_ci, bootstrap_sums, share_ci, t_quantile
from penchant.rollout.generate import sample
from penchant.runfolder import is_intact, write_summed
from penchant.types import PackedBatch, TokenTree

# ---- Diversity over all samples, and repetition within a sample ----


def distinct_n(samples: Sequence[Sequence[int]], n: int = 2) -> float:
    """Share of distinct n-grams over all samples together: ``unique / total`` (arXiv 1510.03055).

    Args:
        samples: token ids of each text; n: length of the n-grams.
    """
    grams = [g for ids in samples for g in _ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_n_interval(samples: Sequence[Sequence[int]], clusters: Sequence[int], n: int = 2) -> Interval | None:
    """`distinct_n` with a jackknife interval that leaves out one prompt at a time; None if there are fewer than two prompts.

    ``D +- t_{k-1} s``, ``s^2 = (k-1)/k sum_c (D_(c) - mean D_(.))^2``, D_(c) without prompt c. Not a bootstrap: it would draw prompts
    twice, and their n-grams would no longer be distinct, so its draws would lie below the estimate.

    Args:
        clusters: the prompt of each sample.

    Paper: Efron and Stein, "The jackknife estimate of variance" (1981), which shows that s^2 is not too small on average.
    """
    by_cluster: dict[int, Counter[tuple[int, ...]]] = {}
    for ids, c in zip(samples, clusters, strict=True):
        by_cluster.setdefault(c, Counter()).update(_ngrams(ids, n))
    owners: Counter[tuple[int, ...]] = Counter(g for grams in by_cluster.values() for g in grams)
    total = sum(sum(grams.values()) for grams in by_cluster.values())
    k = len(by_cluster)
    if k < 2:
        return None
    estimates = []
    for grams in by_cluster.values():
        unique = sum(owners[g] == 1 for g in grams)  # n-grams that occur for no other prompt
        remaining = total - sum(grams.values())
        estimates.append((len(owners) - unique) / remaining if remaining else 0.0)
    shares = np.array(estimates)
    half = t_quantile(0.975, k - 1) * float(np.sqrt((k - 1) / k * ((shares - shares.mean()) ** 2).sum()))
    value = len(owners) / total if total else 0.0
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def repetition(ids: Sequence[int], n: int = 4) -> float | None:
    """Share of a text's n-grams that occurred earlier in it: ``1 - unique / total``; None if it is shorter than n tokens.

    Paper: arXiv 1908.04319 (seq-rep-n).
    """
    grams = list(_ngrams(ids, n))
    return 1.0 - len(set(grams)) / len(grams) if grams else None


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


# ---- Completions for held-out prompts, with or without rewards: the basis of every comparison ----

# (prompts, completions, the trees of these texts) -> one reward per completion
RewardFunction = Callable[[Sequence[str], Sequence[str], Sequence[TokenTree]], np.ndarray]


@dataclass(frozen=True)
class Completions:
    """Completions, grouped by prompt.

    Args:
        trees: each prompt with its n completions; `truncated` marks those that did not end with EOS.
        texts: of all completions in order, (prompts x n); rewards: (prompts x n,), None without a reward.
    """

    trees: list[TokenTree]
    texts: list[str]
    rewards: np.ndarray | None

    @cached_property
    def ids(self) -> list[list[int]]:
        """Token ids of all completions in order."""
        return [c.tolist() for t in self.trees for c in t.completion_ids]

    @cached_property
    def ended(self) -> np.ndarray:
        """Whether each completion ended with EOS, (prompts x n,)."""
        return np.array([not cut for t in self.trees for cut in t.truncated])

    @property
    def prompts(self) -> np.ndarray:
        """The index of each completion's prompt, (prompts x n,): the clusters for intervals."""
        return np.array([i for i, t in enumerate(self.trees) for _ in t.completion_ids])

    def row(self, index: int, other_rewards: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
        """Fields written to files next to a completion's text; `other_rewards`: other rewards of all completions, by name."""
        row: dict[str, Any] = {"tokens": len(self.ids[index]), "ended": bool(self.ended[index])}
        row |= {} if self.rewards is None else {"reward": _nan_to_none(self.rewards[index])}
        return row | (
            {"also": {name: _nan_to_none(v[index]) for name, v in other_rewards.items()}} if other_rewards else {}
        )


def _nan_to_none(value: Any) -> float | None:
    """A reward for JSON: None (null) if no reward applies to the completion."""
    return None if np.isnan(value) else float(value)


def sample_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    judge: RewardFunction | None = None,
    sources: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Completions:
    """Sample `n` completions of each prompt and score them. The ranks share the sampling.

    Args:
        prompts: token ids; seed: of sampling; judge: a reward, called once with all completions.
        sources: where each prompt came from, so that a reward model can find it in its own tokens; may be empty.
    """
    world = current()
    indices = range(world.rank, len(prompts), world.size)
    sampled = sample(
        model,
        [prompts[i] for i in indices],
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        prompt_seeds=indices,
        eos_token_id=end_ids(tokenizer, model),
        progress=progress,
    )
    rows = world.dealt(sampled, len(prompts))
    trees = [
        TokenTree(
            i,
            np.array(prompt, dtype=np.int32),
            tuple(np.array(s.ids, dtype=np.int32) for s in row),
            tuple(not s.finished for s in row),
            sources[i] if sources else "",
        )
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]
    texts = [tokenizer.decode(s.ids, skip_special_tokens=True) for row in rows for s in row]
    return Completions(trees, texts, None if judge is None else score_completions(judge, tokenizer, trees, texts))


def score_completions(
    judge: RewardFunction, tokenizer: Any, trees: Sequence[TokenTree], texts: Sequence[str]
) -> np.ndarray:
    """Return the reward of each completion, (completions,).

    Args:
        trees: prompts with their completions; texts: of all completions in order.
    """
    decoded = [
        (tokenizer.decode(t.prompt_ids.tolist(), skip_special_tokens=True), len(t.completion_ids)) for t in trees
    ]
    return judge([prompt for prompt, n in decoded for _ in range(n)], texts, trees)


# ---- Figures of a model's own completions: rewards, length, diversity, repetition, KL from a reference ----

REPETITION_N = 4  # n of the n-grams for repetition


def generation_figures(completions: Completions, other_rewards: Mapping[str, np.ndarray]) -> list[Figure]:
    """Compute rewards, length, share ended by EOS, distinct-1 and -2, and repetition, with intervals by prompt.

    Args:
        other_rewards: other rewards of every completion, by name.
    """
    prompts = completions.prompts
    figures = []
    if completions.rewards is not None:
        figures += _mean_reward("generated/reward", completions.rewards, prompts)
    for name, values in other_rewards.items():
        figures += _mean_reward(f"generated/reward[{name}]", values, prompts)
    figures.append(mean_figure("generated/length", [len(ids) for ids in completions.ids], prompts))
    figures.append(share_figure("generated/ended", completions.ended, prompts))
    for n in (1, 2):
        interval = distinct_n_interval(completions.ids, prompts.tolist(), n)
        span = None if interval is None else (interval.low, interval.high)
        figures.append(Figure(f"generated/distinct_{n}", distinct_n(completions.ids, n), span, len(completions.ids)))
    shares = [repetition(ids, REPETITION_N) for ids in completions.ids]
    known = [(share, prompt) for share, prompt in zip(shares, prompts.tolist(), strict=True) if share is not None]
    if known:
        figures.append(mean_figure("generated/repetition", [s for s, _ in known], [p for _, p in known]))
    return figures


def _mean_reward(name: str, values: np.ndarray, prompts: np.ndarray) -> list[Figure]:
    """Mean over the completions that the reward applies to; empty if there are none."""
    applies = np.isfinite(values)
    return [mean_figure(name, values[applies], prompts[applies])] if applies.any() else []


def generation_kl(scores: TokenScores, completions: Completions, *, sampled: bool) -> list[Figure]:
    """KL from a reference on the model's own completions.

    With ``d_t = log policy(y_t) - log reference(y_t)``: ``k1 = sum_t d_t`` per completion, ``k3 = exp(-d_t) - 1 + d_t`` per token, both
    unbiased if the completions were sampled at temperature 1. The exact KL at every token, summed over a completion, estimates the same
    quantity as k1 with a variance that is never larger.

    Args:
        scores: of the completions, with a reference; sampled: whether to add k1 and k3.

    Papers: Schulman, "Approximating KL divergence" (2020); arXiv 2504.10637.
    """
    assert scores.reference is not None
    lengths = np.array([len(ids) for ids in completions.ids])
    figures = []
    if sampled:
        policy, reference = torch.from_numpy(scores.policy), torch.from_numpy(scores.reference)
        k1, k3 = kl_estimate(policy, reference, "k1").numpy(), kl_estimate(policy, reference, "k3").numpy()
        figures.append(mean_figure("generated/kl/k1", completion_sums(k1, lengths), completions.prompts))
        figures.append(ratio_figure("generated/kl/k3", completion_sums(k3, lengths), lengths, completions.prompts))
    return figures + kl_figures("generated/kl", scores, lengths, completions.prompts)


# ---- BLEU (sacrebleu) and ROUGE (rouge-score) of completions against reference answers; both packages are optional ----

ROUGE = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_L"}
ORDERS = 4


def require_overlap() -> None:
    """Raise a ConfigError with the install command if sacrebleu or rouge_score is missing."""
    try:
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        what = f"need an extra ({error.name or error} is not installed)"
        raise ConfigError("BLEU and ROUGE", what, "pip install 'penchant[eval]', or leave them out") from error


def overlap_figures(
    texts: Sequence[str], references: Sequence[Sequence[str]], clusters: Sequence[int] | np.ndarray, *, stemmer: bool
) -> tuple[list[Figure], str]:
    """Corpus BLEU and mean ROUGE F1 over completions, with intervals by prompt.

    BLEU is over the whole corpus: ``BP exp(mean_n log p_n)`` from summed n-gram counts. Its interval resamples prompts and recomputes it
    from their counts. ROUGE is a mean over completions, each against the reference answer that gives it the highest F1.

    Args:
        texts: completions; references: at least one for each; clusters: prompt of each; stemmer: use Porter's stemmer for ROUGE.

    Returns:
        ``generated/bleu`` (0 to 100) and ``generated/rouge_...`` (0 to 1), and a signature of how they were computed.

    Raises:
        ConfigError: a package is missing.

    Papers: Papineni et al. (2002); arXiv 1804.08771 (sacrebleu); Lin (2004).
    """
    require_overlap()
    from rouge_score.rouge_scorer import RougeScorer

    bleu, signature = _bleu(texts, references, clusters)
    scorer, stemming = RougeScorer(list(ROUGE), use_stemmer=stemmer), "on" if stemmer else "off"
    scores = [scorer.score_multi(list(refs), text) for text, refs in zip(texts, references, strict=True)]
    rouge = [mean_figure(f"generated/{ours}", [s[n].fmeasure for s in scores], clusters) for n, ours in ROUGE.items()]
    return [bleu, *rouge], f"BLEU|{signature}; ROUGE F1|stemmer:{stemming}"


def _bleu(
    texts: Sequence[str], references: Sequence[Sequence[str]], clusters: Sequence[int] | np.ndarray
) -> tuple[Figure, str]:
    from sacrebleu.metrics import BLEU

    rows = sentence_statistics(texts, references)
    interval = bootstrap_sums(rows, bleu_of_sums, clusters=clusters, draws=DRAWS)
    metric = BLEU(force=True)  # no warning about completions that look tokenized
    # the metric object also gives the signature; one stream per reference, as many as the longest list has
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(max(map(len, references)))]
    corpus_bleu = metric.corpus_score(list(texts), streams)  # type: ignore[arg-type]
    if abs(corpus_bleu.score - interval.estimate) > 1e-6:
        raise AssertionError(f"BLEU from counts is {interval.estimate}, sacrebleu's own {corpus_bleu.score}")
    return Figure.of("generated/bleu", interval, len(texts), clusters), str(metric.get_signature())


def sentence_statistics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Counts that corpus BLEU sums over completions, (n, 10): own and reference length, matching n-grams, all n-grams."""
    from sacrebleu.metrics import BLEU

    metric: Any = BLEU(effective_order=True)  # only the counts of each sentence are used
    scores = [metric.sentence_score(text, list(refs)) for text, refs in zip(texts, references, strict=True)]
    return np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], dtype=np.float64)


def bleu_of_sums(sums: np.ndarray) -> float:
    """Corpus BLEU from summed `sentence_statistics`, as sacrebleu computes it by default (smoothing: exp)."""
    from sacrebleu.metrics import BLEU

    counts = [round(v) for v in sums]
    return BLEU.compute_bleu(
        counts[2 : 2 + ORDERS], counts[2 + ORDERS :], counts[0], counts[1], smooth_method="exp"
    ).score


# ---- KL(policy || reference) from the policy's own completions ----


def estimate_kl(
    policy: LiveReference, reference: LiveReference, trees: Sequence[TokenTree], *, tokens_per_step: int
) -> dict[str, Any]:
    """Estimate KL(policy || reference) on completions that the policy sampled at temperature 1, any number per prompt.

    With ``d_t = log pi(y_t) - log ref(y_t)``: per completion ``k1 = sum_t d_t`` (unbiased), per token
    ``k3 = exp(-d_t) - 1 + d_t`` (unbiased, never negative; Schulman, "Approximating KL divergence", 2020).

    Args:
        policy, reference: both run live, without gradient; trees: each prompt with its completions; intervals resample whole trees.

    Returns:
        ``kl/policy_ref`` (k1) and ``kl/k3`` in nats per completion with their 95% intervals by prompt, ``kl/per_token`` (k3),
        ``kl/completions``.
    """
    k1, k3 = kl_by_completion(policy, reference, trees, tokens_per_step=tokens_per_step)
    clusters = [i for i, t in enumerate(trees) for _ in t.completion_ids]
    cis = {name: bootstrap_ci(v, clusters=clusters, draws=2000) for name, v in (("kl/policy_ref", k1), ("kl/k3", k3))}
    tokens = sum(len(c) for t in trees for c in t.completion_ids)
    figures = {k: v for name, interval in cis.items() for k, v in interval.named(name).items()}
    return figures | {"kl/per_token": float(k3.sum()) / tokens, "kl/completions": len(k1)}


def kl_by_completion(
    policy: LiveReference, reference: LiveReference, trees: Sequence[TokenTree], *, tokens_per_step: int
) -> tuple[np.ndarray, np.ndarray]:
    """k1 and k3 of every completion, summed over its tokens, in nats; (completions,) each, in order."""
    shared = policy.scorer.shared
    device = place_of(policy.scorer.model)
    lanes = policy.side_by_side and reference.side_by_side
    by_tree: dict[int, torch.Tensor] = {}

    def estimates(batch: PackedBatch) -> torch.Tensor:
        logps, ref_logps = (in_fp64(m.completion_logps(batch).tokens) for m in (policy, reference))
        return torch.stack([per_completion(kl_estimate(logps, ref_logps, k), batch.lengths) for k in ("k1", "k3")], 1)

    passes = run_passes(estimates, trees, tokens_per_step, shared=shared, device=device, lanes=lanes)
    for members, sums in passes:
        by_tree |= zip(members, sums.cpu().split([len(trees[i].completion_ids) for i in members]), strict=True)
    k1, k3 = torch.cat([by_tree[i] for i in range(len(trees))]).numpy().T
    return k1, k3


# ---- Completions for held-out prompts during training: length, share ended, diversity, and reward against the initial model's ----

Metrics = dict[str, Any]

START_FILE = "start.completions.json"  # of a run folder


@dataclass(frozen=True, slots=True)
class CompletionSampler:
    """Samples fresh completions from the policy at every evaluation.

    Args:
        tokenizer: of the policy; prompts: token ids, no duplicates; sources: where each came from, so that a reward model can find it.
        max_new_tokens: of a completion; seed: of the run; judge: reward of completions, or None; judge_name: its identity, as JSON.
    """

    tokenizer: Any
    prompts: Sequence[Sequence[int]]
    sources: Sequence[str]
    max_new_tokens: int
    seed: int
    judge: RewardFunction | None = None
    judge_name: Any = None

    def write(self, model: Any, step: int) -> Completions:
        """Sample and score one completion per prompt at temperature 1, determined by weights, seed and optimizer step."""
        return sample_completions(
            model,
            self.tokenizer,
            self.prompts,
            n=1,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed * 1_000_003 + step,
            judge=self.judge,
            sources=self.sources,
        )

    @property
    def cache_key(self) -> dict[str, Any]:
        """Everything that completions and their rewards depend on except weights and step, as JSON."""
        digest = hashlib.sha256()
        for ids in self.prompts:
            digest.update(np.array(ids, dtype="<i4").tobytes() + b"|")
        return {
            "prompts": digest.hexdigest(),
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "judge": self.judge_name,
        }


def completion_figures(completions: Completions) -> Metrics:
    """``completions/length`` in tokens and ``completions/ended``, with intervals by prompt; ``completions/distinct_2`` over all."""
    ids = completions.ids
    lengths = np.array([len(i) for i in ids], dtype=np.float64)
    return {
        **bootstrap_ci(lengths, clusters=completions.prompts, draws=DRAWS).named("completions/length"),
        **share_ci(completions.ended, clusters=completions.prompts, draws=DRAWS).named("completions/ended"),
        "completions/distinct_2": distinct_n(ids),
    }


def gain_figures(rewards: Sequence[float] | np.ndarray, start: Sequence[float] | np.ndarray) -> Metrics:
    """``reward``, and ``win_rate`` against the initial model's completion of the same prompt, with intervals by prompt.

    ``win_rate = mean_prompts 1[r > r_start] + 1[r = r_start] / 2``: one half is no gain; ``win_rate/ties``: the share of ties.

    Args:
        rewards, start: (prompts,), one completion each; NaN if the reward does not apply to it.

    Raises:
        ValueError: the shapes differ.
        RewardError: every reward is NaN.
    """
    policy, initial = np.asarray(rewards, dtype=np.float64), np.asarray(start, dtype=np.float64)
    if policy.shape != initial.shape:
        raise ValueError(f"rewards of the same prompts are wanted, not {policy.shape} and {initial.shape}")
    applies = np.isfinite(policy) & np.isfinite(initial)  # NaN: the reward does not apply to the completion
    wins = (policy > initial) + 0.5 * (policy == initial)
    win_rate = (
        share_ci(wins[applies], draws=DRAWS).named("win_rate")
        | {"win_rate/ties": float((policy == initial)[applies].mean())}
        if applies.any()
        else {}
    )
    return reward_figures(policy) | win_rate


def reward_figures(rewards: np.ndarray) -> Metrics:
    """``reward`` with its interval by prompt, over the prompts with a reward; ``reward/none``: the share of prompts without one.

    Raises:
        RewardError: no prompt has a reward.
    """
    applies = np.isfinite(rewards)
    if not applies.any():
        what = f"gives no value for any of the {counted(len(rewards), 'held-out completion')}"
        raise RewardError("reward", what, "hold out rows that it applies to (data.eval_path), or none")
    missing = {} if applies.all() else {"reward/none": 1.0 - float(applies.mean())}
    return bootstrap_ci(rewards[applies], draws=DRAWS).named("reward") | missing


# ---- the initial model's completions ----


def completion_rows(completions: Completions, tokenizer: Any) -> list[dict[str, Any]]:
    """Scored completions, one per prompt, as rows for the file."""
    prompts = [tokenizer.decode(tree.prompt_ids.tolist(), skip_special_tokens=True) for tree in completions.trees]
    numbered = enumerate(zip(prompts, completions.texts, strict=True))
    return [{"prompt": prompt, "completion": text, **completions.row(i)} for i, (prompt, text) in numbered]


def save_start(path: Path, settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Save the initial model's completions and rewards atomically, so that a resumed run compares against the same ones."""
    write_summed(path, json.dumps({"asked": settings, "completions": list(rows)}, indent=1, ensure_ascii=False))


def load_start_rewards(path: Path, settings: dict[str, Any]) -> np.ndarray | None:
    """Return the rewards of the initial model's completions, (prompts,); None if missing, damaged, or made with other settings."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not is_intact(path) or saved["asked"] != json.loads(json.dumps(settings)):
            return None
        return np.array([row["reward"] for row in saved["completions"]], dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- Evaluation of online methods on held-out prompts: reward of fresh completions, and KL from the initial model ----

EVALUATION_ITERATION = 2**40  # an iteration number that training never reaches, so its sampling seed is never shared


def evaluate_online(
    writer: Any,
    scorer: Scorer,
    start: LiveReference,
    prompts: Sequence[TokenTree],
    tokens_per_step: int,
    *,
    rewards_of_start: Callable[[np.ndarray], np.ndarray | None] = lambda _: None,
) -> dict[str, Any]:
    """Mean reward of one completion per held-out prompt, with its 95% interval by prompt, and KL(policy || start) on these completions.

    Args:
        writer: samples completions and scores them, the `Writer` of `algorithms/rollouts.py`.
        rewards_of_start: returns the rewards of the initial model's completions of the same prompts, (prompts,), given the policy's own
            rewards (the same at the start), or None if they are unknown.

    Returns:
        ``eval/reward``, ``eval/win_rate`` against the start (ties half), ``eval/kl/policy_ref`` and ``eval/kl/k3``, with ``/ci``;
        ``eval/rewards/NAME/...`` of each reward in a sum; ``eval/completions/length``, ``eval/completions/ended``, ``eval/rows``.
        ``eval/loss`` is minus the reward, so that the best checkpoint has the highest reward. Rewards that compare completions of a
        prompt with each other give none of reward, win rate and loss.
    """
    groups = writer.write(prompts, EVALUATION_ITERATION, 1)
    rewards = np.array([float(g.rewards[0]) for g in groups])
    trees = [g.tree for g in groups]
    k1, k3 = kl_by_completion(LiveReference(scorer), start, trees, tokens_per_step=tokens_per_step)
    # a reward that compares completions needs more than one per prompt
    reward_metrics = {} if writer.reward.compares else reward_figures(rewards)
    metrics: dict[str, Any] = {"eval/loss": -float(reward_metrics["reward"])} if reward_metrics else {}
    metrics |= {"eval/rows": len(trees)} | {f"eval/{name}": value for name, value in reward_metrics.items()}
    for name, values in {"kl/policy_ref": k1, "kl/k3": k3}.items():
        metrics |= bootstrap_ci(values, draws=DRAWS).named(f"eval/{name}")
    for name in groups[0].terms:
        values = np.array([float(g.terms[name][0]) for g in groups])
        if (applies := np.isfinite(values)).any():
            metrics |= bootstrap_ci(values[applies], draws=DRAWS).named(f"eval/rewards/{name}/mean")
            metrics[f"eval/rewards/{name}/std"] = float(values[applies].std(ddof=min(1, applies.sum() - 1)))
        if not applies.all():
            metrics[f"eval/rewards/{name}/none"] = 1.0 - float(applies.mean())
    start_rewards = rewards_of_start(rewards) if reward_metrics else None
    if start_rewards is not None:
        gains = gain_figures(rewards, start_rewards)
        metrics |= {f"eval/{name}": value for name, value in gains.items() if name.startswith("win_rate")}
    metrics["eval/completions/length"] = float(np.mean([t.trained[0] for t in trees]))
    metrics["eval/completions/ended"] = float(np.mean([not t.truncated[0] for t in trees]))
    return metrics

"""Figures of what a model wrote itself: rewards, length, variety, repetition, and how far it went from a reference on the way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from penchant.evaluation.figures import Figure, mean_of, ratio_of, share_of
from penchant.evaluation.given_answers import completion_sums, kl_figures
from penchant.evaluation.text import distinct_n, distinct_n_interval, repetition
from penchant.evaluation.token_scores import TokenScores
from penchant.evaluation.written import Written
from penchant.losses.divergences import kl_estimate

REPEATED = 4  # length of the grams that count as repeated


def text_of_written(written: Written, also: Mapping[str, np.ndarray]) -> list[Figure]:
    """Rewards, length, share ended by EOS, distinct-1 and -2, and repetition, with intervals by prompt.

    Args:
        also: other rewards of every completion, by name.
    """
    prompts = written.prompts
    found = []
    if written.rewards is not None:
        found.append(mean_of("generated/reward", written.rewards, prompts))
    found += [mean_of(f"generated/reward[{name}]", values, prompts) for name, values in also.items()]
    found.append(mean_of("generated/length", [len(ids) for ids in written.ids], prompts))
    found.append(share_of("generated/ended", written.ended, prompts))
    for n in (1, 2):
        interval = distinct_n_interval(written.ids, prompts.tolist(), n)
        span = None if interval is None else (interval.low, interval.high)
        found.append(Figure(f"generated/distinct_{n}", distinct_n(written.ids, n), span, len(written.ids)))
    shares = [repetition(ids, REPEATED) for ids in written.ids]
    long = [(share, prompt) for share, prompt in zip(shares, prompts.tolist(), strict=True) if share is not None]
    if long:
        found.append(mean_of("generated/repetition", [s for s, _ in long], [p for _, p in long]))
    return found


def kl_of_written(scores: TokenScores, written: Written, *, sampled: bool) -> list[Figure]:
    """KL from a reference on own completions.

    With ``d_t = log policy(y_t) - log reference(y_t)``: ``k1 = sum_t d_t`` a completion, ``k3 = exp(-d_t) - 1 + d_t`` a token, both
    unbiased where the completions were drawn at temperature 1. The exact KL at every token, summed over a completion, estimates the same
    as k1 with a variance that is never larger.

    Args:
        scores: of the completions, with a reference; sampled: also k1 and k3.

    Papers: Schulman, "Approximating KL divergence" (2020); arXiv 2504.10637.
    """
    assert scores.reference is not None
    lengths = np.array([len(ids) for ids in written.ids])
    found = []
    if sampled:
        policy, reference = torch.from_numpy(scores.policy), torch.from_numpy(scores.reference)
        k1, k3 = kl_estimate(policy, reference, "k1").numpy(), kl_estimate(policy, reference, "k3").numpy()
        found.append(mean_of("generated/kl/k1", completion_sums(k1, lengths), written.prompts))
        found.append(ratio_of("generated/kl/k3", completion_sums(k3, lengths), lengths, written.prompts))
    return found + kl_figures("generated/kl", scores, lengths, written.prompts)

"""What every logged metric means, in one line."""

from __future__ import annotations

GLOSSARY = {
    "loss": "mean of the loss over examples (over tokens for SFT)",
    "nll": "negative log-likelihood per completion token, nats",
    "perplexity": "exp of the negative log-likelihood per token",
    "rewards/chosen": "the loss's own reward of the chosen completion; for DPO beta x (policy - reference) log-prob, nats; of a reward model its score",
    "rewards/rejected": "the same of the rejected completion",
    "rewards/margins": "rewards/chosen - rewards/rejected",
    "rewards/accuracies": "share of pairs whose chosen reward is higher; a tie counts half",
    "logps/chosen": "summed log-prob of the chosen completion under the policy, nats",
    "logps/rejected": "the same of the rejected completion",
    "logps/accuracies": "share of pairs that the policy alone ranks right by summed log-prob",
    "logratios/chosen": "policy - reference summed log-prob of the chosen completion, nats",
    "logratios/rejected": "the same of the rejected completion",
    "logps/per_token": "mean log-prob per completion token, nats",
    "loss/main": "the first loss of a mix; PMPO's accepted side",
    "loss/negative": "PMPO's rejected side: (1 - alpha) times the mean log-prob of rejected answers",
    "loss/divergence": "beta times the divergence",
    "loss/nll": "nll_weight times the chosen answers' negative log-likelihood per token",
    "divergence": "exact divergence from the reference over the vocabulary, nats per completion token",
    "weights": "WPO's weight of a pair: how likely the policy would have written both answers",
    "lambda": "DPO-Shift's weight of the rejected log-ratio at this step",
    "kl/z0": "KTO's reference point: mean log-ratio of mismatched completions, nats, at least 0",
    "delta": "BCO's shift: the running mean of rewards",
    "rewards/centring": "centring times the square of chosen + rejected reward",
    "calibration/ece": "expected calibration error of sigmoid(margin): mean distance of confidence and share right, 10 bins of equal counts",
    "calibration/brier": "mean squared distance of confidence and being right, 0 to 1",
    "length/longer_wins": "accuracy of the rule that the longer answer is the better one",
    **{f"length/q{q}/accuracy": f"accuracy in quartile {q} of chosen - rejected length" for q in (1, 2, 3, 4)},
    "length/agreement": "share of pairs in which the longer answer is preferred; equal lengths count half",
    "length/controlled_accuracy": "accuracy at equal length, by a logistic in the length gap",
    "perplexity/chosen": "perplexity of held-out chosen answers: exp of minus their log-prob per token",
    "perplexity_ratio/chosen": "the same divided by the reference's: 1 is no change",
    "win_rate": "share of prompts whose completion has a higher reward than the start's, ties half: one half is no gain",
    "completions/distinct_2": "share of pairs of neighbouring tokens that are different, over all completions together",
    "kl/policy_ref": "sampled KL(policy || start) per completion, nats",
    "kl/per_token": "the same per token, by the k3 estimator, which is never negative",
    "kl/completions": "sampled completions that the KL is a mean over",
    "reward": "mean reward of the rollouts (of fresh completions of held-out prompts)",
    "reward/std": "spread of rewards within a prompt's completions",
    "kl/old_new": "k3 of the policy that wrote and the policy that is trained, nats per token",
    "ratio": "mean probability ratio of the trained to the writing policy",
    "clip_fraction": "share of tokens where the ratio's clip bound",
    "value/error": "squared error of the value against the return",
    "value/mean": "mean value of the tokens",
    "value/clip_fraction": "share of tokens where the value's clip bound",
    "entropy/sampled": "minus the log-prob of the sampled tokens, nats",
    "completions/length": "tokens of a completion",
    "completions/ended": "share of completions that ended with EOS",
    "beta": "weight of the KL penalty",
    "pairs": "pairs of online DPO: prompts whose completions differ in reward",
    "loss/value": "PPO's loss of the value model",
    "loss/sft": "the SFT part of a mix (so of each part: loss/NAME); sft/nll is a figure of that part",
    "epoch": "passes over the training data so far",
    "lr": "learning rate of the step",
    "grad_norm": "L2 norm of the gradient before clipping",
    "tokens": "tokens computed so far; a shared prompt counts once",
    "rows": "held-out rows that the figures are means over",
}


def meaning(name: str) -> str:
    """The definition of a metric, with or without its ``eval/`` prefix; empty when unknown."""
    return GLOSSARY.get(name.removeprefix("eval/"), "")


SPEED = {
    "seconds": "wall time of the optimiser step",
    "tokens_per_second": "tokens computed in the step, a shared prompt once, over its seconds",
    "trees_per_second": "rows (prompts with their completions) of the step over its seconds",
    "peak_memory_gb": "the most memory that the process, or on a GPU its tensors there, has had so far, GiB",
}


def markdown() -> str:
    """Every metric as a table of docs/trackers.md: its name in metrics.jsonl, what trackers call it, what it is."""
    rows = [f"| `{n}` | `train/{n}`, `eval/{n}` | {m} |".replace("||", "\\|\\|") for n, m in GLOSSARY.items()]
    rows += [f"| `{n}` (perf.jsonl) | `perf/{n}` | {m} |" for n, m in SPEED.items()]
    return "\n".join(["| logged as | in trackers | what it is |", "|---|---|---|", *rows])

"""The metrics that the report shows."""

from __future__ import annotations

from dataclasses import dataclass

# ---- Which logged figures are drawn together, what they are called and in which unit ----


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of held-out evaluations.

    Args:
        name: as logged, without ``eval/``; label: in words; unit: "" where it has none; share: shown in percent.
        null: the value at which nothing was learned (one half, zero), None where there is none; up: whether more of it is better,
            None where that cannot be said.
    """

    name: str
    label: str
    unit: str = ""
    share: bool = False
    null: float | None = None
    up: bool | None = None


HELD_OUT = (
    Figure("win_rate", "win rate against the start", share=True, null=0.5, up=True),
    Figure("reward", "reward of fresh completions", up=True),
    Figure("rewards/accuracies", "preference accuracy", share=True, null=0.5, up=True),
    Figure("rewards/margins", "reward margin, chosen \u2212 rejected", null=0.0, up=True),
    Figure("loss", "loss", up=False),
    Figure("kl/policy_ref", "KL to the start", "nats per completion"),
    Figure("kl/per_token", "KL to the start", "nats per token"),
    Figure("perplexity", "perplexity", up=False),
    Figure("rewards/chosen", "reward of chosen answers"),
    Figure("rewards/rejected", "reward of rejected answers"),
    Figure("logps/chosen", "log-prob of chosen answers", "nats"),
    Figure("logps/rejected", "log-prob of rejected answers", "nats"),
    Figure("logps/accuracies", "accuracy by log-prob alone", share=True),
    Figure("calibration/ece", "calibration error", up=False),
    Figure("calibration/brier", "Brier score", up=False),
    Figure("length/longer_wins", "accuracy of \u201cthe longer answer wins\u201d", share=True),
    Figure("completions/length", "length of completions", "tokens"),
    Figure("completions/ended", "completions that ended with EOS", share=True),
    Figure("completions/distinct_2", "distinct-2"),
)
BY_NAME = {f.name: f for f in HELD_OUT}


@dataclass(frozen=True, slots=True)
class Panel:
    """A plot of the curves section.

    Args:
        lines: (metric as logged, label); `log` allows a log axis where values span more than two decades; main: among those that
            stand open when many runs are drawn.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    share: bool = False
    log: bool = False
    main: bool = True


PANELS = (
    Panel("Loss", "", (("loss", "train"), ("eval/loss", "held out"))),
    Panel(
        "Preference accuracy",
        "%",
        (("rewards/accuracies", "train"), ("eval/rewards/accuracies", "held out")),
        share=True,
    ),
    Panel(
        "Reward margin", "chosen \u2212 rejected", (("rewards/margins", "train"), ("eval/rewards/margins", "held out"))
    ),
    Panel("Reward of completions", "", (("reward", "train"), ("eval/reward", "held out"))),
    Panel("Win rate against the start", "%", (("eval/win_rate", "held out"),), share=True),
    Panel("KL to the start", "nats per completion", (("kl/policy_ref", "train"), ("eval/kl/policy_ref", "held out"))),
    Panel("Perplexity", "", (("perplexity", "train"), ("eval/perplexity", "held out")), log=True),
    Panel("Rewards, held out", "", (("eval/rewards/chosen", "chosen"), ("eval/rewards/rejected", "rejected"))),
    Panel("Rewards in training", "", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")), main=False),
    Panel(
        "Log-probs, held out", "nats per answer", (("eval/logps/chosen", "chosen"), ("eval/logps/rejected", "rejected"))
    ),
    Panel(
        "Shift from the reference, held out",
        "nats per answer",
        (("eval/logratios/chosen", "chosen"), ("eval/logratios/rejected", "rejected")),
    ),
    Panel("Log-prob in training", "nats per token", (("logps/per_token", "train"),), main=False),
    Panel("Divergence", "nats per token", (("divergence", "train"), ("eval/divergence", "held out"))),
    Panel(
        "Length of completions", "tokens", (("completions/length", "train"), ("eval/completions/length", "held out"))
    ),
    Panel(
        "Completions that ended",
        "%",
        (("completions/ended", "train"), ("eval/completions/ended", "held out")),
        share=True,
        main=False,
    ),
    Panel("Spread of rewards", "within a prompt", (("reward/std", "train"),), main=False),
    Panel(
        "Clipped tokens", "%", (("clip_fraction", "train"), ("value/clip_fraction", "value")), share=True, main=False
    ),
    Panel("Value error", "", (("value/error", "train"),), log=True, main=False),
    Panel("Entropy", "nats per token", (("entropy/sampled", "train"),), main=False),
    Panel("Scheduled \u03bb", "", (("lambda", "\u03bb"),), main=False),
    Panel("Scheduled \u03b2", "", (("beta", "\u03b2"),), main=False),
    Panel("Learning rate", "", (("lr", "learning rate"),), main=False),
    Panel("Gradient norm", "before clipping", (("grad_norm", "train"),), log=True, main=False),
)


# ---- What every logged metric means, in one line ----

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
    "completions/distinct_2": "share of pairs of neighboring tokens that are different, over all completions together",
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
    "seconds": "wall time of the optimizer step",
    "tokens_per_second": "tokens computed in the step, a shared prompt once, over its seconds",
    "trees_per_second": "rows (prompts with their completions) of the step over its seconds",
    "peak_memory_gb": "the most memory that the process, or on a GPU its tensors there, has had so far, GiB",
}


def markdown() -> str:
    """Every metric as a table of docs/trackers.md: its name in metrics.jsonl, what trackers call it, what it is."""
    rows = [f"| `{n}` | `train/{n}`, `eval/{n}` | {m} |".replace("||", "\\|\\|") for n, m in GLOSSARY.items()]
    rows += [f"| `{n}` (perf.jsonl) | `perf/{n}` | {m} |" for n, m in SPEED.items()]
    return "\n".join(["| logged as | in trackers | what it is |", "|---|---|---|", *rows])

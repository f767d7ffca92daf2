"""Which logged figures are drawn together, what they are called and in which unit."""

from __future__ import annotations

from dataclasses import dataclass


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

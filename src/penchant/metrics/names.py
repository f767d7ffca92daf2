"""Every metric once: what it is, its formula, its unit, what it is over, which way is better, and its value where nothing was learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

# a cost is what a gain is paid with: less of it is better, but only at the same gain
Better = Literal["higher", "lower", "cost"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Args:
        name: as logged, without ``eval/``; meaning: a sentence; formula: with pi the policy, ref the reference, y_w and y_l the chosen and the
            rejected answer; over: what its ``/n`` counts where `penchant eval` measures it, "" elsewhere.
        label: in words, for the held-out table of the report, "" where it does not stand there; unit: "" where it has none.
        better: which way, None where that cannot be said; null: its value where nothing was learned (one half, zero), None where there is none.
        share: a share of rows, shown in percent; main: what a run is judged by; logged: whether runs log it; else only `penchant eval` has it.
    """

    name: str
    meaning: str
    formula: str = ""
    over: str = ""
    label: str = ""
    unit: str = ""
    better: Better | None = None
    null: float | None = None
    share: bool = False
    main: bool = False
    logged: bool = True

    @property
    def title(self) -> str:
        """What it is called beside its figures."""
        return self.label or self.name


def _kl(name: str, where: str) -> Iterable[Metric]:
    """The exact KL both ways round, summed over a completion and per token."""
    ways = (
        ("policy_ref", "KL(policy || reference)", "pi", "ref"),
        ("ref_policy", "KL(reference || policy)", "ref", "pi"),
    )
    for way, shown, p, q in ways:
        formula = f"sum_t sum_v {p}(v) (log {p}(v) - log {q}(v))"
        meaning = f"exact {shown} over the whole vocabulary at every token of {where}, summed over a completion, nats"
        per_token = f"the same per token: exact {shown}, nats"
        yield Metric(f"{name}/{way}", meaning, formula, "completions", better="cost", logged=False)
        yield Metric(
            f"{name}/{way}_per_token", per_token, f"({formula}) / tokens", "completions", better="cost", logged=False
        )


REWARD = "judged by --reward"
PERPLEXITY, RATIO = "exp(-sum log pi / tokens)", "exp((sum log ref - sum log pi) / tokens)"
IMPLICIT = "beta (log pi(y | x) - log ref(y | x))"

_ALL: tuple[Metric, ...] = (
    # what a run is judged by
    Metric("win_rate",
           "share of prompts whose completion has a higher reward than the start's, ties half: one half is no gain",
           label="win rate against the start", better="higher", null=0.5, share=True, main=True),
    Metric("reward", "mean reward of the rollouts (of fresh completions of held-out prompts)",
           label="reward of fresh completions", better="higher", main=True),
    Metric("rewards/accuracies",
           "share of pairs whose chosen answer has the higher reward by the loss's own definition; a tie counts half",
           "1[r(y_w) > r(y_l)]", label="preference accuracy", better="higher", null=0.5, share=True, main=True),
    Metric("rewards/margins", "rewards/chosen - rewards/rejected", "r(y_w) - r(y_l)",
           label="reward margin, chosen \u2212 rejected", better="higher", null=0.0),
    Metric("loss", "mean of the loss over examples (over tokens for SFT)", label="loss", better="lower", main=True),
    Metric("kl/policy_ref", "sampled KL(policy || start) per completion, nats", label="KL to the start",
           unit="nats per completion", better="cost"),
    Metric("kl/per_token", "the same per token, by the k3 estimator, which is never negative", label="KL to the start",
           unit="nats per token", better="cost"),
    Metric("kl/completions", "sampled completions that the KL is a mean over"),
    Metric("perplexity", "exp of the negative log-likelihood per token", label="perplexity", better="lower", main=True),
    Metric("nll", "negative log-likelihood per completion token, nats", better="lower"),
    # the loss's own reward
    Metric("rewards/chosen",
           "the loss's own reward of the chosen completion; for DPO beta x (policy - reference) log-prob, nats; of a reward model its score",
           label="reward of chosen answers"),
    Metric("rewards/rejected", "the same of the rejected completion", label="reward of rejected answers"),
    # given answers
    Metric("logps/chosen", "summed log-prob of the chosen completion under the policy, nats", "log pi(y | x)",
           "answers", label="log-prob of chosen answers", unit="nats"),
    Metric("logps/rejected", "the same of the rejected completion", "log pi(y | x)", "answers",
           label="log-prob of rejected answers", unit="nats"),
    Metric("logps/accuracies", "share of pairs that the policy alone ranks right by summed log-prob",
           "1[log pi(y_w) > log pi(y_l)]", "pairs", label="accuracy by log-prob alone", better="higher", share=True),
    Metric("logratios/chosen", "policy - reference summed log-prob of the chosen completion, nats",
           "log pi(y | x) - log ref(y | x)", "answers"),
    Metric("logratios/rejected", "the same of the rejected completion", "log pi(y | x) - log ref(y | x)", "answers"),
    Metric("implicit_reward/chosen",
           "implicit reward of the chosen completion, whatever the loss was: beta x (policy - reference) log-prob",
           IMPLICIT, "answers", logged=False),
    Metric("implicit_reward/rejected", "the same of the rejected completion", IMPLICIT, "answers", logged=False),
    Metric("implicit_reward/margins", "implicit_reward/chosen - implicit_reward/rejected", "r(y_w) - r(y_l)", "pairs",
           better="higher", null=0.0, logged=False),
    Metric("implicit_reward/accuracies",
           "share of pairs whose chosen answer gained more log-prob over the reference than the rejected one; a tie counts half",
           "1[r(y_w) > r(y_l)]", "pairs", better="higher", null=0.5, share=True, logged=False),
    Metric("perplexity/chosen", "perplexity of held-out chosen answers: exp of minus their log-prob per token",
           PERPLEXITY, "answers", better="lower"),
    Metric("perplexity/rejected", "the same of rejected answers", PERPLEXITY, "answers", logged=False),
    Metric("perplexity_ratio/chosen", "perplexity of chosen answers divided by the reference's: 1 is no change", RATIO,
           "answers", better="lower"),
    Metric("perplexity_ratio/rejected", "the same of rejected answers", RATIO, "answers", logged=False),
    Metric("ref_logps/chosen", "summed log-prob of the chosen completion under the reference, nats", "log ref(y | x)",
           "answers", logged=False),
    Metric("ref_logps/rejected", "the same of the rejected completion", "log ref(y | x)", "answers", logged=False),
    *_kl("answers/kl", "the given answers"),
    Metric("logps/per_token", "mean log-prob per completion token, nats", unit="nats per token"),
    # what a reward model is worth, and what length has to do with it
    Metric("calibration/ece",
           "expected calibration error of sigmoid(margin): mean distance of confidence and share right, 10 bins of equal counts",
           label="calibration error", better="lower"),
    Metric("calibration/brier", "mean squared distance of confidence and being right, 0 to 1", label="Brier score",
           better="lower"),
    Metric("length/longer_wins", "accuracy of the rule that the longer answer is the better one",
           label="accuracy of \u201cthe longer answer wins\u201d", share=True),
    *(
        Metric(f"length/q{q}/accuracy", f"accuracy in quartile {q} of chosen - rejected length", better="higher", share=True)
        for q in (1, 2, 3, 4)
    ),
    Metric("length/agreement", "share of pairs in which the longer answer is preferred; equal lengths count half",
           share=True),
    Metric("length/controlled_accuracy", "accuracy at equal length, by a logistic in the length gap", better="higher",
           share=True),
    # what the policy writes
    Metric("completions/length", "tokens of a completion", label="length of completions", unit="tokens"),
    Metric("completions/ended", "share of completions that ended with EOS", label="completions that ended with EOS",
           share=True),
    Metric("completions/distinct_2",
           "share of pairs of neighboring tokens that are different, over all completions together",
           label="distinct-2"),
    # parts and settings of losses
    Metric("loss/main", "the first loss of a mix; PMPO's accepted side", better="lower"),
    Metric("loss/negative", "PMPO's rejected side: (1 - alpha) times the mean log-prob of rejected answers",
           better="lower"),
    Metric("loss/divergence", "beta times the divergence", better="lower"),
    Metric("loss/nll", "nll_weight times the chosen answers' negative log-likelihood per token", better="lower"),
    Metric("loss/value", "PPO's loss of the value model", better="lower"),
    Metric("loss/sft", "the SFT part of a mix (so of each part: loss/NAME); sft/nll is a figure of that part",
           better="lower"),
    Metric("divergence", "exact divergence from the reference over the vocabulary, nats per completion token",
           unit="nats per token", better="cost"),
    Metric("weights", "WPO's weight of a pair: how likely the policy would have written both answers"),
    Metric("lambda", "DPO-Shift's weight of the rejected log-ratio at this step"),
    Metric("beta", "weight of the KL penalty"),
    Metric("kl/z0", "KTO's reference point: mean log-ratio of mismatched completions, nats, at least 0"),
    Metric("delta", "BCO's shift: the running mean of rewards"),
    Metric("rewards/centring", "centring times the square of chosen + rejected reward"),
    # online methods
    Metric("reward/std", "spread of rewards within a prompt's completions"),
    Metric("pairs", "pairs of online DPO: prompts whose completions differ in reward"),
    Metric("kl/old_new", "k3 of the policy that wrote and the policy that is trained, nats per token", better="cost"),
    Metric("ratio", "mean probability ratio of the trained to the writing policy"),
    Metric("clip_fraction", "share of tokens where the ratio's clip bound", share=True),
    Metric("value/error", "squared error of the value against the return", better="lower"),
    Metric("value/mean", "mean value of the tokens"),
    Metric("value/clip_fraction", "share of tokens where the value's clip bound", share=True),
    Metric("entropy/sampled", "minus the log-prob of the sampled tokens, nats", unit="nats per token"),
    # the run
    Metric("epoch", "passes over the training data so far"),
    Metric("lr", "learning rate of the step"),
    Metric("grad_norm", "L2 norm of the gradient before clipping"),
    Metric("tokens", "tokens computed so far; a shared prompt counts once"),
    Metric("rows", "held-out rows that the figures are means over"),
    # given text
    Metric("text/perplexity", "perplexity per token of the given text", PERPLEXITY, "documents", better="lower",
           logged=False),
    Metric("text/bits_per_byte", "bits per byte (UTF-8) of the given text: comparable between tokenizers",
           "-sum log2 pi / bytes", "documents", better="lower", logged=False),
    Metric("text/ref_perplexity", "the reference's perplexity", "exp(-sum log ref / tokens)", "documents", logged=False),
    Metric("text/perplexity_ratio", "perplexity divided by the reference's", RATIO, "documents", better="lower",
           logged=False),
    # own completions
    Metric("generated/reward", f"mean reward of the model's completions, {REWARD}", "mean r(x, y)", "completions",
           better="higher", logged=False),
    Metric("generated/length", "tokens of a completion, EOS counted", "mean |y|", "completions", logged=False),
    Metric("generated/ended", "share of completions that ended with EOS", "mean 1[ended]", "completions", share=True,
           logged=False),
    Metric("generated/distinct_1",
           "share of tokens that are different, over all completions; it falls with their number", "unique / all",
           "completions", logged=False),
    Metric("generated/distinct_2", "the same of pairs of tokens", "unique / all", "completions", logged=False),
    Metric("generated/repetition",
           "share of a completion's 4-grams that occurred before in it; completions of fewer than 4 tokens have none",
           "mean (1 - unique / all)", "completions", logged=False),
    Metric("generated/bleu", "corpus BLEU against the answers in the data, 0 to 100 (sacrebleu)",
           "BP exp(mean_n log p_n)", "completions", better="higher", logged=False),
    *(
        Metric(f"generated/{name}", meaning, "2 P R / (P + R)", "completions", better="higher", logged=False)
        for name, meaning in (
            ("rouge_1", "ROUGE-1 F1 against the answers in the data, 0 to 1 (rouge-score)"),
            ("rouge_2", "the same of pairs of words"),
            ("rouge_L", "the same of the longest common subsequence of words"),
        )
    ),
    Metric("generated/kl/k1", "sampled KL(policy || reference), nats a completion: unbiased, may be negative",
           "sum_t d_t, d_t = log pi(y_t) - log ref(y_t)", "completions", better="cost", logged=False),
    Metric("generated/kl/k3", "the same per token by the k3 estimator, never negative", "mean_t exp(-d_t) - 1 + d_t",
           "completions", better="cost", logged=False),
    *_kl("generated/kl", "the model's own completions"),
)  # fmt: skip
METRICS: Mapping[str, Metric] = {m.name: m for m in _ALL}
OTHER_REWARD = Metric(
    "generated/reward[NAME]",
    "mean of another reward (--also) of the same completions",
    "mean r(x, y)",
    "completions",
    logged=False,
)
SPEED = (
    Metric("seconds", "wall time of the optimizer step"),
    Metric("tokens_per_second", "tokens computed in the step, a shared prompt once, over its seconds"),
    Metric("trees_per_second", "rows (prompts with their completions) of the step over its seconds"),
    Metric("peak_memory_gb", "the most memory that the process, or on a GPU its tensors there, has had so far, GiB"),
)


def metric(name: str) -> Metric:
    """A metric by its name, with or without ``eval/``; of a part of a mixed loss, ``PART/NAME``, it is NAME's.

    One that nobody knows (of a person's own loss) has a name and no meaning.
    """
    short = name.removeprefix("eval/")
    if short in METRICS:
        return METRICS[short]
    if short.startswith("generated/reward["):
        return replace(OTHER_REWARD, name=short)
    part, _, rest = short.partition("/")
    found = METRICS["loss/sft"] if part == "loss" else METRICS.get(rest, Metric("", ""))
    return replace(found, name=short, label="")


def higher_is_better(name: str) -> bool:
    """Which way a figure is sorted; higher where nothing is known of it."""
    return metric(name).better in ("higher", None)


def of_evaluation(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of evaluations.jsonl under today's names.

    An evaluation on asked rows (whose settings say its beta) used to call ``implicit_reward/*`` ``rewards/*``, the name of the loss's own reward.
    """
    what = line.get("what")
    if not isinstance(what, Mapping) or "beta" not in what:
        return dict(line)
    named = {
        part: {str(k).replace("eval/rewards/", "eval/implicit_reward/"): v for k, v in values.items()}
        for part in ("metrics", "n")
        if isinstance(values := line.get(part), Mapping)
    }
    return {**line, **named}


# ---------------------------------------------------------------------------------------------------------------------
# pages


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def eval_page(prefix: str = "") -> str:
    """What `penchant eval` measures, as a table of docs/eval.md; of the figures whose names start so."""
    rows = [
        f"| `eval/{m.name}` | {_cell(m.meaning)} | `{_cell(m.formula)}` | {m.over} |"
        for m in METRICS.values()
        if m.over and m.name.startswith(prefix)
    ]
    return "\n".join(["| figure | what it is | formula | n counts |", "|---|---|---|---|", *rows])


def trackers_page() -> str:
    """What runs log, as a table of docs/trackers.md: its name in metrics.jsonl, what trackers call it, what it is."""
    logged = [m for m in METRICS.values() if m.logged]
    rows = [f"| `{m.name}` | `train/{m.name}`, `eval/{m.name}` | {_cell(m.meaning)} |" for m in logged]
    rows += [f"| `{m.name}` (perf.jsonl) | `perf/{m.name}` | {m.meaning} |" for m in SPEED]
    return "\n".join(["| logged as | in trackers | what it is |", "|---|---|---|", *rows])

"""What every figure of `penchant eval` is: a sentence, its formula, and what its n counts. docs/eval.md shows the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Meaning:
    """A figure's sentence, its formula, and what it is a figure over."""

    sentence: str
    formula: str
    over: str


REWARD = "judged by --reward"
WAYS = {"policy_ref": "KL(policy || reference)", "ref_policy": "KL(reference || policy)"}


def _kl(where: str) -> dict[str, Meaning]:
    found = {}
    for way, shown in WAYS.items():
        p, q = ("pi", "ref") if way == "policy_ref" else ("ref", "pi")
        formula = f"sum_t sum_v {p}(v) (log {p}(v) - log {q}(v))"
        found[way] = Meaning(
            f"exact {shown} over the whole vocabulary at every token of {where}, summed over a completion, nats",
            formula,
            "completions",
        )
        found[f"{way}_per_token"] = Meaning(
            f"the same per token: exact {shown}, nats", f"({formula}) / tokens", "completions"
        )
    return found


def _sides(name: str, chosen: str, formula: str) -> dict[str, Meaning]:
    return {
        f"{name}/chosen": Meaning(f"{chosen} of the chosen answer", formula, "answers"),
        f"{name}/rejected": Meaning("the same of the rejected answer", formula, "answers"),
    }


GLOSSARY: Mapping[str, Meaning] = {
    # given answers
    **_sides("logps", "summed log-prob, nats,", "log pi(y | x)"),
    "logps/accuracies": Meaning(
        "share of pairs whose chosen answer has the higher summed log-prob, a tie counts half",
        "1[log pi(y_w) > log pi(y_l)]",
        "pairs",
    ),
    **_sides("perplexity", "perplexity per token", "exp(-sum log pi / tokens)"),
    **_sides("perplexity_ratio", "perplexity divided by the reference's", "exp((sum log ref - sum log pi) / tokens)"),
    **_sides("ref_logps", "summed log-prob under the reference, nats,", "log ref(y | x)"),
    **_sides("logratios", "log-prob minus the reference's, nats,", "log pi(y | x) - log ref(y | x)"),
    **_sides("rewards", "implicit reward", "beta (log pi(y | x) - log ref(y | x))"),
    "rewards/margins": Meaning(
        "implicit reward of the chosen answer minus that of the rejected one", "r(y_w) - r(y_l)", "pairs"
    ),
    "rewards/accuracies": Meaning(
        "preference accuracy: share of pairs whose chosen answer gained more over the reference, a tie counts half",
        "1[r(y_w) > r(y_l)]",
        "pairs",
    ),
    **{f"answers/kl/{name}": meaning for name, meaning in _kl("the given answers").items()},
    # given text
    "text/perplexity": Meaning("perplexity per token of the given text", "exp(-sum log pi / tokens)", "documents"),
    "text/bits_per_byte": Meaning(
        "bits per byte (UTF-8) of the given text: comparable between tokenizers", "-sum log2 pi / bytes", "documents"
    ),
    "text/ref_perplexity": Meaning("the reference's perplexity", "exp(-sum log ref / tokens)", "documents"),
    "text/perplexity_ratio": Meaning(
        "perplexity divided by the reference's", "exp((sum log ref - sum log pi) / tokens)", "documents"
    ),
    # own completions
    "generated/reward": Meaning(f"mean reward of the model's completions, {REWARD}", "mean r(x, y)", "completions"),
    "generated/length": Meaning("tokens of a completion, EOS counted", "mean |y|", "completions"),
    "generated/ended": Meaning("share of completions that ended with EOS", "mean 1[ended]", "completions"),
    "generated/distinct_1": Meaning(
        "share of tokens that are different, over all completions; it falls with their number",
        "unique / all",
        "completions",
    ),
    "generated/distinct_2": Meaning("the same of pairs of tokens", "unique / all", "completions"),
    "generated/repetition": Meaning(
        "share of a completion's 4-grams that occurred before in it; completions of fewer than 4 tokens have none",
        "mean (1 - unique / all)",
        "completions",
    ),
    "generated/bleu": Meaning(
        "corpus BLEU against the answers in the data, 0 to 100 (sacrebleu)", "BP exp(mean_n log p_n)", "completions"
    ),
    "generated/rouge_1": Meaning(
        "ROUGE-1 F1 against the answers in the data, 0 to 1 (rouge-score)", "2 P R / (P + R)", "completions"
    ),
    "generated/rouge_2": Meaning("the same of pairs of words", "2 P R / (P + R)", "completions"),
    "generated/rouge_L": Meaning(
        "the same of the longest common subsequence of words", "2 P R / (P + R)", "completions"
    ),
    "generated/kl/k1": Meaning(
        "sampled KL(policy || reference), nats a completion: unbiased, may be negative",
        "sum_t d_t, d_t = log pi(y_t) - log ref(y_t)",
        "completions",
    ),
    "generated/kl/k3": Meaning(
        "the same per token by the k3 estimator, never negative", "mean_t exp(-d_t) - 1 + d_t", "completions"
    ),
    **{f"generated/kl/{name}": meaning for name, meaning in _kl("the model's own completions").items()},
}
OTHER_REWARD = Meaning("mean of another reward (--also) of the same completions", "mean r(x, y)", "completions")


def meaning_of(name: str) -> Meaning | None:
    """What a figure is, with or without its ``eval/`` prefix; None for one that is not of this list."""
    short = name.removeprefix("eval/")
    if short.startswith("generated/reward["):
        return OTHER_REWARD
    return GLOSSARY.get(short)


def markdown(prefix: str = "") -> str:
    """The figures whose names start so, as a table of docs/eval.md."""
    rows = [
        "| `eval/{}` | {} | `{}` | {} |".format(name, *(_cell(v) for v in (m.sentence, m.formula, m.over)))
        for name, m in GLOSSARY.items()
        if name.startswith(prefix)
    ]
    return "\n".join(["| figure | what it is | formula | n counts |", "|---|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

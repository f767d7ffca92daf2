"""Trust flags: each rule fires when it should, at the right step; none fires without cause; false alarm rates are as documented."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.cli import main
from penchant.config import config_from_mapping, load_config
from penchant.errors import CheckpointError
from penchant.flags import (
    RULES,
    TrustConfig,
    comparison_flags,
    compute_flags,
    format_flags,
    markdown,
    run_flags,
    summary,
    write_flags,
)
from penchant.flags.rule import (
    Flag,
    Point,
    RunView,
    critical_t,
    difference,
    first_step_above,
    standard_error,
    window,
)
from penchant.metrics.heldout import length_figures, likelihood_figures

Line = dict[str, Any]


def interval(name: str, values: np.ndarray) -> Line:
    """A metric with the 95% interval that a bootstrap over its rows would give."""
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    return {f"eval/{name}": mean, f"eval/{name}/ci": [mean - half, mean + half]}


def pair_lines(
    rng: np.random.Generator,
    *,
    chosen: Callable[[float], float] = lambda t: 0.0,
    rejected: Callable[[float], float] = lambda t: 0.0,
    kl: Callable[[float], float] = lambda t: 0.0,
    tokens: Callable[[float], float] = lambda t: 30.0,
    wins: Callable[[float], float] = lambda t: 0.5,
    evals: int = 5,
    steps: int = 40,
    rows: int = 200,
    prompts: int = 100,
    beta: float = 0.1,
) -> list[Line]:
    """The metrics.jsonl of a run whose means follow given curves over t in [0, 1], with the noise of rows and batches."""
    lengths = rng.integers(10, 60, (rows, 2)).astype(float)
    own = rng.normal(0.0, 1.5, (rows, 2))  # each row's own offset, the same at every evaluation
    level = -3.0 * lengths[:, 0]
    lines: list[Line] = []
    for k in range(evals):
        t = k / (evals - 1)
        d = np.stack([chosen(t) + own[:, 0], rejected(t) + own[:, 1]], 1) + rng.normal(0, 0.5, (rows, 2))
        d *= float(k > 0)
        margin = beta * (d[:, 0] - d[:, 1])
        right = (margin > 0) + 0.5 * (margin == 0)
        line: Line = {"kind": "eval", "step": round(t * steps), "eval/rows": rows, "eval/kl/completions": prompts}
        for name, values in {
            "loss": np.log1p(np.exp(-margin)),
            "rewards/margins": margin,
            "rewards/accuracies": right,
            "logratios/chosen": d[:, 0],
            "logratios/rejected": d[:, 1],
            "kl/policy_ref": kl(t) + rng.normal(0, 3.0, prompts) * float(k > 0),
            "completions/length": rng.poisson(tokens(t), prompts).astype(float),
            "completions/ended": (rng.random(prompts) < 0.9).astype(float),
            "win_rate": (rng.random(prompts) < wins(t)).astype(float) if k else np.full(prompts, 0.5),
        }.items():
            line |= interval(name, values)
        figures = likelihood_figures(level + d[:, 0], lengths[:, 0], np.arange(rows), level)
        if k == evals - 1:
            figures |= length_figures(right, lengths[:, 0] - lengths[:, 1], np.arange(rows))
        lines.append(line | {f"eval/{n}": v for n, v in figures.items()})
    batches = 16
    for step in range(1, steps + 1):
        t = step / steps
        c, r = chosen(t) + rng.normal(0, 1.5, batches), rejected(t) + rng.normal(0, 1.5, batches)
        c, r = c * float(step > 1), r * float(step > 1)  # the first step's batch is scored by the untrained policy
        lines.append(
            {
                "kind": "train",
                "step": step,
                "loss": float(np.log1p(np.exp(-beta * (c - r))).mean()),
                "rewards/accuracies": float((c > r).mean()),
                "logratios/chosen": float(c.mean()),
                "logratios/rejected": float(r.mean()),
                "grad_norm": 1.0,
            }
        )
    return lines


def warnings(flags: list[Flag]) -> list[str]:
    return [f.name for f in flags if f.level == "warning"]


# ---- no effect ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_where_nothing_happens_hardly_any_run_has_a_warning() -> None:
    """For all rules together; each alone has a false alarm rate of 0.5%."""
    rng = np.random.default_rng(0)
    runs = [pair_lines(rng) for _ in range(80)]
    assert sum(bool(warnings(run_flags(lines))) for lines in runs) / len(runs) <= 0.03
    for lines in runs[:20]:  # without evaluations too
        assert run_flags([m for m in lines if m["kind"] == "train"]) == []


def test_an_untouched_policy_has_no_flag_at_all() -> None:
    rng = np.random.default_rng(0)
    start = [m for m in pair_lines(rng, evals=2) if m["step"] == 0]
    assert run_flags([{**start[0], "step": s} for s in (0, 10, 20, 30)]) == []


def test_rows_that_are_as_they_should_be_have_none() -> None:
    counts = {name: {"count": 5, "of": 100} for name in ("cut_rows", "cut_completions", "cut_prompts", "bad_rows")}
    config = {"data": {"validation_rows": 9}}
    changed = [{"before": "a", "after": "a"}, {"before": "a", "after": "b"}]
    line = {"kind": "eval", "step": 0, "eval/rows": 90, "eval/rewards/accuracies": 0.5, "eval/rewards/ties": 1.0}
    assert run_flags([line], config, {"findings": counts}, samples=changed) == []


def test_a_run_that_goes_well_has_none_either() -> None:
    """Rejected answers fall, chosen ones hardly change, the KL is small, and the policy wins."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        lines = pair_lines(
            rng, chosen=lambda t: -0.4 * t, rejected=lambda t: -6 * t, kl=lambda t: 5 * t, wins=lambda t: 0.5 + 0.25 * t
        )
        assert run_flags(lines) == []


def rate(trial: Callable[[np.random.Generator], bool], trials: int, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    return sum(trial(rng) for _ in range(trials)) / trials


def speaks(name: str, lines: list[Line], config: Line | None = None) -> bool:
    return name in warnings([f for f in run_flags(lines, config) if f.name == name])


def held_out(rng: np.random.Generator, values: dict[str, np.ndarray], step: int, **more: Any) -> Line:
    line: Line = {"kind": "eval", "step": step, **more}
    for name, v in values.items():
        line |= interval(name, v)
    return line


@pytest.mark.parametrize("n", [16, 100])
def test_at_the_threshold_a_held_out_rule_speaks_in_at_most_half_a_percent(n: int) -> None:
    """The true value is exactly at the threshold, the worst case that still counts as no effect."""

    def displaced(rng: np.random.Generator) -> bool:
        chosen = rng.normal(-1.0, 4.0, n)
        line = held_out(rng, {"logratios/chosen": chosen}, 9, **{"eval/rows": n})
        return bool(run_flags([line]) and run_flags([line])[0].name == "likelihood_displacement")

    def far(rng: np.random.Generator) -> bool:
        line = held_out(rng, {"kl/policy_ref": rng.normal(20.0, 5.0, n)}, 9, **{"eval/kl/completions": n})
        return speaks("kl_band", [line])

    def long(rng: np.random.Generator) -> bool:
        more = {"eval/kl/completions": n}
        before = held_out(rng, {"completions/length": rng.normal(40, 10, n)}, 0, **more)
        after = held_out(rng, {"completions/length": rng.normal(50, 12, n)}, 9, **more)
        return speaks("length_growth", [before, after])

    def losing(rng: np.random.Generator) -> bool:
        margins = {"eval/rewards/margins": 1.0, "eval/rewards/margins/ci": [0.9, 1.1], "eval/kl/completions": n}
        start = {"kind": "eval", "step": 0, "eval/rewards/margins": 0.0, "eval/rewards/margins/ci": [0.0, 0.0]}
        line = held_out(rng, {"win_rate": (rng.random(n) < 0.6).astype(float)}, 9, **margins)
        return speaks("margin_without_wins", [start, line])

    for trial in (displaced, far, long, losing):
        assert rate(trial, 400) <= 0.0156, trial.__name__  # 0.5%, and three standard errors of 400 trials


def test_at_the_threshold_training_lines_speak_as_rarely() -> None:
    def displaced(rng: np.random.Generator) -> bool:
        lines = [{"kind": "train", "step": i + 1, "logratios/chosen": float(rng.normal(-1.0, 1.0))} for i in range(40)]
        return bool([f for f in run_flags(lines) if f.name == "likelihood_displacement"])

    assert rate(displaced, 400) <= 0.0156


@pytest.mark.parametrize("own", [0.0, 1.0], ids=["other rows each time", "the same rows"])
def test_a_flat_held_out_loss_is_rarely_called_overfitting(own: float) -> None:
    def trial(rng: np.random.Generator) -> bool:
        rows = rng.normal(0.7, 0.3, 100)
        lines = []
        for k in range(12):
            fresh = rng.normal(0.7, 0.3, 100)
            lines.append(held_out(rng, {"loss": own * rows + (1 - own) * fresh}, 10 * k, **{"eval/rows": 100}))
        return speaks("overfitting", lines)

    assert rate(trial, 300) <= 0.017


def test_an_accuracy_that_has_nothing_to_do_with_length_is_rarely_explained_by_it() -> None:
    def trial(rng: np.random.Generator) -> bool:
        gaps = rng.normal(5.0, 20.0, 150)
        right = (rng.random(150) < 0.65).astype(float)
        line = held_out(rng, {"rewards/accuracies": right}, 9, **{"eval/rows": 150})
        figures = length_figures(right, gaps, np.arange(150))
        return speaks("accuracy_by_length", [line | {f"eval/{k}": v for k, v in figures.items()}])

    assert rate(trial, 50) <= 0.02


def test_a_fair_judge_is_rarely_blamed() -> None:
    def trial(rng: np.random.Generator) -> bool:
        by_prompt = rng.binomial(2, 0.55, 100) / 2
        got = interval("x", by_prompt)
        judge = {"first_position": got["eval/x"], "first_position/ci": got["eval/x/ci"], "asked": 200, "failures": 0}
        flags = comparison_flags({"models": {}, "prompts": 100, "judge": judge})
        return "judge_first_position" in warnings(flags)

    assert rate(trial, 400) <= 0.025  # 1%, at the edge of the band


# ---- every rule fires ---------------------------------------------------------------------------------------------------


def made(**curves: Any) -> list[Line]:
    return pair_lines(np.random.default_rng(7), **curves)


def overfitted() -> list[Line]:
    rng = np.random.default_rng(3)
    means = [0.69, 0.5, 0.45, 0.6, 0.9]
    lines = [
        held_out(rng, {"loss": rng.normal(m, 0.3, 200)}, 10 * k, **{"eval/rows": 200}) for k, m in enumerate(means)
    ]
    return lines + [{"kind": "train", "step": i, "loss": 0.7 - 0.015 * i} for i in range(1, 41)]


def explained_by_length() -> list[Line]:
    rng = np.random.default_rng(4)
    gaps = rng.normal(12.0, 20.0, 300)
    right = (gaps > 0).astype(float)
    line = held_out(rng, {"rewards/accuracies": right}, 9, **{"eval/rows": 300})
    return [line | {f"eval/{k}": v for k, v in length_figures(right, gaps, np.arange(300)).items()}]


LOUD: dict[str, tuple[list[Line], str]] = {
    "margin_without_wins": (
        made(chosen=lambda t: 6 * t, rejected=lambda t: -6 * t, wins=lambda t: 0.42, prompts=400),
        r"margin rose from 0 to 1\.\d+, but completions win against the start's in 4\d% \(99% interval",
    ),
    "likelihood_displacement": (
        made(chosen=lambda t: -8 * t, rejected=lambda t: -9 * t),
        r"From step 10 on .* by [78]\.\d+ nats per completion at step 40 \(99% interval .* per token\. Rejected answers fell by",
    ),
    "overfitting": (
        overfitted(),
        r"^Overfitting starts at step 20: held-out loss got worse from 0\.4\d+ at step 20 to 0\.\d+ at step 40, while",
    ),
    "length_growth": (
        made(tokens=lambda t: 30 + 30 * t),
        r"from 30(\.\d)? tokens at step 0 to (59|60)(\.\d)? at step 40",
    ),
    "kl_band": (made(kl=lambda t: 40 * t), r"is (39|40|41)(\.\d)? nats per completion at step 40 .* since step 30"),
    "perplexity_band": (
        made(chosen=lambda t: -30 * t, rejected=lambda t: -40 * t),
        r"perplexity of chosen answers is 2\.\d+ times the reference's, above trust.perplexity_ratio's 1\.5 since step",
    ),
    "accuracy_by_length": (explained_by_length(), r"at equal length: the longer answer is preferred in 100% of pairs"),
    "not_finite": (
        [{"kind": "train", "step": 3, "loss": None}, {"kind": "train", "step": 4, "loss": None, "grad_norm": None}],
        r"loss was NaN or infinite at step 3, and 2 more figures after it",
    ),
    "skipped_steps": (
        [{"kind": "train", "step": i, **({"skipped": "equal"} if i % 2 else {"loss": 1.0 / i})} for i in range(1, 9)],
        r"4 of 8 optimizer steps \(50%\) were not taken, most of them because: equal",
    ),
    "reference_drift": (
        [{"kind": "train", "step": 1, "logratios/chosen": -3.0, "loss": 1.0}],
        r"chosen answers already differ from the reference by -3 nats",
    ),
}
ROWS: dict[str, tuple[dict[str, Any], str]] = {  # config, audit, samples, lines of runs
    "cut_rows": (
        {
            "config": {"data": {"max_length": 48, "validation_rows": 9}},
            "audit": {
                "findings": {
                    "cut_rows": {"count": 63, "of": 100},
                    "cut_completions": {"count": 50, "of": 100},
                    "cut_prompts": {"count": 40, "of": 100},
                }
            },
        },
        r"63 of 100 rows \(63%\) are cut at data\.max_length 48: 50 lost the end of an answer and with it EOS, 40 lost the start",
    ),
    "bad_rows": ({"audit": {"findings": {"bad_rows": {"count": 50, "of": 100}}}}, r"^50 of 100 rows \(50%\) are bad"),
    "nothing_held_out": ({"config": {"data": {"path": "a"}}}, r"^Nothing is held out"),
    "tied": (
        {"lines": [{"kind": "eval", "step": 9, "eval/rows": 30, "eval/win_rate": 0.5, "eval/win_rate/ties": 1.0}]},
        r"^Tied on 30 of 30 held-out prompts: .* This reward cannot tell",
    ),
    "samples_unchanged": ({"samples": [{"before": "a", "after": "a"}] * 4}, r"^4 of 4 sampled answers are unchanged"),
}
COMPARED: dict[str, tuple[dict[str, Any], str]] = {
    "judge_first_position": (
        {"judge": {"first_position": 0.7, "first_position/ci": [0.66, 0.74], "asked": 400, "failures": 1}},
        r"names the first answer more often, whatever it is: the first one in 70% .* of 400 replies",
    ),
    "judge_failures": (
        {"judge": {"first_position": 0.5, "first_position/ci": [0.45, 0.55], "asked": 400, "failures": 60}},
        r"60 of 400 replies of the judge \(15%\) could not be read",
    ),
    "judges_disagree": (
        {
            "models": {
                "start": {},
                "dpo": {
                    "reward_change": 1.0,
                    "reward_change/ci": [0.5, 1.5],
                    "also": {"truth": {"reward_change": -0.4, "reward_change/ci": [-0.6, -0.2]}},
                },
            }
        },
        r"By the reward dpo gained 1 over start, by truth -0\.4",
    ),
    "one_seed": ({"seeds": {"dpo": {"a": 0}, "ppo": {"b": 0, "c": 1}}}, r"^dpo: trained with one seed"),
    "few_prompts": ({"prompts": 12}, r"rests on 12 prompts"),
}


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_has_a_case_in_which_it_speaks(name: str) -> None:
    if name in LOUD:
        lines, sentence = LOUD[name]
        flags = run_flags(lines)
    elif name in ROWS:
        given, sentence = ROWS[name]
        flags = run_flags(**{"lines": [], **given})
    else:
        figures, sentence = COMPARED[name]
        flags = comparison_flags({"models": {"start": {}, "dpo": {}, "ppo": {}}, "prompts": 200, **figures})
    (flag,) = [f for f in flags if f.name == name]
    assert re.search(sentence, flag.sentence), flag.sentence
    assert flag.evidence and flag.advice and flag.title == RULES[name].title
    assert all(e.values and (not e.steps or len(e.steps) == len(e.values)) for e in flag.evidence)
    json.dumps(flag.to_json(), allow_nan=False)


def test_thresholds_move_the_rules() -> None:
    lines = LOUD["kl_band"][0]
    assert "kl_band" not in [f.name for f in run_flags(lines, {"trust": {"kl": [0.0, 60.0]}})]
    (low,) = [f for f in run_flags(made(kl=lambda t: 1.0), trust=TrustConfig(kl=[3.0, 60.0])) if f.name == "kl_band"]
    assert low.level == "note" and "below trust.kl's 3" in low.sentence
    assert "likelihood_displacement" not in [
        f.name for f in run_flags(LOUD["likelihood_displacement"][0], {"trust": {"chosen_fall": 30.0}})
    ]


# ---- wording, and when a rule stops firing ------------------------------------------------------------------------------


def test_displacement_is_worse_where_the_rejected_answer_does_not_fall_more() -> None:
    ordinary = made(chosen=lambda t: -2.5 * t, rejected=lambda t: -6 * t)
    strong = made(chosen=lambda t: -2.5 * t, rejected=lambda t: -1 * t)
    (a,), (b,) = ([f for f in run_flags(x) if f.name == "likelihood_displacement"] for x in (ordinary, strong))
    assert (a.level, b.level) == ("note", "warning")
    assert "no more than the chosen ones" in b.sentence and "no more" not in a.sentence


def test_a_loss_without_a_reference_is_compared_with_its_own_start() -> None:
    lines = [
        {
            "kind": "eval",
            "step": s,
            "eval/rows": 100,
            "eval/logps/chosen": -80.0 - s,
            "eval/logps/rejected": -90.0 - 2 * s,
        }
        for s in (0, 5, 10)
    ]
    (flag,) = run_flags(lines)
    assert (
        flag.name == "likelihood_displacement"
        and "than at step 0: by 10 nats per completion at step 10" in flag.sentence
    )
    still = [{**line, "eval/logps/chosen": -80.0} for line in lines]
    assert run_flags(still) == []


def test_training_lines_alone_tell_it_too_and_repeated_ones_count_once() -> None:
    falling = [{"kind": "train", "step": i, "logratios/chosen": -0.3 * i - 1e-3 * (i % 3)} for i in range(1, 41)]
    (flag,) = run_flags(falling)
    assert flag.name == "likelihood_displacement" and flag.evidence[0].steps[0] == 5  # means over five lines
    lines = [{"kind": "train", "step": i, "kl/policy_ref": float(i // 2)} for i in range(2, 30)]
    assert [p.value for p in RunView(lines).training_points("kl/policy_ref")] == [float(i) for i in range(1, 15)]


def test_wins_that_cannot_be_told_are_a_note_and_a_fall_from_the_best_is_a_warning() -> None:
    few = made(chosen=lambda t: 6 * t, rejected=lambda t: -6 * t, wins=lambda t: 0.55, prompts=16)
    (note,) = [f for f in run_flags(few) if f.name == "margin_without_wins"]
    assert note.level == "note" and "cannot be told" in note.sentence and "kl_prompts" in note.advice
    fallen = made(
        chosen=lambda t: 6 * t, rejected=lambda t: -6 * t, wins=lambda t: 0.9 if t < 0.4 else 0.68, prompts=400
    )
    (warning,) = [f for f in run_flags(fallen) if f.name == "margin_without_wins"]
    assert re.search(r"fell from (8[5-9]|9\d)% at step 10 to 6\d% at step 40", warning.sentence), warning.sentence


def test_where_training_gets_worse_too_it_is_no_overfitting() -> None:
    lines = [{**m, "loss": 0.7 + 0.02 * m["step"]} if m["kind"] == "train" else m for m in overfitted()]
    (flag,) = run_flags(lines)
    assert "training diverges" in flag.sentence and "lower train.lr" in flag.advice


def test_rows_that_are_only_learned_by_heart() -> None:
    rng = np.random.default_rng(9)
    right = (rng.random(150) < 0.55).astype(float)
    values = {"rewards/accuracies": right, "loss": np.full(150, 0.69)}
    lines = [held_out(rng, values, s, **{"eval/rows": 150}) for s in (0, 20, 40)]
    lines += [{"kind": "train", "step": i, "rewards/accuracies": min(1.0, 0.5 + i / 40)} for i in range(1, 41)]
    (flag,) = run_flags(lines)
    assert (
        flag.name == "overfitting"
        and "100% of training pairs are ranked correctly, against 49% (99% interval" in flag.sentence
    )
    assert flag.sentence.endswith("the gap is above 20% since step 20.")
    assert run_flags(lines, {"trust": {"accuracy_gap": 0.6}}) == []


def test_a_gap_at_the_threshold_is_rarely_one() -> None:
    def trial(rng: np.random.Generator) -> bool:
        line = held_out(rng, {"rewards/accuracies": (rng.random(100) < 0.6).astype(float)}, 40, **{"eval/rows": 100})
        batches = rng.binomial(32, 0.8, 40) / 32
        train = [{"kind": "train", "step": i + 1, "rewards/accuracies": float(b)} for i, b in enumerate(batches)]
        return speaks("overfitting", [line, *train])

    assert rate(trial, 800) <= 0.0125


def test_a_scheduled_loss_is_not_compared_with_itself() -> None:
    config = {"loss": {"name": "dpo_shift", "schedule": "increase_linear"}}
    assert run_flags(overfitted(), config) == []
    assert run_flags(overfitted(), {"loss": {"name": "dpo_shift", "schedule": "fixed"}}) != []


def test_an_online_reward_that_falls_on_held_out_prompts() -> None:
    rng = np.random.default_rng(5)
    lines = [
        held_out(rng, {"reward": rng.normal(m, 0.5, 100)}, 10 * k, **{"eval/rows": 100, "eval/loss": -m})
        for k, m in enumerate([0.0, 1.0, 0.9, 0.3])
    ]
    lines += [{"kind": "train", "step": i, "reward": 0.05 * i} for i in range(1, 31)]
    (flag,) = run_flags(lines, {"algorithm": {"name": "rloo"}, "reward": "words"})
    assert re.search("Overfitting starts at step 10: held-out reward of fresh completions got worse", flag.sentence)


def test_completions_that_no_longer_end() -> None:
    rng = np.random.default_rng(6)
    lines = [
        held_out(
            rng,
            {"completions/length": np.full(60, 64.0), "completions/ended": (rng.random(60) < p).astype(float)},
            step,
            **{"eval/kl/completions": 60},
        )
        for step, p in ((0, 0.9), (9, 0.2))
    ]
    (flag,) = run_flags(lines)
    assert flag.name == "length_growth" and re.search(
        r"and (1|2)\d% of them end by themselves, [89]\d% before", flag.sentence
    )


def test_data_that_teach_length_are_a_note_or_a_reason() -> None:
    audit = {"findings": {"length_bias": {"count": 700, "of": 1000}}}
    (note,) = run_flags([], {}, audit)
    assert (note.name, note.level) == ("length_growth", "note") and "70% of 1,000 pairs" in note.sentence
    assert run_flags([], {}, {"findings": {"length_bias": {"count": 610, "of": 1000}}}) == []
    both = [f for f in run_flags(LOUD["length_growth"][0], {}, audit) if f.name == "length_growth"]
    assert both[0].level == "warning" and "70% of 1,000 pairs" in both[0].sentence


def test_the_accuracy_at_equal_length_has_its_own_interval() -> None:
    """It is a model's estimate, not a share of rows: with the width of a share of few rows, every short run would get a warning."""
    certain = {"accuracies": 1.0, "accuracies/ci": [0.676, 1.0]}
    line = {"kind": "eval", "step": 3, "eval/rows": 8} | {f"eval/rewards/{k}": v for k, v in certain.items()}
    for name in ("agreement", "longer_wins"):
        line |= {f"eval/length/{name}": 1.0, f"eval/length/{name}/ci": [0.676, 1.0]}
    line |= {"eval/length/controlled_accuracy": 0.83, "eval/length/controlled_accuracy/ci": [0.78, 0.87]}
    (flag,) = (f for f in run_flags([line]) if f.name == "accuracy_by_length")
    assert flag.level == "note" and "without reading it" in flag.sentence


def test_few_rows_and_few_prompts_are_notes() -> None:
    (note,) = run_flags([{"kind": "eval", "step": 0, "eval/rows": 8}])
    assert note.name == "few_prompts" and "8 held-out rows" in note.sentence
    line = {"kind": "eval", "step": 0, "eval/rows": 90, "eval/win_rate": 0.5, "eval/win_rate/ci": [0.5, 0.5]}
    (judged,) = run_flags([line | {"eval/kl/completions": 16}])
    assert "16 prompts whose completions are judged" in judged.sentence


# ---- comparisons --------------------------------------------------------------------------------------------------------


def compared(long: bool, n: int = 200) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A policy that wins because its answers are longer, or wins as often without longer answers."""
    rng = np.random.default_rng(8)
    rows = []
    for i in range(n):
        tokens = int(rng.normal(60 if long else 30, 15)), int(rng.normal(30, 15))
        wins = tokens[0] > tokens[1] if long else rng.random() < 0.8
        completions = {
            "start": {"text": "a", "tokens": tokens[1], "reward": 0.0},
            "dpo": {"text": "b", "tokens": tokens[0], "reward": 1.0 if wins else -1.0},
        }
        rows.append({"prompt": f"p{i}", "sample": 0, "completions": completions})
    return {"models": {"start": {}, "dpo": {}}, "prompts": n, "seeds": {"dpo": {"a": 0, "b": 1}}}, rows


def test_a_win_rate_that_length_explains() -> None:
    figures, rows = compared(long=True)
    (flag,) = comparison_flags(figures, rows)
    assert flag.name == "accuracy_by_length" and flag.about == "dpo" and "length may be why it wins" in flag.sentence
    figures, rows = compared(long=False)
    rows[0]["completions"]["dpo"]["reward"] = None  # the reward does not apply to it
    assert comparison_flags(figures, rows) == []
    shorter = {
        "win_rate": 0.8,
        "win_rate/ci": [0.7, 0.9],
        "win_rate_equal_length": 0.7,
        "win_rate_equal_length/ci": [0.6, 0.8],
    }
    assert comparison_flags(figures | {"models": {"start": {}, "dpo": shorter}}) == []  # lower, but still above half
    given = {
        "win_rate": 0.7,
        "win_rate/ci": [0.6, 0.8],
        "win_rate_equal_length": 0.5,
        "win_rate_equal_length/ci": [0.4, 0.6],
    }
    assert warnings(comparison_flags(figures | {"models": {"start": {}, "dpo": given}})) == ["accuracy_by_length"]


def test_a_compared_model_that_is_far_long_and_unlikely() -> None:
    models = {
        "start": {"tokens": 30.0, "tokens/ci": [29.0, 31.0], "perplexity": 10.0},
        "dpo": {"tokens": 60.0, "tokens/ci": [58.0, 62.0], "perplexity": 30.0, "kl": 40.0, "kl/ci": [35.0, 45.0]},
    }
    figures = {"models": models, "prompts": 200, "seeds": {"dpo": {"a": 0, "b": 1}}}
    assert set(warnings(comparison_flags(figures))) == {"length_growth", "kl_band", "perplexity_band"}
    models["dpo"] |= {"tokens": 33.0, "tokens/ci": [32.0, 34.0], "perplexity": 12.0, "kl": 3.0, "kl/ci": [2.0, 4.0]}
    assert comparison_flags(figures) == []


# ---- statistics ---------------------------------------------------------------------------------------------------------


def test_the_interval_is_wider_than_the_one_in_the_line_and_never_without_width_for_a_share() -> None:
    p = Point(1, 0.0, standard_error(0.0, [-1.96, 1.96], 400), 400)
    assert p.bounds()[1] == pytest.approx(2.58, abs=0.02)
    few = standard_error(0.0, [-1.96, 1.96], 5)
    assert few == pytest.approx(math.sqrt(5 / 4), rel=1e-3)
    assert critical_t(5) == pytest.approx(4.604, abs=1e-3)  # t with 4 degrees of freedom
    assert critical_t(10_000, tests=10) == pytest.approx(3.29, abs=0.01)
    assert (standard_error(1.0, [1.0, 1.0], 16, share=True) or 0) > 0.05
    assert standard_error(1.0, [1.0, 1.0], 16) == 0.0
    assert standard_error(1.0, None, 16) is None and standard_error(1.0, [None, 1.0], 16) is None


def test_windows_and_steps() -> None:
    points = [Point(i, float(i)) for i in range(40)]
    last, first = window(points), window(points, last=False)
    assert last is not None and first is not None
    assert (last.step, last.value, last.n) == (39, 34.5, 10) and (first.step, first.value) == (0, 4.5)
    assert last.se == pytest.approx(np.std(np.arange(10), ddof=1) / math.sqrt(10))
    assert window(points[:9]) is None
    assert first_step_above([Point(s, v) for s, v in ((1, 5.0), (2, 0.0), (3, 2.0), (4, 3.0))], 1.0) == 3
    assert difference(Point(2, 5.0, 3.0, 9), Point(1, 1.0, 2.0, 9), times=2.0) == Point(2, 3.0, 5.0, 9)


# ---- folders and the command --------------------------------------------------------------------------------------------


def folder_of(path: Path, lines: list[Line], config: str = "") -> Path:
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    (path / "config.resolved.yaml").write_text(config)
    return path


def test_a_run_s_folder_and_its_file(tmp_path: Path) -> None:
    run = folder_of(tmp_path / "run", LOUD["kl_band"][0], "trust: {kl: [0, 30]}\n")
    found = write_flags(run)
    assert warnings(found) == ["kl_band"] and "above trust.kl's 30" in found[0].sentence
    assert json.loads((run / "flags.json").read_text()) == [f.to_json() for f in found]
    assert compute_flags(run) == found and not list(run.glob(".flags*"))
    (run / "config.resolved.yaml").write_text("trust: {kl: nonsense}\n")
    assert "above trust.kl's 20" in compute_flags(run)[0].sentence  # the defaults, if the file is from another version


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder_of(tmp_path / "run", LOUD["kl_band"][0])
    assert main(["flags", str(run)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("! warning: the policy is far from its start (kl_band)") and "What to do: " in shown
    assert "KL to the start, nats per completion: 0 (step 0)" in shown
    assert main(["flags", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "kl_band"
    assert main(["flags", str(folder_of(tmp_path / "quiet", []))]) == 0
    assert "does not prove that nothing is wrong" in capsys.readouterr().out
    for arguments, what in (
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path)], "neither metrics.jsonl nor comparison.json"),
        ([], "no folder is given"),
    ):
        assert main(["flags", *arguments]) == 2
        assert what in capsys.readouterr().err


def test_a_comparison_s_folder(tmp_path: Path) -> None:
    figures, rows = compared(long=True)
    (tmp_path / "comparison.json").write_text(json.dumps(figures))
    (tmp_path / "comparison.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert (
        warnings(compute_flags(tmp_path))
        == ["accuracy_by_length"]
        == warnings(compute_flags(tmp_path / "comparison.json"))
    )


def test_names_in_files_do_not_reach_the_terminal_raw() -> None:
    evil = "dpo\x1b[2J\u202e"
    flags = comparison_flags({"models": {"start": {}, evil: {"kl": 90.0, "kl/ci": [80.0, 99.0]}}, "prompts": 200})
    for text in (format_flags(flags), summary(flags)):
        assert r"dpo\x1b[2J\u202e" in text and "\x1b" not in text and "\u202e" not in text


@pytest.mark.parametrize(
    "line",
    [
        '{"half',
        "[]",
        "{}",
        '{"kind": "eval"}',
        '{"kind": "eval", "step": null, "eval/loss": 1}',
        '{"kind": "train", "step": "x"}',
        f'{{"kind": "eval", "step": 999, "eval/kl/policy_ref": 1{"0" * 400}}}',  # no float is that large
    ],
)
def test_lines_that_are_none_are_passed_over(tmp_path: Path, line: str) -> None:
    run = folder_of(tmp_path / "run", LOUD["kl_band"][0])
    with (run / "metrics.jsonl").open("a") as out:
        out.write(line)
    assert warnings(compute_flags(run)) == ["kl_band"]


def test_files_of_somebody_else_are_met_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"models": {"a": {}, "b": 3}, "prompts": 5}')
    with pytest.raises(CheckpointError, match="not as Penchant writes them"):
        compute_flags(tmp_path)
    (tmp_path / "comparison.json").write_text("{half")
    with pytest.raises(CheckpointError, match=r"comparison\.json: cannot be read"):
        compute_flags(tmp_path)


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags", "--rules"]) == 0
    rules = capsys.readouterr().out
    assert rules == markdown() and all(f"### {name}\n" in rules for name in RULES)
    page = (Path(__file__).parents[2] / "docs/trust.md").read_text()
    assert page.endswith(rules), "put the output of `penchant flags --rules` at the end of docs/trust.md"
    keys = {t for rule in RULES.values() for t in rule.thresholds}
    assert keys == set(TrustConfig.model_fields)  # every threshold is read by a rule


def test_every_section_on_the_page_is_a_config(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/trust.md").read_text()
    sections = re.findall(r"```yaml\n(.*?)```", page, flags=re.S)
    assert len(sections) == 2
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {path: d}\noutput: o\n" + "".join(sections))
    config = load_config(tmp_path / "run.yaml")
    assert config.trust.kl == [0.0, 60.0] and config.evaluation.reward is not None
    assert config_from_mapping(config.model_dump(mode="json")) == config

"""The table of metrics: it has every logged name, the better direction, and the meaning of old files' names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penchant.metrics.names import METRICS, SPEED, format_figure, higher_is_better, metric, with_current_names, with_k3
from penchant.runfolder import MetricsLog

OLD = Path(__file__).parents[1] / "fixtures/v0_1"


def logged(pattern: str) -> Iterator[dict[str, Any]]:
    for file in sorted(OLD.glob(pattern)):
        yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def figures(line: dict[str, Any]) -> set[str]:
    return {k.removesuffix("/ci") for k, v in line.items() if k.endswith("/ci") or isinstance(v, float)}


def test_no_run_may_log_a_name_that_is_not_in_the_table(tmp_path: Path) -> None:
    """Every run in the tests is checked against the table (see conftest.py)."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"kind": "eval", "step": 1, "eval/rewards/accuracies": 0.5, "eval/rewards/accuracies/ci": [0.4, 0.6]})
    for name in ("rewards/accuracy", "eval/reward/mean"):
        with pytest.raises(AssertionError, match=f"{name} is not in"):
            log.write({"kind": "train", "step": 1, name: 0.5})


def test_what_old_versions_logged_is_in_the_table() -> None:
    names = {n for line in logged("**/metrics.jsonl") for n in figures(line)}
    assert len(names) > 40 and [n for n in names if not metric(n).meaning] == []
    timed = {n for line in logged("**/perf.jsonl") for n in figures(line)}
    assert timed == {m.name for m in SPEED}


@pytest.mark.parametrize("name", ["win_rate", "eval/rewards/accuracies", "generated/reward[words]", "mine/gain", "lr"])
def test_higher_is_better(name: str) -> None:
    assert higher_is_better(name)


@pytest.mark.parametrize(
    "name",
    ["eval/loss", "nll", "sft/nll", "eval/perplexity", "eval/perplexity/chosen", "calibration/ece", "kl/policy_ref",
     "generated/kl/k3", "answers/kl/ref_policy_per_token", "loss/sft", "loss/dpo", "divergence"],
)  # fmt: skip
def test_lower_is_better(name: str) -> None:
    assert not higher_is_better(name)


def test_a_part_of_a_mix_is_its_metric_and_an_own_metric_is_only_a_name() -> None:
    part = metric("eval/sft/nll")
    assert (part.name, part.meaning, part.better) == ("sft/nll", METRICS["nll"].meaning, "lower")
    own = metric("mine/gain")
    assert (own.title, own.meaning, own.better, own.share) == ("mine/gain", "", None, False)
    assert metric("eval/rewards/margins") is METRICS["rewards/margins"]
    assert not metric("eval/rewards/margins/ci").meaning and not metric("").meaning


def test_two_accuracies_have_two_names_and_two_meanings() -> None:
    own, implicit = METRICS["rewards/accuracies"], METRICS["implicit_reward/accuracies"]
    assert own.meaning != implicit.meaning and (own.logged, implicit.logged) == (True, False)
    for m in (own, implicit):
        assert (m.share, m.null, m.better) == (True, 0.5, "higher")


def test_an_old_evaluation_on_asked_rows_is_read_as_what_it_meant() -> None:
    (asked,) = logged("finished/evaluations.jsonl")
    assert "beta" in asked["what"]
    found = with_current_names(asked)
    for part in ("metrics", "n"):
        assert not any(k.startswith("eval/rewards/") for k in found[part])
        assert list(found[part].values()) == list(asked[part].values())
    assert found["metrics"]["eval/implicit_reward/margins/ci"] == asked["metrics"]["eval/rewards/margins/ci"]
    assert with_current_names(found) == found
    # the run's own metrics, by the loss's reward, in old and new files
    bare = {**asked, "what": {"checkpoint": "step-6", "data": "held out"}}
    assert with_current_names(bare) == bare and "eval/rewards/accuracies" in bare["metrics"]
    assert with_current_names({"what": 3, "metrics": None}) == {"what": 3, "metrics": None}


@pytest.mark.parametrize(
    ("line", "name", "said"),
    [
        (
            {"eval/win_rate": 0.5, "eval/win_rate/ties": 1.0, "eval/rows": 30},
            "eval/win_rate",
            "0.5000 (tied on 30 of 30)",
        ),
        (
            {"eval/win_rate": 0.5, "eval/win_rate/ci": [0.5, 0.5], "eval/rows": 30},
            "eval/win_rate",
            "0.5000 (tied on 30 of 30)",
        ),
        ({"a/accuracies": 0.5}, "a/accuracies", "0.5000"),
        (
            {"eval/rewards/accuracies": 0.5, "eval/rewards/accuracies/ci": [0.0, 1.0], "eval/rows": 2},
            "eval/rewards/accuracies",
            "1 of 2, too few to tell",
        ),
        ({"eval/loss": 0.7, "eval/loss/ci": [0.6, 0.8], "eval/rows": 9}, "eval/loss", "0.7000"),
        ({"eval/loss": 0.7, "eval/loss/ci": [0.6, 0.8], "eval/rows": 10}, "eval/loss", "0.7000 [0.6000, 0.8000]"),
        ({"eval/loss": 0.7, "eval/loss/ci": [0.69999, 0.70001], "eval/rows": 30}, "eval/loss", "0.7000"),
        ({"eval/kl/k3": 4.2e-5, "eval/kl/k3/ci": [-2e-5, 0.0001]}, "eval/kl/k3", "4.20e-05 [-2.00e-05, 0.0001]"),
        ({"eval/kl/k3": 0.0}, "eval/kl/k3", "0.0000"),
        ({"eval/loss": None}, "eval/loss", "not a number"),
        ({"eval/loss": float("nan")}, "eval/loss", "not a number"),
    ],
)
def test_a_figure_stands_only_for_what_it_can_say(line: dict[str, Any], name: str, said: str) -> None:
    assert format_figure(line, name) == said


def test_an_older_kl_is_shown_unless_it_is_below_zero() -> None:
    old = {"eval/kl/policy_ref": 0.4, "eval/kl/policy_ref/ci": [0.1, 0.7]}
    assert with_k3(old)["eval/kl/k3"] == 0.4 and with_k3(old)["eval/kl/k3/ci"] == [0.1, 0.7]
    assert "eval/kl/k3" not in with_k3({"eval/kl/policy_ref": -0.08})
    assert with_k3({"kl": -0.1, "kl_k3": 0.2}) == {"kl": -0.1, "kl_k3": 0.2}

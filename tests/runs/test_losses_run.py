"""Losses in whole runs: each one trains, schedules are logged and survive a resume, sides may be absent, floors stop the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parameters import by_default, one_of_each_kind
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api, runfolder
from penchant.base.section import recorded
from penchant.config import config_from_mapping, dump_config, load_config
from penchant.errors import ConfigError, DataError, TrainingStopped
from penchant.losses import LOSSES
from penchant.runs import Run, TrainResult
from penchant.runs.sharing import ObjectCache
from penchant.training.loop import Loop

SHORT = {"samples": 0, "sample_tokens": 6}


def base_in(folder: Path) -> dict[str, Any]:
    rows = [{**r, "chosen_score": 1.0, "rejected_score": -0.5} for r in polite_rows(18)]
    return {
        "model": {"path": tiny_model_folder(folder / "model"), "dtype": "fp32"},
        "data": {"path": write_jsonl(folder / "pairs.jsonl", rows), "validation_rows": 6, "max_length": 128},
        "train": {"epochs": 1, "batch_size": 4, "tokens_per_step": 300, "lr": 3e-3, "warmup_fraction": 0.0},
        "evaluation": SHORT | {"kl_prompts": 0},
        "output": str(folder / "run"),
    }


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return base_in(tmp_path)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ObjectCache]:
    """A folder with model and data, and objects shared between runs as in a sweep, which changes no results (see tests/sweep)."""
    folder = tmp_path_factory.mktemp("together")
    base_in(folder)
    for keep in SIDES:
        unpaired(folder, keep)
    return folder, ObjectCache()


@pytest.fixture
def one_of_many(together: tuple[Path, ObjectCache], tmp_path: Path) -> Callable[..., TrainResult]:
    """Train one of the runs that share the model and the data."""
    folder, shared = together

    def train(loss: str, data: Path | None = None) -> TrainResult:
        values = {**base_in(tmp_path), "loss": loss, "model": {"path": str(folder / "model"), "dtype": "fp32"}}
        values["data"]["path"] = str(data or folder / "pairs.jsonl")
        return Run(config_from_mapping(values), quiet=True, shared=shared).train()

    return train


SIDES = [(True, False), (True,), (False,)]


def unpaired(tmp_path: Path, keep: tuple[bool, ...] = (True, False)) -> str:
    rows = []
    for r in polite_rows(18):
        for name, label in (("chosen", True), ("rejected", False)):
            if label in keep:
                rows.append({"prompt": r["prompt"], "completion": r[name], "label": label})
    return write_jsonl(tmp_path / f"unpaired-{'-'.join(map(str, keep))}.jsonl", rows)


def lines(result: Any, kind: str = "train") -> list[dict[str, Any]]:
    all_lines = [json.loads(x) for x in (Path(result.folder) / "metrics.jsonl").read_text().splitlines()]
    return [x for x in all_lines if x["kind"] == kind]


@pytest.mark.parametrize("name", one_of_each_kind(LOSSES))
def test_every_loss_trains_by_its_name(one_of_many: Callable[..., TrainResult], name: str) -> None:
    result = one_of_many(name)
    assert result.steps == 3
    rows = lines(result)
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in rows)
    if LOSSES[name].signal != "tokens":
        assert {"rewards/margins", "rewards/accuracies", "logps/chosen"} <= rows[0].keys()
        assert {"eval/rewards/margins/ci", "eval/rewards/accuracies/ci"} <= result.after.keys()
        moved = result.after["eval/logps/chosen"] - result.after["eval/logps/rejected"]
        before = result.before["eval/logps/chosen"] - result.before["eval/logps/rejected"]
        assert (moved > before) == (name != "discopop")  # at equality discopop first goes down, see tests/losses


@pytest.mark.parametrize("name", by_default(["kto", "bco", "pmpo", "sft"], ["kto", "sft"]))
@pytest.mark.parametrize("keep", SIDES)
def test_labelled_answers_and_data_of_one_side(
    one_of_many: Callable[..., TrainResult], together: tuple[Path, ObjectCache], name: str, keep: tuple[bool, ...]
) -> None:
    data = together[0] / f"unpaired-{'-'.join(map(str, keep))}.jsonl"
    if name == "sft" and keep == (False,):
        with pytest.raises(DataError, match="there is none"):
            one_of_many(name, data)
        return
    result = one_of_many(name, data)
    before, after = result.before, result.after
    if True in keep and name != "bco":
        assert after["eval/logps/chosen"] > before["eval/logps/chosen"]
    if name != "sft":
        assert ("eval/rewards/chosen" in after) == (True in keep)
        assert ("eval/rewards/rejected" in after) == (False in keep)


# ---- schedules --------------------------------------------------------------------------------------------------------


def test_dpo_shifts_lambda_is_logged_every_step_and_reaches_both_ends(base: dict[str, Any]) -> None:
    result = api.train({**base, "loss": {"name": "dpo_shift", "schedule": "increase_linear"}}, quiet=True)
    assert [r["lambda"] for r in lines(result)] == pytest.approx([0.5, 0.75, 1.0])
    again = api.evaluate(result.folder, quiet=True)  # the resolved config loads again, including the schedule
    assert again["eval/loss"] == pytest.approx(result.after["eval/loss"], rel=1e-6)
    fixed = api.train(
        {**base, "loss": {"name": "dpo_shift", "lambda": 0.6}, "output": base["output"] + "-fixed"}, quiet=True
    )
    assert [r["lambda"] for r in lines(fixed)] == [0.6] * 3


def test_the_held_out_loss_is_with_the_last_steps_value(base: dict[str, Any]) -> None:
    """lambda ends at 1, so the final held-out loss is DPO's on the same weights."""
    result = api.train({**base, "loss": {"name": "dpo_shift", "schedule": "increase_linear"}}, quiet=True)
    dpo = api.evaluate({**base, "loss": "dpo"}, quiet=True)
    assert dpo["checkpoint"] == "step-3"
    assert result.after["eval/loss"] == pytest.approx(dpo["eval/loss"], rel=1e-6)


def test_lambda_1_is_dpo_to_the_last_bit(base: dict[str, Any], tmp_path: Path) -> None:
    shift = api.train({**base, "loss": {"name": "dpo_shift", "lambda": 1.0}}, quiet=True)
    dpo = api.train({**base, "loss": "dpo", "output": str(tmp_path / "dpo")}, quiet=True)
    assert [r["loss"] for r in lines(shift)] == [r["loss"] for r in lines(dpo)]


def test_any_number_takes_a_schedule(base: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(base))
    loaded = load_config(config, ["loss.name=kto", "loss.undesirable_weight={from: 1.0, to: 0.5, shape: cosine}"])
    result = api.train(loaded, quiet=True)
    assert [r["undesirable_weight"] for r in lines(result)] == pytest.approx([1.0, 0.75, 0.5])
    again = load_config(result.folder / "config.resolved.yaml")
    assert again.loss == loaded.loss


def test_a_divergences_order_takes_one_too(base: dict[str, Any]) -> None:
    loss = {"name": "pmpo", "divergence": "renyi", "renyi_alpha": {"from": 1.2, "to": 2.0}}
    result = api.train({**base, "loss": loss}, quiet=True)
    assert [r["renyi_alpha"] for r in lines(result)] == pytest.approx([1.2, 1.6, 2.0])


# ---- exact resume -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates kill -9: an exception that the loop's cleanup does not handle."""


@pytest.mark.parametrize(
    "loss,more",
    [
        pytest.param({"name": "dpo_shift", "schedule": "decrease_linear"}, {}, marks=pytest.mark.slow),
        ({"name": "bco"}, {}),  # has its own state
        pytest.param({"name": "kto"}, {}, marks=pytest.mark.slow),
        pytest.param({"name": "aot"}, {}, marks=pytest.mark.slow),
        pytest.param({"name": "pmpo"}, {"reference": {"ema": 0.8}}, marks=pytest.mark.slow),
        pytest.param({"name": "dpo"}, {"reference": {"sync_every": 2, "sync_mixup": 0.6}}, marks=pytest.mark.slow),
        ({"name": "dpo"}, {"reference": {"ema": 0.8}, "lora": {"r": 2, "dropout": 0.1}}),
    ],
    ids=["dpo_shift", "bco", "kto", "aot", "pmpo-ema", "dpo-sync", "dpo-ema-lora"],
)
def test_a_killed_run_ends_where_an_uninterrupted_one_ends(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Any, more: Any
) -> None:
    base |= {"loss": loss, "checkpoint": {"every": 2}, "evaluation": SHORT | {"kl_prompts": 2}, **more}
    base["train"] |= {"epochs": 2, "max_steps": 4, "tokens_per_step": 250}
    whole = api.train(base, quiet=True)
    base["output"] = str(tmp_path / "killed")
    real = Loop._after_step

    def killed(self: Loop, *args: Any) -> None:
        if self.state.step == 3:
            raise Killed
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_after_step", killed)
        with pytest.raises(Killed):
            api.train(base, quiet=True)
    resumed = api.train(base, quiet=True)
    assert (whole.folder / "metrics.jsonl").read_bytes() == (resumed.folder / "metrics.jsonl").read_bytes()
    state = f"checkpoints/step-{whole.steps}/state.safetensors"
    assert (whole.folder / state).read_bytes() == (resumed.folder / state).read_bytes()
    # a later evaluation gives what the run itself measured at its end
    again = api.evaluate(resumed.folder, quiet=True)
    assert again["eval/loss"] == pytest.approx(resumed.after["eval/loss"], rel=1e-6)


# ---- losses over a whole step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", by_default(["aot", "aot_unpaired", "kto"], ["aot", "kto"]))
def test_micro_batches_do_not_matter_where_a_loss_looks_at_the_step(
    base: dict[str, Any], tmp_path: Path, name: str
) -> None:
    base |= {"loss": name}
    one = api.train(base, "train.tokens_per_step=4000", quiet=True)
    many = api.train(base, "train.tokens_per_step=100", f"output={tmp_path}/many", quiet=True)
    a, b = lines(one), lines(many)
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)
    assert one.after["eval/loss"] == pytest.approx(many.after["eval/loss"], rel=1e-4)


# ---- references ---------------------------------------------------------------------------------------------------------


def test_ref_ema_of_pmpo_is_the_references(base: dict[str, Any]) -> None:
    config = config_from_mapping({**base, "loss": {"name": "pmpo", "ref_ema": 0.99}})
    assert config.reference.ema == 0.99
    assert Run(config, quiet=True).built.reference_kind == "frozen"


def test_a_moving_reference_loosens_the_pull(base: dict[str, Any], tmp_path: Path) -> None:
    """Log-ratios are relative to a recent policy, so the last step's rewards are smaller. The KL stays relative to the start."""
    base["train"] |= {"epochs": 3}
    base["evaluation"]["kl_prompts"] = 4
    still = api.train({**base, "loss": "dpo"}, quiet=True)
    moving = api.train(
        {**base, "loss": "dpo", "reference": {"ema": 0.5}, "output": str(tmp_path / "moving")}, quiet=True
    )
    assert abs(lines(moving)[-1]["rewards/margins"]) < abs(lines(still)[-1]["rewards/margins"]) / 2
    assert moving.after["eval/kl/completions"] == 4
    # held-out rewards are relative to the start, not to the moving reference
    assert moving.after["eval/rewards/margins"] > 2 * lines(moving)[-1]["rewards/margins"]


def test_lora_with_a_moving_reference_starts_equal(base: dict[str, Any]) -> None:
    base |= {"loss": "dpo", "lora": {"r": 2}, "reference": {"sync_every": 1}}
    base["train"]["lr"] = 1e-2
    result = api.train(base, quiet=True)
    rows = lines(result)
    assert rows[0]["logratios/chosen"] == 0.0
    assert rows[1]["logratios/chosen"] == pytest.approx(0.0, abs=1e-4)  # a hard update after every step


# ---- stops and refusals -------------------------------------------------------------------------------------------------


def test_an_objective_without_a_bound_is_stopped_with_a_sentence(base: dict[str, Any]) -> None:
    base |= {"loss": {"name": "pmpo", "alpha": 0.0, "beta": 0.0}}
    base["train"] |= {"epochs": 200, "lr": 3e-2, "logp_floor": -40.0, "max_grad_norm": None}
    with pytest.raises(TrainingStopped, match=r"below train\.logp_floor=-40: .* raise the loss's beta") as error:
        api.train(base, quiet=True)
    assert error.value.exit_code == 3


def test_a_divergence_ceiling_stops_too(base: dict[str, Any]) -> None:
    base |= {"loss": {"name": "pmpo", "beta": 0.0}}
    base["train"] |= {"epochs": 50, "lr": 3e-2, "divergence_ceiling": 0.5}
    with pytest.raises(TrainingStopped, match=r"above train\.divergence_ceiling=0\.5"):
        api.train(base, quiet=True)


@pytest.mark.parametrize(
    "change,what",
    [
        ({"loss": {"name": "dpo_shfit"}}, r"did you mean \"dpo_shift\"|did you mean \"dpo\""),
        ({"loss": {"name": "dpo", "lambda": 0.5}}, 'unknown key "lambda" in loss'),
        ({"loss": {"name": "dpo_shift", "lambda": 1.5}}, "less than or equal to 1"),
        ({"loss": {"name": "dpo", "beta": {"from": 0.1}}}, r"loss\.beta\.to is missing"),
        ({"loss": {"name": "dpo", "beta": {"begin": 0.1, "to": 1.0}}}, 'unknown key "begin" in loss.beta'),
        ({"loss": {"name": "kto", "desireable_weight": 1.0}}, 'did you mean "desirable_weight"'),
        ({"loss": {"name": "simpo", "simpo_gamma": 1.0}}, 'did you mean "gamma"'),
        ({"loss": {"name": "sigmoid"}}, "it is called dpo here"),
        ({"loss": {"name": ["dpo", "sft"]}}, "several losses go into loss.mix"),
        ({"loss": {"mix": [{"name": "dpo"}, {"weight": 1.0}]}}, r"loss\.mix\.1\.name is missing"),
        ({"loss": {"mix": [{"name": "dpo", "beta": -1.0}]}}, r"loss\.mix\.0\.beta is -1"),
        ({"loss": {"mix": [{"name": "dpo", "weight": 0}]}}, "all weights are 0"),
        ({"loss": [{"name": "dpo"}]}, "loss is a list"),
        ({"loss": {"name": "dpo_shift", "lambda": 0.9, "schedule": "increase_linear"}}, "keep one of the two"),
        ({"loss": {"name": "dpo_shift", "lambda_min": 0.9}}, "of a linear schedule"),
        (
            {"loss": {"name": "dpo_shift", "schedule": "increase_linear", "lambda_min": 0.9, "lambda_max": 0.6}},
            "is above",
        ),
        ({"reference": {"sync_mixup": 0.5}}, "without sync_every"),
        ({"loss": {"name": "dpo", "beta": {"from": 0.1, "to": -1.0}}}, "greater than 0"),
        ({"loss": {"name": "dpo", "beta": {"from": 0.1, "to": 0.2, "shape": "step"}}}, "'linear' or 'cosine'"),
        ({"loss": {"name": "ipo", "average": {"from": 0.0, "to": 1.0}}}, "true or false|schedule"),
        ({"loss": {"name": "simpo", "average_log_prob": True}}, "uses lengths itself"),
        ({"loss": {"name": "dpo", "weight": 0.5}}, "a single loss has no weight"),
        ({"loss": {"mix": [{"name": "dpo"}, {"name": "dpo"}]}}, "listed twice"),
        ({"loss": {"mix": "dpo"}}, "not a list of losses"),
        ({"loss": {"mix": [{"name": "dpo", "weight": -1}]}}, "at least 0"),
        ({"loss": {"mix": [{"name": "dpo"}], "beta": 0.1}}, "beside mix"),
        ({"loss": {"name": "pmpo"}, "reference": {"kind": "cached"}}, "a cache does not hold"),
        ({"loss": {"name": "f_dpo", "alpha": 0.3}}, "alpha has no effect.* set divergence"),
        ({"loss": {"name": "f_dpo", "alpha": {"from": 0.3, "to": 0.5}}}, "alpha has no effect"),
        ({"loss": {"name": "pmpo", "renyi_alpha": 2.0}}, "renyi_alpha has no effect"),
        ({"loss": {"name": "pmpo", "weighting": "unit", "alpha": 0.9}}, "alpha has no effect"),
        ({"loss": {"name": "pmpo", "divergence": "js", "direction": "policy_ref"}}, "direction has no effect"),
        ({"train": {"schedule": "constant", "min_lr_fraction": 0.1}}, "min_lr_fraction has no effect"),
        ({"loss": {"name": "simpo"}, "reference": {"ema": 0.9}}, "has no reference that could move"),
        ({"reference": {"ema": 0.9, "sync_every": 3}}, "both set"),
        ({"reference": {"ema": 0.9, "kind": "cached"}}, "cannot follow the policy"),
        ({"loss": {"name": "pmpo", "ref_ema": 0.9}, "reference": {"ema": 0.5}}, "both set"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(base: dict[str, Any], change: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        api.train({**base, **change}, quiet=True)


@pytest.mark.parametrize(
    "section", [{"loss": {"name": "f_dpo", "alpha": 0.3}}, {"train": {"schedule": "constant", "min_lr_fraction": 0.1}}]
)
def test_a_key_without_effect_in_the_recorded_config_of_a_run_is_accepted(
    base: dict[str, Any], section: dict[str, Any]
) -> None:
    with recorded():
        config_from_mapping({**base, **section})


def test_another_loss_on_the_command_line_starts_from_its_own_defaults(base: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({**base, "loss": {"name": "dpo", "beta": 0.3, "nll_weight": 0.1}}))
    loss = load_config(config, ["loss.name=simpo"]).loss
    assert loss.params.beta == 2.0 and loss.nll_weight == 0.1
    for order in (["loss.name=simpo", "loss.beta=5.0"], ["loss.beta=5.0", "loss.name=simpo"]):
        assert load_config(config, order).loss.params.beta == 5.0
    assert load_config(config, ["loss.name=dpo"]).loss.params.beta == 0.3


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(base: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("loss:\n  name: dpo\n  beta: 0.1\n" + "\n".join(f"{k}: {json.dumps(v)}" for k, v in base.items()))
    with pytest.raises(ConfigError, match=r"^command line: loss\.beta is -1"):
        load_config(config, ["loss={name: dpo, beta: -1}"])
    config.write_text(config.read_text().replace("name: dpo", "name: dpoo", 1))
    with pytest.raises(ConfigError, match=r"run\.yaml:2: loss\.name 'dpoo' is not a loss"):
        load_config(config)


def test_a_run_of_a_version_that_knew_less_goes_on(base: dict[str, Any]) -> None:
    result = api.train({**base, "loss": "dpo"}, quiet=True)
    path = result.folder / "identity.json"
    identity = json.loads(path.read_text())
    for key in ("algorithm", "reward"):
        del identity["config"][key]
    del identity["config"]["train"]["logp_floor"], identity["config"]["loss"]["nll_weight"]
    runfolder.write_summed(path, json.dumps(identity))  # with a valid checksum, since a damaged file is not read
    assert api.train({**base, "loss": "dpo"}, quiet=True).steps == result.steps


def test_kto_needs_two_prompts(base: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": f"c{i}", "label": i % 2} for i in range(6)]
    base["data"] = {"path": write_jsonl(tmp_path / "one.jsonl", rows), "max_length": 64}
    with pytest.raises(DataError, match="all rows have the same prompt"):
        api.train({**base, "loss": "kto"}, quiet=True)


def test_a_mix_from_yaml_round_trips(base: dict[str, Any], tmp_path: Path) -> None:
    base["loss"] = {
        "mix": [{"name": "dpo", "weight": 0.8, "beta": 0.2}, {"name": "sft", "weight": 0.2}],
        "nll_weight": 0.0,
    }
    config = config_from_mapping(base)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml").loss == config.loss
    result = api.train(config, quiet=True)
    assert {"loss/sft", "loss/main"} <= lines(result)[0].keys()

"""Online methods: a small task with a known optimum, gradients by hand, exact resume with rollouts, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_tree, tiny_model
from steps import step_gradient, train_until_killed
from tiny import tiny_model_folder, write_jsonl

from penchant import api
from penchant.algorithms.advantages import leave_one_out
from penchant.algorithms.grpo import GroupConfig, GroupPolicyGradient
from penchant.algorithms.online_dpo import best_against_worst
from penchant.algorithms.rollouts import Group, pack_groups, rollout_reward_metrics, unpack_groups
from penchant.data.packing import pack
from penchant.errors import ConfigError, DataError, RewardError
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference, compute_logps
from penchant.rollout.generate import sample
from penchant.types import TokenTree

METHODS = ["rloo", "grpo", "online_dpo", "ppo"]


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """The reward is the share of the letter e, so the optimum writes nothing else."""
    reward = tmp_path / "rewards.py"
    reward.write_text(
        "def share_of_e(prompts, completions):\n    return [c.count('e') / max(1, len(c)) for c in completions]\n"
    )
    return {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "data": {
            "path": write_jsonl(
                tmp_path / "prompts.jsonl", [{"prompt": "q" * (1 + i % 5) + str(i)} for i in range(24)]
            ),
            "validation_rows": 4,
            "max_length": 64,
        },
        "algorithm": {"name": "rloo", "samples": 8, "max_new_tokens": 4, "beta": 0.0},
        "reward": f"{reward}:share_of_e",
        "train": {"epochs": 10, "batch_size": 10, "tokens_per_step": 2000, "lr": 3e-2, "warmup_fraction": 0.0},
        "evaluation": {"samples": 0, "every": None},
        "output": str(tmp_path / "run"),
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name,seed",
    [pytest.param(n, s, marks=[pytest.mark.slow] * ((n, s) != ("grpo", 0))) for n in METHODS for s in (0, 1, 2)],
)
def test_the_optimum_is_reached_from_several_seeds(base: dict[str, Any], name: str, seed: int) -> None:
    base["algorithm"] |= {"name": name, "beta": 0.01}
    base["train"] |= {"seed": seed, "epochs": 14}
    if name == "ppo":
        base["algorithm"]["max_new_tokens"] = 2
        base["train"] |= {"lr": 1e-2, "epochs": 20}
    result = api.train(base, quiet=True)
    assert result.before["eval/reward"] < 0.1
    assert result.after["eval/reward"] > 0.9
    assert result.after["eval/kl/policy_ref"] > 1.0
    assert result.after.get("eval/reward/ci", [-1.0])[0] <= result.after["eval/reward"]  # no interval if all are equal


def test_a_heavy_kl_keeps_the_policy_where_it_was(base: dict[str, Any], tmp_path: Path) -> None:
    base["train"]["epochs"] = 7
    free = api.train(base, quiet=True)
    held = api.train(
        {**base, "algorithm": {**base["algorithm"], "beta": 5.0}, "output": str(tmp_path / "h")}, quiet=True
    )
    assert abs(held.after["eval/kl/policy_ref"]) < free.after["eval/kl/policy_ref"] / 10


# ---- gradients ----------------------------------------------------------------------------------------------------------


class Fixed:
    """A writer that always returns the same groups, with the policy's current log-probs."""

    def __init__(self, groups: list[Group], model: Any) -> None:
        self.groups, self.model, self.seed = groups, model, 0

    def write(self, prompts: Any, iteration: int, samples: Any = None) -> list[Group]:
        with torch.no_grad():
            logps = [Scorer(self.model, "shared").logps(pack([g.tree])).tokens for g in self.groups]
        return [Group(g.tree, g.rewards, (), {"old": old}) for g, old in zip(self.groups, logps, strict=True)]


def groups() -> list[Group]:
    trees = [make_tree(0, 5, (3, 1, 6)), make_tree(1, 1, (2, 4, 4))]
    rewards = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.5, 3.0]], dtype=torch.float64)
    return [Group(t, r) for t, r in zip(trees, rewards, strict=True)]


def gradient_of(algorithm: GroupPolicyGradient, sizes: list[int]) -> torch.Tensor:
    return step_gradient(algorithm, [], sizes)


def made(model: Any, of: list[Group] | None = None, **config: Any) -> GroupPolicyGradient:
    reference = LiveReference(Scorer(tiny_model("llama", seed=1), "shared"))
    cfg = GroupConfig(**{"name": "rloo", "samples": 3, "max_new_tokens": 6, **config})
    return GroupPolicyGradient(
        Scorer(model, "shared"), reference, Fixed(of or groups(), model), cfg, tokens_per_step=20
    )  # type: ignore[arg-type]


def test_rloos_first_gradient_is_reinforce_by_hand() -> None:
    """-mean_i A_i grad log pi(y_i), with A from rewards minus the KL."""
    model = tiny_model("llama")
    got = gradient_of(made(model, beta=0.3), [2])
    model.zero_grad()
    trees = [g.tree for g in groups()]
    ref = compute_logps(LiveReference(Scorer(tiny_model("llama", seed=1), "shared")), trees, tokens_per_step=99).sums
    sums = Scorer(model, "shared").logps(pack(trees)).sums
    rewards = torch.stack([g.rewards for g in groups()]) - 0.3 * (sums.detach() - ref).view(2, 3)
    (-(leave_one_out(rewards).flatten() * sums).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (got - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize(
    "mean,sizes", [("sequence", [3, 1, 6, 2, 4, 4]), ("token", [20 / 6] * 6), ("constant", [6] * 6)]
)
def test_grpos_first_gradient_by_hand(mean: str, sizes: list[float]) -> None:
    """-mean_i 1/|y_i| sum_t A_i grad log pi + beta k3, with each of its three means."""
    model = tiny_model("llama")
    got = gradient_of(made(model, name="grpo", loss_mean=mean, beta=0.2), [2])
    model.zero_grad()
    trees = [g.tree for g in groups()]
    batch = pack(trees)
    ref = compute_logps(LiveReference(Scorer(tiny_model("llama", seed=1), "shared")), trees, tokens_per_step=99).tokens
    tokens = Scorer(model, "shared").logps(batch).tokens
    rewards = torch.stack([g.rewards for g in groups()])
    a = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    d = tokens - ref
    per_token = -a[batch.completion_of] * tokens + 0.2 * (torch.exp(-d) - 1 + d)
    loss = (per_token / torch.tensor(sizes, dtype=torch.float64)[batch.completion_of]).sum() / 6
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (got - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize(
    "config", [{"name": "rloo"}, {"name": "grpo"}, {"name": "grpo", "loss_mean": "token"}], ids=str
)
def test_micro_batches_do_not_matter(config: dict[str, Any]) -> None:
    model = tiny_model("llama")
    one, two = gradient_of(made(model, **config), [2]), gradient_of(made(model, **config), [1, 1])
    assert (one - two).norm() <= 1e-9 * one.norm()


def test_sampling_and_training_log_probs_agree_with_a_temperature() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    prompts = [[5, 6, 7], [9], [3, 4]]
    rows = sample(model, prompts, n=3, max_new_tokens=6, temperature=0.7, seed=1)
    for kernels in ("off", "auto"):
        scorer = Scorer(model, "shared", kernels, temperature=0.7)
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            tree = TokenTree(i, np.array(prompt, np.int32), tuple(np.array(s.ids, np.int32) for s in row), (True,) * 3)
            with torch.no_grad():
                tokens = scorer.logps(pack([tree])).tokens
            assert tokens.tolist() == pytest.approx([lp for s in row for lp in s.logps], abs=1e-5)


# ---- exact resume ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wholes() -> dict[str, tuple[bytes, ...]]:
    """Results of uninterrupted runs, by their settings, shared by all kills."""
    return {}


def written(folder: Path, steps: int) -> tuple[bytes, ...]:
    last = folder / f"checkpoints/step-{steps}"
    files = (folder / "metrics.jsonl", last / "state.safetensors", last / "model/model.safetensors")
    return tuple(f.read_bytes() for f in files)


SEVERAL_UPDATES: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"epochs": 2, "minibatches": 2}),
    ("ppo", {"minibatches": 2, "kl_control": "adaptive", "normalise_scores": True}),
    ("ppo", {"value": "separate", "epochs": 2}),
]


@pytest.mark.parametrize(
    "name,more,at",  # with one update per rollout all steps are alike; with two, a rollout begins after step 2
    [
        pytest.param("rloo", {}, 2, marks=pytest.mark.slow),
        ("online_dpo", {}, 3),
        ("dapo", {"dynamic_sampling": 3, "epochs": 2}, 3),
        *((name, more, 3) for name, more in SEVERAL_UPDATES),
        *(pytest.param(name, more, 2, marks=[pytest.mark.slow] * (name == "ppo")) for name, more in SEVERAL_UPDATES),
    ],
)
def test_a_killed_run_ends_where_an_uninterrupted_one_ends(
    base: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wholes: dict[str, tuple[bytes, ...]],
    name: str,
    more: dict[str, Any],
    at: int,
) -> None:
    """The checkpoint lies between two updates on the same rollouts, which are part of it."""
    base["algorithm"] |= {"name": name, "beta": 0.1, **more}
    base["train"] |= {"epochs": 1}
    base |= {"checkpoint": {"every": 1}}
    if not more:
        base["train"]["epochs"] = 3
    key = f"{name} {more}"
    if key not in wholes:
        whole = api.train(base, quiet=True)
        wholes[key] = written(whole.folder, whole.steps)
    base["output"] = str(tmp_path / "killed")
    train_until_killed(base, at, monkeypatch)
    resumed = api.train(base, quiet=True)
    assert resumed.steps > at
    for whole_file, file in zip(wholes[key], written(resumed.folder, resumed.steps), strict=True):
        assert whole_file == file
    if name == "dapo":  # prompts were replaced before and after the kill
        kept = [x["dynamic_sampling/kept"] < 1.0 for x in lines(resumed.folder) if "dynamic_sampling/kept" in x]
        assert any(kept[:at]) and any(kept[at:])


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_a_reference_that_follows_the_policy(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """If copied after each step it equals the sampling policy, with a KL of 0; a killed run resumes with it."""
    base["algorithm"] |= {"name": name, "beta": 0.1, "epochs": 1}
    base["train"] |= {"max_steps": 3}
    base |= {"checkpoint": {"every": 1}, "data": {**base["data"], "validation_rows": None}}
    still = lines(api.train({**base, "output": str(tmp_path / "still")}, quiet=True).folder)
    copied = lines(
        api.train({**base, "output": str(tmp_path / "copied"), "reference": {"sync_every": 1}}, quiet=True).folder
    )
    assert max(x["kl/k3"] for x in still) > 1e-3
    assert max(x["kl/k3"] for x in copied) < 1e-6

    base["reference"] = {"ema": 0.9}
    whole = api.train(base, quiet=True)
    base["output"] = str(tmp_path / "killed")
    train_until_killed(base, 2, monkeypatch)
    resumed = api.train(base, quiet=True)
    assert written(resumed.folder, resumed.steps) == written(whole.folder, whole.steps)


def test_a_moving_references_start_has_the_temperature_of_the_policy(base: dict[str, Any]) -> None:
    base["algorithm"] |= {"name": "grpo", "beta": 0.1, "temperature": 0.5}
    base["train"] |= {"max_steps": 1}
    result = api.train({**base, "reference": {"ema": 0.9}}, quiet=True)
    assert abs(result.before["eval/kl/policy_ref"]) < 1e-5 and result.before["eval/kl/k3"] < 1e-6


def test_a_reference_follows_in_a_step_with_nothing_to_learn_from_too(base: dict[str, Any], tmp_path: Path) -> None:
    reward = tmp_path / "second.py"
    reward.write_text(
        "def f(prompts, completions, trainer_state):\n"
        "    return [None if trainer_state.global_step == 1 else float(c.count('e')) for c in completions]\n"
    )
    base["algorithm"] |= {"beta": 0.1}
    base["train"] |= {"max_steps": 3}
    base |= {"reward": f"{reward}:f", "data": {**base["data"], "validation_rows": None}}
    result = api.train({**base, "reference": {"sync_every": 2}}, quiet=True)
    _, second, third = lines(result.folder)
    assert "skipped" in second and second["kl/k3"] > 1e-3  # the policy moved in the first step
    assert third["kl/k3"] < 1e-6


def test_groups_survive_as_tensors() -> None:
    some = groups()
    for g in some:
        n = sum(map(len, g.tree.completion_ids))
        g.extras = {"old": torch.arange(float(n)), "advantages": torch.arange(3.0)}
    again = unpack_groups(pack_groups(some))
    for a, b in zip(some, again, strict=True):
        assert a.tree.prompt_ids.tolist() == b.tree.prompt_ids.tolist()
        assert [c.tolist() for c in a.tree.completion_ids] == [c.tolist() for c in b.tree.completion_ids]
        assert torch.equal(a.rewards, b.rewards) and a.tree.truncated == b.tree.truncated
        assert all(torch.equal(a.extras[k], b.extras[k]) for k in a.extras)


# ---- pairs of online DPO --------------------------------------------------------------------------------------------------


def test_best_against_worst() -> None:
    group = groups()[0]
    pair = best_against_worst(group)
    assert pair is not None
    assert [c.tolist() for c in pair.completion_ids] == [group.tree.completion_ids[i].tolist() for i in (2, 1)]
    assert pair.scores == (2.0, 0.0) and pair.labels == (True, False)
    assert best_against_worst(Group(group.tree, torch.ones(3))) is None


def test_a_step_without_pairs_is_skipped_and_says_so(base: dict[str, Any], tmp_path: Path) -> None:
    flat = tmp_path / "flat.py"
    flat.write_text("def f(prompts, completions):\n    return [0.5] * len(completions)\n")
    base |= {"algorithm": {**base["algorithm"], "name": "online_dpo", "beta": 0.1}, "reward": f"{flat}:f"}
    base["train"]["epochs"] = 1
    result = api.train(base, quiet=True)
    rows = [r for r in lines(result.folder) if r["kind"] == "train"]
    assert all(r["skipped"] and r["pairs"] == 0.0 for r in rows)
    assert result.after["eval/kl/policy_ref"] == 0.0


# ---- data and refusals ----------------------------------------------------------------------------------------------------


def test_any_data_gives_its_prompts_once(base: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 6}", "chosen": "a", "rejected": f"b{i}"} for i in range(12)]
    base["data"] = {"path": write_jsonl(tmp_path / "pairs.jsonl", rows), "max_length": 32}
    base["train"] |= {"batch_size": 6, "epochs": 1}
    result = api.train(base, quiet=True)
    assert result.steps == 1


def test_long_prompts_lose_their_start(base: dict[str, Any], tmp_path: Path) -> None:
    """The row is kept: max_length applies to prompts alone, without room for completions."""
    rows = [{"prompt": "a" * 40 + str(i)} for i in range(12)]
    base["data"] = {"path": write_jsonl(tmp_path / "long.jsonl", rows), "max_length": 16}
    base["train"] |= {"batch_size": 6, "epochs": 1}
    assert api.train(base, quiet=True).steps == 2


def test_how_far_the_policy_is_from_who_wrote_is_logged(base: dict[str, Any]) -> None:
    # the entropy term moves the policy for any rewards
    base["algorithm"] |= {"name": "grpo", "epochs": 2, "entropy_coef": 1.0}
    base["train"]["epochs"] = 1
    found = [x["kl/old_new"] for x in lines(api.train(base, quiet=True).folder) if x["kind"] == "train"]
    assert abs(found[0]) < 1e-9 and found[1] > 1e-6


def test_the_missing_eos_penalty_lowers_the_reward(base: dict[str, Any], tmp_path: Path) -> None:
    base["train"]["epochs"] = 0.5
    plain = api.train(base, quiet=True)
    base["algorithm"]["missing_eos_penalty"] = 1.0
    priced = api.train({**base, "output": str(tmp_path / "priced")}, quiet=True)
    ended = plain.before["eval/completions/ended"]
    assert priced.before["eval/reward"] == pytest.approx(plain.before["eval/reward"] - (1 - ended))


@pytest.mark.parametrize(
    "change,what",
    [
        ({"reward": None}, "algorithm needs a reward"),
        ({"algorithm": None}, "reward is set without an algorithm"),
        ({"loss": "kto"}, "loss and algorithm are both set"),
        ({"algorithm": {"name": "rlo"}}, 'did you mean "rloo"'),
        ({"algorithm": {"name": "rloo", "samples": 1}}, "samples is 1; rloo judges"),
        ({"algorithm": {"name": "reinforce_pp", "samples": 1, "dynamic_sampling": 2}}, "samples is 1; reinforce_pp"),
        ({"algorithm": {"name": "grpo", "minibatches": 11}}, "minibatches: is 11, and a batch of rollouts is of 10"),
        ({"algorithm": {"name": "online_dpo", "epochs": 2}}, "takes one step"),
        ({"algorithm": {"name": "online_dpo", "beta": 0.0}}, "beta is 0; give a number above 0"),
        ({"algorithm": {"name": "grpo", "beta": -1.0}}, "of at least 0"),
        ({"reference": {"kind": "cached"}}, "a cache does not hold"),
        ({"algorithm": {"name": "rloo", "max_new_tokens": 300}}, "beyond the model's context of 256"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(base: dict[str, Any], change: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        api.train({**base, **change}, quiet=True)


def test_a_reward_that_fails_stops_the_run_with_its_name(base: dict[str, Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f(prompts, completions):\n    return [1 / 0 for c in completions]\n")
    with pytest.raises(RewardError, match=r"bad\.py:f: ZeroDivisionError"):
        api.train({**base, "reward": f"{bad}:f"}, quiet=True)


def test_prompts_alone_are_no_data_for_a_loss(base: dict[str, Any]) -> None:
    for loss in ("sft", "dpo", "kto"):
        with pytest.raises(DataError, match="prompts"):
            api.train({**base, "algorithm": None, "reward": None, "loss": loss}, quiet=True)


# ---- rewards that see the row ---------------------------------------------------------------------------------------------

OF_ROWS = """
def near(completions, answer, **kwargs):
    assert all(isinstance(a, int) for a in answer)
    return [None if a % 3 == 0 or len(c) % 4 == 3 else float(a % 3 == len(c) % 2) for c, a in zip(completions, answer)]

def ending(completions, answer, **kwargs):
    return [None if a % 3 == 0 else float(c.endswith("e")) for c, a in zip(completions, answer)]
"""


SLOW_ONES = [pytest.param(name, marks=pytest.mark.slow) for name in ("rloo", "online_dpo")]


@pytest.mark.parametrize("name", ["grpo", "ppo", *SLOW_ONES])
def test_rewards_with_columns_and_none_train_and_resume(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Prompt and answer columns, numbers included. A third of the rows and some completions have no reward. Killed runs end the same."""
    (tmp_path / "of_rows.py").write_text(OF_ROWS)
    rows = [{"prompt": "q" * (1 + i % 5) + str(i), "answer": i} for i in range(24)]
    base["data"] |= {"path": write_jsonl(tmp_path / "answers.jsonl", rows)}
    base["reward"] = [f"{tmp_path}/of_rows.py:near", {f"{tmp_path}/of_rows.py:ending": 0.5}]
    base["algorithm"] |= {"name": name, "samples": 2 if name == "ppo" else 4, "beta": 0.1}
    if name != "online_dpo":
        base["algorithm"]["epochs"] = 2
    base["train"] |= {"epochs": 1 if name != "online_dpo" else 2}
    base |= {"checkpoint": {"every": 1}}
    whole = api.train(base, quiet=True)
    found = [line for line in lines(whole.folder) if line["kind"] == "train"]
    assert all(line["reward/none"] > 0 and np.isfinite(line["loss"]) for line in found if "skipped" not in line)
    assert {f"rewards/{n}/{k}" for n in ("near", "ending") for k in ("mean", "std", "none")} <= found[0].keys()
    assert found[0]["rewards/near/none"] >= found[0]["rewards/ending/none"] == found[0]["reward/none"]
    held_out = next(line for line in lines(whole.folder) if line["kind"] == "eval")
    assert "eval/rewards/near/mean" in held_out
    base["output"] = str(tmp_path / "killed")
    train_until_killed(base, 1, monkeypatch)
    resumed = api.train(base, quiet=True)
    assert written(resumed.folder, resumed.steps) == written(whole.folder, whole.steps)


@pytest.mark.parametrize(
    "config",
    [{"name": "rloo"}, {"name": "grpo"}, {"name": "grpo", "loss_mean": "token", "scale_rewards": "batch"}],
    ids=str,
)
def test_a_completion_without_a_reward_changes_nothing(config: dict[str, Any]) -> None:
    """Groups with an unknown reward have the gradient of the groups without that completion."""
    model = tiny_model("llama")
    without = groups()
    some = []
    for g in without:
        more = (*g.tree.completion_ids, np.array([9, 8], np.int32))
        tree = replace(g.tree, completion_ids=more, truncated=(False,) * 4)
        some.append(Group(tree, torch.cat([g.rewards, torch.tensor([float("nan")], dtype=torch.float64)])))
    expected = gradient_of(made(model, without, beta=0.2, **config), [2])
    got = gradient_of(made(model, some, beta=0.2, **config), [2])
    assert (got - expected).norm() <= 1e-9 * expected.norm()


# ---- variants of GRPO -------------------------------------------------------------------------------------------------------


def by_hand(model: Any, per_token: Any, sizes: list[float], beta: float) -> torch.Tensor:
    """The gradient of mean_i 1/size_i sum_t [per_token(advantages, log pi) + beta k3] on `groups`."""
    model.zero_grad()
    trees = [g.tree for g in groups()]
    batch = pack(trees)
    ref = compute_logps(LiveReference(Scorer(tiny_model("llama", seed=1), "shared")), trees, tokens_per_step=99).tokens
    tokens = Scorer(model, "shared").logps(batch).tokens
    rewards = torch.stack([g.rewards for g in groups()])
    centered = rewards - rewards.mean(1, keepdim=True)
    d = tokens - ref
    values = per_token(centered, rewards, batch, tokens, d) + beta * (torch.exp(-d) - 1 + d)
    ((values / torch.tensor(sizes, dtype=torch.float64)[batch.completion_of]).sum() / len(sizes)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _grpo(centered: Any, rewards: Any, batch: Any, tokens: Any, d: Any) -> Any:
    return -(centered / (rewards.std(1, keepdim=True) + 1e-4)).flatten()[batch.completion_of] * tokens


def _dr_grpo(centered: Any, rewards: Any, batch: Any, tokens: Any, d: Any) -> Any:
    return -centered.flatten()[batch.completion_of] * tokens


def _gspo(centered: Any, rewards: Any, batch: Any, tokens: Any, d: Any) -> Any:
    """At ratio 1 the gradient of s_i is the mean of its tokens' gradients."""
    a = (centered / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    sums = torch.zeros(6, dtype=tokens.dtype).index_add(0, batch.completion_of, tokens) / batch.lengths
    return (-a * sums)[batch.completion_of]


def _reinforce_pp(centered: Any, rewards: Any, batch: Any, tokens: Any, d: Any) -> Any:
    drift, per = d.detach(), []
    for r, part in zip(rewards.flatten(), drift.split(batch.lengths.tolist()), strict=True):
        per.append(r - 0.3 * torch.stack([part[t:].sum() for t in range(len(part))]))
    a = torch.cat(per)
    return -(a - a.mean()) / (a.var() + 1e-8).sqrt() * tokens


PER_TOKEN = [20 / 6] * 6
OWN = [3.0, 1.0, 6.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("config", "per_token", "sizes", "beta"),
    [
        ({"name": "dr_grpo"}, _dr_grpo, [6.0] * 6, 0.0),
        ({"name": "dapo", "dynamic_sampling": 0}, _grpo, PER_TOKEN, 0.0),
        ({"name": "cispo"}, _grpo, PER_TOKEN, 0.0),
        ({"name": "gspo"}, _gspo, OWN, 0.0),
        ({"name": "reinforce_pp", "beta": 0.3}, _reinforce_pp, PER_TOKEN, 0.0),
        ({"name": "grpo", "beta": 0.2}, _grpo, OWN, 0.2),
    ],
    ids=lambda v: v["name"] if isinstance(v, dict) else "",
)
def test_first_gradients_by_hand(config: dict[str, Any], per_token: Any, sizes: list[float], beta: float) -> None:
    model = tiny_model("llama")
    got = gradient_of(made(model, **config), [1, 1])
    expected = by_hand(model, per_token, sizes, beta)
    assert (got - expected).norm() <= 1e-7 * expected.norm()


@pytest.mark.parametrize("estimator", ["k1", "k2", "unbiased"])
def test_the_kl_in_the_loss_by_its_estimator(estimator: str) -> None:
    """With zero advantage the gradient is that of beta times the estimate, at the sampling policy."""
    model = tiny_model("llama")
    level = [Group(g.tree, torch.ones_like(g.rewards)) for g in groups()]
    got = gradient_of(made(model, level, name="grpo", beta=0.5, kl_estimator=estimator, loss_mean="token"), [2])
    model.zero_grad()
    trees = [g.tree for g in groups()]
    ref = compute_logps(LiveReference(Scorer(tiny_model("llama", seed=1), "shared")), trees, tokens_per_step=99).tokens
    tokens = Scorer(model, "shared").logps(pack(trees)).tokens
    d = tokens - ref
    k3 = torch.exp(-d) - 1 + d
    kl = {"k1": d, "k2": d.square() / 2, "unbiased": torch.exp(tokens - tokens.detach()) * k3}[estimator]
    (0.5 * kl.mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (got - expected).norm() <= 1e-7 * expected.norm()


def test_cut_completions_are_left_out_but_count_in_their_groups_mean() -> None:
    model = tiny_model("llama")
    cut = [Group(replace(g.tree, truncated=(False, True, False)), g.rewards) for g in groups()]
    algorithm = made(model, cut, name="dapo", dynamic_sampling=0)
    chosen = algorithm.begin_step(0, 0.0, [])
    batch = pack(list(chosen))
    assert algorithm.weights(batch) == {"main": 3.0 + 6 + 2 + 4}
    out = algorithm.loss(algorithm.score(batch))
    assert not out.losses[torch.isin(batch.completion_of, torch.tensor([1, 4]))].any()
    whole = made(model, name="dapo", dynamic_sampling=0)
    whole.begin_step(0, 0.0, [])
    for a, b in zip(algorithm.groups, whole.groups, strict=True):
        assert torch.equal(a.extras["advantages"], b.extras["advantages"])
    # a prompt whose completions are all cut gives no gradient
    cut[0] = Group(replace(cut[0].tree, truncated=(True,) * 3), cut[0].rewards)
    algorithm = made(model, cut, name="dapo", dynamic_sampling=0)
    assert [t.row for t in algorithm.begin_step(0, 0.0, [])] == [cut[1].tree.row]
    # nor does one whose only complete completion has no reward; a step of such prompts changes nothing
    rewards = cut[0].rewards.clone()
    rewards[0] = torch.nan
    cut[0] = Group(replace(cut[0].tree, truncated=(False, True, True)), rewards)
    algorithm = made(model, cut, name="dapo", dynamic_sampling=0)
    assert [t.row for t in algorithm.begin_step(0, 0.0, [])] == [cut[1].tree.row]


class Level:
    """Writes groups whose rewards are equal except for some rows."""

    seed = 3

    def __init__(self, teaching: set[int]) -> None:
        self.teaching, self.asked = teaching, []  # type: ignore[var-annotated]

    def write(self, prompts: Any, *_: Any) -> list[Group]:
        self.asked.append([t.row for t in prompts])
        rewards = [torch.tensor([1.0, float(t.row not in self.teaching), 1.0]).double() for t in prompts]
        trees = [make_tree(t.row, 2, (2, 2, 2)) for t in prompts]
        return [Group(t, r, (), {"old": torch.zeros(6)}) for t, r in zip(trees, rewards, strict=True)]


def test_prompts_that_teach_nothing_are_replaced_so_many_times() -> None:
    pool = [make_tree(i, 2, ()) for i in range(12)]
    algorithm = made(tiny_model("llama"), name="dapo")
    algorithm.pool = pool
    writer: Any = Level({0, 5, 6, 7, 8, 9, 10, 11})
    algorithm.writer = writer
    rows = [t.row for t in algorithm.begin_step(0, 0.0, pool[:4])]
    assert writer.asked[0] == [0, 1, 2, 3] and len(rows) == 4 and set(rows) <= writer.teaching
    flat = [row for asked in writer.asked for row in asked]
    assert len(flat) == len(set(flat)) and len(writer.asked) <= 4
    said = algorithm.step_values()
    assert said["dynamic_sampling/kept"] == 4 / len(flat)
    # metrics cover all sampled groups, as for other methods
    taught = sum(row in writer.teaching for row in flat)
    assert said["reward"] == pytest.approx((taught * 2 / 3 + len(flat) - taught) / len(flat))
    assert said["frac_reward_zero_std"] == pytest.approx(1 - taught / len(flat)) and taught < len(flat)
    # the bound on resampling, and an empty step if no group has a gradient
    algorithm = made(tiny_model("llama"), name="dapo")
    algorithm.pool, nothing = pool, Level(set())
    algorithm.writer = nothing  # type: ignore[assignment]
    assert algorithm.begin_step(0, 0.0, pool[:2]) == [] and len(nothing.asked) == 4
    assert algorithm.step_values()["frac_reward_zero_std"] == 1.0


@pytest.mark.parametrize(
    "name", ["dapo", *[pytest.param(n, marks=pytest.mark.slow) for n in ("gspo", "cispo", "dr_grpo", "reinforce_pp")]]
)
def test_what_came_of_grpo_reaches_the_optimum(base: dict[str, Any], name: str) -> None:
    base["algorithm"] |= {"name": name, "overlong_filter": False}  # no completion ends by itself here
    result = api.train(base, quiet=True)
    assert result.after["eval/reward"] > result.before["eval/reward"] + 0.3


# ---- entropy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_in_the_loss_is_the_exact_one(temperature: float) -> None:
    """Against a dense softmax of the model's own logits, value and gradient."""
    model = tiny_model("llama")
    some = groups()
    algorithm = made(model, some, name="grpo", beta=0.0, entropy_coef=0.3, temperature=temperature)
    plain = made(model, some, name="grpo", beta=0.0, temperature=temperature)
    for a in (algorithm, plain):
        a.scorer.temperature = temperature
    with_it, without = (gradient_of(a, [len(some)]) for a in (algorithm, plain))
    model.zero_grad()
    parts, values = [], []
    for g in some:
        for ids in g.tree.completion_ids:
            row = torch.tensor([[*g.tree.prompt_ids.tolist(), *ids.tolist()]])
            logps = torch.log_softmax(
                model(input_ids=row, use_cache=False).logits[0, -len(ids) - 1 : -1] / temperature, -1
            )
            values.append(-(logps.exp() * logps).sum(-1))
            parts.append(values[-1].mean())
    (-0.3 * torch.stack(parts).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert ((with_it - without) - expected).norm() <= 1e-8 * expected.norm()
    batch = pack([g.tree for g in some])
    out = algorithm.loss(algorithm.score(batch))
    assert torch.allclose(out.metrics["policy/entropy"][0], torch.cat(values).detach(), rtol=1e-9)


def test_a_prompt_with_at_most_one_reward_counts_as_one_that_teaches_nothing() -> None:
    def said(*rewards: list[float]) -> dict[str, float]:
        trees = [make_tree(i, 2, (2, 2, 2)) for i in range(len(rewards))]
        return rollout_reward_metrics([Group(t, torch.tensor(r), (), {}) for t, r in zip(trees, rewards, strict=True)])

    none = float("nan")
    assert said([none, none, none], [none, none, none])["frac_reward_zero_std"] == 1.0
    found = said([1.0, 2.0, none], [1.0, none, none], [none, none, none], [3.0, 3.0, 3.0])
    assert found["frac_reward_zero_std"] == 0.75 and found["reward/none"] == 0.5
    assert found["reward/std"] == pytest.approx((0.5**0.5 + 0.0) / 2)  # of those that have one


@pytest.mark.parametrize("reward", [0.1, 0.3, -2.7])
@pytest.mark.parametrize("k", [3, 9, 18])
def test_equal_rewards_have_no_spread_whatever_their_mean_is_rounded_to(reward: float, k: int) -> None:
    group = Group(make_tree(0, 2, (2,) * k), torch.full((k,), reward, dtype=torch.float64))
    found = rollout_reward_metrics([group])
    assert found["reward/std"] == 0.0 and found["frac_reward_zero_std"] == 1.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rewards", [[[2.0]], [[float("nan")]], [[2.0, float("nan")]]], ids=str)
def test_a_single_reward_has_no_spread_and_no_warning(rewards: list[list[float]]) -> None:
    of_prompt = torch.tensor(rewards[0], dtype=torch.float64)
    group = Group(make_tree(0, 2, (2,) * len(of_prompt)), of_prompt, terms={"mine": of_prompt})
    found = rollout_reward_metrics([group])
    assert "reward/std" not in found and "rewards/mine/std" not in found
    assert found.get("reward", 2.0) == found.get("rewards/mine/mean", 2.0) == 2.0


def test_a_prompt_that_is_not_trained_on_is_not_normalized_over() -> None:
    """With a baseline of the group, a prompt with one reward teaches nothing."""

    def advantages(*rewards: list[float]) -> torch.Tensor:
        of = [Group(make_tree(i, 2, (2, 3, 2)), torch.tensor(r, dtype=torch.float64)) for i, r in enumerate(rewards)]
        algorithm = made(tiny_model("llama"), of, name="reinforce_pp", group_baseline=True, beta=0.0)
        algorithm.begin_step(0, 0.0, [])
        return torch.cat([g.extras["advantages"] for g in algorithm.groups[:2]])

    none = float("nan")
    taught = [1.0, 2.0, 4.0], [0.0, 1.0, 5.0]
    assert torch.allclose(advantages(*taught, [1.0, none, none]), advantages(*taught), rtol=1e-12)

"""PPO: token rewards and advantages by hand, unequal and one-token completions, the value gradient, and effects of options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import make_tree, tiny_model
from steps import small_loop, step_gradient

from penchant.algorithms.advantages import at_last_token, gae
from penchant.algorithms.ppo import PPO, PPOConfig, _update_moments
from penchant.algorithms.rollouts import Group
from penchant.data import packing
from penchant.data.packing import pack
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.models.reward import ValueHead
from penchant.training.loop import Loop
from penchant.training.optim import MasterAdamW

LENGTHS = [3, 1, 6, 2]
REWARDS = [1.0, -0.5, 2.0, 0.25]


class Fixed:
    """A writer that always returns the same completions, one per prompt, none of them with EOS."""

    seed = 0

    def write(self, prompts: Any, iteration: int, samples: Any = None) -> list[Group]:
        trees = [make_tree(i, 1 + 2 * i, (n,)) for i, n in enumerate(LENGTHS)]
        return [Group(t, torch.tensor([r], dtype=torch.float64)) for t, r in zip(trees, REWARDS, strict=True)]


def made(seed: int = 0, **config: Any) -> PPO:
    torch.manual_seed(0)
    head = ValueHead(32).double()
    torch.nn.init.normal_(head.weight, std=0.3)
    cfg = PPOConfig(**{"name": "ppo", "max_new_tokens": 6, "epochs": 1, "temperature": 1.0, **config})
    reference = LiveReference(Scorer(tiny_model("llama", seed=1), "shared"))
    return PPO(Scorer(tiny_model("llama", seed=seed), "shared"), reference, Fixed(), cfg, 20, head)  # type: ignore[arg-type]


def gradients(ppo: PPO, sizes: list[int]) -> torch.Tensor:
    return step_gradient(ppo, [], sizes, ppo.value_head.parameters())


def loop_of(ppo: PPO, folder: Path, **train: Any) -> Loop:
    optimizer = MasterAdamW(ppo.scorer.model.named_parameters(), dtype=torch.float64)
    trees = [g.tree for g in ppo.writer.write([], 0)]
    settings = {"batch_size": 4, "warmup_fraction": 0.0, **train}
    return small_loop(ppo, optimizer, trees, settings, folder, peak_lr=1e-3)


def extras(ppo: PPO, name: str) -> torch.Tensor:
    return torch.cat([g.extras[name] for g in ppo.groups])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_advantages_are_gae_of_token_rewards_by_hand(estimator: str) -> None:
    ppo = made(beta=0.2, kl_estimator=estimator, whiten_advantages=False, gamma=0.9, **{"lambda": 0.8})
    ppo.begin_step(0, 0.0, [])
    d = extras(ppo, "old") - extras(ppo, "ref")
    kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator]
    lengths = torch.tensor(LENGTHS)
    rewards = at_last_token(torch.tensor(REWARDS, dtype=torch.float64), lengths) - 0.2 * kl
    expected, returns = gae(rewards, extras(ppo, "values"), lengths, gamma=0.9, lam=0.8)
    assert torch.allclose(extras(ppo, "advantages"), expected, rtol=1e-12)
    assert torch.allclose(extras(ppo, "returns"), returns, rtol=1e-12)
    # the reward is on each completion's last real token, also without EOS and for a single-token completion
    assert rewards[[2, 3, 9, 11]].tolist() == pytest.approx(
        [r - 0.2 * float(kl[i]) for r, i in zip(REWARDS, (2, 3, 9, 11), strict=True)]
    )


def test_the_first_update_has_ratio_1_and_reinforces_with_the_advantages() -> None:
    ppo = made(value_coef=0.0)
    got = gradients(ppo, [4])
    model = ppo.scorer.model
    model.zero_grad()
    batch = pack([g.tree for g in ppo.groups])
    tokens = ppo.scorer.logps(batch).tokens
    (-(extras(ppo, "advantages") * tokens).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (got[: len(expected)] - expected).norm() <= 1e-9 * expected.norm()
    out = ppo.loss(ppo.score(batch))
    assert out.metrics["ratio"][0].tolist() == pytest.approx([1.0] * 12, abs=1e-12)


def test_advantages_are_whitened_over_real_tokens_only() -> None:
    ppo = made()
    ppo.begin_step(0, 0.0, [])
    a = extras(ppo, "advantages")
    assert len(a) == sum(LENGTHS)
    assert a.mean().item() == pytest.approx(0.0, abs=1e-12) and a.var().item() == pytest.approx(1.0, rel=1e-6)


def test_micro_batches_do_not_matter() -> None:
    one, many = gradients(made(), [4]), gradients(made(), [1, 2, 1])
    assert (one - many).norm() <= 1e-9 * one.norm()


def test_values_learn_their_returns() -> None:
    ppo = made(value_clip=None, value_coef=1.0, epochs=2)
    optimizer = torch.optim.Adam(ppo.value_head.parameters(), lr=0.05)
    ppo.begin_step(0, 0.0, [])
    batch = pack([g.tree for g in ppo.groups])
    errors = []
    for _ in range(60):
        out = ppo.loss(ppo.score(batch))
        errors.append(float(out.metrics["value/error"][0].mean()))
        optimizer.zero_grad()
        out.terms["value"][0].mean().backward()
        optimizer.step()
    assert errors[-1] < errors[0] / 5


def test_a_value_model_of_its_own_leaves_the_policys_hidden_states_alone() -> None:
    ppo = made()
    ppo.value_scorer = Scorer(tiny_model("llama", seed=3), "shared")
    ppo.begin_step(0, 0.0, [])
    out = ppo.loss(ppo.score(pack([g.tree for g in ppo.groups])))
    out.terms["value"][0].mean().backward()
    assert all(p.grad is None or not p.grad.any() for p in ppo.scorer.model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in ppo.value_scorer.model.parameters())


@pytest.mark.parametrize(("threads", "minibatches"), [(1, 2), (3, 2), (3, 1)])
def test_policy_and_value_model_in_passes_side_by_side(
    threads: int, minibatches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics and weights equal a step with sequential passes through transformers' own layers."""
    monkeypatch.setattr(packing, "PASS_TOKENS", 16)
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    for kernels in ("off", "auto"):
        ppo = made(epochs=2, minibatches=minibatches)
        ppo.tokens_per_step = 200
        ppo.scorer = Scorer(ppo.scorer.model, "shared", kernels)
        ppo.reference = LiveReference(Scorer(ppo.reference.scorer.model, "shared", kernels))
        own = tiny_model("llama", seed=3)
        ppo.value_scorer = Scorer(own, "shared", kernels)
        both = torch.nn.ModuleList([ppo.scorer.model, own, ppo.value_head])
        optimizer = MasterAdamW(both.named_parameters(), dtype=torch.float64, eps=1.0)
        loop = loop_of(ppo, tmp_path, tokens_per_step=200, max_grad_norm=None)
        loop.optimizer = optimizer
        strands = [b.strand for b in loop._micro_batches([g.tree for g in ppo.writer.write([], 0)])]
        assert ppo.side_by_side == (kernels == "auto")
        assert strands == (["policy", "policy", "value", "value"] if kernels == "auto" else [""])
        lines = [loop.take_step(i, loop.schedule)[0] for i in range(4)]
        found.append((lines, [p.detach().clone() for p in both.parameters()]))
    torch.set_num_threads(before)
    (plain_lines, plain), (lines, weights) = found
    for line, plain_line in zip(lines, plain_lines, strict=True):
        assert line.pop("kind") == plain_line.pop("kind") and line == pytest.approx(plain_line, rel=1e-6, abs=1e-9)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(weights, plain, strict=True))


def test_adaptive_control_follows_its_target() -> None:
    near, far = (
        made(kl_control="adaptive", kl_target=1e-3, kl_horizon=10),
        made(kl_control="adaptive", kl_target=1e6, kl_horizon=10),
    )
    for ppo in (near, far):
        assert ppo.beta == 0.2
        ppo.begin_step(0, 0.0, [])
        assert ppo.step_values()["beta"] == 0.2  # that of these rollouts
    drift = float((extras(near, "old") - extras(near, "ref")).sum()) / 4
    error = max(-0.2, min(0.2, drift / 1e-3 - 1))
    assert near.beta == pytest.approx(0.2 * (1 + error * 4 / 10))
    assert far.beta == pytest.approx(0.2 * (1 - 0.2 * 4 / 10))


def test_scores_are_normalized_by_their_running_deviation_and_clipped() -> None:
    ppo = made(normalise_scores=True, score_clip=1.0)
    first, second = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64), torch.tensor([-2.0, 8.0], dtype=torch.float64)
    assert ppo._shape_rewards(first).tolist() == pytest.approx([0.5, 1.0, 1.0])
    expected = (second / torch.cat([first, second]).std()).clamp(-1, 1)
    assert ppo._shape_rewards(second).tolist() == pytest.approx(expected.tolist())


def test_running_moments_equal_those_of_everything_at_once() -> None:
    parts = [torch.randn(n, dtype=torch.float64) for n in (3, 1, 7)]
    moments = torch.zeros(3, dtype=torch.float64)
    for p in parts:
        moments = _update_moments(moments, p)
    everything = torch.cat(parts)
    squares = float((everything - everything.mean()).square().sum())
    assert moments.tolist() == pytest.approx([11, float(everything.mean()), squares])


@pytest.mark.parametrize(("jump", "taken"), [(2.0, True), (5.0, False)])
@pytest.mark.parametrize("tokens_per_step", [20, 2048])
def test_the_ratio_guard_refuses_a_whole_step(tmp_path: Path, jump: float, taken: bool, tokens_per_step: int) -> None:
    """By the mean ratio over all micro-batches: e^2 is within the limit of 10, e^5 is not."""
    ppo = made()
    trees = ppo.begin_step(0, 0.0, [])
    for g in ppo.groups:
        g.extras["old"] = g.extras["old"] - jump  # as if the policy had jumped
    parameters = list(ppo.scorer.model.parameters())
    before = [p.detach().clone() for p in parameters]
    loop = loop_of(ppo, tmp_path, tokens_per_step=tokens_per_step)
    loop.trees = trees
    line, _, _ = loop.take_step(0, loop.schedule)
    moved = any(bool((p != b).any()) for p, b in zip(parameters, before, strict=True))
    assert moved == taken and ("skipped" not in line) == taken
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize(
    "option",
    [
        {"beta": 1.0},
        {"kl_estimator": "k3"},
        {"gamma": 0.5},
        {"lambda": 0.1},
        {"value_coef": 0.7},
        {"whiten_advantages": False},
        {"whiten_rewards": True, "whiten_advantages": False},
        {"normalise_scores": True, "whiten_advantages": False},
        {"score_clip": 0.3},
        {"kl_control": "adaptive"},
    ],
    ids=str,
)
def test_every_option_changes_the_gradient(option: dict[str, Any]) -> None:
    base = {"whiten_advantages": False} if "whiten_advantages" in option and len(option) > 1 else {}
    assert not torch.allclose(gradients(made(**base), [4]), gradients(made(**option), [4]), rtol=1e-6)


@pytest.mark.parametrize(
    "option", [{"clip": 0.05}, {"clip_high": 0.5}, {"value_clip": 0.01}, {"value_clip": None}], ids=str
)
def test_every_clip_changes_a_later_update(option: dict[str, Any]) -> None:
    """If the policy and its values have moved by more than the clip since sampling."""

    def loss(**config: Any) -> torch.Tensor:
        ppo = made(epochs=2, **config)
        batch = pack(ppo.begin_step(0, 0.0, []))
        for g in ppo.groups:
            g.extras["old"] = g.extras["old"] - 0.3
            g.extras["values"] = g.extras["values"] + 1.0
        out = ppo.loss(ppo.score(batch))
        return torch.cat([out.losses, out.terms["value"][0]])

    assert not torch.allclose(loss(), loss(**option), rtol=1e-3)


def test_both_ends_of_a_reward_are_clipped() -> None:
    assert made(score_clip=1.0)._shape_rewards(torch.tensor([-3.0, -0.5, 0.5, 3.0])).tolist() == [-1.0, -0.5, 0.5, 1.0]


def test_whitened_rewards_keep_their_mean() -> None:
    ppo = made(beta=0.2, whiten_rewards=True, whiten_advantages=False, gamma=0.9, **{"lambda": 0.8})
    ppo.begin_step(0, 0.0, [])
    lengths = torch.tensor(LENGTHS)
    rewards = at_last_token(torch.tensor(REWARDS, dtype=torch.float64), lengths)
    rewards = rewards - 0.2 * (extras(ppo, "old") - extras(ppo, "ref"))
    rewards = (rewards - rewards.mean()) / rewards.std() + rewards.mean()
    expected, _ = gae(rewards, extras(ppo, "values"), lengths, gamma=0.9, lam=0.8)
    assert torch.allclose(extras(ppo, "advantages"), expected, rtol=1e-6)


@pytest.mark.parametrize("normalized", ["whiten_advantages", "whiten_rewards"])
def test_a_completion_without_a_reward_is_not_normalized_over(normalized: str) -> None:
    config = {"beta": 0.2, "whiten_advantages": False, normalized: True}
    ppo, without = made(**config), made(**config)
    everything: Any = Fixed().write([], 0)
    everything[1].rewards[0] = torch.nan
    some = [replace(g, extras={}) for i, g in enumerate(everything) if i != 1]
    ppo.writer, without.writer = (SimpleNamespace(seed=0, write=lambda *_, g=g: g) for g in (everything, some))  # type: ignore[assignment]
    for one in (ppo, without):
        one.begin_step(0, 0.0, [])
    got = torch.cat([g.extras["advantages"] for i, g in enumerate(ppo.groups) if i != 1])
    assert torch.allclose(got, extras(without, "advantages"), rtol=1e-9)

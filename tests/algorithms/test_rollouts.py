"""Rollout groups: the prompt a reward sees, what sampling depends on, and the reward without EOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from penchant.algorithms.grpo import GroupConfig, GroupPolicyGradient
from penchant.algorithms.rollouts import Group, OnPolicy, PendingRollouts, Writer
from penchant.data.packing import pack
from penchant.errors import RewardError
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.rewards.functions import Judgement, Reward, RewardTerm
from penchant.rollout.generate import Sample
from penchant.types import LossOutput, TokenTree

EOS = 1


@pytest.fixture(scope="module")
def model() -> Any:
    """A model with the byte tokenizer's vocabulary for which about every fourth token is EOS."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).eval()
    made.lm_head = torch.nn.Linear(16, 260, bias=True)
    torch.nn.init.zeros_(made.lm_head.bias)
    with torch.no_grad():
        made.lm_head.bias[EOS] = 4.5
    return made


def prompts(*texts: str) -> list[TokenTree]:
    tokenizer = tiny_tokenizer()
    ids = [np.array(tokenizer(t, add_special_tokens=False)["input_ids"], np.int32) for t in texts]
    return [TokenTree(10 + i, p, (), (), f"made-up:{i}") for i, p in enumerate(ids)]


def writer(model: Any, seen: list[tuple[str, str]] | None = None, seed: int = 0, **config: Any) -> Writer:
    def judge(asked: Sequence[str], answers: Sequence[str]) -> list[float]:
        if seen is not None:
            seen.extend(zip(asked, answers, strict=True))
        return [float(len(p)) for p in asked]

    settings = {"name": "rloo", "samples": 3, "max_new_tokens": 6, "temperature": 1.0, **config}
    return Writer(model, tiny_tokenizer(), Reward((RewardTerm("mine", judge),)), GroupConfig(**settings), seed)


def ids(groups: Sequence[Group]) -> list[list[list[int]]]:
    return [[c.tolist() for c in g.tree.completion_ids] for g in groups]


def test_a_reward_sees_each_completion_with_its_own_prompt(model: Any) -> None:
    seen: list[tuple[str, str]] = []
    groups = writer(model, seen).write(prompts("a", "bcd"), 0)
    assert [p for p, _ in seen] == ["a"] * 3 + ["bcd"] * 3
    assert [t for _, t in seen] == [text for g in groups for text in g.texts]
    assert [g.rewards.tolist() for g in groups] == [[1.0] * 3, [3.0] * 3]


def test_a_reward_cannot_log_a_number_in_place_of_the_runs_own(model: Any) -> None:
    one: Any = writer(model)
    said = Judgement(np.zeros(3), {}, {"loss": 1.0})
    one.reward = SimpleNamespace(judge=lambda *_: said)
    with pytest.raises(RewardError, match='log_metric\\("loss"\\) would overwrite a metric of the run'):
        one.write(prompts("a"), 0)
    of_reward = {"rewards/mine/mean": 1.0}
    one.reward = SimpleNamespace(judge=lambda *_: Judgement(np.zeros(3), {"mine": np.zeros(3)}, of_reward))
    with pytest.raises(RewardError, match="would overwrite a metric of the run"):
        one.write(prompts("a"), 0)
    one.reward = SimpleNamespace(judge=lambda *_: replace(said, metrics={"digits": 1.0}))
    assert one.write(prompts("a"), 0)[0].logged == {"digits": 1.0}


def test_draws_belong_to_seed_iteration_and_row(model: Any) -> None:
    """They do not depend on the rest of the batch: a prompt gets the same completions alone."""
    one, two = prompts("a", "bcd")
    whole = ids(writer(model).write([one, two], 0))
    assert ids(writer(model).write([one, two], 0)) == whole
    assert ids(writer(model).write([two], 0)) == whole[1:]
    assert ids(writer(model).write([one, two], 1)) != whole
    assert ids(writer(model, seed=1).write([one, two], 0)) != whole
    assert ids(writer(model, seed=1).write([one, two], 0)) != ids(writer(model).write([one, two], 1))


def test_a_row_that_comes_twice_in_a_batch_has_draws_of_its_own_each_time(model: Any) -> None:
    one, two = prompts("a", "bcd")
    at = writer(model, samples=8)
    groups = at.write([one, two, one, one], 0)
    assert len({g.tree.row for g in groups}) == 4 and {g.tree.prompt_ids.tobytes() for g in groups[2:]} == {
        one.prompt_ids.tobytes()
    }
    assert ids(groups[:2]) == ids(writer(model, samples=8).write([one, two], 0))
    longest = [{tuple(c) for c in ids(groups)[i] if len(c) > 2} for i in (0, 2, 3)]
    assert all(longest) and len(set.union(*longest)) == sum(map(len, longest))
    at.begin([one, two, one, one], 1)
    assert ids(at.write([one, two, one, one], 1)) == ids(writer(model, samples=8).write([one, two, one, one], 1))
    assert at.ahead is None  # it was taken


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 2},
        {"repetition_penalty": 3.0},
        {"max_new_tokens": 4},
        {"samples": 2},
    ],
    ids=str,
)
def test_every_option_of_sampling_changes_what_is_written(model: Any, option: dict[str, Any]) -> None:
    assert ids(writer(model, **option).write(prompts("a", "bcd"), 0)) != ids(
        writer(model).write(prompts("a", "bcd"), 0)
    )


def test_completions_end_with_eos_and_those_that_do_not_pay_for_it(model: Any) -> None:
    (group,) = writer(model, samples=24, missing_eos_penalty=0.25).write(prompts("abc"), 0)
    cut = np.array(group.tree.truncated)
    assert cut.any() and not cut.all()
    for c, unfinished in zip(group.tree.completion_ids, cut, strict=True):
        assert (EOS in c) != unfinished and EOS not in c[:-1] and (len(c) == 6 or not unfinished)
    assert group.rewards.tolist() == [2.75 if unfinished else 3.0 for unfinished in cut]


def test_minibatches_are_cut_anew_in_every_epoch_and_miss_nobody(model: Any) -> None:
    class Unprepared(OnPolicy):
        def prepare(self, groups: list[Group]) -> None: ...

    writes: Any = writer(model, samples=2, max_new_tokens=1, epochs=3, minibatches=2)
    algorithm = Unprepared(Scorer(model, "shared"), None, writes, writes.config, 50)  # type: ignore[arg-type]
    trees = prompts(*(str(i) for i in range(8)))
    parts = [sorted(t.row for t in algorithm.begin_step(step, 0.0, trees)) for step in range(6)]
    assert all(sorted(a + b) == [10 + i for i in range(8)] for a, b in zip(parts[::2], parts[1::2], strict=True))
    assert len({tuple(p) for p in parts[::2]}) > 1


def _later_update(**config: Any) -> tuple[GroupPolicyGradient, LossOutput, torch.Tensor]:
    """A second update on the same rollouts after the policy has moved: (method, its loss, ratios by hand)."""
    model = tiny_model("llama")
    answers = (np.array([7, 8, 9], np.int32), np.array([10], np.int32))
    tree = TokenTree(0, np.array([5, 6], np.int32), answers, (True, True))

    class Fixed:
        seed = 0

        def write(self, *_: Any) -> list[Group]:
            old = torch.zeros(4, dtype=torch.float64)
            return [Group(tree, torch.tensor([1.0, 0.0], dtype=torch.float64), (), {"old": old})]

    settings = GroupConfig(**{"name": "grpo", "samples": 2, "max_new_tokens": 4, "epochs": 2, "beta": 0.0, **config})
    reference = LiveReference(Scorer(tiny_model("llama", seed=1), "shared"))
    algorithm = GroupPolicyGradient(Scorer(model, "shared"), reference, Fixed(), settings, 50)  # type: ignore[arg-type]
    batch = pack(algorithm.begin_step(0, 0.0, []))
    wrote = algorithm.scorer.logps(batch).tokens.detach()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    algorithm.begin_step(1, 1.0, [])
    out = algorithm.loss(algorithm.score(batch))
    return algorithm, out, torch.exp(algorithm.scorer.logps(batch).tokens.detach() - wrote)


def test_a_later_update_is_measured_against_the_policy_that_wrote() -> None:
    _, out, expected = _later_update()
    assert torch.allclose(out.metrics["ratio"][0], expected, rtol=1e-9) and (expected - 1).abs().max() > 1e-2


def test_what_the_sampler_said_is_compared_with_the_one_pass_of_an_update() -> None:
    algorithm, *_ = _later_update(epochs=1)
    (group,) = algorithm.groups
    batch = pack([group.tree])
    logps = algorithm.scorer.logps(batch).tokens.detach()
    away = torch.tensor([0.5, -0.25, 0.0, 1.0], dtype=torch.float64)
    group.extras["sampled"] = logps + away
    found = algorithm.loss(algorithm.score(batch)).metrics
    assert torch.allclose(found["rollout/logp_mismatch"][0], away.abs())
    assert torch.allclose(found["rollout/kl_k3"][0], torch.exp(-away) - 1 + away)


def test_both_clips_are_the_options() -> None:
    """RLOO's advantages for rewards 1 and 0 are 1 and -1, so each token is clipped at a different bound."""
    for clip, clip_high in ((0.01, None), (0.01, 0.03), (0.5, None)):
        _, out, ratio = _later_update(name="rloo", clip=clip, clip_high=clip_high)
        a = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
        bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
        per_token = torch.maximum(-a * ratio, -a * bounded)
        assert torch.allclose(out.losses, torch.stack([per_token[:3].sum(), per_token[3]]), rtol=1e-9)


def test_a_batch_that_is_written_ahead_is_the_same_from_a_checkpoint() -> None:
    # an environment wrote the second token and part of the prompt
    spoke = Sample([1, 2, 3], [-0.5, 0.0, -0.25], True, [True, False, True], [7, 8])
    written = [[spoke, Sample([4], [-1.0], False)]]
    again = PendingRollouts.from_tensors(PendingRollouts((3, (7,), 2), 5, lambda: written).tensors())
    assert again is not None and (again.of, again.version, again.samples()) == ((3, (7,), 2), 5, written)
